"""The demo: drawn skin lesions that carry Derm7p's seven criteria, in Derm7p's own layout.

Entirely synthetic: no patient, no medical meaning. `python -m weights.phantoms` trains the demo's
CLIP anew (6 min; not to the same bits): it learns the criteria's words in another clinic, whose
CAMERA differs and where rare signs are common, so that zero-shot meets a domain gap.
"""
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file

from data_prep import DERM7P, TEMPLATE, combination_name

from .clip import load_clip

SIZE, CAMERA = 96, (.5, .09, .09, 0, .11, .58, .11, 0, .11, .11, .64, 0)  # pixels; RGB to its RGB
GRID = np.arange(SIZE) + 1j * np.arange(SIZE)[:, None]  # pixels as complex numbers: x + iy
SKIN, TAN, BROWN, RED, VEIL, GREY, WHITE = np.array([(212, 172, 155), (126, 84, 62), (70, 38, 25),
    (150, 25, 50), (125, 150, 185), (90, 104, 118), (236, 226, 216)])
SENTENCES = TEMPLATE, "{}", "dermoscopy of {}.", "skin lesion showing {}."
MARKS = (  # how many, sector, from, to (radii), turn, length, bend, width, ragged, blur, colour
    ("pigmentation", "diffuse regular", 40, 6.3, 0, .75, 0, 0, 0, 16, 0, 3, TAN),
    ("pigmentation", "diffuse irregular", 9, 4, .1, .7, 0, 0, 0, 19, .5, 2, BROWN),
    ("pigmentation", "localized regular", 1, 0, 0, 0, 0, 0, 0, 24, .2, 2.5, BROWN),
    ("pigmentation", "localized irregular", 5, .9, .5, .7, 0, 0, 0, 14, .6, 1.5, BROWN),
    ("streaks", "regular", 24, 6.3, .84, .86, 0, 11, 0, 1.6, .1, 0, BROWN),
    ("streaks", "irregular", 11, 2, .85, .9, .2, 17, .4, 1.8, .5, 0, BROWN),
    ("dots_and_globules", "regular", 30, 6.3, 0, .85, 0, 0, 0, 2.6, .1, 0, BROWN),
    ("dots_and_globules", "irregular", 20, 1.6, .2, 1, 0, 0, 0, 3, .7, 0, BROWN),
    ("regression_structures", "white areas/combinations", 5, 1.2, .2, .6, 0, 0, 0, 14, 0, 2, WHITE),
    ("regression_structures", "blue areas/combinations", 50, 1.5, .1, .7, 0, 0, 0, 2, .5, .4, GREY),
    ("blue_whitish_veil", "present", 6, 2, .1, .6, 0, 0, 0, 20, .3, 3, VEIL),
    ("vascular_structures", "arborizing", 7, .5, .9, 1, 3, 38, .6, 1.5, .4, 0, RED),
    ("vascular_structures", "comma", 9, 6.3, .2, .8, 3, 9, 2.4, 2.2, .2, 0, RED),
    ("vascular_structures", "hairpin", 10, 6.3, .2, .8, 3, 14, 3.6, 1, .1, 0, RED),
    ("vascular_structures", "within regression", 14, 1, .2, .6, 3, 13, 1.2, .9, .3, 0, RED),
    ("vascular_structures", "wreath", 18, 6.3, .85, .85, 1.6, 7, 2, 1.4, .1, 0, RED),
    ("vascular_structures", "dotted", 45, 6.3, .05, .95, 0, 0, 0, 1.8, .2, 0, RED),
    ("vascular_structures", "linear irregular", 9, 6.3, .1, .9, 3, 20, .3, 1.5, .6, 0, RED),
    ("nuisance", "hairs", 6, 6.3, .6, 1.4, 1.5, 90, .5, .7, .3, 0, 0 * SKIN))

