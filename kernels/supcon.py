# SPDX-License-Identifier: Apache-2.0
"""Supervised contrastive loss over N x N pairs without ever holding an N x N matrix.

(essay to come)
"""

import math

import torch
import torch.distributed as dist

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

HALF = (torch.float16, torch.bfloat16)


# ---- 1. The formula, as plain torch writes it: the reference and the yardstick ----
def supcon_reference(features, labels, temperature=0.07, contrast=None, contrast_labels=None):
    """Mean SupCon loss with dense (N, M) matrices: what the rest of this file computes.

    Leading dimensions are independent problems: (..., N, D) and (..., N) give (...).
    """
    alone = contrast is None
    others, other_labels = (features, labels) if alone else (contrast, contrast_labels)
    logits = features @ others.mT / temperature  # (..., N, M)
    positive = labels[..., None] == other_labels[..., None, :]
    if alone:
        itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=features.device)
        logits, positive = logits.masked_fill(itself, -math.inf), positive & ~itself
    count = positive.sum(-1)
    mean_positive = torch.where(positive, logits, 0).sum(-1) / count.clamp(min=1)
    losses = torch.where(count > 0, logits.logsumexp(-1) - mean_positive, 0)
    return losses.sum(-1) / (count > 0).sum(-1).clamp(min=1)


# ---- 2. One tile in torch ----
def _torch_logits(a, b, a_labels, b_labels, scale):
    """Logits (R, C) of a block of rows, and which of these pairs share a label."""
    return (a * scale) @ b.T, a_labels[:, None] == b_labels


def _torch_statistics(a, b, a_labels, b_labels, scale, offset, kind):
    logits, positive = _torch_logits(a, b, a_labels, b_labels, scale)
    if kind == "symmetric":
        hidden = torch.ones(len(a), len(a), dtype=torch.bool, device=a.device).tril_()
        logits[:, : len(a)].masked_fill_(hidden, -math.inf)
        positive[:, : len(a)].masked_fill_(hidden, False)
    else:
        logits.diagonal(offset).fill_(-math.inf)
        positive.diagonal(offset).fill_(False)
    scratch = torch.where(positive, logits, 0)
    directions = (1,) if kind == "rows" else (1, 0)
    found = [(scratch.sum(d), positive.sum(d, dtype=logits.dtype)) for d in directions]
    results = []
    for d, sums in zip(directions, found, strict=True):
        top = logits.amax(d, keepdim=True).clamp_(min=-1e30)
        total = torch.sub(logits, top, out=scratch).exp_().sum(d)
        results.append(torch.stack([top.squeeze(d) + total.log(), *sums]))
    return results[0], results[-1]


def _torch_weights(a, b, a_labels, b_labels, scale, offset, kind, rows, cols):
    logits, positive = _torch_logits(a, b, a_labels, b_labels, scale)
    lse, grad_lse, grad_sum = rows[:, :, None]
    weights = logits if kind == "rows" else logits.clone()
    weights.sub_(lse).exp_().mul_(grad_lse)
    if kind != "rows":
        lse, grad_lse, grad_column = cols
        weights.add_(logits.sub_(lse).exp_().mul_(grad_lse))
        torch.add(grad_sum, grad_column, out=logits)
        grad_sum = logits
    weights.add_(positive * grad_sum)
    weights.diagonal(offset).fill_(0)
    return weights


