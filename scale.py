"""SCALE: supervised contrastive adapters that tell a frozen medical vision-language model not only
the class (nevus, melanoma) but the concept that justifies it (diffuse irregular pigmentation).

Reference implementation of Engelson, Ehrhardt, Handels, SPIE Medical Imaging 2026 (README).

    python scale.py --dataset demo --frac 0.05        # synthetic phantoms, one minute, no download
    python scale.py --dataset derm7p --frac 0.05      # after data_prep.py; MONET in weights/monet
    python scale.py --dataset derm7p --sweep          # every fraction and split; report, figure
    python scale.py --predict a.jpg --run runs/RUN    # the classes of images, and the reasons

It reads in the order in which data flow. `grep -n '^# ----' scale.py` prints its contents,
`grep -n Choice *.py */*.py` every decision that the paper leaves open.

Glossary: name in the code, symbol in the paper, shape
    images           f_image   (N, D)   frozen, unit length, one row an image
    texts            f_text    (H+1, D) frozen, unit length, a row a prompt, "No finding." last
    adapter, alpha   A, alpha           two-layer bottleneck and its learnt mixing weight (Eq. 1)
    a @ b.T          Q         (N, N)   cosine of image i and the text of image j, never formed
    z                Z         (N, H)   cosine of image i and combination h: Q[:, k(h)]
    combination      h, g      H        class-concept combination, "diffuse irregular pigmentation"
    concept, class   l, c      L, C     what h is made of; z_l, z_c are maxima over their h
    task                                one criterion; exclusive: an image shows one combination
    sample                              an image, or an (image, combination) pair if multi-label
    margin                     (N, H)   logit_scale * (z_h - z_"No finding."): what is evaluated
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from safetensors.torch import load_file, save
from torch import nn

from kernels.supcon import all_reduce, product_supcon_loss
from weights import HERE, InputError, reading
from weights.clip import CLIP
from weights.medclip import MedCLIP

LEVELS, SCORES = ("class", "class_concept"), ("accuracy", "recall", "f1", "auc", "auc_pair")

# ---- 1. Settings: every flag, its default, its meaning, the paper's section ----------------------
def flag(value, text, named=True, fits=None):
    """A field that is also a flag; named: it makes another run; fits: (low, high] or pattern."""
    return field(default=value, metadata=dict(help=text + " [%(default)s]", named=named, fits=fits))

@dataclass(frozen=True)
class Config:
    """All settings; `--some-name` on the command line sets `some_name`."""
    dataset: str = flag("", "demo, or a prepared folder: its path, or its name in --data")
    frac: float = flag(1.0, "share of the training images (Sec. 2.3)", True, (0, 1))
    method: str = flag("zeroshot,linear-weighted,scale", "comma list, or all")
    backbone: str = flag("", "name in weights/ or a folder; default: the data set's own", False)
    splits: int = flag(0, "stratified subsets; 0: five, as the paper; one at 1", False, (-1, 1000))
    seed: int = flag(0, "seed of the first subset and of its training", True, (-1, 10**9))
    data: str = flag("data", "where the prepared folders lie", False)
    out: str = flag("runs", "where the runs and the cache of embeddings go", False)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps", False, r"auto|cpu|mps|cuda(:\d+)?")
    dtype: str = flag("float32", "of the encoder; bfloat16 is for GPUs", True, "float32|bfloat16")
    sweep: bool = flag(False, "fractions .05 .1 .25 .5 1; report and figure in --out", False)
    grid: bool = flag(False, "search scale's lambdas on the validation split; prints the best")
    predict: tuple = flag((), "image files: print their classes and what decided them", False)
    card: bool = flag(False, "with --predict: also a PNG an image, with maps of similarity", False)
    retrieve: str = flag("", "text: rank the images of --dataset by similarity to it", False)
    retrieve_image: str = flag("", "likewise by similarity to an image file", False)
    run: str = flag("", "run of scale, for --predict and --retrieve, with its own tasks", False)
    criterion: str = flag("", "restrict to one task, such as pigmentation; default: all, jointly")
    shuffle_labels: float = flag(0.0, "control: share of labels to shuffle", True, (-1e-9, 1))
    text_noise: float = flag(0.0, "share of the texts' words to swap or drop", True, (-1e-9, 1))
    views: int = flag(0, "views of a training image; 0: 8 with reports, else 1", True, (-1, 99))
    epochs: int = flag(150, "passes over the subset (Sec. 2.3.2)", True, (0, 10**6))
    lr: float = flag(1e-3, "learning rate (Sec. 2.3.2)", True, (0, 100))
    batch_size: int = flag(0, "0: all samples up to 1,024, else 256", True, (-1, 10**6))
    width: int = flag(4, "the adapter's bottleneck is D / width (Eq. 1)", True, (0, 10**6))
    alpha: float = flag(0.2, "initial share of the adapter (Eq. 1)", True, (0, .999))
    temperature: float = flag(0.07, "tau of the contrastive terms (Eq. 2)", True, (0, 1000))
    lambdas: str = flag("", "weights of concept, class, rows, columns (Eq. 3); default: 1,1,.1,.1; "
                        "multi-label: 1,1,1,1", True, r"|(\d*\.?\d+(e-?\d+)?(,(?!$)|$)){4}")
    rows: str = flag("unit", "rows of Q in Eq. 2: unit length, or raw as written", True, "unit|raw")
    ce: str = flag("softmax", "entropies of Eq. 3; bce: one for each margin", True, "softmax|bce")
    negative_prompt: str = flag("", "second prompt of the AUC; default: the data set's own")
    named = property(lambda self: {f.name: getattr(self, f.name) for f in fields(self)
                                   if f.metadata["named"]})  # what makes another run

def parse(argv):
    """Command line -> what to call. Errors: argparse's (exit code 2), InputError for bad values."""
    parser = argparse.ArgumentParser(prog="scale.py", description=__doc__.split("\n\n")[0])
    flags = {"--" + f.name.replace("_", "-"): f for f in fields(Config)}
    for name, f in flags.items():
        kind = {bool: {"action": "store_true"}, tuple: {"nargs": "+"}}.get(f.type, {"type": f.type})
        kind |= {"nargs": "?", "const": 1.0} if name == "--shuffle-labels" else {}
        parser.add_argument(name, default=f.default, help=f.metadata["help"], **kind)
    config = Config(**vars(parser.parse_args(argv)))
    for name, f in flags.items():
        value, fits = getattr(config, f.name), f.metadata["fits"]
        if value == [] or isinstance(fits, str) and not re.fullmatch(fits, value):
            raise InputError(f"{name} {value} does not fit, see --help.")  # [] of "--run=--"
        if isinstance(fits, tuple) and not fits[0] < value <= fits[1]:
            raise InputError(f"{name} {value} must be above {fits[0]:g}, at most {fits[1]:g}.")
    other = retrieve if config.retrieve or config.retrieve_image else compare
    return functools.partial(predict if config.predict else other, config)

# ---- 2. A prepared folder: taxonomy.json and samples.csv (README, Data) --------------------------
class Level(NamedTuple):
    """Combinations, concepts or classes of all tasks, side by side as K columns."""
    names: list            # K strings
    own: torch.Tensor      # (T, K) bool: column k belongs to task t
    members: torch.Tensor  # (K, G) the combinations of each column, padded by repeating the first

class Taxonomy(NamedTuple):
    """What is known beforehand: tasks, and which concept and class a combination is made of."""
    spec: dict             # all of taxonomy.json
    tasks: list            # a dict a task: name, exclusive, classes, concepts, combinations
    combination: Level     # H columns
    concept: Level         # L columns
    klass: Level           # C columns

def make_taxonomy(spec):
    """Taxonomy from the content of taxonomy.json; ValueError where names do not fit together."""
    tasks = spec["tasks"]
    combinations = [c for task in tasks for c in task["combinations"]]
    words = [*(spec.get(key, "") for key in ("backbone", "negative_prompt", "root", "note")),
             *(t["name"] for t in tasks), *(c[k] for c in combinations for k in [*c, "prompt"])]
    if any(len({x["name"] for x in part}) < len(part) for part in (tasks, combinations)):
        raise ValueError("names of tasks, and of combinations over all tasks, must be unique")
    if {type(x) for x in words} != {str} or {type(task["exclusive"]) for task in tasks} != {bool}:
        raise ValueError("names, prompts and backbone must be texts, exclusive true or false")
    return Taxonomy(spec, tasks, *(make_level(tasks, *keys) for keys in (
        ("name", None), ("concept", "concepts"), ("class", "classes"))))

