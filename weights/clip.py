"""CLIP (Radford et al., 2021), frozen, as functions over the checkpoint's own tensors.

Runs OpenAI's CLIP, MONET and open_clip's of that architecture from a folder with model.safetensors,
merges.txt and vocab.json (or tokenizer.json), and other json files of Hugging Face or open_clip.

    w        tensors by Hugging Face name; put others in their place to tune them (LoRA)
    N, L, W  sequences in a batch, tokens in a sequence, width of a tower; D: of the embeddings
    ends     where in each sequence its embedding is read: the end of a text, 0 for an image
    factor   1.702: quick_gelu(x) = x sigmoid(1.702 x) = silu(1.702 x) / 1.702

Does NOT include: ResNet towers, dropout, padding masks (attention is causal: nothing sees what
follows the end of a text), the repair of broken Unicode that OpenAI's tokenizer does.
"""
import functools
import hashlib
import math
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import check_tensors, misfit, read_json, read_tensors

CLIP_PIXELS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET_PIXELS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # what MONET was trained with
ACTIVATIONS = {"quick_gelu": (F.silu, 1.702), "gelu": (F.gelu, 1.0)}  # name -> function, factor
EDGE = {  # tower -> its projection and its norms, outside of the blocks
    "text": ("text_projection", "text_model.final_layer_norm"),
    "vision": ("visual_projection", "vision_model.pre_layrnorm", "vision_model.post_layernorm")}
IGNORED = ("position_ids", "input_resolution", "context_length", "vocab_size", "attn_mask")
OPENAI_NAMES = (  # OpenAI's and open_clip's spelling -> Hugging Face's, in order
    ("visual.proj", "visual_projection.weight"), ("text_projection", "text_projection.weight"),
    ("visual.", "vision_model."), ("transformer.resblocks.", "encoder.layers."), ("c_fc", "fc1"),
    ("class_embedding", "embeddings.class_embedding"), ("conv1", "embeddings.patch_embedding"),
    ("token_embedding", "embeddings.token_embedding"), ("ln_final", "final_layer_norm"),
    ("positional_embedding", "embeddings.position_embedding.weight"), (".ln_pre", ".pre_layrnorm"),
    (".ln_post", ".post_layernorm"), (".ln_", ".layer_norm"), ("attn.", "self_attn."),
    ("c_proj", "fc2"))


# ---- 1. The two towers ---------------------------------------------------------------------------
def affine(w, name):
    """The tensors `name`.weight and `name`.bias, of a Linear or a LayerNorm."""
    return w[name + ".weight"], w[name + ".bias"]


def transformer(w, tower, x, ends, heads, activation, eps):
    """Embeddings (N, D) of x (N, L, W), read at `ends`; at every token, (N L, D), if it is None."""
    n, length, width = x.shape
    (act, factor), (projection, *_, last) = ACTIVATIONS[activation], EDGE[tower]
    depth = sum(k.startswith(tower) and k.endswith("layer_norm1.weight") for k in w)
    x, heads, text, mask = x.reshape(-1, width), heads or width // 64, tower == "text", None
    for layer in range(depth):
        p = f"{tower}_model.encoder.layers.{layer}."
        asking = y = F.layer_norm(x, (width,), *affine(w, p + "layer_norm1"), eps)
        if layer == depth - 1 and ends is not None:  # nobody will read the other tokens
            rows = torch.arange(n, device=x.device) * length + ends
            x, asking, places = x[rows], y[rows], torch.arange(length, device=x.device)
            mask = places <= ends[:, None, None, None] if text else None
        q, k, v = (F.linear(z, *affine(w, f"{p}self_attn.{name}_proj"))
                   .view(n, -1, heads, width // heads).transpose(1, 2)  # (N, heads, L, W / heads)
                   for name, z in (("q", asking), ("k", y), ("v", y)))
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=text and mask is None)
        x = x + F.linear(y.transpose(1, 2).reshape(-1, width), *affine(w, p + "self_attn.out_proj"))
        y = F.layer_norm(x, (width,), *affine(w, p + "layer_norm2"), eps)
        inner, outer = w[p + "mlp.fc1.weight"].T, w[p + "mlp.fc2.weight"].T  # scaled on the way
        y = act(torch.addmm(w[p + "mlp.fc1.bias"], y, inner, beta=factor, alpha=factor))
        x = torch.addmm(x + w[p + "mlp.fc2.bias"], y, outer, alpha=1 / factor)
    x = F.layer_norm(x, (width,), *affine(w, last), eps)
    return F.linear(x, w[projection + ".weight"])


