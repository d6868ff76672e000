# SPDX-License-Identifier: Apache-2.0
"""Supervised contrastive loss over all N x N pairs, without ever holding an N x N matrix.

    loss_i = log sum_{j != i} exp(x_i . x_j / tau) - mean_{p in P(i)} x_i . x_p / tau

P(i): the other samples with the label of i (L_out of Khosla et al., arXiv:2004.11362). Autograd
keeps five N x N matrices. Here each tile is made twice and never kept: memory O(block x N).
  forward   a tile gives log-sum-exp, sum and number of positives of its rows AND its columns: of
            a symmetric matrix the upper triangle is enough, CLIP's two directions are one pass.
  backward  the tile again becomes dL/dlogits of both directions, softmax minus positives in
            float32 before any rounding, so that confident positives keep their gradient in bf16.
No atomics: the same input gives the same bits. Tiles come from Triton on a GPU (fp32 by three
tf32 products), else from torch. Tested: float64 loops, gradcheck, errors beside plain torch's;
Triton in its interpreter and compiled for sm_80, sm_90 (no spills). It has NOT yet run on a GPU.

    loss = supcon_loss(torch.nn.functional.normalize(features, dim=1), labels)
"""
import math

import torch
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import normalize

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
def _torch_tile(a, b, a_labels, b_labels, scale, offset, symmetric, rows=None, cols=None):
    """(lse, positive sum, count) of the tile's rows (3, R) and of its columns (3, C).

    Given (lse, dL/dlse, dL/dsum) of complete rows and columns: its weights dL/dlogits (R, C).
    """
    same = a_labels[:, None] == b_labels
    logits = (a.to(scale.dtype) @ b.to(scale.dtype).T).mul_(scale)
    if rows is not None:
        weights = (logits - rows[0, :, None]).exp_().mul_(rows[1, :, None])
        weights += logits.sub_(cols[0]).exp_().mul_(cols[1])
        weights += torch.where(same, torch.add(rows[2, :, None], cols[2], out=logits), 0)
        return weights
    hidden = torch.ones_like(same).tril_(offset)  # these pairs are seen from the other side,
    if not symmetric:
        hidden.triu_(offset)  # or only an anchor and itself
    same &= ~hidden
    sums = torch.where(same, logits, 0)
    logits.masked_fill_(hidden, -math.inf)
    return [torch.stack([logits.logsumexp(d), sums.sum(d), same.sum(d)]) for d in (1, 0)]


