"""kernels/supcon.py against loops in float64, torch's own losses, its interpreter and compiler."""
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from kernels import supcon
from kernels.supcon import product_supcon_loss, supcon_loss, supcon_reference

SHAPES = [(1, 8), (33, 17), (65, 37), (127, 130)]


def unit_rows(n, d, dtype=torch.float64, seed=0):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return normalize(x, dim=1).to(dtype).requires_grad_()


def loop_loss(x, labels, temperature, y=None, y_labels=None):
    """The equation, an anchor at a time: the mean over those that have a positive."""
    alone, losses = y is None, []
    y, y_labels = (x, labels) if alone else (y, y_labels)
    for i in range(len(x)):
        others = [j for j in range(len(y)) if not (alone and j == i)]
        chosen = [k for k, j in enumerate(others) if y_labels[j] == labels[i]]
        if chosen:
            logits = (y[others] @ x[i] - 1) / temperature
            losses.append(torch.log(torch.exp(logits).sum()) - logits[chosen].sum() / len(chosen))
    return sum(losses) / max(len(losses), 1) + 0 * (x.sum() + y.sum() + temperature)


def assert_same(got, expected, inputs, atol=1e-9, rtol=1e-9):
    """Equal losses and equal gradients to the inputs."""
    torch.testing.assert_close(got, expected, atol=atol, rtol=rtol)
    for a, b in zip(*(torch.autograd.grad(x, inputs) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.005])
@pytest.mark.parametrize("n, d", SHAPES)
def test_supcon_equals_loops(n, d, temperature):
    """Catches a wrong mask, tile edge, sign or overflow, in the loss or any gradient."""
    x, y, tau = unit_rows(n, d), unit_rows(n + 3, d, seed=1), torch.tensor(temperature).double()
    tau.requires_grad_()
    for classes in (1, 5, 10 * n):
        g, h = torch.arange(n) % classes, torch.arange(n + 3) % classes
        assert_same(supcon_loss(x, g, tau), loop_loss(x, g, tau), (x, tau))
        assert_same(supcon_loss(x, g, tau, contrast=y, contrast_labels=h),
                    loop_loss(x, g, tau, y, h), (x, y, tau))


def test_supcon_blocks_and_reductions():
    """Catches an error where blocks of rows meet, in a reduction, or from run to run."""
    x, labels = unit_rows(1100, 8), torch.arange(1100) % 700
    assert_same(supcon_loss(x, labels), supcon_reference(x, labels), x)
    losses = supcon_loss(x, labels, reduction="none")
    assert (losses == 0).sum() == 300 and torch.isclose(supcon_loss(x, labels), losses.sum() / 800)
    assert torch.equal(supcon_loss(x, labels, reduction="sum"), losses.sum())
    assert torch.equal(supcon_loss(x, labels), supcon_loss(x, labels))


def test_supcon_gradcheck():
    """Catches a gradient that is not the loss's own, to each input that can have one."""
    tau, labels = torch.tensor(0.5).double(), torch.tensor([3, 1, 3, 2, 1, 3, 9])
    inputs = unit_rows(7, 4), unit_rows(7, 4, seed=1), tau.requires_grad_()
    for loss in (lambda x, y, tau: supcon_loss(x.T.clone().T, labels, tau, reduction="none"),
                 lambda x, y, tau: supcon_loss(x, None, tau, contrast=y, both=True),
                 lambda x, y, tau: product_supcon_loss(x, y, labels, tau),
                 lambda x, y, tau: product_supcon_loss(x, y[:3], labels, tau, unit_rows=False)):
        assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [1.0, 0.07, 0.005])
def test_supcon_no_worse_than_plain_torch(dtype, temperature):
    """Catches lost precision: error to float64 beside plain torch's on the same features."""
    x, labels = unit_rows(300, 40, dtype), torch.arange(300) % 9
    exact = x.detach().double().requires_grad_()
    truth, = torch.autograd.grad(supcon_reference(exact, labels, temperature), exact)
    ours, plain = ((torch.autograd.grad(f(x, labels, temperature), x)[0] - truth).norm()
                   for f in (supcon_loss, supcon_reference))
    assert ours <= plain * 1.3 + 1e-6 * truth.norm()


def test_supcon_identities():
    """Catches a wrong denominator, a mean that counts lone anchors, a lost confident positive."""
    equal = torch.ones(64, 8).div(8**0.5).requires_grad_()
    assert torch.isclose(supcon_loss(equal, torch.zeros(64).long()), torch.tensor(math.log(63)))
    lone = supcon_loss(equal, torch.arange(64))
    assert lone == 0 and not torch.autograd.grad(lone, equal)[0].any()
    x, y, pair = unit_rows(50, 6), unit_rows(50, 6, seed=1), torch.arange(50)
    logits = x @ y.T / 0.07
    clip = (cross_entropy(logits, pair) + cross_entropy(logits.T, pair)) / 2
    assert_same(supcon_loss(x, contrast=y, both=True), clip, (x, y))
    sure = (torch.eye(2).repeat(3, 1) + 0.01).bfloat16().requires_grad_()
    assert torch.autograd.grad(supcon_loss(sure, torch.arange(6) % 2), sure)[0].any()


