"""Tests: oracles written from the equations, parity, formats, bad input, the real commands."""
import csv
import functools
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn import metrics as sk

import data_prep
import scale
from data_prep import DERM7P, combination_name
from kernels import supcon
from kernels.supcon import product_supcon_loss, supcon_loss, supcon_reference
from weights import InputError
from weights.clip import CLIP
from weights.medclip import MedCLIP, is_medclip

HERE = Path(__file__).resolve().parent
COMMAND = HERE / "scale.py", "--dataset", "demo"
TEXTS = ["a photo of a mole", "This is dermoscopy of an atypical, Pigment network!", "x y " * 40]

def unit_rows(n, d, seed=0, dtype=torch.float64):
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
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)

def tiny_problem(n):
    """Taxonomy, cosines z (n, 5), truth (n, 5); the concept "local" belongs to both classes."""
    tasks, g = [], torch.Generator().manual_seed(0)
    for pairs in (("nevus local", "nevus none", "melanoma local"),
                  ("nevus absent", "melanoma present")):
        parts = [dict(zip(("class", "concept"), pair.split(), strict=True), name=pair, prompt=pair)
                 for pair in pairs]
        concepts = [*dict.fromkeys(part["concept"] for part in parts)]
        tasks.append({"name": pairs[0], "exclusive": True, "classes": ["nevus", "melanoma"],
                      "concepts": concepts, "combinations": parts})
    truth = torch.cat([F.one_hot(torch.randint(k, (n,), generator=g), k) for k in (3, 2)], 1)
    z = torch.randn(n, 5, generator=g, dtype=torch.float64) * 0.2
    return scale.make_taxonomy({"tasks": tasks}), z.requires_grad_(), truth.bool()

def test_adapter_is_equation_1():
    """A wrong blend, an outer ReLU, a bias or a missing norm would show."""
    adapter = scale.Adapter(12, 3, 0.2, torch.Generator().manual_seed(0)).double()
    f, w1, w2 = unit_rows(4, 12), adapter.down.weight, adapter.up.weight
    mixed = 0.2 * (f @ w1.T).clamp(min=0) @ w2.T + 0.8 * f
    expected = mixed / mixed.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(adapter(17 * f), expected, atol=1e-7, rtol=0)  # of any length

def objective_loop(z, truth, taxonomy, logit_scale, tau, unit, pairs):
    """The five terms of Eq. 3 written from the formulas, Q as an N x N matrix."""
    terms = dict.fromkeys(("combination", "concept", "class", "rows", "columns"), 0)
    contrast = supcon_loop if len(z) < 99 else supcon_reference
    for task, part in zip(taxonomy.tasks, (slice(0, 3), slice(3, 5)), strict=True):
        combinations, labels = task["combinations"], truth[:, part].int().argmax(1)
        for own, label in zip(z[:, part], labels, strict=True):
            for term, key in (("combination", "name"), ("concept", "concept"), ("class", "class")):
                best = {}
                for c, value in zip(combinations, own, strict=True):  # max over the taxonomy
                    best[c[key]] = max(best.get(c[key], -math.inf), logit_scale * value)
                loss = torch.stack([*best.values()]).logsumexp(0) - best[combinations[label][key]]
                terms[term] = terms[term] + loss / len(z) / 2
        q = pairs[0] @ pairs[1].T if pairs else z[:, part][:, labels]  # column j: text of image j
        for term, rows in (("rows", q), ("columns", q.T)):
            rows = F.normalize(rows, dim=1) if unit else rows
            terms[term] = terms[term] + contrast(rows, labels, tau) / 2
    return terms

@pytest.mark.parametrize("n, rows", [(1, ...), (12, ...), (520, ...), (12, [0, 0]), (12, [0, 1])])
@pytest.mark.parametrize("unit, free", [(True, False), (False, False), (True, True)])
def test_objective_is_equation_3(n, rows, unit, free):
    """A wrong closed form, max, weight or gradient, NaN without positives or negatives shows."""
    taxonomy, z, truth = tiny_problem(n)
    z, truth = z.detach()[rows].requires_grad_(), truth[rows]  # [0, 0]: labels equal
    pairs = [unit_rows(len(z), 4, seed) for seed in (5, 6)] if free else []  # free texts
    given, weights = (z, truth, taxonomy, 20.0, 0.1), (0.7, 1.3, 0.4, 0.6)
    (loss, terms), oracle = (scale.scale_loss(*given, weights, unit, pairs or None),
                             objective_loop(*given, unit, pairs))
    torch.testing.assert_close(terms, oracle)
    expected = torch.stack([*oracle.values()]) @ torch.tensor([1, *weights]).double()
    assert_same(loss, expected, [z, *pairs], 1e-5, 1e-5)

def tiny_data(exclusive, n=24):
    taxonomy, _, truth = tiny_problem(n)
    if not exclusive:
        taxonomy = scale.make_taxonomy({"tasks": [taxonomy.tasks[0] | {"exclusive": False}]})
        truth = ~truth[:, :3]
    texts = unit_rows(truth.shape[1] + 1, 16, 1, torch.float32).detach()
    images = F.normalize(truth.float() @ texts[:-1] + .3 * unit_rows(n, 16, 2).detach().float())
    numbers = (torch.arange(truth.numel()).view(truth.shape) * (not exclusive)).where(truth, -1)
    said = texts[:-1].repeat(n * (not exclusive), 1)
    return scale.Embedded(None, taxonomy, images, texts, said, numbers, 30.0, {})

