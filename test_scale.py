"""Tests: oracles written from the equations, parity, formats, bad input, the real commands."""

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn import metrics as sk

import data_prep
import scale
from weights import InputError

HERE = Path(__file__).resolve().parent
SYSTEM = [HERE / "scale.py", HERE / "data_prep.py", *HERE.glob("kernels/*.py"),
          *HERE.glob("weights/*.py")]


# ---- Taxonomies and releases in miniature ---------------------------------------------------------
def tiny_tasks():
    """Two exclusive tasks; in the first a concept ("local") belongs to both classes."""
    def combination(name, klass, concept):
        return {"name": name, "class": klass, "concept": concept, "prompt": f"A photo of {name}"}
    first = [combination("local regular", "nevus", "local"), combination("none", "nevus", "none"),
             combination("local odd", "melanoma", "local")]
    second = [combination("no veil", "nevus", "absent"), combination("veil", "melanoma", "present")]
    return [{"name": "pigment", "exclusive": True, "classes": ["nevus", "melanoma"],
             "concepts": ["local", "none"], "combinations": first},
            {"name": "veil", "exclusive": True, "classes": ["nevus", "melanoma"],
             "concepts": ["absent", "present"], "combinations": second}]


def tiny_problem(n, seed=0):
    """Taxonomy, similarities z (n, 5) in float64 and truth (n, 5) with one label a task."""
    g = torch.Generator().manual_seed(seed)
    taxonomy = scale.make_taxonomy(tiny_tasks(), "No finding.", "", Path())
    first = F.one_hot(torch.randint(3, (n,), generator=g), 3)
    second = F.one_hot(torch.randint(2, (n,), generator=g), 2)
    z = torch.randn(n, 5, generator=g, dtype=torch.float64) * 0.2
    return taxonomy, z.requires_grad_(), torch.cat([first, second], 1).bool()


