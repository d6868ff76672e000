"""SCALE: supervised contrastive adapters that tell a frozen medical vision-language model not only
the class (nevus, melanoma) but the concept that justifies it (diffuse irregular pigmentation).

Reference implementation of Engelson, Ehrhardt, Handels, SPIE Medical Imaging 2026 (README).

    python scale.py --dataset demo --frac 0.05        # synthetic phantoms, one minute, no download
    python scale.py --dataset derm7p --frac 0.05      # after data_prep.py; MONET in weights/monet

The file reads in the order in which data flow. `grep -n '^# ----' scale.py` prints its contents,
`grep -n Choice *.py` every decision that the paper leaves open.

Glossary: name in the code, symbol in the paper, shape
    image_features   f_image   (N, D)   frozen, unit length, one row an image
    text_features    f_text    (H, D)   frozen, unit length, one row a prompt
    adapter, alpha   A, alpha           two-layer bottleneck and its learnt mixing weight (Eq. 1)
    similarities     Q         (N, N)   cosine of image i and the text of image j
    z                Z         (N, H)   cosine of image i and combination h: Q[:, k(h)]
    combination      h, g      H        class-concept combination, "diffuse irregular pigmentation"
    concept, class   l, c      L, C     what h is made of; z_l, z_c are maxima over their h
    task                                one criterion; its combinations exclude one another
    margin                     (N, H)   logit_scale * (z_h - z_"No finding."): what is evaluated
"""

import argparse
import csv
import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from kernels.supcon import product_supcon_loss, supcon_loss, supcon_reference
from weights import InputError
from weights.clip import load_clip

HERE = Path(__file__).resolve().parent
SCORES = ("accuracy", "recall", "f1", "auc", "auc_pair")


# ---- 1. Settings: every flag, its default, its meaning, the paper's section ----------------------
def flag(default, text, named=True):
    """A dataclass field that is also a command-line flag; named: part of a run's folder name."""
    return field(default=default, metadata={"help": text, "named": named})


@dataclass(frozen=True)
class Config:
    """All settings of a run; `--some-name` on the command line sets `some_name`."""
    dataset: str = flag("", "demo, derm7p, or the path of a prepared folder (Sec. 2.3)", False)
    frac: float = flag(1.0, "share of the training images, in (0, 1] (.05 .1 .25 .5 1)", False)
    method: str = flag("zeroshot,linear-weighted,scale", "comma list, or all", False)
    backbone: str = flag("", "name in weights/ or a folder; default: the data set's own", False)
    splits: int = flag(0, "stratified random subsets; 0: five, as the paper; one at 1", False)
    seed: int = flag(0, "seed of the first subset and of its training", False)
    data: str = flag("data", "where the prepared folders lie", False)
    out: str = flag("runs", "where the runs and the cache of embeddings go", False)
    device: str = flag("auto", "auto, cpu, cuda, cuda:1, mps", False)
    criterion: str = flag("", "restrict to one task, such as pigmentation; default: all, jointly")
    epochs: int = flag(150, "passes over the subset (Sec. 2.3.2)")
    lr: float = flag(1e-3, "learning rate of Adam (Sec. 2.3.2)")
    batch_size: int = flag(0, "0: all images up to 1,024, else 256 (adapted to the size)")
    width: int = flag(4, "the adapter's bottleneck is D / width (Eq. 1)")
    alpha: float = flag(0.2, "initial share of the adapter in Eq. 1, in (0, 1)")
    temperature: float = flag(0.07, "tau of the contrastive terms (Eq. 2)")
    lambdas: str = flag("1,1,0.1,0.1", "weights of concept, class, rows, columns (Eq. 3)")
    rows: str = flag("unit", "rows of Q in Eq. 2: unit length, or raw as the paper writes")
    negative_prompt: str = flag("", "second prompt of the AUC; default: the data set's own")


