"""Turn a raw release into a prepared folder that scale.py reads (README, Data); fetch weights.

    python data_prep.py derm7p|padchest-gr|chest-xray|busi RAW   # RAW: the folder as unpacked
    python data_prep.py weights monet|clip|medclip [--from FILE_OR_FOLDER]
"""
import argparse
import ast
import csv
import io
import json
import shutil
import time
import zipfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from safetensors.torch import load_file, save_file

import scale
from weights import HERE, InputError, reading

RELEASES = json.loads((HERE / "releases.json").read_bytes())
DERM7P = {task["name"]: {c["concept"]: c["name"] for c in task["combinations"]}
          for task in RELEASES["taxonomies"]["derm7p"]["tasks"]}  # criterion -> expression -> name
UNPACK = "unpack the release again"
SPLITS = {"train": "train", "validation": "valid", "val": "valid", "test": "test"}

def read_table(path):
    """[(where it stands, row as a dict)] of a CSV file, zipped or not."""
    with reading(path, UNPACK):
        data = zipfile.ZipFile(path).read(path.stem) if path.suffix == ".zip" else path.read_bytes()
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        table = [(f"{path} row {n}", row) for n, row in enumerate(rows, 2)]
        return table or [(f"{path} without rows", {})]

def write_prepared(release, folder, root, samples, **changes):
    """Write taxonomy.json, with `changes`, and samples.csv; print images of each combination."""
    root = root.relative_to(folder) if root.is_relative_to(folder) else root
    spec = RELEASES["taxonomies"][release] | {"root": str(root)} | changes
    head = "image", "text", "labels", "split", "patient"
    scale.write_files(folder, {"taxonomy.json": json.dumps(spec), "samples.csv": [head, *samples]})
    if not changes:  # not the demo
        print(f"{'images':46}  train  valid   test    all  known  differ by")
        for name, known in RELEASES["images"][release].items():
            split = [*{row[0]: row[3] for row in samples if name in row[2].split(";")}.values()]
            counts = *map(split.count, ("train", "valid", "test")), len(split), sum(known)
            print(f"{name:46}", *(f"{n:6}" for n in counts), f"{len(split) - sum(known):+10}")
        print(f"{folder} is ready: python scale.py --dataset {folder} --frac 0.05")

def prepare_derm7p(raw, folder, **changes):
    """Prepare release_v0. # Choice: the official splits, the dermoscopic images; the class belongs
    to the expression, by its score in the seven-point checklist, not to the patient's diagnosis."""
    raw, samples = raw.resolve() / ("release_v0" if (raw / "release_v0").is_dir() else ""), []
    root, meta = raw / "images", raw / "meta"  # meta.csv's FCl/Fcl068.jpg lies in FCL/
    found = {(name := path.relative_to(root).as_posix()).lower(): name for path in root.glob("*/*")}
    for where, row in read_table(meta / "meta.csv"):
        with reading(where, UNPACK):
            names = [known[row[criterion]] for criterion, known in DERM7P.items()]
            if int(row["seven_point_score"]) != sum(RELEASES["scores"].get(n, 0) for n in names):
                raise ValueError("seven_point_score is not the sum of the expressions' scores")
            samples.append([found[row["derm"].lower()], "", ";".join(names), "", row["case_num"]])
    for part in ("train", "valid", "test"):
        for where, row in read_table(meta / f"{part}_indexes.csv"):
            with reading(where, UNPACK):
                samples[int(row["indexes"])][3] += part
    if wrong := [n for n, row in enumerate(samples) if row[3] not in ("train", "valid", "test")]:
        raise InputError(f"{meta}: row {wrong[0]}, from 0, is in no split or in two; {UNPACK}.")
    write_prepared("derm7p", folder.resolve(), root, samples, **changes)

def padchest_labels(label, locations):
    """Names of the combinations that a finding states, by all locations of one of their lists.
    # Choice: laminar atelectasis is none, blunted angles and loculated effusions are effusions; of
    the three angles the first that fits, so that one without a side is bilateral."""
    fits = [name for labels, rules in RELEASES["rules"] if label in labels
            for name, lists in rules.items() if any({*part} <= {*locations} for part in lists)]
    angles = [name for name in fits if name.endswith("angle")]
    return [name for name in fits if name not in angles[1:]]

