"""Tests: oracles written from the equations, parity, formats, bad input, the real commands."""
import csv
import functools
import http.server
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save, save_file
from sklearn import linear_model, manifold, metrics

import data_prep
import scale
from kernels import supcon
from scale import CLIP, InputError, MedCLIP

torch.set_num_threads(1)  # faster on small matrices
supcon_loss = functools.partial(supcon.supcon_loss, impl="torch")  # tiles, however few the rows
HERE = Path(__file__).resolve().parent
COMMAND = HERE / "scale.py", "--dataset", "demo"
TEXTS = ["a photo of a mole", "This is dermoscopy of an atypical, Pigment network!", "x y " * 40]

def unit_rows(n, d, seed=0, dtype=torch.float64):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=1).to(dtype).requires_grad_()

def supcon_loop(x, labels, tau, *contrast):
    """Eq. 2, an anchor at a time: the mean over those that have a positive, 0 without any."""
    losses, (y, y_labels) = [], contrast or (x, labels)
    for i in range(len(x)):
        others = torch.arange(len(y)) != (len(y) if contrast else i)
        positives, logits = others & (y_labels == labels[i]), y @ x[i] / tau
        if positives.any():
            losses.append(logits[others].logsumexp(0) - logits[positives].mean())
    return sum(losses) / max(len(losses), 1) + 0 * (x.sum() + y.sum() + tau)

def assert_same(got, expected, inputs, atol=1e-9, rtol=1e-9):
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)

def tiny_data(n, exclusive=True):
    """Two tasks, concept "a" in both classes; or one, of several labels and texts of its own."""
    tasks, truth, g = [], [], torch.Generator().manual_seed(0)
    for own in ("Na Nb Ma".split(), "Nc Md".split())[:1 + exclusive]:  # their class and concept
        parts = [{"name": c, "class": c[0], "concept": c[1], "prompt": c} for c in own]
        tasks.append({"name": own[0], "combinations": parts, "classes": "NM", "concepts": "abcd",
                      "exclusive": exclusive})
        truth.append(torch.eye(len(own))[torch.randint(len(own), (n,), generator=g)] == exclusive)
    truth, numbers = torch.cat(truth, 1), 0 if exclusive else torch.arange(3 * n).view(n, 3)
    texts = unit_rows(truth.shape[1] + 1, 16, 1, torch.float32).detach()
    images = truth.float() @ texts[:-1] + unit_rows(n, 16, 2, torch.float32).detach() / 3
    return scale.Embedded(None, scale.make_taxonomy({"tasks": tasks}), F.normalize(images)[:, None],
        texts, texts[:-1].repeat(n - n * exclusive, 1), torch.where(truth, numbers, -1), 30., {})

@pytest.mark.parametrize("n, rows", [(1, ...), (9, ...), (520, ...), (9, [0, 0, 1]), (9, [0, 1])])
@pytest.mark.parametrize("unit, free, bce", [(1, 0, 0), (0, 0, 1), (1, 1, 0)])
def test_objective_is_equation_3(n, rows, unit, free, bce):
    """A wrong closed form, max, weight or gradient, NaN without positives or negatives shows."""
    data, weights, oracle = tiny_data(n), (0.7, 1.3, 0.4, 0.6), {}
    z = (data.images @ data.texts[:-1].T).double()[rows].requires_grad_()
    truth = (data.sentence >= 0)[rows]
    pairs = [unit_rows(len(z), 4, seed) for seed in (5, 6)] if free else None  # free texts
    binary = (z.detach()[:, :1] / 2, truth | truth.roll(1, 0)) if bce else None  # several labels
    for task, part in zip(data.taxonomy.tasks, (slice(0, 3), slice(3, 5)), strict=True):
        labels = truth[:, part].int().argmax(1)
        for term, key in ("combination", "name"), ("concept", "concept"), ("class", "class"):
            names = [c[key] for c in task["combinations"]]
            of = torch.tensor([[h == name for h in names] for name in dict.fromkeys(names)])
            best = 20 * z[:, None, part].masked_fill(~of, -math.inf).amax(-1)  # (n, K)
            losses = [F.cross_entropy(best, of.int().argmax(0)[labels])]
            if bce:
                y, m = (binary[1][:, None, part] & of).any(-1), best - 20 * binary[0]
                weight = torch.where(y.any(0) > y.all(0), (~y).sum(0) / y.sum(0), 1)
                losses = torch.where(y, weight * F.softplus(-m), F.softplus(m)).mean(0)
            oracle.setdefault(term, []).extend(losses)
        q = pairs[0] @ pairs[1].T if free else z[:, part][:, labels]  # column j: text of image j
        for term, rows in (("rows", q), ("columns", q.T)):
            rows = F.normalize(rows, dim=1) if unit else rows
            oracle.setdefault(term, []).append(supcon.supcon_reference(rows, labels, 0.1))
    oracle = {term: sum(losses) / len(losses) for term, losses in oracle.items()}
    loss, terms = scale.scale_loss(z, truth, data.taxonomy, 20, 0.1, weights, unit, pairs, binary)
    torch.testing.assert_close(terms, oracle)
    expected = torch.stack([*oracle.values()]) @ torch.tensor([1, *weights]).double()
    assert_same(loss, expected, [z, *(pairs or ())], 1e-5, 1e-5)