def write_release(raw, n=40, size=32):
    """Derm7pt's release_v0 with its traps: 0-based indices, file names in another case."""
    rng = np.random.default_rng(0)
    (raw / "meta").mkdir(parents=True)
    (raw / "images" / "FCL").mkdir(parents=True)
    columns = ["case_num", "diagnosis", "seven_point_score", *data_prep.DERM7P, "clinic", "derm"]
    rows = []
    for i in range(n):
        labels = {c: list(e)[int(rng.integers(len(e)))] for c, e in data_prep.DERM7P.items()}
        score = sum(data_prep.DERM7P[c][e][0] for c, e in labels.items())
        Image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(
            raw / "images" / "FCL" / f"Fcl{i:03}.jpg")
        rows.append({"case_num": i + 1, "seven_point_score": score, **labels, "diagnosis": "nevus",
                     "clinic": "", "derm": f"FCl/fcl{i:03}.JPG"})
    with open(raw / "meta" / "meta.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    for part, numbers in zip(data_prep.SPLITS, (range(0, 24), range(24, 28), range(28, n))):
        text = "".join(f"{i}\n" for i in ["indexes", *numbers])
        (raw / "meta" / f"{part}_indexes.csv").write_text(text)
    return rows


# ---- Eq. 1: adapters -------------------------------------------------------------------------------
def test_adapter_is_equation_1():
    """A wrong blend, an outer ReLU, a bias or a missing norm would show against the scalar loop."""
    adapter = scale.Adapter(6, 3, 0.2, torch.Generator().manual_seed(0)).double()
    f = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    w1, w2 = adapter.down.weight.detach(), adapter.up.weight.detach()
    for row, got in zip(f, adapter(f), strict=True):
        hidden = [max(0.0, sum(w1[h, d] * row[d] for d in range(6)).item()) for h in range(3)]
        mixed = [0.2 * sum(w2[d, h].item() * hidden[h] for h in range(3)) + 0.8 * row[d].item()
                 for d in range(6)]
        length = math.sqrt(sum(x * x for x in mixed))
        assert torch.allclose(got, torch.tensor(mixed, dtype=torch.float64) / length, atol=1e-7)
    assert torch.allclose(adapter(17 * f), adapter(f)), "the length of a feature must not matter"


def test_training_starts_at_zero_shot():
    """A large initial alpha or init scale would throw the checkpoint's knowledge away."""
    adapter = scale.Adapter(768, 192, 0.2, torch.Generator().manual_seed(0))
    f = F.normalize(torch.randn(50, 768, generator=torch.Generator().manual_seed(1)), dim=1)
    assert (adapter(f) * f).sum(1).min() > 0.997


# ---- Eq. 2 and 3: the objective --------------------------------------------------------------------
def supcon_loop(rows, labels, tau, unit):
    """Eq. 2 for the rows of a matrix: mean over anchors that have a positive."""
    rows = F.normalize(rows, dim=1) if unit else rows
    losses = []
    for i in range(len(rows)):
        others = [p for p in range(len(rows)) if p != i]
        positives = [p for p in others if labels[p] == labels[i]]
        total = torch.stack([rows[i] @ rows[p] / tau for p in others]).logsumexp(0) if others else 0
        if positives:
            losses.append(sum(total - rows[i] @ rows[p] / tau for p in positives) / len(positives))
    return torch.stack(losses).mean() if losses else rows.sum() * 0


def objective_loop(taxonomy, z, truth, logit_scale, tau, unit):
    """The five terms of Eq. 3 written from the formulas, Q as an N x N matrix."""
    terms = dict.fromkeys(("combination", "concept", "class", "rows", "columns"), 0)
    offset = 0
    for task in taxonomy.tasks:
        combinations = task["combinations"]
        for i in range(len(z)):
            own = {c["name"]: z[i, offset + k] for k, c in enumerate(combinations)}
            label = combinations[int(truth[i, offset:offset + len(combinations)].int().argmax())]
            for term, part in (("combination", "name"), ("concept", "concept"), ("class", "class")):
                best = {}
                for c in combinations:  # max aggregation over the taxonomy
                    best[c[part]] = max(best.get(c[part], -math.inf), own[c["name"]])
                total = torch.stack([logit_scale * v for v in best.values()]).logsumexp(0)
                loss = total - logit_scale * best[label[part]]
                terms[term] = terms[term] + loss / len(z) / len(taxonomy.tasks)
        labels = truth[:, offset:offset + len(combinations)].int().argmax(1)
        q = z[:, offset + labels]  # column j: the prompt of image j
        for term, matrix in (("rows", q), ("columns", q.T)):
            loss = supcon_loop(matrix, labels.tolist(), tau, unit)
            terms[term] = terms[term] + loss / len(taxonomy.tasks)
        offset += len(combinations)
    return terms


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_objective_is_equation_3(n, unit):
    """The closed form for templated prompts, the max aggregation and every gradient."""
    taxonomy, z, truth = tiny_problem(n)
    lambdas = (0.7, 1.3, 0.4, 0.6)
    loss, terms = scale.scale_loss(z, truth, taxonomy, 20.0, 0.1, lambdas, unit)
    (got,) = torch.autograd.grad(loss, z)
    oracle = objective_loop(taxonomy, z, truth, 20.0, 0.1, unit)
    for name, value in oracle.items():
        assert torch.allclose(terms[name].double(), torch.as_tensor(value).double(), atol=1e-9), name
    weighted = sum(w * v for w, v in zip((1, *lambdas), oracle.values(), strict=True))
    (expected,) = torch.autograd.grad(weighted, z)
    assert torch.allclose(got, expected, atol=1e-8)


def test_objective_without_positives_or_contrast():
    """All labels different, all equal, all rows identical: finite losses and gradients, no NaN."""
    taxonomy, _, _ = tiny_problem(1)
    for truth in ([[1, 0, 0, 1, 0], [0, 1, 0, 0, 1]], [[1, 0, 0, 1, 0]] * 3, [[0, 0, 1, 0, 1]]):
        truth = torch.tensor(truth).bool()
        z = torch.full(truth.shape, 0.3, requires_grad=True)
        loss, _ = scale.scale_loss(z, truth, taxonomy, 100.0, 0.07, (1, 1, 1, 1))
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()


def test_only_the_adapters_train():
    """A frozen feature that moved, or an adapter tensor that did not, would show."""
    taxonomy, _, truth = tiny_problem(12)
    g = torch.Generator().manual_seed(3)
    images, texts = (F.normalize(torch.randn(n, 16, generator=g), dim=1) for n in (12, 6))
    frozen = images.clone(), texts.clone()
    data = scale.Embedded(images, texts[:5], texts[5], truth, taxonomy, 30.0)
    config, log = scale.Config(epochs=5), []
    before = scale.fit_scale(data, range(12), scale.Config(epochs=0), torch.Generator(), [])[1]
    _, state = scale.fit_scale(data, range(12), config, torch.Generator(), log)
    assert torch.equal(images, frozen[0]) and torch.equal(texts, frozen[1])
    assert len(state) == 6 and all(not torch.equal(before[k], state[k]) for k in state)
    assert len(log) == 5 and log[-1]["loss"] < log[0]["loss"]


# ---- Subsets and metrics ---------------------------------------------------------------------------
def test_subsets_are_stratified():
    """Size to the image, every label within one of its share, seeds differ, a seed repeats."""
    rng = np.random.default_rng(0)
    truth = torch.tensor(np.eye(6, dtype=bool)[rng.choice(6, 413, p=[.5, .3, .1, .07, .025, .005])])
    picks = [scale.stratified_subset(truth, 0.1, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert len(picks[0]) == 41 and np.array_equal(picks[0], picks[1])
    assert not np.array_equal(picks[0], picks[2])
    for pick in picks:
        assert (abs(truth[pick].sum(0) - truth.sum(0) * 0.1) <= 1).all()
    assert len(scale.stratified_subset(truth, 1.0, torch.Generator())) == 413


def test_metrics_equal_scikit_learn():
    """Macro averages, ties and columns without support, against scikit-learn on the same rows."""
    rng = np.random.default_rng(1)
    for exclusive in (True, False):
        margins = torch.tensor(rng.integers(-4, 5, (60, 5)) / 2 + rng.normal(0, .01, (60, 5)))
        y = rng.choice([0, 1, 2, 4], 60)
        truth = np.eye(5, dtype=bool)[y] if exclusive else rng.random((60, 5)) < [.3, .2, .5, 0, .1]
        got = scale.score_task(margins, torch.tensor(truth), exclusive)
        decided = margins.argmax(1).numpy() if exclusive else (margins > 0).numpy()
        shown = [0, 1, 2, 4]
        target = y if exclusive else truth
        options = {"labels": shown, "average": "macro", "zero_division": 0}
        assert got["recall"] == pytest.approx(sk.recall_score(target, decided, **options))
        assert got["f1"] == pytest.approx(sk.f1_score(target, decided, **options))
        assert got["accuracy"] == pytest.approx(
            sk.accuracy_score(target, decided) if exclusive else (truth == decided).mean())
        areas = [sk.roc_auc_score(truth[:, k], margins[:, k].numpy()) for k in shown]
        assert got["auc"] == pytest.approx(np.mean(areas))
    ties, outcome = torch.tensor(rng.integers(0, 3, 50)), torch.tensor(rng.random(50) < .4)
    assert scale.area_under_curve(ties, outcome) == pytest.approx(sk.roc_auc_score(outcome, ties))


# ---- Derm7p: the format and its traps --------------------------------------------------------------
def test_derm7p_release(tmp_path):
    """Paths in the wrong case, 0-based indices, official splits, classes by expression."""
    rows = write_release(tmp_path / "release_v0")
    data_prep.prepare_derm7p(tmp_path / "release_v0", tmp_path / "data" / "derm7p")
    samples = scale.read_samples(tmp_path / "data" / "derm7p")
    taxonomy = samples.taxonomy
    assert len(taxonomy.prompts) == 28 and len(taxonomy.tasks) == 7
    assert taxonomy.prompts[17] == "A photo of a skin lesion with diffuse irregular pigmentation" or \
        "A photo of a skin lesion with diffuse irregular pigmentation" in taxonomy.prompts
    assert all(path.is_file() for path in samples.images)
    assert (samples.split == "train").sum() == 24 and samples.split[24] == "valid"
    for i, row in enumerate(rows):
        for criterion in data_prep.DERM7P:
            name = data_prep.combination_name(criterion, row[criterion])
            assert samples.truth[i, taxonomy.combination.names.index(name)]
    classes = scale.at_level(samples.truth, taxonomy.klass)[:, 1::2]  # melanoma of each task
    odd = [[data_prep.DERM7P[c][r[c]][0] > 0 for c in data_prep.DERM7P] for r in rows]
    assert classes.tolist() == odd


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_derm7p_bad_input(tmp_path):
    """An unknown expression, a wrong score, a double index, a lost image: one sentence each."""
    for k, (name, change, words) in enumerate([
            ("meta.csv", lambda p: edit(p, ",absent,", ",abscent,"), "'abscent'"),
            ("meta.csv", lambda p: edit(p, "nevus,", "nevus,1"), "seven_point_score"),
            ("test_indexes.csv", lambda p: edit(p, "30", "3"), "'3'"),
            ("meta.csv", lambda p: p.write_text("\x00"), "meta.csv"),
            ("meta.csv", lambda p: edit(p, "fcl007", "fcl777"), "fcl777")]):
        raw = tmp_path / str(k)
        write_release(raw)
        change(raw / "meta" / name)
        with pytest.raises(InputError, match=words):
            data_prep.prepare_derm7p(raw, tmp_path / "data")
        assert not (tmp_path / "data" / "samples.csv").exists()
