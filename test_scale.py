"""Tests: oracles written from the equations, parity, formats, bad input, the real commands."""
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn import metrics as sk

import scale
from data_prep import DERM7P, combination_name, prepare_derm7p, read_table
from kernels import supcon
from kernels.supcon import product_supcon_loss, supcon_loss, supcon_reference
from weights import InputError
from weights.clip import byte_symbols, image_tower, load_clip, text_tower

HERE = Path(__file__).resolve().parent
COMMAND = HERE / "scale.py", "--dataset", "demo"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
TASKS = slice(0, 3), slice(3, 5)  # the columns of tiny_problem's tasks
TEXTS = ["a photo of a mole", "This is dermoscopy of an atypical, Pigment network!", "x y " * 40]


# ---- Adapters and objective (Eq. 1 to 3) ---------------------------------------------------------
def unit_rows(n, d, seed=0, dtype=torch.float64):
    """Unit rows (n, d) that take gradients, drawn in float64."""
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=1).to(dtype).requires_grad_()


def supcon_loop(x, labels, tau, y=None, y_labels=None):
    """Eq. 2, an anchor at a time: the mean over those that have a positive, 0 without any."""
    alone, losses = y is None, []
    y, y_labels = (x, labels) if alone else (y, y_labels)
    for i in range(len(x)):
        others = torch.arange(len(y)) != (i if alone else len(y))
        positives, logits = others & (y_labels == labels[i]), y @ x[i] / tau
        if positives.any():
            losses.append(logits[others].logsumexp(0) - logits[positives].mean())
    return sum(losses) / max(len(losses), 1) + 0 * (x.sum() + y.sum() + tau)


def assert_same(got, expected, inputs, atol=1e-9, rtol=1e-9):
    """Equal losses and equal gradients to the inputs."""
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def tiny_problem(n):
    """Taxonomy, cosines z (n, 5), truth (n, 5); the concept "local" belongs to both classes."""
    tasks = []
    for name, concepts, pairs in (
            ("pigment", ["local", "none"], ["nevus local", "nevus none", "melanoma local"]),
            ("veil", ["absent", "present"], ["nevus absent", "melanoma present"])):
        combinations = [dict(zip(("class", "concept"), pair.split(), strict=True), name=pair,
                             prompt=pair) for pair in pairs]
        tasks.append({"name": name, "exclusive": True, "classes": ["nevus", "melanoma"],
                      "concepts": concepts, "combinations": combinations})
    g = torch.Generator().manual_seed(0)
    truth = torch.cat([F.one_hot(torch.randint(k, (n,), generator=g), k) for k in (3, 2)], 1)
    z = torch.randn(n, 5, generator=g, dtype=torch.float64) * 0.2
    return scale.make_taxonomy({"tasks": tasks}), z.requires_grad_(), truth.bool()


def test_adapter_is_equation_1():
    """A wrong blend, an outer ReLU, a bias, a missing norm or a start far from zero-shot shows."""
    adapter = scale.Adapter(6, 3, 0.2, torch.Generator().manual_seed(0)).double()
    f, w1, w2 = unit_rows(4, 6), adapter.down.weight, adapter.up.weight
    mixed = 0.2 * (f @ w1.T).clamp(min=0) @ w2.T + 0.8 * f
    expected = mixed / mixed.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(adapter(17 * f), expected, atol=1e-7, rtol=0)  # of any length
    adapter = scale.Adapter(768, 192, 0.2, torch.Generator().manual_seed(0))
    f = unit_rows(50, 768, 1, torch.float32)
    assert (adapter(f) * f).sum(1).min() > 0.997


def objective_loop(z, truth, taxonomy, logit_scale, tau, unit, pairs, contrast=supcon_loop):
    """The five terms of Eq. 3 written from the formulas, Q as an N x N matrix."""
    terms = dict.fromkeys(("combination", "concept", "class", "rows", "columns"), 0)
    for task, part in zip(taxonomy.tasks, TASKS, strict=True):
        combinations, labels = task["combinations"], truth[:, part].int().argmax(1)
        for own, label in zip(z[:, part], labels, strict=True):
            for term, key in (("combination", "name"), ("concept", "concept"), ("class", "class")):
                best = {}
                for c, value in zip(combinations, own, strict=True):  # max over the taxonomy
                    best[c[key]] = max(best.get(c[key], -math.inf), logit_scale * value)
                loss = torch.stack([*best.values()]).logsumexp(0) - best[combinations[label][key]]
                terms[term] = terms[term] + loss / len(z) / len(TASKS)
        q = pairs[0] @ pairs[1].T if pairs else z[:, part][:, labels]  # column j: text of image j
        for term, rows in (("rows", q), ("columns", q.T)):
            rows = F.normalize(rows, dim=1) if unit else rows
            terms[term] = terms[term] + contrast(rows, labels, tau) / len(TASKS)
    return terms