@pytest.mark.parametrize("exclusive", [True, False])
def test_only_the_adapters_train(exclusive):
    """A frozen feature that moved, an adapter that did not, wrong pairs or mixing, would show."""
    data, log = tiny_data(exclusive), []
    frozen = data.images.clone(), data.texts.clone()
    before, after = (scale.fit_scale(data, range(24), scale.Config(epochs=n), torch.Generator(),
                                     log)[1] for n in (1, 40))
    assert torch.equal(data.images, frozen[0]) and torch.equal(data.texts, frozen[1])
    assert len(after) == 6 and all(not torch.equal(before[k], after[k]) for k in after)
    assert log[-2]["loss"] < log[2]["loss"] and {"rows", "columns", "class"} < set(log[2])
    if not exclusive:  # pairs by hand; mixing exchanges sentences of one combination
        rows, truth = data.pairs(range(24))
        expected = (data.sentence >= 0).nonzero()
        assert torch.equal(torch.stack([rows, truth.int().argmax(1)], 1), expected)
        mixed = scale.mix_pairs(truth, torch.Generator().manual_seed(0))
        assert sorted(mixed.tolist()) == list(range(len(rows))) != mixed.tolist()
        assert torch.equal(truth[mixed], truth) and (truth.sum(1) == 1).all()

def test_subsets_are_stratified():
    """Size to the image, every label within one of its share, seeds differ, a seed repeats."""
    rng = np.random.default_rng(0)
    truth = torch.tensor(np.eye(6, dtype=bool)[rng.choice(6, 413, p=[.5, .3, .1, .07, .025, .005])])
    first, again, other = (scale.stratified_subset(truth, 0.1, torch.Generator().manual_seed(seed))
                           for seed in (0, 0, 1))
    assert len(first) == 41 and np.array_equal(first, again) and not np.array_equal(first, other)
    assert all((abs(truth[p].sum(0) - truth.sum(0) * 0.1) <= 1).all() for p in (first, other))

@pytest.mark.parametrize("exclusive", [True, False])
def test_metrics_equal_scikit_learn(exclusive):
    """Macro averages, ties and columns without support, against scikit-learn on the same rows."""
    rng, shown = np.random.default_rng(1), [0, 1, 2, 4]
    margins, y = rng.integers(-4, 5, (60, 5)) / 2 + rng.random(5) / 9, rng.choice(shown, 60)
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

def python(folder, *arguments, **environment):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": ""} | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done

@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, python(folder, *COMMAND, "--frac", "0.05", "--splits", "2").stdout

@pytest.fixture
def folder(demo, tmp_path):
    return shutil.copytree(demo[0], tmp_path, False, shutil.ignore_patterns("demo-*"),
                           dirs_exist_ok=True)

def edit(path, old, new):
    assert old in (text := path.read_text())
    path.write_text(text.replace(old, new, 1))

def prepare(name, raw, *flags):
    code = data_prep.main([name, str(raw), "--data", str(raw / "data"), *flags])
    table = raw / "data" / name / "samples.csv"
    return code, list(csv.DictReader(table.read_text().splitlines())) if table.exists() else []

def test_derm7p_release(folder):
    """Paths in the wrong case, 1-based indices, counts unlike Derm7p's, a wrong class show."""
    release = folder / "data/demo/release_v0"
    (release / "images" / "P03").rename(release / "images" / "p03")
    (code, rows), parts = prepare("derm7p", release), ("train", "valid", "test")
    samples = scale.read_samples(release / "data" / "derm7p")
    assert code == 0 and all(path.is_file() for path in samples.images)
    for part in parts:
        lines = (release / "meta" / f"{part}_indexes.csv").read_text().split()[1:]
        assert {n for n, r in enumerate(rows) if r["split"] == part} == {*map(int, lines)}
    melanoma = scale.at_level(samples.sentence >= 0, samples.taxonomy.klass)[:, 1::2].tolist()
    metas = [meta for _, meta in data_prep.read_table(release / "meta" / "meta.csv")]
    for meta, row, positive in zip(metas, rows, melanoma, strict=True):
        assert row["labels"].split(";") == [combination_name(c, meta[c]) for c in DERM7P]
        assert positive == [DERM7P[c][meta[c]][0] > 0 for c in DERM7P]
    for criterion, known in DERM7P.items():
        got = Counter((meta[criterion], samples.split[n]) for n, meta in enumerate(metas))
        assert known == {e: [known[e][0], *(got[e, part] for part in parts)] for e in known}

def padchest(raw, rows):
    """A small PadChest-GR of rows: patient, image, split, label, locations, sentence_en."""
    (raw / "images").mkdir(exist_ok=True)
    with open(raw / "master_table.csv", "w", newline="") as file:
        head = "PatientID ImageID split label locations sentence_en sentence_es".split()
        csv.writer(file).writerows([head, *([*row, row[-1] + " (es)"] for row in rows)])
    ramp = np.arange(30, dtype=np.uint16)[None].repeat(600, 0) * 130  # 12 bits in 16
    for row in rows:
        Image.fromarray(ramp).save(raw / "images" / row[1])

