# SPDX-License-Identifier: Apache-2.0
"""Supervised contrastive loss over all N x N pairs, in memory that grows with N, not with N^2.

    loss_i = log sum_{j != i} exp(x_i . x_j / tau) - mean_{p in P(i)} x_i . x_p / tau

P(i): the others of i's label (L_out of arXiv:2004.11362). A tile of pairs is made twice (on a CPU
all but 72 MiB): first for the log-sum-exp, sum and number of positives of its rows AND columns, so
that a triangle is enough, then for dL/dlogits. No atomics: repeatable. NOT yet run on a GPU."""
import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton on this platform: torch tiles do everything
    triton = None

# ---- 1. The formula in plain torch: reference and yardstick --------------------------------------
def supcon_reference(features, labels, temperature=0.07):
    """Mean SupCon loss by dense matrices and autograd: (..., N, D), (..., N) -> (...)."""
    itself = torch.eye(features.shape[-2], dtype=torch.bool, device=features.device)
    logits = features @ features.mT / temperature
    logits = logits.masked_fill(itself, torch.finfo(logits.dtype).min)
    positive = (labels[..., None] == labels[..., None, :]) & ~itself
    count = positive.sum(-1)
    mean_positive = torch.where(positive, logits, 0).sum(-1) / count.clamp(min=1)
    losses = torch.where(count > 0, logits.logsumexp(-1) - mean_positive, 0)
    return losses.sum(-1) / (count > 0).sum(-1).clamp(min=1)

# ---- 2. One tile of R rows and C columns, in torch and in Triton ---------------------------------
def _torch_tile(a, b, a_labels, b_labels, scale, itself, work, fresh, rows=None, cols=None):
    """(lse, positive sum, count) of rows (1, 3, R), of columns (1, 3, C); given lse, dL/dlse and
    dL/dsum of both: dL/dlogits (R, C). itself: a is b, without its diagonal; its rows say all."""
    logits, one, two, same = (x[: len(a), : len(b)] for x in work)
    if fresh or rows is None:
        torch.mm(a, b.T, out=logits).mul_(scale)
        if itself:
            logits.diagonal().copy_(logits.amin(1))  # is no maximum
    low, top = logits.aminmax()  # one exponential for rows and columns, unless some would vanish
    tops = [top] if top - low < 30 else [logits.amax(d, keepdim=True) for d in (1, 0)]
    shares = [torch.sub(logits, top, out=x).mul_(1.4426950408889634).exp2_()  # faster than exp
              for top, x in zip(tops, (one, two), strict=False)]
    torch.eq(a_labels[:, None], b_labels, out=same)  # 1 or 0
    for x in (same, *shares) if itself else ():
        x.fill_diagonal_(0)
    if rows is not None:
        u = (tops[0] - rows[0, :, None]).clamp(max=80).exp() * rows[1, :, None]
        v = (tops[-1] - cols[0]).clamp(max=80).exp() * cols[1]
        torch.mul(shares[-1], v, out=two).addcmul_(one, u)
        return two.addcmul_(same, torch.add(rows[2, :, None], cols[2], out=one))
    lse = [(tops[-i] + shares[-i].sum(1 - i, True).log()).flatten() for i in (0, 1)]
    torch.mul(same, logits, out=one)
    return [torch.stack([lse[1 - d], one.sum(d), same.sum(d)])[None] for d in (1, 0)[: 2 - itself]]

