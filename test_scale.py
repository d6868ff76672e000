"""Tests: oracles written from the equations, parity, formats, bad input, the real commands."""

import csv
import functools
import json
import math
import os
import random
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

import data_prep
import scale
from weights import InputError
from weights.clip import byte_symbols, image_tower, load_clip, text_tower

HERE = Path(__file__).resolve().parent
SYSTEM = [HERE / "scale.py", HERE / "data_prep.py", *HERE.glob("kernels/*.py"),
          *HERE.glob("weights/*.py")]


# ---- CLIP against transformers -------------------------------------------------------------------
TEXTS = ["a photo of a mole", "This is dermoscopy of an atypical, Pigment network!", "x y " * 40]


@functools.cache
def written_clip(act="quick_gelu"):
    """(folder, model, tokenizer, processor) of a small random CLIP that transformers wrote."""
    hf = pytest.importorskip("transformers")
    rng, letters = random.Random(0), list(byte_symbols().values())
    some = ["a", "n", "o", "m", "e", "l", "p", "i", "1", "'", "Ã", "©", "a</w>", "n</w>", "s</w>"]
    merges = [(a, b) for a in some[:12] for b in some]
    merges += [(a + b, rng.choice(some)) for a, b in merges if "<" not in b]
    rng.shuffle(merges)
    names = [*letters, *(c + "</w>" for c in letters), *map("".join, merges)]
    names = [*dict.fromkeys(names), "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names)}
    shape = {"num_hidden_layers": 11, "hidden_act": act, "intermediate_size": 96}
    torch.manual_seed(0)
    model = hf.CLIPModel(hf.CLIPConfig(
        projection_dim=32, text_config=dict(
            shape, hidden_size=32, num_attention_heads=4, max_position_embeddings=20,
            vocab_size=len(vocab), bos_token_id=len(vocab) - 2, eos_token_id=len(vocab) - 1),
        vision_config=dict(shape, hidden_size=48, num_attention_heads=3, image_size=40,
                           patch_size=8))).eval()
    for p in model.parameters():
        p.data += 0.15 * torch.randn_like(p)
    tokenizer = hf.CLIPTokenizerFast(vocab=vocab, merges=merges)
    processor = hf.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 40, "width": 40})
    folder = Path(tempfile.mkdtemp())
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder, model, tokenizer, processor


def copy_with(target, tensors):
    """`target`, made a copy of the checkpoint with these tensors."""
    target.mkdir()
    for file in written_clip()[0].glob("*.json"):
        (target / file.name).write_bytes(file.read_bytes())
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors")
    return target


def openai_layout(hf, text=""):
    """OpenAI's names and shapes (open_clip's with text="text."): fused in_proj, turned ends."""
    out = {"visual.proj": hf["visual_projection.weight"].T, "logit_scale": hf["logit_scale"],
           text + "text_projection": hf["text_projection.weight"].T}
    for name, tensor in hf.items():
        if name in ("logit_scale", "visual_projection.weight", "text_projection.weight"):
            continue
        if "q_proj" in name:
            tensor = torch.cat([hf[name.replace("q_proj", c + "_proj")] for c in "qkv"])
        for pair in ("vision_model:visual text_model.: self_attn.q_proj.:attn.in_proj_ "
                     "embeddings.: self_attn:attn encoder.layers:transformer.resblocks "
                     "pre_layrnorm:ln_pre "
                     "post_layernorm:ln_post final_layer_norm:ln_final layer_norm:ln_ fc1:c_fc "
                     "fc2:c_proj patch_embedding:conv1 position_embedding.weight:"
                     "positional_embedding").split():
            name = name.replace(*pair.split(":"))
        if ".k_proj" not in name and ".v_proj" not in name:
            out[name if name.startswith("visual") else text + name] = tensor
    return out


