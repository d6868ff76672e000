"""Pretrain the demo's tiny CLIP, weights/demo: python -m weights.pretrain_demo (11 min).

Images: phantoms as another clinic would take them (colours, optics, scale, drawing parameters, and
rare signs are common); texts: sloppy sentences in the criteria's vocabulary. Like a foundation
model, it then knows the words and meets a domain gap. All of it is synthetic, no medical meaning.
Measured: 9.3 CPU minutes on one core of two busy ones; OMP_NUM_THREADS=1 if the others are busy.
"""
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from data_prep import DERM7P, TEMPLATE, combination_name

from .clip import Tokenizer, byte_symbols, image_tower, text_tower, tower_shapes
from .phantoms import STYLE, draw_phantom

SIDE, PATCH, STEPS, BATCH, TEXTS, DRAWINGS, SCALE = 80, 10, 3000, 32, 3, 6000, 50
OTHER = STYLE | {
    "skin": ((115, 95, 90), (200, 175, 160)), "melanin": (.85, .85, .7), "base": (.2, .4),
    "blood": (130, 20, 75), "veil": (150, 175, 165), "scar": (222, 228, 212), "grey": (75, 98, 90),
    "gain": ((.8, .9, .95), (.95, 1.1, 1.15)), "vignette": (.1, .4), "blur": (.4, .9),
    "noise": (3, 7), "hairs": (0, 0), "bubbles": (0, 6), "radius": (26, 44), "ragged": (.05, .2),
    "mesh": (7.5, 12), "ink": (.7, 1.2), "width": 1.4, "shift": 8}
CONFIG = {
    "model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 128,
    "vision_config": {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "hidden_act": "gelu",
        "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH},
    "text_config": {
        "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "hidden_act": "gelu",
        "num_attention_heads": 4, "max_position_embeddings": 48}}
SENTENCES = (TEMPLATE, "dermoscopy of {}.", "{}", "the lesion has {}.", "skin lesion showing {}.",
             "{} on dermoscopy.", "this is dermoscopy of {}.")
NORMAL = ("No finding.", "a normal lesion without anything abnormal.")
COLUMNS = [(criterion, e) for criterion, known in DERM7P.items() for e in known]
ABNORMAL = np.array([DERM7P[criterion][e][0] > 0 for criterion, e in COLUMNS])


def draw_example(rng):
    """Pixels (3, SIDE, SIDE) in 0..255 and truth (28,) of one lesion, signs evenly frequent."""
    healthy, labels = rng.random() < .3, {}
    for criterion, known in DERM7P.items():
        signs = [e for e in known if e != "absent" and not (healthy and known[e][0])]
        labels[criterion] = str(rng.choice(signs)) if signs and rng.random() > .35 else "absent"
    image = draw_phantom(labels, rng, OTHER).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1), [labels[c] == e for c, e in COLUMNS]


def caption(truth, rng):
    """A sentence, a tenth of its terms wrong, and what it claims (28,): 1 there, -1 not there."""
    if not (truth & ABNORMAL).any() and rng.random() < .2:
        return str(rng.choice(NORMAL)), -1 * ABNORMAL
    claims, count = np.zeros(len(COLUMNS), int), rng.choice([1, 2, 3, 4], p=[.4, .3, .2, .1])
    for criterion in rng.choice(list(DERM7P), count, replace=False):
        options = [i for i, (c, _) in enumerate(COLUMNS) if c == criterion]
        claims[rng.choice(options) if rng.random() < .1 else max(options, key=truth.item)] = 1
    terms = [combination_name(*COLUMNS[i]) for i in rng.permutation(np.flatnonzero(claims))]
    listed = " and ".join([", ".join(terms[:-1])] * (len(terms) > 1) + terms[-1:])
    return str(rng.choice(SENTENCES)).format(listed), claims


def learn_merges(words):
    """Byte-pair merges of a list of words: join the most frequent neighbours, again and again."""
    parts, merges = [[*word[:-1], word[-1] + "</w>"] for word in words], []
    while pairs := Counter(pair for word in parts for pair in zip(word, word[1:], strict=False)):
        merges.append(max(pairs, key=lambda pair, known=pairs: (known[pair], pair)))
        for word in parts:
            for i in reversed(range(len(word) - 1)):
                if tuple(word[i:i + 2]) == merges[-1]:
                    word[i:i + 2] = ["".join(merges[-1])]
    return merges


