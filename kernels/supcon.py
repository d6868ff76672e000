# SPDX-License-Identifier: Apache-2.0
"""Supervised contrastive loss over all N x N pairs, without ever holding an N x N matrix.

    loss_i = log sum_{j != i} exp(x_i . x_j / tau) - mean_{p in P(i)} x_i . x_p / tau

P(i): the other samples with the label of i (L_out of Khosla et al., arXiv:2004.11362). Autograd
keeps five N x N matrices; here a tile of pairs is made twice and never kept. Forward, it gives
log-sum-exp, sum and number of positives of its rows AND its columns: of a symmetric matrix the
upper triangle is enough, CLIP's two directions are one pass. Backward, it becomes dL/dlogits,
softmax minus positives in float32 before any rounding: confident positives keep their gradient.
No atomics: the same input, the same bits. Triton makes the tiles on a GPU (fp32 by three tf32
products), else torch. Triton's passed its interpreter and compile for sm_80 to sm_100 (tensor
cores, no spills); they have NOT yet run on a GPU.

    loss = supcon_loss(torch.nn.functional.normalize(features, dim=1), labels)
    python supcon.py 512 4096        # benchmark at these N; on a GPU it first checks the kernels
"""
import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import vecdot

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: torch tiles do everything
    triton = None


# ---- 1. The formula in plain torch: reference and yardstick --------------------------------------
def supcon_reference(features, labels, temperature=0.07):
    """Mean SupCon loss by dense matrices and autograd: (..., N, D), (..., N) -> (...)."""
    itself = torch.eye(features.shape[-2], dtype=torch.bool, device=features.device)
    logits = (features @ features.mT / temperature).masked_fill(itself, -math.inf)
    positive = (labels[..., None] == labels[..., None, :]) & ~itself
    count = positive.sum(-1)
    mean_positive = torch.where(positive, logits, 0).sum(-1) / count.clamp(min=1)
    losses = torch.where(count > 0, logits.logsumexp(-1) - mean_positive, 0)
    return losses.sum(-1) / (count > 0).sum(-1).clamp(min=1)


# ---- 2. One tile of R rows and C columns, in torch -----------------------------------------------
def _torch_tile(a, b, a_labels, b_labels, scale, itself, rows=None, cols=None):
    """(lse, positive sum, count) of the tile's rows (1, 3, R) and of its columns (1, 3, C).

    Given (lse, dL/dlse, dL/dsum) of complete rows and columns: its weights dL/dlogits (R, C).
    itself: rows and columns are the same samples; the diagonal is left out, the rows say all.
    """
    same, logits = a_labels[:, None] == b_labels, (a @ b.T).mul_(scale)
    if rows is not None:
        weights = (logits - rows[0, :, None]).exp_().mul_(rows[1, :, None])
        weights += logits.sub_(cols[0]).exp_().mul_(cols[1])
        weights += torch.where(same, torch.add(rows[2, :, None], cols[2], out=logits), 0)
        return weights.fill_diagonal_(0) if itself else weights
    if itself:
        same.fill_diagonal_(False)
        logits.fill_diagonal_(-math.inf)
    positives = torch.where(same, logits, 0)
    return [torch.stack([logits.logsumexp(d), positives.sum(d), same.sum(d)])[None]
            for d in (1, 0)[: 2 - itself]]


