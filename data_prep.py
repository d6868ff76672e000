"""Turn a raw release, as downloaded, into a prepared folder that scale.py reads.

    python data_prep.py derm7p RAW      # RAW: the unpacked release_v0 of Derm7pt
    python data_prep.py weights monet   # says which files of a checkpoint belong where

A prepared folder <data>/<name>/ holds two files; the images stay where they are:
    taxonomy.json   tasks with their classes, concepts and combinations, prompts, backbone, root
    samples.csv     image (below root), text, labels (combinations joined by ;), split, patient
"""

import argparse
import csv
import json
import os
import sys
from pathlib import Path

from weights import InputError

# ---- Derm7p: the 28 expressions of the seven-point checklist -------------------------------------
# criterion -> expression -> (score, images in the official train, valid and test split). A score
# above 0 speaks for melanoma: the class belongs to the expression, not to the patient's diagnosis.
DERM7P = {
    "pigment_network": {
        "absent": (0, 160, 84, 156), "typical": (0, 160, 75, 146), "atypical": (2, 93, 44, 93)},
    "blue_whitish_veil": {"absent": (0, 339, 157, 320), "present": (2, 74, 46, 75)},
    "vascular_structures": {
        "absent": (0, 347, 163, 313), "arborizing": (0, 12, 6, 13), "comma": (0, 8, 4, 11),
        "hairpin": (0, 4, 3, 8), "within regression": (0, 18, 8, 20), "wreath": (0, 1, 1, 0),
        "dotted": (2, 18, 13, 22), "linear irregular": (2, 5, 5, 8)},
    "pigmentation": {
        "absent": (0, 253, 112, 223), "diffuse regular": (0, 44, 26, 45),
        "localized regular": (0, 0, 0, 3), "diffuse irregular": (1, 100, 57, 108),
        "localized irregular": (1, 16, 8, 16)},
    "streaks": {
        "absent": (0, 273, 123, 257), "regular": (0, 39, 24, 44), "irregular": (1, 101, 56, 94)},
    "dots_and_globules": {
        "absent": (0, 84, 45, 100), "regular": (0, 156, 60, 118), "irregular": (1, 173, 98, 177)},
    "regression_structures": {
        "absent": (0, 317, 152, 289), "blue areas": (1, 42, 26, 48), "white areas": (1, 14, 9, 15),
        "combinations": (1, 40, 16, 43)},
}
PHRASES = {  # where "<expression> <criterion>" is no English
    "absent regression structures": "absent regression",
    "within regression vascular structures": "vascular structures within regression",
    "blue areas regression structures": "blue areas of regression",
    "white areas regression structures": "white areas of regression",
    "combinations regression structures": "combinations of regression areas",
}
TEMPLATE = "A photo of a skin lesion with {}"  # Sec. 2.3
SPLITS = ("train", "valid", "test")


def combination_name(criterion, expression):
    """'pigmentation', 'diffuse irregular' -> 'diffuse irregular pigmentation'."""
    name = f"{expression} {criterion.replace('_', ' ')}"
    return PHRASES.get(name, name)


def derm7p_taxonomy(root, backbone, note):
    """Seven exclusive tasks, 28 combinations; in Derm7p an expression is a concept of one class."""
    tasks = []
    for criterion, expressions in DERM7P.items():
        names = {e: combination_name(criterion, e) for e in expressions}
        combinations = [
            {"name": names[e], "class": "melanoma" if score else "nevus", "concept": e,
             "prompt": TEMPLATE.format(names[e])} for e, (score, *_) in expressions.items()]
        tasks.append({"name": criterion, "exclusive": True, "classes": ["nevus", "melanoma"],
                      "concepts": list(expressions), "combinations": combinations})
    return {"tasks": tasks, "negative_prompt": "No finding.", "backbone": backbone,
            "root": str(root), "note": note}