@pytest.mark.parametrize("n, labels", [(1, "any"), (2, "any"), (12, "any"), (520, "any"),
                                       (2, "different"), (3, "equal"), (9, "free texts")])
@pytest.mark.parametrize("unit", [True, False])
def test_objective_is_equation_3(n, labels, unit):
    """A wrong closed form, max, weight or gradient, NaN without positives or negatives shows."""
    taxonomy, z, truth = tiny_problem(n)
    pairs = [unit_rows(n, 4, 5), unit_rows(n, 4, 6)] if labels == "free texts" else []
    if labels == "different":
        truth = torch.cat([torch.eye(3)[:2], torch.eye(2)], 1).bool()
    if labels == "equal":
        truth, z = truth[:1].repeat(n, 1), z.detach()[:1].repeat(n, 1).requires_grad_()
    rest = truth, taxonomy, 20.0, 0.1
    loss, terms = scale.scale_loss(z, *rest, (0.7, 1.3, 0.4, 0.6), unit, pairs or None)
    oracle = objective_loop(z, *rest, unit, pairs, supcon_loop if n < 99 else supcon_reference)
    torch.testing.assert_close(terms, oracle)
    expected = torch.stack([*oracle.values()]) @ torch.tensor([1, 0.7, 1.3, 0.4, 0.6]).double()
    assert_same(loss, expected, [z, *pairs], 1e-5, 1e-5)


@pytest.mark.parametrize("templates", [True, False])
def test_only_the_adapters_train(templates):
    """A frozen feature that moved, or an adapter tensor that did not, would show."""
    taxonomy, _, truth = tiny_problem(12)
    images, texts = (unit_rows(n, 16, n, torch.float32).detach() for n in (12, 6))
    reports = F.normalize(truth.float() @ texts[:5], dim=1)[:0 if templates else 12]
    frozen, log = (images.clone(), texts.clone()), []
    data = scale.Embedded(images, texts[:5], texts[5], reports, truth, taxonomy, 30.0)
    before, state = (scale.fit_scale(data, range(12), scale.Config(epochs=epochs),
                                     torch.Generator(), log)[1] for epochs in (0, 40))
    assert torch.equal(images, frozen[0]) and torch.equal(texts, frozen[1])
    assert len(state) == 6 and all(not torch.equal(before[k], state[k]) for k in state)
    assert len(log) == 40 and log[-1]["loss"] < log[0]["loss"]


# ---- Subsets and metrics -------------------------------------------------------------------------
def test_subsets_are_stratified():
    """Size to the image, every label within one of its share, seeds differ, a seed repeats."""
    rng = np.random.default_rng(0)
    truth = torch.tensor(np.eye(6, dtype=bool)[rng.choice(6, 413, p=[.5, .3, .1, .07, .025, .005])])
    first, again, other = (scale.stratified_subset(truth, 0.1, torch.Generator().manual_seed(seed))
                           for seed in (0, 0, 1))
    assert len(first) == 41 and np.array_equal(first, again) and not np.array_equal(first, other)
    for pick in (first, other):
        assert (abs(truth[pick].sum(0) - truth.sum(0) * 0.1) <= 1).all()
    assert len(scale.stratified_subset(truth, 1.0, torch.Generator())) == 413


@pytest.mark.parametrize("exclusive", [True, False])
def test_metrics_equal_scikit_learn(exclusive):
    """Macro averages, ties and columns without support, against scikit-learn on the same rows."""
    rng, shown = np.random.default_rng(1), [0, 1, 2, 4]
    margins = rng.integers(-4, 5, (60, 5)) / 2 + rng.normal(0, .01, (60, 5))
    y = rng.choice(shown, 60)
    truth = np.eye(5, dtype=bool)[y] if exclusive else rng.random((60, 5)) < [.3, .2, .5, 0, .1]
    target, decided = (y, margins.argmax(1)) if exclusive else (truth, margins > 0)
    got = scale.score_task(torch.tensor(margins), torch.tensor(truth), exclusive)
    options = {"labels": shown, "average": "macro", "zero_division": 0}
    assert got["recall"] == pytest.approx(sk.recall_score(target, decided, **options))
    assert got["f1"] == pytest.approx(sk.f1_score(target, decided, **options))
    assert got["accuracy"] == pytest.approx((target == decided).mean())
    best = np.stack([np.delete(margins, k, 1).max(1) for k in range(5)], 1)
    for name, score in [("auc", margins), ("auc_pair", margins - best)][:1 + exclusive]:
        areas = [sk.roc_auc_score(truth[:, k], score[:, k]) for k in shown]
        assert got[name] == pytest.approx(np.mean(areas))
    ties, outcome = torch.tensor(rng.integers(0, 3, 50)), torch.tensor(rng.random(50) < .4)
    assert scale.area_under_curve(ties, outcome) == pytest.approx(sk.roc_auc_score(outcome, ties))