@pytest.mark.parametrize("exclusive", [True, False])
def test_training_on_frozen_features(exclusive):
    """A slip in Eq. 1, features that moved, wrong pairs, a probe short of its optimum show."""
    data, frozen, log = tiny_data(24, exclusive), tiny_data(24, exclusive), []
    turned = torch.cat([data.views, data.views.roll(1, 0)], 1)  # views are drawn from
    (_, before), (_, drawn), (margins_of, after) = (scale.fit_scale(
        scale.replace(data, views=views), range(24), scale.Config(epochs=n), torch.Generator(), log)
        for views, n in ((data.views, 1), (turned, 1), (data.views, 40)))
    assert data.views.equal(frozen.views) and data.texts.equal(frozen.texts)
    assert len(w := [*after.values()]) == 6 and not any(map(torch.equal, before.values(), w))
    assert not before["image.up.weight"].equal(drawn["image.up.weight"])
    assert log[-2]["loss"] < log[4]["loss"] and {"rows", "columns", "class"} < set(log[4])
    images, texts = (F.normalize(torch.lerp(f, (f @ down.T).clamp(min=0) @ up.T, alpha.sigmoid()))
                     for f, (alpha, down, up) in ((data.images, w[:3]), (data.texts, w[3:])))
    torch.testing.assert_close(margins_of(range(24)), data.margins(images, texts))  # Eq. 1
    if not exclusive:  # pairs by hand; mixing exchanges sentences of one combination
        (rows, truth), (image, h) = data.pairs(range(24)), (data.sentence >= 0).nonzero().T
        mixed = scale.mix_pairs(truth, torch.Generator().manual_seed(0))
        assert rows.equal(image) and truth.equal(F.one_hot(h).bool()) and truth[mixed].equal(truth)
        assert sorted(mixed.tolist()) == list(range(len(rows))) != mixed.tolist()
    config, images = scale.Config(method="linear-lbfgs"), data.images.double()
    margins = scale.fit_linear(data, range(24), config, None, log)[0](range(24)).detach()
    for truth, margin in zip((data.sentence >= 0).T, margins.T, strict=True):
        theirs = linear_model.LogisticRegression(C=100, tol=1e-9, max_iter=10 ** 4, class_weight={
            False: 1, True: ((~truth).sum() / truth.sum()).item()}).fit(images, truth)
        assert margin.numpy() == pytest.approx(theirs.decision_function(images), abs=1e-3, rel=1e-3)

@pytest.mark.parametrize("method", ["lora", "hica", "coop"])
@pytest.mark.parametrize("family", [CLIP, MedCLIP])
def test_methods_that_look_into_the_towers(folder, method, family):
    """A frozen tensor that moved, a tuned one that did not or is not stored, would show."""
    table, rows, log = folder / "data" / "demo" / "samples.csv", range(8), []
    table.write_text("".join(open(table).readlines()[:9]))
    weights = str(HERE / "weights" / "demo" if family is CLIP else written_medclip()[0])
    data = scale.embed_dataset(scale.Config(str(table.parent), backbone=weights, out=str(folder)))
    backbone, before = data.backbone(), data.backbone().tensors
    data = scale.replace(data, backbone=lambda: backbone)
    still, (margins_of, state) = (scale.METHODS[method](
        data, rows, scale.Config(epochs=20, lr=lr), torch.Generator(), log) for lr in (0.0, 1e-3))
    close = functools.partial(torch.testing.assert_close, atol=1e-3, rtol=0)
    close(backbone.tensors, before, atol=0)
    assert log[-1]["loss"] < log[-20 if method == "coop" else -2]["loss"]  # its last stage's first
    if method != "coop":  # it starts at zero-shot; what it stores is all that it tuned
        close(still[0](rows), data.margins(data.images, data.texts))
        tuned = state if method == "hica" else {
            n[:-2]: before[n[:-2]] + state[n] @ state[n[:-1] + "1"] for n in state if n[-1] == "0"}
        assert len(tuned) == {"lora": (48, 12), "hica": (18, 17)}[method][family is CLIP]
        assert not any(tensor.equal(before[name]) for name, tensor in tuned.items())
        look, read = scale.towers(data, backbone, lambda: tuned)
        close(margins_of(rows), data.margins(look(rows), read()))

def test_subsets_are_stratified():
    """Size to the image, every label within one of its share, seeds differ, a seed repeats."""
    truth = torch.eye(6).bool().repeat_interleave(torch.tensor([206, 124, 41, 29, 10, 3]), 0)
    one, same, other = (scale.stratified_subset(truth, .1, torch.manual_seed(s)) for s in (0, 0, 1))
    assert len(one) == 41 and np.array_equal(one, same) and not np.array_equal(one, other)
    assert all((abs(truth[p].sum(0) - truth.sum(0) * 0.1) <= 1).all() for p in (one, other))

@pytest.mark.parametrize("exclusive", [True, False])
def test_metrics_equal_scikit_learn(exclusive):
    """Macro averages, ties and columns without support, against scikit-learn on the same rows."""
    rng, shown = np.random.default_rng(1), [0, 1, 2, 4]
    margins, y = rng.integers(-4, 5, (60, 5)) / 2 + rng.random(5) / 9, rng.choice(shown, 60)
    truth = np.eye(5, dtype=bool)[y] if exclusive else rng.random((60, 5)) < [.3, .2, .5, 0, .1]
    target, decided = (y, margins.argmax(1)) if exclusive else (truth, margins > 0)
    both = margins, margins - np.stack([np.delete(margins, k, 1).max(1) for k in range(5)], 1)
    areas = [metrics.roc_auc_score(truth[:, shown], x[:, shown]) for x in both[:1 + exclusive]]
    macro = [score(target, decided, labels=shown, average="macro")
             for score in (metrics.recall_score, metrics.f1_score)]
    got = scale.score_task(torch.tensor(margins), torch.tensor(truth), exclusive)
    assert [*got.values()] == pytest.approx([(target == decided).mean(), *macro, *areas])

def test_tsne_is_no_worse_than_scikit_learn():
    """A wrong affinity, perplexity, divergence, or a poor minimum would show."""
    x = torch.eye(9)[torch.arange(60) % 9] + 2 * unit_rows(60, 9).float().detach()
    best = manifold.TSNE(perplexity=62 / 3, method="exact", random_state=0).fit(x.numpy())
    (kl, y), theirs = scale.tsne(x), manifold._t_sne
    assert kl <= 1.05 * best.kl_divergence_
    p = theirs._joint_probabilities(np.square(metrics.pairwise_distances(x)), 62 / 3, 0)
    assert kl == pytest.approx(theirs._kl_divergence(y.numpy().ravel(), p, 1, 60, 2)[0], 1e-4)

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
    return shutil.copytree(demo[0], tmp_path / "copy", ignore=shutil.ignore_patterns("demo-*"))

def read_csv(path):
    return [*csv.DictReader(open(path))]

def prepare(name, raw, *flags):
    assert data_prep.main([name, str(raw), "--data", str(raw), *flags]) == 0
    samples = scale.read_samples(raw / name)
    assert all(path.is_file() for path in samples.images)
    shown = (samples.sentence[samples.split == x] >= 0 for x in ("train", "valid", "test"))
    return samples.images, torch.stack([part.sum(0) for part in shown])  # (3, H)

