"""CLIP (Radford et al., 2021), frozen: OpenAI's, MONET and open_clip's of that architecture.

A folder holds model.safetensors, merges.txt and vocab.json (or tokenizer.json), and what there is
of Hugging Face's and open_clip's other json files. No ResNet towers, no repair of odd Unicode."""
import re
import sys
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from . import TABLES, Backbone, block, check_tensors, norm, read_json, reading

ACTIVATIONS = {"quick_gelu": (F.silu, 1.702), "gelu": (F.gelu, 1.0)}  # f, c of f(c x) / c
CLASS, PATCHES, PLACES = ("vision_model.embeddings." + name for name in (
    "class_embedding", "patch_embedding.weight", "position_embedding.weight"))
CONTEXT = "text_model.embeddings.position_embedding.weight"

def from_openai(tensors):
    """OpenAI's or open_clip's tensors under Hugging Face's names; views, nothing is copied."""
    out = {}
    for name, tensor in tensors.items():
        for theirs, ours in TABLES["openai"].items():  # regular expressions, in this order
            name = re.sub(theirs, ours, name)
        turned = name.endswith("_projection.weight")  # a square one would pass the check unturned
        cut = tensor.chunk(3) if "in_proj_" in name else [tensor.T if turned else tensor]
        out |= {name.replace("in_proj_", c + "_proj."): x for c, x in zip("qkv", cut, strict=False)}
    return out