# ---- Derm7p: the format and its traps ------------------------------------------------------------
def python(folder, *arguments, **environment):
    """A Python process in `folder`, which must end well: its stdout and stderr."""
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": ""} | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The README's first command, once: (working folder, its stdout)."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, python(folder, *COMMAND, "--frac", "0.05", "--splits", "2").stdout


def edit(path, old, new):
    assert old in (text := path.read_text())
    path.write_text(text.replace(old, new, 1))


def test_derm7p_release(demo, tmp_path):
    """Paths in the wrong case, 0-based indices, official splits, classes by expression."""
    raw, parts = tmp_path / "release_v0", {}
    shutil.copytree(demo[0] / "data" / "demo" / "release_v0", raw)
    (raw / "images" / "P03").rename(raw / "images" / "p03")
    rows = read_table(raw / "meta" / "meta.csv", [])
    for part in ("train", "valid", "test"):
        table = read_table(raw / "meta" / f"{part}_indexes.csv", ["indexes"])
        parts |= {int(row["indexes"]): part for row in table}
    prepare_derm7p(raw, tmp_path / "data")
    samples = scale.read_samples(tmp_path / "data")
    assert all(path.is_file() for path in samples.images)
    assert samples.split.tolist() == [parts[i] for i in range(1011)]
    prompts = [c["prompt"] for task in samples.taxonomy.tasks for c in task["combinations"]]
    assert len(prompts) == 28 and len(samples.taxonomy.tasks) == 7
    assert "A photo of a skin lesion with diffuse irregular pigmentation" in prompts
    names = np.array(samples.taxonomy.combination.names)
    assert [set(names[row]) for row in samples.truth.numpy()] == [
        {combination_name(c, row[c]) for c in DERM7P} for row in rows]
    melanoma = scale.at_level(samples.truth, samples.taxonomy.klass)[:, 1::2]  # one a task
    assert melanoma.tolist() == [[DERM7P[c][row[c]][0] > 0 for c in DERM7P] for row in rows]


@pytest.mark.parametrize("name, change, words", [
    ("meta.csv", (",absent,", ",abscent,"), "'abscent'"),
    ("meta.csv", ("1,clark nevus,", "1,clark nevus,1"), "seven_point_score"),
    ("test_indexes.csv", ("indexes\n", "indexes\n5\n"), "'5'"),
    ("meta.csv", ("case_num", "\x00"), "meta.csv"), ("meta.csv", ("P0007.jpg,,", "P7,,"), "P7 ")])
def test_derm7p_bad_input(demo, tmp_path, name, change, words):
    """An unknown expression, a wrong score, a double index, a lost image: one sentence each."""
    shutil.copytree(demo[0] / "data" / "demo" / "release_v0", tmp_path, dirs_exist_ok=True)
    edit(tmp_path / "meta" / name, *change)
    with pytest.raises(InputError, match=words):
        prepare_derm7p(tmp_path, tmp_path / "data")
    assert not (tmp_path / "data" / "samples.csv").exists()