if triton is not None:
    @triton.jit
    def _tile_kernel(a_ptr, b_ptr, a_label_ptr, b_label_ptr, scale_ptr, row_ptr, col_ptr,
                     weight_ptr, n_rows, n_cols, itself, WEIGHTS: tl.constexpr,
                     DIM: tl.constexpr, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
        """WEIGHTS: row (3, n_rows), col (3, n_cols) -> weight; else to row, col (tiles, 3, n)."""
        r, c = tl.program_id(0), tl.program_id(1)  # a block of pairs is small: 32-bit offsets
        rows, cols = (r * R + tl.arange(0, R))[:, None], (c * C + tl.arange(0, C))[None, :]
        row_in, col_in, logits = rows < n_rows, cols < n_cols, tl.zeros((R, C), tl.float32)
        for start in range(0, DIM, D):
            d = start + tl.arange(0, D)
            a = tl.load(a_ptr + rows * DIM + d[None, :], row_in & (d < DIM)[None, :], 0.0)
            b = tl.load(b_ptr + cols * DIM + d[:, None], col_in & (d < DIM)[:, None], 0.0)
            logits = tl.dot(a, b, logits, input_precision="tf32x3")
        shown = row_in & col_in & ((rows != cols) | (itself == 0))
        logits *= tl.load(scale_ptr)
        a_label, b_label = tl.load(a_label_ptr + rows, row_in), tl.load(b_label_ptr + cols, col_in)
        if WEIGHTS:
            row, col = row_ptr + rows, col_ptr + cols
            weights = tl.exp(logits - tl.load(row, row_in)) * tl.load(row + n_rows, row_in)
            weights += tl.exp(logits - tl.load(col, col_in)) * tl.load(col + n_cols, col_in)
            share = tl.load(row + 2 * n_rows, row_in) + tl.load(col + 2 * n_cols, col_in)
            weights = tl.where(shown, weights + tl.where(a_label == b_label, share, 0.0), 0.0)
            tl.store(weight_ptr + rows * n_cols + cols, weights, row_in & col_in)
        else:
            logits = tl.where(shown, logits, -1e30)
            for axis in tl.static_range(1, -1, -1):  # this order does not spill
                n, i = n_rows if axis else n_cols, rows if axis else cols
                out = (row_ptr + c * 3 * n if axis else col_ptr + r * 3 * n) + i
                same = (a_label == b_label) & (logits > -1e30)
                tl.store(out + n, tl.sum(tl.where(same, logits, 0.0), axis, keep_dims=True), i < n)
                top = tl.max(logits, axis, keep_dims=True)
                tl.store(out + 2 * n, tl.sum(same.to(tl.float32), axis, keep_dims=True), i < n)
                tl.store(out, top + tl.log(tl.sum(tl.exp(logits - top), axis, keep_dims=1)), i < n)

def _triton_tile(a, b, a_labels, b_labels, scale, itself, work, fresh, rows=None, cols=None):
    """What `_torch_tile` does, by many tiles; their shape is the largest that does not spill."""
    r, c, d = (128, 64, 32) if a.dtype == torch.float32 else (128, 128, 64)
    grid, given = (triton.cdiv(len(a), r), triton.cdiv(len(b), c)), rows is not None
    weights = a.new_empty(len(a), len(b) * given)
    rows, cols = (rows.contiguous(), cols.contiguous()) if given else (
        scale.new_empty(grid[1], 3, len(a)), scale.new_empty(grid[0], 3, len(b)))
    _tile_kernel[grid](a, b, a_labels, b_labels, scale, rows, cols, weights, len(a), len(b),
                       int(itself), WEIGHTS=given, DIM=a.shape[1], R=r, C=c, D=d, num_warps=8)
    return weights if given else [rows, cols][: 2 - itself]

# ---- 3. All pairs, as an operator that autograd and torch.compile know ---------------------------
@torch.library.custom_op(__name__.replace(".", "_") + "::all_pairs", mutates_args=())
def all_pairs(x: Tensor, labels: Tensor, scale: Tensor, metric: Tensor, rows: int, alone: bool,
              unit: bool, use_triton: bool, keep: int, given: Tensor | None = None,
              kept: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x (L, D), labels (L,) -> (lse, positive sum, count, norm) of each, (4, L), over the pairs of
    the first `rows` with the rest; `alone`, also with each other. Logits: scale x_i . metric x_j,
    metric (D, D) or (0,); unit: of x over its norm. given: dL/dx, dL/dscale, 2 dL/dmetric."""
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        dtype, wide, tile = x.dtype, scale.dtype, _triton_tile if use_triton else _torch_tile
        if not use_triton:  # floating-point labels are faster to compare
            x, labels = x.to(wide), labels.unique(return_inverse=True)[1].to(wide)
        out = scale.new_tensor([[-1e30], [0], [0], [1]]).repeat(1, len(x))
        grad_scale, grad_metric = torch.zeros_like(scale), torch.zeros_like(metric)
        step = 4096 if x.is_cuda else 512 if keep and rows > 2048 else 256  # fits the device, cache
        project = metric.__rmatmul__ if metric.numel() else torch.Tensor.detach
        own, xs = ([slice(i, min(i + step, n)) for i in range(0, n, step)] for n in (rows, len(x)))
        kept = scale.new_empty(keep, 512, 1024) if kept is None else kept  # logits of first tiles
        room, (spare, *work) = iter(kept), scale.new_empty(4, step * (not use_triton), 2 * step)
        if given is not None:
            out, peak = x.new_zeros(x.shape, dtype=wide), given[1:3].abs().amax().clamp(min=1e-30)
            given = torch.cat([given[:1], given[1:3] / peak, given[3:]])  # float16 can hold it
        for r in xs if unit and given is None else ():
            out[3, r] = torch.einsum("nd,nd->n", project(x[r]), x[r]).clamp(min=1e-24).sqrt()
        norm = (out if given is None else given)[3:].T.to(x.dtype)
        unit_of = (lambda r: x[r] / norm[r]) if unit else x.__getitem__
        sums = {} if x.dtype == wide else {"out_dtype": wide}
        for r in own:
            left = project(right := unit_of(r))
            starts = range(r.stop if alone else rows, len(x), 2 * step)
            for c in [r] * alone + [slice(j, j + 2 * step) for j in starts]:
                y, z = unit_of(c), next(room, spare)
                block = left, y, labels[r], labels[c], scale, r == c, (z, *work), z is spare
                if given is None:
                    for s, found in zip((r, c), tile(*block), strict=False):
                        found = torch.cat([out[None, :3, s], found])
                        out[:3, s] = torch.stack([found[:, 0].logsumexp(0), *found[:, 1:].sum(0)])
                    continue
                weights = tile(*block, given[:, r], given[:, c])
                for s, w, z in ((r, weights, y), (c, weights.T, right))[: 1 + (r != c)]:
                    torch.addmm(out[s], w, z, out=out[s], **sums)
        if given is None:
            return out, grad_scale, kept
        for r in xs:
            left = project(right := unit_of(r))
            grad_scale += (share := (out[r] * left).sum(1, keepdim=True)).sum()  # a pair: twice
            out[r].addcmul_(right, share, value=-int(unit)).div_(norm[r])
            grad_metric += x[r].T @ out[r] if metric.numel() else 0
            out[r] = project(out[r])
        return out.mul_(peak * scale).to(dtype), grad_scale * peak / 2, grad_metric * peak * scale

def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.flags = inputs[4:9]
    ctx.save_for_backward(*inputs[:4], output[0], output[2])

@torch.autograd.function.once_differentiable
def _backward(ctx, grad, *_):
    *inputs, found, kept = ctx.saved_tensors
    x, *rest = all_pairs(*inputs, *ctx.flags, torch.cat([found[:1], grad[:2], found[3:]]), kept)
    return x, None, *rest, *[None] * 7

all_pairs.register_fake(lambda x, labels, scale, metric, *rest: (
    scale.new_empty(4, len(x)) if len(rest) == 5 else torch.empty_like(x), torch.empty_like(scale),
    scale.new_empty(rest[4], 512, 1024) if len(rest) == 5 else torch.empty_like(metric)))
all_pairs.register_autograd(_backward, setup_context=_save)

# ---- 4. The losses -------------------------------------------------------------------------------
def all_reduce(x, group):
    """The sum over all processes of x, and of its gradients; without a group x itself."""
    if group:
        x = x.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(x.detach(), group=group)
        if x.requires_grad:
            x.register_hook(lambda grad: all_reduce(grad, group))
    return x

def _gather(local, group):
    """The rows of all processes, one's own first; gradients return to their owners, summed."""
    sizes = torch.arange(group.size(), device=local.device).eq(group.rank()) * len(local)
    before, _, after = all_reduce(sizes, group).tensor_split((group.rank(), group.rank() + 1))
    around = (0, 0) * (local.ndim - 1) + (int(before.sum()), int(after.sum()))
    return all_reduce(torch.nn.functional.pad(local, around), group).roll(-around[-2], 0)

def supcon_loss(features, labels=None, temperature=0.07, *, contrast=None, contrast_labels=None,
                both=False, reduction="mean", impl="auto", group=None, _product=None):
    """Supervised contrastive loss in time N^2 D, memory N D. Float32 at least. Raises ValueError.
    features (N, D): floating, any strides, normalised by the caller. labels (N,): integers; a
        row's positives are the others of its label. None with `contrast`: row i of both (CLIP).
    temperature: positive number, or tensor of one element, which then receives its gradient.
    contrast (M, D), contrast_labels (M,): compare with these rows instead; none is left out.
    both: the rows of `contrast` are anchors too (CLIP's two directions), in the same pass.
    reduction: "mean" over the anchors with a positive (the others give 0, no gradient), "sum" or
        "none": (N,), with `both` (N + M,). impl: "torch", "triton" (on a GPU) or "auto", the best.
    group: torch.distributed's; mean and sum are over the rows of all, gradients to be averaged."""
    x, y, alone, n = features, contrast, contrast is None, len(features)
    labels, y_labels = (t if t is None or t.is_floating_point() else t.long()
                        for t in (labels, contrast_labels))
    y, y_labels = (x, labels) if alone and y_labels is None else (y, y_labels)
    if labels is None and y_labels is None and not alone:
        labels = y_labels = torch.arange(n, device=x.device) + (group.rank() << 32 if group else 0)
    given = [t if t is None else (*t.shape, t.dtype, t.device) for t in (x, labels, y, y_labels)]
    kinds = (x.shape[-1], x.dtype, x.device), (torch.int64, x.device)
    able = triton is not None and x.is_cuda and x.dtype != torch.float64
    unseen = torch.compiler.is_compiling() or getattr(temperature, "is_cuda", False)
    if not (given == [(k, *kind) for k in (n, 0 if y is None else len(y)) for kind in kinds]
            and (x.numel() * len(y) or group) and x.is_floating_point()
            and not (both and (alone or group)) and reduction in ("mean", "sum", "none")
            and (unseen or temperature > 0) and impl in ("auto", "torch", "triton")[: 2 + able]):
        given += [temperature, both, group, reduction, impl]
        raise ValueError(f"expected what supcon_loss.__doc__ states, not {given}")
    wide = torch.promote_types(x.dtype, torch.float32)
    plain = alone, x.is_cpu, _product, group, impl, reduction
    if n <= 512 and plain == (True, True, None, None, "auto", "mean"):
        with torch.autocast("cpu", enabled=False):  # the operator's call would take longer
            return supcon_reference(x.to(wide), labels, temperature)
    y, y_labels = (_gather(t, group) if group else t for t in (y, y_labels))
    y, labels = y[n * alone :], torch.cat([labels, y_labels[n * alone :]])
    scale = 1 / torch.as_tensor(temperature, dtype=wide, device=x.device).reshape(())
    metric, unit = _product or (x.new_empty(0), False)
    x = torch.cat([x, y]) if len(y) else x.contiguous()
    keep = 36 * (x.is_cpu and metric.numel() == 0 and torch.is_grad_enabled())  # tiles of 2 MiB
    found = all_pairs(x, labels, scale, metric, n, alone, unit, able and impl != "torch", keep)[0]
    lse, total, count, _ = found if both else found[:, :n]
    losses = torch.where(count > 0, lse - total / count.clamp(min=1), 0)
    total, anchors = (all_reduce(t.sum(), group) for t in (losses, count > 0))
    return {"none": losses, "sum": total, "mean": total / anchors.clamp(min=1)}[reduction]

def product_supcon_loss(a, b, labels, temperature=0.07, *, unit_rows=True, impl="auto", group=None):
    """Mean SupCon loss of the rows of Q = a @ b.T, normalised if unit_rows; columns: swap a and b.
    a (N, D), b (M, D), labels (N,), or a group's shares; Q Q^T = a (b^T b) a^T: time N^2 D."""
    with torch.autocast(a.device.type, enabled=False):
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        narrow = len(b) <= b.shape[1] and group is None  # else a metric; its gradient is doubled
        a, q = (a @ b.T, a.new_empty(0)) if narrow else (a, all_reduce(b.T @ b.detach(), group))
        return supcon_loss(a, labels, temperature, impl=impl, group=group, _product=(q, unit_rows))

# ---- 5. Benchmark: python supcon.py 512 4096 (these N); each line from a process of its own ------
LOSSES = {  # of x, y (N, D), labels g: SupCon of x, then SCALE's two terms of Q = x @ y.T
    "plain torch": lambda x, y, g: supcon_reference(x, g),
    "torch.compile": lambda x, y, g: torch.compile(supcon_reference, dynamic=True)(x, g),
    "pytorch-metric-learning": lambda x, y, g: __import__(
        "pytorch_metric_learning.losses").losses.SupConLoss(temperature=0.07)(x, g),
    "supcon_loss": lambda x, y, g: supcon_loss(x, g),
    "floor: two products": lambda x, y, g: sum((r @ y.detach().T).sum() for r in x.split(512)),
    "Q, Q Q^T, Q^T Q": lambda x, y, g: sum(
        supcon_reference(torch.nn.functional.normalize(q), g) for q in (x @ y.T, y @ x.T)),
    "SCALE's terms": lambda x, y, g: sum(product_supcon_loss(*q, g) for q in ((x, y), (y, x)))}

def _measure(name, n):
    """Median seconds of 5 forward and backward passes (CPU; on a GPU elapsed), MiB by the first."""
    import resource
    import time
    gpu, used = torch.cuda.is_available(), []
    data = torch.randn(2, n, 768, device="cuda" if gpu else "cpu").div_(28)
    for size in (600, *[n] * 5):  # the first loads and compiles
        x, y = (t[:size].detach().requires_grad_() for t in data)
        g = torch.arange(len(x), device=x.device) % 12
        grad = torch.autograd.grad(LOSSES[name](x, y, g), (x, y), allow_unused=True)[0]
        if size == 600 and name == "supcon_loss":  # checked first, across tiles
            assert torch.allclose(grad, *torch.autograd.grad(supcon_reference(x, g), x), 1e-3, 1e-5)
        grad = grad[0, 0].item()  # waits for a GPU, frees the rest
        used.append((time.perf_counter(), torch.cuda.max_memory_allocated() / 2**20) if gpu else (
            time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10))
    seconds, mib = torch.tensor(used, dtype=torch.float64).T
    return seconds.diff().median().item(), (mib[1] - mib[0]).item()

if __name__ == "__main__":
    import sys
    from contextlib import suppress
    from itertools import product
    with torch.multiprocessing.Pool(1, maxtasksperchild=1) as pool:
        for n, name in product(map(int, sys.argv[1:] or (512, 1024, 2048, 4096, 8192)), LOSSES):
            with suppress(ImportError):  # without pytorch-metric-learning
                seconds, mib = pool.apply(_measure, (name, n))
                if name in ("plain torch", "Q, Q Q^T, Q^T Q"):
                    rival = seconds
                print(f"{n:6} {name:24}{seconds:9.3f} s {rival / seconds:5.1f}x {mib:7.0f} MiB")