CASES = [  # image (and patient), label, locations, the combinations expected
    ("a", "atelectasis basal", ["left", "basal"], "atelectasis left lower lobe"),
    ("a", "laminar atelectasis", ["left lower lobe"], ""), ("c", "Normal", [], ""),
    ("b", "lobar atelectasis", ["retrocardiac"], "atelectasis retrocardiac"),
    ("d", "cardiomegaly", ["cardiac"], "cardiomegaly cardiac"),
    ("e", "costophrenic angle blunting", ["left costophrenic angle", "costophrenic angle"],
     "pleural effusion left costophrenic angle"), ("d", "cardiomegaly", [], ""),
    ("e", "loculated pleural effusion", ["right", "left", "pleural"],
     "pleural effusion left pleural;pleural effusion right pleural"),
    ("f", "pleural effusion", ["costophrenic angle", "bilateral", "pleural"],
     "pleural effusion bilateral costophrenic angle;pleural effusion bilateral pleural"),
    ("h", "consolidation", ["left", "lower lobe"], "consolidation left lower lobe")]
ROWS = [[f"P{i}", f"{i}_2.png", "validation" if i < "e" else "test", label, at, f"{k} {label}"]
        for k, (i, label, at, _) in enumerate(CASES)]

def test_padchest_miniature(tmp_path):
    """A rule of the twelve, 16-bit pixels, a sentence of two labels, Spanish, gone wrong, shows."""
    padchest(tmp_path, [*ROWS, [*ROWS[-1][:3], "atelectasis", ["left", "basal"], ROWS[-1][-1]]])
    shutil.make_archive(tmp_path / "master_table.csv", "zip", tmp_path, "master_table.csv")
    (tmp_path / "master_table.csv").unlink()
    code, rows = prepare("padchest-gr", tmp_path, "--language", "es", "--official-split")
    expected = [(f"images/{i}_2.png", names) for i, _, _, names in CASES if names]
    expected[-1] = "images/h_2.png", expected[-1][1] + ";atelectasis left lower lobe"
    assert code == 0 and [(row["image"], row["labels"]) for row in rows] == expected
    assert {row["split"] + row["text"][-4:] for row in rows} == {"valid(es)", "test(es)"}
    pixels = np.asarray(Image.open(tmp_path / "data" / "padchest-gr" / rows[0]["image"]))
    assert pixels.shape == (256, 13) and pixels.dtype == np.uint8
    assert np.abs(pixels[9] - np.linspace(5, 250, 13)).max() < 9  # neither clipped nor dark

def test_padchest_counts(tmp_path):
    """738 studies of 728 patients give the real table's counts and a fair split by patient."""
    rules, rows = {row[0]: row for row in data_prep.RELEASES["padchest-gr"]}, []
    real = dict(zip(rules, [24, 19, 15, 437, 12, 13, 80, 54, 53, 74, 56, 41], strict=True))
    left = Counter(real)
    for i, size in enumerate([4] * 9 + [3] * 6 + [2] * 101 + [1] * 622):  # combinations a study
        for name, _ in left.most_common(size):
            at = rules[name][4].split(", ")[-1].split(" + ")
            rows.append([f"P{i % 728}", f"{i}.png", "train", rules[name][1], at, f"{name} of {i}"])
            left[name] -= 1
    padchest(tmp_path, rows)
    code, rows = prepare("padchest-gr", tmp_path)
    samples = scale.read_samples(tmp_path / "data" / "padchest-gr")
    truth = samples.sentence >= 0
    assert code == 0 and truth.sum(0).tolist() == [*real.values()]
    by = {part: {r["patient"] for r in rows if r["split"] == part} for part in ("train", "test")}
    assert len(by["test"]) == 109 and len(by["train"]) == 619 and not by["train"] & by["test"]
    assert (abs(truth[samples.split == "test"].sum(0) / truth.sum(0) - 0.15) < 0.07).all()

@pytest.mark.parametrize("file, old, new, words", [
    ("meta.csv", ",absent,", ",abscent,", "abscent"), ("meta.csv", "case_num", "\0", "row 2"),
    ("meta.csv", "1,clark nevus,", "1,clark nevus,1", "seven_point_score"),
    ("meta.csv", "P0007.jpg,,", "P7,,", "p7"), ("test_indexes.csv", "es\n", "es\n5\n", "row 5"),
    ("test_indexes.csv", "indexes\n", "indexes\n1011\n", "row 2"), ("", "test", "tset", "tset"),
    ("", "\"['left', 'basal']\"", "left", "row 2"), ("", "['left', 'basal']", "exit()", "row 2"),
    ("", "a_2.png", "../a_2.png", "row 2"), ("", "a_2.png", "z.png", "z.png"),
    ("", "a_2.png", "b_2.png", "two patients"), ("", "\nPa,", "\n,", "PatientID")])
def test_bad_release(folder, capsys, file, old, new, words):
    """A wrong word, score, index, list, path, split, patient: one sentence, 2, nothing written."""
    padchest(release := folder / "data/demo/release_v0", ROWS)
    edit(release / "meta" / file if file else release / "master_table.csv", old, new)
    assert prepare("derm7p" if file else "padchest-gr", release) == (2, [])
    error = capsys.readouterr().err
    assert error.startswith("data_prep.py: ") and error.count("\n") == 1 and words in error

class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)