# ---- CLIP against transformers -------------------------------------------------------------------
@functools.cache
def written_clip(act="quick_gelu"):
    """(folder, model, tokenizer, processor) of a small random CLIP that transformers wrote."""
    hf = pytest.importorskip("transformers")
    rng, names = random.Random(0), list(byte_symbols().values())
    some = ["a", "n", "o", "m", "e", "l", "p", "i", "1", "'", "Ã", "©", "a</w>", "n</w>", "s</w>"]
    merges = [(a, b) for a in some[:12] for b in some]
    merges += [(a + b, rng.choice(some)) for a, b in merges if "<" not in b]
    rng.shuffle(merges)
    names += [*(c + "</w>" for c in names), *map("".join, merges), "<|startoftext|>",
              "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    shape = {"num_hidden_layers": 11, "hidden_act": act, "intermediate_size": 96}
    torch.manual_seed(0)
    model = hf.CLIPModel(hf.CLIPConfig(projection_dim=32, text_config=shape | {
        "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 20, "vocab_size":
        len(vocab), "bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}, vision_config=
        shape | {"hidden_size": 48, "num_attention_heads": 3, "image_size": 40, "patch_size": 8}))
    for p in model.eval().parameters():
        p.data += 0.15 * torch.randn_like(p)
    tokenizer = hf.CLIPTokenizerFast(vocab=vocab, merges=merges)
    processor = hf.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    folder = Path(tempfile.mkdtemp())
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder, model, tokenizer, processor


def copy_with(target, tensors=None):
    """`target`, made a copy of the checkpoint, with these tensors in place of its own."""
    shutil.copytree(written_clip()[0], target)
    if tensors:
        save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors")
    return target


def openai_layout(hf, text=""):
    """OpenAI's names and shapes (open_clip's with text="text."): fused in_proj, turned ends."""
    out, spelling = {}, """visual_projection.weight:visual.proj vision_model:visual text_model.:
        text_projection.weight:text_projection self_attn.q_proj.:attn.in_proj_ embeddings.:
        self_attn:attn encoder.layers:transformer.resblocks pre_layrnorm:ln_pre fc1:c_fc
        post_layernorm:ln_post final_layer_norm:ln_final layer_norm:ln_ fc2:c_proj
        patch_embedding:conv1 position_embedding.weight:positional_embedding""".split()
    for name, tensor in hf.items():
        if "q_proj" in name:
            tensor = torch.cat([hf[name.replace("q_proj", c + "_proj")] for c in "qkv"])
        tensor = tensor.T if "_projection" in name else tensor
        for pair in spelling:
            name = name.replace(*pair.split(":"))
        if ".k_proj" not in name and ".v_proj" not in name:
            out[name if name.startswith(("visual", "logit")) else text + name] = tensor
    return out


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(act):
    """A wrong activation, head count, layer order ("10" < "2"), pooling or gradient would show."""
    folder, model, tokenizer, _ = written_clip(act)
    clip, pixels = load_clip(folder), torch.randn(3, 3, 40, 40)
    ids = tokenizer(TEXTS, padding=True, truncation=True, max_length=20, return_tensors="pt")
    with torch.no_grad():  # transformers 4 returns tensors, 5 objects
        images, texts = (F.normalize(getattr(x, "pooler_output", x), dim=-1) for x in (
            model.get_image_features(pixel_values=pixels), model.get_text_features(**ids)))
    w = {name: tensor.clone().requires_grad_() for name, tensor in clip.tensors.items()}
    every = image_tower(w, pixels, **clip.image, every_token=True)  # (3, 26, 32)
    first, ids = image_tower(w, pixels, **clip.image), ids["input_ids"]
    free = w["text_model.embeddings.token_embedding.weight"][ids]  # embeddings in place of ids
    last = text_tower(w, free, ids.argmax(1), **clip.text)
    for ours, theirs in ((clip.encode_image(pixels), images), (clip.encode_text(TEXTS), texts),
                         (every[:, 0], images), (first, images), (last, texts)):
        torch.testing.assert_close(F.normalize(ours, dim=-1), theirs, atol=2e-5, rtol=0)
    assert clip.logit_scale == pytest.approx(model.logit_scale.exp().item())
    (first.square().sum() + last.square().sum()).backward()
    assert [n for n, t in w.items() if t.grad is None] == ["logit_scale"]
    clip.tensors = w  # a frozen encoder records no gradients
    assert not (clip.encode_text(TEXTS).requires_grad or clip.encode_image(pixels).requires_grad)


@pytest.mark.parametrize("layout", ["position_ids", "openai", "open_clip", "half"])
def test_clip_layouts_agree(tmp_path, layout):
    """A projection not turned, q, k, v swapped, or fp16 left as it is would show."""
    tensors = load_file(written_clip()[0] / "model.safetensors")
    w = {"position_ids": tensors | {"text_model.embeddings.position_ids": torch.arange(20)[None]},
         "openai": openai_layout(tensors) | {"context_length": torch.tensor(20)},
         "open_clip": openai_layout(tensors, "text."),
         "half": {name: tensor.half() for name, tensor in tensors.items()}}[layout]
    ours, other = load_clip(written_clip()[0]), load_clip(copy_with(tmp_path / "copy", w))
    for name, batch in (("encode_image", torch.randn(2, 3, 40, 40)), ("encode_text", TEXTS)):
        a, b = (F.normalize(getattr(clip, name)(batch), dim=-1) for clip in (ours, other))
        torch.testing.assert_close(a, b, atol=2e-3 if layout == "half" else 2e-6, rtol=0)


def test_tokens_equal_transformers(tmp_path):
    """A slip in normalising, splitting, merging, cutting or reading the files would show."""
    folder, _, tokenizer, _ = written_clip()
    rng = random.Random(1)
    odd = "ÀßİΣς²½Ⅷ٣中한 \t\n\u00a0\x1c\x85'’_<|>éfi🙂\u0301\u200d"
    pools = ["abcdefghijklmno PQRS'tvsd.,12!", odd, "melanoma's élan 12", odd + "anom 's"]
    texts = ["".join(rng.choices(pools[i % 4], k=rng.randrange(40))) for i in range(4000)]
    theirs = tokenizer(texts, truncation=True, max_length=30)["input_ids"]
    copy, fast = copy_with(tmp_path / "copy"), folder / "tokenizer.json"
    fast, pairs = json.loads(fast.read_text()), list(map(list, load_clip(folder).tokenizer.ranks))
    lines = [" ".join(pair) for pair in pairs]
    for merges in (pairs, lines, None):  # two kinds of tokenizer.json, then the older files
        fast["model"]["merges"] = merges
        (copy / "tokenizer.json").write_text(json.dumps(fast) if merges else "")
        if not merges:
            (copy / "vocab.json").write_text(json.dumps(fast["model"]["vocab"]))
            (copy / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
        ours = load_clip(copy).tokenizer
        assert [ours(text, 30) for text in texts] == theirs


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK", "I;16"])
def test_pixels_equal_transformers(mode):
    """A crop one pixel off, a resize before the conversion to RGB, or alpha lost would show."""
    (folder, *_, processor), rng = written_clip(), np.random.default_rng(0)
    for height, width in ((40, 40), (57, 91), (131, 83), (20, 33), (300, 41)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 4), np.uint8), "RGBA")
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 900, (height, width)).astype(np.uint16))
        image = image if mode in ("RGBA", "I;16") else image.convert(mode)
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(load_clip(folder).preprocess(image), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", [dict, openai_layout])
@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen", "nan"])
def test_checkpoint_must_fit(tmp_path, layout, fault):
    """A checkpoint that fits only in part must not load, and the error names the tensor."""
    w = layout(load_file(written_clip()[0] / "model.safetensors"))
    name = next(n for n in w if "10.l" in n and n.endswith("bias"))
    w |= {"missing": {}, "extra": {"logit_bias": torch.zeros(1)}, "nan": {name: w[name] * math.nan},
          "misshapen": {name: torch.zeros(7)}}[fault]
    w = {n: tensor for n, tensor in w.items() if fault != "missing" or n != name}
    with pytest.raises(InputError, match="logit_bias" if fault == "extra" else name) as error:
        load_clip(copy_with(tmp_path / "copy", w))
    assert "data_prep.py weights copy" in str(error.value)


def test_unreadable_checkpoint(tmp_path, capsys):
    """Cut, foreign or missing files, odd settings, and MONET's pixels off ImageNet's are named."""
    copy = copy_with(tmp_path / "monet")
    path, clip = copy / "model.safetensors", load_clip(copy)
    assert "ImageNet" in capsys.readouterr().err
    (copy / "preprocessor_config.json").unlink()
    assert load_clip(copy).pixels["mean"][0] == 0.485 and not capsys.readouterr().err
    clip.tensors["text_projection.weight"] = clip.tensors["text_projection.weight"] * np.inf
    with pytest.raises(InputError, match="finite"):
        clip.encode_text(TEXTS)
    whole = path.read_bytes()
    for content in (whole[:-9], whole[:5], b"", b"version https://git-lfs", b"\xff" * 99):
        path.write_bytes(content)
        with pytest.raises(InputError, match="model.safetensors"):
            load_clip(copy)
    path.write_bytes(whole)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="merges.txt"):
        load_clip(copy)
    edit(copy / "config.json", "quick_gelu", "relu")
    with pytest.raises(InputError, match="relu"):
        load_clip(copy)


