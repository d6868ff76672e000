"""MedCLIP (Wang et al., 2022), frozen: Swin-T and BERT, each with a head, by its own file's names.

A folder holds model.safetensors (medclip-vit's pytorch_model.bin, converted), Bio_ClinicalBERT's
vocab.txt and, if wanted, preprocessor_config.json: {"resample": 3} is MedCLIPProcessor's bicubic
filter; without it the bilinear one of MedCLIP's training and tests is used."""
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from . import Backbone, block, check_tensors, norm, read_json, reading

VISION, TEXT = "vision_model.model.", "text_model.model."
WORDS, PLACES, KINDS = (f"{TEXT}embeddings.{name}.weight" for name in (
    "word_embeddings", "position_embeddings", "token_type_embeddings"))
STAGES, LAYERS, SIDE = (2, 2, 6, 2), 12, 224  # blocks in Swin's stages, blocks in BERT, pixels

def swin_block(w, p, x, shift):
    """x (N, side^2, W) after a block with attention in windows of 7 x 7, shifted by `shift`."""
    n, side = len(x), int(x.shape[1] ** .5)
    cells = torch.arange(side * side, device=x.device).view(side, side).roll((-shift,) * 2, (0, 1))
    cells = cells.view(side // 7, 7, -1, 7).transpose(1, 2).reshape(-1, 49)  # (windows, 49)
    seen = cells if shift else cells[:1]  # unshifted windows are alike
    dy, dx = (z[:, :, None] - z[:, None] for z in (seen // side, seen % side))
    near = (dy.abs() < 7) & (dx.abs() < 7)  # false for cells that only rolling brought together
    bias = w[f"{p}attention.self.relative_position_bias_table"].T[:, near * (13 * dy + dx + 84)]
    bias = bias.masked_fill(~near, -100).transpose(0, 1)  # (windows, heads, 49, 49)
    x = x.index_select(1, cells.flatten()).view(-1, 49, x.shape[2])
    x = block(w, p, "swin", x, bias.shape[1], mask=bias.repeat(n if shift else 1, 1, 1, 1))
    return x.view(n, side * side, -1).index_select(1, cells.flatten().argsort())

class MedCLIP(Backbone):
    """A frozen MedCLIP from a folder; InputError for whatever is missing or does not fit."""
    words, context, last_block = WORDS, 77, VISION + "encoder.layers.3.blocks.1."
    def __init__(self, folder):
        self.path, self.files = folder / "model.safetensors", [folder / "vocab.txt"]
        with reading(self.path):
            w = check_tensors(load_file(self.path), "medclip", (*STAGES, LAYERS))
        with reading(self.files[0]):
            lines = self.files[0].read_text(encoding="utf-8").removesuffix("\n").split("\n")
            self.vocab = {token: i for i, token in enumerate(lines)}
            self.start, self.end, _ = (self.vocab[f"[{name}]"] for name in ("CLS", "SEP", "UNK"))
            if len(lines) != len(w[WORDS]):
                raise ValueError(f"{len(lines)} lines for {len(w[WORDS])} embeddings")
        given = folder / "preprocessor_config.json"
        with reading(given):
            self.settings = {"resample": Image.Resampling(read_json(given).get("resample", 2))}
        self.tensors, self.logit_scale = w, w["logit_scale"].clamp(0, 4.6052).exp().item()

    def preprocess(self, image):
        """(3, 224, 224) of a PIL image: grey, padded with black to a square, as in training."""
        square = Image.new("L", (max(SIDE, *image.size),) * 2)
        square.paste(image.convert("L"), tuple((square.width - side) // 2 for side in image.size))
        x = np.asarray(square.resize((SIDE, SIDE), self.settings["resample"]), np.float32) / 255
        return torch.from_numpy((x - 0.5862785803043838) / 0.27950088968644304).expand(3, -1, -1)

    def word_pieces(self, word):
        """Ids of a word: its longest known beginning, then those of the rest; or [UNK]."""
        ids, lead = [], ""
        while word:
            ends = [end for end in range(1, len(word) + 1) if lead + word[:end] in self.vocab]
            if not ends or len(word) > 100:
                return [self.vocab["[UNK]"]]
            ids.append(self.vocab[lead + word[:ends[-1]]])
            word, lead = word[ends[-1]:], "##"
        return ids

    def split(self, text):
        """Words and marks of a text, as those of BertTokenizer with do_lower_case."""
        spaced = []  # a cased vocabulary, but lower-case text without accents, as in training
        for c in unicodedata.normalize("NFD", text):
            kind, name = unicodedata.category(c), unicodedata.name(c, "")
            alone = kind[0] == "P" or c in "$+<=>^`|~" or name[:3] + kind == "CJKLo"
            if c in "\t\n\r" or kind not in ("Cc", "Cf", "Co", "Mn") and c != "\ufffd":
                spaced.append(f" {c} " if alone else c.lower())
        return "".join(spaced).split()

    def image_tower(self, w, pixels, every_token=False):
        """Embeddings (N, D), not normalised, of pixels (N, 3, 224, 224); or tokens (N, 49, D)."""
        patches = VISION + "embeddings.patch_embeddings.projection."
        x = F.conv2d(pixels, w[patches + "weight"], w[patches + "bias"], stride=4)
        x = norm(w, VISION + "embeddings.norm", x.flatten(2).transpose(1, 2))  # (N, 56^2, W)
        for stage, depth in enumerate(STAGES):
            p, side = f"{VISION}encoder.layers.{stage}.", 28 >> stage
            for i in range(depth):
                x = swin_block(w, f"{p}blocks.{i}.", x, 3 * (i % 2 and stage < 3))
            if stage < 3:  # 2 x 2 tokens become one
                x = x.view(len(x), side, 2, side, 2, -1).permute(0, 1, 3, 4, 2, 5).flatten(3)
                x = norm(w, p + "downsample.norm", x.flatten(1, 2))
                x = x @ w[p + "downsample.reduction.weight"].T
        x = norm(w, VISION + "layernorm", x)
        return (x if every_token else x.mean(1)) @ w["vision_model.projection_head.weight"].T

    def text_tower(self, w, tokens, lengths):
        """Embeddings (N, D), not normalised, of ids (N, L) or token embeddings (N, L, W)."""
        x = F.embedding(tokens, w[WORDS]) if tokens.ndim == 2 else tokens
        x = x + w[PLACES][:x.shape[1]] + w[KINDS][0]
        states = [norm(w, TEXT + "embeddings.LayerNorm", x, 1e-12)]
        real = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (N, L)
        for p in (f"{TEXT}encoder.layer.{i}." for i in range(LAYERS)):
            states.append(block(w, p, "bert", states[-1], x.shape[2] // 64, real[:, None, None]))
        # Choice: the mean leaves padding out; MedCLIP's own depends on the batch's longest text.
        x = (states[1] + states[2] + states[-1]) * real[..., None]
        return x.sum(1) / (3 * lengths[:, None]) @ w["text_model.projection_head.weight"].T
