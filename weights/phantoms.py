"""The demo: drawn skin lesions that carry Derm7p's seven criteria, in Derm7p's own layout.

Entirely synthetic: no patient, no medical meaning. `python -m weights.phantoms` trains the demo's
CLIP anew (6 min; not to the same bits): it learns the criteria's words in another clinic, whose
camera differs and where rare signs are common, so that zero-shot meets a domain gap."""
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter
from safetensors.torch import save_file

from data_prep import DERM7P, HERE, RELEASES, prepare_derm7p, read_table
from scale import progress, replace_file, write_files

from .clip import CLIP

GRID = np.arange(96) + 1j * np.arange(96)[:, None]  # a lesion's pixels as complex numbers: x + iy
TABLES, COLOURS = RELEASES["phantoms"], RELEASES["phantoms"]["colours"]

def draw_marks(rgb, rng, centre, radius, row):
    """Draw a row of marks (radians, pixels), dots or lines that end in one, over rgb (H, W, 3)."""
    count, sector, near, far, turn, length, bend, width, ragged, blur, colour = row
    pen, first = ImageDraw.Draw(canvas := Image.new("L", (192, 192))), rng.uniform(0, 2 * np.pi)
    for k in range(count):
        side, size = rng.choice([-1, 1]), rng.uniform(1 - ragged, 1 + ragged)
        angle = first + sector * (.618 * k % 1) + .3 * ragged * rng.standard_normal()
        away = radius * (near + (far - near) * ((k + .5) / count) ** .5)
        headings = angle + side * (turn * rng.uniform(.8, 1) + bend * np.arange(9) / 8)
        steps = length * size / 9 * np.exp(1j * headings)
        path = 2 * (centre + away * np.exp(1j * angle) + steps.cumsum()).view(float)
        pen.line(path.tolist(), 255, max(1, round(2 * width)), "curve")
        pen.ellipse([*path[-2:] - size * width, *path[-2:] + size * width], 255)
    alpha = np.asarray(canvas.filter(ImageFilter.GaussianBlur(2 * blur)).reduce(2)) / 255
    return rgb + .8 * alpha[..., None] * (COLOURS[colour] - rgb)

def draw_phantom(names, rng):
    """One synthetic lesion (PIL image, 96 x 96) that shows an expression of each criterion."""
    centre, radius = complex(*rng.uniform(43, 53, 2)), rng.uniform(27, 38)
    field, dx, dy = (np.asarray(Image.fromarray(coarse).resize(GRID.shape, 3)) for coarse in
                     rng.standard_normal((3, 6, 6)).astype(np.float32))  # smooth noise
    inside = radius * (1 + .1 * field) - abs(GRID - centre)  # pixels to the outline
    rgb = np.array(COLOURS["skin"]) * rng.uniform(.85, 1.08)
    # The network is a honeycomb of three waves; an atypical one is warped, uneven and broken.
    odd, pitch = "atypical pigment network" in names, rng.uniform(.75, 1)
    warped = pitch * np.exp(1j * rng.uniform(0, np.pi)) * (GRID + (2.4 * odd + .2) * (dx + 1j * dy))
    waves = sum(np.cos((warped * np.exp(1j * turn)).real) for turn in (0, 2.094, 4.189))
    mesh = np.clip(.3 - waves, 0, 1) * (np.clip(.4 + 1.5 * dx, 0, 1.5) if odd else 1)
    ground = rng.uniform(.2, .4) + .5 * mesh * ("absent pigment network" not in names)
    rgb = rgb + (ground * np.clip(inside / 5 + .5, 0, 1))[..., None] * (COLOURS["brown"] - rgb)
    shown = {*names, str(rng.choice(["hairs", "none"]))}
    for signs, *row in TABLES["marks"]:
        if shown.intersection(signs):
            rgb = draw_marks(rgb, rng, centre, radius, row)
    rgb = rgb * rng.uniform(.92, 1.05, 3) + rng.normal(0, 4, (*GRID.shape, 1))  # light, noise
    rgb = rgb * (1 - rng.uniform(0, .2) * abs(GRID / 48 - 1 - 1j) ** 2)[..., None]  # vignette
    rgb = np.clip(rgb, 0, 255).astype(np.uint8)
    return Image.fromarray(rgb).filter(ImageFilter.GaussianBlur(rng.uniform(.2, .8)))

def prepare_demo(data):
    """Draw the 1,011 lesions of weights/demo/meta, in Derm7p's numbers and correlated by a hidden
    severity, into <data>/demo/release_v0; prepare them as Derm7p; return the folder <data>/demo."""
    raw, meta = data / "demo" / "release_v0", HERE / "demo" / "meta"
    for i, (_, row) in enumerate(progress(read_table(meta / "meta.csv"), 1011, "phantoms drawn:")):
        names = [known[row[criterion]] for criterion, known in DERM7P.items()]
        lesion = draw_phantom(names, np.random.default_rng([0, i]))
        replace_file(raw / "images" / row["derm"], partial(lesion.save, format="JPEG", quality=92))
    write_files(raw / "meta", {path.name: path.read_bytes() for path in meta.iterdir()})
    prepare_derm7p(raw, raw.parent, **RELEASES["demo"])
    return raw.parent

def pretrain(folder, steps=2000, batch=32):
    """Train the checkpoint in `folder` anew; its sizes, vocabulary and scale stay. Each lesion
    suits 7 or 8 of 29 sentences: SigLIP's loss over all pairs (Zhai et al. 2023)."""
    model, rng, signs = CLIP(folder), np.random.default_rng(0), [*RELEASES["images"]["derm7p"]]
    lesions = [[known["absent"] if rng.random() < .4 else str(rng.choice([*known.values()]))
                for known in DERM7P.values()] for _ in range(6000)]
    images = (draw_phantom(lesion, rng).convert("RGB", TABLES["camera"]) for lesion in lesions)
    pixels = torch.stack([model.preprocess(image) for image in images])
    suits = torch.tensor([[*(sign in lesion for sign in signs), not RELEASES["scores"].keys()
                           & lesion] for lesion in lesions]).float()  # (6000, 29)
    w = {name: torch.tensor(rng.normal("norm" in name and "weight" in name, .06, t.shape)).float()
         for name, t in model.tensors.items()} | {"logit_scale": model.tensors["logit_scale"]}
    adam = torch.optim.AdamW([t.requires_grad_() for t in w.values()], betas=(.9, .98))
    for step in progress(range(steps), steps, "steps"):
        adam.param_groups[0]["lr"] = 1e-3 * min(step / 100, 1 - step / steps)
        some = torch.from_numpy(rng.choice(len(pixels), batch, replace=False))
        image = model.image_tower(w, torch.rot90(pixels[some], step, (2, 3)))
        texts = [rng.choice(TABLES["sentences"]).format(sign) for sign in signs]
        text = model.text_tower(w, *model.tokenize([*texts, "No finding."]))
        cosine = torch.cosine_similarity(image[:, None], text, dim=2)  # (batch, 29)
        loss = torch.nn.BCEWithLogitsLoss()(model.logit_scale * cosine - 1, suits[some])
        adam.zero_grad()
        loss.backward()
        adam.step()
    save_file({name: t.detach().half() for name, t in w.items()}, folder / "model.safetensors")

if __name__ == "__main__":
    pretrain(HERE / "demo")