def unit(output):
    """Unit embeddings of what transformers 4 or 5, or CLIP, returns."""
    return torch.nn.functional.normalize(getattr(output, "pooler_output", output), dim=-1)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(act):
    """A wrong activation, head count, layer order ("10" < "2"), pooling or scale would show."""
    folder, model, tokenizer, _ = written_clip(act)
    clip, pixels = load_clip(folder), torch.randn(3, 3, 40, 40)
    ids = tokenizer(TEXTS, padding=True, truncation=True, max_length=20, return_tensors="pt")
    with torch.no_grad():
        images = unit(model.get_image_features(pixel_values=pixels))
        texts = unit(model.get_text_features(**ids))
    every = image_tower(clip.tensors, pixels, **clip.image, every_token=True)  # (3, 26, 32)
    for ours, theirs in ((clip.encode_image(pixels), images), (clip.encode_text(TEXTS), texts),
                         (every[:, 0], images)):
        torch.testing.assert_close(unit(ours), theirs, atol=2e-5, rtol=0)
    assert clip.logit_scale == pytest.approx(model.logit_scale.exp().item())


@pytest.mark.parametrize("layout", ["position_ids", "openai", "open_clip", "half"])
def test_clip_layouts_agree(tmp_path, layout):
    """A projection not turned, q, k, v swapped, or fp16 left as it is would show."""
    ours, pixels = load_clip(written_clip()[0]), torch.randn(2, 3, 40, 40)
    w = load_file(written_clip()[0] / "model.safetensors")
    w = {"position_ids": lambda: w | {"text_model.embeddings.position_ids": torch.arange(20)[None]},
         "openai": lambda: openai_layout(w) | {"context_length": torch.tensor(20)},
         "open_clip": lambda: openai_layout(w, "text."),
         "half": lambda: {name: tensor.half() for name, tensor in w.items()}}[layout]()
    other, atol = load_clip(copy_with(tmp_path / "copy", w)), 2e-3 if layout == "half" else 2e-6
    for name in ("encode_image", "encode_text"):
        a, b = (getattr(clip, name)(pixels if "im" in name else TEXTS) for clip in (ours, other))
        torch.testing.assert_close(unit(a), unit(b), atol=atol, rtol=0)


def test_tokens_equal_transformers(tmp_path):
    """A slip in normalising, splitting, merging, cutting or reading the files would show."""
    folder, _, tokenizer, _ = written_clip()
    rng = random.Random(1)
    odd = "ÀßİΣς²½Ⅷ٣中한 \t\n\u00a0\x1c\x85'’_<|>éfi🙂\u0301\u200d"
    pools = ["abcdefghijklmno PQRS'tvsd.,12!", odd, "melanoma's élan 12", odd + "anom 's"]
    texts = ["".join(rng.choices(pools[i % 4], k=rng.randrange(40))) for i in range(4000)]
    theirs = tokenizer(texts, truncation=True, max_length=30)["input_ids"]
    fast = json.loads((folder / "tokenizer.json").read_text())
    merges = [list(pair) for pair in load_clip(folder).tokenizer.ranks]
    w = load_file(folder / "model.safetensors")
    for name in ("pairs", "strings", "merges.txt"):
        copy, lines = copy_with(tmp_path / name, w), [" ".join(pair) for pair in merges]
        fast["model"]["merges"] = merges if name == "pairs" else lines
        if name == "merges.txt":
            (copy / "vocab.json").write_text(json.dumps(fast["model"]["vocab"]))
            (copy / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]))
        (copy / "tokenizer.json").write_text("" if name == "merges.txt" else json.dumps(fast))
        ours = load_clip(copy).tokenizer
        assert [ours(text, 30) for text in texts] == theirs
    (copy / "merges.txt").unlink()
    (copy / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="merges.txt"):
        load_clip(copy)


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
    tensor = {"missing": None, "extra": w[name], "misshapen": torch.zeros(7),
              "nan": w[name] * float("nan")}[fault]
    w[name], w["logit_bias"] = tensor, torch.zeros(1)
    w = {n: t for n, t in w.items() if t is not None and (n != "logit_bias" or fault == "extra")}
    with pytest.raises(InputError, match="logit_bias" if fault == "extra" else name) as error:
        load_clip(copy_with(tmp_path / "copy", w))
    assert "data_prep.py weights copy" in str(error.value)


