"""Dermoscopy phantoms: drawings that carry the seven criteria of Derm7p, in Derm7p's own layout.

Entirely synthetic: no patient, no photograph, no medical meaning. They exist so that the whole
method runs, and can be tested, without data that may not be redistributed.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

# criterion -> expression -> (7-point score, images in Derm7p's train, valid and test split)
EXPRESSIONS = {
    "pigment_network": {"absent": (0, 160, 84, 156), "typical": (0, 160, 75, 146),
                        "atypical": (2, 93, 44, 93)},
    "streaks": {"absent": (0, 273, 123, 257), "regular": (0, 39, 24, 44),
                "irregular": (1, 101, 56, 94)},
    "pigmentation": {"absent": (0, 253, 112, 223), "diffuse regular": (0, 44, 26, 45),
                     "localized regular": (0, 0, 0, 3), "diffuse irregular": (1, 100, 57, 108),
                     "localized irregular": (1, 16, 8, 16)},
    "regression_structures": {"absent": (0, 317, 152, 289), "blue areas": (1, 42, 26, 48),
                              "white areas": (1, 14, 9, 15), "combinations": (1, 40, 16, 43)},
    "dots_and_globules": {"absent": (0, 84, 45, 100), "regular": (0, 156, 60, 118),
                          "irregular": (1, 173, 98, 177)},
    "blue_whitish_veil": {"absent": (0, 339, 157, 320), "present": (2, 74, 46, 75)},
    "vascular_structures": {"absent": (0, 347, 163, 313), "arborizing": (0, 12, 6, 13),
                            "comma": (0, 8, 4, 11), "hairpin": (0, 4, 3, 8),
                            "within regression": (0, 18, 8, 20), "wreath": (0, 1, 1, 0),
                            "dotted": (2, 18, 13, 22), "linear irregular": (2, 5, 5, 8)},
}
SIZE = 96  # pixels
STYLE = {  # (low, high) ranges of what differs between one clinic's images and another's
    "skin": ((225, 180, 160), (245, 205, 185)), "melanin": (.45, .85, 1.15), "base": (.25, .5),
    "blood": (175, 45, 50), "veil": (120, 140, 185), "scar": (238, 222, 218),
    "grey": (105, 112, 130), "gain": ((.92, .92, .92), (1.05, 1.05, 1.05)), "vignette": (0, .25),
    "blur": (.2, .6), "noise": (2, 6), "hairs": (0, 5), "bubbles": (0, 3), "radius": (28, 40),
    "ragged": (.03, .12), "mesh": (6.5, 9), "ink": (.8, 1.2), "width": 1., "shift": 6,
}


def _noise(rng, cells):
    """A smooth random field (SIZE, SIZE) of unit spread; more cells, finer grain."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def _soft(field, sharpness):
    return 1 / (1 + np.exp(-np.clip(field * sharpness, -30, 30)))


def _draw(strokes):
    """Strokes [(points (n, 2), width)] in pixels -> coverage (SIZE, SIZE) in 0..1; 1 point: disc."""
    canvas = Image.new("L", (2 * SIZE, 2 * SIZE))
    pen = ImageDraw.Draw(canvas)
    for points, width in strokes:
        points = 2 * np.atleast_2d(points)
        if len(points) == 1:
            pen.ellipse([*(points[0] - width), *(points[0] + width)], fill=255)
        else:
            pen.line([tuple(p) for p in points], 255, max(1, round(2 * width)), "curve")
    return np.asarray(canvas.reduce(2), np.float32) / 255


def _curve(rng, start, angle, length, bend=0., wobble=0., steps=10):
    """A walk from start: the angle turns by `bend` in all, and at random by `wobble` a step."""
    turns = angle + bend * np.linspace(0, 1, steps) + wobble * rng.standard_normal(steps).cumsum()
    moves = np.stack([np.cos(turns), np.sin(turns)], 1) * length / steps
    return np.vstack([start, start + moves.cumsum(0)])