def test_derm7p_release(folder):
    """Paths in the wrong case, 1-based indices, counts unlike Derm7p's, a wrong class show."""
    release, tables = folder / "data/demo/release_v0", data_prep.RELEASES
    (release / "images" / "P03").rename(release / "images" / "p03")
    assert prepare("derm7p", release)[1].T.tolist() == [*tables["images"]["derm7p"].values()]
    rows = read_csv(release / "meta/meta.csv"), read_csv(release / "derm7p/samples.csv")
    for meta, row in zip(*rows, strict=True):
        assert row["labels"].split(";") == [data_prep.DERM7P[c][meta[c]] for c in data_prep.DERM7P]
    assert {c["name"] for task in tables["taxonomies"]["derm7p"]["tasks"]
            for c in task["combinations"] if c["class"] == "melanoma"} == tables["scores"].keys()

CASES = [  # image (and patient), label, locations, numbers of the combinations in releases.json
    ("a", "atelectasis basal", "left,basal", [0]), ("b", "lobar atelectasis", "retrocardiac", [1]),
    ("a", "laminar atelectasis", "left lower lobe", []), ("d", "cardiomegaly", "", []),
    ("h", "consolidation", "left,lower lobe", [4, 5]), ("h", "consolidation", "right,basal", []),
    ("e", "costophrenic angle blunting", "left costophrenic angle,costophrenic angle", [6]),
    ("e", "loculated pleural effusion", "right,left,pleural", [9, 10]),
    ("f", "pleural effusion", "costophrenic angle,bilateral,pleural", [8, 11])]

def padchest(raw, more=()):
    rows = [[f"P{i}", f"{i}_2.png", "validation" if i < "e" else "test", label, at.split(",")]
            for i, label, at, _ in CASES]
    rows = [[*row, row[3], row[3] + " (es)"] for row in [*rows, *more]]
    head = "PatientID ImageID split label locations sentence_en sentence_es".split()
    ramp = Image.fromarray(np.arange(30, dtype=np.uint16)[None].repeat(600, 0) * 130)  # 12 bits
    scale.write_files(raw, {"master_table.csv": [head, *rows], **{row[1]: ramp for row in rows}})