@pytest.mark.parametrize("kind", "new old jit zip safetensors folder evil cut".split())
def test_weights_on_disk(tmp_path, monkeypatch, capsys, kind):
    """A tensor lost or cast on the way to safetensors, or a pickle that is let run, would show."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_prep, "HERE", tmp_path)
    monkeypatch.setitem(data_prep.RELEASES["weights"], "x", {"model.safetensors": "x/y.zip"})
    module, given = torch.nn.Module(), Path("pytorch_model.bin")
    module.register_buffer("b", torch.randn(3, 4).half().T)
    state, target = module.state_dict(), Path("weights/x/model.safetensors")
    torch.save(state | {"x": Evil()} if kind == "evil" else state, given,
               _use_new_zipfile_serialization=kind != "old")
    if kind == "jit":
        torch.jit.script(module).save(given)
    if kind == "zip":
        given = Path(shutil.make_archive("m", "zip", ".", given))
    if kind == "safetensors":
        save_file({"b": state["b"].contiguous()}, given := given.with_suffix(".safetensors"))
    if kind == "cut":
        given.write_bytes(given.read_bytes()[:-300])
    code = data_prep.main(["weights", "x", "--from", "." if kind == "folder" else str(given)])
    if kind in ("evil", "cut"):
        assert code == 2 and given.name in capsys.readouterr().err
        assert not target.exists() and not Path("evil").exists()
    else:
        torch.testing.assert_close(load_file(target), dict(state), atol=0, rtol=0)  # dtypes too

@functools.cache
def written_clip(act="quick_gelu"):
    hf, folder = pytest.importorskip("transformers"), Path(tempfile.mkdtemp())
    some = [*"anomelpi1'Ã©", "a</w>", "n</w>", "s</w>"]
    merges = [(a, b) for a in some[:12] for b in some]
    merges += [(a + b, some[i % 14]) for i, (a, b) in enumerate(merges) if "<" not in b]
    np.random.default_rng(0).shuffle(merges)
    names = [chr(i) + end for end in ("", "</w>") for i in range(33, 324)]  # of all bytes and more
    names += [*map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(dict.fromkeys(names))}
    shape = dict(num_hidden_layers=11, hidden_act=act, num_attention_heads=4, intermediate_size=96)
    text = {"hidden_size": 32, "max_position_embeddings": 20, "vocab_size": len(vocab),
            "bos_token_id": len(vocab) - 2, "eos_token_id": len(vocab) - 1}
    image = {"hidden_size": 48, "image_size": 40, "patch_size": 8}
    torch.manual_seed(0)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=shape | text, vision_config=shape | image))
    for p in model.eval().parameters():  # random biases and norms too
        p.data += 0.15 * torch.randn_like(p)
    tokenizer = hf.CLIPTokenizerFast(vocab=vocab, merges=merges)
    processor = hf.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder, model, tokenizer, processor  # small, random, written by transformers

@functools.cache
def written_medclip():
    hf, folder = pytest.importorskip("transformers"), Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgilnoprstuvy.,-²ß中", "lung", "##ung",
             *("##" + c for c in "aeilnorstx²"), "##ac", "heart", "##ies", "Lung"]
    (folder / "vocab.txt").write_text("\n".join([*words, ""]))
    models = hf.SwinModel(hf.SwinConfig(embed_dim=32, num_heads=[1, 2, 4, 8])), hf.BertModel(
        hf.BertConfig(vocab_size=len(words), hidden_size=128, num_attention_heads=2,
                      intermediate_size=512))
    heads = torch.randn(16, 256) / 9, torch.randn(16, 128) / 9
    w = {"logit_scale": torch.tensor(5.)}
    for part, model, head in zip(("vision_model.", "text_model."), models, heads, strict=True):
        for p in model.eval().parameters():
            p.data += 0.15 * torch.randn_like(p)
        model.save_pretrained(folder)  # even transformers 5 writes Swin's first names
        tensors = load_file(folder / "model.safetensors") | {"position_ids": torch.arange(9)}
        w |= {f"{part}model.{name}": tensor.clone() for name, tensor in tensors.items()}
        w[part + "projection_head.weight"] = head
    save_file(w, folder / "model.safetensors")
    return folder, *models, heads  # narrow and random, with the names of MedCLIP's own file

def copy_with(target, folder, tensors=None):
    shutil.copytree(folder, target)
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
    for name in (n for n in hf if ".k_proj" not in n and ".v_proj" not in n):
        tensor = hf[name].T if "_projection" in name else hf[name]
        if "q_proj" in name:
            tensor = torch.cat([hf[name.replace("q_proj", c + "_proj")] for c in "qkv"])
        for pair in spelling:
            name = name.replace(*pair.split(":"))
        out[name if name.startswith(("visual", "logit")) else text + name] = tensor
    return out

def assert_towers(model, pixels, images, texts, atol=2e-6):
    w = {n: tensor.clone().requires_grad_() for n, tensor in model.tensors.items()}
    ids, lengths = model.tokenize(TEXTS)
    first, last = model.image_tower(w, pixels), model.text_tower(w, w[model.words][ids], lengths)
    got = torch.cat([first, model.encode_image(pixels), last, model.encode_text(TEXTS)])
    expected = F.normalize(torch.cat([images, images, texts, texts]), dim=-1)
    torch.testing.assert_close(F.normalize(got, dim=-1), expected, atol=atol, rtol=0)
    (first.square().sum() + last.square().sum()).backward()
    assert [n for n, t in w.items() if t.grad is None] == ["logit_scale"]
    model.tensors = w  # a frozen encoder records no gradients
    assert not (model.encode_text(TEXTS).requires_grad or model.encode_image(pixels).requires_grad)

@pytest.mark.parametrize("kind", "quick_gelu gelu position_ids openai open_clip half".split())
def test_clip_equals_transformers(tmp_path, kind):
    """A wrong activation, layer order ("10" < "2"), pooling, gradient, layout or fp16 shows."""
    folder, model, tokenizer, _ = written_clip("gelu" if kind == "gelu" else "quick_gelu")
    w, pixels = load_file(folder / "model.safetensors"), torch.randn(3, 3, 40, 40)
    w = {"position_ids": w | {"text_model.embeddings.position_ids": torch.arange(20)[None]},
         "openai": openai_layout(w) | {"context_length": torch.tensor(20)}, "open_clip":
         openai_layout(w, "text."), "half": {n: t.half() for n, t in w.items()}}.get(kind, w)
    ids = tokenizer(TEXTS, padding=True, truncation=True, max_length=20, return_tensors="pt")
    with torch.no_grad():  # transformers 4 returns tensors, 5 objects
        images, texts = (getattr(x, "pooler_output", x) for x in (
            model.get_image_features(pixel_values=pixels), model.get_text_features(**ids)))
    clip = CLIP(copy_with(tmp_path / "copy", folder, w))
    assert_towers(clip, pixels, images, texts, 2e-3 if kind == "half" else 2e-6)
    assert clip.logit_scale == pytest.approx(model.logit_scale.exp().item(), 1e-3)

def test_medclip_equals_transformers():
    """A wrong window, shift, bias, merge, pooling or eps, or a mean over padding, would show."""
    folder, swin, bert, heads = written_medclip()
    medclip, pixels, texts = MedCLIP(folder), torch.randn(2, 3, 224, 224), []
    with torch.no_grad():
        for row, length in zip(*medclip.tokenize(TEXTS), strict=True):  # alone: no padding
            states = bert(row[None, :length], output_hidden_states=True).hidden_states
            texts.append((states[1] + states[2] + states[-1]).mean(1) / 3 @ heads[1].T)
        images = swin(pixels).last_hidden_state.mean(1) @ heads[0].T
    assert_towers(medclip, pixels, images, torch.cat(texts))
    assert medclip.logit_scale == pytest.approx(math.exp(4.6052)) and is_medclip(folder)

def assert_tokens(model, tokenizer, *pools):
    rng, odd = np.random.default_rng(1), "ÀßİΣς²½Ⅷ٣中한 \t\n\u00a0\x1c\x85'’_<|>éfi🙂\u0301\u200d"
    texts = ["".join(rng.choice([*pool, *odd[:i % 2 * 99]], rng.integers(40)))
             for i in range(1000) for pool in pools] + ["a" * 100, "a" * 101, "a. " * 99]
    ours = [row[:length].tolist() for row, length in zip(*model.tokenize(texts), strict=True)]
    assert ours == tokenizer(texts, truncation=True, max_length=model.context)["input_ids"]

def test_tokens_equal_transformers(tmp_path):
    """A slip in normalising, splitting, joining, cutting or reading the files would show."""
    folder, (source, _, tokenizer, _) = written_medclip()[0], written_clip()
    bert = pytest.importorskip("transformers").BertTokenizerFast.from_pretrained(folder)
    assert_tokens(MedCLIP(folder), bert, "abcde lungs HEARTIES ,.-", "lungaciesÀ $+<")
    copy = copy_with(tmp_path / "copy", source)
    fast = json.loads((copy / "tokenizer.json").read_text())["model"]
    lines = [" ".join(pair) for pair in fast["merges"]]
    for files in ({}, {"tokenizer.json": json.dumps({"model": fast | {"merges": lines}})}, {
            "vocab.json": json.dumps(fast["vocab"]), "merges.txt": "\n".join(["#", *lines, ""])}):
        for name, text in files.items():
            (copy / name).write_text(text)
        assert_tokens(CLIP(copy), tokenizer, "abcdefghijklmno PQRS'tvsd.,12!", "melanoma's élan 1")

@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "LA", "1", "CMYK"])
def test_clip_pixels_equal_transformers(mode):
    """A crop one pixel off, a resize before the conversion to RGB, or alpha lost would show."""
    (folder, *_, processor), rng = written_clip(), np.random.default_rng(0)
    for shape in ((40, 40), (57, 91), (131, 83), (20, 33), (300, 41)):
        image = Image.fromarray(rng.integers(0, 256, (*shape, 4), np.uint8)).convert(mode)
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(CLIP(folder).preprocess(image), theirs, atol=1e-6, rtol=0)

@pytest.mark.parametrize("how, dtype, factor", [(2, "u1", 1), (3, "u2", 257), (2, "f4", .5)])
def test_medclip_pixels(tmp_path, how, dtype, factor):
    """Another filter, padding, mean or std, or 16 bits saturated in place of scaled would show."""
    copy, x = copy_with(tmp_path / "copy", written_medclip()[0]), np.zeros((256, 256), np.uint8)
    (copy / "preprocessor_config.json").write_text('{"resample": 3}' if how == 3 else "{}")
    x[:, 77:178] = np.arange(256)[:, None]  # 77 columns of black to its left, 78 to its right
    Image.fromarray(x[:, 77:178].astype(dtype) * np.array(factor, dtype)).save(tmp_path / "x.tif")
    pixels = MedCLIP(copy).preprocess(scale.open_image(tmp_path / "x.tif")) * 0.27950088968644304
    expected = np.asarray(Image.fromarray(x).resize((224, 224), how))[None].repeat(3, 0) / 255
    np.testing.assert_allclose(pixels + 0.5862785803043838, expected, atol=1e-5)

@pytest.mark.parametrize("family, name", [
    (CLIP, "text_model.encoder.layers.10.layer_norm2.bias"), (CLIP, "ln_final.bias"),
    (MedCLIP, "vision_model.model.encoder.layers.0.blocks.0.attention.self.query.bias")])
@pytest.mark.parametrize("fault", ["missing", "extra", "misshapen", "nan", "renamed", "cut"])
def test_checkpoint_must_fit(tmp_path, family, name, fault):
    """A file that fits in part, as Swin under transformers 5's names, loads, or it names none."""
    folder = written_clip()[0] if family is CLIP else written_medclip()[0]
    w = load_file(folder / "model.safetensors")
    w = openai_layout(w) if name == "ln_final.bias" else w
    part, others = name.split(".")[-2], {n: tensor for n, tensor in w.items() if n != name}
    w, words = {"missing": (others, name), "nan": (w | {name: w[name] * math.nan}, name),
                "extra": (w | {"logit_bias": torch.zeros(1)}, "logit_bias"),
                "misshapen": (w | {name: torch.zeros(7)}, name), "cut": (w, "safetensors"),
                "renamed": ({n.replace(part, "q_proj"): w[n] for n in w}, "missing inst")}[fault]
    copy = copy_with(tmp_path / "copy", folder, w)
    if fault == "cut":
        os.truncate(copy / "model.safetensors", 9999)
    with pytest.raises(InputError, match=words.replace("ln_final", ".*norm") + ".*weights copy"):
        family(copy)