# ---- 3. The same tile in Triton ------------------------------------------------------------------
if triton is not None:

    @triton.jit
    def _tile_kernel(a_ptr, b_ptr, a_label_ptr, b_label_ptr, scale_ptr,  # inputs
                     row_ptr, col_ptr, weight_ptr, n_rows, n_cols, offset,
                     SYMMETRIC: tl.constexpr, WEIGHTS: tl.constexpr,
                     DIM: tl.constexpr, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
        """WEIGHTS: read row (3, n_rows) and col (3, n_cols), write weight (n_rows, n_cols).
        Else write the tile's statistics to row (tiles, 3, n_rows) and col (tiles, 3, n_cols)."""
        r, c = tl.program_id(0), tl.program_id(1)
        rows, cols = (r * R + tl.arange(0, R))[:, None], (c * C + tl.arange(0, C))[None, :]
        row_in, col_in, bits = rows < n_rows, cols < n_cols, 1.4426950408889634  # bits in a nat
        logits, depth = tl.zeros((R, C), tl.float32), DIM
        if SYMMETRIC and not WEIGHTS:  # a tile below the diagonal needs no products
            depth = tl.where((c + 1) * C > r * R, DIM, 0)
        for start in range(0, depth, D):
            d = start + tl.arange(0, D)
            a_at, b_at = rows.to(tl.int64) * DIM + d[None, :], cols.to(tl.int64) * DIM + d[:, None]
            a = tl.load(a_ptr + a_at, row_in & (d < DIM)[None, :], 0.0)
            b = tl.load(b_ptr + b_at, col_in & (d < DIM)[:, None], 0.0)
            logits = tl.dot(a, b, logits, input_precision="tf32x3")
        logits *= tl.load(scale_ptr) * bits
        if WEIGHTS:
            row, col = row_ptr + rows, col_ptr + cols
            weights = tl.exp2(logits - tl.load(row, row_in) * bits) * tl.load(row + n_rows, row_in)
            weights += tl.exp2(logits - tl.load(col, col_in) * bits) * tl.load(col + n_cols, col_in)
            share = tl.load(row + 2 * n_rows, row_in) + tl.load(col + 2 * n_cols, col_in)
            same = tl.load(a_label_ptr + rows, row_in) == tl.load(b_label_ptr + cols, col_in)
            weights = (weights + tl.where(same, share, 0.0)).to(weight_ptr.dtype.element_ty)
            tl.store(weight_ptr + rows.to(tl.int64) * n_cols + cols, weights, row_in & col_in)
        else:
            hidden = cols <= rows if SYMMETRIC else cols == rows + offset
            logits = tl.where(hidden | ~(row_in & col_in), float("-inf"), logits)
            for axis in tl.static_range(1, -1, -1):  # labels loaded twice: kept, `same` spills
                if axis == 0:
                    out, n, index = col_ptr + r.to(tl.int64) * 3 * n_cols, n_cols, cols
                else:
                    out, n, index = row_ptr + c.to(tl.int64) * 3 * n_rows, n_rows, rows
                same = tl.load(a_label_ptr + rows, row_in) == tl.load(b_label_ptr + cols, col_in)
                same = same & (logits > float("-inf"))
                total = tl.sum(tl.where(same, logits, 0.0), axis, keep_dims=True) / bits
                tl.store(out + n + index, total, index < n)
                total = tl.sum(same.to(tl.float32), axis, keep_dims=True)
                tl.store(out + 2 * n + index, total, index < n)
                top = tl.maximum(tl.max(logits, axis, keep_dims=True), -1e30)
                total = tl.sum(tl.exp2(logits - top), axis, keep_dims=True)
                tl.store(out + index, (top + tl.log2(total)) / bits, index < n)


def _triton_tile(a, b, a_labels, b_labels, scale, offset, symmetric, rows=None, cols=None):
    """What `_torch_tile` does, by many tiles; their shape is the largest that does not spill."""
    shape = (128, 64, 32) if a.dtype == torch.float32 else (128, 128, 64)
    r, c, d = shape if a.is_cuda else (32, 32, 32)
    grid, given = (triton.cdiv(len(a), r), triton.cdiv(len(b), c)), rows is not None
    if not given:
        rows, cols = scale.new_empty(grid[1], 3, len(a)), scale.new_empty(grid[0], 3, len(b))
    weights = a.new_empty(len(a), len(b)) if given else rows
    x, y = (a, b) if a.is_cuda else (a.float(), b.float())  # the interpreter misreads bfloat16
    _tile_kernel[grid](
        x, y, a_labels, b_labels, scale, rows.contiguous(), cols.contiguous(), weights, len(a),
        len(b), offset, SYMMETRIC=symmetric, WEIGHTS=given, DIM=a.shape[1], R=r, C=c, D=d,
        num_warps=8)
    return weights if given else [_merge(rows), _merge(cols)]


# ---- 4. All pairs, as operators that autograd and torch.compile know -----------------------------
def _merge(x):
    """Statistics (lse, positive sum, count) of K sets of pairs together: (K, 3, N) -> (3, N)."""
    return torch.stack([x[:, 0].logsumexp(0), *x[:, 1:].sum(0)])


def _blocks(a, b, a_labels, b_labels, scale, offset, symmetric):
    """Cut all pairs into blocks of rows: yields the slices and the arguments of a tile."""
    step = 256  # stays in a CPU's cache, loses little of the symmetry
    if a.is_cuda:  # fills the device; weights are at most 2^28 numbers
        step = max(128, min(max(2048, len(a) // 8), 2**28 // len(b)) // 128 * 128)
    for start in range(0, len(a), step):
        r = slice(start, min(start + step, len(a)))
        c = slice(start if symmetric else 0, len(b))
        yield r, c, (a[r], b[c], a_labels[r], b_labels[c], scale,
                     offset + r.start - c.start, symmetric)


def _add_product(total, weights, features):
    if weights.is_cuda and weights.dtype != total.dtype:
        total += torch.mm(weights, features, out_dtype=total.dtype)
    else:
        total.addmm_(weights.to(total.dtype), features.to(total.dtype))


@torch.library.custom_op(__name__.replace(".", "_") + "::pair_statistics", mutates_args=())
def pair_statistics(a: Tensor, b: Tensor, a_labels: Tensor, b_labels: Tensor, scale: Tensor,
                    offset: int, symmetric: bool, use_triton: bool) -> tuple[Tensor, Tensor]:
    """(lse, positive sum, count) of scale * a @ b.T by rows (3, N) and by columns (3, M).

    The pair (i, i + offset) is left out. `symmetric` promises that the matrix is: the rows say
    all, and `a` receives the gradient of both roles, `b` none.
    """
    with torch.cuda.device_of(a), torch.autocast(a.device.type, enabled=False):
        tile = _triton_tile if use_triton else _torch_tile
        rows, cols = scale.new_zeros(3, len(a)), scale.new_zeros(3, len(b))
        cols[0] = -math.inf
        for r, c, block in _blocks(a, b, a_labels, b_labels, scale, offset, symmetric):
            rows[:, r], found = tile(*block)
            cols[:, c] = _merge(torch.stack([cols[:, c], found]))
        return _merge(torch.stack([rows, cols])) if symmetric else rows, cols


@torch.library.custom_op(__name__.replace(".", "_") + "::pair_gradients", mutates_args=())
def pair_gradients(a: Tensor, b: Tensor, a_labels: Tensor, b_labels: Tensor, scale: Tensor,
                   offset: int, symmetric: bool, use_triton: bool, rows: Tensor, cols: Tensor,
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """dL/da, dL/db, dL/dscale from (lse, dL/dlse, dL/dsum) of rows (3, N) and columns (3, M)."""
    with torch.cuda.device_of(a), torch.autocast(a.device.type, enabled=False):
        tile = _triton_tile if use_triton else _torch_tile
        peak = torch.cat([rows[1:], cols[1:]], 1).abs().amax().clamp(min=1e-30)
        rows, cols = (torch.cat([x[:1], x[1:] / peak]) for x in (rows, cols))  # for fp16 weights
        grad_a, grad_b = scale.new_zeros(a.shape), scale.new_zeros(0 if symmetric else b.shape)
        for r, c, block in _blocks(a, b, a_labels, b_labels, scale, offset, symmetric):
            weights = tile(*block, rows[:, r], cols[:, c])
            weights.diagonal(block[5]).zero_()
            _add_product(grad_a[r], weights, b[c])
            if symmetric:
                _add_product(grad_a[r.stop :], weights[:, len(weights) :].T, b[r])
            else:
                _add_product(grad_b, weights.T, a[r])
        grad_scale = vecdot(grad_a, a.to(scale.dtype)).sum() * (peak / 2 if symmetric else peak)
        return *(x.mul_(peak * scale).to(a.dtype) for x in (grad_a, grad_b)), grad_scale


def _save(ctx, inputs, output):
    ctx.flags = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output)


def _backward(ctx, grad_rows, grad_cols):
    *inputs, rows, cols = ctx.saved_tensors
    rows, cols = torch.cat([rows[:1], grad_rows[:2]]), torch.cat([cols[:1], grad_cols[:2]])
    cols = rows if ctx.flags[1] else cols
    grad_a, grad_b, grad_scale = pair_gradients(*inputs, *ctx.flags, rows, cols)
    return grad_a, None if ctx.flags[1] else grad_b, None, None, grad_scale, None, None, None


def _no_second_derivative(ctx, *grads):
    raise RuntimeError("supcon_loss has no second derivative: this is backward of its backward")


pair_statistics.register_fake(
    lambda a, b, c, d, scale, *_: (scale.new_empty(3, len(a)), scale.new_empty(3, len(b))))
pair_gradients.register_fake(lambda a, b, c, d, scale, offset, symmetric, *_: (
    a.new_empty(a.shape), b.new_empty(0 if symmetric else b.shape), scale.clone()))
pair_statistics.register_autograd(_backward, setup_context=_save)
pair_gradients.register_autograd(_no_second_derivative)


# ---- 5. The losses -------------------------------------------------------------------------------
def _require(condition, expected, *given):
    if not condition:
        given = [f"{x.dtype} {tuple(x.shape)} on {x.device}" if isinstance(x, Tensor) and x.ndim
                 else x for x in given]
        raise ValueError(f"expected {expected}, not {given}")


def _anchor_losses(a, b, a_labels, b_labels, temperature, offset, impl, symmetric=False):
    """For rows (N,) and columns (M,) of a @ b.T as anchors: their losses, which have positives."""
    given = a, b, a_labels, b_labels
    _require(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and a.numel() and len(b)
             and a.dtype == b.dtype and a.is_floating_point() and len({t.device for t in given}) < 2
             and (a_labels.shape, b_labels.shape) == (a.shape[:1], b.shape[:1])
             and not a_labels.is_floating_point() and not b_labels.is_floating_point(),
             "floating (N, D), (M, D), integer labels (N,), (M,), one device", *given)
    if not isinstance(temperature, Tensor) or not (
            temperature.is_cuda or torch.compiler.is_compiling()):  # do not wait for the GPU
        _require(temperature > 0, "a positive temperature", temperature)
    able = triton is not None and a.dtype != torch.float64 and (
        a.is_cuda or type(_tile_kernel).__name__ == "InterpretedFunction")
    _require(impl in ("auto", "torch", "triton")[: 2 + able],
             "impl 'auto', 'torch', or, with Triton on a GPU and not in float64, 'triton'", impl, a)
    scale = torch.as_tensor(1 / temperature, dtype=torch.promote_types(a.dtype, torch.float32),
                            device=a.device).reshape(())
    statistics = pair_statistics(
        a.contiguous(), b.contiguous(), a_labels.long().contiguous(), b_labels.long().contiguous(),
        scale, offset, symmetric, impl == "triton" or impl == "auto" and able and a.is_cuda)
    return [(torch.where(count > 0, lse - total / count.clamp(min=1), 0), count > 0)
            for lse, total, count in statistics]


def supcon_loss(features, labels=None, temperature=0.07, *, contrast=None, contrast_labels=None,
                both=False, reduction="mean", impl="auto"):
    """Supervised contrastive loss in time N^2 D and memory block x N; returns float32.

    features (N, D): float32, float16 or bfloat16, any strides, normalised by the caller.
    labels (N,): integers; the positives of a row are the others of equal label. None is
        allowed with `contrast`, N = M: row i of one and row i of the other are the pair (CLIP).
    temperature: positive number, or tensor of one element, which then receives its gradient.
    contrast (M, D), contrast_labels (M,): compare with these rows instead; none is left out.
    both: the rows of `contrast` are anchors too (CLIP's two directions), in the same pass.
    reduction: "mean" over the anchors that have a positive, 0 if there are none; "sum"; or
        "none": (N,), with `both` (N + M,). An anchor without positives gives 0, no gradient.
    impl: "triton", "torch", or "auto": Triton on a GPU, tiles of torch elsewhere.
    Raises ValueError for what does not fit, RuntimeError for a derivative of the gradient.
    """
    alone = contrast is None
    _require(labels is not None and contrast_labels is None and not both if alone else
             (labels is None) == (contrast_labels is None),
             "labels, or contrast and both labels or none", labels, contrast, contrast_labels, both)
    _require(reduction in ("mean", "sum", "none"), "reduction 'mean', 'sum', 'none'", reduction)
    others = features.detach() if alone else contrast
    if alone:
        contrast_labels = labels
    elif labels is None:
        labels = contrast_labels = torch.arange(len(features), device=features.device)
    anchors = _anchor_losses(features, others, labels, contrast_labels, temperature,
                             0 if alone else len(others), impl, symmetric=alone)  # no such column
    losses, counted = (torch.cat(x) for x in zip(*anchors[: 1 + both], strict=True))
    if reduction == "none":
        return losses
    return losses.sum() / (counted.sum().clamp(min=1) if reduction == "mean" else 1)


def product_supcon_loss(a, b, labels, temperature=0.07, *, unit_rows=True, impl="auto"):
    """Mean SupCon loss of the rows of Q = a @ b.T (N, M), in time N^2 min(D, M).

    a (N, D), b (M, D), labels (N,) of the rows of Q; swap a and b for the columns of Q. Exact
    gradients to both. unit_rows: each row of Q is divided by its norm first. In float32 at
    least, under autocast too. Q Q^T = a (b^T b) a^T, so features a with the metric b^T b do.
    """
    _require(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and a.dtype == b.dtype,
             "a (N, D) and b (M, D) of one type", a, b)
    with torch.autocast(a.device.type, enabled=False):
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        if len(b) <= b.shape[1]:  # Q itself is no wider than a
            q = a @ b.T
            q = normalize(q, dim=1) if unit_rows else q
            return supcon_loss(q, labels, temperature, impl=impl)
        # The logits are y x^T with y = x metric. The operator hands the gradient of both
        # roles, y and x, to y: right for x, twice too much for the metric, which is halved.
        metric = b.T @ b
        x, y = a.detach(), a @ ((metric + metric.detach()) / 2)
        if unit_rows:  # |q_i|^2 = y_i . a_i, written so that a and the metric get all they must
            norm = (2 * vecdot(y, x) - vecdot(y, x).detach()).clamp(min=1e-24).sqrt()[:, None]
            x, y = x / norm.detach(), y / norm
        (losses, counted), _ = _anchor_losses(y, x, labels, labels, temperature, 0, impl, True)
        return losses.sum() / counted.sum().clamp(min=1)