# ---- 3. The same tile in Triton ------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _tile_kernel(a_ptr, b_ptr, a_label_ptr, b_label_ptr, scale_ptr, row_ptr, col_ptr,
                     weight_ptr, n_rows, n_cols, itself, WEIGHTS: tl.constexpr,
                     DIM: tl.constexpr, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
        """WEIGHTS: read row (3, n_rows) and col (3, n_cols), write weight (n_rows, n_cols).
        Else write the tile's statistics to row (tiles, 3, n_rows) and col (tiles, 3, n_cols)."""
        r, c = tl.program_id(0), tl.program_id(1)  # a block of pairs is small: 32-bit offsets
        rows, cols = (r * R + tl.arange(0, R))[:, None], (c * C + tl.arange(0, C))[None, :]
        row_in, col_in, logits = rows < n_rows, cols < n_cols, tl.zeros((R, C), tl.float32)
        for start in range(0, DIM, D):
            d = start + tl.arange(0, D)
            a = tl.load(a_ptr + rows * DIM + d[None, :], row_in & (d < DIM)[None, :], 0.0)
            b = tl.load(b_ptr + cols * DIM + d[:, None], col_in & (d < DIM)[:, None], 0.0)
            logits = tl.dot(a, b, logits, input_precision="tf32x3")
        logits *= tl.load(scale_ptr)
        shown = row_in & col_in & ((rows != cols) | (itself == 0))
        if WEIGHTS:
            row, col = row_ptr + rows, col_ptr + cols
            weights = tl.exp(logits - tl.load(row, row_in)) * tl.load(row + n_rows, row_in)
            weights += tl.exp(logits - tl.load(col, col_in)) * tl.load(col + n_cols, col_in)
            share = tl.load(row + 2 * n_rows, row_in) + tl.load(col + 2 * n_cols, col_in)
            same = tl.load(a_label_ptr + rows, row_in) == tl.load(b_label_ptr + cols, col_in)
            weights = tl.where(shown, weights + tl.where(same, share, 0.0), 0.0)
            tl.store(weight_ptr + rows * n_cols + cols, weights, row_in & col_in)
        else:
            logits = tl.where(shown, logits, float("-inf"))
            for axis in tl.static_range(1, -1, -1):  # labels loaded twice: kept, `same` spills
                n, index = n_rows if axis else n_cols, rows if axis else cols
                out = row_ptr + c * 3 * n if axis else col_ptr + r * 3 * n
                same = tl.load(a_label_ptr + rows, row_in) == tl.load(b_label_ptr + cols, col_in)
                same = same & (logits > float("-inf"))
                total = tl.sum(tl.where(same, logits, 0.0), axis, keep_dims=True)
                tl.store(out + n + index, total, index < n)
                count = tl.sum(same.to(tl.float32), axis, keep_dims=True)
                tl.store(out + 2 * n + index, count, index < n)
                top = tl.maximum(tl.max(logits, axis, keep_dims=True), -1e30)
                total = tl.sum(tl.exp(logits - top), axis, keep_dims=True)
                tl.store(out + index, top + tl.log(total), index < n)

def _triton_tile(a, b, a_labels, b_labels, scale, itself, rows=None, cols=None):
    """What `_torch_tile` does, by many tiles; their shape is the largest that does not spill."""
    shape = (128, 64, 32) if a.dtype == torch.float32 else (128, 128, 64)
    r, c, d = shape if a.is_cuda else (32, 32, 32)
    grid, given = (triton.cdiv(len(a), r), triton.cdiv(len(b), c)), rows is not None
    if not given:
        rows, cols = scale.new_empty(grid[1], 3, len(a)), scale.new_empty(grid[0], 3, len(b))
    weights = a.new_empty(len(a), len(b)) if given else rows
    _tile_kernel[grid](
        a, b, a_labels, b_labels, scale, rows.contiguous(), cols.contiguous(), weights, len(a),
        len(b), int(itself), WEIGHTS=given, DIM=a.shape[1], R=r, C=c, D=d, num_warps=8)
    return weights if given else [rows, cols][: 2 - itself]


# ---- 4. All pairs, as an operator that autograd and torch.compile know ---------------------------
def _cut(start, stop, step):
    return [slice(i, min(i + step, stop)) for i in range(start, stop, step)]

