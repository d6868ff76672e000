"""Frozen encoders as functions over their checkpoint's own tensors, one module a family.

What they share: reading a checkpoint without copying it, and the strict check of its tensors. A
medical backbone that loads by halves and still predicts is the worst failure.
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
    mend = "git checkout weights/demo" if name == "demo" else f"python data_prep.py weights {name}"
    return InputError(f"{path}: expected {expected}, found {found}; mend it with: {mend}")


def read_json(path):
    """The object in a JSON file, {} if there is no such file; InputError if it is not one."""
    try:
        return {**json.loads(Path(path).read_bytes())}
    except FileNotFoundError:
        return {}
    except (OSError, TypeError, ValueError) as error:
        raise misfit(path, "a JSON object", error) from error


def read_tensors(path):
    """Name -> tensor of a safetensors file, a view of it if float32; other floats become that."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise misfit(path, "a whole safetensors file, no Git LFS pointer", error) from error
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def check_tensors(path, tensors, expected, ignore=(), alias=str):
    """The tensors that `expected` (name -> shape) names; InputError for a difference either way.

    `ignore`: endings of names to drop; `alias` turns a name into the file's own spelling. Only
    vectors are searched for NaN: to search all would read the whole file.
    """
    wrong = [f"the unknown {alias(name)} {tuple(tensor.shape)}" for name, tensor in tensors.items()
             if name not in expected and not name.endswith(tuple(ignore))]
    for name, shape in expected.items():
        if name not in tensors:
            wrong.append(f"no {alias(name)} {shape}")
        elif tensors[name].shape != shape:
            wrong.append(f"{alias(name)} of shape {tuple(tensors[name].shape)} instead of {shape}")
        elif len(shape) < 2 and not torch.isfinite(tensors[name]).all():
            wrong.append(f"NaN or infinity in {alias(name)}")
    if wrong:
        found = f"{len(wrong)} fault(s): " + "; ".join(wrong[:4])
        raise misfit(path, f"{len(expected)} tensors of known shape", found)
    return {name: tensors[name] for name in expected}