def make_level(tasks, part, listed):
    """Columns in the order that tasks list them, each with the combinations it is made of."""
    parts = [(t, task[listed].index(c[part]) if listed else i, c[part])  # ValueError: not listed
             for t, task in enumerate(tasks) for i, c in enumerate(task["combinations"])]
    columns = sorted(set(parts))
    members = [[h for h, other in enumerate(parts) if other == column] for column in columns]
    size = max(map(len, members))
    members = torch.tensor([(row + row[:1] * size)[:size] for row in members])
    own = torch.tensor([t for t, _, _ in columns]) == torch.arange(len(tasks))[:, None]
    return Level([name for _, _, name in columns], own, members)

class Samples(NamedTuple):
    """The images of samples.csv in the file's order, and what is known of them."""
    taxonomy: Taxonomy
    images: list            # N paths
    split: np.ndarray       # (N,) of "train", "valid", "test"
    sentence: torch.Tensor  # (N, H) number of the text that says h of the image; -1: not shown
    texts: list             # S report sentences, none where prompts come from the taxonomy
    def name(self, n):
        """The path of image n from its folder on, and the combinations that it shows."""
        shown = itertools.compress(self.taxonomy.combination.names, self.sentence[n] >= 0)
        return "/".join(self.images[n].parts[-2:]), ";".join(shown)

def find_folder(config):
    """The prepared folder of a data set; `demo` is drawn when it is missing."""
    for folder in (Path(config.data) / config.dataset, Path(config.dataset)):
        if (folder / "samples.csv").is_file():
            return folder
    if config.dataset == "demo":
        from weights.phantoms import prepare_demo
        return prepare_demo(Path(config.data))
    raise InputError(f"--dataset {config.dataset!r} is no prepared folder: write it as the README "
                     "says, or run python data_prep.py derm7p|padchest-gr|chest-xray|busi RAW.")

def read_samples(folder, criterion=""):
    """Samples of a prepared folder (of one task: `criterion`); InputError names the wrong row."""
    mend, table = "see README (Your own data), or run data_prep.py again", folder / "samples.csv"
    with reading(folder / "taxonomy.json", mend):
        taxonomy = make_taxonomy(json.loads((folder / "taxonomy.json").read_text("utf-8-sig")))
        root = folder / taxonomy.spec.get("root", "")
    with reading(table, mend), open(table, newline="", encoding="utf-8-sig") as file:
        names, split, sentence, texts = read_rows(list(csv.DictReader(file, restval="")), taxonomy)
    if criterion:
        tasks = {task["name"]: task for task in taxonomy.tasks}
        if criterion not in tasks:
            raise InputError(f"--criterion {criterion} is none of: {', '.join(tasks)}.")
        sentence = sentence[:, taxonomy.combination.own[list(tasks).index(criterion)]]
        taxonomy = make_taxonomy({**taxonomy.spec, "tasks": [tasks[criterion]]})
    return Samples(taxonomy, [root / name for name in names], split, sentence, texts)

def read_rows(rows, taxonomy):
    """(images, split, sentence, texts) of the rows; ValueError says which row is wrong."""
    names, images, texts, home = taxonomy.combination.names, {}, {}, {}
    for number, row in enumerate(rows, 2):
        labels, split = [name for name in row["labels"].split(";") if name], row["split"]
        if unknown := [name for name in labels if name not in names]:
            raise ValueError(f"row {number}: label {unknown[0]!r} is not in taxonomy.json")
        if split not in ("train", "valid", "test") or not row["image"]:
            raise ValueError(f"row {number}: no image, or split {split!r} not train, valid or test")
        for key in ("image", "patient"):
            if row.get(key) and home.setdefault((key, os.path.normpath(row[key])), split) != split:
                raise ValueError(f"row {number}: {key} {row[key]} is in another split too")
        if bool(row.get("text")) != bool(rows[0].get("text")):
            raise ValueError(f"row {number}: a text must stand in every row or in none")
        text = texts.setdefault(row["text"], len(texts)) if row.get("text") else 0
        images.setdefault(row["image"], {}).update(dict.fromkeys(labels, text))  # of several rows
    split = np.array([home["image", os.path.normpath(image)] for image in images])
    if missing := {"train", "test"} - set(split):
        raise ValueError(f"no row has split {min(missing)}")
    sentence = torch.tensor([[x.get(name, -1) for name in names] for x in images.values()])
    for task, own in zip(taxonomy.tasks, taxonomy.combination.own, strict=True):
        counts = zip(images, (sentence[:, own] >= 0).sum(1).tolist(), strict=True)
        if wrong := [pair for pair in counts if task["exclusive"] and pair[1] != 1]:
            raise ValueError(f"image %s has %s labels of {task['name']!r}, needs one" % wrong[0])
    return list(images), split, sentence, list(texts)

def at_level(values, level):
    """Maximum of each column's combinations: (N, H) -> (N, K); of a truth table: any."""
    return values[:, level.members].amax(-1)

# ---- 3. Stratified subsets for --frac (Sec. 2.3) -------------------------------------------------
def stratified_subset(truth, fraction, generator):
    """Iterative stratification (Sechidis et al. 2011): round(fraction * N) sorted row numbers.
    truth (N, K) bool. The rarest label is dealt out first, each row to the side that wants more."""
    labels, n = truth.numpy(), len(truth)  # Choice: sklearn's way refuses labels with one member
    wanted = labels.sum(0) * np.array([[fraction], [1 - fraction]])  # (2, K)
    room = [round(fraction * n), n - round(fraction * n)]
    chosen, order = np.full(n, -1), torch.randperm(n, generator=generator).numpy()
    while (chosen < 0).any():
        counts = labels[chosen < 0].sum(0)
        rarest = np.where(counts > 0, counts, n + 1).argmin()
        for row in order[(chosen[order] < 0) & (labels[order, rarest] | (counts.sum() == 0))]:
            chosen[row] = side = max(0, 1, key=lambda s: (room[s] > 0, wanted[s, rarest], room[s]))
            wanted[side] -= labels[row]
            room[side] -= 1
    return np.flatnonzero(chosen == 0)

# ---- 4. Frozen embeddings, computed once, cached by content --------------------------------------
def load_backbone(name_or_folder, device="cpu", dtype=torch.float32):
    """Frozen encoder of weights/<name>/ or a folder, a `weights.Backbone`; InputError if unfit."""
    folders = HERE / name_or_folder, Path(name_or_folder)
    folder = next(filter(Path.is_dir, folders), folders[0])
    backbone = (MedCLIP if (folder / "vocab.txt").exists() else CLIP)(folder)  # BERT's vocabulary
    backbone.tensors = {name: w.to(device, dtype) for name, w in backbone.tensors.items()}
    return backbone

def progress(items, total, label):
    """Yield items; show count, rate, time left: redrawn in a terminal, at 1, 2, 4, ... in a log."""
    start, live = time.monotonic(), sys.stderr.isatty()
    for done, item in enumerate(items, 1):
        yield item
        if live or done == total or not done & (done - 1):
            rate = done / (time.monotonic() - start)
            line = f"{label} {done}/{total}, {rate:.1f}/s, {(total - done) / rate:.0f} s left"
            sys.stderr.write(line.ljust(79 * live) + ("\r" if live and done < total else "\n"))

def rotated(items):
    """A list, begun elsewhere by each process of torchrun: they find each other's work in --out."""
    first = len(items) * int(os.environ.get("RANK", 0)) // int(os.environ.get("WORLD_SIZE", 1))
    return items[first:] + items[:first]

