"""Frozen encoders, a module a family, as functions over their checkpoint's own tensors `w` by name.

Shared: the strict check of a checkpoint (one that loads by halves and still predicts is the worst
failure), layers, `Backbone`. N images or texts of L tokens are W wide in a tower, D after it."""
import json
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
TABLES = json.loads((HERE / "tensors.json").read_bytes())  # names and shapes of the checkpoints

class InputError(Exception):
    """A mistake in the user's input: one sentence that names the thing and the mending command."""

@contextmanager
def reading(path, mend=None):
    """While a user's file is read, whatever goes wrong becomes an InputError that says what to do:
    `mend`, or else the command that gets the checkpoint of weights/<name>/ again, if any does."""
    get = TABLES["mend"].get(Path(path).absolute().parent.name, "a whole copy of the checkpoint")
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        found = " ".join(str(error).split()).split(". ")[0][:300]  # its first sentence
        raise InputError(f"{path}: {kind}{found}; {mend or 'mend it with: ' + get}.") from None

def read_json(path):
    """The object in a JSON file, {} if there is no such file; InputError if it is not one."""
    with reading(path):
        return {**json.loads(path.read_bytes())} if path.exists() else {}

def check_tensors(tensors, family, depths):
    """The tensors that a family uses, float32; ValueError for what is missing, unknown, misshapen.
    tensors.json names them: each # counts up to the next of `depths`, a letter is one size over 1
    wherever it stands. Only vectors are searched for NaN: all would be to read the whole file."""
    expected, ignored, depths = {}, tuple(TABLES[family]["ignored"]), iter(depths)
    for prefix, shapes in TABLES[family]["used"].items():
        for i in range(next(depths) if "#" in prefix else 1):
            expected |= {prefix.replace("#", str(i)) + n: shape for n, shape in shapes.items()}
    found = {n: tuple(t.shape) if t.is_floating_point() and (t.ndim > 1 or t.isfinite().all())
             else f"NaN, inf or {t.dtype}" for n, t in tensors.items() if not n.endswith(ignored)}
    known = {c: size for n in reversed(expected) for c, size in
             zip(expected[n], found.get(n, ()), strict=False) if isinstance(c, str) and size != 1}
    expected = {n: tuple(known.get(c, c) for c in shape) for n, shape in expected.items()}
    if faults := [f"{n} {found.get(n, 'missing')} instead of {expected.get(n, 'none')}"
                  for n in expected | found if found.get(n) != expected.get(n)]:
        raise ValueError(f"{len(faults)} of {len(found)} tensors misfit: {', '.join(faults[:4])}")
    return {n: tensors[n].float() for n in expected}  # a view of the file, if it is float32

def norm(w, name, x, eps=1e-5):
    """LayerNorm of the last dimension of x by `name`.weight and `name`.bias."""
    return F.layer_norm(x, x.shape[-1:], w[name + ".weight"], w[name + ".bias"], eps)

def block(w, p, kind, x, heads, mask=None, causal=False, read=None, act=F.gelu, factor=1.):
    """x (N, L, W) after block `p` of a transformer; with `read` (N,) only its tokens there. The
    activation is act(factor x) / factor; the norms come first in each half, last in BERT's."""
    q, k, v, out, fc1, fc2, one, two = (
        (w[f"{p}{name}.weight"], w[f"{p}{name}.bias"]) for name in TABLES["blocks"][kind])
    width, post, eps = x.shape[2:], kind == "bert", 1e-12 if kind == "bert" else 1e-5
    asking = y = x if post else F.layer_norm(x, width, *one, eps)
    if read is not None:  # (N, 1, W)
        x, asking = (z[torch.arange(len(z), device=z.device), read][:, None] for z in (x, y))
        places = torch.arange(y.shape[1], device=x.device)
        mask, causal = places <= read[:, None, None, None] if causal else mask, False
    q, k, v = (F.linear(z, *pair).unflatten(-1, (heads, -1)).transpose(1, 2)
               for z, pair in ((asking, q), (y, k), (y, v)))  # (N, heads, L, W / heads)
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    x = x + F.linear(y.transpose(1, 2).flatten(2), *out)
    x = F.layer_norm(x, width, *one, eps) if post else x
    y = x if post else F.layer_norm(x, width, *two, eps)
    y = act(torch.addmm(fc1[1], y.flatten(0, 1), fc1[0].T, beta=factor, alpha=factor))
    x = (x + fc2[1]).flatten(0, 1).addmm_(y, fc2[0].T, alpha=1 / factor).view(x.shape)
    return F.layer_norm(x, width, *two, eps) if post else x

class Backbone:
    """A frozen encoder, without what its family adds: tensors, settings, towers, tokenizer."""
    word_table = property(lambda self: self.tensors[self.words])  # (V, W)

    def describe(self):
        """All beyond the tensors that changes an embedding, ready for JSON."""
        files = *self.files, HERE / "tensors.json", *sorted(HERE.glob("*.py"))
        return self.settings | {"files": sha256(b"".join(map(Path.read_bytes, files))).hexdigest()}

    def tokenize(self, texts):
        """Ids (N, L), padded with 0, and lengths (N,) of N texts: start, text cut to fit, end."""
        ids = [[i for word in self.split(text) for i in self.word_pieces(word)] for text in texts]
        ids = [torch.tensor([self.start, *row[:self.context - 2], self.end]) for row in ids]
        return torch.nn.utils.rnn.pad_sequence(ids, True), torch.tensor([len(row) for row in ids])

    def encode_image(self, pixels):
        """(N, D), not normalised, of pixels (N, 3, H, W) from `preprocess`."""
        return self.encode(self.image_tower, pixels.to(self.word_table))

    def encode_text(self, texts):
        """(N, D), not normalised, of a list of N texts."""
        return self.encode(self.text_tower, *self.tokenize(texts))

    @torch.no_grad()
    def encode(self, tower, *inputs):
        """(N, D) of a tower; InputError if a weight's NaN or infinity has reached them."""
        x = tower(self.tensors, *(x.to(self.word_table.device) for x in inputs)).float()
        if not torch.isfinite(x).all():
            with reading(self.path):
                raise ValueError("its weights give embeddings with NaN or infinity")
        return x