def draw_marks(rgb, rng, centre, radius, row):
    """Draw a row of MARKS (radians, pixels), dots or lines that end in one, over rgb (H, W, 3)."""
    count, sector, near, far, turn, length, bend, width, ragged, blur, colour = row
    canvas, first = Image.new("L", (2 * SIZE, 2 * SIZE)), rng.uniform(0, 2 * np.pi)
    for k in range(count):
        side, size = rng.choice([-1, 1]), rng.uniform(1 - ragged, 1 + ragged)
        angle = first + sector * (.618 * k % 1) + .3 * ragged * rng.standard_normal()
        away = radius * (near + (far - near) * ((k + .5) / count) ** .5)
        headings = angle + side * (turn * rng.uniform(.8, 1) + bend * np.arange(9) / 8)
        steps = length * size / 9 * np.exp(1j * headings)
        path = 2 * (centre + away * np.exp(1j * angle) + steps.cumsum()).view(float)
        pen, (x, y), half = ImageDraw.Draw(canvas), path[-2:], size * width
        pen.line(path.tolist(), 255, max(1, round(2 * width)), "curve")
        pen.ellipse([x - half, y - half, x + half, y + half], 255)
    alpha = np.asarray(canvas.filter(ImageFilter.GaussianBlur(2 * blur)).reduce(2)) / 255
    return rgb + .8 * alpha[..., None] * (colour - rgb)

def draw_phantom(labels, rng):
    """One synthetic lesion (PIL image, SIZE x SIZE) that shows `labels` {criterion: expression}."""
    centre, radius = complex(*rng.uniform(43, 53, 2)), rng.uniform(27, 38)
    field, dx, dy = (np.asarray(Image.fromarray(coarse).resize((SIZE, SIZE), 3)) for coarse in
                     rng.standard_normal((3, 6, 6)).astype(np.float32))  # smooth noise
    inside = radius * (1 + .1 * field) - abs(GRID - centre)  # pixels to the outline
    rgb = SKIN * rng.uniform(.85, 1.08)
    # The network is a honeycomb of three waves; an atypical one is warped, uneven and broken.
    odd, pitch = labels["pigment_network"] == "atypical", rng.uniform(.75, 1)
    warped = pitch * np.exp(1j * rng.uniform(0, np.pi)) * (GRID + (2.4 * odd + .2) * (dx + 1j * dy))
    waves = sum(np.cos((warped * np.exp(1j * turn)).real) for turn in (0, 2.094, 4.189))
    mesh = np.clip(.3 - waves, 0, 1) * (np.clip(.4 + 1.5 * dx, 0, 1.5) if odd else 1)
    ground = rng.uniform(.2, .4) + .5 * mesh * (labels["pigment_network"] != "absent")
    rgb = rgb + (ground * np.clip(inside / 5 + .5, 0, 1))[..., None] * (BROWN - rgb)
    labels = labels | {"nuisance": rng.choice(["hairs", "none"])}
    for criterion, expressions, *row in MARKS:
        if labels[criterion] in expressions.split("/"):
            rgb = draw_marks(rgb, rng, centre, radius, row)
    rgb = rgb * rng.uniform(.92, 1.05, 3) + rng.normal(0, 4, (SIZE, SIZE, 1))  # light, noise
    rgb = rgb * (1 - rng.uniform(0, .2) * abs(GRID / 48 - 1 - 1j) ** 2)[..., None]  # vignette
    rgb = np.clip(rgb, 0, 255).astype(np.uint8)
    return Image.fromarray(rgb).filter(ImageFilter.GaussianBlur(rng.uniform(.2, .8)))

def draw_labels(criteria, rng):
    """1,011 rows (split, *expressions) in Derm7p's numbers, correlated by a hidden severity."""
    rows = []
    for part, (split, size) in enumerate({"train": 413, "valid": 203, "test": 395}.items(), 1):
        severity, columns = rng.standard_normal(size), []
        for known in criteria.values():  # its expressions stand from harmless to severe
            rank = (.6 * severity + .8 * rng.standard_normal(size)).argsort().argsort()
            columns.append(np.repeat([*known], [counts[part] for counts in known.values()])[rank])
        rows += [(split, *row) for row in zip(*columns, strict=True)]
    return rng.permutation(rows).tolist()