def image_tower(w, pixels, heads=None, activation="quick_gelu", eps=1e-5, every_token=False):
    """Embeddings (N, D), not normalised, of pixels (N, 3, H, W); differentiable in all tensors.

    `every_token`: (N, 1 + patches, D), class token first; `heads` None: one per 64 channels.
    """
    kernel = w["vision_model.embeddings.patch_embedding.weight"]
    x = F.unfold(pixels, kernel.shape[2:], stride=kernel.shape[2:]).transpose(1, 2).contiguous()
    x = F.linear(x, kernel.flatten(1))  # the convolution
    first = w["vision_model.embeddings.class_embedding"].expand(len(x), 1, -1)
    x = torch.cat([first, x], 1) + w["vision_model.embeddings.position_embedding.weight"]
    x = F.layer_norm(x, x.shape[2:], *affine(w, "vision_model.pre_layrnorm"), eps)  # (N, L, W)
    x = transformer(w, "vision", x, None if every_token else 0, heads, activation, eps)
    return x.view(len(pixels), -1, x.shape[-1]) if every_token else x


def text_tower(w, tokens, ends, heads=None, activation="quick_gelu", eps=1e-5):
    """Embeddings (N, D), not normalised, read at `ends` (N,), the end-of-text token's places.

    `tokens`: ids (N, L), or token embeddings (N, L, W) of one's own making (CoOp's contexts).
    """
    table = w["text_model.embeddings.token_embedding.weight"]
    x = F.embedding(tokens, table) if tokens.ndim == 2 else tokens
    x = x + w["text_model.embeddings.position_embedding.weight"][:x.shape[1]]
    return transformer(w, "text", x, ends, heads, activation, eps)


# ---- 2. Tokenizer --------------------------------------------------------------------------------
def byte_symbols():
    """Byte -> the printable character that stands for it, in the order of CLIP's vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = sorted(set(range(256)) - set(shown))
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


class Tokenizer:
    """CLIP's byte-pair encoding by `vocab` (token -> id) and `merges` (pairs, best first)."""

    def __init__(self, vocab, merges):
        self.vocab, self.ranks = vocab, {tuple(pair): rank for rank, pair in enumerate(merges)}
        self.start, self.end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
        self.symbols, self.merge = byte_symbols(), functools.cache(self.merge)

    def merge(self, word):
        """Ids of one word: the first best pair of neighbours is joined until none is known."""
        parts = [self.symbols[byte] for byte in word.encode("utf-8", "replace")]
        parts[-1] += "</w>"
        while known := [(self.ranks[pair], at) for at in range(len(parts) - 1)
                        if (pair := tuple(parts[at:at + 2])) in self.ranks]:
            at = min(known)[1]
            parts[at:at + 2] = ["".join(parts[at:at + 2])]
        return [self.vocab.get(part, self.end) for part in parts]

    def __call__(self, text, context):
        """At most `context` ids: start, the text's (cut where they are too many), end."""
        # The ids of Hugging Face's CLIPTokenizerFast; a literal "<|endoftext|>" is plain text.
        # Unlike CLIP's expression, Python's lower() treats a final sigma apart, letters hold the
        # numerals Nl and No, and \x1c to \x1f count as white space.
        text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
        numerals = "".join({c for c in text if unicodedata.category(c) in ("Nl", "No")})
        words = re.findall(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_{numerals}]+|[\d{numerals}]|"
                           r"(?:[^\s\w]|[_\x1c-\x1f])+", text)
        ids = [self.start, *(i for word in words for i in self.merge(word))]
        return ids[:context - 1] + [self.end]


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
        name = re.sub(r"^(?!visual\.|text_projection|logit_scale)", "text_model.", name)
        for theirs, ours in OPENAI_NAMES:
            name = name.replace(theirs, ours)
        turned = name.endswith("_projection.weight")  # a square one would pass the check unturned
        cut = tensor.chunk(3) if "in_proj_" in name else [tensor.T if turned else tensor]
        out |= {name.replace("in_proj_", c + "_proj."): x for c, x in zip("qkv", cut, strict=False)}
    return out


