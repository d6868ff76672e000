"""SCALE: supervised contrastive adapters that tell a frozen medical vision-language model not only
the class (nevus, melanoma) but the concept that justifies it (diffuse irregular pigmentation).

Reference implementation of Engelson, Ehrhardt, Handels, SPIE Medical Imaging 2026 (README).

    python scale.py --dataset demo --frac 0.05        # synthetic phantoms, one minute, no download
    python scale.py --dataset derm7p --frac 0.05      # after data_prep.py; MONET in weights/monet
    python scale.py --dataset derm7p --sweep          # every fraction and split; report, figures

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
import csv
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kernels.supcon import product_supcon_loss
from weights import InputError, reading
from weights.clip import load_clip
from weights.medclip import is_medclip, load_medclip

HERE = Path(__file__).resolve().parent
LEVELS, SCORES = ("class", "class_concept"), ("accuracy", "recall", "f1", "auc", "auc_pair")


# ---- 1. Settings: every flag, its default, its meaning, the paper's section ----------------------
def flag(default, text, named=True, fits=None):
    """A field that is also a flag; named: in a run's folder name; fits: (low, high] or pattern."""
    return field(default=default, metadata={"help": text, "named": named, "fits": fits})

@dataclass(frozen=True)
class Config:
    """All settings; `--some-name` on the command line sets `some_name`."""
    dataset: str = flag("", "demo, or a prepared folder: its path, or its name in --data", False)
    frac: float = flag(1.0, "share of the training images (Sec. 2.3)", False, (0, 1))
    method: str = flag("zeroshot,linear-weighted,scale", "comma list, or all", False)
    backbone: str = flag("", "name in weights/ or a folder; default: the data set's own", False)
    splits: int = flag(0, "stratified subsets; 0: five, as the paper; one at 1", False, (-1, 1000))
    seed: int = flag(0, "seed of the first subset and of its training", False, (-1, 10**9))
    data: str = flag("data", "where the prepared folders lie", False)
    out: str = flag("runs", "where the runs and the cache of embeddings go", False)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps", False)
    sweep: bool = flag(False, "fractions .05 .1 .25 .5 1; report and figures in --out", False)
    criterion: str = flag("", "restrict to one task, such as pigmentation; default: all, jointly")
    shuffle_labels: bool = flag(False, "control: train on shuffled labels, expect chance")
    epochs: int = flag(150, "passes over the subset (Sec. 2.3.2)", True, (0, 10**6))
    lr: float = flag(1e-3, "learning rate (Sec. 2.3.2)", True, (0, 100))
    batch_size: int = flag(0, "0: all samples up to 1,024, else 256", True, (-1, 10**6))
    width: int = flag(4, "the adapter's bottleneck is D / width (Eq. 1)", True, (0, 10**6))
    alpha: float = flag(0.2, "initial share of the adapter (Eq. 1)", True, (0, .999))
    temperature: float = flag(0.07, "tau of the contrastive terms (Eq. 2)", True, (0, 1000))
    lambdas: str = flag("", "weights of concept, class, rows, columns (Eq. 3); default: 1,1,.1,.1; "
                        "multi-label: 1,1,1,1", True, r"|(\d*\.?\d+(e-?\d+)?(,(?!$)|$)){4}")
    rows: str = flag("unit", "rows of Q in Eq. 2: unit length, or raw as written", True, "unit|raw")
    negative_prompt: str = flag("", "second prompt of the AUC; default: the data set's own")

def parse(argv):
    """Command line -> Config. Errors: argparse's own (exit code 2), InputError for bad values."""
    parser = argparse.ArgumentParser(prog="scale.py", description=__doc__.split("\n\n")[0])
    for f in fields(Config):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), required=f.name == "dataset", **kind,
                            default=f.default, help=f.metadata["help"] + " [%(default)s]")
    config = Config(**vars(parser.parse_args(argv)))
    for f in fields(Config):
        value, fits = getattr(config, f.name), f.metadata["fits"]
        if fits and not (re.fullmatch(fits, value) if isinstance(fits, str) else
                         fits[0] < value <= fits[1]):
            form = f"match {fits}" if isinstance(fits, str) else "be above %g, at most %g" % fits
            raise InputError(f"--{f.name.replace('_', '-')} {value} must {form}.")
    return config


# ---- 2. A prepared folder: taxonomy.json and samples.csv (README, Data) --------------------------
@dataclass(frozen=True)
class Level:
    """Combinations, concepts or classes of all tasks, side by side as K columns."""
    names: list            # K strings
    own: torch.Tensor      # (T, K) bool: column k belongs to task t
    members: torch.Tensor  # (K, G) the combinations of each column, padded by repeating the first

@dataclass(frozen=True)
class Taxonomy:
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
             *(task["name"] for task in tasks), *(c["prompt"] for c in combinations)]
    if len({c["name"] for c in combinations}) < len(combinations):
        raise ValueError("combination names must be unique over all tasks")
    if {type(x) for x in words} != {str} or {type(task["exclusive"]) for task in tasks} != {bool}:
        raise ValueError("names, prompts and backbone must be texts, exclusive true or false")
    return Taxonomy(spec, tasks, *(make_level(tasks, *keys) for keys in (
        ("name", None), ("concept", "concepts"), ("class", "classes"))))

