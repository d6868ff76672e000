"""Dermoscopy phantoms: drawings that carry the seven criteria of Derm7p, in Derm7p's own layout.

Entirely synthetic: no patient, no photograph, no medical meaning. They exist so that the whole
method runs, and can be tested, without data that may not be redistributed.
"""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 96  # pixels
Y, X = np.mgrid[:SIZE, :SIZE].astype(np.float32)
STYLE = {  # colours, and (low, high) of what differs between two images of one clinic
    "skin": ((188, 151, 136), (229, 195, 177)), "melanin": (.58, .85, 1), "base": (.25, .5),
    "blood": (160, 37, 58), "veil": (130, 151, 179), "scar": (232, 224, 216),
    "grey": (95, 107, 117), "gain": ((.88, .91, .93), (1.01, 1.07, 1.08)), "vignette": (0, .3),
    "blur": (.2, .6), "noise": (2, 6), "hairs": (0, 5), "bubbles": (0, 3), "radius": (28, 40),
    "ragged": (.03, .12), "mesh": (6.5, 9), "ink": (.8, 1.2), "width": 1., "shift": 6}
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
    return 1 / (1 + np.exp(-np.clip(field * sharpness, -30, 30)))


def noise(rng, cells):
    """A smooth random field (SIZE, SIZE); the more cells, the finer its grain."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def curve(rng, start, angle, length, bend=0., wobble=0.):
    """Eleven points of a walk from `start` that turns by `bend` half-way and wobbles all along."""
    turns = bend * soft(np.linspace(-.5, .5, 10), 9) + angle
    turns = turns + wobble * rng.standard_normal(10).cumsum()
    moves = .1 * length * np.stack([np.cos(turns), np.sin(turns)], 1)
    return np.vstack([start, start + moves.cumsum(0)])


def coverage(strokes):
    """How far [(points (n, 2), width), ...] in pixels cover each pixel, (SIZE, SIZE) in 0..1."""
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    pen = ImageDraw.Draw(canvas)
    for points, width in strokes:
        points = 2 * np.atleast_2d(points)
        if len(points) == 1:
            pen.ellipse([*(points[0] - width), *(points[0] + width)], fill=255)
        else:
            pen.line([tuple(p) for p in points], 255, max(1, round(2 * width)), "curve")
    return np.asarray(canvas.reduce(2), np.float32) / 255


def cover(rgb, alpha, colour):
    """rgb (SIZE, SIZE, 3) under a colour of opacity alpha (SIZE, SIZE)."""
    return rgb + np.clip(alpha, 0, 1)[..., None] * (np.array(colour) - rgb)


class Lesion:
    """The outline of one lesion, which knows its places; `mask` and `inside` are (SIZE, SIZE)."""

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


def network(lesion, odd):
    """Honeycomb (SIZE, SIZE): an even mesh, or (`odd`) a warped, broken, uneven one."""
    rng = lesion.rng
    x, y = (c + (2.2 if odd else .3) * noise(rng, 8) for c in (X, Y))
    turn, pitch = rng.uniform(0, np.pi / 3), 7.2 / rng.uniform(*lesion.style["mesh"])
    waves = [np.cos(pitch * (x * np.cos(turn + k) + y * np.sin(turn + k)))
             for k in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    lines = soft(-sum(waves) - (.5 * noise(rng, 6) if odd else .25), 4)
    return 1.7 * lines * soft(noise(rng, 5) - .1, 5) if odd else lines


def marks(lesion, streaks, dots):
    """Streaks and dots as strokes: even and all round, or uneven and on one side."""
    rng, place, strokes = lesion.rng, lesion.place, []
    first, even = rng.uniform(0, 2 * np.pi), streaks == "regular"
    for k in range({"absent": 0, "regular": 22, "irregular": 11}[streaks]):
        angle = first + (k * np.pi / 11 if even else rng.uniform(0, 2.2))
        tip = place(angle, 1.22 if even else rng.uniform(1.1, 1.45))
        strokes.append((np.stack([place(angle, .85), tip]), 1.1 if even else rng.uniform(.8, 2.2)))
        strokes.append((tip, 1.5 if even else .4))
    first = rng.uniform(0, 2 * np.pi)
    if dots == "regular":  # a sunflower's spiral
        strokes += [(place(first + 2.4 * k, .8 * np.sqrt((k + .5) / 26)), 1.45) for k in range(26)]
    elif dots == "irregular":
        strokes += [(place(first + rng.normal(0, .55), rng.uniform(.15, .95)),
                     rng.uniform(.8, 3.2)) for _ in range(20)]
    return [(points, width * lesion.style["width"]) for points, width in strokes]


def vessels(lesion, kind, scar):
    """The vessels of one expression as strokes; `scar` is where the regression is."""
    rng, width, strokes = lesion.rng, lesion.style["width"], []
    count, length, bend, wobble, thick = VESSELS[kind]
    for k in range(count):
        around, angle = rng.uniform(0, 2 * np.pi, 2)
        start = lesion.place(around, .85 * np.sqrt(rng.uniform()))
        if kind == "within regression":
            start = scar + rng.normal(0, 5, 2)
        elif kind == "wreath":
            start, angle = lesion.place(k * np.pi / 9, .82), k * np.pi / 9 + 1
        elif kind == "arborizing":
            start, angle = lesion.place(around, .95), around + np.pi
        uneven = rng.uniform(.5, 1.5) if kind == "linear irregular" else 1
        line = curve(rng, start, angle, length * uneven, bend * rng.choice([-1, 1]), wobble)
        strokes.append((line if length else start, thick * uneven * width))
    for fork in (4, 4, 6, 6, 8, 8, 10) if kind == "arborizing" else ():
        side = angle + rng.choice([-1, 1]) * rng.uniform(.5, 1.1)
        twig = curve(rng, line[fork], side, 16, 0, .2)
        strokes += [(twig, 1.5 * width), (curve(rng, twig[5], rng.uniform(0, 6.3), 9), width)]
    return strokes


def melanin(lesion, labels, corner):
    """Optical depth (SIZE, SIZE) of the ground, pigmentation, network, streaks and dots."""
    rng, style, mask = lesion.rng, lesion.style, lesion.mask
    depth = mask * (rng.uniform(*style["base"]) + .04 * noise(rng, 6))
    ink = rng.uniform(*style["ink"])
    pigment = {
        "absent": 0 * mask, "diffuse regular": .65 * mask,
        "diffuse irregular": mask * soft(noise(rng, 5), 5),
        "localized regular": 1.1 * lesion.patch(lesion.centre, .42, rough=0),
        "localized irregular": 1.2 * lesion.patch(corner, .42, 9, .6)}[labels["pigmentation"]]
    if labels["pigment_network"] != "absent":
        mesh = network(lesion, labels["pigment_network"] == "atypical")
        pigment = pigment + .75 * soft(lesion.inside - 2, .5) * mesh
    strokes = marks(lesion, labels["streaks"], labels["dots_and_globules"])
    return depth + ink * (pigment + 1.3 * coverage(strokes))


def optics(rgb, rng, style):
    """PIL image of rgb (SIZE, SIZE, 3) with what no label names: hairs, bubbles, light, noise."""
    for _ in range(rng.integers(*style["hairs"], endpoint=True)):
        hair = curve(rng, rng.uniform(0, SIZE, 2), rng.uniform(0, 2 * np.pi), 80, .6)
        rgb = rgb * (1 - .7 * coverage([(hair, .6)])[..., None])
    for _ in range(rng.integers(*style["bubbles"], endpoint=True)):
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
    lesion = Lesion(rng, style)
    scar, pepper, veil, corner = (lesion.place(rng.uniform(0, 2 * np.pi), rng.uniform(*far))
                                  for far in ((.25, .5), (.25, .5), (.25, .5), (.6, .7)))
    depth = melanin(lesion, labels, corner)
    skin = np.array(style["skin"][0]) + rng.uniform() * np.subtract(*style["skin"][::-1])
    rgb = (skin + 4 * noise(rng, 8)[..., None]) * np.exp(-depth[..., None] * style["melanin"])
    # What lies above the pigment: regression, veil, vessels.
    if labels["regression_structures"] in ("white areas", "combinations"):
        rgb = cover(rgb, .8 * lesion.patch(scar, .45), style["scar"])
    if labels["regression_structures"] in ("blue areas", "combinations"):
        alpha = lesion.patch(pepper, .45) * (.3 + .6 * soft(noise(rng, 40) - .4, 4))
        rgb = cover(rgb, alpha, style["grey"])
    if labels["blue_whitish_veil"] == "present":
        rgb = cover(rgb, .75 * lesion.patch(veil, .6, 4), style["veil"])
    kind = labels["vascular_structures"]
    if kind == "within regression":
        rgb = cover(rgb, .5 * lesion.patch(scar, .4), np.array(style["scar"]) - (0, 25, 25))
    rgb = cover(rgb, .85 * coverage(vessels(lesion, kind, scar)), style["blood"])
    return optics(rgb, rng, style)


def draw_labels(criteria, rng):
    """1,011 of (split, melanoma or not, {criterion: expression}), Derm7p's counts in each split.

    A Gaussian copula: a hidden severity orders the lesions, and each criterion follows it in part.
    """
    rows = []
    for split, count, melanomas in ((0, 413, 90), (1, 203, 61), (2, 395, 101)):
        severity, labels = rng.standard_normal(count), [{} for _ in range(count)]
        for criterion, known in criteria.items():
            pool = [e for e in known for _ in range(known[e][1 + split])]
            pool = sorted((known[e][0], rng.uniform(), e) for e in pool)
            order = np.argsort(.6 * severity + .8 * rng.standard_normal(count))
            for row, (_, _, expression) in zip(order, pool, strict=True):
                labels[row][criterion] = expression
        worst = severity >= np.sort(severity)[-melanomas]
        rows += [(split, *row) for row in zip(worst, labels, strict=True)]
    return [rows[i] for i in rng.permutation(len(rows))]


def write_demo_release(folder, criteria, seed=0):
    """Write 1,011 synthetic lesions as Derm7p's release_v0 into `folder`; same seed, same bytes.

    criteria: {criterion: {expression: (score, rows in train, valid, test)}}, kept in every split
    (413, 203, 395); 252 rows are called melanoma. No patient, no medical meaning. About 9 s.
    """
    folder, table = Path(folder), [META]
    rows = draw_labels(criteria, np.random.default_rng(seed))
    for i, (_, melanoma, labels) in enumerate(rows):
        path = f"P{i // 30:02d}/P{i:04d}.jpg"
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        picture = draw_phantom(labels, np.random.default_rng([seed, i]))
        picture.save(folder / "images" / path, quality=92)
        known = labels | {
            "case_num": i + 1, "diagnosis": "melanoma (in situ)" if melanoma else "clark nevus",
            "seven_point_score": sum(criteria[c][e][0] for c, e in labels.items()),
            "clinic": path, "derm": path, "case_id": "", "notes": "synthetic; clinic is derm"}
        table.append(",".join(str(known.get(column, "synthetic")) for column in META.split(",")))
    tables = {"meta": table} | {
        f"{name}_indexes": ["indexes", *(str(i) for i, row in enumerate(rows) if row[0] == split)]
        for split, name in enumerate(("train", "valid", "test"))}
    (folder / "meta").mkdir(exist_ok=True)
    for name, lines in tables.items():
        (folder / "meta" / f"{name}.csv").write_bytes("\n".join([*lines, ""]).encode())
