"""CLIP (Radford et al., 2021), frozen: OpenAI's, MONET and open_clip's of that architecture.

A folder holds model.safetensors, merges.txt and vocab.json (or tokenizer.json), and what there is
of Hugging Face's and open_clip's other json files. N, L, W, D: images or texts, tokens of each,
width of a tower, of the embeddings. Not included: ResNet towers, OpenAI's repair of odd Unicode.
"""
import math
import re
import sys
import unicodedata
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import Backbone, block, check_tensors, norm, read_json, read_tensors, reading, sizes

CLIP_PIXELS = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
IMAGENET_PIXELS = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # what MONET was trained with
ACTIVATIONS = {"quick_gelu": (F.silu, 1.702), "gelu": (F.gelu, 1.0)}  # f, c of f(c x) / c
WORDS = "text_model.embeddings.token_embedding.weight"
CONTEXT = "text_model.embeddings.position_embedding.weight"
CLASS, PATCHES, PLACES = ("vision_model.embeddings." + name for name in (
    "class_embedding", "patch_embedding.weight", "position_embedding.weight"))
BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj",
         "mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2")
SHAPES = {  # of the tensors outside of the blocks
    "logit_scale": "", "visual_projection.weight": "DW", "text_projection.weight": "Dw",
    CLASS: "W", PATCHES: ("W", 3, "P", "P"), PLACES: "LW", CONTEXT: "lw", WORDS: "vw",
    "vision_model.pre_layrnorm.*": "W", "vision_model.post_layernorm.*": "W",
    "text_model.final_layer_norm.*": "w"}
IGNORED = "position_ids", "input_resolution", "context_length", "vocab_size", "attn_mask"
OPENAI_NAMES = """visual.proj:visual_projection.weight text_projection:text_projection.weight
    visual.:vision_model. transformer.resblocks:encoder.layers attn.:self_attn. c_fc:fc1 c_proj:fc2
    class_embedding:embeddings.class_embedding conv1:embeddings.patch_embedding
    token_embedding:embeddings.token_embedding ln_final:final_layer_norm .ln_pre:.pre_layrnorm
    positional_embedding:embeddings.position_embedding.weight .ln_post:.post_layernorm
    .ln_:.layer_norm"""  # OpenAI's and open_clip's spelling:Hugging Face's, in order

def from_openai(tensors):
    """OpenAI's or open_clip's tensors under Hugging Face's names; views, nothing is copied."""
    out = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(module\.)?(text\.)?", "", name)
        name = re.sub(r"^(?!visual\.|text_projection|logit_scale)", "text_model.", name)
        for pair in OPENAI_NAMES.split():
            name = name.replace(*pair.split(":"))
        turned = name.endswith("_projection.weight")  # a square one would pass the check unturned
        cut = tensor.chunk(3) if "in_proj_" in name else [tensor.T if turned else tensor]
        out |= {name.replace("in_proj_", c + "_proj."): x for c, x in zip("qkv", cut, strict=False)}
    return out

def read_settings(folder, w):
    """What else there is to know of the towers and the pixels, as stated or usual; all shapes."""
    path, config = folder / "preprocessor_config.json", read_json(folder / "config.json")
    other, out, shapes = read_json(folder / "open_clip_config.json"), {}, dict(SHAPES)
    model = other.get("model_cfg", {})
    usual = "gelu" if model and not model.get("quick_gelu") else "quick_gelu"
    for tower, letters in (("vision", "WI"), ("text", "wi")):
        stated, theirs = config.get(tower + "_config", {}), model.get(tower + "_cfg", {})
        norms = [name for name in w if re.match(tower + r".*layers.*layer_norm1\.weight", name)]
        width, activation = len(w[norms[0]]), stated.get("hidden_act", usual)
        heads = theirs.get("heads") or width // theirs.get("head_width", 64)
        heads = stated.get("num_attention_heads", heads)
        if activation not in ACTIVATIONS or width % heads:
            raise ValueError(f"{activation} and {heads} heads for a width of {width}")
        depth = stated.get("num_hidden_layers") or theirs.get("layers") or len(norms)
        out[tower] = {"depth": depth, "heads": heads, "activation": activation}
        for i in range(depth):
            shapes |= sizes(f"{tower}_model.encoder.layers.{i}.", BLOCK, *letters)
    given = read_json(path) or {"image_" + k: v for k, v in other.get("preprocess_cfg", {}).items()}
    monet = "monet" in folder.absolute().name.lower()
    usual = IMAGENET_PIXELS if monet else CLIP_PIXELS
    mean, std = given.get("image_mean", usual[0]), given.get("image_std", usual[1])
    if monet and (mean, std) != usual:
        print(f"warning: {path} normalises with mean {mean} and std {std}, but MONET was trained "
              f"with ImageNet's {usual[0]} and {usual[1]}", file=sys.stderr)
    crop = math.isqrt(len(w[PLACES]) - 1) * w[PATCHES].shape[-1]
    return out | {"pixels": [mean, std, given.get("resample", 3), crop]}, shapes