def make_level(tasks, part, listed):
    """Columns in the order that tasks list them, each with the combinations it is made of."""
    columns, h = {}, 0
    for t, task in enumerate(tasks):
        for c in task["combinations"]:
            place = task[listed].index(c[part]) if listed else h  # ValueError: not in the list
            columns.setdefault((t, place, c[part]), []).append(h)
            h += 1
    keys = sorted(columns)
    size = max(map(len, columns.values()))
    members = [(columns[key] + columns[key][:1] * size)[:size] for key in keys]
    own = torch.tensor([t for t, _, _ in keys]) == torch.arange(len(tasks))[:, None]
    return Level([name for _, _, name in keys], own, torch.tensor(members))

@dataclass(frozen=True)
class Samples:
    """The images of samples.csv in the file's order, and what is known of them."""
    taxonomy: Taxonomy
    images: list            # N paths
    split: np.ndarray       # (N,) of "train", "valid", "test"
    sentence: torch.Tensor  # (N, H) number of the text that says h of the image; -1: not shown
    texts: list             # S report sentences, none where prompts come from the taxonomy

def read_samples(folder, criterion=""):
    """Samples of a prepared folder (of one task: `criterion`); InputError names the wrong row."""
    mend = "see README, Data, or run data_prep.py again"
    with reading(folder / "taxonomy.json", mend):
        taxonomy = make_taxonomy(json.loads((folder / "taxonomy.json").read_text("utf-8")))
        root = folder / taxonomy.spec.get("root", "")
    with (reading(folder / "samples.csv", mend),
          open(folder / "samples.csv", newline="", encoding="utf-8-sig") as file):
        names, split, sentence, texts = read_rows(list(csv.DictReader(file)), taxonomy)
    if criterion:
        tasks = {task["name"]: task for task in taxonomy.tasks}
        if criterion not in tasks:
            raise InputError(f"--criterion {criterion} is none of: {', '.join(tasks)}.")
        sentence = sentence[:, taxonomy.combination.own[list(tasks).index(criterion)]]
        taxonomy = make_taxonomy({**taxonomy.spec, "tasks": [tasks[criterion]]})
    return Samples(taxonomy, [root / name for name in names], split, sentence, texts)

def read_rows(rows, taxonomy):
    """(images, split, sentence, texts) of the rows; ValueError says which row is wrong."""
    column = {name: h for h, name in enumerate(taxonomy.combination.names)}
    images, texts, home = {}, {}, {}
    for number, row in enumerate(rows, 2):
        labels, split = [name for name in row["labels"].split(";") if name], row["split"]
        if unknown := [name for name in labels if name not in column]:
            raise ValueError(f"row {number}: label {unknown[0]!r} is not in taxonomy.json")
        if split not in ("train", "valid", "test") or not row["image"]:
            raise ValueError(f"row {number}: no image, or split {split!r} not train, valid or test")
        for key in ("image", "patient"):
            if row.get(key) and home.setdefault((key, row[key]), split) != split:
                raise ValueError(f"row {number}: {key} {row[key]} is in another split too")
        if bool(row.get("text")) != bool(rows[0].get("text")):
            raise ValueError(f"row {number}: a text must stand in every row or in none")
        shown = images.setdefault(row["image"], {})  # an image may stand in several rows
        text = texts.setdefault(row["text"], len(texts)) if row.get("text") else 0
        shown |= {column[name]: text for name in labels}
    split = np.array([home["image", image] for image in images])
    if missing := {"train", "test"} - set(split):
        raise ValueError(f"no row has split {min(missing)}")
    sentence = torch.tensor([[shown.get(h, -1) for h in column.values()]
                             for shown in images.values()])
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

    truth (N, K) bool. The rarest label is dealt out first, each row to the side that still wants
    more of that label.  # Choice: sklearn's stratification refuses labels with one member.
    """
    labels, n = truth.numpy(), len(truth)
    wanted = labels.sum(0) * np.array([[fraction], [1 - fraction]])  # (2, K)
    room = [round(fraction * n), n - round(fraction * n)]
    chosen = np.full(n, -1)
    order = torch.randperm(n, generator=generator).numpy()
    while (chosen < 0).any():
        counts = labels[chosen < 0].sum(0)
        rarest = np.where(counts > 0, counts, n + 1).argmin()
        for row in order[(chosen[order] < 0) & (labels[order, rarest] | (counts.sum() == 0))]:
            side = max((0, 1), key=lambda s: (room[s] > 0, wanted[s, rarest], room[s]))
            chosen[row] = side
            wanted[side] -= labels[row]
            room[side] -= 1
    return np.flatnonzero(chosen == 0)


# ---- 4. Frozen embeddings, computed once, cached by content --------------------------------------
def load_backbone(name_or_folder, device="cpu"):
    """Frozen encoder of weights/<name>/ or a folder, a `weights.Backbone`; InputError if unfit."""
    folders = HERE / "weights" / name_or_folder, Path(name_or_folder)
    folder = next(filter(Path.is_dir, folders), folders[0])
    return (load_medclip if is_medclip(folder) else load_clip)(folder).to(device)

def progress(items, total, label):
    """Yield items; show count and time left: one redrawn line in a terminal, few in a log."""
    start, shown, live = time.monotonic(), 0.0, sys.stderr.isatty()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic() - start
        if done == total or now - shown > (0.2 if live else 30):
            shown = now
            line = (f"{label} {done}/{total}, {done / now:.1f} a second, "
                    f"{now / done * (total - done):.0f} s left")
            print(f"\r\x1b[K{line}" if live else line, end="" if live and done < total else "\n",
                  file=sys.stderr, flush=True)

def replace_file(path, write):
    """Call write(temporary path), then rename: a file under its final name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(unfinished := path.with_name(f".{path.name}.{os.getpid()}"))
    os.replace(unfinished, path)

