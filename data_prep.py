"""Turn a raw release into a prepared folder that scale.py reads (README, Data); fetch weights.

    python data_prep.py derm7p|padchest-gr RAW                   # RAW: the folder as unpacked
    python data_prep.py weights monet|clip|medclip [--from FILE_OR_FOLDER]
"""
import argparse
import ast
import csv
import io
import json
import sys
import zipfile
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scale import guarded, open_image, progress, replace_file, stratified_subset
from weights import InputError, reading

HERE = Path(__file__).resolve().parent
RELEASES = json.loads((HERE / "weights" / "releases.json").read_text("utf-8"))
UNPACK = "unpack the release again"
HEADER = "image", "text", "labels", "split", "patient"  # of samples.csv; labels joined by ;


# ---- What every release needs --------------------------------------------------------------------
def read_table(path):
    """[(where it stands, row as a dict)] of a CSV file, zipped or not."""
    with reading(path, UNPACK):
        data = zipfile.ZipFile(path).read(path.stem) if path.suffix == ".zip" else path.read_bytes()
        rows = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""))
        table = [(f"{path} row {n}", row) for n, row in enumerate(rows, 2)]
        return table or [(f"{path} without rows", {})]

def write_prepared(folder, root, backbone, template, tasks, samples, note="", exclusive=True):
    """Write both files from tasks, name -> [(combination, class, concept, images known)], and from
    samples, rows as HEADER; print the images of every combination beside those known."""
    root = root.relative_to(folder) if root.is_relative_to(folder) else root
    spec = {"tasks": [], "negative_prompt": "No finding.", "backbone": backbone,
            "root": str(root), "note": note}
    for task, rows in tasks.items():
        _, classes, concepts, _ = (list(dict.fromkeys(part)) for part in zip(*rows, strict=True))
        spec["tasks"].append({
            "name": task, "exclusive": exclusive, "classes": classes, "concepts": concepts,
            "combinations": [{"name": name, "class": kind, "concept": concept, "prompt":
                              template.format(name)} for name, kind, concept, _ in rows]})
    csv.writer(table := io.StringIO(), lineterminator="\n").writerows([HEADER, *samples])
    for name, text in {"taxonomy.json": json.dumps(spec), "samples.csv": table.getvalue()}.items():
        replace_file(folder / name, partial(Path.write_text, data=text, encoding="utf-8"))
    if not note:  # not the demo
        print(f"{'images':46}  train  valid   test    all  known  differ by")
        for name, *_, known in sum(tasks.values(), []):
            split = {row[0]: row[3] for row in samples if name in row[2].split(";")}
            counts = [*map([*split.values()].count, ("train", "valid", "test")), len(split), known]
            print(f"{name:46}", *(f"{n:6}" for n in counts), f"{len(split) - known:+10}")
        print(f"{folder} is ready: python scale.py --dataset {folder} --frac 0.05")


# ---- Derm7p: the 28 expressions of the seven-point checklist -------------------------------------
# criterion -> expression -> (score, images in the official train, valid and test split). A score
# above 0 speaks for melanoma: the class belongs to the expression, not to the patient's diagnosis.
DERM7P = RELEASES["derm7p"]
TEMPLATE = "A photo of a skin lesion with {}"  # Sec. 2.3

def combination_name(criterion, expression):
    """'pigmentation', 'diffuse irregular' -> 'diffuse irregular pigmentation'."""
    name = f"{expression} {criterion.replace('_', ' ')}"
    return RELEASES["phrases"].get(name, name)

def prepare_derm7p(raw, folder, backbone="monet", note=""):
    """Prepare release_v0. # Choice: the official splits, the dermoscopic images."""
    raw, samples = raw.resolve() / ("release_v0" if (raw / "release_v0").is_dir() else ""), []
    root, meta = raw / "images", raw / "meta"
    # Folder and file names differ in case from meta.csv: FCl/Fcl068.jpg lies in FCL/.
    found = {p.relative_to(root).as_posix().lower(): p for p in root.glob("*/*")}
    for where, row in read_table(meta / "meta.csv"):
        with reading(where, UNPACK):
            if int(row["seven_point_score"]) != sum(DERM7P[c][row[c]][0] for c in DERM7P):
                raise ValueError("seven_point_score is not the sum of the expressions' scores")
            labels = ";".join(combination_name(c, row[c]) for c in DERM7P)
            image = found[row["derm"].lower()].relative_to(root).as_posix()
            samples.append([image, "", labels, "", row["case_num"]])
    for part in ("train", "valid", "test"):
        for where, row in read_table(meta / f"{part}_indexes.csv"):
            with reading(where, UNPACK):
                sample = samples[int(row["indexes"])]
                if sample[3]:
                    raise ValueError(f"row {row['indexes']} of meta.csv, from 0, is in two splits")
                sample[3] = part
    if not all(sample[3] for sample in samples):
        raise InputError(f"{meta}: a row of meta.csv is in no split; unpack the release again.")
    tasks = {criterion: [
        (combination_name(criterion, e), "melanoma" if score else "nevus", e, sum(known))
        for e, (score, *known) in table.items()] for criterion, table in DERM7P.items()}
    write_prepared(folder.resolve(), root, backbone, TEMPLATE, tasks, samples, note)

def prepare_demo(data):
    """Draw phantoms into <data>/demo/release_v0 and prepare them as Derm7p; return the folder."""
    from weights.phantoms import write_demo_release

    folder, note = data / "demo", "synthetic phantoms: no patient, no medical meaning"
    print(f"{folder}: drawing {note}", file=sys.stderr)
    write_demo_release(folder / "release_v0", DERM7P)
    prepare_derm7p(folder, folder, "demo", note)
    return folder