def write_demo_release(folder, criteria, seed=0):
    """Write 1,011 synthetic lesions as Derm7p's release_v0 into `folder`; same seed, same bytes.

    criteria: {criterion: {expression: (score, rows in train, valid, test)}}, kept in every split.
    """
    tables, folder, rng = {}, Path(folder), np.random.default_rng(seed)
    for i, (split, *expressions) in enumerate(draw_labels(criteria, rng)):
        labels, name = dict(zip(criteria, expressions, strict=True)), f"P{i // 30:02d}/P{i:04d}.jpg"
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        image = draw_phantom(labels, np.random.default_rng([seed, i]))
        image.save(folder / "images" / name, quality=92)
        score = sum(criteria[c][e][0] for c, e in labels.items())
        row = {"case_num": i + 1, "diagnosis": ("clark nevus", "melanoma")[score > 2],
               "seven_point_score": score, **labels, "derm": name, "case_id": "", "notes": "drawn"}
        tables.setdefault("meta", [",".join(row)]).append(",".join(map(str, row.values())))
        tables.setdefault(f"{split}_indexes", ["indexes"]).append(str(i))
    (folder / "meta").mkdir(exist_ok=True)
    for name, lines in tables.items():
        (folder / "meta" / f"{name}.csv").write_bytes("\n".join([*lines, ""]).encode())

def pretrain(folder, steps=2000, batch=32):
    """Train the checkpoint in `folder` anew; its sizes, vocabulary and scale stay.

    Each lesion suits 7 or 8 of 29 sentences: SigLIP's loss over all pairs (Zhai et al. 2023).
    """
    model, rng = load_clip(folder), np.random.default_rng(0)
    lesions = [{c: "absent" if rng.random() < .4 else str(rng.choice([*known]))
                for c, known in DERM7P.items()} for _ in range(6000)]
    images = (draw_phantom(lesion, rng).convert("RGB", CAMERA) for lesion in lesions)
    pixels = torch.stack([model.preprocess(image) for image in images])
    signs = [(c, e) for c, known in DERM7P.items() for e in known]
    suits = torch.tensor([[*(row[c] == e for c, e in signs), not any(
        DERM7P[c][e][0] for c, e in row.items())] for row in lesions]).float()  # (6000, 29)
    w = {name: torch.tensor(rng.normal("norm" in name and "weight" in name, .06, t.shape)).float()
         for name, t in model.tensors.items()} | {"logit_scale": model.tensors["logit_scale"]}
    adam = torch.optim.AdamW([t.requires_grad_() for t in w.values()], betas=(.9, .98))
    for step in range(steps):
        adam.param_groups[0]["lr"] = 1e-3 * min(step / 100, 1 - step / steps)
        some = torch.from_numpy(rng.choice(len(pixels), batch, replace=False))
        image = model.image_tower(w, torch.rot90(pixels[some], step, (2, 3)))
        texts = [rng.choice(SENTENCES).format(combination_name(*sign)) for sign in signs]
        text = model.text_tower(w, *model.tokenize([*texts, "No finding."]))
        cosine = F.normalize(image, dim=1) @ F.normalize(text, dim=1).T  # (batch, 29)
        loss = F.binary_cross_entropy_with_logits(model.logit_scale * cosine - 1, suits[some])
        adam.zero_grad()
        loss.backward()
        adam.step()
        print(f"\rstep {step + 1} of {steps}: loss {loss.item():.3f}", end="", flush=True)
    save_file({name: t.detach().half() for name, t in w.items()}, folder / "model.safetensors")

if __name__ == "__main__":
    pretrain(Path(__file__).parent / "demo")