def parse(argv):
    """Command line -> Config. Errors: argparse's own (exit code 2), InputError for bad values."""
    parser = argparse.ArgumentParser(prog="scale.py", description=__doc__.split("\n\n")[0])
    for f in fields(Config):
        name = "--" + f.name.replace("_", "-")
        required = f.name == "dataset"
        parser.add_argument(name, type=f.type, default=f.default, required=required,
                            help=f.metadata["help"] + ("" if required else " [%(default)s]"))
    config = Config(**vars(parser.parse_args(argv)))
    number = r"\s*[\d.]+(e-?\d+)?\s*"
    for name, fits, wanted in (
            ("frac", 0 < config.frac <= 1, "in (0, 1]: 0.05 for 5% of the training images"),
            ("alpha", 0 < config.alpha < 1, "in (0, 1)"),
            *((name, getattr(config, name) > 0, "above 0") for name in
              ("lr", "temperature", "epochs", "width")),
            ("rows", config.rows in ("unit", "raw"), "unit or raw"),
            ("lambdas", re.fullmatch(f"({number},){{3}}{number}", config.lambdas), "four numbers")):
        if not fits:
            raise InputError(f"--{name} {getattr(config, name)} must be {wanted}.")
    return config


# ---- 2. A prepared folder: taxonomy.json and samples.csv (DATA in README) ------------------------
@dataclass(frozen=True)
class Level:
    """Combinations, concepts or classes of all tasks, side by side as K columns."""
    names: list            # K strings
    own: torch.Tensor      # (T, K) bool: column k belongs to task t
    members: torch.Tensor  # (K, G) the combinations of each column, padded by repeating the first


@dataclass(frozen=True)
class Taxonomy:
    """What is known beforehand: tasks, and which concept and class a combination h is made of."""
    spec: dict             # all of taxonomy.json: negative_prompt, backbone, root, note and
    tasks: list            # a dict a task: name, exclusive, classes, concepts, combinations
    combination: Level     # H columns
    concept: Level         # L columns
    klass: Level           # C columns


def make_taxonomy(spec):
    """Taxonomy from the content of taxonomy.json; ValueError where names do not fit together."""
    tasks = spec["tasks"]
    combinations = [(t, c) for t, task in enumerate(tasks) for c in task["combinations"]]
    words = [spec.get("backbone", ""), spec.get("negative_prompt", ""),
             *(task["name"] for task in tasks), *(c["prompt"] for _, c in combinations)]
    if len({c["name"] for _, c in combinations}) < len(combinations):
        raise ValueError("combination names must be unique over all tasks")
    if not all(isinstance(word, str) for word in words):
        raise TypeError("names, prompts and backbone must be texts")
    if not all(isinstance(task["exclusive"], bool) for task in tasks):
        raise TypeError("exclusive must be true or false")
    return Taxonomy(spec, tasks, *(make_level(tasks, combinations, *keys) for keys in (
        ("combinations", "name"), ("concepts", "concept"), ("classes", "class"))))


def make_level(tasks, combinations, plural, part):
    """Columns of one level: every name that a task lists, with the combinations it is made of."""
    columns = []
    for t, task in enumerate(tasks):
        for entry in task[plural]:
            name = entry["name"] if part == "name" else entry
            members = [h for h, (s, c) in enumerate(combinations) if s == t and c[part] == name]
            if not members:
                raise ValueError(f"{part} {name!r} of {task['name']!r} has no combination")
            columns.append((name, t, members))
    if sum(len(members) for _, _, members in columns) != len(combinations):
        raise ValueError(f"a combination has a {part} that its task does not list once")
    size = max(len(members) for _, _, members in columns)
    padded = [members + members[:1] * (size - len(members)) for _, _, members in columns]
    own = torch.tensor([t for _, t, _ in columns]) == torch.arange(len(tasks))[:, None]
    return Level([name for name, _, _ in columns], own, torch.tensor(padded))


@dataclass(frozen=True)
class Samples:
    """The rows of samples.csv, in the file's order."""
    taxonomy: Taxonomy
    images: list           # N paths
    texts: list            # N report sentences, or none where prompts come from the taxonomy
    truth: torch.Tensor    # (N, H) bool: image i shows combination h
    split: np.ndarray      # (N,) of "train", "valid", "test"