# ---- PadChest-GR: 12 combinations, by the label and the locations of a finding (Sec. 2.3) --------
PADCHEST_SPLITS = {"train": "train", "validation": "valid", "test": "test"}

def padchest_labels(label, locations):
    """Names of the combinations that a finding states; in a rule of the table a comma is or.

    # Choice: laminar atelectasis is none, blunted angles and loculated effusions are effusions; of
    the three angles the first that fits, so that one without a side is bilateral.
    """
    fits = [name for name, kind, _, _, rule in RELEASES["padchest-gr"]
            if label in RELEASES["labels"][kind]
            and any({*option.split(" + ")} <= {*locations} for option in rule.split(", "))]
    angles = [name for name in fits if name.endswith("angle")]
    return [name for name in fits if name not in angles[1:]]

def shrink(source, target):
    """Write an 8-bit grey PNG whose long side has 256 pixels."""
    image = open_image(source).convert("L")
    image.thumbnail((256, 256), Image.Resampling.BICUBIC)
    replace_file(target, partial(image.save, format="PNG"))

def prepare_padchest(raw, folder, language="en", official=False, seed=0):
    """Prepare PadChest-GR, one row for an image and a sentence with all that it states.

    # Choice: master_table.csv alone, which repeats the positive findings of grounded_reports.
    # Choice: 15% of the patients are test, by chance, the rest train; or the official split.
    """
    stated, patients, studies = {}, {}, {}
    path = next(iter(sorted(raw.rglob("master_table.csv*"))), raw / "master_table.csv")
    for where, row in read_table(path):
        with reading(where, UNPACK):
            image, study = row["ImageID"], (row["PatientID"], PADCHEST_SPLITS[row["split"]])
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
        raise InputError(f"{path} states none of the combinations: unpack the release again.")
    tasks = [row[:4] for row in RELEASES["padchest-gr"]]
    truth = torch.tensor([[row[0] in names for row in tasks] for names in patients.values()])
    test = stratified_subset(truth, 0.15, torch.Generator().manual_seed(seed))
    test = {patient for k, patient in enumerate(patients) if k in test}
    samples = [[image, text, ";".join(names), part if official else
                "test" if patient in test else "train", patient]
               for (image, text, patient, part), names in stated.items()]
    todo = sorted({row[0] for row in samples if not (folder / row[0]).exists()})
    found = {f"images/{path.name}": path for path in raw.rglob("*.png")} if todo else {}
    if lost := [name for name in todo if name not in found]:
        raise InputError(f"{raw} lacks {len(lost)} images, first {lost[0][7:]}: join and unpack "
                         "PadChest_GR.zip.001 to .037 there.")
    for name in progress(todo, len(todo), "images"):
        shrink(found[name], folder / name)
    write_prepared(folder, folder, "medclip", "{}.", {"findings": tasks}, samples, exclusive=False)


# ---- Weights -------------------------------------------------------------------------------------
def convert(source, target):
    """Write weights as safetensors, other files as they are, once they are seen to be whole."""
    if source.suffix in (".json", ".txt"):
        target.write_bytes(source.read_bytes())
        return
    names = zipfile.ZipFile(source).namelist() if zipfile.is_zipfile(source) else []
    inner = [name for name in names if name.endswith("pytorch_model.bin")]  # MedCLIP's zip
    if source.suffix == ".safetensors":
        tensors = load_file(source)
    elif any(name.endswith("constants.pkl") for name in names):  # TorchScript
        tensors = torch.jit.load(source, "cpu").state_dict()
    else:
        file = io.BytesIO(zipfile.ZipFile(source).read(inner[0])) if inner else source
        tensors = torch.load(file, "cpu", weights_only=True, mmap=bool(names and not inner))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target)

def fetch_weights(name, given=None):
    """Fill weights/<name>/ from `given`, a file or a folder; say where to get what is missing."""
    if name not in RELEASES["weights"]:
        raise InputError(f"weights {name}: known are {', '.join(RELEASES['weights'])}.")
    offers = sorted(given.iterdir()) if given and given.is_dir() else [given] if given else []
    offers = {p.name if p.suffix in (".json", ".txt") else "model.safetensors": p for p in offers
              if p == given or p.suffix in (".json", ".txt", ".safetensors", ".bin", ".pt", ".zip")}
    for file, address in RELEASES["weights"][name].items():
        target = HERE / "weights" / name / file
        if file in offers:
            with reading(offers[file], "it must be a whole file of tensors alone"):
                replace_file(target, partial(convert, offers[file]))
            print(f"{target} is ready")
        elif not target.exists():
            print(f"{target} is missing; it comes from {address.replace('#', ', sha256 ')}")

def main(argv=None):
    """Run the command line; return its exit code."""
    parser = argparse.ArgumentParser(prog="data_prep.py", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("release", choices=("derm7p", "padchest-gr", "weights"))
    add("raw", metavar="RAW", type=Path, help="the release as unpacked; or monet, clip, medclip")
    add("--data", default="data", type=Path, help="where to write [data]")
    add("--language", default="en", choices=("en", "es"), help="PadChest-GR's sentences [en]")
    add("--official-split", action="store_true", help="PadChest-GR's own in place of 15%% test")
    add("--seed", default=0, type=int, help="of splits by chance [0]")
    add("--from", dest="given", type=Path, help="weights on disk: a file or a folder")
    args = parser.parse_args(argv)
    folder = (args.data / args.release).resolve()
    return guarded("data_prep.py", {
        "weights": lambda: fetch_weights(str(args.raw), args.given),
        "derm7p": lambda: prepare_derm7p(args.raw, folder),
        "padchest-gr": lambda: prepare_padchest(args.raw, folder, args.language,
                                                args.official_split, args.seed)}[args.release])

if __name__ == "__main__":
    sys.exit(main())
