"""CLIP (Radford et al., 2021), frozen, as functions over the checkpoint's own tensors.

Runs OpenAI's CLIP, MONET and open_clip's of that architecture from a folder with
model.safetensors, the tokenizer's files (TOKENIZERS) and, if there are any, the json files of
Hugging Face or open_clip.

    w        tensors by Hugging Face name; put others in their place to tune them (LoRA)
    N, L     sequences in a batch, tokens in a sequence
    W, D     width of a tower, width of the shared embedding
    rows     where among the N L tokens the N embeddings are read: class tokens, or ends of texts
    factor   1.702: quick_gelu(x) = x sigmoid(1.702 x) = silu(1.702 x) / 1.702

Does NOT include: ResNet towers, dropout, padding masks (attention is causal: what follows the end
of a text is never seen), the repair of broken Unicode that OpenAI's tokenizer does.
"""
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

from . import check_tensors, misfit, read_json, read_tensors

CLIP_PIXELS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET_PIXELS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # what MONET was trained with
ACTIVATIONS = {"quick_gelu": (F.silu, 1.702), "gelu": (F.gelu, 1.0)}  # name -> function, factor
TOKENIZERS = (["merges.txt", "vocab.json"], ["tokenizer.json"])
IGNORED = ("position_ids", "input_resolution", "context_length", "vocab_size", "attn_mask")
OPENAI_NAMES = (  # OpenAI's and open_clip's spelling -> Hugging Face's, in order
    ("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"),
    ("visual.", "vision_model."), ("transformer.resblocks.", "encoder.layers."),
    ("class_embedding", "embeddings.class_embedding"), ("conv1", "embeddings.patch_embedding"),
    ("token_embedding", "embeddings.token_embedding"), ("ln_final", "final_layer_norm"),
    ("positional_embedding", "embeddings.position_embedding.weight"), (".ln_pre", ".pre_layrnorm"),
    (".ln_post", ".post_layernorm"), (".ln_", ".layer_norm"), ("attn.", "self_attn."),
    ("c_fc", "fc1"), ("c_proj", "fc2"))


# ---- 1. The two towers ---------------------------------------------------------------------------
def norm(w, name, x, eps):
    """LayerNorm of x (..., W) by the tensors `name`.weight and `name`.bias."""
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)


def attention(w, p, y, heads, rows, causal):
    """Multi-head self-attention over y (N, L, W), of the tokens `rows` (None: of all) -> (., W)."""
    n, length, width = y.shape
    flat = y.flatten(0, 1)
    asking, mask = flat, None
    if rows is not None:
        asking, places = flat[rows], torch.arange(length, device=y.device)
        mask = places <= (rows % length)[:, None, None, None] if causal else None
    q, k, v = (F.linear(x, w[f"{p}{name}_proj.weight"], w[f"{p}{name}_proj.bias"])
               .view(n, -1, heads, width // heads).transpose(1, 2)  # (N, heads, L, W / heads)
               for name, x in (("q", asking), ("k", flat), ("v", flat)))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and rows is None)
    return F.linear(out.transpose(1, 2).reshape(-1, width), w[p + "out_proj.weight"],
                    w[p + "out_proj.bias"])


