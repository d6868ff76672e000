"""Dermoscopy phantoms: drawings that carry the seven criteria of Derm7p, in Derm7p's own layout.

Entirely synthetic: no patient, no medical meaning. The method runs, and is tested, without data.
"""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 96  # pixels
Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float32)
STYLE = {  # colours, and (low, high) of what differs between two images of one clinic
    "skin": ((188, 151, 136), (229, 195, 177)), "melanin": (.58, .85, 1), "base": (.25, .5),
    "blood": (160, 37, 58), "veil": (130, 151, 179), "scar": (232, 224, 216), "blur": (.2, .6),
    "grey": (95, 107, 117), "gain": ((.88, .91, .93), (1.01, 1.07, 1.08)), "vignette": (0, .3),
    "noise": (2, 6), "hairs": 5, "bubbles": 3, "radius": (28, 40), "ragged": (.03, .12),
    "mesh": (6.5, 9), "ink": (.8, 1.2), "width": 1., "shift": 6}
META = (
    "case_num,diagnosis,seven_point_score,pigment_network,streaks,pigmentation,"
    "regression_structures,dots_and_globules,blue_whitish_veil,vascular_structures,"
    "level_of_diagnostic_difficulty,elevation,location,sex,management,clinic,derm,case_id,notes")
VESSELS = {  # how many, length (pixels), bend and wobble (radians), width (pixels)
    "absent": (0, 0, 0, 0, 0), "arborizing": (1, 34, 0, .15, 2.6), "comma": (9, 9, 2.4, 0, 2.2),
    "hairpin": (10, 13, 3.3, 0, 1), "within regression": (14, 14, 0, .7, .8),
    "wreath": (18, 7, 3, 0, 1.3), "dotted": (45, 0, 0, 0, 1.2),
    "linear irregular": (9, 20, 0, .12, 1.5)}


def soft(field, sharpness):
    """0..1: the logistic function of field * sharpness."""
    return 1 / (1 + np.exp(-sharpness * field))