class CLIP(Backbone):
    """A frozen CLIP from a folder; InputError for whatever is missing or does not fit."""

    words = WORDS
    def __init__(self, folder):
        folder = Path(folder)
        path, other = folder / "model.safetensors", folder / "open_clip_model.safetensors"
        self.path = path = other if other.exists() and not path.exists() else path
        w = read_tensors(path)
        w = from_openai(w) if any(".resblocks." in name for name in w) else w
        with reading(path):
            self.settings, shapes = read_settings(folder, w)
            self.tensors = check_tensors(w, shapes, IGNORED)
        old = (folder / "merges.txt").exists()  # the older kind of files
        self.files = [folder / name for name in (
            ("merges.txt", "vocab.json") if old else ("tokenizer.json",))]
        with reading(self.files[0]):
            self.vocab = read_json(self.files[-1])
            merges = self.files[0].read_text(encoding="utf-8").split("\n")
            if not old:
                self.vocab, merges = (self.vocab["model"][key] for key in ("vocab", "merges"))
            merges = (tuple(m.split() if isinstance(m, str) else m) for m in merges)
            self.ranks = {pair: rank for rank, pair in enumerate(merges)}
            self.start, self.end = self.vocab["<|startoftext|>"], self.vocab["<|endoftext|>"]
            made = {"".join(pair) for pair in self.ranks} | {"<|startoftext|>", "<|endoftext|>"}
            lost = [t for t in self.vocab if len(t.removesuffix("</w>")) > 1 and t not in made]
            if lost or max(self.vocab.values()) >= len(w[WORDS]):
                raise ValueError(f"merges lack {len(lost)} tokens, or over {len(w[WORDS])} tokens")
        self.context, self.logit_scale = len(w[CONTEXT]), w["logit_scale"].exp().item()

    def preprocess(self, image):
        """(3, H, H) of a PIL image as by Hugging Face's CLIPImageProcessor: RGB over white, short
        side to H, centre crop, (x / 255 - mean) / std. Grey of 16 bits is to be scaled before.
        """
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        mean, std, resample, crop = self.settings["pixels"]
        size = [int(crop * side / min(image.size)) for side in image.size]
        left, top = ((side - crop) // 2 for side in size)
        image = image.convert("RGB").resize(size, resample)
        x = np.asarray(image.crop((left, top, left + crop, top + crop)), np.float32) / 255
        x = (x - np.float32(mean)) / np.float32(std)
        return torch.from_numpy(x).permute(2, 0, 1).contiguous()

    def word_pieces(self, word):
        """Ids of a word: the first best pair of neighbours is joined until none is known."""
        hidden = [*range(33), *range(127, 161), 173]  # bytes for which other characters stand
        parts = [chr(256 + hidden.index(b) if b in hidden else b)
                 for b in word.encode("utf-8", "replace")]
        parts[-1] += "</w>"
        while known := [(self.ranks[pair], at) for at in range(len(parts) - 1)
                        if (pair := tuple(parts[at:at + 2])) in self.ranks]:
            at = min(known)[1]
            parts[at:at + 2] = ["".join(parts[at:at + 2])]
        return [self.vocab.get(part, self.end) for part in parts]

    def split(self, text):
        """Words of a text, as those of Hugging Face's CLIPTokenizerFast."""
        # A literal "<|endoftext|>" is plain text. Unlike CLIP's expression, Python's lower() treats
        # a final sigma apart, letters hold the numerals Nl and No, \x1c to \x1f are white space.
        text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
        numerals = "".join({c for c in text if unicodedata.category(c) in ("Nl", "No")})
        return re.findall(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_{numerals}]+|[\d{numerals}]|"
                          r"(?:[^\s\w]|[_\x1c-\x1f])+", text)

    def transformer(self, w, tower, x, read):
        """(N, 1, W): the tokens at `read` (N,) of x (N, L, W) after all blocks."""
        depth, heads, activation = self.settings[tower].values()
        act, factor = ACTIVATIONS[activation]
        for layer in range(depth):
            x = block(w, f"{tower}_model.encoder.layers.{layer}.", BLOCK, x, heads, None,
                      tower == "text", read if layer == depth - 1 else None, act, factor)
        return x

    def image_tower(self, w, pixels):
        """Embeddings (N, D), not normalised, of pixels (N, 3, H, H)."""
        size = w[PATCHES].shape[2:]
        x = F.unfold(pixels, size, stride=size).transpose(1, 2).contiguous()
        x = F.linear(x, w[PATCHES].flatten(1))  # the convolution
        x = torch.cat([w[CLASS].expand(len(x), 1, -1), x], 1) + w[PLACES]
        x, first = norm(w, "vision_model.pre_layrnorm", x), x.new_zeros(len(x), dtype=torch.long)
        x = self.transformer(w, "vision", x, first)
        return norm(w, "vision_model.post_layernorm", x[:, 0]) @ w["visual_projection.weight"].T

    def text_tower(self, w, tokens, lengths):
        """Embeddings (N, D), not normalised, of ids (N, L) or token embeddings (N, L, W)."""
        x = F.embedding(tokens, w[WORDS]) if tokens.ndim == 2 else tokens
        x = self.transformer(w, "text", x + w[CONTEXT][:x.shape[1]], lengths - 1)
        return norm(w, "text_model.final_layer_norm", x[:, 0]) @ w["text_projection.weight"].T

load_clip = CLIP  # each family's module has a load_<family>(folder)