@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.005])
def test_supcon_equals_loops_and_is_no_worse_than_plain_torch(temperature):
    """A wrong mask, tile edge, sign, overflow, gradient, or more error than plain torch shows."""
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    for n, d, classes in itertools.product((1, 33, 127), (8, 130), (1, 5, 999)):
        x, y, h = unit_rows(n, d), unit_rows(n + 3, d, 1), torch.arange(n + 3) % classes
        assert_same(supcon_loss(x, h[:n], tau), supcon_loop(x, h[:n], tau), (x, tau))
        assert_same(supcon_loss(x, h[:n], tau, contrast=y, contrast_labels=h),
                    supcon_loop(x, h[:n], tau, y, h), (x, y, tau))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, g = unit_rows(300, 40, dtype=dtype), torch.arange(300) % 9
        z = x.detach().double().requires_grad_()
        exact, ours, plain = (torch.autograd.grad(f(t, g, temperature), t)[0] for f, t in (
            (supcon_reference, z), (supcon_loss, x), (supcon_reference, x)))
        assert (ours - exact).norm() <= (plain - exact).norm() * 1.3 + 1e-6 * exact.norm()

def test_supcon_blocks_and_forms():
    """An error where tiles meet, in a reduction, a stride, CLIP's pairs, SCALE's Q would show."""
    x, y, g = unit_rows(1500, 8), unit_rows(1500, 8, 1), torch.arange(1500) % 900
    assert_same(supcon_loss(x, g), supcon_reference(x, g), x)
    losses, total = (supcon_loss(x, g, reduction=name) for name in ("none", "sum"))
    assert (losses == 0).sum() == 300 and torch.equal(total, losses.sum())
    clip = sum(F.cross_entropy(q * 2, torch.arange(1500)) for q in (x @ y.T, y @ x.T)) / 2
    assert_same(supcon_loss(x, None, 0.5, contrast=y, both=True), clip, (x, y))
    tau = torch.tensor(0.5).double().requires_grad_()
    for m, unit in ((5, True), (90, True), (5, False), (90, False)):
        a, b, g = unit_rows(300, 20), unit_rows(m, 20, 1), g[:300] % 7
        q = F.normalize(a @ b.T, dim=1) if unit else a @ b.T
        assert_same(product_supcon_loss(a, b, g, tau, unit_rows=unit),
                    supcon_reference(q, g, tau), (a, b, tau))
    assert torch.autograd.gradcheck(lambda x, tau: supcon_loss(
        x.T.clone().T, g[:7] % 3, tau, reduction="none"), (unit_rows(7, 4), tau))