def open_image(path):
    """Decode an image completely; InputError names a missing, truncated or foreign file."""
    with reading(path, "restore the image, or drop its row from samples.csv"):
        image = Image.open(path)
        image.load()
        if image.mode[0] in "IF":  # over 8 bits, which Pillow would clip. Choice: maximum is white
            x = np.asarray(image, np.float32).clip(0)
            image = Image.fromarray((x * (255 / max(x.max(), 1))).round().astype(np.uint8))
        return image

def embed(backbone, images, texts, cache_file, batch=32):
    """Unit features (N, D) of image files, (M, D) of texts, through a cache keyed by content.

    cache_file is one checkpoint's and names a feature by the sha256 of its image file or text. It
    is saved every 20 s and after an error: the next run goes on in the same batches.
    """
    try:
        cache = load_file(cache_file) if cache_file.exists() else {}
    except SafetensorError:
        cache = {}  # damaged: computed again
    known, saved = len(cache), time.monotonic()
    text_keys = [hashlib.sha256(b"text:" + text.encode()).hexdigest() for text in texts]
    new = {key: text for key, text in zip(text_keys, texts, strict=True) if key not in cache}
    image_keys = [digest_file(path) for path in images]
    files = dict(zip(image_keys, images, strict=True))
    chunks = [list(files)[i:i + batch] for i in range(0, len(files), batch)]
    todo = [chunk for chunk in chunks if not cache.keys() >= set(chunk)]
    decoded = decode_ahead(backbone.preprocess, files, todo)
    try:
        for key, text in progress(new.items(), len(new), "embedding texts"):
            cache[key] = F.normalize(backbone.encode_text([text])[0].cpu(), dim=-1)  # unpadded
        for keys, pixels in progress(decoded, len(todo), f"embedding, batches of {batch}:"):
            features = F.normalize(backbone.encode_image(pixels).cpu(), dim=-1)
            cache = dict(zip(keys, features, strict=True)) | cache
            if time.monotonic() - saved > 20:
                replace_file(cache_file, functools.partial(save_file, cache))
                saved = time.monotonic()
    finally:
        if len(cache) > known:
            replace_file(cache_file, functools.partial(save_file, cache))
    return tuple(torch.stack([cache[key] for key in keys]) for keys in (image_keys, text_keys))

def decode_ahead(preprocess, files, chunks):
    """Yield (keys, pixels (B, 3, H, W)) of each chunk while the next one is being decoded."""
    ahead = []
    with ThreadPoolExecutor(4) as pool:
        for chunk in [*chunks, []]:
            ahead.append((chunk, pool.map(lambda key: preprocess(open_image(files[key])), chunk)))
            if len(ahead) > 1:
                keys, pixels = ahead.pop(0)
                yield keys, torch.stack(list(pixels))