def noise(rng, cells):
    """A smooth random field (SIZE, SIZE); the more cells, the finer its grain."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def curve(rng, start, angle, length, bend=0., wobble=0.):
    """Eleven points of a walk from `start` that turns by `bend` half-way and wobbles all along."""
    turns = bend * soft(np.linspace(-.5, .5, 10), 9) + angle
    turns = turns + wobble * rng.standard_normal(10).cumsum()
    moves = .1 * length * np.stack([np.cos(turns), np.sin(turns)], 1)
    return start + np.vstack([np.zeros(2), moves.cumsum(0)])


def coverage(strokes, scale=1.):
    """0..1, how far [(a dot (2,) or a line (n, 2), width), ...] cover each pixel (SIZE, SIZE)."""
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    pen = ImageDraw.Draw(canvas)
    for points, width in strokes:
        points, width = 2 * points, width * scale
        if points.ndim == 1:
            pen.ellipse([*(points - width), *(points + width)], 255)
        else:
            pen.line(points.ravel().tolist(), 255, max(1, round(2 * width)), "curve")
    return np.asarray(canvas.reduce(2), np.float32) / 255


class Lesion:
    """One lesion: an outline, the places in it, and its signs, drawn with one rng and style."""

    def __init__(self, rng, style):
        self.rng, self.style = rng, style
        self.centre = SIZE / 2 + rng.uniform(-1, 1, 2) * style["shift"]
        self.radius, self.orders = rng.uniform(*style["radius"]), np.arange(2, 7)
        self.waves = rng.normal(0, rng.uniform(*style["ragged"]), 5) / np.sqrt(self.orders)
        self.phase, self.squash = rng.uniform(0, 2 * np.pi, 5), rng.uniform(.78, 1)
        dx, dy = X - self.centre[0], (Y - self.centre[1]) / self.squash
        self.inside = self.edge(np.arctan2(dy, dx)) - np.hypot(dx, dy)  # pixels to the outline
        self.mask = soft(self.inside, rng.uniform(.5, 1.5))

    def edge(self, angle):
        """Pixels from the centre to the outline, in each direction."""
        waves = np.cos(np.multiply.outer(angle, self.orders) + self.phase)
        return self.radius * (1 + waves @ self.waves)

    def place(self, angle, far):
        """(x, y) in a direction; far: 0 in the centre, 1 on the outline."""
        step = np.array([np.cos(angle), np.sin(angle) * self.squash])
        return self.centre + self.edge(angle) * far * step

    def patch(self, spot, size, cells=5, rough=.35):
        """A soft patch (SIZE, SIZE) around a spot, `size` as a share of the radius."""
        far = np.hypot(X - spot[0], Y - spot[1]) / (size * self.radius)
        return soft(1 - far + rough * noise(self.rng, cells), 6) * self.mask

    def marks(self, labels):
        """How far streaks and dots cover each pixel: even, all round, or uneven, on one side."""
        uniform, place, strokes = self.rng.uniform, self.place, []
        first, even = uniform(0, 2 * np.pi), labels["streaks"] == "regular"
        for k in range({"absent": 0, "regular": 22, "irregular": 11}[labels["streaks"]]):
            angle = first + (k * np.pi / 11 if even else uniform(0, 2.2))
            tip = place(angle, 1.22 if even else uniform(1.1, 1.45))
            stem = np.stack([place(angle, .85), tip])
            strokes += [(stem, 1.1 if even else uniform(.8, 2.2)), (tip, 1.5 if even else .4)]
        first, even = uniform(0, 2 * np.pi), labels["dots_and_globules"] == "regular"
        for k in range({"absent": 0, "regular": 26, "irregular": 20}[labels["dots_and_globules"]]):
            angle = first + (2.4 * k if even else self.rng.normal(0, .55))  # 2.4: a sunflower
            far = .8 * np.sqrt((k + .5) / 26) if even else uniform(.15, .95)
            strokes.append((place(angle, far), 1.45 if even else uniform(.8, 3.2)))
        return coverage(strokes, self.style["width"])

    def vessels(self, kind, scar):
        """How far the vessels of one expression cover each pixel; `scar`: where regression is."""
        rng, strokes = self.rng, []
        count, length, bend, wobble, width = VESSELS[kind]
        for k in range(count):
            around, angle, far = *rng.uniform(0, 2 * np.pi, 2), .85 * np.sqrt(rng.uniform())
            around, angle, far = {
                "wreath": (k * np.pi / 9, k * np.pi / 9 + 1, .82),
                "arborizing": (around, around + np.pi, .95)}.get(kind, (around, angle, far))
            inside = kind == "within regression"
            start = scar + rng.normal(0, 5, 2) if inside else self.place(around, far)
            uneven = rng.uniform(.5, 1.5) if kind == "linear irregular" else 1
            line = curve(rng, start, angle, length * uneven, bend * rng.choice([-1, 1]), wobble)
            strokes.append((line if length else start, width * uneven))
        for fork in (4, 4, 6, 6, 8, 8, 10) if kind == "arborizing" else ():
            side = angle + rng.choice([-1, 1]) * rng.uniform(.5, 1.1)
            twig = curve(rng, line[fork], side, 16, 0, .2)
            strokes += [(twig, 1.5), (curve(rng, twig[5], rng.uniform(0, 6.3), 9), 1)]
        return coverage(strokes, self.style["width"])

    def melanin(self, labels, corner):
        """Optical depth (SIZE, SIZE) of the ground, pigmentation, network, streaks and dots."""
        rng, mask = self.rng, self.mask
        depth = mask * (rng.uniform(*self.style["base"]) + .04 * noise(rng, 6))
        ink = rng.uniform(*self.style["ink"])
        pigment = {
            "absent": 0 * mask, "diffuse regular": .65 * mask,
            "diffuse irregular": mask * soft(noise(rng, 5), 5),
            "localized regular": 1.1 * self.patch(self.centre, .42, rough=0),
            "localized irregular": 1.2 * self.patch(corner, .42, 9, .6)}[labels["pigmentation"]]
        if labels["pigment_network"] != "absent":  # a honeycomb; atypical: warped, broken, uneven
            odd = labels["pigment_network"] == "atypical"
            x, y = (c + (2.2 if odd else .3) * noise(rng, 8) for c in (X, Y))
            turns = rng.uniform(0, np.pi / 3) + np.array([0, 2, 4]) * np.pi / 3
            pitch = 7.2 / rng.uniform(*self.style["mesh"])
            waves = sum(np.cos(pitch * (x * np.cos(turn) + y * np.sin(turn))) for turn in turns)
            lines = soft(-waves - (.5 * noise(rng, 6) if odd else .25), 4)
            mesh = 1.7 * lines * soft(noise(rng, 5) - .1, 5) if odd else lines
            pigment = pigment + .75 * soft(self.inside - 2, .5) * mesh
        return depth + ink * (pigment + 1.3 * self.marks(labels))


def photograph(rgb, rng, style):
    """PIL image of rgb (SIZE, SIZE, 3) with what no label names: bubbles, light, blur, noise."""
    for _ in range(rng.integers(style["bubbles"] + 1)):
        left, top, size = rng.uniform((0, 0, 2), (SIZE, SIZE, 5))
        rgb = rgb + 45 * np.exp(-(np.hypot(X - left, Y - top) - size) ** 2)[..., None]
    shade = rng.uniform(*style["vignette"]) * np.hypot(X - SIZE / 2, Y - SIZE / 2) ** 2 / 48 ** 2
    rgb = rgb * (1 - shade[..., None]) * rng.uniform(*style["gain"])
    image = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*style["blur"])))
    rgb = np.asarray(image) + rng.normal(0, rng.uniform(*style["noise"]), (SIZE, SIZE, 1))
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


def draw_phantom(labels, rng, style=STYLE):
    """One synthetic lesion (PIL image, SIZE x SIZE) that shows `labels` {criterion: expression}."""
    lesion, layers = Lesion(rng, style), []
    scar, pepper, veil, corner = (lesion.place(rng.uniform(0, 2 * np.pi), rng.uniform(*far))
                                  for far in ((.25, .5), (.25, .5), (.25, .5), (.6, .7)))
    depth = lesion.melanin(labels, corner)
    skin = np.array(style["skin"][0]) + rng.uniform() * np.subtract(*style["skin"][::-1])
    rgb = (skin + 4 * noise(rng, 8)[..., None]) * np.exp(-depth[..., None] * style["melanin"])
    # What lies above the pigment: regression, veil, vessels, hairs.
    if labels["regression_structures"] in ("white areas", "combinations"):
        layers.append((.8 * lesion.patch(scar, .45), style["scar"]))
    if labels["regression_structures"] in ("blue areas", "combinations"):
        dust = lesion.patch(pepper, .45) * (.3 + .6 * soft(noise(rng, 40) - .4, 4))
        layers.append((dust, style["grey"]))
    if labels["blue_whitish_veil"] == "present":
        layers.append((.75 * lesion.patch(veil, .6, 4), style["veil"]))
    kind = labels["vascular_structures"]
    if kind == "within regression":
        layers.append((.5 * lesion.patch(scar, .4), np.array(style["scar"]) - (0, 25, 25)))
    layers.append((.85 * lesion.vessels(kind, scar), style["blood"]))
    for _ in range(rng.integers(style["hairs"] + 1)):
        hair = curve(rng, rng.uniform(0, SIZE, 2), rng.uniform(0, 2 * np.pi), 80, .6)
        layers.append((.7 * coverage([(hair, .6)]), (0, 0, 0)))
    for alpha, colour in layers:
        rgb = rgb + np.clip(alpha, 0, 1)[..., None] * (np.array(colour) - rgb)
    return photograph(rgb, rng, style)


def draw_labels(criteria, rng):
    """1,011 rows {split, diagnosis, criterion: expression}, Derm7p's counts in each split.

    A Gaussian copula: a hidden severity orders the lesions, and each criterion follows it in part.
    """
    rows = []
    for part, (split, melanomas) in enumerate({"train": 90, "valid": 61, "test": 101}.items()):
        severity = rng.standard_normal(sum(n[1 + part] for n in criteria["streaks"].values()))
        worst = severity >= np.sort(severity)[-melanomas]
        table = {"diagnosis": np.where(worst, "melanoma (in situ)", "clark nevus")}
        for criterion, known in criteria.items():
            pool = sorted((score, rng.uniform(), e) for e, (score, *counts) in known.items()
                          for _ in range(counts[part]))
            rank = np.argsort(.6 * severity + .8 * rng.standard_normal(len(pool))).argsort()
            table[criterion] = [pool[i][2] for i in rank]
        rows += [{"split": split, **dict(zip(table, row, strict=True))}
                 for row in zip(*table.values(), strict=True)]
    return rng.permutation(rows)


def write_demo_release(folder, criteria, seed=0):
    """Write 1,011 synthetic lesions as Derm7p's release_v0 into `folder`; same seed, same bytes.

    criteria: {criterion: {expression: (score, rows in train, valid, test)}}, kept in every split
    (413, 203, 395); 252 rows are called melanoma. No patient, no medical meaning. About 9 s.
    """
    folder, tables = Path(folder), {"meta": [META]}
    for i, row in enumerate(draw_labels(criteria, np.random.default_rng(seed))):
        path = f"P{i // 30:02d}/P{i:04d}.jpg"
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        image = draw_phantom(row, np.random.default_rng([seed, i]))
        image.save(folder / "images" / path, quality=92)
        row |= {"case_num": i + 1, "clinic": path, "derm": path, "case_id": "",
                "seven_point_score": sum(criteria[c][row[c]][0] for c in criteria),
                "notes": "synthetic; clinic is derm"}
        tables["meta"].append(",".join(str(row.get(c, "synthetic")) for c in META.split(",")))
        tables.setdefault(f"{row['split']}_indexes", ["indexes"]).append(str(i))
    (folder / "meta").mkdir(exist_ok=True)
    for name, lines in tables.items():
        (folder / "meta" / f"{name}.csv").write_bytes("\n".join([*lines, ""]).encode())