# ---- 3. The same two tiles in Triton ----
if triton is not None:

    @triton.jit
    def _triton_logits(a_ptr, b_ptr, rows, cols, n_rows, n_cols, depth,
                       DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
                       UPCAST: tl.constexpr):
        """Inner products of the rows of a and b, over the first `depth` features, in fp32."""
        d = tl.arange(0, BLOCK_D)
        a_rows = a_ptr + rows.to(tl.int64)[:, None] * DIM
        b_rows = b_ptr + cols.to(tl.int64)[None, :] * DIM
        total = tl.zeros((rows.shape[0], cols.shape[0]), tl.float32)
        for start in range(0, depth, BLOCK_D):
            k = start + d
            a = tl.load(a_rows + k[None, :], (rows < n_rows)[:, None] & (k < DIM)[None, :], 0.0)
            b = tl.load(b_rows + k[:, None], (k < DIM)[:, None] & (cols < n_cols)[None, :], 0.0)
            if UPCAST:
                a, b = a.to(tl.float32), b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision=PRECISION)
        return total

    @triton.jit
    def _same_label(a_label_ptr, b_label_ptr, rows, cols, n_rows, n_cols):
        a_labels = tl.load(a_label_ptr + rows, rows < n_rows, 0)
        b_labels = tl.load(b_label_ptr + cols, cols < n_cols, 0)
        return a_labels[:, None] == b_labels[None, :]

    @triton.jit
    def _store_statistics(out_ptr, logits, same, tile, n_tiles, index, n, AXIS: tl.constexpr):
        """Log-sum-exp, positive sum and count along AXIS to out[:, tile, index]; base 2 in."""
        out = out_ptr + tile.to(tl.int64) * n + index
        plane = n_tiles.to(tl.int64) * n
        positive = tl.where(same, logits, float("-inf"))
        found = positive > float("-inf")
        total = tl.sum(tl.where(found, positive, 0.0), AXIS) * 0.6931471805599453
        tl.store(out + plane, total, index < n)
        tl.store(out + 2 * plane, tl.sum(found.to(tl.float32), AXIS), index < n)
        top = tl.maximum(tl.max(logits, AXIS), -1e30)
        total = tl.sum(tl.exp2(logits - tl.expand_dims(top, AXIS)), AXIS)
        tl.store(out, (top + tl.log2(total)) * 0.6931471805599453, index < n)

    @triton.jit
    def _statistics_kernel(a_ptr, b_ptr, a_label_ptr, b_label_ptr, scale_ptr, row_ptr, col_ptr,
                           n_rows, n_cols, offset,
                           DIM: tl.constexpr, SYMMETRIC: tl.constexpr, COLUMNS: tl.constexpr,
                           BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
                           PRECISION: tl.constexpr, UPCAST: tl.constexpr):
        r, c = tl.program_id(0), tl.program_id(1)
        rows = r * BLOCK_R + tl.arange(0, BLOCK_R)
        cols = c * BLOCK_C + tl.arange(0, BLOCK_C)
        depth = DIM
        if SYMMETRIC:
            depth = tl.where((c + 1) * BLOCK_C > r * BLOCK_R, DIM, 0)
        logits = _triton_logits(a_ptr, b_ptr, rows, cols, n_rows, n_cols, depth, DIM, BLOCK_D,
                                PRECISION, UPCAST)
        logits *= tl.load(scale_ptr) * 1.4426950408889634
        keep = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        if SYMMETRIC:
            keep = keep & (cols[None, :] > rows[:, None])
        else:
            keep = keep & (cols[None, :] != (rows + offset)[:, None])
        logits = tl.where(keep, logits, float("-inf"))
        same = _same_label(a_label_ptr, b_label_ptr, rows, cols, n_rows, n_cols)
        _store_statistics(row_ptr, logits, same, c, tl.num_programs(1), rows, n_rows, 1)
        if COLUMNS:  # labels loaded anew: keeping the comparison alive costs more registers
            same = _same_label(a_label_ptr, b_label_ptr, rows, cols, n_rows, n_cols)
            _store_statistics(col_ptr, logits, same, r, tl.num_programs(0), cols, n_cols, 0)

    @triton.jit
    def _weights_kernel(a_ptr, b_ptr, a_label_ptr, b_label_ptr, scale_ptr, row_ptr, col_ptr, out_ptr,
                        n_rows, n_cols, offset, row_plane, col_plane,
                        DIM: tl.constexpr, COLUMNS: tl.constexpr,
                        BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
                        PRECISION: tl.constexpr, UPCAST: tl.constexpr):
        rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        row_in, col_in = rows < n_rows, cols < n_cols
        logits = _triton_logits(a_ptr, b_ptr, rows, cols, n_rows, n_cols, DIM, DIM, BLOCK_D,
                                PRECISION, UPCAST)
        logits *= tl.load(scale_ptr) * 1.4426950408889634
        lse = tl.load(row_ptr + rows, row_in, 0.0) * 1.4426950408889634
        grad_lse = tl.load(row_ptr + row_plane + rows, row_in, 0.0)
        grad_sum = tl.load(row_ptr + 2 * row_plane + rows, row_in, 0.0)
        weights = tl.exp2(logits - lse[:, None]) * grad_lse[:, None]
        share = grad_sum[:, None]
        if COLUMNS:
            lse = tl.load(col_ptr + cols, col_in, 0.0) * 1.4426950408889634
            grad_lse = tl.load(col_ptr + col_plane + cols, col_in, 0.0)
            grad_sum = tl.load(col_ptr + 2 * col_plane + cols, col_in, 0.0)
            weights += tl.exp2(logits - lse[None, :]) * grad_lse[None, :]
            share = share + grad_sum[None, :]
        a_label = tl.load(a_label_ptr + rows, row_in, 0)
        b_label = tl.load(b_label_ptr + cols, col_in, 0)
        weights += tl.where(a_label[:, None] == b_label[None, :], share, 0.0)
        weights = tl.where(cols[None, :] == (rows + offset)[:, None], 0.0, weights)
        out = out_ptr + rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
        tl.store(out, weights.to(out_ptr.dtype.element_ty), row_in[:, None] & col_in[None, :])