@torch.library.custom_op(__name__.replace(".", "_") + "::all_pairs", mutates_args=())
def all_pairs(x: Tensor, labels: Tensor, scale: Tensor, metric: Tensor | None, norm: Tensor | None,
              rows: int, alone: bool, use_triton: bool, given: Tensor | None,
              ) -> tuple[Tensor, Tensor, Tensor]:
    """x (L, D), labels (L,) -> each sample's (lse, positive sum, count) over its pairs: (3, L).

    Pairs: the first `rows` samples with the rest; `alone`, also with each other, each pair once
    for both. Logits: scale x_i . metric x_j. norm (L, 1): of x under the metric, divides x first.
    given (lse, dL/dlse, dL/dsum) (3, L): returns dL/dx, dL/dscale, 2 dL/dmetric instead.
    """
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        dtype, tile = x.dtype, _triton_tile if use_triton else _torch_tile
        x = x if use_triton and x.is_cuda else x.to(scale.dtype)
        x = x if norm is None else x / norm
        wide = {} if x.dtype == scale.dtype else {"out_dtype": scale.dtype}
        grad_scale = torch.zeros_like(scale)
        grad_metric = torch.zeros_like(scale if metric is None else metric)
        out = scale.new_tensor([[-math.inf], [0], [0]]).repeat(1, len(x))
        if given is not None:
            out, peak = scale.new_zeros(x.shape), given[1:].abs().amax().clamp(min=1e-30)
            given = torch.cat([given[:1], given[1:] / peak])  # weights that float16 can hold
        step = 4096 if x.is_cuda else 256  # fills the device, stays in the cache
        for r in _cut(0, rows, step):
            left = x[r] if metric is None else x[r] @ metric
            for c in [r] * alone + _cut(r.stop if alone else rows, len(x), 4 * step):
                block = left, x[c], labels[r], labels[c], scale, r == c
                if given is None:
                    for s, found in zip((r, c), tile(*block), strict=False):
                        found = torch.cat([out[None, :, s], found])
                        out[:, s] = torch.stack([found[:, 0].logsumexp(0), *found[:, 1:].sum(0)])
                    continue
                weights = tile(*block, given[:, r], given[:, c])
                torch.addmm(out[r], weights, x[c], out=out[r], **wide)
                if r != c:
                    torch.addmm(out[c], weights.T, x[r], out=out[c], **wide)
        if given is None:
            return out, grad_scale, grad_metric
        for r in _cut(0, len(x), 1024):
            left = x[r] if metric is None else x[r] @ metric
            share = vecdot(out[r], left.to(scale.dtype))
            grad_scale += share.sum() * peak / 2  # each pair is there from both sides
            if norm is not None:  # what the norm, a function of x and metric, takes away
                out[r] -= share[:, None] * x[r]
            if metric is not None:
                grad_metric.addmm_(x[r].T, out[r])
                out[r] = out[r] @ metric
        out *= peak * scale / (1 if norm is None else norm)
        return out.to(dtype), grad_scale, grad_metric.mul_(peak * scale)

def _save(ctx, inputs, output):
    ctx.flags = inputs[5:8]
    ctx.save_for_backward(*inputs[:5], output[0])

@torch.autograd.function.once_differentiable
def _backward(ctx, grad, *_):
    *inputs, found = ctx.saved_tensors
    given = torch.cat([found[:1], grad[:2]])
    grad_x, grad_scale, grad_metric = all_pairs(*inputs, *ctx.flags, given)
    return grad_x, None, grad_scale, None if inputs[3] is None else grad_metric, *[None] * 5

all_pairs.register_fake(lambda x, labels, scale, metric, norm, rows, alone, use_triton, given: (
    scale.new_empty(3, len(x)) if given is None else torch.empty_like(x), torch.empty_like(scale),
    torch.empty_like(scale if metric is None else metric)))
all_pairs.register_autograd(_backward, setup_context=_save)


