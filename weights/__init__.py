"""Frozen encoders as functions over their checkpoint's own tensors, one module a family.

Here is what the families share: reading a checkpoint without copying it, and the strict check of
its tensors' names and shapes. A medical backbone that loads by halves and still predicts is the
worst failure, so nothing is skipped but what a named list allows.
"""
import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file


class InputError(Exception):
    """A mistake in the user's input: one sentence that names the thing and the mending command."""


def misfit(path, expected, found):
    """InputError that says of a file below weights/<name>/ what was expected and what found."""
    name = Path(path).absolute().parent.name
    return InputError(f"{path}: expected {expected}, found {found}; "
                      f"mend it with: python data_prep.py weights {name}")


def read_json(path):
    """The object in a JSON file, {} if there is no such file; InputError if it is not one."""
    try:
        found = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise misfit(path, "JSON", error) from error
    if not isinstance(found, dict):
        raise misfit(path, "a JSON object", f"a {type(found).__name__}")
    return found


def read_tensors(path):
    """Name -> tensor of a safetensors file, memory-mapped; other floating types become float32.

    float32 tensors stay views of the file, so that loading reads only what is used later.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        found = str(error) if Path(path).exists() else "no such file"
        if Path(path).is_file():
            with open(path, "rb") as file:
                found = "a Git LFS pointer" if file.read(7) == b"version" else found
        raise misfit(path, "a complete safetensors file", found) from error
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def check_tensors(path, tensors, expected, ignore=(), alias=str):
    """The tensors that `expected` (name -> shape) names; InputError for a difference either way.

    `ignore`: endings of names to drop; `alias` turns a name into the file's own spelling. Only
    vectors are searched for NaN: to search all would read the whole file.
    """
    extra = [n for n in tensors if n not in expected and not n.endswith(tuple(ignore))]
    wrong = [f"the unknown {alias(n)} {tuple(tensors[n].shape)}" for n in extra]
    for name, shape in expected.items():
        if name not in tensors:
            like = [f", unless it is {alias(n)}" for n in extra if tensors[n].shape == shape]
            wrong.append(f"no {alias(name)} {shape}" + "".join(like[:1]))
        elif tensors[name].shape != shape:
            wrong.append(f"{alias(name)} of shape {tuple(tensors[name].shape)} instead of {shape}")
        elif len(shape) < 2 and not torch.isfinite(tensors[name]).all():
            wrong.append(f"NaN or infinity in {alias(name)}")
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise misfit(path, f"{len(expected)} tensors of known shape", "; ".join(wrong[:4]) + more)
    return {name: tensors[name] for name in expected}