# (rows, columns, depth) of a tile: no register spills and tensor cores on sm_80 and sm_90
_BLOCKS = {torch.float32: (128, 64, 32), torch.float16: (128, 128, 64), torch.bfloat16: (128, 128, 64)}


def _launch(kernel, a, b, a_labels, b_labels, scale, *arguments, **constants):
    interpreted = not a.is_cuda
    rows, cols, depth = (32, 32, 32) if interpreted else _BLOCKS[a.dtype]
    grid = triton.cdiv(len(a), rows), triton.cdiv(len(b), cols)
    kernel[grid](a, b, a_labels, b_labels, scale, *arguments, DIM=a.shape[1], BLOCK_R=rows, BLOCK_C=cols, BLOCK_D=depth,
        PRECISION="tf32x3", UPCAST=interpreted and a.dtype in HALF, num_warps=8, num_stages=3, **constants)


# ---- 4. All pairs: a loop over blocks of rows ----
def _blocks(n, kind):
    """(start, stop, first column) of each block of rows; a symmetric matrix needs j >= i only."""
    step = 512
    for start in range(0, n, step):
        yield start, min(start + step, n), start if kind == "symmetric" else 0


def _merge(x, y):
    return torch.cat([torch.logaddexp(x[:1], y[:1]), x[1:] + y[1:]])