def _tree(rng, start, angle, length, width, depth):
    """A vessel that thins and branches: the arborizing pattern."""
    stem = _curve(rng, start, angle, length, wobble=.18)
    strokes = [(stem, width)]
    for k in (5, 8, 10)[:3 if depth else 0]:
        side = rng.choice([-1, 1]) * rng.uniform(.5, 1)
        strokes += _tree(rng, stem[k], angle + side, length * .6, width * .65, depth - 1)
    return strokes


def _network(kind, rng, style, xy):
    """Honeycomb (SIZE, SIZE): even mesh when typical; warped, broken, uneven when atypical."""
    odd = kind == "atypical"
    x, y = (c + (2.2 if odd else .3) * _noise(rng, 8) for c in xy)
    turn, wave = rng.uniform(0, np.pi / 3), 2 * np.pi / rng.uniform(*style["mesh"]) * 1.15
    waves = [np.cos(wave * (x * np.cos(turn + k) + y * np.sin(turn + k)))
             for k in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    lines = _soft(-sum(waves) - (.25 if not odd else .5 * _noise(rng, 6)), 4)
    return lines * (_soft(_noise(rng, 5) - .1, 5) * 1.7 if odd else 1)


def _marks(labels, rng, style, place):
    """Streaks and dots as strokes: all round and even, or one-sided, clustered and uneven."""
    strokes, width = [], style["width"]
    if labels["streaks"] != "absent":
        even, first = labels["streaks"] == "regular", rng.uniform(0, 2 * np.pi)
        for k in range(22 if even else 11):
            angle = first + (k * np.pi / 11 if even else rng.uniform(0, 2.2))
            reach = 1.22 if even else rng.uniform(1.1, 1.45)
            line = np.array([place(angle, .85), place(angle, (.85 + reach) / 2), place(angle, reach)])
            strokes += [(line, width * (1.1 if even else rng.uniform(.8, 2.2)))]
            strokes += [(line[-1], 1.5 * width)] if even else []
    if labels["dots_and_globules"] != "absent":
        even, first = labels["dots_and_globules"] == "regular", rng.uniform(0, 2 * np.pi)
        for k in range(26 if even else 20):
            angle = first + (2.4 * k if even else rng.normal(0, .55))
            far = .8 * np.sqrt((k + .5) / 26) if even else rng.uniform(.15, .95)
            strokes += [(place(angle, far), width * (1.45 if even else rng.uniform(.8, 3.2)))]
    return strokes


def _vessels(kind, rng, style, place, patch):
    """The vessel pattern of one expression as strokes."""
    width, turn = style["width"], lambda: rng.uniform(0, 2 * np.pi)
    spot = lambda far=.85: place(turn(), far * np.sqrt(rng.uniform()))  # noqa: E731
    if kind == "arborizing":
        angle = turn()
        return _tree(rng, place(angle, .95), angle + np.pi, 34, 2.4 * width, 2)
    if kind == "comma":
        return [(_curve(rng, spot(), turn(), 9, rng.choice([-2, 2])), 2. * width) for _ in range(9)]
    if kind == "hairpin":
        loops = [(_curve(rng, spot(), turn(), 5.5, 0, 0, 4), turn()) for _ in range(10)]
        return [(np.vstack([a, _curve(rng, a[-1], np.arctan2(*(a[-1] - a[0])[::-1]) + 1.2, 4, 2.6,
                steps=5), a[::-1] + (a[1] - a[0])[::-1] * (-2.2, 2.2)]), width) for a, _ in loops]
    if kind == "within regression":
        return [(_curve(rng, patch + rng.normal(0, 5, 2), turn(), 14, 0, .7, 16), .8 * width)
                for _ in range(14)]
    if kind == "wreath":
        return [(_curve(rng, place(k * .35, .82), k * .35 + 1, 7, 3.5), 1.2 * width)
                for k in range(18)]
    if kind == "dotted":
        return [(spot(), 1.15 * width) for _ in range(45)]
    if kind == "linear irregular":
        return [(_curve(rng, spot(.7), turn(), rng.uniform(10, 30), 0, .12),
                 rng.uniform(.8, 2) * width) for _ in range(9)]
    return []


def draw_phantom(labels, rng, style=STYLE):
    """One synthetic lesion (PIL image, SIZE x SIZE) that shows `labels` {criterion: expression}."""
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    centre = SIZE / 2 + rng.uniform(-1, 1, 2) * style["shift"]
    radius, waves = rng.uniform(*style["radius"]), np.arange(2, 7)
    shape = rng.normal(0, rng.uniform(*style["ragged"]), 5) / np.sqrt(waves)
    phase, squash = rng.uniform(0, 2 * np.pi, 5), rng.uniform(.78, 1)

    def edge(angle):
        return radius * (1 + np.cos(np.multiply.outer(angle, waves) + phase) @ shape)

    def place(angle, far):
        """Pixel at `far` (0 centre, 1 outline) in the direction `angle`."""
        return centre + edge(angle) * far * np.array([np.cos(angle), np.sin(angle) * squash])

    dx, dy = x - centre[0], (y - centre[1]) / squash
    inside = edge(np.arctan2(dy, dx)) - np.hypot(dx, dy)
    mask = _soft(inside, rng.uniform(.5, 1.5))
    spots = [place(rng.uniform(0, 2 * np.pi), rng.uniform(.25, .5)) for _ in range(3)]

    def blob(spot, size, grain=5, rough=.35):
        """A soft ragged patch around a spot, `size` as a share of the lesion's radius."""
        far = np.hypot(x - spot[0], y - spot[1]) / (size * radius)
        return _soft(1 - far + rough * _noise(rng, grain), 6) * mask

    # melanin, in optical depth: ground, pigmentation, network, streaks and dots
    ink = rng.uniform(*style["ink"])
    depth = mask * (rng.uniform(*style["base"]) + .04 * _noise(rng, 6))
    kind = labels["pigmentation"]
    if kind == "diffuse regular":
        depth += .65 * ink * mask
    elif kind == "diffuse irregular":
        depth += 1.0 * ink * mask * _soft(_noise(rng, 5), 5)
    elif kind == "localized regular":
        depth += 1.1 * ink * blob(centre, .42, rough=.0)
    elif kind == "localized irregular":
        depth += 1.2 * ink * blob(place(rng.uniform(0, 2 * np.pi), .65), .42, 9, .6)
    if labels["pigment_network"] != "absent":
        depth += .75 * ink * _soft(inside - 2, .5) * _network(labels["pigment_network"], rng, style,
                                                            (x, y))
    depth += 1.3 * ink * _draw(_marks(labels, rng, style, place))
    low, high = np.array(style["skin"])
    skin = low + rng.uniform(0, 1) * (high - low)
    rgb = (skin + 4 * _noise(rng, 8)[..., None]) * np.exp(-depth[..., None] * style["melanin"])

    def cover(alpha, colour):
        return rgb + np.clip(alpha, 0, 1)[..., None] * (np.array(colour) - rgb)

    # what lies over the pigment: regression, veil, vessels
    kind = labels["regression_structures"]
    if kind in ("white areas", "combinations"):
        rgb = cover(.8 * blob(spots[0], .45), style["scar"])
    if kind in ("blue areas", "combinations"):
        pepper = _soft(_noise(rng, 40) - .4, 4)
        rgb = cover(blob(spots[1], .45) * (.3 + .6 * pepper), style["grey"])
    if labels["blue_whitish_veil"] == "present":
        rgb = cover(.75 * blob(spots[2], .6, 4), style["veil"])
    kind = labels["vascular_structures"]
    if kind == "within regression":
        rgb = cover(.5 * blob(spots[0], .4), np.array(style["scar"]) - (0, 25, 25))
    rgb = cover(.85 * _draw(_vessels(kind, rng, style, place, spots[0])), style["blood"])
    return _optics(rgb, rng, style, x, y)


def _optics(rgb, rng, style, x, y):
    """Hairs, bubbles, light, blur and noise: what no label names."""
    for _ in range(rng.integers(*style["hairs"], endpoint=True)):
        hair = _curve(rng, rng.uniform(0, SIZE, 2), rng.uniform(0, 2 * np.pi), 80, .6)
        rgb = rgb * (1 - .7 * _draw([(hair, .6)])[..., None])
    for _ in range(rng.integers(*style["bubbles"], endpoint=True)):
        spot, size = rng.uniform(0, SIZE, 2), rng.uniform(2, 5)
        ring = np.exp(-(np.hypot(x - spot[0], y - spot[1]) - size) ** 2)
        rgb = rgb + 45 * ring[..., None]
    light = 1 - rng.uniform(*style["vignette"]) * ((x - 48) ** 2 + (y - 48) ** 2) / 48 ** 2
    rgb = rgb * light[..., None] * rng.uniform(*style["gain"])
    image = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*style["blur"])))
    rgb = np.asarray(image) + rng.normal(0, rng.uniform(*style["noise"]), (SIZE, SIZE, 1))
    return Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))