def read_settings(folder, w):
    """Depth, heads, activation of the towers, mean, std, filter of pixels: as stated or usual."""
    config, pixels, other = (read_json(folder / f"{name}.json") for name in (
        "config", "preprocessor_config", "open_clip_config"))
    model, settings = other.get("model_cfg", {}), {}
    usual = "gelu" if model and not model.get("quick_gelu") else "quick_gelu"
    for tower in ("vision", "text"):
        stated, theirs = config.get(tower + "_config", {}), model.get(tower + "_cfg", {})
        norms = [w[n].numel() for n in w if re.match(tower + r".*\.layer_norm1\.weight", n)]
        width = max(norms, key=norms.count, default=0)  # the usual one
        heads = theirs.get("heads", width // theirs.get("head_width", 64))
        names = "num_hidden_layers", "num_attention_heads", "hidden_act"
        given = map(stated.get, names, (theirs.get("layers", len(norms)), heads, usual))
        depth, heads, activation = settings[tower] = tuple(given)
        if activation not in ACTIVATIONS or not heads or width % heads or depth > 999:
            raise ValueError(f"{tower}: {depth} layers of {width}, {heads} heads, {activation}")
    monet = "monet" in folder.absolute().name.lower()
    usual = TABLES["pixels"]["imagenet" if monet else "clip"]
    stated = pixels or {"image_" + k: v for k, v in other.get("preprocess_cfg", {}).items()}
    settings["pixels"] = {name: stated.get(name, value) for name, value in usual.items()}
    if monet and settings["pixels"] != usual:
        print(f"warning: {folder} states {settings['pixels']}; MONET used {usual}", file=sys.stderr)
    return settings

class CLIP(Backbone):
    """A frozen CLIP from a folder; InputError for whatever is missing or does not fit."""
    words = "text_model.embeddings.token_embedding.weight"
    def __init__(self, folder):
        path, other = folder / "model.safetensors", folder / "open_clip_model.safetensors"
        self.path = path = other if other.exists() and not path.exists() else path
        with reading(path):
            w = load_file(path)
            w = from_openai(w) if any(".resblocks." in name for name in w) else w
            self.settings = settings = read_settings(folder, w)
            self.tensors = check_tensors(w, "clip", (settings["vision"][0], settings["text"][0]))
            settings["pixels"]["side"] = int((len(w[PLACES]) - 1) ** .5) * w[PATCHES].shape[-1]
            self.preprocess(Image.new("L", (1, 1)))  # as a trial
        self.last_block = f"vision_model.encoder.layers.{settings['vision'][0] - 1}."
        old = folder / "merges.txt", folder / "vocab.json"  # the older kind of files
        self.files = old if old[0].exists() else [folder / "tokenizer.json"]
        with reading(self.files[0]):
            self.vocab = read_json(self.files[-1])
            merges = self.files[0].read_text(encoding="utf-8").split("\n")
            if len(self.files) == 1:
                self.vocab, merges = (self.vocab["model"][key] for key in ("vocab", "merges"))
            pairs = (m.split() if isinstance(m, str) else m for m in merges)
            self.ranks = {tuple(pair): rank for rank, pair in enumerate(pairs)}
            self.start, self.end = self.vocab["<|startoftext|>"], self.vocab["<|endoftext|>"]
            long = {token for token in self.vocab if len(token.removesuffix("</w>")) > 1}
            lost = len(long.difference(map("".join, self.ranks))) - 2  # but for start and end
            if lost or max(self.vocab.values()) >= len(w[self.words]):
                raise ValueError(f"merges lack {lost} tokens or ids pass {len(w[self.words])}")
        self.context, self.logit_scale = len(w[CONTEXT]), w["logit_scale"].exp().item()

    def preprocess(self, image):
        """(3, H, H) of a PIL image as by Hugging Face's CLIPImageProcessor: RGB over white, short
        side to H, centre crop, (x / 255 - mean) / std. Grey of 16 bits is to be scaled before."""
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        mean, std, resample, crop = self.settings["pixels"].values()
        size = [int(crop * side / min(image.size)) for side in image.size]
        left, top = ((side - crop) // 2 for side in size)
        x = np.asarray(image.convert("RGB").resize(size, resample), np.float32) / 255
        x = (x[top:top + crop, left:left + crop] - np.float32(mean)) / np.float32(std)
        return torch.from_numpy(x).permute(2, 0, 1).contiguous()

    def word_pieces(self, word):
        """Ids of a word: the first best pair of neighbours is joined until none is known."""
        odd = [*range(33), *range(127, 161), 173]  # bytes for which other characters stand
        parts = [chr(256 + odd.index(b) if b in odd else b) for b in word.encode(errors="replace")]
        parts[-1] += "</w>"
        while known := [(self.ranks[pair], at) for at in range(len(parts) - 1)
                        if (pair := tuple(parts[at:at + 2])) in self.ranks]:
            at = min(known)[1]
            parts[at] += parts.pop(at + 1)
        return [self.vocab.get(part, self.end) for part in parts]

    def split(self, text):
        """Words of a text as by Hugging Face's CLIPTokenizerFast; "<|endoftext|>" is plain text."""
        # Python's lower() treats a final sigma apart, letters hold Nl and No, space \x1c to \x1f.
        text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))
        numerals = "".join({c for c in text if unicodedata.category(c) in ("Nl", "No")})
        return re.findall(rf"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_{numerals}]+|[\d{numerals}]|"
                          r"(?:[^\s\w]|[_\x1c-\x1f])+", text)

    def transformer(self, w, tower, x, read=None):
        """x (N, L, W) after all blocks; (N, 1, W) if only its tokens at `read` (N,) are of use."""
        depth, heads, activation = self.settings[tower]
        for i in range(depth):
            x = block(w, f"{tower}_model.encoder.layers.{i}.", "clip", x, heads, None,
                      tower == "text", read if i == depth - 1 else None, *ACTIVATIONS[activation])
        return x

    def image_tower(self, w, pixels, every_token=False):
        """Embeddings (N, D), not normalised, of pixels (N, 3, H, H); or of patches (N, L, D)."""
        x = F.conv2d(pixels, w[PATCHES], stride=w[PATCHES].shape[2:]).flatten(2).transpose(1, 2)
        x = torch.cat([w[CLASS].expand(len(x), 1, -1), x], 1) + w[PLACES]
        read = None if every_token else x.new_zeros(len(x), dtype=torch.long)
        x = self.transformer(w, "vision", norm(w, "vision_model.pre_layrnorm", x), read)
        x = norm(w, "vision_model.post_layernorm", x) @ w["visual_projection.weight"].T
        return x[:, 1:] if every_token else x[:, 0]

    def text_tower(self, w, tokens, lengths):
        """Embeddings (N, D), not normalised, of ids (N, L) or token embeddings (N, L, W)."""
        x = F.embedding(tokens, w[self.words]) if tokens.ndim == 2 else tokens
        x = self.transformer(w, "text", x + w[CONTEXT][:x.shape[1]], lengths - 1)
        return norm(w, "text_model.final_layer_norm", x[:, 0]) @ w["text_projection.weight"].T
