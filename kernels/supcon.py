# SPDX-License-Identifier: Apache-2.0
"""Supervised contrastive loss over all N x N pairs, without ever holding an N x N matrix.

    loss_i = log sum_{j != i} exp(x_i . x_j / tau) - mean_{p in P(i)} x_i . x_p / tau

P(i): the other samples with the label of i (L_out of Khosla et al., arXiv:2004.11362). Autograd
on the formula keeps five N x N matrices and spends three products of 2 N^2 D operations. Here
the matrix is made tile by tile, twice, and never kept: memory O(block x N), two products.
  forward   a tile gives log-sum-exp, sum and number of positives of its rows AND its columns:
            the upper triangle of a symmetric matrix is enough (half a product), and CLIP's two
            directions are one pass.
  backward  the tile again (half), turned into dL/dlogits of both directions, softmax minus
            positives, in float32 before any rounding, so that confident positives keep their
            gradient in bfloat16; then times the features (one product).
No atomics: the same input gives the same bits. Tiles come from Triton on a GPU (bf16, fp16 with
fp32 sums; fp32 by three tf32 products: one truncates and costs 1e-3 of loss), else from torch.
Tested: float64 loops, gradcheck, errors beside plain torch's in the same dtype; Triton in its
interpreter with a guard against races and out-of-bounds access, and compiled ahead of time for
sm_80 and sm_90 (tensor cores, no register spills). It has NOT yet run on a GPU.

    loss = supcon_loss(torch.nn.functional.normalize(features, dim=1), labels)
    python supcon.py --sizes 512 4096        # benchmark; on a GPU it first checks the kernels
"""
import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.linalg import vecdot
from torch.nn.functional import normalize

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: torch tiles do everything
    triton = None


# ---- 1. The formula in plain torch: reference and yardstick ----
def supcon_reference(features, labels, temperature=0.07):
    """Mean SupCon loss by dense matrices and autograd: (..., N, D), (..., N) -> (...)."""
    itself = torch.eye(features.shape[-2], dtype=torch.bool, device=features.device)
    logits = (features @ features.mT / temperature).masked_fill(itself, -math.inf)
    positive = (labels[..., None] == labels[..., None, :]) & ~itself
    count = positive.sum(-1)
    mean_positive = torch.where(positive, logits, 0).sum(-1) / count.clamp(min=1)
    losses = torch.where(count > 0, logits.logsumexp(-1) - mean_positive, 0)
    return losses.sum(-1) / (count > 0).sum(-1).clamp(min=1)


# ---- 2. One tile of R rows and C columns, in torch ----
def _torch_tile(a, b, a_labels, b_labels, scale, offset, symmetric, rows=None, cols=None):
    """(lse, positive sum, count) of the tile's rows (3, R) and of its columns (3, C).

    Given (lse, dL/dlse, dL/dsum) of complete rows and columns: its weights dL/dlogits (R, C).
    """
    logits = (a.to(scale.dtype) @ b.to(scale.dtype).T).mul_(scale)
    same = a_labels[:, None] == b_labels
    if rows is not None:
        weights = torch.sub(logits, rows[0, :, None]).exp_().mul_(rows[1, :, None])
        weights += logits.sub_(cols[0]).exp_().mul_(cols[1])
        torch.add(rows[2, :, None], cols[2], out=logits)
        weights += torch.where(same, logits, 0)
        weights.diagonal(offset).zero_()
        return weights
    if symmetric:  # pairs on and below the diagonal are seen from the other side
        below = torch.ones(len(a), len(a), dtype=torch.bool, device=a.device).tril_()
        same[:, : len(a)].masked_fill_(below, False)
        sums = torch.where(same, logits, 0)
        logits[:, : len(a)].masked_fill_(below, -math.inf)
    else:
        same.diagonal(offset).fill_(False)
        sums = torch.where(same, logits, 0)
        logits.diagonal(offset).fill_(-math.inf)
    statistics = []
    for d in (1, 0):
        top = logits.amax(d, keepdim=True).clamp_(min=-1e30)
        lse = (logits - top).exp_().sum(d).log_() + top.squeeze(d)
        statistics.append(torch.stack([lse, sums.sum(d), same.sum(d)]))
    return statistics