def test_unreadable_checkpoint(tmp_path):
    """Cut, empty or foreign files and an unknown activation are errors that name them."""
    whole, copy = (written_clip()[0] / "model.safetensors").read_bytes(), tmp_path / "copy"
    copy_with(copy, {})
    for content in (whole[:-9], whole[:5], b"", b"version https://git-lfs", b"\xff" * 99):
        (copy / "model.safetensors").write_bytes(content)
        with pytest.raises(InputError, match="model.safetensors"):
            load_clip(copy)
    (copy / "model.safetensors").write_bytes(whole)
    clip = load_clip(copy)
    clip.tensors["text_projection.weight"] = clip.tensors["text_projection.weight"] * np.inf
    with pytest.raises(InputError, match="finite"):
        clip.encode_text(TEXTS)
    (copy / "config.json").write_text('{"text_config": {"hidden_act": "relu"}}')
    with pytest.raises(InputError, match="relu"):
        load_clip(copy)


def test_gradients_only_where_asked():
    """Tuning needs gradients through both towers; a frozen encoder must record none."""
    clip, ends = load_clip(written_clip()[0]), torch.full((3,), 4)
    w = {name: tensor.clone().requires_grad_() for name, tensor in clip.tensors.items()}
    ids = torch.tensor([clip.tokenizer(text, 20)[:5] for text in TEXTS])
    table = w["text_model.embeddings.token_embedding.weight"]
    texts = text_tower(w, table[ids], ends, **clip.text)  # embeddings in place of ids
    torch.testing.assert_close(texts, text_tower(w, ids, ends, **clip.text))
    images = image_tower(w, torch.randn(2, 3, 40, 40), **clip.image)
    (images.square().sum() + texts.square().sum()).backward()
    assert [n for n, t in w.items() if t.grad is None] == ["logit_scale"]
    clip.tensors = w
    assert not (clip.encode_text(TEXTS).requires_grad or clip.encode_image(
        torch.zeros(1, 3, 40, 40)).requires_grad)


def test_monet_pixels(tmp_path, capsys):
    """MONET was trained with ImageNet's mean and std: anything else must be said."""
    folder = copy_with(tmp_path / "monet", load_file(written_clip()[0] / "model.safetensors"))
    load_clip(folder)
    assert "ImageNet" in capsys.readouterr().err
    (folder / "preprocessor_config.json").unlink()
    assert load_clip(folder).pixels["mean"][0] == 0.485 and not capsys.readouterr().err


# ---- Taxonomies and releases in miniature --------------------------------------------------------
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
    taxonomy = scale.make_taxonomy({"tasks": tiny_tasks()})
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
    for part, numbers in (
            ("train", range(24)), ("valid", range(24, 28)), ("test", range(28, n))):
        text = "".join(f"{i}\n" for i in ["indexes", *numbers])
        (raw / "meta" / f"{part}_indexes.csv").write_text(text)
    return rows


# ---- Eq. 1: adapters -----------------------------------------------------------------------------
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


# ---- Eq. 2 and 3: the objective ------------------------------------------------------------------
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
        torch.testing.assert_close(terms[name], torch.as_tensor(value).to(terms[name]), msg=name)
    weighted = sum(w * v for w, v in zip((1, *lambdas), oracle.values(), strict=True))
    (expected,) = torch.autograd.grad(weighted, z)
    assert torch.allclose(got, expected, atol=1e-8)