def test_supcon_mistakes_are_named():
    """A mistake that passes, or a second derivative that is silently zero, would show."""
    x, labels = unit_rows(6, 4), torch.arange(6)
    for wrong in ({"features": x[0]}, {"features": x.long()}, {"labels": labels[:5]}, {"both": 1},
                  {"labels": labels.float()}, {"temperature": 0}, {"labels": None}, {"contrast": x},
                  {"temperature": torch.tensor(-1.0)}, {"impl": "triton"}, {"reduction": "max"}):
        with pytest.raises(ValueError, match="expected .*, not"):
            supcon_loss(**{"features": x, "labels": labels} | wrong)
    gradient, = torch.autograd.grad(supcon_loss(x, labels % 2), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()

def test_supcon_compile_autocast_and_memory():
    """A graph break, a false shape, rounding by autocast, an N x N matrix kept would show."""
    x, g, sizes = unit_rows(80, 16, dtype=torch.float32), torch.arange(80) % 9, []
    for loss in (supcon_loss, lambda x, g: product_supcon_loss(x, x.detach(), g)):
        assert_same(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, g), loss(x, g), x)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(loss(x, g), loss(x, g), x, 0, 0)  # also: the same bits from run to run
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
        supcon_loss(unit_rows(900, 16), torch.arange(900) % 9)
    assert sum(sizes) < 900 * 16 * 5