def read_table(path, columns):
    """Rows of a CSV file as dicts; InputError if it cannot be read or lacks one of the columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read ({error}): unpack release_v0.zip again.") from None
    missing = [c for c in columns if not rows or rows[0].get(c) is None]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}: unpack release_v0.zip again.")
    return rows


def read_splits(meta, n):
    """Split of each of the n rows of meta.csv; the index files hold 0-based row numbers."""
    split = [None] * n
    for part in SPLITS:
        path = meta / f"{part}_indexes.csv"
        for line, row in enumerate(read_table(path, ["indexes"]), 2):
            index = int(row["indexes"]) if (row["indexes"] or "").isdecimal() else n
            if index >= n or split[index]:
                raise InputError(f"{path} line {line}: {row['indexes']!r} is not the number of a "
                                 f"row (0 to {n - 1}) that no split has yet.")
            split[index] = part
    if None in split:
        raise InputError(f"{meta}: row {split.index(None)} of meta.csv is in none of the splits.")
    return split


def derm7p_labels(row, where):
    """The seven combinations of a row of meta.csv, checked against its seven_point_score."""
    labels, total = [], 0
    for criterion, expressions in DERM7P.items():
        if row[criterion] not in expressions:
            raise InputError(f"{where}: {criterion} is {row[criterion]!r}, expected one of "
                             f"{', '.join(expressions)}.")
        labels.append(combination_name(criterion, row[criterion]))
        total += expressions[row[criterion]][0]
    if str(total) != row["seven_point_score"]:
        raise InputError(f"{where}: the expressions score {total}, seven_point_score says "
                         f"{row['seven_point_score']!r}.")
    return labels


def prepare_derm7p(raw, folder, backbone="monet", note=""):
    """Read release_v0 as downloaded, write the prepared folder, return the rows of samples.csv."""
    raw = next((r for r in (raw / "release_v0", raw) if (r / "meta").is_dir()), raw)
    columns = [*DERM7P, "seven_point_score", "derm", "case_num"]
    rows = read_table(raw / "meta" / "meta.csv", columns)
    splits = read_splits(raw / "meta", len(rows))
    root = raw.resolve() / "images"
    # Folder and file names differ in case from meta.csv: FCl/Fcl068.jpg lies in FCL/.
    found = {p.relative_to(root).as_posix().lower(): p for p in root.glob("*/*")}
    samples = []
    for n, (row, split) in enumerate(zip(rows, splits, strict=True)):
        where = f"{raw / 'meta' / 'meta.csv'} line {n + 2}"
        image = found.get((row["derm"] or "").lower())
        if image is None:
            raise InputError(f"{where}: no image {row['derm']} in {root}; unpack the zip again.")
        labels = ";".join(derm7p_labels(row, where))
        # Choice: the dermoscopic image, not the clinical one.
        samples.append([image.relative_to(root).as_posix(), "", labels, split, row["case_num"]])
    if root.is_relative_to(folder.resolve()):
        root = root.relative_to(folder.resolve())
    write_prepared(folder, derm7p_taxonomy(root, backbone, note), samples)
    return samples


def print_counts(samples):
    """Each expression's images per split beside the count of the published release."""
    print(f"{'images (known)':36}{'train':>11}{'valid':>11}{'test':>11}")
    for criterion, expressions in DERM7P.items():
        for expression, (_, *known) in expressions.items():
            name = combination_name(criterion, expression)
            counts = [sum(row[3] == part and name in row[2].split(";") for row in samples)
                      for part in SPLITS]
            cells = (f"{count:5} ({k:3})" for count, k in zip(counts, known, strict=True))
            print(f"{name:36}", *cells, "" if counts == known else "differs")


def write_prepared(folder, taxonomy, samples):
    """Write taxonomy.json, then samples.csv, each under a temporary name until whole."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".partial.{os.getpid()}"
    partial.write_text(json.dumps(taxonomy, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / "taxonomy.json")
    with open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "text", "labels", "split", "patient"])
        writer.writerows(samples)
    os.replace(partial, folder / "samples.csv")


# ---- The demo: synthetic phantoms in Derm7p's layout ---------------------------------------------
def prepare_demo(data):
    """Draw phantoms into <data>/demo/release_v0 and prepare them as Derm7p; return the folder."""
    from weights.phantoms import write_demo_release

    folder, note = data / "demo", "synthetic phantoms: no patient, no medical meaning"
    print(f"{folder}: drawing {note}", file=sys.stderr)
    write_demo_release(folder / "release_v0", DERM7P)
    prepare_derm7p(folder, folder, "demo", note)
    return folder


# ---- Weights -------------------------------------------------------------------------------------
SOURCES = {"monet": "chanwkim/monet on Hugging Face (CC BY-NC-SA 4.0)",
           "clip": "openai/clip-vit-large-patch14 on Hugging Face (MIT)"}


def main(argv=None):
    """Exit code 0, or 2 with one sentence for the user's mistakes."""
    parser = argparse.ArgumentParser(prog="data_prep.py", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    derm7p = commands.add_parser("derm7p")
    derm7p.add_argument("raw", type=Path, help="folder of the release as downloaded")
    derm7p.add_argument("--data", default="data", type=Path, help="where to write [data]")
    commands.add_parser("weights").add_argument("name", help="such as monet or clip")
    args = parser.parse_args(argv)
    try:
        if args.command == "weights":
            print("put model.safetensors, config.json, preprocessor_config.json, vocab.json and "
                  f"merges.txt of {SOURCES.get(args.name, args.name)} into weights/{args.name}/")
        else:
            samples = prepare_derm7p(args.raw, args.data / args.command)
            print_counts(samples)
            print(f"{args.data / args.command}: {len(samples)} images prepared; next: "
                  f"python scale.py --dataset {args.command} --frac 0.05")
    except (InputError, OSError) as error:
        print(f"data_prep.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