def test_contrast_of_free_texts():
    """With a text for each image, both terms are Eq. 2 on Q and on its transpose."""
    taxonomy, _, truth = tiny_problem(9)
    g = torch.Generator().manual_seed(5)
    pairs = [F.normalize(torch.randn(9, 4, generator=g, dtype=torch.float64), dim=1) for _ in "it"]
    _, terms = scale.scale_loss(torch.zeros(9, 5).double(), truth, taxonomy, 1.0, 0.1,
                                (1, 1, 1, 1), True, pairs)
    for term, q in (("rows", pairs[0] @ pairs[1].T), ("columns", pairs[1] @ pairs[0].T)):
        loops = [supcon_loop(q, truth[:, part].int().argmax(1).tolist(), 0.1, True)
                 for part in (slice(0, 3), slice(3, 5))]
        torch.testing.assert_close(terms[term], sum(loops) / 2)


def test_rows_of_many_images():
    """Beyond 512 images the kernel takes over: the same loss and gradient as the dense batch."""
    taxonomy, z, truth = tiny_problem(520)
    q = [F.normalize(z[:, part] * truth[:, part].sum(0).sqrt(), dim=1) for part in
         (slice(0, 3), slice(3, 5))]
    labels = [truth[:, :3].int().argmax(1), truth[:, 3:].int().argmax(1)]
    dense = sum(map(scale.supcon_reference, q, labels, (0.1, 0.1))) / 2
    tiled = scale.supcon_of_rows(z, truth, taxonomy.combination, 0.1, True)
    torch.testing.assert_close(tiled, dense)
    torch.testing.assert_close(*(torch.autograd.grad(loss, z)[0] for loss in (tiled, dense)))


def test_objective_without_positives_or_contrast():
    """All labels different, all equal, all rows identical: finite losses and gradients, no NaN."""
    taxonomy, _, _ = tiny_problem(1)
    for truth in ([[1, 0, 0, 1, 0], [0, 1, 0, 0, 1]], [[1, 0, 0, 1, 0]] * 3, [[0, 0, 1, 0, 1]]):
        truth = torch.tensor(truth).bool()
        z = torch.full(truth.shape, 0.3, requires_grad=True)
        loss, _ = scale.scale_loss(z, truth, taxonomy, 100.0, 0.07, (1, 1, 1, 1))
        loss.backward()
        assert loss.isfinite() and z.grad.isfinite().all()


@pytest.mark.parametrize("templates", [True, False])
def test_only_the_adapters_train(templates):
    """A frozen feature that moved, or an adapter tensor that did not, would show."""
    taxonomy, _, truth = tiny_problem(12)
    g = torch.Generator().manual_seed(3)
    images, texts = (F.normalize(torch.randn(n, 16, generator=g), dim=1) for n in (12, 6))
    reports = F.normalize(truth.float() @ texts[:5], dim=1)[:0 if templates else 12]
    frozen = images.clone(), texts.clone()
    data = scale.Embedded(images, texts[:5], texts[5], reports, truth, taxonomy, 30.0)
    config, log = scale.Config(epochs=40), []
    before = scale.fit_scale(data, range(12), scale.Config(epochs=0), torch.Generator(), [])[1]
    _, state = scale.fit_scale(data, range(12), config, torch.Generator(), log)
    assert torch.equal(images, frozen[0]) and torch.equal(texts, frozen[1])
    assert len(state) == 6 and all(not torch.equal(before[k], state[k]) for k in state)
    assert len(log) == 40 and log[-1]["loss"] < log[0]["loss"]


# ---- Subsets and metrics -------------------------------------------------------------------------
def test_subsets_are_stratified():
    """Size to the image, every label within one of its share, seeds differ, a seed repeats."""
    rng = np.random.default_rng(0)
    truth = torch.tensor(np.eye(6, dtype=bool)[rng.choice(6, 413, p=[.5, .3, .1, .07, .025, .005])])
    picks = [scale.stratified_subset(truth, 0.1, torch.Generator().manual_seed(seed))
             for seed in (0, 0, 1)]
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
        if exclusive:
            best = np.stack([np.delete(margins.numpy(), k, 1).max(1) for k in range(5)], 1)
            rival = [sk.roc_auc_score(truth[:, k], (margins.numpy() - best)[:, k]) for k in shown]
            assert got["auc_pair"] == pytest.approx(np.mean(rival))
    ties, outcome = torch.tensor(rng.integers(0, 3, 50)), torch.tensor(rng.random(50) < .4)
    assert scale.area_under_curve(ties, outcome) == pytest.approx(sk.roc_auc_score(outcome, ties))