def read_samples(folder, criterion=""):
    """Samples of a prepared folder (of one task: `criterion`); InputError names the wrong row."""
    path = folder / "taxonomy.json"
    try:
        taxonomy = make_taxonomy(json.loads(path.read_text(encoding="utf-8")))
        root, path = folder / taxonomy.spec.get("root", ""), folder / "samples.csv"
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        if not rows:
            raise ValueError("no rows")
        truth = torch.stack([read_row(row, n + 2, taxonomy) for n, row in enumerate(rows)])
        images, split = [root / row["image"] for row in rows], [row["split"] for row in rows]
    except (OSError, LookupError, TypeError, AttributeError, ValueError, RuntimeError, csv.Error
            ) as error:
        found = str(error) if type(error) is ValueError else repr(error)
        raise InputError(f"{path}: {found}; see README, Data, or run data_prep.py again.") from None
    train, test = ({row.get("patient") for row in rows if row["split"] == part}
                   for part in ("train", "test"))
    if not (train and test):
        raise InputError(f"{path} has no row with split {'test' if train else 'train'}.")
    if shared := (train & test) - {None, ""}:
        raise InputError(f"{path}: patient {min(shared)} is in train and in test.")
    texts = [row["text"] for row in rows if row.get("text")]
    if len(texts) not in (0, len(rows)):
        raise InputError(f"{path} has a text in {len(texts)} of {len(rows)} rows: in all or none.")
    if criterion:
        names = [task["name"] for task in taxonomy.tasks]
        if criterion not in names:
            raise InputError(f"--criterion {criterion} is none of: {', '.join(names)}.")
        t = names.index(criterion)
        truth = truth[:, taxonomy.combination.own[t]]
        taxonomy = make_taxonomy({**taxonomy.spec, "tasks": [taxonomy.tasks[t]]})
    return Samples(taxonomy, images, texts, truth, np.array(split))


def read_row(row, number, taxonomy):
    """Truth (H,) of a row of samples.csv; ValueError says what is wrong with it."""
    names, labels = taxonomy.combination.names, row["labels"].split(";") if row["labels"] else []
    unknown = [label for label in labels if label not in names]
    if unknown:
        raise ValueError(f"row {number}: label {unknown[0]!r} is not in taxonomy.json")
    if row["split"] not in ("train", "valid", "test"):
        raise ValueError(f"row {number}: split {row['split']!r} is not train, valid or test")
    truth = torch.tensor([name in labels for name in names])
    for task, count in zip(taxonomy.tasks, (taxonomy.combination.own & truth).sum(1), strict=True):
        if task["exclusive"] and count != 1:
            raise ValueError(f"row {number}: {count} labels for the exclusive task "
                             f"{task['name']!r}, which needs exactly one")
    return truth


def at_level(values, level):
    """Maximum of each column's combinations: (N, H) -> (N, K); of a truth table: any of them."""
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
        rows = order[(chosen[order] < 0) & (labels[order, rarest] | (counts.sum() == 0))]
        for row in rows:
            side = max((0, 1), key=lambda s: (room[s] > 0, wanted[s, rarest], room[s]))
            chosen[row] = side
            wanted[side] -= labels[row]
            room[side] -= 1
    return np.flatnonzero(chosen == 0)


# ---- 4. Frozen embeddings, computed once, cached by content --------------------------------------
def load_backbone(name_or_folder, device="cpu"):
    """Frozen encoder of weights/<name>/ or a folder: encode_image(pixels (N, 3, H, W)) -> (N, D),
    encode_text(list of str) -> (N, D), preprocess(PIL image) -> (3, H, W), logit_scale; float32.
    """
    folders = HERE / "weights" / name_or_folder, Path(name_or_folder)
    return load_clip(next(filter(Path.is_dir, folders), folders[0])).to(device)


def progress(items, total, label):
    """Yield items; show count, rate and time left: one redrawn line in a terminal, few in a log."""
    start, shown, live = time.monotonic(), 0.0, sys.stderr.isatty()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic() - start
        if done == total or now - shown > (0.2 if live else 30):
            shown = now
            line = f"{label} {done}/{total}, {now / done * (total - done):.0f} s left"
            print(f"\r\x1b[K{line}" if live else line, end="" if live and done < total else "\n",
                  file=sys.stderr, flush=True)