# ---- The kernel: loops in float64, torch's own losses, Triton's interpreter and compiler ---------
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.005])
@pytest.mark.parametrize("n, d", [(1, 8), (33, 17), (127, 130)])
def test_supcon_equals_loops(n, d, temperature):
    """A wrong mask, tile edge, sign or overflow, in the loss or any gradient, would show."""
    x, y, tau = unit_rows(n, d), unit_rows(n + 3, d, 1), torch.tensor(temperature).double()
    tau.requires_grad_()
    for classes in (1, 5, 10 * n):
        g, h = torch.arange(n) % classes, torch.arange(n + 3) % classes
        assert_same(supcon_loss(x, g, tau), supcon_loop(x, g, tau), (x, tau))
        assert_same(supcon_loss(x, g, tau, contrast=y, contrast_labels=h),
                    supcon_loop(x, g, tau, y, h), (x, y, tau))


def test_supcon_blocks_and_forms():
    """An error where blocks of rows meet, in a reduction, a stride, CLIP's pairs would show."""
    x, labels = unit_rows(1100, 8), torch.arange(1100) % 700
    assert_same(supcon_loss(x, labels), supcon_reference(x, labels), x)
    losses, total = (supcon_loss(x, labels, reduction=name) for name in ("none", "sum"))
    assert (losses == 0).sum() == 300 and torch.equal(total, losses.sum())
    x, y, tau = unit_rows(50, 6), unit_rows(50, 6, 1), torch.tensor(0.5).double().requires_grad_()
    clip = sum(F.cross_entropy(q / tau, torch.arange(50)) for q in (x @ y.T, y @ x.T)) / 2
    assert_same(supcon_loss(x, None, tau, contrast=y, both=True), clip, (x, y, tau))
    labels = torch.tensor([3, 1, 3, 2, 1, 3, 9])
    assert torch.autograd.gradcheck(lambda x, tau: supcon_loss(
        x.T.clone().T, labels, tau, reduction="none"), (unit_rows(7, 4), tau))
    sure = (torch.eye(2).repeat(3, 1) + 0.01).bfloat16().requires_grad_()  # confident positives
    assert torch.autograd.grad(supcon_loss(sure, torch.arange(6) % 2), sure)[0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.005])
