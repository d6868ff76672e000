"""CLIP (Radford et al., 2021), frozen, as functions over the checkpoint's own tensors.

Runs CLIP, MONET (Kim et al., 2024) and what open_clip trained with the same architecture, from a
folder with `model.safetensors` (names of Hugging Face, OpenAI or open_clip), the tokenizer's files
(vocab.json and merges.txt, or tokenizer.json, or OpenAI's bpe_simple_vocab_16e6.txt.gz) and,
where present, config.json, preprocessor_config.json or open_clip_config.json.

    w          tensors by Hugging Face name; sizes are read from them, replace some to tune them
    N, L       images or texts in a batch; tokens of one: 1 + patches, or the longest text's
    W, D       width of a tower; width of the shared embedding
    rows       the token of each sequence that the embedding is read from: class token, or the
               end-of-text token; the last block computes nothing for the others
    quick_gelu x sigmoid(1.702 x) = silu(1.702 x) / 1.702: both factors ride on the matrix products

Does NOT include: ResNet towers, dropout, padding masks (attention is causal, so padding after the
end of a text changes nothing), ftfy's repair of broken text.
"""
import gzip
import hashlib
import math
import re
import sys
import unicodedata
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from . import InputError, check_tensors, misfit, read_json, read_tensors

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
ACTIVATIONS = {"quick_gelu": (F.silu, 1.702), "gelu": (F.gelu, 1.0)}
TOKENIZER_FILES = (("merges.txt", "vocab.json"), ("tokenizer.json",),
                   ("bpe_simple_vocab_16e6.txt.gz",))
IGNORED = ("position_ids", "input_resolution", "context_length", "vocab_size", "attn_mask")
OPENAI_NAMES = (  # OpenAI's and open_clip's spelling -> Hugging Face's, applied in this order
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("visual.conv1.", "vision_model.embeddings.patch_embedding."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    ("token_embedding.", "text_model.embeddings.token_embedding."),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
    ("text_projection", "text_projection.weight"),
    (".ln_1.", ".layer_norm1."), (".ln_2.", ".layer_norm2."), (".attn.", ".self_attn."),
    (".mlp.c_fc.", ".mlp.fc1."), (".mlp.c_proj.", ".mlp.fc2."))


# ---- 1. The two towers ----

def norm(w, name, x, eps):
    """LayerNorm of x (..., W) with the checkpoint's `name`.weight and .bias."""
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)


def linear(w, name, x):
    """x (rows, in) -> (rows, out) with the checkpoint's `name`.weight and .bias."""
    return F.linear(x, w[name + ".weight"], w[name + ".bias"])