@pytest.mark.parametrize("m", [5, 90])
@pytest.mark.parametrize("unit", [True, False])
def test_product_supcon_equals_dense_formula(m, unit):
    """Catches a wrong gradient through the metric b^T b, or through Q, to a or to b."""
    a, b, labels = unit_rows(70, 20), unit_rows(m, 20, seed=1), torch.arange(70) % 7
    q = normalize(a @ b.T, dim=1) if unit else a @ b.T
    assert_same(product_supcon_loss(a, b, labels, unit_rows=unit), supcon_reference(q, labels),
                (a, b))


def test_supcon_mistakes_are_named():
    """Catches a mistake that passes, or a second derivative that is silently zero."""
    x, labels = unit_rows(6, 4), torch.arange(6)
    for wrong in ({"features": x[0]}, {"features": x.long()}, {"labels": labels[:5]},
                  {"labels": labels.float()}, {"temperature": 0}, {"labels": None},
                  {"temperature": torch.tensor(-1.0)}, {"impl": "cuda"}, {"impl": "triton"},
                  {"reduction": "max"}, {"both": True}, {"contrast": x}, {"labels": None,
                  "contrast": x[:, :2]}, {"contrast": x.half(), "contrast_labels": labels}):
        with pytest.raises(ValueError, match=r"\w+ \w+"):
            supcon_loss(**{"features": x, "labels": labels} | wrong)
    gradient, = torch.autograd.grad(supcon_loss(x, labels % 2), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


def test_supcon_compile_autocast_and_memory():
    """Catches a graph break, a false shape, rounding by autocast, an N x N matrix kept."""
    x, g, sizes = unit_rows(80, 16, torch.float32), torch.arange(80) % 9, []
    scale = torch.tensor(5.0, requires_grad=True)
    for arguments in ((x, x.detach(), g, g, scale, 0, True), (x, x[:9], g, g[:9], scale, 2, False)):
        torch.library.opcheck(supcon.pair_statistics, (*arguments, False))
    compiled = torch.compile(supcon_loss, fullgraph=True, backend="aot_eager")
    assert_same(compiled(x, g), supcon_loss(x, g), x)
    for loss in (supcon_loss, lambda x, g: product_supcon_loss(x, x.detach(), g)):
        expected = loss(x, g)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same(loss(x, g), expected, x, 0, 0)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, id):
        supcon_loss(unit_rows(900, 16), torch.arange(900) % 9)
    assert sum(sizes) < 900 * 16 * 5


def guard_interpreter():
    """Let Triton's interpreter fail on an access outside the tensors passed, and on races."""
    from triton.runtime import interpreter
    builder, launch, seen = interpreter.InterpreterBuilder, interpreter.GridExecutor.__call__, {}

    def recorded(kind, access):
        def record(self, ptrs, *rest):
            mask = rest[kind == "store"].data.astype(bool)  # load: (mask,), store: (value, mask)
            at = np.unique(ptrs.data[mask].astype(np.int64))
            end = at + ptrs.get_element_ty().primitive_bitwidth // 8
            inside = sum((at >= low) & (end <= high) for low, high in seen["tensors"])
            assert np.all(inside), f"{kind} outside of every tensor"
            seen[kind][self.grid_idx].append(at)
            return access(self, ptrs, *rest)
        return record

    def guarded_launch(self, *args, **kwargs):
        seen.update(load=defaultdict(list), store=defaultdict(list), tensors=[
            (t.data_ptr(), t.data_ptr() + t.nbytes) for t in args if isinstance(t, torch.Tensor)])
        launch(self, *args, **kwargs)
        loads, stores = ([np.unique(np.concatenate(x)) for x in seen[kind].values()]
                         for kind in ("load", "store"))  # of each program
        stored, writers = np.unique(np.concatenate(stores), return_counts=True)
        assert writers.max() == 1 and not np.isin(stored, np.concatenate(loads)).any(), "race"

    for kind in ("load", "store"):
        name = f"create_masked_{kind}"
        setattr(builder, name, recorded(kind, getattr(builder, name)))
    interpreter.GridExecutor.__call__ = guarded_launch


