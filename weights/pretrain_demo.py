"""Train weights/demo/model.safetensors anew: python -m weights.pretrain_demo (11 min).

Sizes, vocabulary and pixel statistics are those of the checkpoint there. Images: phantoms as
another clinic would take them (colours, optics, scale, and rare signs are common); texts: sloppy
sentences in the criteria's vocabulary. Like a foundation model, it then knows the words and meets
a domain gap. All of it is synthetic, no medical meaning. 9.3 CPU minutes with OMP_NUM_THREADS=1.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from torch.optim.lr_scheduler import OneCycleLR

from data_prep import DERM7P, TEMPLATE, combination_name

from .clip import image_tower, load_clip, text_tower
from .phantoms import draw_phantom

DEMO = Path(__file__).parent / "demo"
STEPS, BATCH, TEXTS, DRAWINGS, SCALE = 3000, 32, 3, 6000, 50
OTHER = {  # phantoms.STYLE of the other clinic
    "skin": ((115, 95, 90), (200, 175, 160)), "melanin": (.85, .85, .7), "base": (.2, .4),
    "blood": (130, 20, 75), "veil": (150, 175, 165), "scar": (222, 228, 212), "grey": (75, 98, 90),
    "gain": ((.8, .9, .95), (.95, 1.1, 1.15)), "vignette": (.1, .4), "blur": (.4, .9),
    "noise": (3, 7), "hairs": 0, "bubbles": 6, "radius": (26, 44), "ragged": (.05, .2),
    "mesh": (7.5, 12), "ink": (.7, 1.2), "width": 1.4, "shift": 8}
HEALTHY = ("No finding.", "a normal lesion without anything abnormal.")
SENTENCES = (TEMPLATE, "dermoscopy of {}.", "{}", "the lesion has {}.", "skin lesion showing {}.",
             "{} on dermoscopy.", "this is dermoscopy of {}.")
COLUMNS = [(criterion, e) for criterion, known in DERM7P.items() for e in known]
ABNORMAL = np.array([DERM7P[criterion][e][0] > 0 for criterion, e in COLUMNS])


def draw_example(rng):
    """PIL image and truth (28,) of one lesion; one in three is healthy, signs evenly frequent."""
    healthy, labels = rng.random() < .3, {}
    for criterion, known in DERM7P.items():
        signs = [e for e in known if e != "absent" and not (healthy and known[e][0])]
        labels[criterion] = str(rng.choice(signs)) if signs and rng.random() > .35 else "absent"
    return draw_phantom(labels, rng, OTHER), [labels[c] == e for c, e in COLUMNS]


def caption(truth, rng):
    """A sentence, a tenth of its terms wrong, and what it claims (28,): 1 there, -1 not there."""
    if not (truth & ABNORMAL).any() and rng.random() < .2:
        return str(rng.choice(HEALTHY)), -1 * ABNORMAL
    claims, count = np.zeros(len(COLUMNS), int), rng.choice([1, 2, 3, 4], p=[.4, .3, .2, .1])
    for criterion in rng.choice(list(DERM7P), count, replace=False):
        options = [i for i, (c, _) in enumerate(COLUMNS) if c == criterion]
        claims[rng.choice(options) if rng.random() < .1 else max(options, key=truth.item)] = 1
    terms = [combination_name(*COLUMNS[i]) for i in rng.permutation(np.flatnonzero(claims))]
    listed = " and ".join(", ".join(terms).rsplit(", ", 1))
    return str(rng.choice(SENTENCES)).format(listed), claims


def fresh_weights(shipped, pixels, generator):
    """Name -> new tensor, shaped as shipped; patches are embedded by whitened components."""
    w = {}
    for name, shape in ((name, t.shape) for name, t in shipped.items() if name != "logit_scale"):
        spread = .02 if "embedding" in name else shape[-1] ** -.5
        w[name] = torch.randn(shape, generator=generator) * spread
        if name.endswith(".bias") or "norm" in name:
            w[name].fill_(name.endswith(".weight"))
    kernel = w["vision_model.embeddings.patch_embedding.weight"]
    patches = F.unfold(pixels, kernel.shape[-1], stride=kernel.shape[-1]).transpose(1, 2)
    variance, axes = torch.linalg.eigh(torch.cov(patches.flatten(0, 1).T))
    white = axes / (variance + .01 * variance.mean()).sqrt()
    kernel.copy_(.5 * white[:, -len(kernel):].T.view_as(kernel))
    return w


def train(model, pixels, truth, rng):
    """Train in place: a text suits each image it is true of; a head, thrown away, helps."""
    w, head = model.tensors, torch.zeros(len(COLUMNS), model.dim)
    tuned = [tensor.requires_grad_() for tensor in (*w.values(), head)]
    adam = torch.optim.AdamW(tuned, betas=(.9, .98))
    rate = OneCycleLR(adam, 1e-3, STEPS, pct_start=.02, cycle_momentum=False)
    for step in range(STEPS):
        rows = rng.choice(len(pixels), BATCH, replace=False)
        views = torch.rot90(pixels[rows], int(rng.integers(4)), (2, 3))
        raw = image_tower(w, views.flip(3) if rng.random() < .5 else views, **model.image)
        texts, claims = zip(*(caption(truth[i], rng) for i in np.tile(rows, TEXTS)), strict=True)
        ids = [torch.tensor(model.tokenizer(text, model.context)) for text in texts]
        ends = torch.tensor([len(row) - 1 for row in ids])
        text = text_tower(w, pad_sequence(ids, batch_first=True), ends, **model.text)
        scale = 20 + (SCALE - 20) * step / STEPS
        logits = scale * F.normalize(raw, dim=1) @ F.normalize(text, dim=1).T  # (BATCH, 3 BATCH)
        there, claims = torch.tensor(truth[rows]).float(), torch.tensor(np.array(claims)).float()
        suits = (there @ claims.T == claims.clamp(min=0).sum(1)).float()
        suits = suits.maximum(torch.eye(BATCH).repeat(1, TEXTS))
        loss = 5 * F.binary_cross_entropy_with_logits(raw @ head.T, there)
        for dim in (0, 1):
            share = suits / suits.sum(dim, keepdim=True)
            loss = loss - .5 * (share * logits.log_softmax(dim)).sum(dim).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.)
        adam.step()
        rate.step()
        if step % 200 == 0:
            print(f"step {step} of {STEPS}: loss {loss.item():.3f}", flush=True)


def main(folder=DEMO, seed=0):
    """Draw, train, write model.safetensors into `folder`."""
    model, rng = load_clip(DEMO), np.random.default_rng(seed)
    images, truth = zip(*(draw_example(rng) for _ in range(DRAWINGS)), strict=True)
    pixels = torch.stack([model.preprocess(image) for image in images])
    generator = torch.Generator().manual_seed(seed)
    model.tensors = fresh_weights(model.tensors, pixels[:600], generator)
    train(model, pixels, np.array(truth), rng)
    w = model.tensors | {"logit_scale": torch.tensor(SCALE).log()}
    save_file({name: t.detach().half() for name, t in w.items()}, folder / "model.safetensors")


if __name__ == "__main__":
    main()