# ---- 5. The losses -------------------------------------------------------------------------------
class _Gather(torch.autograd.Function):
    """The rows of all processes, one's own first; gradients return to their owners."""

    @staticmethod
    def forward(ctx, local, group):
        """(N, ...) of each of W processes -> (W N, ...)."""
        ctx.group, ctx.own = group, group.rank() * len(local)
        rows = torch.cat([local] * group.size())
        dist.all_gather_into_tensor(rows, local.contiguous(), group=group)
        return rows.roll(-ctx.own, 0)

    @staticmethod
    def backward(ctx, grad):
        """Sum of what all processes found for one's own rows."""
        local = torch.empty_like(grad[: len(grad) // ctx.group.size()])
        dist.reduce_scatter_tensor(local, grad.roll(ctx.own, 0), group=ctx.group)
        return local, None

def _require(condition, expected, *given):
    if not condition:
        given = [f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) and x.ndim
                 else x for x in given]
        raise ValueError(f"expected {expected}, not {given}")

def _losses(x, labels, y, y_labels, temperature, impl, alone, metric=None, norm=None):
    """Losses (N + M,) of x (N, D) and y (M, D) as anchors, see all_pairs; which have positives."""
    given, n = (x, labels, y, y_labels, temperature, impl), len(x)
    unseen = isinstance(temperature, Tensor) and (  # do not wait for a GPU
        temperature.is_cuda or torch.compiler.is_compiling())
    able = triton is not None and x.is_cuda and x.dtype != torch.float64
    _require(x.ndim == y.ndim == 2 and x.shape[1] == y.shape[1] and x.numel() and alone + len(y)
             and (labels.shape, y_labels.shape) == (x.shape[:1], y.shape[:1]) and x.dtype == y.dtype
             and [t.is_floating_point() for t in given[:4]] == [True, False, True, False]
             and len({t.device for t in given[:4]}) == 1 and (unseen or temperature > 0)
             and impl in ("auto", "torch", "triton")[: 2 + able],
             "floating (N, D), (M, D), integer labels (N,), (M,) on one device, temperature > 0, "
             "impl 'auto', 'torch' or, on a GPU with Triton, 'triton'", *given)
    scale = torch.as_tensor(1 / temperature, dtype=torch.promote_types(x.dtype, torch.float32),
                            device=x.device).reshape(())
    x, labels = torch.cat([x, y]) if len(y) else x.contiguous(), torch.cat([labels, y_labels])
    (lse, total, count), *_ = all_pairs(
        x, labels.long(), scale, metric, norm, n, alone, able and impl != "torch", None)
    return torch.where(count > 0, lse - total / count.clamp(min=1), 0), count > 0

def supcon_loss(features, labels=None, temperature=0.07, *, contrast=None, contrast_labels=None,
                both=False, reduction="mean", impl="auto", group=None):
    """Supervised contrastive loss in time N^2 D and memory N D; returns float32.

    features (N, D): floating, any strides, normalised by the caller. labels (N,): integers; the
        positives of a row are the others of its label. None with `contrast`: row i of both (CLIP).
    temperature: positive number, or tensor of one element, which then receives its gradient.
    contrast (M, D), contrast_labels (M,): compare with these rows instead; none is left out.
    both: the rows of `contrast` are anchors too (CLIP's two directions), in the same pass.
    reduction: "mean" over the anchors that have a positive (none: 0), "sum", or "none": (N,), with
        `both` (N + M,). An anchor without positives gives 0, no gradient.
    impl: "triton", "torch", or "auto": Triton on a GPU, tiles of torch elsewhere.
    group: torch.distributed process group with N rows each: local rows meet the rows of all. The
        mean over its processes, as DDP takes it, is the loss of one. Instead of `both`, call twice.
    Raises ValueError for what does not fit, RuntimeError for a derivative of the gradient.
    """
    alone, n = contrast is None, len(features)
    fits = labels is not None and contrast_labels is None and not both if alone else (
        (labels is None) == (contrast_labels is None) and not (both and group))
    _require(fits and reduction in ("mean", "sum", "none"), "labels, or contrast with both labels "
             "or none; both without group; reduction 'mean', 'sum', 'none'",
             labels, contrast, contrast_labels, both, group, reduction)
    rank, world = (group.rank(), group.size()) if group else (0, 1)
    if alone:
        contrast, contrast_labels = features, labels
    elif labels is None:
        labels = contrast_labels = torch.arange(n, device=features.device) + rank * n
    if group:
        contrast, contrast_labels = (_Gather.apply(t, group) for t in (contrast, contrast_labels))
    others = [t[n * alone :] for t in (contrast, contrast_labels)]  # one's own come first
    found = _losses(features, labels, *others, temperature, impl, alone)
    losses, counted = found if both else (t[:n] for t in found)
    count, total = counted.sum(), losses.sum() * world
    if group:
        dist.all_reduce(count, group=group)
    return {"none": losses, "sum": total, "mean": total / count.clamp(min=1)}[reduction]

def product_supcon_loss(a, b, labels, temperature=0.07, *, unit_rows=True, impl="auto"):
    """Mean SupCon loss of the rows of Q = a @ b.T (N, M), in time N^2 min(D, M).

    a (N, D), b (M, D), labels (N,) of the rows of Q; swap a and b for its columns. unit_rows: each
    is divided by its norm. In float32 at least. Q Q^T = a (b^T b) a^T: a with the metric b^T b do.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        narrow, norm = len(b) <= b.shape[1], None  # narrow: Q itself is no wider than a
        a, metric = (a @ b.T, None) if narrow else (a, b.T @ b.detach())  # its gradient is doubled
        if unit_rows:
            norm = torch.cat([vecdot(x if metric is None else x @ metric.detach(), x)
                              for x in a.detach().split(1024)]).clamp(min=1e-24).sqrt()[:, None]
        rest = temperature, impl, True, metric, norm
        losses, counted = _losses(a, labels, a[:0], labels[:0], *rest)
        return losses.sum() / counted.sum().clamp(min=1)


# ---- 6. Benchmark: every figure from a process of its own, in turns ------------------------------
LOSSES = {  # of x, y (N, D), labels g: SupCon of x, then SCALE's two terms of Q = x @ y.T
    "plain torch": lambda x, y, g: supcon_reference(x, g),
    "torch.compile": lambda x, y, g: torch.compile(supcon_reference, dynamic=True)(x, g),
    "pytorch-metric-learning": lambda x, y, g: __import__(
        "pytorch_metric_learning.losses").losses.SupConLoss(temperature=0.07)(x, g),
    "supcon_loss": lambda x, y, g: supcon_loss(x, g),
    "floor: two products": lambda x, y, g: x.sum() + sum(
        (rows @ x.detach().T @ x.detach())[0, 0] for rows in x.detach().split(512)),
    "Q, Q Q^T, Q^T Q": lambda x, y, g: sum(
        supcon_reference(torch.nn.functional.normalize(q), g) for q in (x @ y.T, y @ x.T)),
    "product_supcon_loss": lambda x, y, g: sum(
        product_supcon_loss(*pair, g) for pair in ((x, y), (y, x)))}

def _measure(name, n):
    """Seconds of forward and backward (CPU time, on a GPU elapsed), MiB added to the peak."""
    import resource
    import time
    gpu, seen = torch.cuda.is_available(), []
    clock = time.perf_counter if gpu else time.process_time
    x, y = torch.randn(2, n, 768, device="cuda" if gpu else "cpu").div_(768**0.5).unbind()
    x, y, labels = x.requires_grad_(), y.requires_grad_(), torch.arange(n, device=x.device) % 12
    for size in (64, n, n, n):  # the first loads and compiles
        start, inputs = clock(), (x[:size], y[:size], labels[:size])
        grad = torch.autograd.grad(LOSSES[name](*inputs), (x, y), allow_unused=True)[0]
        grad[0, 0].item()  # waits for a GPU
        seen.append((clock() - start, torch.cuda.max_memory_allocated() / 2**20 if gpu else
                     resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10))
        if size == 64 and name == "supcon_loss":  # checked first
            right, = torch.autograd.grad(supcon_reference(*inputs[::2]), x)
            torch.testing.assert_close(grad, right, atol=1e-5, rtol=1e-3)
    return sorted(seen[1:])[1][0], seen[-1][1] - seen[0][1]

if __name__ == "__main__":
    import sys
    from concurrent.futures import ProcessPoolExecutor
    from importlib.util import find_spec
    from statistics import median
    if not find_spec("pytorch_metric_learning"):
        del LOSSES["pytorch-metric-learning"]
    for n in map(int, sys.argv[1:] or (512, 1024, 2048, 4096, 8192)):
        runs = {name: [] for name in LOSSES}
        for name in [*LOSSES] * 3:
            with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as child:
                runs[name].append(child.submit(_measure, name, n).result())
        runs = {name: [median(x) for x in zip(*found, strict=True)] for name, found in runs.items()}
        for name, found in runs.items():
            rival = runs["Q, Q Q^T, Q^T Q" if name.startswith(("Q", "product")) else "plain torch"]
            print(f"{n:6} {name:24}{found[0]:9.3f} s {rival[0] / found[0]:5.1f}x {found[1]:7.0f} "
                  f"MiB {rival[1] / max(found[1], 1):5.1f}x", flush=True)