# ---- Derm7p: the format and its traps ------------------------------------------------------------
def test_derm7p_release(tmp_path):
    """Paths in the wrong case, 0-based indices, official splits, classes by expression."""
    rows = write_release(tmp_path / "release_v0")
    data_prep.prepare_derm7p(tmp_path / "release_v0", tmp_path / "data" / "derm7p")
    samples = scale.read_samples(tmp_path / "data" / "derm7p")
    taxonomy = samples.taxonomy
    prompts = [c["prompt"] for task in taxonomy.tasks for c in task["combinations"]]
    assert len(prompts) == 28 and len(taxonomy.tasks) == 7
    assert "A photo of a skin lesion with diffuse irregular pigmentation" in prompts
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


# ---- Embedding and its cache ---------------------------------------------------------------------
class CountingBackbone:
    """Stands for an encoder: a linear map of the pixels; fails at the batch `fail`."""

    def __init__(self, fail=None):
        self.batches, self.fail = 0, fail
        self.map = torch.randn(12, 3 * 16, generator=torch.Generator().manual_seed(0))

    def preprocess(self, image):
        pixels = np.asarray(image.convert("RGB").resize((4, 4)), np.float32)
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def encode_image(self, pixels):
        self.batches += 1
        if self.batches == self.fail:
            raise KeyboardInterrupt
        return pixels.flatten(1) @ self.map.T

    def encode_text(self, texts):
        return torch.tensor([[float(ord(c)) for c in text[:3]] for text in texts])


def test_interrupted_embedding_goes_on(tmp_path):
    """After Ctrl-C only the unfinished batches are computed; a finished cache computes nothing."""
    write_release(tmp_path / "raw")
    images = sorted((tmp_path / "raw" / "images" / "FCL").iterdir())
    whole = scale.embed(CountingBackbone(), images, ["abc"], tmp_path / "whole.safetensors", 8)
    cache = tmp_path / "cut.safetensors"
    with pytest.raises(KeyboardInterrupt):
        scale.embed(CountingBackbone(fail=4), images, ["abc"], cache, 8)
    again = CountingBackbone()
    cut = scale.embed(again, images, ["abc"], cache, 8)
    assert again.batches == 2 and all(torch.equal(a, b) for a, b in zip(whole, cut, strict=True))
    images[0].write_bytes(images[1].read_bytes())  # content decides, not the name
    last = CountingBackbone()
    moved, _ = scale.embed(last, images, ["abc"], cache, 8)
    assert last.batches == 0 and torch.equal(moved[0], moved[1])


# ---- The real commands ---------------------------------------------------------------------------
@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The README's first command, once: (working folder, its stdout)."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, command(folder, "--dataset", "demo", "--frac", "0.05", "--splits", "2")


def command(folder, *flags):
    done = subprocess.run([sys.executable, HERE / "scale.py", *flags], cwd=folder, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    return done


def test_demo_command(demo):
    """Files of every run, a table with every method, the same bytes again without embedding."""
    folder, first = demo
    assert all(method in first.stdout for method in ("zeroshot", "linear-weighted", "scale"))
    run = folder / "runs" / "demo-demo-scale-0.05-s1"
    files = {"config.json", "log.jsonl", "adapter.safetensors", "scores.csv", "metrics.json"}
    assert {path.name for path in run.iterdir()} == files
    assert len((run / "log.jsonl").read_text().splitlines()) == 150
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["n_train"] == 21 and metrics["n_test"] == 395 and len(metrics["per_task"]) == 7
    before = (run / "metrics.json").read_bytes(), (run / "scores.csv").read_bytes()
    (run / "config.json").write_text("of another version")
    again = command(folder, "--dataset", "demo", "--frac", "0.05", "--splits", "2")
    assert again.stdout == first.stdout and "embedding" not in again.stderr
    assert before == ((run / "metrics.json").read_bytes(), (run / "scores.csv").read_bytes())


def test_one_criterion(demo):
    """--criterion keeps one task's prompts and labels, in a run folder of its own."""
    folder, _ = demo
    command(folder, "--dataset", "demo", "--criterion", "pigmentation", "--method", "zeroshot")
    run = folder / "runs" / "demo-demo-zeroshot-1-s0-criterion=pigmentation"
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["per_task"]) == ["pigmentation"] and len(metrics["support"]) == 5