def prepare_padchest(raw, folder, rng, language, official):
    """Prepare PadChest-GR, one row for an image and a sentence with all that it states.
    # Choice: master_table.csv alone, which repeats the positive findings of grounded_reports.
    # Choice: 15% of the patients are test, by chance, the rest train; or the official split."""
    stated, patients, studies = {}, {}, {}
    path = min(raw.rglob("master_table.csv*"), default=raw / "master_table.csv")
    for where, row in read_table(path):
        with reading(where, UNPACK):
            image, study = row["ImageID"], (row["PatientID"], SPLITS[row["split"]])
            locations = ast.literal_eval(row["locations"])
            if type(locations) is not list or Path(image).name != image or not study[0]:
                raise ValueError("locations: no list, ImageID: no file name, or no PatientID")
            if studies.setdefault(image, study) != study:
                raise ValueError(f"{image} has two patients or splits")
            for name in padchest_labels(row["label"], locations):
                text = row[f"sentence_{language}"].strip() or name
                stated.setdefault((f"images/{image}", text, *study), {})[name] = True
                patients.setdefault(study[0], set()).add(name)
    if not stated:
        raise InputError(f"{path} states none of the combinations: {UNPACK}.")
    known = RELEASES["images"]["padchest-gr"]
    truth = torch.tensor([[name in names for name in known] for names in patients.values()])
    test = scale.stratified_subset(truth, 0.15, rng)
    drawn = {patient: "test" if k in test else "train" for k, patient in enumerate(patients)}
    samples = [[image, text, ";".join(names), part if official else drawn[patient], patient]
               for (image, text, patient, part), names in stated.items()]
    todo = sorted({row[0] for row in samples if not (folder / row[0]).exists()})
    found = {f"images/{path.name}": path for path in raw.rglob("*.png")} if todo else {}
    if lost := [name for name in todo if name not in found]:
        raise InputError(f"{raw} lacks {len(lost)} images, first {lost[0][7:]}: join and unpack "
                         "PadChest_GR.zip.001 to .037 there.")
    for name in scale.progress(todo, len(todo), "images"):
        image = scale.open_image(found[name]).convert("L")  # of 16 bits, long side over 2,000
        image.thumbnail((256, 256))  # bicubic
        scale.replace_file(folder / name, partial(image.save, format="PNG"))
    write_prepared("padchest-gr", folder, folder, samples)

def prepare_folders(release, raw, folder, rng):
    """Prepare [train|val|test/]<class>/<image>. # Choice: or 15% test, 15% valid, by chance."""
    known, root, found = RELEASES["images"][release], raw.resolve(), {}
    for path in sorted(root.rglob("[!.]*.*"), key=lambda path: (len(path.parts), path)):
        part, kind, name = ("", "", *path.relative_to(root).as_posix().lower().split("/"))[-3:]
        if kind in known and name.endswith((".png", ".jpg", ".jpeg")) and "_mask" not in name:
            found.setdefault((SPLITS.get(part, ""), kind, name), path.relative_to(root).as_posix())
    have = [len({k for p, k, _ in found if p == part}) for part in ("", "train", "test")]
    if have not in ([len(known), 0, 0], [0, len(known), len(known)]):  # by split
        raise InputError(f"{raw} lacks {' or '.join(known)}, alone or in train and test: {UNPACK}.")
    samples = [[image, "", kind, part, ""] for (part, kind, _), image in found.items()]
    truth = torch.tensor([[row[2] == kind for kind in known] for row in samples])
    held = scale.stratified_subset(truth, 0.3, rng)
    test = held[scale.stratified_subset(truth[held], 0.5, rng)]
    for k, row in enumerate(samples):
        row[3] = row[3] or ("test" if k in test else "valid" if k in held else "train")
    write_prepared(release, folder, root, samples)

def convert(source, target):
    """Write weights as safetensors, other files as they are, once they are seen to be whole."""
    if source.suffix in (".json", ".txt", ".safetensors"):
        if source.suffix == ".safetensors":
            load_file(source)
        elif source.read_bytes().lstrip()[:1] == b"<":
            raise ValueError("a web page in place of the file")
        return shutil.copyfile(source, target)
    names = zipfile.ZipFile(source).namelist() if zipfile.is_zipfile(source) else []
    inner = [name for name in names if name.endswith("pytorch_model.bin")]  # MedCLIP's zip
    if any(name.endswith("constants.pkl") for name in names):  # TorchScript
        tensors = torch.jit.load(source, "cpu").state_dict()
    else:
        file = io.BytesIO(zipfile.ZipFile(source).read(inner[0])) if inner else source
        tensors = torch.load(file, "cpu", weights_only=True, mmap=bool(names and not inner))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)