def run_process(rank, rendezvous):
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    weight, (x, y), found = unit_rows(5, 6, 9), (unit_rows(40, 6, s).detach() for s in (1, 2)), []
    labels = torch.where(torch.arange(40) < 25, torch.arange(40) % 4, torch.arange(40))
    for group, rows in ((None, slice(40)),
                        (torch.distributed.group.WORLD, slice(20 * rank, 20 * rank + 20))):
        a, b = (F.normalize(t[rows] @ weight.T, dim=1) for t in (x, y))
        g, h = labels[rows], labels.flip(0)[rows]
        losses = torch.stack([
            supcon_loss(a, g, group=group), supcon_loss(a, contrast=b, group=group),
            supcon_loss(a, g, contrast=b, contrast_labels=h, group=group, reduction="sum")])
        slopes = (torch.autograd.grad(x, weight, retain_graph=True)[0].flatten() for x in losses)
        found.append(torch.cat([losses.detach(), *slopes]))
    torch.distributed.all_reduce(found[1])
    torch.testing.assert_close(found[1] / 2, found[0], atol=1e-12, rtol=1e-10)
    torch.distributed.destroy_process_group()

def test_supcon_two_processes_equal_one(tmp_path):
    """A gather without gradient, a wrong own pair, a mean over the local count would show."""
    torch.multiprocessing.spawn(run_process, (tmp_path / "rendezvous",), 2)

def test_triton_in_interpreter():
    """A wrong Triton tile, an access out of bounds, or a race of two programs would show."""
    pytest.importorskip("triton")
    if "TRITON_INTERPRET" not in os.environ:  # this very test, in a process of its own
        code = f"import {__name__} as t; t.test_triton_in_interpreter()"
        python(HERE, "-c", code, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        return
    from triton.runtime import interpreter
    builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    inside, seen = [], []  # addresses of the tensors; of what was read and written
    def record(self, mask, access, ptrs, *rest):
        at = np.unique(ptrs.data[rest[mask].data.astype(bool)].astype(np.int64))
        seen[mask].append(at)
        end = at + ptrs.get_element_ty().primitive_bitwidth // 8
        assert np.all(sum((at >= a) & (end <= b) for a, b in inside)), "out of bounds"
        return access(self, ptrs, *rest)
    def guarded_launch(self, *args, **kwargs):
        tensors = [t for t in args if torch.is_tensor(t)]
        inside[:], seen[:] = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors], ([], [])
        launch(self, *args, **kwargs)
        written, times = np.unique(np.hstack(seen[1]), return_counts=True)
        assert times.max() == 1 and not np.isin(written, np.hstack(seen[0])).any(), "race"
    builder.create_masked_load = functools.partialmethod(record, 0, builder.create_masked_load)
    builder.create_masked_store = functools.partialmethod(record, 1, builder.create_masked_store)
    interpreter.GridExecutor.__call__ = guarded_launch
    for n, d in ((1, 8), (33, 17), (65, 37), (300, 9)):
        x, g = unit_rows(2 * n + 5, d), torch.arange(2 * n + 5) % 7
        for rows, alone in ((len(x), True), (n, False), (n, True)):  # the last as in a group
            slopes = []
            for z, triton in ((x, False), (x.float(), True)):
                lse, total, count = supcon.all_pairs(
                    z, g, 20 * z.new_ones(()), None, None, rows, alone, triton, None)[0][:, :rows]
                loss = torch.where(count > 0, lse - total / count.clamp(min=1), 0).sum()
                slopes += [loss, *torch.autograd.grad(loss, x)]
            for a, b in zip(slopes[:2], slopes[2:], strict=True):
                assert (a - b).norm() <= 2e-6 * a.norm() + 1e-6, (n, rows, alone)