BAD_INPUT = {
    "frac of 0": (["--frac", "0"], None, "--frac"),
    "frac of 2": (["--frac", "2"], None, "--frac"),
    "unknown method": (["--method", "scala"], None, "scala"),
    "unknown criterion": (["--criterion", "colour"], None, "colour"),
    "no data": (["--dataset", "derm7p"], None, "data_prep.py derm7p"),
    "no weights": (["--backbone", "monet"], None, "weights monet"),
    "no such device": (["--device", "cuda:77"], None, "--device cpu"),
    "empty subset": (["--frac", "0.003"], None, "no image"),
    "unknown label": ([], ("samples.csv", "absent streaks", "absent streeks"), "streeks"),
    "unknown split": ([], ("samples.csv", ",train,", ",tran,"), "'tran'"),
    "two labels": ([], ("samples.csv", "absent streaks", "absent streaks;regular streaks"), "2 l"),
    "broken taxonomy": ([], ("taxonomy.json", "tasks", "taskz"), "taxonomy.json"),
    "lost image": ([], ("samples.csv", ".jpg", ".jpeg"), ".jpeg"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input(demo, tmp_path, capsys, monkeypatch, name):
    """One sentence on stderr that names the thing, exit code 2, no traceback, no run folder."""
    flags, change, words = BAD_INPUT[name]
    folder = tmp_path / "data" / "demo"
    folder.mkdir(parents=True)
    for file in ("samples.csv", "taxonomy.json"):
        (folder / file).write_text((demo[0] / "data" / "demo" / file).read_text())
    (folder / "release_v0").symlink_to(demo[0] / "data" / "demo" / "release_v0")
    shutil.copytree(demo[0] / "runs" / "cache", tmp_path / "runs" / "cache")
    if change:
        edit(folder / change[0], *change[1:])
    monkeypatch.chdir(tmp_path)
    assert scale.main(["--dataset", "demo", "--method", "linear", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert words in error[-1] and error[-1].startswith("scale.py: ") and "Traceback" not in error
    assert not list(tmp_path.glob("runs/demo-*"))


def test_truncated_image_keeps_what_is_done(demo, tmp_path):
    """A half JPEG is named, and the images before it stay embedded."""
    source = sorted((demo[0] / "data" / "demo" / "release_v0" / "images").glob("*/*.jpg"))[:20]
    images = [tmp_path / path.name for path in source]
    for path, copy in zip(source, images, strict=True):
        copy.write_bytes(path.read_bytes())
    images[-1].write_bytes(source[-1].read_bytes()[:700])
    backbone, cache = CountingBackbone(), tmp_path / "cache.safetensors"
    with pytest.raises(InputError, match=images[-1].name):
        scale.embed(backbone, images, ["abc"], cache, 8)
    scale.embed(backbone, images[:-4], ["abc"], cache, 8)
    assert backbone.batches == 2


# ---- The promise of size -------------------------------------------------------------------------
def test_budget():
    """Under 2,000 lines of at most 100 columns without the tests, which have at most 700."""
    lines = [line for path in SYSTEM for line in path.read_text().splitlines()]
    tests = (HERE / "test_scale.py").read_text().splitlines()
    assert len(lines) < 2000 and len(tests) <= 700
    assert max(map(len, lines + tests)) <= 100