@torch.library.custom_op("supcon::pair_statistics", mutates_args=())
def pair_statistics(
    a: torch.Tensor, b: torch.Tensor, a_labels: torch.Tensor, b_labels: torch.Tensor,
    scale: torch.Tensor, offset: int, kind: str, use_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast(a.device.type, enabled=False):
        dtype = torch.promote_types(a.dtype, torch.float32)
        a, b = a.to(dtype), b.to(dtype)
        rows, cols = (torch.zeros(3, len(x), dtype=dtype, device=a.device) for x in (a, b))
        rows[0] = cols[0] = -math.inf
        for start, stop, first in _blocks(len(a), kind):
            row, col = _torch_statistics(
                a[start:stop], b[first:], a_labels[start:stop], b_labels[first:],
                scale, offset + start - first, kind)
            rows[:, start:stop] = row
            if kind != "rows":
                cols[:, first:] = _merge(cols[:, first:], col)
        if kind == "symmetric":
            rows = _merge(rows, cols)
        return rows, cols if kind == "both" else cols.new_empty(3, 0)


@pair_statistics.register_fake
def _(a, b, a_labels, b_labels, scale, offset, kind, use_triton):
    dtype = torch.promote_types(a.dtype, torch.float32)
    width = len(b) if kind == "both" else 0
    return a.new_empty(3, len(a), dtype=dtype), a.new_empty(3, width, dtype=dtype)


@torch.library.custom_op("supcon::pair_gradients", mutates_args=())
def pair_gradients(
    a: torch.Tensor, b: torch.Tensor, a_labels: torch.Tensor, b_labels: torch.Tensor,
    scale: torch.Tensor, rows: torch.Tensor, cols: torch.Tensor, offset: int, kind: str,
    use_triton: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.autocast(a.device.type, enabled=False):
        symmetric, dtype = kind == "symmetric", a.dtype
        a, b = a.to(rows.dtype), b.to(rows.dtype)
        grad_a = torch.zeros_like(a)
        grad_b = torch.zeros_like(a[:0] if symmetric else b)
        for start, stop, first in _blocks(len(a), kind):
            weights = _torch_weights(
                a[start:stop], b[first:], a_labels[start:stop], b_labels[first:], scale,
                offset + start - first, kind, rows[:, start:stop],
                rows[:, first:] if symmetric else cols[:, first:])
            grad_a[start:stop].addmm_(weights, b[first:])
            if symmetric:
                grad_a[stop:].addmm_(weights[:, stop - start :].T, b[start:stop])
            else:
                grad_b.addmm_(weights.T, a[start:stop])
        grad_scale = (grad_a * a).sum() * (0.5 if symmetric else 1.0)
        return (grad_a * scale).to(dtype), (grad_b * scale).to(dtype), grad_scale


@pair_gradients.register_fake
def _(a, b, a_labels, b_labels, scale, rows, cols, offset, kind, use_triton):
    empty = a[:0] if kind == "symmetric" else b
    return torch.empty_like(a), torch.empty_like(empty), scale.new_empty(())


def _save(ctx, inputs, output):
    *tensors, ctx.offset, ctx.kind, ctx.use_triton = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, grad_rows, grad_cols):
    *tensors, rows, cols = ctx.saved_tensors
    rows, cols = torch.cat([rows[:1], grad_rows[:2]]), torch.cat([cols[:1], grad_cols[:2]])
    grad_a, grad_b, grad_scale = pair_gradients(
        *tensors, rows, cols, ctx.offset, ctx.kind, ctx.use_triton)
    grad_b = None if ctx.kind == "symmetric" else grad_b
    return grad_a, grad_b, None, None, grad_scale, None, None, None


pair_statistics.register_autograd(_backward, setup_context=_save)


# ---- 5. Public ----
def _anchor_losses(a, b, a_labels, b_labels, scale, offset, kind, impl):
    rows, cols = pair_statistics(a, b, a_labels, b_labels, scale, offset, kind, False)
    lse, positive_sum, count = torch.cat([rows, cols], 1)
    losses = torch.where(count > 0, lse - positive_sum / count.clamp(min=1), 0)
    return losses, count > 0


def supcon_loss(features, labels=None, temperature=0.07, *, contrast=None, contrast_labels=None,
                both=False, reduction="mean", impl="auto", group=None):
    scale = torch.as_tensor(1 / temperature, dtype=torch.promote_types(features.dtype, torch.float32), device=features.device)
    if contrast is None:
        losses, counted = _anchor_losses(
            features, features.detach(), labels, labels, scale, 0, "symmetric", impl)
    else:
        if labels is None:
            labels = contrast_labels = torch.arange(len(features), device=features.device)
        losses, counted = _anchor_losses(
            features, contrast, labels, contrast_labels, scale, len(contrast), "both" if both else "rows", impl)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / counted.sum().clamp(min=1)


def product_supcon_loss(a, b, labels, temperature=0.07, *, unit_rows=True, impl="auto"):
    """SupCon over the rows of Q = a @ b.T."""
    if len(b) <= b.shape[1]:
        q = a @ b.T
        if unit_rows:
            q = torch.nn.functional.normalize(q, dim=1)
        return supcon_loss(q, labels, temperature, impl=impl)
    metric = b.T @ b
    y = a @ ((metric + metric.detach()) / 2)
    if unit_rows:
        square = ((2 * y - y.detach()) * a.detach()).sum(1, keepdim=True)
        inverse = square.clamp(min=1e-24).rsqrt()
        a, y = a * inverse, y * inverse
    scale = torch.as_tensor(1 / temperature, dtype=torch.promote_types(a.dtype, torch.float32), device=a.device)
    losses, counted = _anchor_losses(y, a.detach(), labels, labels, scale, 0, "symmetric", impl)
    return losses.sum() / counted.sum().clamp(min=1)