def replace_file(path, write):
    """Call write(temporary path), then rename: a file or folder under its final name is whole."""
    unfinished = path.with_name(f".{path.name}.{os.environ.get('RANK', 0)}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write(unfinished)
    with contextlib.suppress(OSError if unfinished.is_dir() else ()):  # another was as fast
        os.replace(unfinished, path)
    shutil.rmtree(unfinished, ignore_errors=True)

def write_files(folder, files):
    """Write {name: text, bytes, picture or rows of a CSV file} to a folder; None: empty cell."""
    for name, data in files.items():
        if isinstance(data, list):
            csv.writer(table := io.StringIO(), lineterminator="\n").writerows(data)
            data = table.getvalue()
        data = data.encode() if isinstance(data, str) else data
        replace_file(folder / name, functools.partial(Path.write_bytes, data=data) if isinstance(
            data, bytes) else functools.partial(data.save, format="PNG"))

def open_image(path):
    """Decode an image completely; InputError names a missing, truncated or foreign file."""
    with reading(path, "restore the image, or leave it out (of samples.csv)"):
        image = Image.open(path)
        if max(image.size) > min(16384, 100 * min(image.size)):
            raise ValueError(f"{image.width} x {image.height} pixels, too long or too narrow")
        image = ImageOps.exif_transpose(image)  # decodes it too
        if image.mode[0] in "IF":  # over 8 bits, which Pillow would clip. Choice: maximum is white
            x = np.asarray(image, np.float32).clip(0)  # int(): an error if NaN or infinite
            image = Image.fromarray(np.uint8((x * (255 / max(x.max(), 1, int(x.max())))).round()))
        return image

def augment(image, view):
    """MedCLIP's training augmentation, seeded by `view`; 0: none. Choice: no left-right flip."""
    if not view:
        return image
    rng, size = np.random.default_rng(view), np.array(image.size)
    white = Image.new("RGBA", image.size, "white")  # behind what is transparent
    image = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB").rotate(
        rng.uniform(-10, 10), translate=tuple(rng.uniform(-1, 1, 2) * size / 16))
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast):
        image = change(image).enhance(rng.uniform(.8, 1.2))
    side = size * 7 / 8 / rng.uniform(.8, 1.1)
    start = (size - side) * rng.uniform(size=2)
    return image.crop(np.hstack([start, start + side]).round().astype(int).tolist())

def add_noise(text, share, rng):
    """The text with each word, at probability `share`, dropped or swapped with the next."""
    words = text.split()
    chance = rng.random(len(words)) / share if share else np.ones(len(words))
    order = np.argsort(np.arange(len(words)) + 1.5 * (chance < 0.5), kind="stable")
    return " ".join(words[at] for at in order if not 0.5 <= chance[at] < 1) if share else text

def digest_file(path, mend="restore it, or leave it out (of samples.csv)"):
    """sha256 of a file's bytes; InputError if it cannot be read."""
    with reading(path, mend), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

def embed(keys, items, folder, load, encode, size=32):
    """Unit features (N, D) of N items; a key, a hash of the content, names each in the cache.
    folder: one checkpoint's cache. What was interrupted goes on in the same batches, to the bit."""
    cache, items = {}, dict(zip(keys, items, strict=True))
    for path in sorted(folder.glob("*.safetensors")):
        with reading(path, "delete it, and run this again"):
            cache |= load_file(path)
    batches = rotated([list(items)[i:i + size] for i in range(0, len(items), size)])
    todo = [batch for batch in batches if not cache.keys() >= set(batch)]
    with ThreadPoolExecutor(4) as pool:  # pairwise: the next is loaded while one is encoded
        loaded = itertools.pairwise(pool.map(load, map(items.get, batch)) for batch in [*todo, []])
        steps = progress(zip(todo, loaded, strict=True), len(todo), f"embedding by {size}, batch")
        for batch, (ready, _) in steps:
            new = [key for key in batch if key not in cache]
            path = folder / (hashlib.sha256("".join(new).encode()).hexdigest() + ".safetensors")
            if not path.exists():  # else another process has been here
                x = dict(zip(batch, F.normalize(encode([*ready]).cpu(), dim=-1), strict=True))
                write_files(folder, {path.name: save({key: x[key] for key in new})})
            cache |= load_file(path)
    return torch.stack([cache[key] for key in keys])

def embed_both(pictures, texts, name, config):
    """Unit features of pictures and texts by backbone `name`, it, and its checkpoint's sha256."""
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    device = own if config.device in ("auto", own[:4]) else config.device
    with reading(f"--device {device}", "try --device cpu"):
        backbone = load_backbone(name, device, getattr(torch, config.dtype))
    checkpoint = digest_file(backbone.path)
    key = checkpoint + json.dumps([backbone.describe(), config.dtype])
    cache = Path(config.out) / "cache" / hashlib.sha256(key.encode()).hexdigest()[:16]
    keys = [hashlib.sha256(b"text:" + text.encode()).hexdigest() for text in texts]
    words = embed(keys, texts, cache, str, lambda batch: torch.cat(
        [backbone.encode_text([text]) for text in batch]))  # alone: none depends on another
    digest = functools.cache(digest_file)  # once for all views
    free = torch.cuda.mem_get_info(device)[0] if "cuda" in device else 2**31
    images = embed([f"{digest(path)}.{view}" for path, view in pictures], pictures, cache,
                   lambda picture: backbone.preprocess(augment(open_image(picture[0]), picture[1])),
                   lambda pixels: backbone.encode_image(torch.stack(pixels)),
                   max(1, min(256, free >> 26)))  # one for each free 64 MiB; 32 on a CPU
    return images, words, backbone, checkpoint

# ---- 5. Adapters (Sec. 2.1, Eq. 1) ---------------------------------------------------------------
class Adapter(nn.Module):
    """Eq. 1: f' = alpha * ReLU(f W1) W2 + (1 - alpha) * f, then unit length. (N, D) -> (N, D)."""
    def __init__(self, dim, hidden, alpha, generator=None):
        super().__init__()
        # Choice: no biases, so that the length of f does not matter, and no outer ReLU (Eq. 1).
        self.down = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(hidden, dim, bias=False)
        for layer in (self.down, self.up):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        # Choice: alpha = sigmoid(free scalar), one per branch; training starts near zero-shot.
        self.alpha_logit = nn.Parameter(torch.tensor(math.log(alpha / (1 - alpha))))

    def forward(self, features):
        """Unit features (N, D) -> adapted unit features (N, D)."""
        adapted = self.up(F.relu(self.down(features)))
        return F.normalize(torch.lerp(features, adapted, self.alpha_logit.sigmoid()), dim=-1)

# ---- 6. The objective (Sec. 2.2, Eq. 2 and 3) ----------------------------------------------------
def positive_weight(truth):
    """(K,) n_neg / n_pos of truth (N, K); 1 where none or all are positive."""
    count = truth.sum(0)
    return ((len(truth) - count) / count).where(count % len(truth) > 0, 1.0)

def cross_entropy(z, truth, level, scale, nothing=None):
    """Softmax cross-entropy within each task, mean over samples and tasks.
    z (N, K): cosines of a level's columns, truth (N, K): one a task, scale: exp(logit_scale).
    With nothing (N, 1), cosines of "No finding.": sigmoid cross-entropy of the margins to it, any
    columns shown, positives weighted against the batch's negatives."""
    if nothing is not None:
        return F.binary_cross_entropy_with_logits(
            scale * (z - nothing), truth.to(z.dtype), pos_weight=positive_weight(truth))
    logits = scale * z
    log_sum = logits[:, None].masked_fill(~level.own, -math.inf).logsumexp(-1)  # (N, T)
    return (log_sum.sum() - (logits * truth).sum()) / log_sum.numel()

def supcon_of_rows(a, b, members, temperature, unit, group=None):
    """L_SupCon(G, Q), Eq. 2: anchors are the rows of Q = a @ b.T; swap a and b for the columns.
    a (T, N, K), b (T, M, K), members (T, N, H): 1 where a sample of task t belongs to h, or sqrt(n)
    where a row stands for n; mean over tasks. Q is not formed: q_i . q_p = a_i (b^T b) a_p^T. With
    prompts, column j of Q is z[:, h_j]: then a = z and b = members say the same, exactly."""
    if a.shape[1] > 512:  # the fused kernel: no N x N matrix; each process of a group has a share
        share = [x.tensor_split(group.size(), 1)[group.rank()] if group else x
                 for x in (a, b, members.argmax(-1))]
        return sum(product_supcon_loss(*x, temperature, unit_rows=unit, group=group)
                   for x in zip(*share, strict=True)) / len(a)
    metric = b.mT @ b
    if unit:  # Choice: rows of unit length, as products of raw ones grow with N
        a = a / (a @ metric * a).sum(-1, keepdim=True).clamp(min=1e-24).sqrt()
    c, times = a @ metric / temperature, members.square().sum(-1)  # (T, N, K), (T, N)
    many, rest = (x.clamp(min=0).log().clamp(min=-1e30) for x in (times, times - 1))  # -1: i itself
    log_sum = torch.baddbmm((rest - many).diag_embed() + many[:, None], c, a.mT).logsumexp(-1)
    count = (members @ members.sum(1)[..., None])[..., 0] - 1  # |P(i)|
    positive = (c * (members @ (members.mT @ a) - a)).sum(-1)
    losses = torch.where(count > 0, log_sum - positive / count.clamp(min=1), 0) * times
    return (losses.sum(1) / (times * (count > 0)).sum(1).clamp(min=1)).mean()