def run_in_interpreter():
    """Triton's tiles, guarded: odd shapes, two blocks, all forms and types, against float64."""
    guard_interpreter()
    most = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
    for n, d in ((1, 8), (33, 17), (65, 37), (300, 9)):
        g, h = torch.arange(n) % 7, torch.arange(n + 5) % 9
        dtypes = list(most) if n < 300 else [torch.float32]  # two blocks take a while
        for dtype, form in itertools.product(dtypes, ("alone", "both", "offset")):
            def loss(x, y, impl, g=g, h=h, form=form):
                if form == "offset":  # what a group of processes does
                    return supcon._anchor_losses(x, y, g, h, 1.0, 3, impl)[0][0].sum()
                others = {"contrast": y, "contrast_labels": h, "both": True}
                return supcon_loss(x, g, 0.05, impl=impl, **others if form == "both" else {})
            inputs = unit_rows(n, d, dtype), unit_rows(n + 5, d, dtype, seed=1)
            exact = [x.detach().double().requires_grad_() for x in inputs]
            got, truth = (torch.autograd.grad(loss(*x, impl), x, allow_unused=True)
                          for x, impl in ((inputs, "triton"), (exact, "torch")))
            error = max(float((a - b).norm() / (b.norm() + 1e-30))
                        for a, b in zip(got, truth, strict=True) if b is not None)
            print(n, d, dtype, form, f"{error:.1e}")
            assert error < most[dtype]


def run_python(code, cwd, **environment):
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")


@on_linux
def test_triton_in_interpreter():
    """Catches a wrong Triton tile, an access out of bounds, a race of two programs."""
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(supcon.__file__).parents[1])])
    assert "offset" in run_python(f"import {__name__} as t; t.run_in_interpreter()", ".",
                                  TRITON_INTERPRET="1", PYTHONPATH=paths)


@on_linux
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_compiles_without_spills(arch, dtype, tmp_path):
    """Catches tiles that spill registers or miss the tensor cores, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    names, tools = supcon._tile_kernel.arg_names, Path(triton.__file__).parent
    shape = (128, 64, 32) if dtype == "fp32" else (128, 128, 64)
    for weights, symmetric in ((False, True), (False, False), (True, False)):
        constants = dict(zip("RCD", shape, strict=True), DIM=768,
                         WEIGHTS=weights, SYMMETRIC=symmetric)
        types = {"a_ptr": dtype, "b_ptr": dtype, "weight_ptr": dtype if weights else "fp32",
                 "a_label_ptr": "i64", "b_label_ptr": "i64"}
        signature = {name: "constexpr" if name in constants else "*" + types.get(name, "fp32")
                     if name.endswith("_ptr") else "i32" for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
                   if name.endswith("_ptr")}
        built = triton.compile(ASTSource(supcon._tile_kernel, signature, constants, aligned),
                               target=GPUTarget("cuda", arch, 32), options={"num_warps": 8})
        (tmp_path / "cubin").write_bytes(built.asm["cubin"])
        usage, code = (subprocess.run(
            [tools / "backends/nvidia/bin" / tool[0], *tool[1:], tmp_path / "cubin"], check=True,
            capture_output=True, text=True).stdout
            for tool in (["cuobjdump", "-res-usage"], ["nvdisasm"]))
        assert re.search(r"STACK:0\b", usage), usage
        assert re.search(r"HG?MMA", code), "no tensor-core instruction"


def run_process(rank, rendezvous):
    """One of two processes: the mean of both losses and gradients is that of one process."""
    torch.distributed.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    weight, x, y = (unit_rows(n, 6, seed=n) for n in (5, 40, 40))
    labels = torch.where(torch.arange(40) < 25, torch.arange(40) % 4, torch.arange(40))
    for pair, extra in (((x,), {"labels": labels}), ((x, y), {}),
                        ((x, y), {"labels": labels, "contrast_labels": labels.flip(0)})):
        results = []
        for group, rows in ((None, slice(0, 40)), (torch.distributed.group.WORLD,
                                                   slice(rank * 20, rank * 20 + 20))):
            a, *b = (normalize(t[rows].detach() @ weight.T, dim=1) for t in pair)
            loss = supcon_loss(a, contrast=b[0] if b else None, both=len(b) > 0, group=group,
                               **{key: value[rows] for key, value in extra.items()})
            gradient, = torch.autograd.grad(loss, weight)
            results.append(torch.cat([loss.detach().view(1), gradient.flatten()]))
        torch.distributed.all_reduce(results[1])
        torch.testing.assert_close(results[1] / 2, results[0], atol=1e-12, rtol=1e-10)
    torch.distributed.destroy_process_group()


def test_supcon_two_processes_equal_one(tmp_path):
    """Catches a gather without gradient, a wrong own pair, a mean over the local count."""
    torch.multiprocessing.spawn(run_process, (tmp_path / "rendezvous",), 2)


def test_supcon_file_alone(tmp_path):
    """Catches an import from the project, or a need for Triton where there is none."""
    shutil.copy(supcon.__file__, tmp_path / "loss.py")
    code = ("import sys, torch; sys.modules['triton'] = None; from loss import supcon_loss; "
            "print(supcon_loss(torch.ones(8, 4) / 2, torch.zeros(8).long()).item())")
    assert float(run_python(code, tmp_path)) == pytest.approx(math.log(7))