def initial_weights(pixels, generator):
    """Name -> tensor of a fresh model; the patch embedding is the patches' whitened components."""
    kernel = "vision_model.embeddings.patch_embedding.weight"
    w = {f"{tower}_model.embeddings.position_embedding.weight": torch.empty(1)
         for tower in ("vision", "text")}  # all that `tower_shapes` wants to see
    shapes = tower_shapes(w, "vision", CONFIG) | tower_shapes(w, "text", CONFIG)
    for name, shape in shapes.items():
        spread = .02 if "embedding" in name else shape[-1] ** -.5
        w[name] = torch.randn(shape, generator=generator) * spread
        if name.endswith(".bias") or "norm" in name:
            w[name] = torch.full(shape, 0. if name.endswith(".bias") else 1.)
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    variance, axes = torch.linalg.eigh(torch.cov(patches.T))
    white = axes / (variance + .01 * variance.mean()).sqrt()
    w[kernel] = .5 * white[:, -len(w[kernel]):].T.reshape(w[kernel].shape).contiguous()
    return w


def train(w, pixels, truth, tokenizer, rng):
    """Train w in place: a text suits each image it is true of; a head, thrown away, helps."""
    w["head"] = torch.zeros(len(COLUMNS), CONFIG["projection_dim"])
    optimizer = torch.optim.AdamW([t.requires_grad_() for t in w.values()], betas=(.9, .98))
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, STEPS, pct_start=.02,
                                               cycle_momentum=False)
    for step in range(STEPS):
        rows = rng.choice(len(pixels), BATCH, replace=False)
        views = torch.rot90(pixels[rows], int(rng.integers(4)), (2, 3))
        raw = image_tower(w, views.flip(3) if rng.random() < .5 else views, 2, "gelu")
        texts, claims = zip(*(caption(truth[i], rng) for i in np.tile(rows, TEXTS)), strict=True)
        ids = [torch.tensor(tokenizer(text, 48)) for text in texts]
        ends = torch.tensor([len(row) - 1 for row in ids])
        ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        text = F.normalize(text_tower(w, ids, ends, 4, "gelu"), dim=1)
        scale = 20 + (SCALE - 20) * step / STEPS
        logits = scale * F.normalize(raw, dim=1) @ text.T  # (BATCH, BATCH * TEXTS)
        there, claims = torch.tensor(truth[rows]).float(), torch.tensor(np.array(claims)).float()
        suits = (there @ claims.T == claims.clamp(min=0).sum(1)).float()
        suits = suits.maximum(torch.eye(BATCH).repeat(1, TEXTS))
        loss = 5 * F.binary_cross_entropy_with_logits(raw @ w["head"].T, there)
        for dim in (0, 1):
            share = suits / suits.sum(dim, keepdim=True)
            loss = loss - .5 * (share * logits.log_softmax(dim)).sum(dim).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(w.values(), 1.)
        optimizer.step()
        rate.step()
        if step % 200 == 0:
            print(f"step {step} of {STEPS}: loss {loss.item():.3f}", flush=True)
    del w["head"]


def main(folder=Path(__file__).parent / "demo", seed=0):
    """Draw, train, write the checkpoint in Hugging Face's layout into `folder`."""
    rng = np.random.default_rng(seed)
    images, truth = map(np.array, zip(*(draw_example(rng) for _ in range(DRAWINGS)), strict=True))
    pixels = torch.from_numpy(images).float() / 255
    mean, std = (f(pixels, (0, 2, 3), keepdim=True) for f in (torch.mean, torch.std))
    pixels = (pixels - mean) / std
    terms = " ".join([*SENTENCES, *NORMAL, "and", *(combination_name(*c) for c in COLUMNS)])
    merges = learn_merges("".join(c if c.isalpha() else " " for c in terms.lower()).split())
    symbols = list(byte_symbols().values())
    names = [*symbols, *(s + "</w>" for s in symbols), *map("".join, merges),
             "<|startoftext|>", "<|endoftext|>"]
    CONFIG["text_config"] |= {"vocab_size": len(names), "bos_token_id": len(names) - 2,
                              "eos_token_id": len(names) - 1, "pad_token_id": len(names) - 1}
    vocab = {name: i for i, name in enumerate(names)}
    w = initial_weights(pixels[:600], torch.Generator().manual_seed(seed))
    train(w, pixels, truth, Tokenizer(vocab, merges), rng)
    w["logit_scale"] = torch.tensor(math.log(SCALE))
    folder.mkdir(exist_ok=True)
    save_file({name: t.detach().half() for name, t in w.items()}, folder / "model.safetensors")
    preprocessor = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE},
                    "image_mean": mean.flatten().tolist(), "image_std": std.flatten().tolist()}
    for name, value in {"config": CONFIG, "preprocessor_config": preprocessor | {
            "image_processor_type": "CLIPImageProcessor"}, "vocab": vocab}.items():
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