def replace_file(path, write):
    """Call write(temporary path), then rename: a file under its final name is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write(unfinished := path.with_name(f".{path.name}.{os.getpid()}"))
    os.replace(unfinished, path)


def open_image(path):
    """Decode an image completely; InputError names a missing, truncated or foreign file."""
    try:
        image = Image.open(io.BytesIO(path.read_bytes()))
        image.load()
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is no whole image ({error}): restore it, or drop its row from "
                         "samples.csv.") from None


def embed(backbone, images, texts, cache_file, batch=32):
    """Unit features (N, D) of image files and (M, D) of texts, through a cache keyed by content.

    cache_file belongs to one checkpoint and names a feature by the sha256 of its image file or
    text. It is saved every 20 s and after an error: the next run goes on in the same batches.
    """
    try:
        cache = load_file(cache_file) if cache_file.exists() else {}
    except SafetensorError:
        cache = {}  # damaged: computed again
    known = len(cache)
    image_keys = [digest_file(path) for path in images]
    text_keys = [hashlib.sha256(b"text:" + text.encode()).hexdigest() for text in texts]
    for key, text in zip(text_keys, texts, strict=True):
        if key not in cache:  # alone, so that no bit depends on the other texts
            cache[key] = F.normalize(backbone.encode_text([text])[0].cpu(), dim=-1)
    unique = iter(dict(zip(image_keys, images, strict=True)).items())
    chunks = list(iter(lambda: dict(islice(unique, batch)), {}))
    todo = [chunk for chunk in chunks if not cache.keys() >= chunk.keys()]
    saved = time.monotonic()
    try:
        with ThreadPoolExecutor(4) as pool:
            batches = decode_ahead(pool, backbone.preprocess, todo)
            for keys, pixels in progress(batches, len(todo), f"embedding, batches of {batch}:"):
                features = F.normalize(backbone.encode_image(pixels).cpu(), dim=-1)
                cache = dict(zip(keys, features, strict=True)) | cache
                if time.monotonic() - saved > 20:
                    replace_file(cache_file, partial(save_file, cache))
                    saved = time.monotonic()
    finally:
        if len(cache) > known:
            replace_file(cache_file, partial(save_file, cache))
    return torch.stack([cache[k] for k in image_keys]), torch.stack([cache[k] for k in text_keys])


def decode_ahead(pool, preprocess, chunks):
    """Yield (keys, pixels (B, 3, H, W)) of each chunk while the next one is being decoded."""
    ready = None
    for chunk in [*chunks, {}]:
        jobs = [pool.submit(lambda p: preprocess(open_image(p)), path) for path in chunk.values()]
        if ready:
            yield ready[0], torch.stack([job.result() for job in ready[1]])
        ready = list(chunk), jobs


def digest_file(path):
    """sha256 of a file's bytes; InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): see README, Data.") from None


# ---- 5. Adapters (Sec. 2.1, Eq. 1) ---------------------------------------------------------------
class Adapter(nn.Module):
    """Eq. 1: f' = alpha * ReLU(f W1) W2 + (1 - alpha) * f, then unit length. (N, D) -> (N, D)."""

    def __init__(self, dim, hidden, alpha, generator):
        super().__init__()
        # Choice: no biases, so that the length of f does not matter, and no outer ReLU (Eq. 1).
        self.down = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(hidden, dim, bias=False)
        for layer in (self.down, self.up):
            nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        # Choice: alpha = sigmoid(free scalar), one per branch; training starts near zero-shot.
        self.alpha_logit = nn.Parameter(torch.tensor(math.log(alpha / (1 - alpha))))

    @property
    def alpha(self):
        """Share of the adapter, in (0, 1)."""
        return torch.sigmoid(self.alpha_logit)

    def forward(self, features):
        """Unit features (N, D) -> adapted unit features (N, D)."""
        adapted = self.up(F.relu(self.down(features)))
        return F.normalize(torch.lerp(features, adapted, self.alpha), dim=-1)


# ---- 6. The objective (Sec. 2.2, Eq. 2 and 3) ----------------------------------------------------
def cross_entropy(z, truth, level, scale):
    """Softmax cross-entropy within each task, mean over images and tasks.

    z (N, K) cosines of a level's columns, truth (N, K) one column a task, scale: exp(logit_scale).
    """
    logits = scale * z
    log_sum = logits[:, None].masked_fill(~level.own, -math.inf).logsumexp(-1)  # (N, T)
    return (log_sum.sum() - (logits * truth).sum()) / log_sum.numel()