def _demo_rows(rng):
    """1,011 x (split, melanoma?, {criterion: expression}) with Derm7p's counts in every split.

    A Gaussian copula: a hidden severity orders the lesions, each criterion follows it in part.
    """
    rows = []
    for split, melanomas in enumerate((90, 61, 101)):
        count = (413, 203, 395)[split]
        severity = rng.standard_normal(count)
        worst = severity >= np.sort(severity)[-melanomas]
        labels = [{} for _ in range(count)]
        for criterion, expressions in EXPRESSIONS.items():
            pool = [e for e, c in expressions.items() for _ in range(c[1 + split])]
            pool = [pool[i] for i in rng.permutation(count)]
            pool.sort(key=lambda e, known=expressions: known[e][0])
            for row, e in zip(np.argsort(.6 * severity + .8 * rng.standard_normal(count)), pool,
                              strict=True):
                labels[row][criterion] = e
        rows += [(split, bool(w), found) for w, found in zip(worst, labels, strict=True)]
    return [rows[i] for i in rng.permutation(len(rows))]


def write_demo_release(folder, seed=0):
    """Write 1,011 synthetic lesions as Derm7p's release_v0 under `folder`, same seed, same bytes.

    Expression counts are Derm7p's in every split (413, 203, 395) and 252 rows are named melanoma;
    every value is drawn at random: no patient, no medical meaning. Takes about 10 s on one core.
    """
    folder, rng, lines = Path(folder), np.random.default_rng(seed), []
    (folder / "meta").mkdir(parents=True, exist_ok=True)
    rows = _demo_rows(rng)
    for i, (_, melanoma, labels) in enumerate(rows):
        path = f"P{i // 30:02d}/P{i // 30:02d}{i % 30:03d}.jpg"
        (folder / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        picture = draw_phantom(labels, np.random.default_rng([seed, i]))
        picture.save(folder / "images" / path, quality=92)
        score = sum(EXPRESSIONS[c][e][0] for c, e in labels.items())
        name = rng.choice(["melanoma (in situ)", "melanoma (less than 0.76 mm)", "melanoma metastasis"]
                          if melanoma else ["clark nevus", "blue nevus", "dermal nevus"])
        lines += [{"case_num": i + 1, "diagnosis": name, "seven_point_score": score, **labels,
                   "level_of_diagnostic_difficulty": "medium", "elevation": "flat",
                   "location": rng.choice(["back", "abdomen", "lower limbs"]),
                   "sex": rng.choice(["female", "male"]),
                   "management": "excision" if score > 2 else "clinical follow up",
                   "clinic": path, "derm": path, "case_id": "",
                   "notes": "synthetic drawing, no patient; clinic = derm"}]
    _write_csv(folder / "meta" / "meta.csv", lines)
    for split, name in enumerate(("train", "valid", "test")):
        _write_csv(folder / "meta" / f"{name}_indexes.csv",
                   [{"indexes": i} for i, row in enumerate(rows) if row[0] == split])


def _write_csv(path, rows):
    with open(path, "w", newline="", encoding="ascii") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