def test_supcon_no_worse_than_plain_torch(dtype, temperature):
    """Lost precision would show: error to float64 beside plain torch's on the same features."""
    x, labels = unit_rows(300, 40, dtype=dtype), torch.arange(300) % 9
    exact = x.detach().double().requires_grad_()
    truth, = torch.autograd.grad(supcon_reference(exact, labels, temperature), exact)
    ours, plain = ((torch.autograd.grad(f(x, labels, temperature), x)[0] - truth).norm()
                   for f in (supcon_loss, supcon_reference))
    assert ours <= plain * 1.3 + 1e-6 * truth.norm()


def test_product_supcon_equals_dense_formula():
    """A wrong gradient through the metric b^T b, or through Q, to a or to b, would show."""
    for m, unit in itertools.product((5, 90), (True, False)):
        a, b, labels = unit_rows(70, 20), unit_rows(m, 20, 1), torch.arange(70) % 7
        q = F.normalize(a @ b.T, dim=1) if unit else a @ b.T
        loss = product_supcon_loss(a, b, labels, unit_rows=unit)
        assert_same(loss, supcon_reference(q, labels), (a, b))


def test_supcon_mistakes_are_named():
    """A mistake that passes, or a second derivative that is silently zero, would show."""
    x, labels = unit_rows(6, 4), torch.arange(6)
    for wrong in ({"features": x[0]}, {"features": x.long()}, {"labels": labels[:5]},
                  {"labels": labels.float()}, {"temperature": 0}, {"labels": None},
                  {"temperature": torch.tensor(-1.0)}, {"impl": "cuda"}, {"impl": "triton"},
                  {"reduction": "max"}, {"both": True}, {"contrast": x}, {"labels": None,
                  "contrast": x[:, :2]}, {"contrast": x.half(), "contrast_labels": labels}):
        with pytest.raises(ValueError, match=r"\w+ \w+"):
            supcon_loss(**{"features": x, "labels": labels} | wrong)
    gradient, = torch.autograd.grad(supcon_loss(x, labels % 2), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_supcon_compile_autocast_and_memory():
    """A graph break, a false shape, rounding by autocast, an N x N matrix kept would show."""
    x, g, sizes = unit_rows(80, 16, dtype=torch.float32), torch.arange(80) % 9, []
    tau = torch.tensor(5.0, requires_grad=True)
    for arguments in ((x, x.detach(), g, g, tau, 0, True), (x, x[:9], g, g[:9], tau, 2, False)):
        torch.library.opcheck(supcon.pair_statistics, (*arguments, False))
    compiled = torch.compile(supcon_loss, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, g), supcon_loss(x, g), x)
    for loss in (supcon_loss, lambda x, g: product_supcon_loss(x, x.detach(), g)):
        expected = loss(x, g)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(loss(x, g), expected, x, 0, 0)  # also: the same bits from run to run
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
        supcon_loss(unit_rows(900, 16), torch.arange(900) % 9)
    assert sum(sizes) < 900 * 16 * 5


def guard_interpreter():
    """Let Triton's interpreter fail on an access outside the tensors passed, and on races."""
    from triton.runtime import interpreter
    builder, launch, seen = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__, {}

    def recorded(kind, access):
        def record(self, ptrs, *rest):
            mask = rest[kind == "store"].data.astype(bool)  # load: (mask,), store: (value, mask)
            at = np.unique(ptrs.data[mask].astype(np.int64))
            end = at + ptrs.get_element_ty().primitive_bitwidth // 8
            assert np.all(sum((at >= a) & (end <= b) for a, b in seen["tensors"])), "out of bounds"
            seen[kind].append(at)
            return access(self, ptrs, *rest)
        return record

    def guarded_launch(self, *args, **kwargs):
        seen.update(load=[], store=[], tensors=[
            (t.data_ptr(), t.data_ptr() + t.nbytes) for t in args if isinstance(t, torch.Tensor)])
        launch(self, *args, **kwargs)
        stored, times = np.unique(np.concatenate(seen["store"]), return_counts=True)
        assert times.max() == 1 and not np.isin(stored, np.concatenate(seen["load"])).any(), "race"

    for kind in ("load", "store"):
        name = f"create_masked_{kind}"
        setattr(builder, name, recorded(kind, getattr(builder, name)))
    interpreter.GridExecutor.__call__ = guarded_launch