@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype, shape", [("fp32", (128, 64, 32)), ("bf16", (128, 128, 64))])
@pytest.mark.parametrize("weights", [False, True])
def test_triton_compiles_without_spills(tmp_path, arch, dtype, shape, weights):
    """Tiles that spill registers or miss the tensor cores would show, without a GPU."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    names = supcon._tile_kernel.arg_names
    constants = dict(zip("RCD", shape, strict=True), DIM=768, WEIGHTS=weights)
    kinds = {"a_ptr": dtype, "b_ptr": dtype, "a_label_ptr": "i64", "b_label_ptr": "i64",
             "weight_ptr": dtype if weights else "fp32"}
    types = {n: "*" + kinds.get(n, "fp32") if n.endswith("_ptr") else "i32" for n in names}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")}
    source = triton.compiler.ASTSource(supcon._tile_kernel, types, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
    (tmp_path / "cubin").write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).with_name("backends") / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.check_output([tool, "-res-usage", tmp_path / "cubin"], text=True)
    assert "STACK:0 " in usage and "mma." in built.asm["ptx"], usage  # it uses tensor cores

def test_supcon_file_alone(tmp_path):
    """An import from the project, or a need for Triton where there is none, would show."""
    shutil.copy(supcon.__file__, tmp_path / "loss.py")
    code = ("import sys, torch; sys.modules['triton'] = None; from loss import supcon_loss; "
            "print(supcon_loss(torch.ones(8, 4) / 2, torch.zeros(8).long()).item())")
    assert float(python(tmp_path, "-c", code).stdout) == pytest.approx(math.log(7))

def test_interrupted_embedding_goes_on(demo, tmp_path):
    """After a half JPEG only what is missing is computed, to the bit; else nothing."""
    images = [Path(shutil.copy(path, tmp_path)) for path in sorted(demo[0].glob("**/*.jpg"))[:40]]
    backbone, batches, jpeg = scale.load_backbone("demo"), [], images[30].read_bytes()
    encode, rest = backbone.encode_image, (["abc"], tmp_path / "cut.safetensors", 8)
    whole = scale.embed(backbone, images, ["abc"], tmp_path / "whole.safetensors", 8)
    backbone.encode_image = lambda pixels: batches.append(pixels) or encode(pixels)
    images[30].write_bytes(jpeg[:700])
    with pytest.raises(InputError, match="P0030.jpg"):
        scale.embed(backbone, images, *rest)
    images[30].write_bytes(jpeg)
    first, again = len(batches), scale.embed(backbone, images, *rest)
    assert first == 3 and all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    images[0].write_bytes(images[1].read_bytes())  # content decides, not the name
    assert scale.embed(backbone, images, *rest)[0][0].equal(whole[0][1]) and len(batches) == 5

def test_demo_command(demo):
    """Files of every run, a table with every method, the same bytes again."""
    folder, first = demo
    run = folder / "runs" / "demo-demo-scale-0.05-s1"
    files = {path.name: path.read_bytes() for path in run.iterdir()}
    assert len(files) == 5 and {"adapter.safetensors", "scores.csv", "config.json"} < set(files)
    assert len(files.pop("log.jsonl").splitlines()) == 151  # it holds times
    metrics = json.loads(files["metrics.json"])
    assert metrics["n_train"] == 21 and metrics["n_test"] == 395 and len(metrics["per_task"]) == 7
    (run / "config.json").write_text("of another version")
    again = python(folder, *COMMAND, "--frac", "0.05", "--splits", "2")
    assert again.stdout == first and "embedding" not in again.stderr
    assert files == {name: (run / name).read_bytes() for name in files}

def test_sweep_report_and_shuffled_labels(folder):
    """A fraction or a number lost, a worker unlike a single run, a leak shows."""
    command = *COMMAND, "--epochs", "30", "--method"
    out = python(folder, *command, "zeroshot,coop,scale", "--sweep", "--splits", "1").stdout
    report, files = folder / "runs" / "report-demo", list(folder.glob("runs/*/metrics.json"))
    rows = list(csv.DictReader(open(report / "results.csv")))
    shown = "".join(ET.parse(report / "figures" / "scores.svg").getroot().itertext())
    assert len(rows) == 15 and "at 50%" in out and "leads" in (report / "report.md").read_text()
    assert all(value in shown for row in rows for value in row.values())
    assert {row["class_f1"] for row in rows} == {
        repr(json.loads(path.read_text())["class"]["f1"]) for path in files}
    run = folder / "runs" / "demo-demo-scale-0.25-s0-epochs=30"
    swept = run.rename(folder / "swept")
    python(folder, *command, "scale", "--frac", "0.25")
    assert (run / "scores.csv").read_bytes() == (swept / "scores.csv").read_bytes()
    flags = "--method", "linear-weighted,scale", "--shuffle-labels", "--splits", "2"
    python(folder, *COMMAND, *flags, "--frac", "0.5")
    for path in folder.glob("runs/*shuffle_labels*/metrics.json"):  # chance: zero-shot has 0.42
        metrics = json.loads(path.read_text())
        assert metrics["class"]["f1"] < 0.52 and metrics["class_concept"]["f1"] < 0.35

@pytest.mark.parametrize("flags, change, words", [
    ("--frac 2", (), "--frac"), ("--method scala", (), "scala"), ("--criterion x", (), "pigment"),
    ("--dataset derm7p", (), "data_prep.py derm7p"), ("--backbone monet", (), "weights monet"),
    ("--device cuda:77", (), "cpu"), ("--frac 0.003", (), "has none"), ("--lambdas 1", (), "--la"),
    ("", ("taxonomy.json", "tasks", "taskz"), "taxonomy"), ("", ("samples.csv", "jp", "gi"), "gi"),
    ("", ("samples.csv", "absent streaks", "absent streeks"), "streeks"),
    ("", ("samples.csv", "absent streaks", "absent streaks;regular streaks"), "has 2 labels")])
def test_bad_input(folder, capsys, monkeypatch, flags, change, words):
    """One sentence on stderr that names the thing, exit code 2, no traceback, no run folder."""
    if change:
        edit(folder / "data" / "demo" / change[0], *change[1:])
    monkeypatch.chdir(folder)
    assert scale.main(["--dataset", "demo", "--method", "linear", *flags.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and error[-1].startswith("scale.py: ") and "Traceback" not in error
    assert not list(folder.glob("runs/demo-*"))

def test_budget():
    """Under 2,000 lines of at most 100 columns without the tests, which have at most 700."""
    system = {*HERE.glob("*.py"), *HERE.glob("*/*.py")} - {HERE / "test_scale.py"}
    lines = [line for path in system for line in path.read_text().splitlines()]
    tests = (HERE / "test_scale.py").read_text().splitlines()
    assert len(lines) < 2000 and len(tests) <= 700 and max(map(len, lines + tests)) <= 100