def supcon_of_rows(z, truth, level, temperature, unit):
    """L_SupCon(G, Q), Eq. 2: anchors are the rows of Q, positives share the combination.

    Column j of Q belongs to image j's prompt, so Q repeats column h of z n_h times, and
    q_i . q_p = sum_h n_h z_ih z_ph: the rows of z * sqrt(n) stand for the rows of Q, exactly.
    One term per task over its own labels and columns, averaged.  # Choice
    """
    own = level.own[:, None]  # (T, 1, H)
    rows = z * truth.sum(0).sqrt() * own  # (T, N, H)
    rows = F.normalize(rows, dim=-1) if unit else rows  # Choice: raw rows grow with N
    labels = (truth & own).int().argmax(-1)  # (T, N)
    if len(z) <= 512:  # one dense batch of small problems is faster than T calls
        return supcon_reference(rows, labels, temperature).mean()
    losses = [supcon_loss(*task, temperature) for task in zip(rows, labels, strict=True)]
    return torch.stack(losses).mean()


def supcon_of_columns(z, truth, level, temperature, unit):
    """L_SupCon(G, Q^T), Eq. 2: anchors are the N columns of Q, labelled as their texts.

    The columns are n_h copies of z_h (N,), hence anchors of one h share one loss:
    log(sum_h' (n_h' - [h' = h]) exp(z_h . z_h' / tau)) - z_h . z_h / tau, over h' of the same task.
    """
    columns = F.normalize(z, dim=0) if unit else z
    logits = columns.T @ columns / temperature  # (H, H)
    count = truth.sum(0)  # (H,)
    together = (level.own[:, :, None] & level.own[:, None]).any(0)  # (H, H): of the same task
    others = (count - torch.eye(len(count), device=z.device)).clamp(min=0) * together
    anchors = count * (count > 1)  # (H,), those that have a positive
    log_sum = (logits + others.log()).masked_fill(anchors[:, None] == 0, 0).logsumexp(-1)
    losses = (log_sum - logits.diagonal()) * anchors
    return (level.own * losses).sum(1).div((level.own * anchors).sum(1).clamp(min=1)).mean()


def supcon_of_products(a, b, truth, level, temperature, unit):
    """Eq. 2 for the rows of Q = a @ b.T (N, N), each image with a text of its own; swapped: Q^T."""
    labels = (truth & level.own[:, None]).int().argmax(-1)  # (T, N)
    return torch.stack([product_supcon_loss(a, b, task, temperature, unit_rows=unit)
                        for task in labels]).mean()


def scale_loss(z, truth, taxonomy, logit_scale, temperature, lambdas, unit=True, pairs=None):
    """Eq. 3, the five-term objective: total and {term: value}.

    z (N, H) cosines, truth (N, H) bool with one combination a task, lambdas: the four weights,
    pairs: (N, D) features of the images and of their own texts; None: templated prompts.
    """
    terms = {name: cross_entropy(at_level(z, level), at_level(truth, level), level, logit_scale)
             for name, level in (("combination", taxonomy.combination),
                                 ("concept", taxonomy.concept), ("class", taxonomy.klass))}
    rest = (truth, taxonomy.combination, temperature, unit)
    if pairs is None:
        terms |= {"rows": supcon_of_rows(z, *rest), "columns": supcon_of_columns(z, *rest)}
    else:
        terms |= {"rows": supcon_of_products(*pairs, *rest),
                  "columns": supcon_of_products(*pairs[::-1], *rest)}
    return sum(w * term for w, term in zip((1, *lambdas), terms.values(), strict=True)), terms


# ---- 7. Methods: fit(data, rows, config, generator, log) -> (predict, state) ---------------------
@dataclass(frozen=True)
class Embedded:
    """All that a method may see."""
    images: torch.Tensor     # (N, D) unit length
    texts: torch.Tensor      # (H, D) unit length, one prompt a combination
    negative: torch.Tensor   # (D,)   unit length, "No finding."
    reports: torch.Tensor    # (N, D) unit length, each image's own sentence; (0, D): templates
    truth: torch.Tensor      # (N, H) bool
    taxonomy: Taxonomy
    logit_scale: float       # exp of the checkpoint's logit_scale, frozen (# Choice)