def run_in_interpreter():
    """Triton's tiles, guarded: odd shapes, two blocks, all forms and types, against float64."""
    guard_interpreter()
    most = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    cases = [*itertools.product([(1, 8), (33, 17), (65, 37)], most), ((300, 9), torch.float32)]
    for ((n, d), dtype), form in itertools.product(cases, ("alone", "both", "offset")):
        def loss(x, y, impl, n=n, form=form):
            g, h = torch.arange(n) % 7, torch.arange(n + 5) % 9
            if form == "offset":  # what a group of processes does
                return supcon._anchor_losses(x, y, g, h, 1.0, 3, impl)[0][0].sum()
            others = {"contrast": y, "contrast_labels": h, "both": True}
            return supcon_loss(x, g, 0.05, impl=impl, **others if form == "both" else {})
        inputs = unit_rows(n, d, 0, dtype), unit_rows(n + 5, d, 1, dtype)
        exact = [x.detach().double().requires_grad_() for x in inputs]
        got, truth = (torch.autograd.grad(loss(*x, impl), x, allow_unused=True)
                      for x, impl in ((inputs, "triton"), (exact, "torch")))
        for a, b in zip(got, truth, strict=True):
            assert b is None or (a - b).norm() <= most[dtype] * b.norm(), (n, d, dtype, form)