def attention(w, p, y, rows, mask, heads):
    """Multi-head self-attention of y (N, L, W) at the tokens `rows` (N,) or all -> (rows, W)."""
    n, length, width = y.shape
    flat = y.flatten(0, 1)
    asking = flat if rows is None else flat[rows]
    q, k, v = (linear(w, f"{p}self_attn.{name}_proj", x).view(n, -1, heads, width // heads)
               for name, x in (("q", asking), ("k", flat), ("v", flat)))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (N, heads, L, W / heads)
    causal = mask is not None and rows is None
    out = F.scaled_dot_product_attention(q, k, v, None if causal else mask, is_causal=causal)
    return linear(w, p + "self_attn.out_proj", out.transpose(1, 2).reshape(-1, width))


def mlp(w, p, y, activation):
    """fc2(act(fc1(y))) for y (rows, W); activation's inner and outer factor cost no extra pass."""
    act, factor = ACTIVATIONS[activation]
    hidden = torch.addmm(w[p + "mlp.fc1.bias"], y, w[p + "mlp.fc1.weight"].T,
                         beta=factor, alpha=factor)
    return torch.addmm(w[p + "mlp.fc2.bias"], act(hidden), w[p + "mlp.fc2.weight"].T,
                       alpha=1 / factor)


def transformer(w, tower, x, rows, mask, heads, activation, eps):
    """Pre-norm blocks over x (N, L, W), in the order of their numbers -> (N, W), or all (N L, W).

    `mask` (N, 1, 1, L), text only: the keys that the last block's `rows` may see.
    """
    n, length, width = x.shape
    heads = heads or width // 64  # true of every CLIP by OpenAI; others say so in their config
    depth = sum(k.startswith(tower) and k.endswith("layer_norm1.weight") for k in w)
    x = x.reshape(-1, width)
    for layer in range(depth):
        p = f"{tower}.encoder.layers.{layer}."
        keep = rows if layer == depth - 1 else None
        y = norm(w, p + "layer_norm1", x, eps).view(n, length, width)
        x = (x if keep is None else x[keep]) + attention(w, p, y, keep, mask, heads)
        x = x + mlp(w, p, norm(w, p + "layer_norm2", x, eps), activation)
    return x


def image_tower(w, pixels, heads=None, activation="quick_gelu", eps=1e-5, every_token=False):
    """Embeddings (N, D), not normalised, of pixels (N, 3, H, W); differentiable in w and pixels.

    `every_token` gives (N, 1 + patches, D) instead: the class token's embedding, then, through the
    same LayerNorm and projection, that of every patch, row by row.
    """
    kernel = w["vision_model.embeddings.patch_embedding.weight"]
    patch, n = kernel.shape[-1], len(pixels)
    side = pixels.shape[-1] // patch
    x = pixels.reshape(n, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    x = F.linear(x.reshape(n, side * side, -1), kernel.flatten(1))  # the convolution: (N, P, W)
    first = w["vision_model.embeddings.class_embedding"].expand(n, 1, -1)
    x = torch.cat([first, x], 1) + w["vision_model.embeddings.position_embedding.weight"]
    x = norm(w, "vision_model.pre_layrnorm", x, eps)
    rows = None if every_token else torch.arange(n, device=x.device) * x.shape[1]
    x = transformer(w, "vision_model", x, rows, None, heads, activation, eps)
    x = norm(w, "vision_model.post_layernorm", x, eps) @ w["visual_projection.weight"].T
    return x.view(n, -1, x.shape[-1]) if every_token else x


def text_tower(w, tokens, ends, heads=None, activation="quick_gelu", eps=1e-5):
    """Embeddings (N, D), not normalised, read at `ends` (N,), the end-of-text token's position.

    `tokens` are ids (N, L), or token embeddings (N, L, W) of one's own making, as CoOp's contexts.
    What comes after an end is never seen, so any padding will do. Differentiable in w and tokens.
    """
    table = w["text_model.embeddings.token_embedding.weight"]
    x = F.embedding(tokens, table) if tokens.ndim == 2 else tokens
    n, length = x.shape[:2]
    x = x + w["text_model.embeddings.position_embedding.weight"][:length]
    places = torch.arange(length, device=x.device)
    mask = (places <= ends[:, None])[:, None, None]  # (N, 1, 1, L)
    rows = torch.arange(n, device=x.device) * length + ends
    x = transformer(w, "text_model", x, rows, mask, heads, activation, eps)
    return norm(w, "text_model.final_layer_norm", x, eps) @ w["text_projection.weight"].T


# ---- 2. Tokenizer ----

def byte_symbols():
    """The printable characters that stand for the 256 bytes: byte -> character, in CLIP's order."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = sorted(set(range(256)) - set(shown))
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Tokenizer:
    """CLIP's byte-pair encoding, from `vocab` (token -> id) and `merges` (pairs, best first).

    Ids equal those of Hugging Face's CLIPTokenizerFast, but for a literal "<|endoftext|>" in a
    text, which is plain text here.
    """

    def __init__(self, vocab, merges):
        self.vocab, self.ranks = vocab, {tuple(pair): rank for rank, pair in enumerate(merges)}
        self.start, self.end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
        self.symbols, self.known = byte_symbols(), {}

    def merge(self, word):
        """Ids of one word: of all neighbours the pair of best rank is joined, until none is."""
        parts = [self.symbols[byte] for byte in word.encode("utf-8", "replace")]
        parts[-1] += "</w>"
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, math.inf) for pair in zip(parts, parts[1:], strict=False)]
            at = ranks.index(min(ranks))
            if ranks[at] == math.inf:
                break
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        return [self.vocab.get(part, self.end) for part in parts]

    def __call__(self, text, context):
        """Ids of a text between the two marks; beyond `context` ids the text is cut, not the mark.

        Python's idea of words is mended in three points: str.lower treats a final sigma apart,
        letters (\\w) hold the numerals Nl and No, and \\x1c to \\x1f count as white space.
        """
        text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
        numerals = "".join({c for c in text if unicodedata.category(c) in ("Nl", "No")})
        ids = [self.start]
        for word in re.findall(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_{numerals}]+|[\d{numerals}]|"
                               r"(?:[^\s\w]|[_\x1c-\x1f])+", text):
            if word not in self.known:
                self.known[word] = self.merge(word)
            ids += self.known[word]
        return ids[:context - 1] + [self.end]


def read_tokenizer(files, rows):
    """Tokenizer from one of TOKENIZER_FILES' groups; `rows`: how many tokens the model embeds."""
    try:
        if files[0].suffix == ".json":
            model = read_json(files[0])["model"]
            added = {t["content"]: t["id"] for t in read_json(files[0])["added_tokens"]}
            merges = [m.split() if isinstance(m, str) else m for m in model["merges"]]
            return Tokenizer(model["vocab"] | added, merges)
        if files[0].suffix == ".txt":
            lines = files[0].read_text(encoding="utf-8").split("\n")
            merges = [line.split() for line in lines if line and not line.startswith("#version")]
            return Tokenizer(read_json(files[1]), merges)
        lines = gzip.decompress(files[0].read_bytes()).decode().split("\n")
        merges = [line.split() for line in lines[1:rows - 512 - 2 + 1]]
        letters = [*byte_symbols().values()]
        tokens = [*letters, *(c + "</w>" for c in letters), *map("".join, merges),
                  "<|startoftext|>", "<|endoftext|>"]
        return Tokenizer({token: i for i, token in enumerate(tokens)}, merges)
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise misfit(files[0], "CLIP's vocabulary and merges", repr(error)) from error


# ---- 3. Checkpoint and settings ----

def openai_name(name):
    """OpenAI's spelling of a Hugging Face tensor name, for errors about a file that uses it."""
    for theirs, ours in reversed(OPENAI_NAMES):
        name = name.replace(ours, theirs)
    return re.sub(r"[qkv]_proj\.", "in_proj_", name)


def from_openai(tensors):
    """OpenAI's and open_clip's tensors under Hugging Face's names; views, nothing is copied."""
    out = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(module\.)?(text\.)?", "", name)
        for theirs, ours in OPENAI_NAMES:
            name = name.replace(theirs, ours)
        if "in_proj_" in name:
            out |= {name.replace("in_proj_", f"{part}_proj."): rows
                    for part, rows in zip("qkv", tensor.chunk(3), strict=False)}
        else:  # projections are stored as (in, out): as they are square, no check would notice
            out[name] = tensor.T if name.endswith("_projection.weight") else tensor
    return out


def expected_shapes(w, config):
    """Name -> shape of all tensors: sizes that config.json states, else those of some in w."""
    shared = config.get("projection_dim") or w["visual_projection.weight"].shape[0]
    shapes = {"logit_scale": ()}
    for tower, last, norms in (
            ("vision", "visual_projection.weight", ["pre_layrnorm", "post_layernorm"]),
            ("text", "text_projection.weight", ["final_layer_norm"])):
        stated, p = config.get(tower + "_config", {}), f"{tower}_model.encoder.layers."
        width = stated.get("hidden_size") or w[last].shape[1]
        inner = stated.get("intermediate_size") or w[p + "0.mlp.fc1.weight"].shape[0]
        found = {int(k.removeprefix(p).split(".")[0]) for k in w if k.startswith(p)}
        depth = stated.get("num_hidden_layers") or max(found) + 1
        biased = {f"{tower}_model.{n}": (width,) for n in norms}
        for layer in range(depth):
            q = f"{p}{layer}."
            biased |= {f"{q}self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
            biased |= {q + "layer_norm1": (width,), q + "layer_norm2": (width,),
                       q + "mlp.fc1": (inner, width), q + "mlp.fc2": (width, inner)}
        shapes |= {n + ".weight": shape for n, shape in biased.items()}
        shapes |= {n + ".bias": shape[:1] for n, shape in biased.items()}
        shapes |= {last: (shared, width)} | embedding_shapes(w, tower, stated, width)
    return shapes


def embedding_shapes(w, tower, stated, width):
    """Name -> shape of one tower's embeddings, as `expected_shapes`."""
    p = tower + "_model.embeddings."
    places = w[p + "position_embedding.weight"].shape[0]
    if tower == "text":
        vocab = stated.get("vocab_size") or w[p + "token_embedding.weight"].shape[0]
        return {p + "token_embedding.weight": (vocab, width), p + "position_embedding.weight":
                (stated.get("max_position_embeddings") or places, width)}
    patch = stated.get("patch_size") or w[p + "patch_embedding.weight"].shape[-1]
    side = stated["image_size"] // patch if "image_size" in stated else math.isqrt(places - 1)
    return {p + "class_embedding": (width,), p + "patch_embedding.weight": (width, 3, patch, patch),
            p + "position_embedding.weight": (1 + side * side, width)}


def read_configs(folder):
    """(config.json, preprocessor_config.json), from open_clip_config.json where those lack."""
    config = read_json(folder / "config.json")
    pixels = read_json(folder / "preprocessor_config.json")
    theirs = read_json(folder / "open_clip_config.json")
    if theirs and "vision_config" not in config:
        model = theirs["model_cfg"]
        image, act = model["vision_cfg"], "quick_gelu" if model.get("quick_gelu") else "gelu"
        config = {"text_config": {"hidden_act": act,
                                  "num_attention_heads": model["text_cfg"]["heads"]},
                  "vision_config": {"hidden_act": act, "num_attention_heads":
                                    image["width"] // image.get("head_width", 64)}}
    if theirs and not pixels:
        given = theirs.get("preprocess_cfg", {})
        pixels = {"image_" + key: given[key] for key in ("mean", "std") if key in given}
    return config, pixels


def tower_settings(path, stated):
    """What tensors don't tell about a tower, as its function's keyword arguments."""
    activation = stated.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise misfit(path, "hidden_act quick_gelu or gelu", repr(activation))
    return {"heads": stated.get("num_attention_heads"), "activation": activation,
            "eps": stated.get("layer_norm_eps", 1e-5)}


def pixel_settings(path, given, image_size):
    """Mean, std, sizes and filter of `preprocess`; warns where MONET's are not ImageNet's."""
    monet = "monet" in path.absolute().parent.name.lower()
    usual = [IMAGENET_MEAN, IMAGENET_STD] if monet else [CLIP_MEAN, CLIP_STD]
    mean, std = given.get("image_mean", usual[0]), given.get("image_std", usual[1])
    if monet and [mean, std] != usual:
        print(f"warning: {path} normalises with mean {mean} and std {std}, but MONET was trained "
              f"with ImageNet's, {usual[0]} and {usual[1]}", file=sys.stderr)
    size, crop = given.get("size", image_size), given.get("crop_size", image_size)
    if isinstance(size, dict):
        size = size.get("shortest_edge") or [size["width"], size["height"]]
    if crop not in (image_size, {"height": image_size, "width": image_size}):
        raise misfit(path, f"a crop_size of {image_size} as the weights have", crop)
    return {"mean": mean, "std": std, "resize": size, "resample": given.get("resample", 3)}


# ---- 4. The frozen model ----

class CLIP:
    """A frozen CLIP: its tensors, its tokenizer, its settings. `load_clip` makes one.

    `image` and `text` are the keyword arguments of the towers, `pixels` those of preprocessing.
    """

    def __init__(self, path, tensors, files, image, text, pixels, image_size):
        self.path, self.tensors, self.files, self.image_size = path, tensors, files, image_size
        self.image, self.text, self.pixels = image, text, pixels
        self.logit_scale = tensors["logit_scale"].exp().item()
        self.dim = tensors["visual_projection.weight"].shape[0]

    @cached_property
    def tokenizer(self):
        """Read when the first text comes: it takes longer than mapping the tensors."""
        table = self.tensors["text_model.embeddings.token_embedding.weight"]
        return read_tokenizer(self.files, len(table))

    def to(self, device):
        """Itself, with its tensors on `device`."""
        self.tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return self

    def describe(self):
        """All beyond the tensors that changes an embedding, ready for JSON."""
        words = hashlib.sha256(b"".join(file.read_bytes() for file in self.files)).hexdigest()
        return {"image": self.image, "text": self.text, "pixels": self.pixels, "tokenizer": words}

    def preprocess(self, image):
        """(3, H, W) float32 of a PIL image, equal to Hugging Face's CLIPImageProcessor on Pillow.

        RGB, transparency over white; short side to size; centre crop; (x / 255 - mean) / std.
        16-bit grey saturates in Pillow's conversion: scale it to 8 bits before.
        """
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image, size, crop = image.convert("RGB"), self.pixels["resize"], self.image_size
        if isinstance(size, int):
            size = [int(size * side / min(image.size)) for side in image.size]
        left, top = ((side - crop) // 2 for side in size)
        image = image.resize(size, self.pixels["resample"])
        x = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) / 255
        x = (x - np.float32(self.pixels["mean"])) / np.float32(self.pixels["std"])
        return torch.from_numpy(x).permute(2, 0, 1).contiguous()

    @torch.no_grad()
    def encode_image(self, pixels):
        """(N, D), not normalised, of pixels (N, 3, H, W) from `preprocess`."""
        pixels = pixels.to(self.tensors["logit_scale"].device)
        return self.checked(image_tower(self.tensors, pixels, **self.image))

    @torch.no_grad()
    def encode_text(self, texts):
        """(N, D), not normalised, of a list of N texts, padded to the longest."""
        context = len(self.tensors["text_model.embeddings.position_embedding.weight"])
        ids = [torch.tensor(self.tokenizer(text, context)) for text in texts]
        padded = pad_sequence(ids, True).to(self.tensors["logit_scale"].device)
        ends = (padded == self.tokenizer.end).int().argmax(1)
        return self.checked(text_tower(self.tensors, padded, ends, **self.text))

    def checked(self, embeddings):
        """The embeddings, unless a weight's NaN or infinity has reached them."""
        if not torch.isfinite(embeddings).all():
            raise misfit(self.path, "finite weights", "embeddings with NaN or infinity")
        return embeddings


def load_clip(folder):
    """CLIP from a folder (top of this file); InputError for whatever is missing or does not fit."""
    folder = Path(folder)
    paths = [folder / "model.safetensors", folder / "open_clip_model.safetensors"]
    path = paths[not paths[0].exists() and paths[1].exists()]
    w, (config, pixels), alias = read_tensors(path), read_configs(folder), str
    if any(".resblocks." in name for name in w):
        w, alias = from_openai(w), openai_name
    try:
        shapes = expected_shapes(w, config)
    except (KeyError, IndexError, ValueError) as error:
        raise misfit(path, "the tensors of a CLIP", f"none for {error}") from error
    w = check_tensors(path, w, shapes, IGNORED, alias)
    files = [[folder / name for name in group] for group in TOKENIZER_FILES]
    files = [group for group in files if all(file.exists() for file in group)]
    if not files:
        raise misfit(folder / "vocab.json", "it beside merges.txt, or tokenizer.json", "neither")
    width, _, patch, _ = w["vision_model.embeddings.patch_embedding.weight"].shape
    side = math.isqrt(len(w["vision_model.embeddings.position_embedding.weight"]) - 1)
    towers = [tower_settings(folder / "config.json", config.get(side + "_config", {})) for side in ("vision", "text")]
    return CLIP(path, w, files[0], *towers, pixel_settings(folder / "preprocessor_config.json", pixels, side * patch), side*patch)