def digest_file(path):
    """sha256 of a file's bytes; InputError if it cannot be read."""
    with reading(path, "restore it, or drop its row from samples.csv"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
def cross_entropy(z, truth, level, scale):
    """Softmax cross-entropy within each task, mean over samples and tasks.

    z (N, K) cosines of a level's columns, truth (N, K) one column a task, scale: exp(logit_scale).
    """
    logits = scale * z
    log_sum = logits[:, None].masked_fill(~level.own, -math.inf).logsumexp(-1)  # (N, T)
    return (log_sum.sum() - (logits * truth).sum()) / log_sum.numel()

def supcon_of_rows(a, b, members, temperature, unit):
    """L_SupCon(G, Q), Eq. 2: anchors are the rows of Q = a @ b.T; swap a and b for the columns.

    a, b (T, N, K), members (T, N, H): 1 where a sample of task t belongs to h; mean over tasks.
    Q is never formed: q_i . q_p = a_i (b^T b) a_p^T. With prompts, column j of Q is z[:, h_j]: then
    a = z and b = members say the same, exactly, and K is as small as H.
    """
    if a.shape[1] > 512:  # the fused kernel: no N x N matrix
        tasks = zip(a, b, members.argmax(-1), strict=True)
        losses = [product_supcon_loss(*task, temperature, unit_rows=unit) for task in tasks]
        return torch.stack(losses).mean()
    c = a @ (b.mT @ b) / temperature
    square = (c * a).sum(-1, keepdim=True)  # |q_i|^2 / tau
    if unit:  # Choice: rows of unit length, as products of raw ones grow with N
        length = (square * temperature).clamp(min=1e-24).sqrt()
        a, c, square = a / length, c / length, square / length ** 2
    itself = torch.full((a.shape[1],), -1e30, device=a.device, dtype=a.dtype).diag()
    log_sum = torch.baddbmm(itself, c, a.mT).logsumexp(-1)  # over all but i
    count = (members @ members.sum(1)[..., None])[..., 0] - 1  # |P(i)|
    positive = (c * (members @ (members.mT @ a))).sum(-1) - square[..., 0]
    losses = torch.where(count > 0, log_sum - positive / count.clamp(min=1), 0)
    return (losses.sum(1) / (count > 0).sum(1).clamp(min=1)).mean()

def scale_loss(z, truth, taxonomy, logit_scale, temperature, lambdas, unit=True, pairs=None):
    """Eq. 3, the five-term objective: total and {term: value}.

    z (N, H) cosines, truth (N, H) bool with one combination a task, lambdas: the four weights,
    pairs: (N, D) features of the images and of their own texts; None: templated prompts.
    """
    own = taxonomy.combination.own[:, None]  # (T, 1, H)
    terms = {name: cross_entropy(at_level(z, level), at_level(truth, level), level, logit_scale)
             for name, level in (("combination", taxonomy.combination),
                                 ("concept", taxonomy.concept), ("class", taxonomy.klass))}
    members = truth * own.to(z.dtype)  # (T, N, H)
    a, b = (x.expand(len(own), -1, -1) for x in pairs) if pairs else (z * own, members)
    terms["rows"] = supcon_of_rows(a, b, members, temperature, unit)  # Choice: a term per task
    terms["columns"] = supcon_of_rows(b, a, members, temperature, unit)
    return sum(w * term for w, term in zip((1, *lambdas), terms.values(), strict=True)), terms


# ---- 7. Methods: fit(data, rows, config, generator, log) -> (margins_of(rows), state) ------------
@dataclass(frozen=True)
class Embedded:
    """All that a method may see; features have unit length."""
    samples: Samples
    taxonomy: Taxonomy       # of samples, on the device
    images: torch.Tensor     # (N, D)
    texts: torch.Tensor      # (H + 1, D) one prompt a combination, and "No finding."
    sentences: torch.Tensor  # (S, D) report sentences; (0, D): the prompts are templates
    sentence: torch.Tensor   # (N, H) which of them says h of image i, or -1
    logit_scale: float       # exp of the checkpoint's logit_scale, frozen (# Choice)
    origin: dict             # backbone, prompts, hashes of checkpoint, embeddings, code
    backbone: object = None  # () -> backbone, for the methods that look into the towers

    def truth(self, rows):
        """(n, H) bool."""
        return self.sentence[rows] >= 0

    def pairs(self, rows):
        """(image numbers (P,), truth (P, H)) of a loss's samples: one combination a task.

        Exclusive: the images. Multi-label: each (image, combination) pair, whose positives are
        the pairs with its combination (Zhang and Wu, 2024).
        """
        rows = torch.as_tensor(rows)
        exclusive = all(task["exclusive"] for task in self.taxonomy.tasks)
        if len(self.taxonomy.tasks) > 1 and (len(self.sentences) or not exclusive):
            raise InputError("tasks with several labels or with texts of their own are trained one "
                             "at a time: add --criterion NAME.")
        if exclusive:
            return rows, self.truth(rows)
        image, h = self.truth(rows).nonzero(as_tuple=True)
        return rows[image.cpu()], F.one_hot(h, self.sentence.shape[1]).bool()

    def margins(self, images, texts):
        """(n, H) of unit features (n, D) and (H + 1, D)."""
        return self.logit_scale * images @ (texts[:-1] - texts[-1:]).T

def train(objective, optimizer, n, config, generator, log):
    """Minimise objective(batch of sample numbers) -> (loss, {term: value}); log every epoch.

    Choice: full batches up to 1,024; the last epoch counts, nothing is selected on test data.
    """
    size = config.batch_size or (n if n <= 1024 else 256)
    for epoch in range(config.epochs):
        start, sums = time.perf_counter(), {}
        for batch in torch.randperm(n, generator=generator).split(size):
            loss, terms = objective(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0) + value.item() * len(batch) / n
        log.append({"epoch": epoch, **sums, "seconds": time.perf_counter() - start})

def fit_zeroshot(data, rows, config, generator, log):
    """Frozen cosines: nothing is trained."""
    return lambda rows: data.margins(data.images[rows], data.texts), {}

def mix_pairs(truth, generator):
    """A permutation (P,) at random among the samples with the same labels."""
    group = truth.unique(dim=0, return_inverse=True)[1].cpu()
    shuffled = torch.randperm(len(group), generator=generator)
    return shuffled[group[shuffled].argsort(stable=True)][group.argsort(stable=True).argsort()]

def fit_scale(data, rows, config, generator, log):
    """Train the two adapters (Fig. 1) by Eq. 3."""
    dim = data.texts.shape[1]
    adapters = nn.ModuleDict({  # Choice: one per branch
        branch: Adapter(dim, max(1, dim // config.width), config.alpha, generator)
        for branch in ("image", "text")}).to(data.texts.device)
    rows, truth = data.pairs(rows)
    own = data.sentence[rows].where(truth, -1).amax(1)  # (P,) each sample's sentence
    exclusive = data.taxonomy.tasks[0]["exclusive"]
    lambdas = config.lambdas or ("1,1,0.1,0.1" if exclusive else "1,1,1,1")  # Choice
    lambdas = [float(part) for part in lambdas.split(",")]

    if config.rows == "raw":
        print("warning: products of raw rows of Q grow with the batch (Eq. 2)", file=sys.stderr)

    def objective(batch):
        """Eq. 3 of some samples."""
        images, y = adapters["image"](data.images[rows[batch]]), truth[batch]
        bank, pairs = adapters["text"](data.texts[:-1]), None  # (H, D), all prompts
        if len(data.sentences):  # pair mixing: a random sentence of the same combination
            mixed = own[mix_pairs(truth, generator)[batch]]
            pairs = images, adapters["text"](data.sentences[mixed])
            first = pairs[1][y.int().argmax(0)]  # k(h): the batch's first text of h;
            bank = first.where(y.any(0)[:, None], bank)  # Choice: its prompt where none is
        return scale_loss(images @ bank.T, y, data.taxonomy, data.logit_scale, config.temperature,
                          lambdas, config.rows == "unit", pairs)

    optimizer = torch.optim.Adam(adapters.parameters(), config.lr, fused=True)  # Choice: no decay
    train(objective, optimizer, len(rows), config, generator, log)
    log.append({f"alpha_{name}": a.alpha_logit.sigmoid().item() for name, a in adapters.items()})
    texts = adapters["text"](data.texts)
    return lambda rows: data.margins(adapters["image"](data.images[rows]), texts), (
        adapters.state_dict())

def fit_linear(data, rows, config, generator, log, weighted=True, zeroshot=False):
    """Linear probe, binary cross-entropy; weighted: positives by n_neg / n_pos (Sec. 2.3.2).

    zeroshot: training starts at the zero-shot classifier, as in CLAP (Silva-Rodriguez, 2024).
    """
    images, truth = data.images[rows], data.truth(rows)
    probe = nn.Linear(images.shape[1], truth.shape[1]).to(images.device)
    nn.init.kaiming_uniform_(probe.weight, a=math.sqrt(5), generator=generator)
    nn.init.zeros_(probe.bias)
    if zeroshot:
        probe.weight.data = data.logit_scale * (data.texts[:-1] - data.texts[-1:])
    count = truth.sum(0)
    weight = ((len(truth) - count) / count).where(count > 0, 1.0) if weighted else None

    def objective(batch):
        """Loss of some images, one decision a column."""
        return F.binary_cross_entropy_with_logits(
            probe(images[batch]), truth[batch].float(), pos_weight=weight), {}

    optimizer = torch.optim.Adam(probe.parameters(), config.lr, fused=True)
    train(objective, optimizer, len(rows), config, generator, log)
    return lambda rows: probe(data.images[rows]), probe.state_dict()

def fit_coop(data, rows, config, generator, log):
    """CoOp (Zhou et al., 2022): 16 learnt vectors before each name, through the frozen tower.

    Choice: SGD, momentum .9, decay 5e-4, cosine schedule.
    """
    backbone, (rows, truth) = data.backbone(), data.pairs(rows)
    names = [*data.taxonomy.combination.names, data.origin["prompts"][-1]]
    tokens, lengths = (x.to(data.images.device) for x in backbone.tokenize(names))
    words = backbone.word_table[tokens]  # (H + 1, L, W)
    room = min(16, backbone.context - words.shape[1])
    context = torch.empty(room, words.shape[2]).normal_(std=.02, generator=generator)
    context = context.to(words.device).requires_grad_()
    optimizer = torch.optim.SGD([context], config.lr, momentum=.9, weight_decay=5e-4)

    def texts():
        """Unit features (H + 1, D) of the names after the learnt vectors."""
        learnt = context.expand(len(words), -1, -1)
        prompts = torch.cat([words[:, :1], learnt, words[:, 1:]], 1)
        return F.normalize(backbone.text_tower(backbone.tensors, prompts, lengths + room), dim=-1)

    def objective(batch):
        """Cross-entropy of some samples over the combinations."""
        rate = .5 + .5 * math.cos(math.pi * len(log) / config.epochs)
        optimizer.param_groups[0]["lr"] = config.lr * rate
        z = data.images[rows[batch]] @ texts()[:-1].T
        return cross_entropy(z, truth[batch], data.taxonomy.combination, data.logit_scale), {}

    train(objective, optimizer, len(rows), config, generator, log)
    learnt = texts()
    return lambda rows: data.margins(data.images[rows], learnt), {"context": context}

METHODS = {"clip-zeroshot": fit_zeroshot, "zeroshot": fit_zeroshot,
           "linear": functools.partial(fit_linear, weighted=False), "linear-weighted": fit_linear,
           "linear-zs": functools.partial(fit_linear, zeroshot=True), "coop": fit_coop,
           "scale": fit_scale}


# ---- 8. Metrics (Sec. 2.3.2) ---------------------------------------------------------------------
def area_under_curve(score, truth):
    """Area under the ROC curve of score (N,), truth (N,), ties counted half; nan if undefined."""
    negative, positive = score[~truth].sort().values, score[truth]
    below = sum(torch.searchsorted(negative, positive, right=ties) for ties in (False, True))
    return (below.double().mean() / (2 * len(negative))).item()

def mean_of(values):
    """Mean of the numbers that are defined, nan if none is."""
    return float(np.mean([v for v in values if v == v] or [math.nan]))

def score_task(margins, truth, exclusive, only=None):
    """Accuracy, macro recall, macro F1, AUC of one task at one level, each in [0, 1] or nan.

    margins, truth (N, K). Exclusive: arg-max decides; else margin > 0, a two-prompt probability
    above 0.5. Choice: macro means run over the columns that the test set shows; predicting another
    still costs recall. AUC: mean over columns, or that of column `only`, of the margin to "No
    finding."; auc_pair: of that to the best other column, as nothing trains "No finding." here.
    """
    decided = F.one_hot(margins.argmax(1), truth.shape[1]).bool() if exclusive else margins > 0
    hits, shown = (decided & truth).sum(0), truth.sum(0)
    f1 = 2 * hits / (decided.sum(0) + shown).clamp(min=1)
    # Choice: plain accuracy (per binary label where labels do not exclude one another).
    accuracy = (decided & truth).any(1) if exclusive else decided == truth
    scores = {"auc": margins}
    if exclusive:
        top = margins.topk(min(2, len(shown)), 1).values
        scores["auc_pair"] = margins - top[:, :1].where(margins < top[:, :1], top[:, -1:])
    ranked = [k for k in range(len(shown)) if 0 < shown[k] < len(truth) and only in (None, k)]
    areas = {name: mean_of(area_under_curve(score[:, k], truth[:, k]) for k in ranked)
             for name, score in scores.items()}
    return {"accuracy": accuracy.double().mean().item(),
            "recall": (hits / shown)[shown > 0].double().mean().item(),
            "f1": f1[shown > 0].double().mean().item(), **areas}

def evaluate(margins, truth, trained, taxonomy):
    """All numbers of metrics.json. margins, truth (N, H) of the test set, trained (n, H) truth."""
    per_task = {task["name"]: {} for task in taxonomy.tasks}
    for name, level in zip(LEVELS, (taxonomy.klass, taxonomy.combination), strict=True):
        for t, task in enumerate(taxonomy.tasks):
            columns = level.own[t]
            # Choice: of two exclusive classes, the AUC is that of the second, such as melanoma.
            binary = name == "class" and task["exclusive"] and int(columns.sum()) == 2
            per_task[task["name"]][name] = score_task(
                at_level(margins, level)[:, columns], at_level(truth, level)[:, columns],
                task["exclusive"], 1 if binary else None)
    means = {name: {score: mean_of(task[name].get(score, math.nan) for task in per_task.values())
                    for score in SCORES} for name in LEVELS}
    support = {name: {"train": int(a), "test": int(b)} for name, a, b in
               zip(taxonomy.combination.names, trained.sum(0), truth.sum(0), strict=True)}
    return {**means, "per_task": per_task, "support": support,
            "n_train": len(trained), "n_test": len(truth)}


# ---- 9. Runs: one folder per method, fraction and split ------------------------------------------
def run_folder(config, origin):
    """<out>/<dataset>-<backbone>-<method>-<frac>-s<seed>, and every setting off its default."""
    changed = [f"{f.name}={getattr(config, f.name)}" for f in fields(Config)
               if f.metadata["named"] and getattr(config, f.name) != f.default]
    name = "-".join([Path(config.dataset).name, Path(origin["backbone"]).name, config.method,
                     f"{config.frac:g}", f"s{config.seed}", *changed])
    return Path(config.out) / "".join(c if c.isalnum() or c in ".,=_-" else "_" for c in name)

def run_once(config, data):
    """Train and evaluate one method on one split; return what metrics.json holds.

    A run whose config.json (settings, data.origin, rows) is the same to the byte is only read.
    """
    samples, generator = data.samples, torch.Generator().manual_seed(config.seed)
    train, test = (np.flatnonzero(samples.split == part) for part in ("train", "test"))
    truth = samples.sentence >= 0
    labels = torch.cat([truth, at_level(truth, samples.taxonomy.klass)], 1)
    rows = train[stratified_subset(labels[train], config.frac, generator)]
    settings = {f.name: getattr(config, f.name) for f in fields(Config) if f.metadata["named"]
                or f.name in ("dataset", "frac", "method", "seed")}
    settings = json.dumps(settings | data.origin | {"train_rows": rows.tolist()}, indent=1)
    folder = run_folder(config, data.origin)
    stored = folder / "config.json"
    if not (stored.is_file() and stored.read_text() == settings):
        if not (shown := at_level(truth[rows], samples.taxonomy.klass).any(0)).all():
            missing = samples.taxonomy.klass.names[shown.int().argmin()]
            raise InputError(f"class {missing!r} has none of the {len(rows)} training images of "
                             f"seed {config.seed}: raise --frac.")
        if config.shuffle_labels:
            shuffled = data.sentence.clone()
            shuffled[rows] = data.sentence[rows[torch.randperm(len(rows), generator=generator)]]
            data = replace(data, sentence=shuffled)
        margins_of, state = METHODS[config.method](data, rows, config, generator, log := [])
        with torch.no_grad():
            margins = margins_of(test).float().cpu()
        if not margins.isfinite().all():
            raise InputError(f"{folder.name}: training diverged; lower --lr.")
        metrics = evaluate(margins, truth[test], truth[rows], samples.taxonomy)
        write_run(folder, settings, log, state, metrics, samples, test, margins)
    return json.loads((folder / "metrics.json").read_text())

def write_run(folder, settings, log, state, metrics, samples, test, margins):
    """Write a run to a temporary folder, then rename: a folder that exists is complete."""
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    (unfinished / "config.json").write_text(settings)
    (unfinished / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    names = np.array(samples.taxonomy.combination.names)
    with open(unfinished / "scores.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "labels", *names])
        for n, values in zip(test, margins.tolist(), strict=True):
            shown = ";".join(names[samples.sentence[n].numpy() >= 0])
            writer.writerow(["/".join(samples.images[n].parts[-2:]), shown,
                             *(f"{value:.6g}" for value in values)])
    save_file({name: tensor.detach().cpu() for name, tensor in state.items()},
              unfinished / "adapter.safetensors", {"config": settings})
    text = json.dumps(metrics, indent=1).replace("NaN", "null")
    (unfinished / "metrics.json").write_text(text + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


# ---- 10. Tables and figure (Table 1, Fig. 2 and 3), as plain SVG ---------------------------------
OKABE_ITO = "#0072b2 #d55e00 #000 #56b4e9 #009e73 #e69f00 #777 #b8a400 #cc79a7".split()
SHAPES = "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0", "M-4-4H4V4H-4z", "M0-5 5 0 0 5-5 0z", "M0-5 5 4H-5z"
SVG = ('<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {} {}" font-size="15" fill="#222" '
       'font-family="sans-serif"><path fill="#fff" d="M0 0H1500V1500H0z"/>\n{}\n</svg>')
TEXT = '<text x="{:.1f}" y="{:.1f}">{}</text>'

def spread(results, frac, method, level, score):
    """{run in words: value} of the splits that define a score, mean and standard deviation."""
    runs = {f"seed {c.seed}, {m['n_train']} + {m['n_test']} images: "
            f"{ {s: v for s, v in m[level].items() if s.startswith(score)} }": m[level][score]
            for c, m in results if (c.frac, c.method) == (frac, method)}
    values = [value for value in runs.values() if value is not None] or [math.nan]
    return runs, np.mean(values), np.std(values, ddof=1) if values[1:] else 0.0

def format_table(results, frac):
    """Mean ±sd over splits in Markdown, a line per level and method; then which method leads."""
    methods = dict.fromkeys(c.method for c, _ in results if c.frac == frac)
    row = "| {:13} | {:15} |" + " {:10} |" * len(SCORES)
    lines = [row.format(f"at {frac * 100:g}%", "method", *SCORES), "|---|---|" + "--:|" * 5]
    for level, method in itertools.product(LEVELS, methods):
        cells = (spread(results, frac, method, level, score)[1:] for score in SCORES)
        lines.append(row.format(level, method, *("{:.2f} ±{:.2f}".format(*c) for c in cells)))
    best = max(methods, key=lambda m: spread(results, frac, m, "class_concept", "f1")[1])
    lines.append(f"\nAt {frac * 100:g}% of the training images {best} leads in class-concept F1.")
    return "\n".join(lines).replace(" ±0.00", "      ").replace("nan ", "-   ")

def write_report(folder, results, note=""):
    """results.csv (a line a run), report.md and figures/scores.svg of [(config, metrics)]."""
    name, columns = Path(results[0][0].dataset).name, list(itertools.product(LEVELS, SCORES))
    rows = [["method", "frac", "seed", "n_train", "n_test", *map("_".join, columns)]]
    rows += [[c.method, c.frac, c.seed, m["n_train"], m["n_test"], *(m[a][b] for a, b in columns)]
             for c, m in results]
    words = [f"# Results on {name}", note, "![mean ±sd over splits](figures/scores.svg)"]
    words += [format_table(results, frac) for frac in sorted({c.frac for c, _ in results})]
    ours = [m["per_task"].get("pigmentation") for c, m in results if c.method == "zeroshot"]
    if name == "derm7p" and any(ours):
        ours = " / ".join(f"{ours[0][level]['accuracy']:.2f}" for level in LEVELS)
        words.append(f"Table 1, pigmentation, accuracy of zeroshot: paper .59 / .29, here {ours}.")
    table = "\n".join(",".join("" if v is None else str(v) for v in row) for row in rows)
    for file, text in (("results.csv", table), ("report.md", "\n\n".join(words)),
                       ("figures/scores.svg", draw_scores(results))):
        replace_file(folder / file, lambda path, text=text: path.write_text(text + "\n", "utf-8"))

def draw_mark(x, y, i, title, words="", bar=0):
    """Marker of series i, words on its right, an error bar of 2 * bar; title shows on hover."""
    colour = OKABE_ITO[i % 9]
    return (f'<path transform="translate({x:.1f} {y:.1f})" stroke="{colour}" stroke-width="1.5" '
            f'fill="{(colour, "#fff")[i // 4 % 2]}" d="M0 {-bar:.1f}V{bar:.1f}{SHAPES[i % 4]}">'
            f'<title>{escape(title)}</title></path>{TEXT.format(x + 9, y + 5, escape(words))}')

def draw_scores(results):
    """SVG like Fig. 2 and 3: mean ±sd by fraction; a marker's title holds its runs' numbers."""
    methods = dict.fromkeys(c.method for c, _ in results)
    fractions = sorted({c.frac for c, _ in results})
    parts = [draw_mark(60 + i % 5 * 250, 24 + i // 5 * 22, i, m, m) for i, m in enumerate(methods)]
    for n, (level, score) in enumerate(itertools.product(LEVELS, SCORES[:4])):
        left, low, wide = 45 + n % 4 * 330, 400 + n // 4 * 360, 290 / len(fractions)
        parts.append(TEXT.format(left, low - 312, f"{level} {score}"))
        parts += [f'<path stroke="#ddd" d="M{left} {low - 60 * k}h290"/>'
                  + TEXT.format(left - 30, low + 5 - 60 * k, k / 5) for k in range(6)]
        parts += [TEXT.format(left + wide * (j + 0.5) - 14, low + 20, f"{f * 100:g}%")
                  for j, f in enumerate(fractions)]
        for i, method in enumerate(methods):
            path, marks = "", []
            for j, frac in enumerate(fractions):
                runs, mean, sd = spread(results, frac, method, level, score)
                x, y = left + wide * (j + 0.1 + 0.8 * (i + 0.5) / len(methods)), low - 300 * mean
                if mean == mean:
                    path += f"{'L' if path else 'M'}{x:.1f} {y:.1f}"
                    told = "\n".join([f"{method} at {frac}: mean {mean}", *runs])
                    marks.append(draw_mark(x, y, i, told, bar=300 * sd))
            parts += [f'<path fill="none" stroke="{OKABE_ITO[i % 9]}" d="{path}"/>', *marks]
    return SVG.format(1350, 800, "\n".join(parts))


# ---- 11. Command line ----------------------------------------------------------------------------
def find_folder(config):
    """The prepared folder of a data set; `demo` is drawn when it is missing."""
    for folder in (Path(config.data) / config.dataset, Path(config.dataset)):
        if (folder / "samples.csv").is_file():
            return folder
    if config.dataset == "demo":
        from data_prep import prepare_demo
        return prepare_demo(Path(config.data))
    raise InputError(f"{Path(config.data) / config.dataset} is no prepared folder: write it as the "
                     "README says, or run python data_prep.py derm7p|padchest-gr path/to/release.")

def embed_dataset(config):
    """Everything that all runs share: Embedded, on the device."""
    samples = read_samples(find_folder(config), config.criterion)
    spec, device = samples.taxonomy.spec, config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {device} is not to be had: try --device cpu.") from None
    name = config.backbone or spec.get("backbone") or "monet"
    backbone = load_backbone(name, device)
    checkpoint = digest_file(backbone.path)
    key = hashlib.sha256((checkpoint + json.dumps(backbone.describe())).encode()).hexdigest()
    prompts = [c["prompt"] for task in spec["tasks"] for c in task["combinations"]]
    prompts.append(config.negative_prompt or spec.get("negative_prompt", "No finding."))
    images, texts = embed(backbone, samples.images, [*prompts, *samples.texts],
                          Path(config.out) / "cache" / f"{key[:16]}.safetensors")
    content = b"".join(t.numpy().tobytes() for t in (images, texts, samples.sentence))
    code = b"".join((HERE / file).read_bytes() for file in ("scale.py", "kernels/supcon.py"))
    origin = {"backbone": name, "checkpoint_sha256": checkpoint, "device": str(device),
              "data_sha256": hashlib.sha256(content).hexdigest(), "torch": torch.__version__,
              "code_sha256": hashlib.sha256(code).hexdigest(), "prompts": prompts}
    with torch.device(device):
        taxonomy = make_taxonomy(spec)
    tensors = images, texts[:len(prompts)], texts[len(prompts):]
    return Embedded(samples, taxonomy, *(x.to(device) for x in (*tensors, samples.sentence)),
                    backbone.logit_scale, origin, functools.partial(load_backbone, name, device))

def run(config):
    """All methods on all splits of one fraction, or of all; prints the tables."""
    clip, found = "clip-zeroshot", any((HERE / "weights" / "clip").glob("*.safetensors"))
    names = config.method.split(",") if config.method != "all" else [
        name for name in METHODS if found or name != clip]  # it needs another checkpoint
    for name in set(names) - METHODS.keys():
        raise InputError(f"--method {name} is none of: {', '.join(METHODS)}.")
    data = embed_dataset(config)
    other = embed_dataset(replace(config, backbone="clip")) if clip in names else data
    jobs = [replace(config, method=name, frac=frac, seed=config.seed + split)
            for frac in ((.05, .1, .25, .5, 1.) if config.sweep else (config.frac,))
            for name in names for split in range(config.splits or (1 if frac == 1 else 5))]
    given = [other if job.method == clip else data for job in jobs]
    with ProcessPoolExecutor(min(32, os.cpu_count()), None, torch.set_num_threads, (1,)) as pool:
        # Choice: on a CPU a process a core; on small matrices a second thread is slower.
        results = (pool.map if data.images.is_cpu else map)(run_once, jobs, given)
        runs = list(zip(jobs, progress(results, len(jobs), "run"), strict=True))
    note = data.taxonomy.spec.get("note", "")
    print(f"\n{config.dataset}: {note}")
    for frac in dict.fromkeys(job.frac for job in jobs):
        print("\n" + format_table(runs, frac))
    if config.sweep:
        write_report(Path(config.out) / f"report-{Path(config.dataset).name}", runs, note)

def guarded(script, action):
    """Exit code of action(): 0; 2 with one sentence for the user's mistakes; 130 after Ctrl-C."""
    try:
        action()
    except (InputError, OSError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0

def main(argv=None):
    """Run the command line; return its exit code."""
    return guarded("scale.py", lambda: run(parse(argv)))

if __name__ == "__main__":
    sys.exit(main())