def scale_loss(z, truth, taxonomy, scale, temperature, lambdas, unit, pairs, binary, group=None):
    """Eq. 3: total and {term: value} of cosines z (N, H) and truth (N, H), one combination a task.
    lambdas: the four weights. pairs: (N, D) features of images and of their texts; None: templates.
    binary, for --ce bce: cosines (N, 1) of "No finding." and all that the images show (N, H)."""
    own, (nothing, shown) = taxonomy.combination.own[:, None], binary or (None, truth)
    terms = {name: cross_entropy(at_level(z, x), at_level(shown, x), x, scale, nothing)
             for name, x in (("combination", taxonomy.combination),
                             ("concept", taxonomy.concept), ("class", taxonomy.klass))}
    members = truth * own.to(z.dtype)  # (T, N, H), own (T, 1, H)
    a, b = (x.expand(len(own), -1, -1) for x in pairs) if pairs else (z * own, members)
    terms["rows"] = supcon_of_rows(a, b, members, temperature, unit, group)  # Choice: a term a task
    if not pairs and z.shape[1] <= 512:  # only H columns differ
        b = (members := members.sum(1).sqrt().diag_embed()).sign()  # (T, H, H)
    terms["columns"] = supcon_of_rows(b, a, members, temperature, unit, group)
    return sum(w * term for w, term in zip((1, *lambdas), terms.values(), strict=True)), terms

# ---- 7. Methods: fit(data, rows, config, generator, log) -> (margins_of(rows), state) ------------
@dataclass(frozen=True)
class Embedded:
    """All that a method may see; features have unit length."""
    samples: Samples
    taxonomy: Taxonomy       # of samples, on the device
    views: torch.Tensor      # (N, V, D) of the images, the plain view first
    texts: torch.Tensor      # (H + 1, D) one prompt a combination, and "No finding."
    sentences: torch.Tensor  # (S, D) report sentences; (0, D): the prompts are templates
    sentence: torch.Tensor   # (N, H) which of them says h of image i, or -1
    logit_scale: float       # exp of the checkpoint's logit_scale, frozen (# Choice)
    origin: dict             # backbone, prompts, hashes of checkpoint, embeddings, code
    backbone: object = None  # () -> backbone, for the methods that look into the towers
    group: object = None     # torch.distributed's, of the processes that train a run together
    images = property(lambda self: self.views[:, 0])  # (N, D)

    def pairs(self, rows):
        """(image numbers (P,), truth (P, H)) of a loss's samples: one combination a task."""
        rows, truth = torch.as_tensor(rows), self.sentence[rows] >= 0
        if len(self.taxonomy.tasks) == 1:  # (image, combination) pairs, as Zhang and Wu (2024)
            image, h = truth.nonzero(as_tuple=True)
            return rows[image.cpu()], F.one_hot(h, truth.shape[1]).bool()
        if len(self.sentences) or not all(task["exclusive"] for task in self.taxonomy.tasks):
            raise InputError("tasks of several labels or texts train alone: add --criterion NAME.")
        return rows, truth

    def margins(self, images, texts):
        """(n, H) of unit features (n, D) and (H + 1, D)."""
        return self.logit_scale * images @ (texts[:-1] - texts[-1:]).T