def fit_zeroshot(data, rows, config, generator, log):
    """Frozen cosines: nothing is trained."""
    return lambda images: data.logit_scale * images @ (data.texts - data.negative).T, {}


def fit_scale(data, rows, config, generator, log):
    """Train the two adapters (Fig. 1); predict gives margins (n, H) of unit features (n, D)."""
    if not all(task["exclusive"] for task in data.taxonomy.tasks):
        raise InputError("--method scale trains exclusive tasks only; linear-weighted takes any.")
    dim = data.images.shape[1]
    adapters = nn.ModuleDict({
        branch: Adapter(dim, max(1, dim // config.width), config.alpha, generator)
        for branch in ("image", "text")}).to(data.images.device)  # Choice: one per branch
    lambdas = [float(part) for part in config.lambdas.split(",")]
    if config.rows == "raw":
        print("warning: products of raw rows of Q grow with the batch (Eq. 2)", file=sys.stderr)
    # Choice: constant rate, no decay, and the last epoch is the result: nothing is selected.
    optimizer = torch.optim.Adam(adapters.parameters(), lr=config.lr, fused=True)
    size = config.batch_size or (len(rows) if len(rows) <= 1024 else 256)  # Choice
    for epoch in range(config.epochs):
        start, sums = time.perf_counter(), {}
        order = torch.as_tensor(rows)[torch.randperm(len(rows), generator=generator)]
        for batch in order.split(size):
            images, truth = adapters["image"](data.images[batch]), data.truth[batch]
            texts, pairs = adapters["text"](data.texts), None  # (H, D), the bank of prompts
            if len(data.reports):  # k(h): the batch's first text of h; the bank's where it has none
                pairs = images, adapters["text"](data.reports[batch])
                first = pairs[1][truth.int().argmax(0)]
                texts = first.where(truth.any(0)[:, None], texts)
            loss, terms = scale_loss(images @ texts.T, truth, data.taxonomy, data.logit_scale,
                                     config.temperature, lambdas, config.rows == "unit", pairs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, value in {"loss": loss, **terms}.items():
                sums[name] = sums.get(name, 0) + value.item() * len(batch) / len(rows)
        alphas = {f"alpha_{name}": a.alpha.item() for name, a in adapters.items()}
        log.append({"epoch": epoch, **sums, **alphas, "seconds": time.perf_counter() - start})

    def predict(images):
        """Margins (n, H) of unit features (n, D)."""
        texts = adapters["text"](data.texts) - adapters["text"](data.negative)
        return data.logit_scale * adapters["image"](images) @ texts.T

    return predict, adapters.state_dict()


def fit_linear(data, rows, config, generator, log, weighted=False):
    """Linear probe: H logits of the frozen features, binary cross-entropy, Adam (Sec. 2.3.2).

    weighted: positives count n_neg / n_pos, as in loss-weighted probing (1 where n_pos = 0).
    """
    images, truth = data.images[rows], data.truth[rows].float()
    probe = nn.Linear(images.shape[1], truth.shape[1]).to(images.device)
    nn.init.kaiming_uniform_(probe.weight, a=math.sqrt(5), generator=generator)
    nn.init.zeros_(probe.bias)
    count = truth.sum(0)
    weight = ((len(truth) - count) / count).where(count > 0, 1.0) if weighted else None
    optimizer = torch.optim.Adam(probe.parameters(), lr=config.lr, fused=True)
    for epoch in range(config.epochs):
        loss = F.binary_cross_entropy_with_logits(probe(images), truth, pos_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append({"epoch": epoch, "loss": loss.item()})
    return probe, probe.state_dict()


METHODS = {"zeroshot": fit_zeroshot, "linear": fit_linear,
           "linear-weighted": partial(fit_linear, weighted=True), "scale": fit_scale}


# ---- 8. Metrics (Sec. 2.3.2) ---------------------------------------------------------------------
def area_under_curve(score, truth):
    """Area under the ROC curve, ties counted half (Mann-Whitney); nan without both outcomes.

    score (N,) any real numbers, truth (N,) bool.
    """
    negative, positive = score[~truth].sort().values, score[truth]
    below = sum(torch.searchsorted(negative, positive, right=ties) for ties in (False, True))
    return (below.double().mean() / (2 * len(negative))).item()


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


def mean_of(values):
    """Mean of the numbers that are defined, nan if none is."""
    values = [value for value in values if not math.isnan(value)]
    return sum(values) / len(values) if values else math.nan


def evaluate(margins, truth, trained, taxonomy):
    """All numbers of metrics.json. margins, truth (N, H) of the test set, trained (n, H) truth."""
    per_task = {task["name"]: {} for task in taxonomy.tasks}
    for name, level in (("class", taxonomy.klass), ("class_concept", taxonomy.combination)):
        for t, task in enumerate(taxonomy.tasks):
            columns = level.own[t]
            # Choice: of two exclusive classes, the AUC is that of the second, such as melanoma.
            binary = name == "class" and task["exclusive"] and int(columns.sum()) == 2
            per_task[task["name"]][name] = score_task(
                at_level(margins, level)[:, columns], at_level(truth, level)[:, columns],
                task["exclusive"], 1 if binary else None)
    means = {name: {score: mean_of(task[name].get(score, math.nan) for task in per_task.values())
                    for score in SCORES} for name in ("class", "class_concept")}
    support = {name: {"train": int(a), "test": int(b)} for name, a, b in
               zip(taxonomy.combination.names, trained.sum(0), truth.sum(0), strict=True)}
    return {**means, "per_task": per_task, "support": support,
            "n_train": len(trained), "n_test": len(truth)}


# ---- 9. Runs: one folder per method, fraction and split ------------------------------------------
def run_name(config, backbone):
    """<dataset>-<backbone>-<method>-<frac>-s<seed>, and every other setting off its default."""
    changed = [f"{f.name}={getattr(config, f.name)}" for f in fields(Config)
               if f.metadata["named"] and getattr(config, f.name) != f.default]
    name = "-".join([Path(config.dataset).name, Path(backbone).name, config.method,
                     f"{config.frac:g}", f"s{config.seed}", *changed])
    return "".join(c if c.isalnum() or c in ".,=_-" else "_" for c in name)


def run_once(config, data, samples, origin):
    """Train and evaluate one method on one split; return what metrics.json holds.

    origin (backbone, hashes of checkpoint, embeddings, code) goes into config.json; a run whose
    config.json is the same to the byte is finished and only read.
    """
    train, test = (np.flatnonzero(samples.split == part) for part in ("train", "test"))
    generator = torch.Generator().manual_seed(config.seed)
    labels = torch.cat([samples.truth, at_level(samples.truth, samples.taxonomy.klass)], 1)
    rows = train[stratified_subset(labels[train], config.frac, generator)]
    if config.method != "zeroshot":
        check_subset(samples.truth[rows], samples.taxonomy, config)
    settings = json.dumps({**asdict(config), **origin, "train_rows": rows.tolist()}, indent=1)
    folder = Path(config.out) / run_name(config, origin["backbone"])
    stored = folder / "config.json"
    if not (stored.is_file() and stored.read_text() == settings):
        log = []
        predict, state = METHODS[config.method](data, rows, config, generator, log)
        with torch.no_grad():
            margins = predict(data.images[test]).float().cpu()
        if not margins.isfinite().all():
            raise InputError(f"{folder.name}: training diverged; lower --lr.")
        metrics = evaluate(margins, samples.truth[test], samples.truth[rows], samples.taxonomy)
        write_run(folder, settings, log, state, metrics, samples, test, margins)
    return json.loads((folder / "metrics.json").read_text())


def check_subset(truth, taxonomy, config):
    """Refuse to train where a class has no image."""
    klass = taxonomy.klass
    missing = (~at_level(truth, klass).any(0)).nonzero().flatten().tolist()
    if missing:
        task = taxonomy.tasks[klass.own[:, missing[0]].int().argmax()]["name"]
        raise InputError(f"class {klass.names[missing[0]]!r} of {task!r} has no image among the "
                         f"{len(truth)} training images of seed {config.seed}: raise --frac.")


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
            writer.writerow([samples.images[n].name, ";".join(names[samples.truth[n].numpy()]),
                             *(f"{value:.6g}" for value in values)])
    if state:
        save_file({name: tensor.cpu() for name, tensor in state.items()},
                  unfinished / "adapter.safetensors", {"config": settings})
    text = json.dumps(metrics, indent=1).replace("NaN", "null")
    (unfinished / "metrics.json").write_text(text + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(unfinished, folder)


def format_table(results):
    """Mean and standard deviation over splits, a line per level and method, in Markdown."""
    table = [["level", "method", *SCORES], ["---", "---", *["--:"] * len(SCORES)]]
    for level in ("class", "class_concept"):
        for method, runs in results.items():
            table.append([level, method])
            for score in SCORES:
                values = [m[level][score] for m in runs if m[level].get(score) is not None]
                spread = f" ±{np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
                table[-1].append(f"{np.mean(values):.2f}{spread}" if values else "-")
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in table)


# ---- 10. Command line ----------------------------------------------------------------------------
def find_folder(config):
    """The prepared folder of a data set; `demo` is drawn when it is missing."""
    for folder in (Path(config.data) / config.dataset, Path(config.dataset)):
        if (folder / "samples.csv").is_file():
            return folder
    if config.dataset == "demo":
        from data_prep import prepare_demo
        return prepare_demo(Path(config.data))
    raise InputError(f"{Path(config.data) / config.dataset} is no prepared folder (README, Data): "
                     "for Derm7p ask for release_v0.zip at derm.cs.sfu.ca, unpack it, then run "
                     "python data_prep.py derm7p path/to/release_v0.")


def embed_dataset(config):
    """Everything that all runs share: (Embedded on the device, Samples, origin)."""
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
    negative = config.negative_prompt or spec.get("negative_prompt", "No finding.")
    images, texts = embed(backbone, samples.images, [*prompts, negative, *samples.texts],
                          Path(config.out) / "cache" / f"{key[:16]}.safetensors")
    content = b"".join(t.numpy().tobytes() for t in (images, texts, samples.truth))
    code = b"".join((HERE / file).read_bytes() for file in ("scale.py", "kernels/supcon.py"))
    origin = {"backbone": name, "checkpoint_sha256": checkpoint, "device": str(device),
              "data_sha256": hashlib.sha256(content).hexdigest(), "torch": torch.__version__,
              "code_sha256": hashlib.sha256(code).hexdigest()}
    with torch.device(device):
        taxonomy = make_taxonomy(spec)
    h = len(prompts)
    tensors = (images, texts[:h], texts[h], texts[h + 1:], samples.truth)
    data = Embedded(*(x.to(device) for x in tensors), taxonomy, backbone.logit_scale)
    return data, samples, origin


def run(config):
    """All methods on all splits of one fraction; prints the table."""
    names = list(METHODS) if config.method == "all" else config.method.split(",")
    for name in set(names) - METHODS.keys():
        raise InputError(f"--method {name} is none of: {', '.join(METHODS)}.")
    data, samples, origin = embed_dataset(config)
    torch.set_num_threads(1)  # Choice: small matrices; a second thread makes them slower
    splits = config.splits or (1 if config.frac == 1 else 5)
    jobs = [replace(config, method=name, seed=config.seed + split, splits=1)
            for name in names for split in range(splits)]
    results = {name: [] for name in names}
    for job in progress(jobs, len(jobs), "run"):
        results[job.method].append(run_once(job, data, samples, origin))
    m = results[names[0]][0]
    print((f"\n{config.dataset}: {m['n_train']} training images ({config.frac:.0%}), {m['n_test']} "
           f"test images, {splits} split(s), backbone {origin['backbone']}; runs in {config.out}/\n"
           f"{samples.taxonomy.spec.get('note', '')}").rstrip(), end="\n\n")
    print(format_table(results))


def main(argv=None):
    """Exit code 0; 2 with one sentence for the user's mistakes; 130 after Ctrl-C."""
    try:
        run(parse(argv))
    except (InputError, OSError) as error:
        print(f"scale.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
