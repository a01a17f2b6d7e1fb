"""Verifies every kernel on this machine's GPU, then times it beside its peers, and writes kernels/RESULTS.md.

    python -m kernels.bench [--rounds 20] [--out kernels/RESULTS.md]

A kernel is timed only where its bf16 error, in every result and gradient, is at most 1.5 × that of PyTorch's own bf16 against float64.
Each contender's calls, over as many copies of the inputs as the L2 cache cannot hold, are one CUDA graph; contenders take turns, round by
round, and the ratios are medians of rounds. A peer that does not run is named, and is no win. The shares are of the copy and the bf16
product measured here in the same run.
"""
import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F

from . import attention, cross_entropy, ops, rows, vae
from .cache import Begin, Columns, Step
from .common import triton

LIMIT = 1.5  # of a kernel's bf16 error over PyTorch's own


@dataclass
class Case:
    """One kernel at one shape. Functions take the tensors of `inputs`, each of which wants a gradient."""
    name: str
    inputs: Callable      # () -> list of tensors
    kernel: Callable      # (*tensors) -> tensor or tuple
    reference: Callable   # likewise, in PyTorch and any dtype
    moved: float          # bytes of the forward pass
    moved_back: float     # and of the backward pass
    product: float = 0    # operations of the forward pass's product, twice that backward; 0: bound by memory
    peers: dict = None    # more functions to time, name -> (*tensors) -> tensor


# ---- cases --------------------------------------------------------------------------------------------------------------