def train(objective, tensors, n, config, generator, log, optimizer=None, towers=False):
    """Minimise objective(batch of sample numbers) -> (loss, {term: value}); log every epoch."""
    optimizer = optimizer or torch.optim.Adam(tensors, config.lr, fused=True)  # Choice: no decay
    # Choice: full batches up to 1,024; of weights of the towers 8, for a tenth of the epochs.
    size = config.batch_size or (8 if towers else n if n <= 1024 else 256)
    epochs, found = max(1, config.epochs // 10) if towers else config.epochs, {}
    def closure(batch):
        """Loss of some samples, and its gradients; L-BFGS asks several times a step."""
        loss, terms = objective(batch)
        optimizer.zero_grad()
        loss.backward()
        found.update(loss=loss, **terms)
        return loss
    for epoch in range(epochs):  # Choice: the last counts, test data select nothing
        start, sums = time.perf_counter(), {}
        for batch in torch.randperm(n, generator=generator).split(size):
            optimizer.step(functools.partial(closure, batch))
            sums = {k: sums.get(k, 0) + x.item() * len(batch) / n for k, x in found.items()}
        log.append({"epoch": epoch, **sums, "seconds": time.perf_counter() - start})

converge = functools.partial(torch.optim.LBFGS, max_iter=10**4, max_eval=10**5, tolerance_grad=1e-9,
                             tolerance_change=1e-12, line_search_fn="strong_wolfe")

def fit_zeroshot(data, rows, config, generator, log):
    """Frozen cosines: nothing is trained."""
    return lambda rows: data.margins(data.images[rows], data.texts), {}

def mix_pairs(truth, generator):
    """A permutation (P,) at random among the samples with the same labels."""
    group = truth.unique(dim=0, return_inverse=True)[1].cpu()
    shuffled = torch.randperm(len(group), generator=generator)
    return shuffled[group[shuffled].argsort(stable=True)][group.argsort(stable=True).argsort()]

def fit_scale(data, rows, config, generator, log):
    """Train two adapters (Fig. 1) by Eq. 3. Choice: one per branch."""
    dim, hidden = data.texts.shape[1], max(1, data.texts.shape[1] // config.width)
    look, read = (Adapter(dim, hidden, config.alpha, generator) for _ in range(2))
    tuned = nn.ModuleDict({"image": look, "text": read}).to(data.texts.device)
    rows, truth = data.pairs(rows)
    for weight in tuned.parameters() if data.group else ():  # each process knows its share
        weight.register_hook(lambda grad: all_reduce(grad, data.group) / data.group.size())
    usual = "1,1,0.1,0.1" if data.taxonomy.tasks[0]["exclusive"] else "1,1,1,1"  # Choice
    lambdas = [*map(float, (config.lambdas or usual).split(","))]
    if config.rows == "raw":
        print("warning: products of raw rows of Q grow with the batch (Eq. 2)", file=sys.stderr)
    def objective(batch):
        """Eq. 3 of some samples, each by one of its views: loss, {term: value}."""
        count = data.views.shape[1]
        view = torch.randint(count, batch.shape, generator=generator) if count > 1 else 0
        images, y = look(data.views[rows[batch], view]), truth[batch]
        bank, pairs, binary = read(data.texts[:-1]), None, None  # (H, D), all prompts
        if len(data.sentences):  # pair mixing: a random sentence of the same combination
            mixed = data.sentence[rows][truth][mix_pairs(truth, generator)[batch]]
            pairs = images, read(data.sentences[mixed])
            first = pairs[1][y.int().argmax(0)]  # k(h): the batch's first text of h;
            bank = first.where(y.any(0)[:, None], bank)  # Choice: its prompt where none is
        if config.ce == "bce":
            binary = images @ read(data.texts[-1:]).T, data.sentence[rows[batch]] >= 0
        return scale_loss(images @ bank.T, y, data.taxonomy, data.logit_scale, config.temperature,
                          lambdas, config.rows == "unit", pairs, binary, data.group)
    train(objective, tuned.parameters(), len(rows), config, generator, log)
    log.append({f"alpha_{name}": a.alpha_logit.sigmoid().item() for name, a in tuned.items()})
    return lambda rows: data.margins(look(data.images[rows]), read(data.texts)), tuned.state_dict()

def fit_linear(data, rows, config, generator, log):
    """Linear probe, binary cross-entropy; but for `linear`, positives weigh n_neg / n_pos."""
    images, truth, optimizer, decay = data.images, data.sentence[rows] >= 0, None, 0
    probe = nn.Linear(images.shape[1], truth.shape[1])
    nn.init.kaiming_uniform_(probe.weight, a=math.sqrt(5), generator=generator)
    nn.init.zeros_(probe.bias)
    if config.method == "linear-zs":  # it starts at zero-shot, as CLAP (Silva-Rodriguez, 2024)
        images = data.logit_scale * images
        probe.weight.data.copy_(data.texts[:-1] - data.texts[-1:])
    if config.method == "linear-lbfgs":  # to the optimum. Choice: C = 100, for unit features
        images, decay = images.cpu().double(), 1 / (200 * truth.numel())
        optimizer = converge(probe.to(images).parameters())
        config = replace(config, epochs=1, batch_size=len(rows))
    weight = None if config.method == "linear" else positive_weight(truth).to(images)
    loss_of = nn.BCEWithLogitsLoss(pos_weight=weight)
    train(lambda batch: (loss_of(probe(images[rows][batch]), truth[batch].to(images))
                         + decay * probe.weight.square().sum(), {}),
          probe.to(images).parameters(), len(rows), config, generator, log, optimizer)
    return lambda rows: probe(images[rows]), probe.state_dict()

def fit_coop(data, rows, config, generator, log):
    """CoOp (Zhou et al., 2022): 16 learnt vectors before each name, through the frozen tower."""
    backbone, (rows, truth) = data.backbone(), data.pairs(rows)
    names = [*data.taxonomy.combination.names, data.origin["prompts"][-1]]
    tokens, lengths = (x.to(data.texts.device) for x in backbone.tokenize(names))
    words = backbone.word_table[tokens]  # (H + 1, L, W)
    room = min(16, backbone.context - words.shape[1])
    context = (.02 * torch.randn(room, words.shape[2], generator=generator)).to(words)
    # Choice: momentum .9, decay 5e-4, an epoch at a hundredth of the rate, then a cosine.
    optimizer = torch.optim.SGD([context.requires_grad_()], config.lr, .9, weight_decay=5e-4)
    def read():
        """Unit features (H + 1, D) of the names after the learnt vectors."""
        prompts = torch.cat([words[:, :1], context.expand(len(words), -1, -1), words[:, 1:]], 1)
        return F.normalize(backbone.text_tower(backbone.tensors, prompts, lengths + room), dim=-1)
    def objective(batch):
        """Cross-entropy of some samples, at the epoch's rate."""
        rate = .5 + .5 * math.cos(math.pi * len(log) / config.epochs) if log else .01
        optimizer.param_groups[0]["lr"] = config.lr * rate
        z = data.images[rows[batch]] @ read()[:-1].T
        return cross_entropy(z, truth[batch], data.taxonomy.combination, data.logit_scale), {}
    train(objective, [context], len(rows), config, generator, log, optimizer)
    return lambda rows: data.margins(data.images[rows], read()), {"context": context}

def towers(data, backbone, tuned):
    """look and read, () -> (H + 1, D) of prompts, with tuned() for some of the tensors."""
    tokens, lengths = (x.to(data.texts.device) for x in backbone.tokenize(data.origin["prompts"]))
    decode = functools.lru_cache(4096)(  # once a run; 2.5 GB at 224 x 224
        lambda row: backbone.preprocess(open_image(data.samples.images[row])))
    def look(rows, every_token=False):
        """Unit features (n, D) of images, or (n, L, D) of their patches."""
        w, parts = backbone.tensors | tuned(), torch.as_tensor(rows).split(64)
        pixels = (torch.stack([decode(row) for row in part.tolist()]) for part in parts)
        x = torch.cat([backbone.image_tower(w, x.to(tokens.device), every_token) for x in pixels])
        return F.normalize(x, dim=-1)
    return look, lambda: F.normalize(
        backbone.text_tower(backbone.tensors | tuned(), tokens, lengths), dim=-1)

def fit_lora(data, rows, config, generator, log):
    """LoRA (Hu et al., 2022), rank 4, of the query and value projections of both towers."""
    backbone, (rows, truth), factors = data.backbone(), data.pairs(rows), {}
    for name, w in backbone.tensors.items():
        if re.search(r"(q_proj|v_proj|query|value)\.weight$", name):
            down = torch.randn(4, w.shape[1], generator=generator) / w.shape[1] ** .5
            factors[name] = [x.to(w).requires_grad_() for x in (torch.zeros(len(w), 4), down)]
    look, read = towers(data, backbone, lambda: {
        name: backbone.tensors[name] + up @ down for name, (up, down) in factors.items()})
    state = {f"{name}.{i}": x for name, pair in factors.items() for i, x in enumerate(pair)}
    train(lambda batch: (cross_entropy(look(rows[batch]) @ read()[:-1].T, truth[batch],
                                       data.taxonomy.combination, data.logit_scale), {}),
          state.values(), len(rows), config, generator, log, towers=True)
    return lambda rows: data.margins(look(rows), read()), state

def fit_hica(data, rows, config, generator, log):
    """HiCA (arXiv 2501.09294) in two stages, as far as its abstract tells; the rest is a Choice."""
    backbone, (rows, truth), scale = data.backbone(), data.pairs(rows), data.logit_scale
    combination, klass = data.taxonomy.combination, data.taxonomy.klass
    tuned = {name: w.clone().requires_grad_() for name, w in backbone.tensors.items()
             if name.startswith(backbone.last_block) or re.match("text.*projection", name)}
    look, read = towers(data, backbone, lambda: tuned)
    features = data.images[rows]
    centres = features[torch.randperm(len(rows), generator=generator)[:len(klass.names)]]
    for _ in range(20):  # steps of k-means on the sphere
        nearest = F.one_hot((features @ centres.T).argmax(1), len(centres)).to(features.dtype)
        centres = F.normalize(nearest.T @ features, dim=1)
    same = klass.own.float().T @ klass.own.float()  # (C, C) classes of one task
    def first(batch):
        """Images learn k-means pseudo-labels, prompts to be told apart."""
        texts, labels = read(), (data.images[rows[batch]] @ centres.T).argmax(1)
        apart = (scale * texts @ texts.T).log_softmax(1).diagonal().mean()
        return F.cross_entropy(scale * look(rows[batch]) @ centres.T, labels) - apart, {}
    def second(batch):
        """L_global + L_local, of each prompt's best patch, + L_cross, a margin of classes."""
        texts, y = read()[:-1], truth[batch]
        z, patches = (look(rows[batch], every) @ texts.T for every in (False, True))
        best, shown = scale * at_level(z, klass), at_level(y, klass)  # (n, C)
        gap = F.relu(1 + best - (best * shown) @ same)  # to the class shown of the same task
        terms = {"global": cross_entropy(z, y, combination, scale),
                 "local": cross_entropy(patches.amax(1), y, combination, scale),
                 "cross": gap.where(~shown, 0).sum(1).mean()}
        return sum(terms.values()), terms
    for stage in (first, second):
        train(stage, tuned.values(), len(rows), config, generator, log, towers=True)
    return lambda rows: data.margins(look(rows), read()), tuned

METHODS = {"clip-zeroshot": fit_zeroshot, "zeroshot": fit_zeroshot, "linear": fit_linear,
           "linear-weighted": fit_linear, "linear-zs": fit_linear, "linear-lbfgs": fit_linear,
           "coop": fit_coop, "lora": fit_lora, "hica": fit_hica, "scale": fit_scale}

# ---- 8. Metrics (Sec. 2.3.2) ---------------------------------------------------------------------
def area_under_curve(score, truth):
    """(K,) areas under the ROC curves of score, truth (N, K), a tie is half; nan if undefined."""
    score, truth = score.T.contiguous(), truth.T  # (K, N)
    others = score.masked_fill(truth, math.inf).sort().values  # the negatives first
    beaten = sum(torch.searchsorted(others, score, right=ties) for ties in (False, True))  # twice
    return (beaten * truth).sum(1).double() / (2 * truth.sum(1) * (~truth).sum(1))

def score_task(margins, truth, exclusive, skip=0):
    """Accuracy, macro recall, macro F1, AUC of one task at one level, each in [0, 1] or nan.
    margins, truth (N, K). Exclusive: arg-max decides; else margin > 0, a two-prompt probability
    above 0.5. Choice: macro means run over the columns that the test set shows; predicting another
    still costs recall. AUC: of the margin to "No finding.", mean over all but `skip` columns;
    auc_pair: of that to the best other column, as nothing trains "No finding." here."""
    decided = F.one_hot(margins.argmax(1), truth.shape[1]).bool() if exclusive else margins > 0
    hits, shown = (decided & truth).sum(0), truth.sum(0)
    # Choice: plain accuracy (per binary label where labels do not exclude one another).
    scores = {"accuracy": (decided & truth).any(1) if exclusive else decided == truth,
              "recall": (hits / shown)[shown > 0],
              "f1": (2 * hits / (decided.sum(0) + shown))[shown > 0],
              "auc": area_under_curve(margins, truth)[skip:]}
    if exclusive:
        top = margins.topk(min(2, len(shown)), 1).values
        rival = top[:, :1].where(margins < top[:, :1], top[:, -1:])
        scores["auc_pair"] = area_under_curve(margins - rival, truth)[skip:]
    return {name: values.double().nanmean().item() for name, values in scores.items()}

def evaluate(margins, truth, trained, taxonomy):
    """All numbers of metrics.json. margins, truth (N, H) of the test set, trained (n, H) truth."""
    per_task, means = {task["name"]: {} for task in taxonomy.tasks}, {name: {} for name in LEVELS}
    for name, level in zip(LEVELS, (taxonomy.klass, taxonomy.combination), strict=True):
        for task, own in zip(taxonomy.tasks, level.own, strict=True):
            # Choice: of two exclusive classes, the AUC is that of the second, such as melanoma.
            second = name == "class" and task["exclusive"] and own.sum() == 2
            values = (at_level(x, level)[:, own] for x in (margins, truth))
            per_task[task["name"]][name] = score_task(*values, task["exclusive"], int(second))
    for name, score in itertools.product(LEVELS, SCORES):
        values = [task[name].get(score, math.nan) for task in per_task.values()]
        means[name][score] = torch.tensor(values, dtype=torch.double).nanmean().item()
    return {**means, "per_task": per_task, "n_train": len(trained), "n_test": len(truth),
            "support": {name: {"train": trained.sum(0)[h].item(), "test": truth.sum(0)[h].item()}
                        for h, name in enumerate(taxonomy.combination.names)}}

# ---- 9. Runs: one folder per method, fraction and split ------------------------------------------
def run_folder(config, origin):
    """<out>/<dataset>-<backbone>-<method>-<frac>-s<seed>, and every setting off its default."""
    plain = Config(config.dataset, config.frac, config.method, seed=config.seed).named
    changed = [f"{name}={x}" for name, x in config.named.items() if x != plain[name]]
    name = "-".join([Path(config.dataset).resolve().name, Path(origin["backbone"]).name,
                     config.method, f"{config.frac:g}", f"s{config.seed}", *changed])
    return Path(config.out) / "".join(c if c.isalnum() or c in ".,=_-" else "_" for c in name)

def load_adapters(folder):
    """The adapters (image, text) of a run of scale."""
    state = reading(folder, "delete it, run again")(load_file)(folder / "adapter.safetensors")
    look, read = (Adapter(*state[f"{x}.up.weight"].shape, 0.5) for x in ("image", "text"))
    nn.ModuleDict({"image": look, "text": read}).requires_grad_(False).load_state_dict(state)
    return look, read

def run_once(config, data):
    """Train and evaluate one method on one split; return what metrics.json holds.
    A run whose config.json (settings, data.origin, rows) is the same to the byte is only read."""
    samples, generator = data.samples, torch.Generator().manual_seed(config.seed)
    train, test = (np.flatnonzero(samples.split == part)
                   for part in ("train", "valid" if config.grid else "test"))
    classes = at_level(truth := samples.sentence >= 0, samples.taxonomy.klass)
    rows = train[stratified_subset(torch.cat([truth, classes], 1)[train], config.frac, generator)]
    folder, seen = run_folder(config, data.origin), {"train_rows": rows.tolist()}
    settings = json.dumps(config.named | data.origin | seen, indent=1)
    new = not ((old := folder / "config.json").is_file() and old.read_text("latin-1") == settings)
    if all_reduce(data.texts.new_tensor(new), data.group):  # trained by all if one of them has to
        shutil.rmtree(folder, ignore_errors=True)  # of other settings or code
        for missing in itertools.compress(samples.taxonomy.klass.names, ~classes[rows].any(0)):
            raise InputError(f"class {missing!r} has none of the {len(rows)} training images of "
                             f"seed {config.seed}: raise --frac, or add images to split train.")
        if config.shuffle_labels:
            sentence, order = data.sentence.clone(), torch.randperm(len(rows), generator=generator)
            mixed = rows[order[:round(config.shuffle_labels * len(rows))]]
            sentence[mixed] = sentence[np.roll(mixed, 1)]
            data = replace(data, sentence=sentence)
        margins_of, state = METHODS[config.method](data, rows, config, generator, log := [])
        with torch.no_grad():
            margins = margins_of(test).float().cpu()
        if not margins.isfinite().all():
            raise InputError(f"{folder.name}: training diverged; lower --lr.")
        metrics = evaluate(margins, truth[test], truth[rows], samples.taxonomy)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        scores = [[*samples.name(n), *map("{:.6g}".format, values)]
                  for n, values in zip(test, margins.tolist(), strict=True)]
        if not (data.group and data.group.rank()):  # the others wait for what the first writes
            replace_file(folder, functools.partial(write_files, files={
                "config.json": settings, "adapter.safetensors": save(state, {"config": settings}),
                "scores.csv": [["image", "labels", *samples.taxonomy.combination.names], *scores],
                "log.jsonl": "".join(json.dumps(line) + "\n" for line in log),
                "metrics.json": json.dumps(metrics, indent=1).replace("NaN", "null") + "\n"}))
        all_reduce(data.texts.sum(), data.group).item()  # a barrier
    return reading(folder, "delete it, run again")(json.load)(open(folder / "metrics.json"))

# ---- 10. Tables and figure (Table 1, Fig. 2 and 3), as plain SVG ---------------------------------
OKABE_ITO = "#0072b2 #d55e00 #000 #56b4e9 #009e73 #e69f00 #777 #b8a400 #cc79a7".split()
SHAPES = "m-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "m-4-4h8v8h-8z", "m0-5 5 5-5 5-5-5z", "m0-5 5 9h-10z"
SVG = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1350 800" font-size="15" fill="#222" '
       'font-family="sans-serif"><path fill="#fff" d="M0 0H1350V800H0z"/>\n{}\n</svg>\n')
TEXT = '<text x="{:.1f}" y="{:.1f}">{}</text>'

def spread(results, frac, method, level, score):
    """Mean and standard deviation over the splits that define a score."""
    values = [m[level][score] for c, m in results if (c.frac, c.method) == (frac, method)
              and m[level][score] is not None] or [math.nan]
    return np.mean(values), np.std(values, ddof=1) if values[1:] else 0.0

def format_table(results, frac):
    """Mean ±sd over splits in Markdown, a line per level and method; then which method leads."""
    methods = dict.fromkeys(c.method for c, _ in results)
    row = "| {:13} | {:15} |" + " {:10} |" * len(SCORES)
    lines = [row.format(f"at {frac * 100:g}%", "method", *SCORES), "|---|---|" + "--:|" * 5]
    for level, method in itertools.product(LEVELS, methods):
        cells = (spread(results, frac, method, level, score) for score in SCORES)
        lines.append(row.format(level, method, *("{:.2f} ±{:.2f}".format(*c) for c in cells)))
    best = max(methods, key=lambda m: spread(results, frac, m, "class_concept", "f1")[0])
    lines.append(f"\nAt {frac * 100:g}% of the training images {best} leads in class-concept F1.")
    return "\n".join(lines).replace(" ±0.00", "      ").replace("nan ", "-   ")

def write_report(config, results, tables, data):
    """<out>/report-<dataset>: results.csv (a line a run), report.md, figures."""
    name, columns = Path(config.dataset).resolve().name, list(itertools.product(LEVELS, SCORES))
    rows = [["method", "frac", "seed", "n_train", "n_test", *map("_".join, columns)]]
    rows += [[c.method, c.frac, c.seed, m["n_train"], m["n_test"], *(m[a][b] for a, b in columns)]
             for c, m in results]
    text = [f"# Results on {name}", "![mean ±sd over splits](figures/scores.svg)", *tables, ""]
    ours = [m["per_task"].get("pigmentation") for c, m in results if c.method == "zeroshot"]
    if name == "derm7p" and any(ours):
        ours = " / ".join(f"{ours[0][level]['accuracy']:.2f}" for level in LEVELS)
        text[0] += f"\n\nTable 1, pigmentation, accuracy of zeroshot: paper .59 / .29, here {ours}."
    files = {"figures/scores.svg": draw_scores(results), "results.csv": rows}
    for run in [run_folder(c, data.origin) for c, _ in results if c.method == "scale"][-1:]:
        files["figures/texts.svg"] = draw_texts(data, load_adapters(run)[1].to(data.texts.device))
        text[1] += "\n\n![t-SNE of the texts before and after](figures/texts.svg)"
    write_files(Path(config.out) / f"report-{name}", files | {"report.md": "\n\n".join(text)})

def tsne(x):
    """Exact t-SNE (van der Maaten and Hinton, 2008) of x (N, D): its KL divergence, map (N, 2)."""
    x, perplexity = x.double(), min(30, (len(x) + 2) / 3)
    d, beta = torch.cdist(x, x).square().fill_diagonal_(math.inf), x.new_zeros(len(x), 1)
    for step in 16 * 0.5 ** torch.arange(40):  # until each row has the entropy log(perplexity)
        p = (-d * beta.exp()).softmax(1)
        beta += step * (torch.special.entr(p).sum(1, True) - math.log(perplexity)).sign()
    i, j = torch.triu_indices(len(x), len(x), 1)
    p = (p + p.T)[i, j] / len(x)
    u, s, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    y = F.pad(u * (s / s.amax().clamp(min=1e-9)), (0, 1))[:, :2].mul_(len(x) ** .5).requires_grad_()
    def kl():
        """KL divergence from p of the map's closeness, by Student's t."""
        return F.kl_div((-(y[i] - y[j]).square().sum(1).log1p()).log_softmax(0), p, reduction="sum")
    train(lambda _: (kl(), {}), [y], 1, Config(epochs=1), None, [], converge([y], max_iter=1000))
    return kl().item(), y.detach()

def draw_series(i, points, title):
    """Series i: a line through points (x, y, error), their marks; title shows on hover."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    marks = "".join(f"M{x:.1f} {y - error:.1f}v{2 * error:.1f}m0 {-error:.1f}{SHAPES[i % 4]}"
                    for x, y, error in points)
    return (f'<g stroke="{OKABE_ITO[i % 9]}" fill="{(OKABE_ITO[i % 9], "#fff")[i // 4 % 2]}">'
            f'<polyline fill="none" points="{line}"/><path stroke-width="1.5" d="{marks}"/>'
            f'<title>{title}</title></g>')

def draw_mark(i, x, y, name, lower=5):
    """A mark of series i, and its name beside it, with the baseline so many pixels lower."""
    return [draw_series(i, [(x, y, 0)], escape(name)), TEXT.format(x + 9, y + lower, escape(name))]

def draw_texts(data, read):
    """SVG like Fig. 4: t-SNE of prompts and 999 sentences, frozen, adapted; a colour a class."""
    known = [(c["class"], c["name"]) for task in data.taxonomy.tasks for c in task["combinations"]]
    shown, parts = (data.sentence >= 0) & (len(data.sentences) > 0), []
    s, h = torch.stack([data.sentence[shown], shown.nonzero()[:, 1]]).unique(dim=1)[:, :999]
    texts = torch.cat([data.texts[:-1], data.sentences[s]])
    owners, classes = known + [known[i] for i in h.tolist()], sorted({kind for kind, _ in known})
    for left, title, x in ((25, "frozen", texts), (675, "adapted", read(texts))):
        kl, y = tsne(x.cpu())
        y = (y - y.amin(0)) / (y.amax(0) - y.amin(0)).clamp(min=1e-9) * torch.tensor([465, 660])
        taken = [(u - 14, v + 5, 10) for u, v in y[:len(known)].tolist()]  # by the marks
        parts.append(TEXT.format(left, 30, f"{title}; KL divergence of the map {kl:.3f}"))
        for i, kind in enumerate(classes):
            parts += draw_mark(i, left + i % 4 * 155, 48 + i // 4 * 16, kind)
        for k, ((kind, name), (u, v)) in enumerate(zip(owners, y.tolist(), strict=True)):
            named, n, lower = k < len(known), 7 * len(name), 5  # sentences are not named
            while named and any(a - n < u < a + m and abs(v + lower - b) < 13 for a, b, m in taken):
                lower = (23 if lower < 6 else 10) - lower  # 5, 18, -8, 31, ...
            taken.append((u, v + lower, n))
            parts += draw_mark(classes.index(kind), left + u, 100 + v, name, lower)[:1 + named]
    return SVG.format("\n".join(['<g font-size="12">', *sorted(parts, reverse=True), "</g>"]))

def draw_scores(results):
    """SVG like Fig. 2 and 3: mean ±sd by fraction; a line's title holds its runs' numbers."""
    methods = dict.fromkeys(c.method for c, _ in results)
    fractions = sorted({c.frac for c, _ in results})
    parts, wide = [], 290 / len(fractions)
    for i, method in enumerate(methods):
        parts += draw_mark(i, 60 + i % 5 * 250, 24 + i // 5 * 22, method)
    axes = [TEXT.format(wide * (j + .5) - 14, 20, f"{x * 100:g}%") for j, x in enumerate(fractions)]
    for k in range(6):
        axes += [f'<path stroke="#ddd" d="M0 {-60 * k}h290"/>', TEXT.format(-30, 5 - 60 * k, k / 5)]
    for n, (level, score) in enumerate(itertools.product(LEVELS, SCORES[:4])):
        parts += [f'<g transform="translate({45 + n % 4 * 330} {400 + n // 4 * 360})">', *axes,
                  TEXT.format(0, -312, f"{level} {score}")]
        for i, method in enumerate(methods):
            spreads = (spread(results, frac, method, level, score) for frac in fractions)
            points = [(wide * (j + 0.1 + 0.8 * (i + 0.5) / len(methods)), -300 * mean, 300 * sd)
                      for j, (mean, sd) in enumerate(spreads) if mean == mean]
            told = [f"{c.frac}, seed {c.seed}, {m['n_train']} + {m['n_test']} images: "
                    f"{[v for key, v in m[level].items() if key.startswith(score)]}"
                    for c, m in results if c.method == method]
            parts.append(draw_series(i, points, "\n".join([method, *told])))
        parts.append("</g>")
    return SVG.format("\n".join(parts))

def as_picture(pixels):
    """PIL image of what a tower sees: pixels (3, H, W) of any range."""
    x = (pixels - pixels.amin()) / (pixels.amax() - pixels.amin()).clamp(min=1e-9)
    return Image.fromarray((255 * x).round().byte().permute(1, 2, 0).numpy())

def draw_card(pixels, maps, reasons):
    """PIL image of a prediction, a row a task: what was seen; where (maps (T, L) of L patches) it
    is similar to the deciding combination; classes; combinations, bars from -0.5 to 0.5."""
    card, seen = Image.new("RGB", (800, 130 * len(reasons)), "#fff"), as_picture(pixels)
    pen, side = ImageDraw.Draw(card), int(maps.shape[1] ** 0.5)
    for y, (task, x), heat in zip(itertools.count(5, 130), reasons.items(), maps, strict=False):
        for left in (5, 130):
            card.paste(seen.resize((120, 120), 3), (left, y))
        heat = as_picture(heat.view(1, side, side).expand(3, -1, -1)).resize((120, 120), 3)
        card.paste(OKABE_ITO[1], (130, y), heat.convert("L").point(lambda v: 0.7 * v))
        head = f"{task}: {listed(x['classes'])}"
        pen.text((260, y), head, "#222", font_size=min(17, 1160 / len(head)))
        for top, (name, v) in zip((y + 28, y + 74), x["decided_by"].items(), strict=False):
            pen.text((260, top), f"{name} {v['similarity']:.2f}", "#222", font_size=15)
            pen.rectangle((260, top + 22, 790, top + 34), "#ddd")
            ends = sorted((525, 525 + 530 * max(-0.5, min(0.5, v["similarity"]))))
            pen.rectangle((ends[0], top + 22, ends[1], top + 34), OKABE_ITO[0])
    return card

# ---- 11. Commands: predictions with reasons, by a finished run; comparisons, by all methods ------
def explain(cosines, taxonomy, logit_scale):
    """{task: its class probabilities, two deciding combinations} of cosines (H + 1,)."""
    z, margins, told = cosines[:-1], logit_scale * (cosines[:-1] - cosines[-1]), {}
    said = {"similarity": z, "two_prompt_probability": margins.sigmoid()}
    level, classes = taxonomy.combination, taxonomy.klass
    for task, own, klass in zip(taxonomy.tasks, level.own, classes.own, strict=True):
        shares = at_level(margins[None], classes)[0, klass]
        shares = (shares.softmax(0) if task["exclusive"] else shares.sigmoid()).tolist()
        names = itertools.compress(classes.names, klass)
        told[task["name"]] = {
            "classes": {name: round(p, 4) for name, p in zip(names, shares, strict=True)},
            "decided_by": {level.names[h]: {k: round(x[h].item(), 4) for k, x in said.items()}
                           for h in z.where(own, -math.inf).topk(min(2, own.sum())).indices}}
    return told

def embed_adapted(config, paths, texts=()):
    """By the run in --run: its taxonomy, image adapter, adapted features (N, D) of images and
    (H + 1 + S, D) of its own prompts and S texts, its backbone. InputError if that changed."""
    with reading(f"--run {config.run}", "name the folder of a finished run of --method scale"):
        stored = json.loads((Path(config.run) / "config.json").read_text())
        taxonomy = make_taxonomy(stored["taxonomy"])
        if len(stored["prompts"]) != len(taxonomy.combination.names) + 1:
            raise ValueError("as many prompts as combinations, and one, are needed")
        look, read = load_adapters(Path(config.run))
        images, words, backbone, checkpoint = embed_both([(path, 0) for path in paths], [
            *stored["prompts"], *texts], stored["backbone"], replace(config, dtype=stored["dtype"]))
        if checkpoint != stored["checkpoint_sha256"]:
            raise InputError(f"{backbone.path} is not what {config.run} learnt on: train again.")
        return taxonomy, look, look(images), read(words), backbone

def listed(values):
    """Names and values, to two places, as a text."""
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())

def predict(config):
    """Print, and write to <out>/predictions.json, the classes of images and what decided them."""
    taxonomy, look, images, texts, backbone = embed_adapted(config, config.predict)
    files, results = {}, {}
    for n, (path, z) in enumerate(zip(config.predict, images @ texts.T, strict=True)):
        results[path] = reasons = explain(z, taxonomy, backbone.logit_scale)
        for task, x in reasons.items():
            why = listed({name: v["similarity"] for name, v in x["decided_by"].items()})
            print(f"{path} {task}: {listed(x['classes'])}; similar to {why}")
        if config.card:
            pixels = backbone.preprocess(open_image(path))[None].to(backbone.word_table)
            patches = look(F.normalize(backbone.image_tower(
                backbone.tensors, pixels, True)[0].float().cpu()))  # (L, D)
            best = ([*x["decided_by"]][0] for x in reasons.values())
            maps = texts[[*map(taxonomy.combination.names.index, best)]] @ patches.T  # (T, L)
            card = draw_card(pixels[0].float().cpu(), maps, reasons)
            files[f"cards/{n}-{Path(path).stem}.png"] = card
    write_files(Path(config.out), files | {"predictions.json": json.dumps(results, indent=1)})

def retrieve(config):
    """Rank images by similarity to a text, an image or both: <out>/retrieved.csv; a sheet, .png."""
    samples, texts = read_samples(find_folder(config)), [config.retrieve] * bool(config.retrieve)
    paths = samples.images + [config.retrieve_image] * bool(config.retrieve_image)
    _, _, images, words, _ = embed_adapted(config, paths, texts)
    asked = torch.cat([words[len(words) - len(texts):], images[len(samples.images):]]).mean(0)
    similarity, order = (images[:len(samples.images)] @ asked).sort(descending=True, stable=True)
    ranked = enumerate(zip(similarity.tolist(), order.tolist(), strict=True), 1)
    rows = [[rank, samples.images[n], f"{x:.4f}", samples.name(n)[1]] for rank, (x, n) in ranked]
    print(*(f"{rank}. {path} {x}: {labels}" for rank, path, x, labels in rows[:5]), sep="\n")
    sheet = Image.new("RGB", (1020, math.ceil(len(rows[:24]) / 6) * 190), "#fff")
    for n, (rank, path, x, _) in enumerate(rows[:24]):
        at = n % 6 * 170, n // 6 * 190
        sheet.paste(ImageOps.contain(open_image(path).convert("RGB"), (165, 165)), at)
        ImageDraw.Draw(sheet).text((at[0], at[1] + 168), f"{rank}. {x}", "#222", font_size=14)
    write_files(Path(config.out), {"retrieved.png": sheet, "retrieved.csv": [
        ["rank", "image", "similarity", "labels"], *rows]})

def embed_dataset(config):
    """Everything that all runs share: Embedded, on the device."""
    samples = read_samples(find_folder(config), config.criterion)
    spec = samples.taxonomy.spec
    name = config.backbone or spec.get("backbone") or "monet"
    prompts = [c["prompt"] for task in spec["tasks"] for c in task["combinations"]]
    prompts.append(config.negative_prompt or spec.get("negative_prompt", "No finding."))
    noisy = functools.partial(add_noise, share=config.text_noise, rng=np.random.default_rng(0))
    prompts[:-1], texts = map(noisy, prompts[:-1]), [*map(noisy, samples.texts)]
    count = config.views or (8 if texts else 1)
    views = [(path, view if part == "train" else 0) for path, part in
             zip(samples.images, samples.split, strict=True) for view in range(count)]
    images, words, backbone, checkpoint = embed_both(views, prompts + texts, name, config)
    content = [np.asarray(x) for x in (images, words, samples.sentence, samples.split)]
    content += [(HERE.parent / file).read_bytes() for file in ("scale.py", "kernels/supcon.py")]
    with backbone.word_table.device as device:
        taxonomy = make_taxonomy(spec)
    origin = {"backbone": name, "checkpoint_sha256": checkpoint, "prompts": prompts,
              "data_and_code_sha256": hashlib.sha256(b"".join(content)).hexdigest(),
              "taxonomy": spec, "device": device.type, "torch": torch.__version__}
    tensors = images.unflatten(0, (-1, count)), words[:len(prompts)], words[len(prompts):]
    return Embedded(samples, taxonomy, *(x.to(device) for x in (*tensors, samples.sentence)),
                    backbone.logit_scale, origin, functools.partial(load_backbone, name, device))

def start_worker():
    """One thread, as a second is slower on small matrices; the end if the main process dies."""
    torch.set_num_threads(1)
    torch.multiprocessing._prctl_pr_set_pdeathsig(9)

def run_all(jobs, given):
    """[(job, metrics)] of configurations, each with its Embedded, by a process a core. Those of
    torchrun divide them; runs with large batches, if fewer than they, they train together."""
    data = dict(zip(jobs, given, strict=True))
    large = [job for job in jobs for n in [job.frac * sum(data[job].samples.split == "train")]
             if job.method == "scale" and 512 < min(n, job.batch_size or (n if n <= 1024 else 256))]
    large *= len(large) < int(os.environ.get("WORLD_SIZE", 1))
    mine = rotated([job for job in jobs if job not in large][::-1])  # of many images first
    with ProcessPoolExecutor(min(32, os.cpu_count()), None, start_worker) as pool:
        results = (pool.map if given[0].images.is_cpu else map)(run_once, mine, map(data.get, mine))
        done = dict(zip(mine, progress(results, len(mine), "run"), strict=True))
    if large:
        reading("WORLD_SIZE", "use torchrun")(torch.distributed.init_process_group)()
        for job in progress(large, len(large), "run by all"):
            done[job] = run_once(job, replace(data[job], group=torch.distributed.group.WORLD))
        torch.distributed.destroy_process_group()
    return [(job, done[job]) for job in jobs]

def compare(config):
    """The methods on all splits of one fraction or all, as tables; with --grid the best lambdas."""
    every = [*METHODS][not any((HERE / "clip").glob("*.safetensors")):]  # the first needs it
    names = every if config.method == "all" else [*dict.fromkeys(config.method.split(","))]
    for name in set(names) - METHODS.keys():
        raise InputError(f"--method {name} is none of: {', '.join(METHODS)}.")
    data, weights = embed_dataset(config), [config.lambdas]
    if config.grid:
        if not (data.samples.sentence[data.samples.split == "valid"] >= 0).any():
            raise InputError(f"--grid: {config.dataset} has no labels in split valid.")
        names, weights = ["scale"], [*map(",".join, itertools.product(["1", ".1", "0"], repeat=4))]
    other = embed_dataset(replace(config, backbone="clip")) if "clip-zeroshot" in names else data
    fractions = (.05, .1, .25, .5, 1.) if config.sweep else (config.frac,)
    jobs = [replace(config, method=name, frac=frac, lambdas=lambdas, seed=config.seed + split)
            for frac in fractions for name in names for lambdas in weights
            for split in range(config.splits or (1 if frac == 1 else 5))]
    runs = run_all(jobs, [other if "clip" in job.method else data for job in jobs])
    if config.grid:
        f1 = {w: np.mean([m[LEVELS[1]]["f1"] for c, m in runs if c.lambdas == w]) for w in weights}
        return print(*(f"--lambdas {w}  class-concept F1 {f1[w]:.3f} on valid"
                       for w in sorted(f1, key=lambda w: -f1[w])[:5]), sep="\n")
    tables = [data.taxonomy.spec.get("note", ""), *(format_table(runs, frac) for frac in fractions)]
    print(f"\n{config.dataset}: {tables[0]}", *tables[1:], sep="\n\n")
    if config.sweep:
        write_report(config, runs, tables, data)

def guarded(script, action):
    """Exit code of action(): 0; 2 with one sentence for the user's mistakes; 130 after Ctrl-C."""
    try:
        action()
    except (InputError, OSError, BrokenExecutor) as error:  # the last: a worker was killed
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

def main(argv=None):
    """Run the command line; return its exit code."""
    return guarded("scale.py", lambda: parse(argv)())

if __name__ == "__main__":
    sys.exit(main())