def receive(url, part):
    """Append to the file `part` what it lacks of the one at `url`; OSError if that is cut off."""
    note = part.with_name(part.name + ".version")  # the ETag or date of what `part` holds
    kept = max(part.stat().st_size - 1, 0) if note.exists() else 0  # no server sends 0 bytes
    headers = {"Range": f"bytes={kept}-", "If-Range": note.read_text()} if kept else {}
    with urlopen(Request(url, headers=headers), timeout=30) as answer, open(part, "ab") as file:
        file.truncate(file.seek(kept if answer.status == 206 else 0))  # else all is sent again
        note.write_text(answer.headers["ETag"] or answer.headers["Last-Modified"] or '"none"')
        size = file.tell() + int(answer.headers["Content-Length"] or 0)
        blocks = iter(partial(answer.read, 1 << 20), b"")
        file.writelines(scale.progress(blocks, -((file.tell() - size) >> 20), f"{part.name}, MiB:"))
        if file.tell() < size:
            raise ConnectionError(f"cut off after {file.tell()} of {size} bytes")
    note.unlink()  # whole: nothing is to be resumed
    return part

def download(url, part):
    """Path `part` of the file at `url`, fetched in up to four tries; InputError if in vain."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with reading(url, "run this again to go on, or download it by hand and add --from FILE"):
        for pause in (0, 1, 2, 4):  # seconds
            time.sleep(pause)
            with suppress(OSError if pause < 4 else ()):
                return receive(url, part)

def fetch_weights(name, given=None):
    """Fill weights/<name>/ from `given`, a file or a folder; download what is missing then."""
    if name not in RELEASES["weights"]:
        raise InputError(f"weights {name}: known are {', '.join(RELEASES['weights'])}.")
    offers = sorted(given.iterdir()) if given and given.is_dir() else [given] if given else []
    offers = {p.name if p.suffix in (".json", ".txt") else "model.safetensors": p for p in offers
              if p == given or p.suffix in (".json", ".txt", ".safetensors", ".bin", ".pt", ".zip")}
    for file, address in RELEASES["weights"][name].items():
        target, (url, _, published) = HERE / name / file, address.partition("#")
        if file in offers or not target.exists():
            source = offers.get(file) or download(url, target.parent / ".download" / Path(url).name)
            with reading(source, f"get the whole file from {url} and add --from FILE"):
                digest = scale.digest_file(source, "name a file or folder that is there")
                if file not in offers and digest != (published or digest):
                    raise ValueError(f"its sha256 is {digest} instead of {published}")
                scale.replace_file(target, partial(convert, source))
            shutil.rmtree(target.parent / ".download", ignore_errors=True)
            target.with_name(file + ".sha256").write_text(f"{digest}  {source.name}\n")
            print(f"{target} is ready, from {source.name} of sha256 {digest}")

def main(argv=None):
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="data_prep.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("release", choices=("derm7p", "padchest-gr", "chest-xray", "busi", "weights"))
    add("raw", metavar="RAW", type=Path, help="the release as unpacked; or monet, clip, medclip")
    add("--data", default="data", type=Path, help="where to write [data]")
    add("--language", default="en", choices=("en", "es"), help="PadChest-GR's sentences [en]")
    add("--official-split", action="store_true", help="PadChest-GR's own in place of 15%% test")
    add("--seed", default=0, type=int, help="of splits by chance [0]")
    add("--from", dest="given", type=Path, help="weights on disk: a file or a folder")
    args = parser.parse_args(argv)
    raw, out = args.raw, (args.data / args.release).resolve()
    rng = torch.Generator().manual_seed(args.seed % 2**63)
    jobs = {"weights": (fetch_weights, str(raw), args.given), "derm7p": (prepare_derm7p, raw, out),
            "padchest-gr": (prepare_padchest, raw, out, rng, args.language, args.official_split)}
    job = jobs.get(args.release, (prepare_folders, args.release, raw, out, rng))
    return scale.guarded("data_prep.py", partial(*job))

if __name__ == "__main__":
    raise SystemExit(main())