def transformer(w, tower, x, rows, causal, heads, activation, eps):
    """Pre-norm blocks, by number, over x (N, L, W) -> (N, W) of the tokens `rows`, or (N L, W)."""
    n, length, width = x.shape
    act, factor = ACTIVATIONS[activation]
    depth = sum(k.startswith(tower) and k.endswith("layer_norm1.weight") for k in w)
    x = x.reshape(-1, width)
    for layer in range(depth):
        p = f"{tower}.encoder.layers.{layer}."
        keep = rows if layer == depth - 1 else None
        y = norm(w, p + "layer_norm1", x, eps).view(n, length, width)
        x = x if keep is None else x[keep]
        x = x + attention(w, p + "self_attn.", y, heads or width // 64, keep, causal)
        y = norm(w, p + "layer_norm2", x, eps)
        inner, outer = w[p + "mlp.fc1.weight"].T, w[p + "mlp.fc2.weight"].T  # scaled on the way
        y = act(torch.addmm(w[p + "mlp.fc1.bias"], y, inner, beta=factor, alpha=factor))
        x = torch.addmm(x + w[p + "mlp.fc2.bias"], y, outer, alpha=1 / factor)
    return x


def image_tower(w, pixels, heads=None, activation="quick_gelu", eps=1e-5, every_token=False):
    """Embeddings (N, D), not normalised, of pixels (N, 3, H, W); differentiable in all tensors.

    `every_token`: (N, 1 + patches, D), that of each patch, row by row, after the class token's.
    `heads` None: one per 64 channels, as in all of OpenAI's.
    """
    kernel = w["vision_model.embeddings.patch_embedding.weight"]
    n, patch = len(pixels), kernel.shape[-1]
    side = pixels.shape[-1] // patch
    x = pixels.reshape(n, 3, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    x = F.linear(x.reshape(n, side * side, -1), kernel.flatten(1))  # the convolution
    first = w["vision_model.embeddings.class_embedding"].expand(n, 1, -1)
    x = torch.cat([first, x], 1) + w["vision_model.embeddings.position_embedding.weight"]
    x = norm(w, "vision_model.pre_layrnorm", x, eps)  # (N, L, W)
    rows = None if every_token else torch.arange(n, device=x.device) * x.shape[1]
    x = transformer(w, "vision_model", x, rows, False, heads, activation, eps)
    x = F.linear(norm(w, "vision_model.post_layernorm", x, eps), w["visual_projection.weight"])
    return x.view(n, -1, x.shape[-1]) if every_token else x


def text_tower(w, tokens, ends, heads=None, activation="quick_gelu", eps=1e-5):
    """Embeddings (N, D), not normalised, read at `ends` (N,), the end-of-text token's places.

    `tokens`: ids (N, L), or token embeddings (N, L, W) of one's own making (CoOp's contexts).
    """
    table = w["text_model.embeddings.token_embedding.weight"]
    x = F.embedding(tokens, table) if tokens.ndim == 2 else tokens
    n, length = x.shape[:2]
    x = x + w["text_model.embeddings.position_embedding.weight"][:length]
    rows = torch.arange(n, device=x.device) * length + ends
    x = transformer(w, "text_model", x, rows, True, heads, activation, eps)
    return F.linear(norm(w, "text_model.final_layer_norm", x, eps), w["text_projection.weight"])


# ---- 2. Tokenizer --------------------------------------------------------------------------------
def byte_symbols():
    """Byte -> the printable character that stands for it, in the order of CLIP's vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = sorted(set(range(256)) - set(shown))
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Tokenizer:
    """CLIP's byte-pair encoding by `vocab` (token -> id) and `merges` (pairs, best first).

    Ids are those of Hugging Face's CLIPTokenizerFast; a literal "<|endoftext|>" is plain text.
    """

    def __init__(self, vocab, merges):
        self.vocab, self.ranks = vocab, {tuple(pair): rank for rank, pair in enumerate(merges)}
        self.start, self.end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
        self.symbols, self.known = byte_symbols(), {}

    def merge(self, word):
        """Ids of one word: the neighbours that rank best are joined until no pair is known."""
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
        """At most `context` ids: start, the text's (cut where they are too many), end.

        Python differs from CLIP's regular expression in three points: lower() treats a final
        sigma apart, letters hold the numerals Nl and No, \\x1c to \\x1f count as white space.
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


def read_tokenizer(files, size):
    """Tokenizer from one group of TOKENIZERS' files; `size`: how many tokens the model embeds."""
    try:
        if files[0].suffix == ".json":
            found = read_json(files[0])
            vocab, merges = found["model"]["vocab"], found["model"]["merges"]
            vocab |= {token["content"]: token["id"] for token in found["added_tokens"]}
            merges = [m.split() if isinstance(m, str) else m for m in merges]
        else:
            lines = files[0].read_text(encoding="utf-8").split("\n")
            vocab = read_json(files[1])
            merges = [line.split() for line in lines if line and not line.startswith("#version")]
        if max(vocab.values()) >= size:
            raise ValueError(f"an id of {max(vocab.values())} where {size} tokens are embedded")
        return Tokenizer(vocab, merges)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise misfit(files[0], "a CLIP vocabulary with its merges", repr(error)) from error


# ---- 3. Checkpoint and settings ------------------------------------------------------------------
def openai_name(name):
    """OpenAI's spelling of a Hugging Face tensor name, for errors about a file that has it."""
    for theirs, ours in reversed(OPENAI_NAMES):
        name = name.replace(ours, theirs)
    return re.sub(r"[qkv]_proj\.", "in_proj_", name.removeprefix("text_model."))


def from_openai(tensors):
    """OpenAI's or open_clip's tensors under Hugging Face's names; views, nothing is copied."""
    out = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(module\.)?(text\.)?", "", name)
        if not name.startswith(("visual.", "text_projection", "logit_scale")):
            name = "text_model." + name
        for theirs, ours in OPENAI_NAMES:
            name = name.replace(theirs, ours)
        if "in_proj_" in name:
            parts = zip("qkv", tensor.chunk(3), strict=False)
            out |= {name.replace("in_proj_", f"{part}_proj."): rows for part, rows in parts}
        else:  # projections are stored as (in, out); square ones would pass the check unturned
            out[name] = tensor.T if name.endswith("_projection.weight") else tensor
    return out


def tower_shapes(w, tower, config):
    """Name -> shape of one tower's tensors: sizes as config.json states them, or as w shows."""
    stated, p = config.get(tower + "_config", {}), tower + "_model."
    last = {"vision": "visual_projection.weight", "text": "text_projection.weight"}[tower]
    layers, e = p + "encoder.layers.", p + "embeddings."
    places = len(w[e + "position_embedding.weight"])
    width = stated.get("hidden_size") or w[last].shape[1]
    inner = stated.get("intermediate_size") or len(w[layers + "0.mlp.fc1.weight"])
    shapes = {last: (config.get("projection_dim") or len(w["text_projection.weight"]), width)}
    if tower == "text":
        size = stated.get("vocab_size") or len(w[e + "token_embedding.weight"])
        places = stated.get("max_position_embeddings") or places
        shapes[e + "token_embedding.weight"] = (size, width)
        biased = {p + "final_layer_norm": (width,)}
    else:
        patch = stated.get("patch_size") or w[e + "patch_embedding.weight"].shape[-1]
        side = stated.get("image_size", math.isqrt(places - 1) * patch) // patch
        places = 1 + side * side
        shapes[e + "patch_embedding.weight"] = (width, 3, patch, patch)
        shapes[e + "class_embedding"] = (width,)
        biased = {p + "pre_layrnorm": (width,), p + "post_layernorm": (width,)}
    found = {int(k.removeprefix(layers).split(".")[0]) for k in w if k.startswith(layers)}
    for layer in range(stated.get("num_hidden_layers") or max(found) + 1):
        q = f"{layers}{layer}."
        biased |= {f"{q}self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
        biased |= {q + "layer_norm1": (width,), q + "layer_norm2": (width,),
                   q + "mlp.fc1": (inner, width), q + "mlp.fc2": (width, inner)}
    shapes |= {name + ".weight": shape for name, shape in biased.items()}
    shapes |= {name + ".bias": shape[:1] for name, shape in biased.items()}
    return shapes | {e + "position_embedding.weight": (places, width)}


def read_configs(folder):
    """(config.json, preprocessor_config.json), from open_clip_config.json where those lack."""
    config, pixels, theirs = (read_json(folder / f"{name}.json") for name in (
        "config", "preprocessor_config", "open_clip_config"))
    if theirs and "vision_config" not in config:
        model = theirs["model_cfg"]
        for side, given in (("vision", model["vision_cfg"]), ("text", model["text_cfg"])):
            config[side + "_config"] = {
                "hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
                "num_attention_heads":
                    given.get("heads") or given["width"] // given.get("head_width", 64)}
    given = theirs.get("preprocess_cfg", {})
    return config, pixels or {f"image_{k}": given[k] for k in ("mean", "std") if k in given}


def tower_settings(path, stated):
    """What the tensors don't tell about a tower, as its function's keyword arguments."""
    activation = stated.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise misfit(path, "a hidden_act of quick_gelu or gelu", repr(activation))
    return {"heads": stated.get("num_attention_heads"), "activation": activation,
            "eps": stated.get("layer_norm_eps", 1e-5)}


def pixel_settings(path, given, image_size):
    """Mean, std, sizes and filter of preprocessing; warns where MONET's are not ImageNet's."""
    monet = "monet" in path.absolute().parent.name.lower()
    usual = IMAGENET_PIXELS if monet else CLIP_PIXELS
    mean, std = given.get("image_mean", usual[0]), given.get("image_std", usual[1])
    if monet and (mean, std) != usual:
        print(f"warning: {path} normalises with mean {mean} and std {std}, but MONET was trained "
              f"with ImageNet's {usual[0]} and {usual[1]}", file=sys.stderr)
    size, crop = given.get("size", image_size), given.get("crop_size", image_size)
    if isinstance(size, dict):
        size = size.get("shortest_edge") or [size["width"], size["height"]]
    if crop not in (image_size, {"height": image_size, "width": image_size}):
        raise misfit(path, f"a crop_size of {image_size} to suit the weights", crop)
    return {"mean": mean, "std": std, "size": size, "crop": image_size,
            "resample": given.get("resample", 3)}


# ---- 4. The frozen model -------------------------------------------------------------------------
class CLIP:
    """A frozen CLIP: `tensors`, `tokenizer`, and settings: `image` and `text` are the towers'
    keyword arguments, `pixels` what `preprocess` does. Made by `load_clip`.
    """

    def __init__(self, path, tensors, files, image, text, pixels):
        self.path, self.tensors, self.files = path, tensors, files
        self.image, self.text, self.pixels = image, text, pixels
        self.image_size, self.dim = pixels["crop"], len(tensors["text_projection.weight"])
        self.context = len(tensors["text_model.embeddings.position_embedding.weight"])
        self.logit_scale = tensors["logit_scale"].exp().item()

    @cached_property
    def tokenizer(self):
        """Read when the first text comes, as it takes longer than mapping the tensors."""
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
        """(3, H, W) float32 of a PIL image, as Hugging Face's CLIPImageProcessor with Pillow.

        RGB, what is transparent over white; short side to size; centre crop; (x / 255 - mean) /
        std. Pillow saturates 16-bit grey in going to RGB: scale it to 8 bits before.
        """
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image, size, crop = image.convert("RGB"), self.pixels["size"], self.image_size
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
        return self.finite(image_tower(self.tensors, pixels, **self.image))

    @torch.no_grad()
    def encode_text(self, texts):
        """(N, D), not normalised, of a list of N texts."""
        ids = [torch.tensor(self.tokenizer(text, self.context)) for text in texts]
        ids = pad_sequence(ids, batch_first=True).to(self.tensors["logit_scale"].device)
        ends = (ids == self.tokenizer.end).int().argmax(1)
        return self.finite(text_tower(self.tensors, ids, ends, **self.text))

    def finite(self, embeddings):
        """The embeddings; InputError if a weight's NaN or infinity has reached them."""
        if not torch.isfinite(embeddings).all():
            raise misfit(self.path, "finite weights", "embeddings with NaN or infinity")
        return embeddings


def load_clip(folder):
    """CLIP from a folder; InputError for whatever is missing or does not fit."""
    folder = Path(folder)
    path, other = folder / "model.safetensors", folder / "open_clip_model.safetensors"
    path = other if other.exists() and not path.exists() else path
    w, (config, pixels), alias = read_tensors(path), read_configs(folder), str
    if any(".resblocks." in name for name in w):
        w, alias = from_openai(w), openai_name
    try:
        shapes = tower_shapes(w, "vision", config) | tower_shapes(w, "text", config)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise misfit(path, "the tensors of a CLIP", f"none for {error}") from error
    w = check_tensors(path, w, shapes | {"logit_scale": ()}, IGNORED, alias)
    groups = [[folder / name for name in names] for names in TOKENIZERS]
    files = next((group for group in groups if all(file.exists() for file in group)), None)
    if files is None:
        raise misfit(folder / "vocab.json", "it with merges.txt, or a tokenizer.json", "neither")
    towers = [tower_settings(folder / "config.json", config.get(side + "_config", {}))
              for side in ("vision", "text")]
    side = math.isqrt(len(w["vision_model.embeddings.position_embedding.weight"]) - 1)
    side *= w["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    pixels = pixel_settings(folder / "preprocessor_config.json", pixels, side)
    return CLIP(path, w, files, *towers, pixels)