def tower_shapes(w, tower, config):
    """Name -> shape of one tower's tensors: sizes as config.json states them, or as w shows."""
    stated, p = config.get(tower + "_config", {}), tower + "_model."
    (last, *norms), layers = EDGE[tower], p + "encoder.layers."
    words, patches, places = (f"{p}embeddings.{name}_embedding.weight"
                              for name in ("token", "patch", "position"))
    width = stated.get("hidden_size") or w[last + ".weight"].shape[1]
    inner = stated.get("intermediate_size") or len(w[layers + "0.mlp.fc1.weight"])
    length = stated.get("max_position_embeddings") or len(w[places])
    depth = stated.get("num_hidden_layers") or 1 + max(
        int(name.split(".")[3]) for name in w if name.startswith(layers))
    dim = config.get("projection_dim") or len(w["text_projection.weight"])
    shapes, biased = {last + ".weight": (dim, width)}, dict.fromkeys(norms, (width,))
    if tower == "text":
        shapes[words] = (stated.get("vocab_size") or len(w[words]), width)
    else:
        patch = stated.get("patch_size") or w[patches].shape[-1]
        length = 1 + (stated.get("image_size", math.isqrt(length - 1) * patch) // patch) ** 2
        shapes |= {patches: (width, 3, patch, patch), p + "embeddings.class_embedding": (width,)}
    block = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    block |= {"layer_norm1": (width,), "layer_norm2": (width,),
              "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    biased |= {f"{layers}{i}.{name}": block[name] for i in range(depth) for name in block}
    shapes |= {name + ".weight": shape for name, shape in biased.items()}
    shapes |= {name + ".bias": shape[:1] for name, shape in biased.items()}
    return shapes | {places: (length, width)}


def tower_settings(folder, config, tower, w):
    """What the tensors don't tell about a tower, as its function's keyword arguments."""
    stated, theirs = config.get(tower + "_config", {}), read_json(folder / "open_clip_config.json")
    width = w[EDGE[tower][0] + ".weight"].shape[1]
    if theirs and "vision_config" not in config:
        model, given = theirs["model_cfg"], theirs["model_cfg"][tower + "_cfg"]
        stated = {"hidden_act": "quick_gelu" if model.get("quick_gelu") else "gelu",
                  "num_attention_heads": given.get("heads") or width // given.get("head_width", 64)}
    heads = stated.get("num_attention_heads") or width // 64
    activation = stated.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS or not heads or width % heads:
        raise misfit(folder / "config.json", f"quick_gelu or gelu and heads that divide {width}",
                     f"{activation} and {heads}")
    return {"heads": heads, "activation": activation, "eps": stated.get("layer_norm_eps", 1e-5)}


def pixel_settings(folder, w):
    """Mean, std, sizes and filter of preprocessing; warns where MONET's are not ImageNet's."""
    path = folder / "preprocessor_config.json"
    theirs = read_json(folder / "open_clip_config.json").get("preprocess_cfg", {})
    given = read_json(path) or {"image_" + key: value for key, value in theirs.items()}
    monet = "monet" in folder.absolute().name.lower()
    usual = IMAGENET_PIXELS if monet else CLIP_PIXELS
    mean, std = given.get("image_mean", usual[0]), given.get("image_std", usual[1])
    if monet and (mean, std) != usual:
        print(f"warning: {path} normalises with mean {mean} and std {std}, but MONET was trained "
              f"with ImageNet's {usual[0]} and {usual[1]}", file=sys.stderr)
    crop = math.isqrt(len(w["vision_model.embeddings.position_embedding.weight"]) - 1)
    crop *= w["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    size = given.get("size", crop)
    return {"mean": mean, "std": std, "resample": given.get("resample", 3), "crop": crop,
            "size": size["shortest_edge"] if isinstance(size, dict) else size}


# ---- 4. The frozen model -------------------------------------------------------------------------
class CLIP:
    """A frozen CLIP from a folder; InputError for whatever is missing or does not fit."""

    def __init__(self, folder):
        folder = Path(folder)
        path, other = folder / "model.safetensors", folder / "open_clip_model.safetensors"
        self.path = path = other if other.exists() and not path.exists() else path
        w, alias = read_tensors(path), str
        if any(".resblocks." in name for name in w):
            w, alias = from_openai(w), openai_name
        try:
            config = read_json(folder / "config.json")
            shapes = tower_shapes(w, "vision", config) | tower_shapes(w, "text", config)
            w = check_tensors(path, w, shapes | {"logit_scale": ()}, IGNORED, alias)
            self.text, self.image = (tower_settings(folder, config, tower, w) for tower in EDGE)
            self.pixels = pixel_settings(folder, w)
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise misfit(path, "a CLIP with its json files", f"none for {error}") from error
        self.files = [folder / "merges.txt", folder / "vocab.json"]
        if not all(file.exists() for file in self.files):
            self.files = [folder / "tokenizer.json"]
        if not self.files[0].exists():
            raise misfit(self.files[0], "it, or vocab.json with merges.txt", "neither")
        self.tensors, self.logit_scale = w, w["logit_scale"].exp().item()
        self.image_size, self.dim = self.pixels["crop"], len(w["text_projection.weight"])
        self.context = len(w["text_model.embeddings.position_embedding.weight"])

    @functools.cached_property
    def tokenizer(self):
        """Read when the first text comes, as it takes longer than mapping the tensors."""
        size = len(self.tensors["text_model.embeddings.token_embedding.weight"])
        try:
            vocab = read_json(self.files[-1])
            if len(self.files) == 1:
                vocab, merges = vocab["model"]["vocab"], vocab["model"]["merges"]
            else:  # its first line, a version, and its last, empty, are pairs that no text has
                merges = self.files[0].read_text(encoding="utf-8").split("\n")
            if max(vocab.values()) >= size:
                raise ValueError(f"an id of {max(vocab.values())} where {size} are embedded")
            return Tokenizer(vocab, [m.split() if isinstance(m, str) else m for m in merges])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise misfit(self.files[0], "a CLIP vocabulary with its merges", repr(error)) from error

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
        size = [int(self.pixels["size"] * side / min(image.size)) for side in image.size]
        image = image.convert("RGB").resize(size, self.pixels["resample"])
        crop = self.image_size
        left, top = ((side - crop) // 2 for side in size)
        x = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) / 255
        x = (x - np.float32(self.pixels["mean"])) / np.float32(self.pixels["std"])
        return torch.from_numpy(x).permute(2, 0, 1).contiguous()

    @torch.no_grad()
    def embed(self, tower, settings, *inputs):
        """(N, D) of a tower; InputError if a weight's NaN or infinity has reached them."""
        device = self.tensors["logit_scale"].device
        embeddings = tower(self.tensors, *(x.to(device) for x in inputs), **settings)
        if not torch.isfinite(embeddings).all():
            raise misfit(self.path, "finite weights", "embeddings with NaN or infinity")
        return embeddings

    def encode_image(self, pixels):
        """(N, D), not normalised, of pixels (N, 3, H, W) from `preprocess`."""
        return self.embed(image_tower, self.image, pixels)

    def encode_text(self, texts):
        """(N, D), not normalised, of a list of N texts."""
        ids = [torch.tensor(self.tokenizer(text, self.context)) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        return self.embed(text_tower, self.text, ids, (ids == self.tokenizer.end).int().argmax(1))


load_clip = CLIP  # each family's module has a load_<family>(folder)