# ---- 3. The same tile in Triton; logits in base 2 inside ----
if triton is not None:

    @triton.jit
    def _tile_kernel(a_ptr, b_ptr, a_label_ptr, b_label_ptr, scale_ptr,  # inputs
                     row_ptr, col_ptr, weight_ptr, n_rows, n_cols, offset,
                     SYMMETRIC: tl.constexpr, WEIGHTS: tl.constexpr, UPCAST: tl.constexpr,
                     DIM: tl.constexpr, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
        """WEIGHTS: read row (3, n_rows) and col (3, n_cols), write weight (n_rows, n_cols).
        Else write the tile's statistics to row (tiles, 3, n_rows) and col (tiles, 3, n_cols)."""
        r, c = tl.program_id(0), tl.program_id(1)
        rows, cols = r * R + tl.arange(0, R), c * C + tl.arange(0, C)
        row_in, col_in = rows < n_rows, cols < n_cols
        hidden = cols[None, :] == (rows + offset)[:, None]
        depth = DIM
        if SYMMETRIC and not WEIGHTS:  # the lower triangle is seen from the other side
            hidden = cols[None, :] <= rows[:, None]
            depth = tl.where((c + 1) * C > r * R, DIM, 0)  # a tile below it needs no products
        a_rows = a_ptr + rows.to(tl.int64)[:, None] * DIM
        b_rows = b_ptr + cols.to(tl.int64)[None, :] * DIM
        logits = tl.zeros((R, C), tl.float32)
        for start in range(0, depth, D):
            d = start + tl.arange(0, D)
            a = tl.load(a_rows + d[None, :], row_in[:, None] & (d < DIM)[None, :], 0.0)
            b = tl.load(b_rows + d[:, None], (d < DIM)[:, None] & col_in[None, :], 0.0)
            if UPCAST:  # Triton's interpreter would multiply the bit patterns of bfloat16
                a, b = a.to(tl.float32), b.to(tl.float32)
            logits = tl.dot(a, b, logits, input_precision="tf32x3")
        logits *= tl.load(scale_ptr) * 1.4426950408889634
        if WEIGHTS:
            lse = tl.load(row_ptr + rows, row_in, 0.0) * 1.4426950408889634
            grad_lse = tl.load(row_ptr + n_rows + rows, row_in, 0.0)
            share = tl.load(row_ptr + 2 * n_rows + rows, row_in, 0.0)[:, None]
            weights = tl.exp2(logits - lse[:, None]) * grad_lse[:, None]
            lse = tl.load(col_ptr + cols, col_in, 0.0) * 1.4426950408889634
            grad_lse = tl.load(col_ptr + n_cols + cols, col_in, 0.0)
            share += tl.load(col_ptr + 2 * n_cols + cols, col_in, 0.0)[None, :]
            weights += tl.exp2(logits - lse[None, :]) * grad_lse[None, :]
            a_label = tl.load(a_label_ptr + rows, row_in, 0)[:, None]
            b_label = tl.load(b_label_ptr + cols, col_in, 0)[None, :]
            weights += tl.where(a_label == b_label, share, 0.0)
            weights = tl.where(hidden, 0.0, weights).to(weight_ptr.dtype.element_ty)
            out = weight_ptr + rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
            tl.store(out, weights, row_in[:, None] & col_in[None, :])
        else:
            hidden = hidden | ~(row_in[:, None] & col_in[None, :])
            logits = tl.where(hidden, float("-inf"), logits)
            for axis in tl.static_range(1, -1, -1):  # labels loaded twice: kept, `positive` spills
                if axis == 0:
                    out, n, index = col_ptr + r.to(tl.int64) * 3 * n_cols, n_cols, cols
                else:
                    out, n, index = row_ptr + c.to(tl.int64) * 3 * n_rows, n_rows, rows
                a_label = tl.load(a_label_ptr + rows, row_in, 0)[:, None]
                b_label = tl.load(b_label_ptr + cols, col_in, 0)[None, :]
                positive = tl.where(a_label == b_label, logits, float("-inf"))
                found = positive > float("-inf")
                total = tl.sum(tl.where(found, positive, 0.0), axis) * 0.6931471805599453
                tl.store(out + n + index, total, index < n)
                tl.store(out + 2 * n + index, tl.sum(found.to(tl.float32), axis), index < n)
                top = tl.maximum(tl.max(logits, axis), -1e30)
                total = tl.sum(tl.exp2(logits - tl.expand_dims(top, axis)), axis)
                tl.store(out + index, (top + tl.log2(total)) * 0.6931471805599453, index < n)


def _triton_tile(a, b, a_labels, b_labels, scale, offset, symmetric, rows=None, cols=None):
    """What `_torch_tile` does, by many tiles; their shape is the largest that does not spill."""
    shape = (128, 64, 32) if a.dtype == torch.float32 else (128, 128, 64)
    r, c, d = shape if a.is_cuda else (32, 32, 32)
    grid, given = (triton.cdiv(len(a), r), triton.cdiv(len(b), c)), rows is not None
    if not given:
        rows, cols = scale.new_empty(grid[1], 3, len(a)), scale.new_empty(grid[0], 3, len(b))
    weights = a.new_empty(len(a), len(b)) if given else rows
    _tile_kernel[grid](
        a, b, a_labels, b_labels, scale, rows.contiguous(), cols.contiguous(), weights, len(a),
        len(b), offset, SYMMETRIC=symmetric, WEIGHTS=given, UPCAST=not a.is_cuda,
        DIM=a.shape[1], R=r, C=c, D=d, num_warps=8)
    return weights if given else [
        torch.stack([x[:, 0].logsumexp(0), *x[:, 1:].sum(0)]) for x in (rows, cols)]


# ---- 4. All pairs, as operators that autograd and torch.compile know ----
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


def _merge(x, y):
    """Statistics (lse, positive sum, count) of two sets of pairs together."""
    return torch.cat([torch.logaddexp(x[:1], y[:1]), x[1:] + y[1:]])


def _add_product(total, weights, features):
    if weights.is_cuda and weights.dtype != total.dtype:
        total += torch.mm(weights, features, out_dtype=total.dtype)
    else:
        total.addmm_(weights.to(total.dtype), features.to(total.dtype))


_NAME = __name__.replace(".", "_")  # two copies of this file may live in one process


@torch.library.custom_op(f"{_NAME}::pair_statistics", mutates_args=())
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
            cols[:, c] = _merge(cols[:, c], found)
        return _merge(rows, cols) if symmetric else rows, cols


@torch.library.custom_op(f"{_NAME}::pair_gradients", mutates_args=())
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
            weights = tile(*block, rows[:, r], (rows if symmetric else cols)[:, c])
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


# ---- 5. The losses ----
class _Gather(torch.autograd.Function):
    """The rows of all processes in the order of rank; gradients return to their owners."""

    @staticmethod
    def forward(ctx, local, group):
        ctx.group, ctx.shape = group, local.shape
        rows = local.new_empty(dist.get_world_size(group) * len(local), *local.shape[1:])
        dist.all_gather_into_tensor(rows, local.contiguous(), group=group)
        return rows

    @staticmethod
    def backward(ctx, grad):
        local = grad.new_empty(ctx.shape)
        dist.reduce_scatter_tensor(local, grad.contiguous(), group=ctx.group)
        return local, None


def _require(condition, message):
    if not condition:
        raise ValueError(message)


def _anchor_losses(a, b, a_labels, b_labels, temperature, offset, impl, symmetric=False):
    """For rows (N,) and columns (M,) of a @ b.T as anchors: their losses, which have positives."""
    shapes = [(tuple(x.shape), x.dtype, x.device) for x in (a, b)]
    _require(a.ndim == b.ndim == 2 and a.numel() and a.is_floating_point() and a.dtype == b.dtype
             and a.shape[1] == b.shape[1] and a.device == b.device and len(b),
             f"features and contrast must be floating (N, D), (M, D), not {shapes}")
    for x, labels in ((a, a_labels), (b, b_labels)):
        _require(labels.shape == x.shape[:1] and not labels.is_floating_point()
                 and labels.device == x.device, f"labels must be integer ({len(x)},) beside the "
                 f"features, not {labels.dtype} {tuple(labels.shape)} on {labels.device}")
    if not isinstance(temperature, Tensor) or not (
            temperature.is_cuda or torch.compiler.is_compiling()):  # do not wait for the GPU
        _require(temperature > 0, f"temperature must be positive, not {temperature}")
    able = triton is not None and a.dtype != torch.float64 and (
        a.is_cuda or type(_tile_kernel).__name__ == "InterpretedFunction")
    _require(impl in ("auto", "torch") or impl == "triton" and able, f"impl must be 'auto', 'torch'"
             f" or, with Triton on a GPU and not in float64, 'triton': {impl!r}, {shapes[0]}")
    scale = torch.as_tensor(1 / temperature, dtype=torch.promote_types(a.dtype, torch.float32),
                            device=a.device).reshape(())
    statistics = pair_statistics(
        a.contiguous(), b.contiguous(), a_labels.long().contiguous(), b_labels.long().contiguous(),
        scale, offset, symmetric, able and impl != "torch" and (a.is_cuda or impl == "triton"))
    return [(torch.where(count > 0, lse - total / count.clamp(min=1), 0), count > 0)
            for lse, total, count in statistics]


def supcon_loss(features, labels=None, temperature=0.07, *, contrast=None, contrast_labels=None,
                both=False, reduction="mean", impl="auto", group=None):
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
    group: torch.distributed process group with N rows each: local rows meet the rows of all.
        The mean over its processes, which DDP takes, is exactly the loss of one process.
    Raises ValueError for what does not fit, RuntimeError for a derivative of the gradient.
    """
    alone = contrast is None
    fits = labels is not None and contrast_labels is None and not both if alone else (
        (labels is None) == (contrast_labels is None))
    _require(fits, "give labels alone, or contrast with labels and contrast_labels or neither")
    _require(reduction in ("mean", "sum", "none"), f"reduction is {reduction!r}")
    rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    if alone:
        contrast, contrast_labels = features, labels
    elif labels is None:
        labels = torch.arange(len(features), device=features.device) + rank * len(features)
        contrast_labels = labels
    offset = rank * len(features) if alone else world * len(contrast)  # the latter is no column
    if group is None:
        others = contrast.detach() if alone else contrast
        anchors = _anchor_losses(features, others, labels, contrast_labels, temperature, offset,
                                 impl, symmetric=alone)
    else:
        sides = (features, labels), (contrast, contrast_labels)
        anchors = [_anchor_losses(x, _Gather.apply(y, group), x_labels,
                                  _Gather.apply(y_labels, group), temperature, offset, impl)[0]
                   for (x, x_labels), (y, y_labels) in (sides, sides[::-1])[: 1 + both]]
    losses, counted = (torch.cat(x) for x in zip(*anchors[: 1 + both], strict=True))
    if reduction == "none":
        return losses
    count = counted.sum()
    if group is not None:
        dist.all_reduce(count, group=group)
    return losses.sum() * world / (count.clamp(min=1) if reduction == "mean" else 1)


def product_supcon_loss(a, b, labels, temperature=0.07, *, unit_rows=True, impl="auto"):
    """Mean SupCon loss of the rows of Q = a @ b.T (N, M), in time N^2 min(D, M).

    a (N, D), b (M, D), labels (N,) of the rows of Q; swap a and b for the columns of Q. Exact
    gradients to both. unit_rows: each row of Q is divided by its norm first. In float32 at
    least, under autocast too. Q Q^T = a (b^T b) a^T, so features a with the metric b^T b do.
    """
    _require(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and a.dtype == b.dtype,
             f"a (N, D) and b (M, D) do not fit: {tuple(a.shape)} {a.dtype}, "
             f"{tuple(b.shape)} {b.dtype}")
    with torch.autocast(a.device.type, enabled=False):
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        if len(b) <= b.shape[1]:  # Q itself is no wider than a
            q = a @ b.T
            return supcon_loss(normalize(q, dim=1) if unit_rows else q, labels, temperature,
                               impl=impl)
        # The logits are y x^T with y = x metric. The operator hands the gradient of both
        # roles, y and x, to y: right for x, twice too much for the metric, which is halved.
        metric = b.T @ b
        y = a @ ((metric + metric.detach()) / 2)
        x = a.detach()
        if unit_rows:  # |q_i|^2 = y_i . a_i, written so that a and the metric get all they must
            norm = (2 * vecdot(y, x) - vecdot(y, x).detach()).clamp(min=1e-24).sqrt()[:, None]
            x, y = x / norm.detach(), y / norm
        losses, counted = _anchor_losses(y, x, labels, labels, temperature, 0, impl,
                                         symmetric=True)[0]
        return losses.sum() / counted.sum().clamp(min=1)


# ---- 6. Benchmark: every figure from a process of its own, in turns ----
def _candidates():
    """name -> loss of (x, y, labels): SupCon of x, or SCALE's two terms of Q = x @ y.T."""
    def metric_learning(x, y, labels):
        from pytorch_metric_learning.losses import SupConLoss
        return SupConLoss(temperature=0.07)(x, labels)

    def floor(x, y, labels):  # two products of 2 N^2 D operations and nothing else
        z = x.detach()
        return 0 * x.sum() + sum((rows @ z.T @ z)[0, 0] for rows in z.split(512))

    def formula(x, y, labels):
        q = x @ y.T
        return sum(supcon_reference(normalize(m, dim=1), labels) for m in (q, q.T))

    compiled = torch.compile(supcon_reference, dynamic=True)
    return {"floor": floor, "pytorch-metric-learning": metric_learning,
            "plain torch": lambda x, y, labels: supcon_reference(x, labels),
            "torch.compile": lambda x, y, labels: compiled(x, labels),
            "supcon_loss": lambda x, y, labels: supcon_loss(x, labels),
            "SCALE: Q, Q Q^T, Q^T Q": formula,
            "SCALE: product_supcon_loss": lambda x, y, labels: (
                product_supcon_loss(x, y, labels) + product_supcon_loss(y, x, labels))}


def _measure(name, n, dim):
    """Milliseconds of forward and backward (CPU time, on a GPU elapsed), MiB added to the peak."""
    import time
    gpu, loss, times, peaks = torch.cuda.is_available(), _candidates()[name], [], []
    clock = time.perf_counter if gpu else time.process_time
    x, y = (normalize(torch.randn(n, dim, device="cuda" if gpu else "cpu")) for _ in "xy")
    inputs = x.requires_grad_(), y.requires_grad_(), torch.arange(n, device=x.device) % 12
    for size in (64, n, n, n):  # the first loads and compiles
        start = clock()
        torch.autograd.grad(loss(*(z[:size] for z in inputs)), (x, y), allow_unused=True)
        if gpu:
            torch.cuda.synchronize()
            peaks.append(torch.cuda.max_memory_allocated() / 2**20)
        times.append(clock() - start)
        if not gpu:  # Linux
            with open("/proc/self/status") as file:
                peaks.append(int(file.read().split("VmHWM:")[1].split()[0]) / 2**10)
    return sorted(times[1:])[1] * 1000, peaks[-1] - peaks[0]


def _check(dtype):
    """Gradient error on the GPU against float64: not worse than plain torch's in this dtype."""
    x = normalize(torch.randn(1000, 200, device="cuda")).to(dtype).requires_grad_()
    labels = torch.arange(1000, device="cuda") % 12
    exact, ours, plain = (
        torch.autograd.grad(loss(z, labels), x)[0].double() for loss, z in
        ((supcon_reference, x.double()), (supcon_loss, x), (supcon_reference, x)))
    ours, plain = (((g - exact).norm() / exact.norm()).item() for g in (ours, plain))
    print(f"{dtype}: gradient error {ours:.1e}, plain torch {plain:.1e}")
    assert ours <= 1.3 * plain + 1e-6, "the Triton tiles are wrong on this GPU"


def main():
    """Print time and memory of forward and backward: medians of interleaved runs."""
    import argparse
    import statistics
    import subprocess
    import sys
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--only", help="this candidate alone, in this process")
    args = parser.parse_args()
    if args.only:
        return print(*_measure(args.only, args.sizes[0], args.dim))
    for dtype in (torch.float32, torch.bfloat16) if torch.cuda.is_available() else ():
        _check(dtype)
    print(f"{'N':>6} {'':26} {'ms':>9} {'faster':>7} {'x floor':>8} {'MiB':>7}")
    for n in args.sizes:
        runs = {name: [] for name in _candidates()}
        for name in list(runs) * 3:
            child = [sys.executable, __file__, "--only", name, "--sizes", n, "--dim", args.dim]
            child = subprocess.run([str(x) for x in child], capture_output=True, text=True)
            if child.returncode == 0:  # else not installed, or out of memory
                runs[name].append([float(x) for x in child.stdout.split()])
        found = {name: [statistics.median(x) for x in zip(*values, strict=True)]
                 for name, values in runs.items() if values}
        for name, (ms, mib) in found.items():
            rival = found["SCALE: Q, Q Q^T, Q^T Q" if "SCALE" in name else "plain torch"][0]
            print(f"{n:6} {name:26} {ms:9.1f} {rival / ms:6.2f}x {ms / found['floor'][0]:8.2f} "
                  f"{mib:7.0f}", flush=True)


if __name__ == "__main__":
    main()