def test_padchest_release(tmp_path):
    """A rule of twelve, 16 bits, a sentence of two labels, Spanish, a split gone wrong shows."""
    rules = [(name, labels[0], lists[-1]) for labels, places in data_prep.RELEASES["rules"]
             for name, lists in places.items()]
    padchest(tmp_path, [[i % 400, f"{i}.png", "train", *rules[i // 60][1:]] for i in range(720)])
    shutil.make_archive(tmp_path / "master_table.csv", "zip", tmp_path, "master_table.csv")
    (tmp_path / "master_table.csv").unlink()
    prepare("padchest-gr", tmp_path, "--language", "es", "--official-split")
    rows = read_csv(tmp_path / "padchest-gr" / "samples.csv")[:-720]
    assert [(row["image"], row["labels"]) for row in rows] == [
        (f"images/{i}_2.png", ";".join(rules[k][0] for k in h)) for i, *_, h in CASES if h]
    assert {row["split"] + row["text"][-4:] for row in rows} == {"valid(es)", "test(es)"}
    pixels = np.asarray(Image.open(tmp_path / "padchest-gr" / rows[0]["image"]))
    assert pixels.shape == (256, 13) and np.abs(pixels[9] - np.linspace(5, 250, 13)).max() < 9
    counts = prepare("padchest-gr", tmp_path)[1]  # refuses a patient in two splits
    assert {*counts.sum(0).tolist()} == {60, 61} and (abs(counts[2] / 60 - 0.15) < 0.08).all()

@pytest.mark.parametrize("name, splits, counts, files", [("chest-xray", ("train", "val", "test"),
    [1, 1, 1], ("x/{0}/{1}/p.jpeg", "x/x/{0}/{1}/p.jpeg", "MAC/x/{0}/{1}/._q.jpeg")),
    ("busi", range(20), [14, 3, 3], ("B/{1}/{1} ({0}).png", "B/{1}/{1} ({0})_mask_1.png"))])
def test_folder_releases(tmp_path, name, splits, counts, files):
    """A mask, a nested copy, a macOS stub as image, an unfair split, a lost class would show."""
    paths = [tmp_path / file.format(split, kind.upper()) for file, kind, split in
             itertools.product(files, data_prep.RELEASES["images"][name], splits)]
    scale.write_files(tmp_path, dict.fromkeys(paths, b""))
    images, found = prepare(name, tmp_path)
    assert {*images} == {*paths[:len(images)]} and (found.T == torch.tensor(counts)).all()
    shutil.rmtree(paths[0].parent)  # the other copy of the X-rays stands in for it
    assert data_prep.main([name, str(tmp_path), "--data", str(tmp_path)]) == 2 * (name == "busi")

class Host(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        how, start = Host.plan.pop(0), int((self.headers["Range"] or "bytes=0-")[6:-1])
        tag = '"2"' if how == "changed" else '"1"'
        start *= self.headers["If-Range"] == tag and how != "ignores"
        self.send_response(404 if how == "gone" else 206 if start else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", len(Host.body) - start + 9 * (how == "long"))
        self.end_headers()
        self.wfile.write(Host.body[start:][:100 if how == "cut" else None])

def test_weights_arrive_whole(tmp_path, monkeypatch, capsys):
    """A tensor lost or cast, bytes glued, half a file, a pickle that is let run would show."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data_prep, "HERE", tmp_path)
    monkeypatch.setattr(data_prep.time, "sleep", id)
    weight, target = torch.randn(300, 4).half().T, Path("x/model.safetensors")
    torch.save({"weight": weight}, "pytorch_model.bin")
    shutil.copytree(".", "hub")
    shutil.make_archive("m", "zip", "hub")
    torch.save({"weight": weight}, "old.bin", _use_new_zipfile_serialization=False)
    torch.jit.script(torch.nn.Embedding.from_pretrained(weight)).save("jit.pt")
    save_file({"weight": weight.contiguous()}, "m.safetensors")
    torch.save(type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (target,))})(), "evil.bin")
    Path("page.safetensors").write_text("<html>Sign in, please</html>")
    server = http.server.HTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for given, plan, words in (("m.zip", "cut cut ignores", ""), ("jit.pt", "cut changed", ""),
            ("old.bin", "cut cut cut cut", "after 397 of"), ("old.bin", "whole", ""),
            ("hub", "", ""), ("m.safetensors", "", ""), ("evil.bin", "", "Unpi"),
            ("page.safetensors", "whole", "header"), ("jit.pt", "gone gone gone gone", "404"),
            ("m.safetensors", "long long long long", "cut off"), ("jit.pt", "whole", "instead")):
        url, known = f"http://127.0.0.1:{server.server_port}/{given}", "#0" * (words == "instead")
        monkeypatch.setitem(data_prep.RELEASES["weights"], "x", {target.name: url + known})
        Host.plan, Host.body = plan.split(), plan and Path(given).read_bytes()  # one per request
        code = data_prep.main(["weights", "x", *(() if plan else ("--from", given))])
        parts, error = ("data_prep.py: ", words, url, " --from FILE."), capsys.readouterr().err
        assert (code, Host.plan, target.exists()) == (2 * bool(words), [], not words)
        assert not words or all(part in error.splitlines()[-1] for part in parts)
        if not words:
            assert load_file(target)["weight"].equal(weight)  # of the same dtype too
            assert data_prep.main(["weights", "x"]) == 0  # asks for nothing
            target.unlink()

@functools.cache
def written_clip():
    hf, folder = pytest.importorskip("transformers"), Path(tempfile.mkdtemp())
    shape = dict(num_hidden_layers=11, num_attention_heads=4, intermediate_size=96)
    text = dict(hidden_size=32, hidden_act="gelu", vocab_size=685, eos_token_id=684)
    image = dict(hidden_size=48, hidden_act="quick_gelu", image_size=40, patch_size=8)
    torch.manual_seed(0)
    model = hf.CLIPModel(hf.CLIPConfig(text_config=shape | text, vision_config=shape | image))
    for p in model.eval().parameters():  # random biases and norms too
        p.data += 0.15 * torch.randn_like(p)
    tokenizer = hf.CLIPTokenizerFast.from_pretrained(HERE / "weights" / "demo")
    processor = hf.CLIPImageProcessorPil(size=40, crop_size=40)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    out = model(CLIP(folder).tokenize(TEXTS)[0], pixels := torch.randn(3, 3, 40, 40))
    patches = model.visual_projection(model.vision_model.post_layernorm(out.vision_model_output[0]))
    return folder, (pixels, out.image_embeds, out.text_embeds, patches[:, 1:]), tokenizer, processor

@functools.cache
def written_medclip():
    hf, folder = pytest.importorskip("transformers"), Path(tempfile.mkdtemp())
    words = "[PAD] [UNK] [CLS] [SEP] lung ##ung ##ac heart ##ies Lung".split()
    words += [*"abcdefgilnoprstuvy.,-²ß中", *("##" + c for c in "aeilnorstx²")]
    (folder / "vocab.txt").write_text("\n".join([*words, ""]))
    torch.manual_seed(0)
    swin = hf.SwinModel(hf.SwinConfig(embed_dim=32, num_heads=[2, 4, 8, 16]))
    bert = hf.BertModel(hf.BertConfig(vocab_size=len(words), hidden_size=128,
                                      num_attention_heads=2, intermediate_size=512))
    look, read = (torch.randn(16, width) / 9 for width in (256, 128))
    w = {"logit_scale": torch.tensor(5.), "text_model.model.position_ids": torch.arange(9),
         "vision_model.projection_head.weight": look, "text_model.projection_head.weight": read}
    for part, model in {"vision_model.": swin, "text_model.": bert}.items():
        for p in model.eval().parameters():
            p.data += 0.15 * torch.randn_like(p)
        model.save_pretrained(at := folder / part)  # even transformers 5 writes Swin's first names
        w |= {f"{part}model.{n}": t for n, t in load_file(at / "model.safetensors").items()}
    save_file(w, folder / "model.safetensors")
    states = (bert(row[None, :length], output_hidden_states=True).hidden_states  # no padding
              for row, length in zip(*MedCLIP(folder).tokenize(TEXTS), strict=True))
    texts = torch.cat([(x[1] + x[2] + x[-1]).mean(1) for x in states]) @ read.T
    x = swin(pixels := torch.randn(2, 3, 224, 224)).last_hidden_state @ look.T
    return folder, (pixels, x.mean(1), texts, x), hf.BertTokenizerFast.from_pretrained(folder)

def openai_layout(hf, text=""):  # open_clip's with text="text."
    out, spelling = {}, """layer_norm:ln_ fc2:c_proj position_embedding.weight:positional_embedding
        text_model.: q_proj.:in_proj_ pre_layrnorm:ln_pre post_layernorm:ln_post final_ln_:ln_final
        encoder.layers:transformer.resblocks fc1:c_fc embeddings.: _projection.weight:_projection
        vision_model:visual visual_projection:visual.proj self_: patch_embedding:conv1""".split()
    for n, t in hf.items():
        t = torch.cat([hf[n.replace("q_proj", c + "_proj")] for c in "qkv"]) if "q_proj" in n else t
        t = t.T.contiguous() if "_projection" in n else t
        for pair in spelling:
            n = n.replace(*pair.split(":"))
        out[n if n.startswith(("visual", "logit")) else text + n] = t
    return {n: t for n, t in out.items() if ".k_proj" not in n and ".v_proj" not in n}

@pytest.mark.parametrize("kind", "clip openai open_clip half medclip".split())
def test_checkpoints_equal_transformers_or_are_refused(tmp_path, kind):
    """A wrong layer, order ("10" < "2"), window, pooling, padding, layout, a misfit shows."""
    folder, (pixels, *theirs), *_ = (written_medclip if kind == "medclip" else written_clip)()
    hf = w = load_file(folder / "model.safetensors")
    w = {"openai": openai_layout(w) | {"context_length": torch.tensor(77)},
         "open_clip": openai_layout(w, "text."), "half": {n: t.half() for n, t in w.items()},
         "clip": w | {"text_model.embeddings.position_ids": torch.arange(77)[None]}}.get(kind, w)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    save_file(w, tmp_path / "model.safetensors")
    model, atol = scale.load_backbone(tmp_path), 2e-3 if kind == "half" else 2e-6
    assert model.logit_scale == pytest.approx(min(w["logit_scale"].exp().item(), 100), 1e-3)
    w = model.tensors = {n: t.clone().requires_grad_() for n, t in model.tensors.items()}
    ids, lengths = model.tokenize(TEXTS)
    got = [model.image_tower(w, pixels), model.text_tower(w, w[model.words][ids], lengths),
           model.image_tower(w, pixels, True), model.encode_image(pixels), model.encode_text(TEXTS)]
    for pair in zip(got, theirs + theirs[:2], strict=True):
        torch.testing.assert_close(*(F.normalize(x, dim=-1) for x in pair), atol=atol, rtol=0)
    assert [x.requires_grad for x in got] == [True] * 3 + [False] * 2  # frozen but in the towers
    sum(x.square().sum() for x in got[:2]).backward()
    assert [n for n, t in w.items() if t.grad is None] == ["logit_scale"]
    name = next(n for n in hf if n.endswith(("10.mlp.fc1.bias", "0.attention.self.query.bias")))
    for tensors, words in ((hf | {"logit_bias": torch.zeros(1)}, "logit_bias"),
            ({n.replace(name, "q"): hf[n] for n in hf}, name + " missing"),  # as transformers 5 may
            ({n: t[:1] if "position" in n else t for n, t in hf.items()}, "position"),
            ({n: hf[n] for n in hf if ".10." not in n}, "missing inst"), (None, "safetensors"),
            (hf | {name: hf[name][:1]}, name), (hf | {name: hf[name] * math.nan}, name)):
        (tmp_path / "model.safetensors").write_bytes(save(tensors) if tensors else save(hf)[:9999])
        pytest.raises(InputError, scale.load_backbone, tmp_path).match(words + ".*: a whole copy")

def test_tokens_and_pixels_equal_transformers(tmp_path):
    """A slip in splitting, joining, reading files; a crop, filter, alpha, mean, 16 bits show."""
    (source, _, tokenizer, processor), (medclip, _, bert) = written_clip(), written_medclip()
    shutil.copytree(source, tmp_path, dirs_exist_ok=True)
    fast = json.loads((source / "tokenizer.json").read_text())["model"]
    fast["merges"] = [" ".join(pair) for pair in fast["merges"]]  # older files have lines of two
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": fast}))
    pieces = [name.removesuffix("</w>") for name in [*fast["vocab"]][512:-2]] + [*" PQR'ts.,12!"]
    rng, odd = np.random.default_rng(1), "ÀßİΣς²½Ⅷ٣中한 \t\n\u00a0\x1c\x85'’_<|>éfi🙂\u0301\u200d"
    texts = ["".join(rng.choice([*pool, *odd[:i % 2 * 99]], rng.integers(40)))
             for pool in (pieces, "melanoma's élan 1", "abcde lungs HEARTIES ,.-", "lungaciesÀ $+<")
             for i in range(500)] + ["a" * 100, "a" * 101, "a. " * 99]
    for folder in (source, tmp_path, HERE / "weights" / "demo", medclip):  # demo: merges.txt
        model, theirs = scale.load_backbone(folder), bert if folder == medclip else tokenizer
        ours = [row[:length].tolist() for row, length in zip(*model.tokenize(texts), strict=True)]
        assert ours == theirs(texts, truncation=True, max_length=model.context)["input_ids"]
    for mode, shape in itertools.product("RGB L RGBA P LA 1 CMYK".split(), (
            (40, 40), (57, 91), (131, 83), (20, 33), (300, 41))):
        image = Image.fromarray(rng.integers(0, 256, (*shape, 4), np.uint8)).convert(mode)
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(CLIP(source).preprocess(image), theirs, atol=1e-6, rtol=0)
    folder = shutil.copytree(medclip, tmp_path / "m")
    x = np.pad(np.arange(256.)[:, None].repeat(101, 1), ((0, 0), (77, 78)))  # black at its sides
    for how, dtype, factor in ((2, "u1", 1), (3, "u2", 257), (2, "f4", .5)):
        (folder / "preprocessor_config.json").write_text('{"resample": 3}' if how == 3 else "{}")
        Image.fromarray((x[:, 77:178] * factor).astype(dtype)).save(tmp_path / "x.tif")
        pixels = MedCLIP(folder).preprocess(scale.open_image(tmp_path / "x.tif")).numpy()
        expected = np.asarray(Image.fromarray(np.uint8(x)).resize((224, 224), how)) / 255
        assert abs(pixels * 0.27950088968644304 + 0.5862785803043838 - expected).max() < 1e-5

@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.005])
def test_supcon_equals_loops_and_is_no_worse_than_plain_torch(temperature):
    """A wrong mask, tile edge, sign, overflow, gradient, or more error than plain torch shows."""
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    for n, d, classes in itertools.product((1, 33, 127), (8, 130), (1, 5, 999)):
        x, y, h = unit_rows(n, d), unit_rows(n + 3, d, 1), torch.arange(n + 3) % classes
        assert_same(supcon_loss(x, h[:n], tau), supcon_loop(x, h[:n], tau), (x, tau))
        assert_same(supcon_loss(x, h[:n], tau, contrast=y, contrast_labels=h),
                    supcon_loop(x, h[:n], tau, y, h), (x, y, tau))
    pairs = unit_rows(150, 40).repeat(2, 1) + unit_rows(300, 40, 1) / 20  # confident positives
    cases = (unit_rows(300, 40), 9, temperature), (pairs, 150, 0.1)
    for dtype, (z, n, tau) in itertools.product((torch.float32, torch.half, torch.bfloat16), cases):
        x, g = z.detach().to(dtype).requires_grad_(), torch.arange(300) % n
        z = x.detach().double().requires_grad_()
        exact, ours, plain = (torch.autograd.grad(f(t, g, tau), t)[0] for f, t in (
            (supcon.supcon_reference, z), (supcon_loss, x), (supcon.supcon_reference, x)))
        assert (ours - exact).norm() <= (plain - exact).norm() * 1.3 + 1e-6 * exact.norm()

def test_supcon_blocks_and_forms():
    """An error where tiles meet, in a reduction, CLIP, SCALE's Q, an N x M kept would show."""
    x, y, g = unit_rows(1500, 8), unit_rows(1500, 8, 1), torch.arange(1500) % 900
    assert_same(supcon_loss(x, g), supcon.supcon_reference(x, g), x)
    losses, total = (supcon_loss(x, g, reduction=name) for name in ("none", "sum"))
    assert (losses == 0).sum() == 300 and torch.equal(total, losses.sum())
    clip = sum(F.cross_entropy(q * 2, torch.arange(1500)) for q in (x @ y.T, y @ x.T)) / 2
    assert_same(supcon_loss(x, None, 0.5, contrast=y, both=True), clip, (x, y))
    tau = torch.tensor(0.5).double().requires_grad_()
    for m, unit in itertools.product((5, 90), (True, False)):
        a, b, g = unit_rows(300, 20), unit_rows(m, 20, 1), g[:300] % 7
        q = F.normalize(a @ b.T, dim=1) if unit else a @ b.T
        assert_same(supcon.product_supcon_loss(a, b, g, tau, unit_rows=unit),
                    supcon.supcon_reference(q, g, tau), (a, b, tau))
    assert torch.autograd.gradcheck(lambda x, tau: supcon_loss(x.T.clone().T, g[:7] % 3, tau,
        reduction="none"), (unit_rows(7, 4), tau), check_undefined_grad=False)
    x, y, g, kept = unit_rows(64, 4), unit_rows(500_000, 4, 1), torch.arange(500_000) % 50, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, id):
        supcon_loss(x, g[:64], contrast=y, contrast_labels=g)
    assert sum(kept) < 5 * y.numel() + 36 * 2**19 < 64 * len(y)  # pairs

def test_supcon_where_it_is_copied(tmp_path):
    """A mistake that passes, a graph break, rounding by autocast, an import it lacks would show."""
    x, g = unit_rows(80, 16, dtype=torch.float32), torch.arange(80) % 9
    for wrong in ({"features": x[0]}, {"features": x.long()}, {"labels": g[:5]}, {"both": True},
                  {"labels": g.float()}, {"temperature": 0}, {"labels": None}, {"contrast": x},
                  {"temperature": torch.tensor(-1.0)}, {"impl": "triton"}, {"reduction": "max"}):
        pytest.raises(ValueError, supcon_loss, **{"features": x, "labels": g} | wrong).match("doc")
    gradient, = torch.autograd.grad(supcon_loss(x, g), x, create_graph=True)
    pytest.raises(RuntimeError, gradient.sum().backward).match("differentiate twice")
    small = functools.partial(supcon.supcon_loss, temperature=0.1)  # dense
    assert small(x, g.int() % 2).equal(small(x, (g % 2).bool()))
    assert_same(small(x, g), supcon_loss(x, g, 0.1), x, 1e-6, 1e-5)
    assert torch.autograd.gradgradcheck(small, (unit_rows(7, 4), g[:7] % 3))
    for loss in (small, supcon_loss, lambda x, g: supcon.product_supcon_loss(x, x.detach(), g)):
        assert_same(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, g), loss(x, g), x)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(loss(x, g), loss(x, g), x, 0, 0)  # also: the same bits from run to run
    torch.library.opcheck(supcon.all_pairs, (
        x, g, x.detach().norm(), x.new_empty(0), 80, True, False, False, 32))
    shutil.copy(supcon.__file__, tmp_path / "loss.py")
    code = ("import sys, torch; sys.modules['triton'] = None; from loss import supcon_loss; "
            "print(supcon_loss(torch.ones(600, 4) / 2, torch.zeros(600).long()).item())")
    assert float(python(tmp_path, "-c", code).stdout) == pytest.approx(math.log(599))

def run_process(rank, rendezvous):
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    weight, (x, y), found = unit_rows(5, 6, 9), (unit_rows(40, 6, s).detach() for s in (1, 2)), []
    world, share = torch.distributed.group.WORLD, slice(17 * rank, 17 + 23 * rank)
    for group, rows in ((None, slice(40)), (world, share)):
        (a, b), g = (t[rows] @ weight.T for t in (x, y)), torch.arange(40)[rows] % 23
        for loss in (supcon_loss(a, g, group=group), supcon_loss(a, contrast=b, group=group),
                     supcon_loss(a, g, contrast=b, contrast_labels=g // 2, group=group),
                     supcon.product_supcon_loss(a, b, g, group=group)):
            found += [loss.detach(), torch.autograd.grad(loss, weight, retain_graph=True)[0]]
        for n, exclusive in ((531, True), (300, False)):  # over 512 samples, so by the kernel
            data = scale.replace(tiny_data(n, exclusive), group=group)
            fit, _ = scale.fit_scale(data, range(n), scale.Config(epochs=9), torch.Generator(), [])
            found.append(fit(range(n)).detach() / data.logit_scale)
    for one, two in zip(found[:10], found[10:], strict=True):
        torch.distributed.all_reduce(two)
        torch.testing.assert_close(two / 2, one)  # float32: within 1e-5
    os._exit(0)  # gloo's threads can abort an orderly end

def test_two_processes_equal_one(tmp_path):
    """A gather without gradient, a wrong own pair, a mean over the local count would show."""
    torch.multiprocessing.spawn(run_process, (tmp_path / "rendezvous",), 2)

def test_triton_in_interpreter():
    """A wrong Triton tile, an access out of bounds, or a race of two programs would show."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if "TRITON_INTERPRET" not in os.environ:  # this very test, in a process of its own
        python(HERE, "-m", "pytest", "-kinterpreter", TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
        return
    builder, launch = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__
    inside, seen = [], []  # addresses of the tensors; of what was read and written
    def record(self, mask, access, ptrs, *rest):
        seen[mask].append(at := np.unique(ptrs.data[rest[mask].data.astype(bool)].astype(np.int64)))
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
    for n, d in ((1, 8), (33, 17), (65, 37), (300, 9), (5, 4096)):
        x, g = unit_rows(2 * n + 5, d), torch.arange(2 * n + 5) % 7
        for rows, alone in ((len(x), True), (n, False), (n, True)):  # the last as in a group
            slopes = []  # exact, of plain float32, of Triton
            for z, triton in ((x, False), (x.float(), False), (x.float(), True)):
                lse, total, count, _ = supcon.all_pairs(z, g, z.new_tensor(25.), z.new_empty(0),
                    rows, alone, False, triton, 0)[0][:, :rows]
                loss = torch.where(count > 0, lse - total / count.clamp(min=1), 0).sum()
                slopes += [loss, *torch.autograd.grad(loss, x)]
            for a, b, c in zip(slopes[:2], slopes[2:4], slopes[4:], strict=True):
                assert (c - a).norm() <= (b - a).norm() + 1e-6 * a.norm(), (n, rows, alone)

@pytest.mark.parametrize("arch, weights", [*itertools.product([80, 90, 100], [False, True])])
@pytest.mark.parametrize("dtype, shape", [("fp32", (128, 64, 32)), ("bf16", (128, 128, 64))])
def test_triton_compiles_without_spills(tmp_path, arch, dtype, shape, weights):
    """Tiles that spill registers or miss the tensor cores would show, without a GPU."""
    triton, kernel = pytest.importorskip("triton"), supcon._tile_kernel
    from triton.backends.compiler import GPUTarget
    constants = dict(zip("RCD", shape, strict=True), DIM=768, WEIGHTS=weights)
    kinds = dict(a_ptr=dtype, b_ptr=dtype, weight_ptr=dtype, a_label_ptr="i64", b_label_ptr="i64")
    types = {n: "*" + kinds.get(n, "fp32") if "_ptr" in n else "i32" for n in kernel.arg_names}
    types |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(types) if "_ptr" in n}
    source = triton.compiler.ASTSource(kernel, types, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
    (tmp_path / "cubin").write_bytes(built.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.check_output([tool, "-res-usage", tmp_path / "cubin"], text=True)
    assert "STACK:0 " in usage and "mma." in built.asm["ptx"], usage  # it uses tensor cores

def test_interrupted_embedding_goes_on(demo, tmp_path, monkeypatch):
    """After a half JPEG only what is missing is computed, to the bit; else nothing."""
    paths = [Path(shutil.copy(path, tmp_path)) for path in sorted(demo[0].glob("**/*.jpg"))[:99]]
    sizes, jpeg, encode = [], paths[70].read_bytes(), CLIP.encode_image
    def embed(out, paths=paths, **settings):
        config = scale.Config(out=str(tmp_path / out), **settings)
        return scale.embed_both([(path, 0) for path in paths], ["x"], "demo", config)[0]
    whole = embed("a")
    monkeypatch.setattr(CLIP, "encode_image", lambda *x: sizes.append(len(x[1])) or encode(*x))
    paths[70].write_bytes(jpeg[:700])
    pytest.raises(InputError, embed, "b").match("P0070.jpg")  # in the third batch
    paths[70].write_bytes(jpeg)
    assert embed("b").equal(whole) and sizes == [32, 32, 32, 3]
    paths[0].write_bytes(paths[1].read_bytes())  # content decides, not the name
    assert embed("b")[0].equal(whole[1]) and len(sizes) == 4
    rough = embed("b", paths[1:2], dtype="bfloat16")[0]  # has a cache of its own
    assert 1e-7 < 1 - rough @ whole[1] < 1e-3 and len(sizes) == 5

def test_views_and_noise(demo, tmp_path):
    """A view of a test image, a plain one, a flip; words invented, doubled or kept would show."""
    drawing = Image.fromarray(np.uint8([[200, 150, 100, 50]]).repeat(4, 0)).resize((64, 48), 0)
    shown = [np.asarray(scale.augment(drawing, view)).mean((0, 2)) for view in range(1, 9)]
    assert all(row[:20].mean() > row[-20:].mean() + 40 for row in shown)
    plain, data = (scale.embed_dataset(scale.Config(
        "demo", data=str(demo[0] / "data"), out=str(tmp_path), views=n)) for n in (1, 2))
    same = (data.views == plain.views).all(2).T.numpy()  # (2, N)
    assert same[0].all() and np.array_equal(same[1], data.samples.split != "train")
    rng, text = np.random.default_rng(0), "a b c d e f"
    texts = [scale.add_noise(text, 0.3, rng).split() for _ in range(300)]
    assert scale.add_noise(text, 0.0, rng) == text and len(texts[0]) == len(set(texts[0]))
    drops, swaps = np.mean([(6 - len(words), words != sorted(words)) for words in texts], 0)
    assert 0.7 < drops < 1.1 and 0.3 < swaps < 0.8

def test_predictions(demo, tmp_path, monkeypatch, capsys):
    """A wrong concept or probability, or another checkpoint that is taken, would show."""
    monkeypatch.chdir(demo[0])
    run = shutil.copytree("runs/demo-demo-scale-0.05-s0", tmp_path / "run")
    row, at = read_csv(run / "scores.csv")[7], ["--run", str(run), "--out", str(tmp_path)]
    image = "data/demo/release_v0/images/" + row["image"]
    assert scale.main(["--predict", image, "--card", *at]) == 0
    told = json.loads((tmp_path / "predictions.json").read_text())[image]
    for task in json.loads(config := (run / "config.json").read_text())["taxonomy"]["tasks"]:
        ranked = sorted(task["combinations"], key=lambda c: float(row[c["name"]]))
        odds = {c["name"]: math.exp(float(row[c["name"]])) for c in ranked}
        best, said = {c["class"]: odds[c["name"]] for c in ranked}, told[task["name"]]
        shares = {name: x / sum(best.values()) for name, x in best.items()}
        assert said["classes"] == pytest.approx(shares, abs=1e-4)
        assert [*said["decided_by"]] == [*odds][:-3:-1]  # the two highest
        for name, x in said["decided_by"].items():
            assert x["two_prompt_probability"] == pytest.approx(1 / (1 + 1 / odds[name]), abs=.001)
    card = np.asarray(Image.open(tmp_path / "cards" / f"0-{Path(image).stem}.png"), int)
    bars = np.diff((abs(card - [0, 114, 178]).sum(2) < 9).any(1).astype(int)) == 1
    assert card.shape == (910, 800, 3) and bars.sum() == 14
    for flag, asked, n in (("--retrieve-image", image, 1), ("--retrieve", "irregular streaks", 50)):
        assert scale.main(["--dataset", "demo", flag, asked, *at]) == 0
        found = read_csv(tmp_path / "retrieved.csv")
        hits = [Path(asked).name in row["image"] + row["labels"] for row in found[:n]]
        assert len(found) == 1011 and np.mean(hits) > 0.5  # the words are in .25 of all
    assert Image.open(tmp_path / "retrieved.png").size == (1020, 760)
    (run / "config.json").write_text(config.replace('_sha256": "', '_sha256": "0'))
    assert scale.main(["--predict", image, *at]) == 2 and "train again" in capsys.readouterr().err

def test_commands(demo, folder):
    """Other bytes, a number lost, a worker unlike a single run, a leak, a wrong best show."""
    def run(flags, kind="*"):
        done = python(folder, *COMMAND, *flags.split())
        assert "embedding" not in done.stderr  # all are cached
        return done.stdout, [[json.loads((path / name).read_text()) for name in (
            "config.json", "metrics.json")] for path in folder.glob("runs/demo-" + kind)]
    out, runs = run("--sweep --method zeroshot,coop,scale --splits 1")
    rows = read_csv((report := folder / "runs" / "report-demo") / "results.csv")
    shown, map_ = ("".join(ET.parse(report / "figures" / f"{name}.svg").getroot().itertext())
                   for name in ("scores", "texts"))
    assert map_.count("irregular streaks") == 4  # two panels, a title and a label in each
    assert len(rows) == 15 and "at 50%" in out and "leads" in (report / "report.md").read_text()
    assert rows[0]["n_train"] == "21" and all(x in shown for row in rows for x in row.values())
    assert {float(row["class_f1"]) for row in rows} == {x["class"]["f1"] for _, x in runs}
    scale.write_files(folder / "runs/demo-demo-scale-0.05-s1", {"config.json": "another version"})
    assert run("--frac 0.05 --splits 2")[0] == demo[1]
    for path in demo[0].glob("runs/demo-*/*"):
        other = folder / path.relative_to(demo[0])  # s0 is the sweep's; log.jsonl holds times
        assert path.name == "log.jsonl" or other.read_bytes() == path.read_bytes(), path
    _, runs = run("--shuffle-labels --method linear-weighted,scale --frac .5 --splits 2", "*=1.0")
    found = np.max([(x["class"]["f1"], x["class_concept"]["f1"]) for _, x in runs], axis=0)
    assert (found < (0.55, 0.35)).all()  # zero-shot: .58, .42
    grid, runs = run("--grid --frac 0.05 --splits 1 --epochs 2", "*grid*")
    f1 = {config["lambdas"]: x["class_concept"]["f1"] for config, x in runs}
    assert {x["n_test"] for _, x in runs} == {203}  # validation images
    assert len(f1) == 81 and f1[grid.split()[1]] == max(f1.values())
    table = folder / "data/demo/samples.csv"
    table.write_text(table.read_text().replace(",valid,", ",train,"))  # 616 training images
    run("--epochs 9")
    (folder / "runs").rename(folder / "one")
    told = python(folder, "-mtorch.distributed.run", "--nproc-per-node=2", *COMMAND, "--epochs=9")
    a, b = (np.array([np.genfromtxt(path, delimiter=",")[1:, 2:] for path in sorted(
        folder.glob(f"{at}/demo-*epochs=9/scores.csv"))]) for at in ("one", "runs"))
    assert "run by all 1/1" in told.stderr and len(a) == 3 and np.abs(a - b).max() < 3e-4

BAD = {  # file: changes of its text, old>new>words of the error; or flags
    "samples.csv": ["jp>gi>gi", "streaks>streeks>streeks", "--frac 2>>--frac", "--lambdas 1>>--la",
        "streaks>streaks;regular streaks>has 2 labels", "--frac 0.003>>has none", "--run=-->>--run",
        "--dataset d>>py derm7p", "--backbone monet>>weights monet", "--device cuda:77>>cpu",
        "--criterion x>>pigment", "--method scala>>scala"], "taxonomy.json": ["tasks>taskz>taxon"],
    "meta.csv": [",absent,>,abscent,>abscent", "1,clark nevus,>1,clark nevus,1>seven_point_score",
        "P0007.jpg,,>P7,,>p7", "case_num>\0>row 2"],
    "test_indexes.csv": ["es\n>es\n5\n>row 5,", "indexes\n>indexes\n1011\n>row 2"],
    "master_table.csv": ["test>tset>tset", "a_2.png>../a_2.png>row 2", "_2.png>z.png>z.png",
        "a_2.png>b_2.png>two patients", "['left', 'basal']>exit()>row 2", "\nPa,>\n,>PatientID"]}
BAD |= {path.name: [] for path in (HERE / "weights" / "demo").glob("*.*")} | {"P0000.jpg": []}
ODD = [b"", b'""', b",", b"\n", b"null", b"-1", b"1e9", b"[]", b"NaN", b"\0", b"../", b"test", b";"]

@pytest.mark.parametrize("file", BAD)
def test_bad_input(folder, capsys, monkeypatch, file):
    """A traceback, another sentence, a file left behind, after these and chance changes, shows."""
    monkeypatch.chdir(folder)
    padchest(raw := Path("data/demo/release_v0"))
    shutil.copytree(HERE / "weights" / "demo", "w", ignore=shutil.ignore_patterns("meta"))
    table, path = Path("data/demo/samples.csv"), next(folder.rglob(file))
    table.write_text("".join(open(table).readlines()[:60]))
    data, before = path.read_bytes(), {*folder.rglob("*")}
    flags = "--dataset demo --backbone w --method zeroshot --criterion streaks".split()
    name = {"meta": "derm7p", "release_v0": "padchest-gr"}.get(path.parent.name)
    for n, case in enumerate(BAD[file] + [">>"] * int(os.environ.get("MUTATIONS", 20))):
        (old, new, words), rng = case.split(">"), np.random.default_rng(n)
        at, width = rng.integers(len(data) + 1), rng.choice([0, 1, 8, len(data)])
        odd = [*ODD, rng.bytes(9), data[at:at + 99]][rng.integers(len(ODD) + 2)]
        changed = data.replace(old.encode(), new.encode(), 1)
        path.write_bytes(changed if words else data[:at] + odd + data[at + width:])
        more = old.split() if old[:2] == "--" else []
        code = data_prep.main([name, str(raw)]) if name else scale.main([*flags, *more])
        error = [*capsys.readouterr().err.splitlines(), ""][-1 - bool(code)]
        assert code == 2 and ".py: " in error and len(error) < 999 or code == 0 and not words
        assert words in error and (not words or {*folder.rglob("*")} == before), case
    written = {str(path.relative_to(folder)) for path in {*folder.rglob("*")} - before}
    assert all(name.startswith(("data/derm7p", "data/padchest-gr", "runs/")) for name in written)

def test_budget():
    """Under 2,000 lines without the tests, which have at most 700."""
    files = {p: p.read_text().splitlines() for p in (*HERE.glob("*.py"), *HERE.glob("*/*.py"))}
    assert len(files.pop(HERE / "test_scale.py")) <= 700 and sum(map(len, files.values())) < 2000