@on_linux
def test_triton_in_interpreter():
    """A wrong Triton tile, an access out of bounds, a race of two programs would show."""
    code = f"import {__name__} as t; t.run_in_interpreter()"
    python(HERE, "-c", code, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")


@on_linux
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_compiles_without_spills(arch, dtype, tmp_path):
    """Tiles that spill registers or miss the tensor cores would show, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel, tool = supcon._tile_kernel, Path(triton.__file__).with_name("backends")
    tool = tool / "nvidia" / "bin" / "cuobjdump"
    shape = (128, 64, 32) if dtype == "fp32" else (128, 128, 64)
    pointers = [name for name in kernel.arg_names if name.endswith("_ptr")]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    for weights, symmetric in ((False, True), (False, False), (True, False)):
        constants = dict(zip("RCD", shape, strict=True), DIM=768, WEIGHTS=weights,
                         SYMMETRIC=symmetric)
        types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(pointers, "*fp32")
        types |= dict.fromkeys(("a_ptr", "b_ptr", *["weight_ptr"] * weights), "*" + dtype)
        types |= dict.fromkeys(("a_label_ptr", "b_label_ptr"), "*i64")
        types |= dict.fromkeys(constants, "constexpr")
        built = triton.compile(ASTSource(kernel, types, constants, aligned),
                               target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
        assert re.search(r"\bw?g?mma\.", built.asm["ptx"]), "no tensor-core instruction"
        (tmp_path / "cubin").write_bytes(built.asm["cubin"])
        usage = subprocess.check_output([tool, "-res-usage", tmp_path / "cubin"], text=True)
        assert re.search(r"STACK:0\b", usage), usage


def test_supcon_file_alone(tmp_path):
    """An import from the project, or a need for Triton where there is none, would show."""
    shutil.copy(supcon.__file__, tmp_path / "loss.py")
    code = ("import sys, torch; sys.modules['triton'] = None; from loss import supcon_loss; "
            "print(supcon_loss(torch.ones(8, 4) / 2, torch.zeros(8).long()).item())")
    assert float(python(tmp_path, "-c", code).stdout) == pytest.approx(math.log(7))


# ---- Embedding and its cache ---------------------------------------------------------------------
class CountingBackbone:
    """Stands for an encoder: a linear map of the pixels; fails at the batch `fail`."""

    def __init__(self, fail=0):
        self.batches, self.fail = 0, fail

    def preprocess(self, image):
        return torch.tensor(np.asarray(image.convert("RGB").resize((4, 4)))).permute(2, 0, 1)

    def encode_image(self, pixels):
        self.batches += 1
        if self.batches == self.fail:
            raise KeyboardInterrupt
        return pixels.flatten(1).float() @ unit_rows(48, 12, 0, torch.float32).detach()

    def encode_text(self, texts):
        return torch.tensor([[float(ord(c)) for c in text[:3]] for text in texts])


@pytest.mark.parametrize("stop, words, fail", [
    (KeyboardInterrupt, None, 4), (InputError, "P0030.jpg", 0)])
def test_interrupted_embedding_goes_on(demo, tmp_path, stop, words, fail):
    """After Ctrl-C or a half JPEG only what is missing is computed, to the bit; else nothing."""
    source, cache = sorted(demo[0].glob("data/**/*.jpg"))[:40], tmp_path / "cut.safetensors"
    images = [Path(shutil.copy(path, tmp_path)) for path in source]
    whole = scale.embed(CountingBackbone(), images, ["abc"], tmp_path / "whole.safetensors", 8)
    jpeg, again, last = images[30].read_bytes(), CountingBackbone(), CountingBackbone()
    images[30].write_bytes(jpeg[:None if fail else 700])
    with pytest.raises(stop, match=words):
        scale.embed(CountingBackbone(fail), images, ["abc"], cache, 8)
    images[30].write_bytes(jpeg)
    cut = scale.embed(again, images, ["abc"], cache, 8)
    assert again.batches == 2 and all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    images[0].write_bytes(images[1].read_bytes())  # content decides, not the name
    moved, _ = scale.embed(last, images, ["abc"], cache, 8)
    assert last.batches == 0 and torch.equal(moved[0], moved[1])


# ---- The real commands ---------------------------------------------------------------------------
def test_demo_command(demo):
    """Files of every run, a table with every method, the same bytes again; one criterion alone."""
    folder, first = demo
    assert all(method in first for method in ("zeroshot", "linear-weighted", "scale"))
    run = folder / "runs" / "demo-demo-scale-0.05-s1"
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    assert len(files) == 5 and {"adapter.safetensors", "scores.csv", "config.json"} < set(files)
    assert len(files.pop("log.jsonl").splitlines()) == 150  # it holds times
    metrics = json.loads(files["metrics.json"])
    assert metrics["n_train"] == 21 and metrics["n_test"] == 395 and len(metrics["per_task"]) == 7
    (run / "config.json").write_text("of another version")
    again = python(folder, *COMMAND, "--frac", "0.05", "--splits", "2")
    assert again.stdout == first and "embedding" not in again.stderr
    assert files == {name: (run / name).read_bytes() for name in files}
    python(folder, *COMMAND, "--criterion", "pigmentation", "--method", "zeroshot")
    run = folder / "runs" / "demo-demo-zeroshot-1-s0-criterion=pigmentation"
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["per_task"]) == ["pigmentation"] and len(metrics["support"]) == 5


# ---- Bad input -----------------------------------------------------------------------------------
@pytest.mark.parametrize("flags, change, words", [
    ("--frac 0", (), "--frac"), ("--frac 2", (), "--frac"), ("--method scala", (), "scala"),
    ("--criterion colour", (), "colour"), ("--dataset derm7p", (), "data_prep.py derm7p"),
    ("--backbone monet", (), "weights monet"), ("--device cuda:77", (), "--device cpu"),
    ("--frac 0.003", (), "no image"), ("", ("taxonomy.json", "tasks", "taskz"), "taxonomy.json"),
    ("", ("samples.csv", "absent streaks", "absent streeks"), "streeks"),
    ("", ("samples.csv", ",train,", ",tran,"), "'tran'"),
    ("", ("samples.csv", "absent streaks", "absent streaks;regular streaks"), "2 l"),
    ("", ("samples.csv", ".jpg", ".jpeg"), ".jpeg")])
def test_bad_input(demo, tmp_path, capsys, monkeypatch, flags, change, words):
    """One sentence on stderr that names the thing, exit code 2, no traceback, no run folder."""
    shutil.copytree(demo[0], tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("demo-*"))
    if change:
        edit(tmp_path / "data" / "demo" / change[0], *change[1:])
    monkeypatch.chdir(tmp_path)
    assert scale.main(["--dataset", "demo", "--method", "linear", *flags.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and error[-1].startswith("scale.py: ") and "Traceback" not in error
    assert not list(tmp_path.glob("runs/demo-*"))


# ---- The promise of size -------------------------------------------------------------------------
def test_budget():
    """Under 2,000 lines of at most 100 columns without the tests, which have at most 700."""
    system = [HERE / "scale.py", HERE / "data_prep.py", *HERE.glob("kernels/*.py"),
              *HERE.glob("weights/*.py")]
    lines = [line for path in system for line in path.read_text().splitlines()]
    tests = (HERE / "test_scale.py").read_text().splitlines()
    assert len(lines) < 2000 and len(tests) <= 700 and max(map(len, lines + tests)) <= 100