def attention_case(device, dtype, N, G, h, h_kv, d, P, own):
    """The latent step: N questions of P tokens, G rollouts each, which have `own` columns already."""
    B, C = N * G, own + 1
    arange = lambda *a: torch.arange(*a, device=device, dtype=torch.int32)
    start = arange(N) * 7 % (P // 2)
    w = attention.Where(start, arange(B) // G, arange(B), arange(0, B + 1, G), G, arange(B) * 0 + own, arange(B)[:, None] * 0 + own)
    angle = torch.rand(B, 1, 1, d // 2, device=device) * 100
    cos, sin = angle.cos(), angle.sin()  # made once for all layers

    def inputs():
        r = lambda *s: torch.randn(s, device=device).to(dtype)
        new = [r(B, 1, n, d).transpose(1, 2) for n in (h, h_kv, h_kv)]
        return [*new, r(N, h_kv, P, d), r(N, h_kv, P, d), r(B, h_kv, C, d), r(B, h_kv, C, d)]

    def kernel(q, k, v, pk, pv, ok, ov):
        prefix, mine = Columns(pk.detach(), pv.detach()), Columns(ok.detach(), ov.detach())
        thread = Begin.apply(prefix, pk, pv) + Begin.apply(mine, ok, ov)
        return Step.apply(prefix, mine, thread, q, k, v, cos, sin, w)[0]

    see = attention.visible(w, P, C)[:, None]

    def sdpa(q, k, v, pk, pv, ok, ov):
        turn = lambda x: rows.rotate(x, cos.to(dtype), sin.to(dtype))
        K, V = torch.cat((pk[w.owner], ok, turn(k)), 2), torch.cat((pv[w.owner], ov, v), 2)
        return F.scaled_dot_product_attention(turn(q), K, V, attn_mask=see, enable_gqa=h > h_kv)

    reference = lambda q, k, v, *s: attention.step(q, k, v, cos.to(q.dtype), sin.to(q.dtype), *s, w)
    columns = float((N * P - start.sum() + B * C) * h_kv * d)
    return Case(f"latent attention, {N} × {G} rows, {P} + {own} columns", inputs, kernel, reference, 4 * columns, (4 + 16) * columns,
                peers={"SDPA": sdpa, **flex(w, P, C, cos, sin, dtype)})


def flex(w, P, C, cos, sin, dtype):
    """FlexAttention as a peer; {} on a CPU, where it has no backward pass."""
    if cos.device.type != "cuda":
        return {}
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    see = attention.visible(w, P, C)
    run, mask = torch.compile(flex_attention, dynamic=False), []  # made at the first call, where what fails is told

    def peer(q, k, v, pk, pv, ok, ov):
        if not mask:
            mask.append(create_block_mask(lambda b, h, q, c: see[b, q, c], len(w.owner), None, 1, see.shape[2], device=see.device))
        turn = lambda x: rows.rotate(x, cos.to(dtype), sin.to(dtype))
        K, V = torch.cat((pk[w.owner], ok, turn(k)), 2), torch.cat((pv[w.owner], ov, v), 2)
        return run(turn(q), K, V, block_mask=mask[0], enable_gqa=True)

    return {"FlexAttention": peer}


def vae_case(device, dtype, R, D):
    key = ops.noise(5, R).to(device)
    eps = vae.drawn(key, D)
    inputs = lambda: [torch.randn(R, D, device=device).to(dtype) for _ in range(2)]
    noise = lambda mu, logvar: vae.reparameterise(mu, logvar, torch.randn_like(mu, dtype=torch.float32))
    return Case(f"reparameterisation, {R} × {D}", inputs, lambda mu, logvar: vae.apply(mu, logvar, key),
                lambda mu, logvar: vae.reparameterise(mu, logvar, eps.to(mu.dtype)), 8 * R * D, 12 * R * D,
                peers={"eager with randn": noise, "torch.compile with randn": lambda *x: torch.compile(noise)(*x)})


def row_cases(device, dtype, R, D, inner, V):
    r = lambda *s: torch.randn(s, device=device).to(dtype)
    weight, target = r(D), torch.randint(0, V, (R,), device=device)
    norm = lambda x, a: tuple(rows.AddRMSNorm.apply(x, a, weight, 1e-5, dtype))
    scale = D**-0.5
    return [Case(f"add + RMSNorm, {R} × {D}", lambda: [r(R, D), r(R, D)], norm,
                 lambda x, a: rows.add_rms_norm(x, a, weight.to(x.dtype), 1e-5), 8 * R * D, 8 * R * D),
            Case(f"SwiGLU, {R} × {inner}", lambda: [r(R, inner), r(R, inner)], rows.SwiGLU.apply, rows.swiglu,
                 6 * R * inner, 10 * R * inner),
            Case(f"linear cross-entropy, {R} × {V}", lambda: [r(R, D), r(V, D) * scale], lambda h, W: cross_entropy.apply(h, W, target),
                 lambda h, W: cross_entropy.linear_nll(h, W, target), 2 * (R + V) * D, 4 * (R + V) * D, product=2 * R * V * D)]


def cases(device, dtype):
    """What is timed: the shapes of llama-1b."""
    return [vae_case(device, dtype, 65536, 2048), vae_case(device, dtype, 32, 2048),
            attention_case(device, dtype, 16, 8, 32, 8, 64, 200, 20), attention_case(device, dtype, 32, 1, 32, 8, 64, 140, 10),
            attention_case(device, dtype, 2, 1, 32, 8, 64, 8192, 20), *row_cases(device, dtype, 6400, 2048, 8192, 128259)]


def small_cases(device, dtype):
    """The same code in seconds on a CPU, for a test."""
    return [vae_case(device, dtype, 3, 40), attention_case(device, dtype, 2, 2, 4, 1, 8, 19, 3), *row_cases(device, dtype, 5, 24, 40, 67)]


# ---- verify -------------------------------------------------------------------------------------------------------------

def results(f, inputs, upstream=None):
    """([results and gradients of f], the upstream gradients, different for every element)."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = f(*leaves)
    out = [out] if torch.is_tensor(out) else list(out)
    upstream = upstream or [torch.randn_like(y, dtype=torch.float32) for y in out]
    gradients = torch.autograd.grad(out, leaves, [g.to(y.dtype) for g, y in zip(upstream, out)])
    return [x.detach() for x in (*out, *gradients)], upstream


def verify(case):
    """The largest ratio of the kernel's error to PyTorch's own in the same dtype, each in relative L2 against float64.

    PyTorch's error counts as at least the rounding of a result: where it is exact by luck, a kernel need not be.
    """
    torch.manual_seed(0)
    inputs = case.inputs()
    mine, up = results(case.kernel, inputs)
    own = results(case.reference, inputs, up)[0]
    exact = results(case.reference, [x.double() for x in inputs], up)[0]
    error = lambda a, b: float((a.double() - b).norm() / b.norm())
    least = torch.finfo(inputs[0].dtype).eps / 4
    return max(error(a, c) / max(error(b, c), least) for a, b, c in zip(mine, own, exact))


# ---- time ---------------------------------------------------------------------------------------------------------------

def graph_of(f, copies, backward):
    """A CUDA graph of f over every copy of the inputs, with the backward pass if asked for. Returns its replay."""
    def call():
        for inputs in copies:
            if backward:
                out = f(*inputs)
                out = [out] if torch.is_tensor(out) else list(out)
                torch.autograd.grad(out, inputs, [torch.ones_like(y) for y in out])
            else:
                with torch.no_grad():
                    f(*inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())  # which has the inputs to write first
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def microseconds(replay):
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return 1e3 * begin.elapsed_time(end)


def ceilings(device):
    """(bytes read and written per µs by a copy, operations per µs of a bf16 product)."""
    a, b = (torch.empty(2**29, dtype=torch.bfloat16, device=device) for _ in range(2))
    x, y = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    best = lambda f: min(microseconds(f) for _ in range(20))
    return 2 * a.nbytes / best(lambda: b.copy_(a)), 2 * 8192**3 / best(lambda: x @ y)


def race(case, rounds, backward, copy_speed, product_speed, peers="all"):
    """Markdown rows: µs a call, GB/s or TFLOP/s, the share of the ceiling, and how many times the kernel's time each peer takes."""
    size = sum(x.nbytes for x in case.inputs())
    count = max(1, min(50, 2 * torch.cuda.get_device_properties(0).L2_cache_size // size + 1))
    copies = [[x.requires_grad_() for x in case.inputs()] for _ in range(count)]
    fused = torch.compile(case.reference, dynamic=False)
    contenders = {"kernel": case.kernel, "eager": case.reference, "torch.compile": fused, **(case.peers or {})}
    contenders = {name: f for name, f in contenders.items() if peers == "all" or name.split(" with ")[0] in ("kernel", *peers.split(","))}
    replays, failed = {}, []
    for name, f in contenders.items():
        try:
            replays[name] = graph_of(f, copies, backward)
        except Exception as e:  # whatever a compiler of others may raise
            if name == "kernel":
                raise
            failed.append(f"{name}: did not run ({' '.join(str(e).split())[:80]})")
    times = {name: [] for name in replays}
    for _ in range(rounds):
        for name, replay in replays.items():
            times[name].append(microseconds(replay) / count)
    lines = []
    for name, t in times.items():
        t = torch.tensor(t)
        ratio = (t / torch.tensor(times["kernel"])).quantile(torch.tensor([0.1, 0.5, 0.9]))
        us = float(t.median())
        if case.product:
            speed = case.product * (3 if backward else 1) / us
            told = f"{speed / 1e6:.0f} TFLOP/s | {speed / product_speed:.0%}"
        else:
            speed = (case.moved + (case.moved_back if backward else 0)) / us
            told = f"{speed / 1e3:.0f} GB/s | {speed / copy_speed:.0%}"
        lines.append(f"| {case.name} | {'forward + backward' if backward else 'forward'} | {name} | {us:.1f} | {told} | "
                     f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f}) |")
    return lines + [f"| {case.name} | {'forward + backward' if backward else 'forward'} | {line} | | | | |" for line in failed]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="turns of each contender [%(default)s]")
    parser.add_argument("--peers", default="all", help="all | some of eager, torch.compile, SDPA, FlexAttention, separated by commas; those that "
                        "compile take minutes [%(default)s]")
    parser.add_argument("--out", default="kernels/RESULTS.md", help="written after each kernel [%(default)s]")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no GPU here; python -m kernels.compile_report and the tests need none")
    if unknown := set(args.peers.split(",")) - {"all", "eager", "torch.compile", "SDPA", "FlexAttention"}:
        parser.error(f"--peers: there is no {', '.join(unknown)}")
    device = torch.device("cuda")
    copy_speed, product_speed = ceilings(device)
    checks, lines, wrong = [], [], []
    for case in cases(device, torch.bfloat16):
        try:
            ratio = verify(case)
            checks.append(f"| {case.name} | {ratio:.2f} |")
            if ratio > LIMIT:
                wrong.append(f"{case.name}: its bf16 error is {ratio:.2f} × PyTorch's own, so it was not timed")
                continue
            for backward in (False, True):
                told = race(case, args.rounds, backward, copy_speed, product_speed, args.peers)
                lines += told
                print("\n".join(told), flush=True)
        except Exception as e:  # the other kernels' figures are worth having
            wrong.append(f"{case.name}: {type(e).__name__}: {' '.join(str(e).split())[:300]}")
        finally:
            write(args.out, checks, lines, wrong, copy_speed, product_speed)
    for line in wrong:
        sys.stderr.write(line + "\n")
    return 1 if wrong else 0


def write(path, checks, lines, wrong, copy_speed, product_speed):
    """RESULTS.md, as far as it goes."""
    Path(path).write_text("\n".join([
        "# Kernels, measured", "",
        f"`python -m kernels.bench` on {torch.cuda.get_device_name()}, PyTorch {torch.__version__}, Triton {triton.__version__}, "
        f"{time.strftime('%Y-%m-%d')}. Ceilings of this run: copy {copy_speed / 1e3:.0f} GB/s (read + write), bf16 product "
        f"{product_speed / 1e6:.0f} TFLOP/s.", "", "| | largest error over PyTorch's own, bf16 against float64 |", "|---|---|",
        *checks, "", "| | pass | | µs | speed | share of the ceiling | its time over the kernel's (p10–p90) |", "|---|" + "---|" * 6,
        *lines, "", *wrong]) + "\n")


if __name__ == "__main__":
    sys.exit(main())
