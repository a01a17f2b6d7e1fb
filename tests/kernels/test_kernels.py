"""Every kernel against PyTorch in float64, the hand-derived gradients, ε, the compiler, training.

Kernels run in Triton's interpreter, on a CPU. TRITON_INTERPRET=0 runs the same tests on a GPU.
"""

# ruff: noqa: E402 (imports come after the check that Triton is installed)

import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.usefixtures("poison"),
    # NumPy's, of the interpreter: exp of −∞, and NaN that a mask drops
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]

import train
from kernels import attention, bench, cache, cross_entropy, ops, rows, sampling, vae
from kernels.common import ceil_div
from minatp.bench import lease
from minatp.data import Encoded, collate, left_pad
from minatp.decoder import read_thoughts
from minatp.latent import ATP
from minatp.llama import KVCache, Llama, LlamaConfig
from minatp.optim import build_optimizer
from minatp.problems import Problem
from minatp.rl import log_probs
from minatp.rollout import Noise, rollout
from minatp.run import options
from minatp.run.build import build
from minatp.run.device import pick_device
from minatp.run.errors import UserError
from minatp.run.loop import GuardedOptimizer, Run
from minatp.run.splits import encode_problems
from minatp.sft import sft_losses, total_loss

from floats import DEVICE, FP16, FP32, close, normal

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def compile_report():
    """The compiler's report for sm_90, in a process that runs beside the other tests."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(
        [sys.executable, "-m", "kernels.compile_report", "--sm", "90", "--batches", "0"],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def compare(kernel, reference, inputs, bound=FP32):
    """Assert that a kernel's values and gradients are those of its reference in float64.

    The upstream gradients differ from element to element.
    """
    inputs = [x.detach().requires_grad_() for x in inputs]
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    outputs = bench.as_list(kernel(*inputs))
    exact_outputs = bench.as_list(reference(*exact_inputs))

    upstream = [torch.randn_like(y) for y in outputs]
    exact_upstream = [g.double() for g in upstream]
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    exact_gradients = torch.autograd.grad(exact_outputs, exact_inputs, exact_upstream)

    for i, (actual, expected) in enumerate(zip(outputs, exact_outputs)):
        close(actual, expected, bound, f"result {i}")
    for i, (actual, expected) in enumerate(zip(gradients, exact_gradients)):
        close(actual, expected, bound, f"gradient {i}")


def with_triton(op, *args):
    """Call a function of kernels/ops.py with MINATP_KERNELS=triton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINATP_KERNELS", "triton")
        return op(*args)


# ---- the VAE -------------------------------------------------------------------------------------


def fused_score(mu, logvar, z):
    return vae.fused_reparameterise(mu, logvar, z=z)


def reference_score(mu, logvar, z):
    return vae.reparameterise(mu, logvar, z=z)


def compare_with_eps(mu, logvar, eps, exact_eps, bound=FP32):
    """Compare the kernel with noise `eps` (ε or its keys) and the reference with ε in float64."""
    kernel = partial(vae.fused_reparameterise, eps=eps)
    reference = partial(vae.reparameterise, eps=exact_eps)
    compare(kernel, reference, [mu, logvar], bound)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (2, 3, 13), (5, 64), (7, 31), (2, 129)])
def test_vae(shape):
    *batch, D = shape
    mu, logvar = normal(*batch, 2 * D).chunk(2, -1)  # rows that are not contiguous
    eps = normal(*shape)
    keys = ops.noise_keys(-12345678901234, *batch).to(DEVICE)
    keys = keys * torch.tensor([1, 2**33 + 1], device=DEVICE)  # offsets of more than 32 bits

    # The four modes: draw, given, mean, score
    compare_with_eps(mu, logvar, keys, vae.draw_noise(keys, D, torch.float64))
    compare_with_eps(mu, logvar, eps, eps.double())
    compare(vae.fused_reparameterise, vae.reparameterise, [mu, logvar])
    z = mu + logvar.exp() * eps
    compare(fused_score, reference_score, [mu, logvar, z])


def test_vae_in_fp16_and_at_extremes():
    mu, logvar, eps = (normal(3, 37, dtype=torch.float16) for _ in range(3))
    compare_with_eps(mu, logvar, eps, eps.double(), FP16)

    mu = 1e3 * normal(2, 37)
    logvar = torch.linspace(-30, 30, 74, device=DEVICE).view(2, 37)
    compare_with_eps(mu, logvar, eps[:2], eps[:2].double())


def make_keys(seed, offset):
    """Return keys (rows, 2) of one seed and the offsets (rows,)."""
    return torch.stack((torch.full_like(offset, seed), offset), 1)


def draw_eps(seed, offset, D, block=vae.BLOCK):
    """Return ε (rows, D) as the kernel draws it: z at μ = logσ² = 0."""
    zeros = torch.zeros(len(offset), D, device=DEVICE)
    z, _, _ = vae.run_forward(zeros, zeros, make_keys(seed, offset), "draw", block)
    return z


def test_eps_is_standard_normal_and_independent():
    n_rows, D = 48, 1024
    eps = draw_eps(7, torch.arange(n_rows, device=DEVICE), D)
    root_n = eps.numel() ** 0.5

    # The moments, within four standard errors, and the tails
    assert abs(eps.mean()) < 4 / root_n
    assert abs(eps.var() - 1) < 4 * 2**0.5 / root_n
    assert abs(eps.pow(3).mean()) < 4 * 15**0.5 / root_n
    assert abs(eps.pow(4).mean() - 3) < 4 * 96**0.5 / root_n
    assert 3.5 < eps.abs().max() < 6

    # No correlation between rows: offsets are those of steps and problems
    directions = torch.nn.functional.normalize(eps, dim=1)
    cosines = directions @ directions.T
    off_diagonal = ~torch.eye(n_rows, dtype=torch.bool, device=DEVICE)
    assert cosines[off_diagonal].abs().max() < 5 / D**0.5

    # Nor between neighbouring columns, nor between the lanes of a counter
    assert abs((eps[:, 1:] * eps[:, :-1]).mean()) < 4 / root_n
    assert abs((eps[:, D // 4 :] * eps[:, : -D // 4]).mean()) < 5 / root_n


def test_eps_depends_on_seed_offset_and_column_alone():
    D = 203
    offset = torch.tensor([3, 2**40 + 5, 3, 0], device=DEVICE)
    eps = draw_eps(11, offset, D)

    # The same offset gives the same row; another offset or another seed differs in every column.
    assert torch.equal(eps[0], eps[2])
    assert not (eps[0] == eps[1]).any()
    assert not (draw_eps(12, offset, D) == eps).any()

    # Neither the block size nor the batch changes it.
    for block in (16, 64):
        assert torch.equal(draw_eps(11, offset, D, block), eps)
    assert torch.equal(draw_eps(11, offset[1:2], D), eps[1:2])

    # The backward pass draws it again: with μ = logσ² = 0 and dz = 1, dlogσ² is ε/2.
    zeros = torch.zeros(4, D, device=DEVICE)
    ones = torch.ones(4, D, device=DEVICE)
    no_gradient = torch.zeros(4, device=DEVICE)
    keys = make_keys(11, offset)
    dlogvar = [
        vae.run_backward(ones, no_gradient, no_gradient, zeros, zeros, keys, "draw", block)[1]
        for block in (16, 64)
    ]
    assert torch.equal(2 * dlogvar[0], eps)
    assert torch.equal(dlogvar[0], dlogvar[1])


# ---- attention -----------------------------------------------------------------------------------


class StepShape(NamedTuple):
    """One step of attention: T new positions for each row."""

    group_sizes: list  # rows that share each prefix
    n_head: int
    n_kv_head: int
    head_dim: int
    P: int  # columns of a prefix
    C: int  # and of a row's own
    T: int
    dtype: torch.dtype = torch.float32
    q_scale: float = 1.0


# fmt: off
SHAPES = [
    StepShape([1], 1, 1, 8, P=5, C=3, T=1),             # one row, whose prefix is all padding
    StepShape([2, 1], 4, 1, 6, P=17, C=5, T=1),         # four query heads for a key head
    StepShape([1, 3], 2, 2, 16, P=33, C=4, T=3),
    StepShape([5], 4, 1, 8, P=20, C=3, T=1),            # a group that takes two turns
    StepShape([1, 1, 1], 6, 2, 10, P=7, C=11, T=2),
    StepShape([2, 1], 4, 1, 6, P=9, C=37, T=7),         # a row whose queries take two turns
    StepShape([2], 8, 2, 4, P=40, C=2, T=1, q_scale=100),  # scores in the hundreds
    StepShape([2, 2], 4, 1, 64, P=19, C=35, T=1),
    StepShape([2, 3], 4, 1, 16, P=19, C=5, T=1, dtype=torch.float16),
]
# fmt: on


def random_layout(shape):
    """Return a Layout: rows in any order, prefixes of any length, half of the positions real."""
    N, B = len(shape.group_sizes), sum(shape.group_sizes)
    owner = torch.repeat_interleave(torch.arange(N), torch.tensor(shape.group_sizes))
    owner = owner[torch.randperm(B)]
    members = owner.argsort(stable=True)
    member_offsets = torch.searchsorted(owner[members].contiguous(), torch.arange(N + 1))

    start = torch.randint(0, shape.P, (N,))
    n_own = torch.randint(0, shape.C - shape.T + 1, (B,))
    real = torch.rand(B, shape.T) > 0.5
    start[0] = shape.P  # a prefix that is all padding
    n_own[0] = 0  # a row without columns of its own
    real[-1] = True
    slot = torch.where(real, n_own[:, None] + real.long().cumsum(1) - 1, -1)

    def int32(x):
        return x.int().to(DEVICE)

    return attention.Layout(
        start=int32(start),
        owner=int32(owner),
        members=int32(members),
        member_offsets=int32(member_offsets),
        mean_group=ceil_div(B, N),
        n_own=int32(n_own),
        slot=int32(slot),
    )


def random_step(shape):
    """Return a step's inputs: [q, k, v, cos, sin, prefix_k, prefix_v, own_k, own_v]."""
    N, B = len(shape.group_sizes), sum(shape.group_sizes)
    n_kv_head, head_dim, dtype = shape.n_kv_head, shape.head_dim, shape.dtype

    # q, k and v as the projections leave them: (B, T, heads, head_dim) in memory
    heads = (shape.n_head, n_kv_head, n_kv_head)
    q, k, v = (normal(B, shape.T, n, head_dim, dtype=dtype).transpose(1, 2) for n in heads)

    angle_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    angle_shape = (B, 1, shape.T, head_dim // 2)
    angle = 30 * torch.rand(angle_shape, device=DEVICE, dtype=angle_dtype)

    prefix = [normal(N, n_kv_head, shape.P, head_dim, dtype=dtype) for _ in range(2)]
    own = [normal(B, n_kv_head, shape.C, head_dim, dtype=dtype) for _ in range(2)]
    return [shape.q_scale * q, k, v, angle.cos(), angle.sin(), *prefix, *own]


@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape):
    layout = random_layout(shape)
    inputs = random_step(shape)
    q, k, v, cos, sin, prefix_k, prefix_v, own_k, own_v = inputs
    P, C = shape.P, shape.C

    # The reference in float64, and its gradient
    exact = [x.double() for x in inputs]
    differentiable = exact[:3] + exact[5:]  # all but cos and sin
    for x in differentiable:
        x.requires_grad_()
    exact_o = attention.step_reference(*exact, layout)
    do = normal(*exact_o.transpose(1, 2).shape, dtype=shape.dtype).transpose(1, 2)
    exact_gradients = torch.autograd.grad(exact_o, differentiable, do.double())
    exact_dq, exact_dk, exact_dv, *exact_dcolumns = exact_gradients

    # The kernels get NaN in every column that they must not read: padding, and columns to come.
    in_prefix = torch.arange(P, device=DEVICE) >= layout.start[:, None]  # (N, P)
    in_own = torch.arange(C, device=DEVICE) < layout.n_own[:, None]  # (B, C)
    no_prefix = ~in_prefix[:, None, :, None]
    no_own = ~in_own[:, None, :, None]
    prefix = attention.KV(*(x.masked_fill(no_prefix, torch.nan) for x in (prefix_k, prefix_v)))
    own = attention.KV(*(x.masked_fill(no_own, torch.nan) for x in (own_k, own_v)))
    step_inputs = attention.StepInputs(q, k, v, cos, sin)
    o, lse = attention.run_forward(step_inputs, prefix, own, layout)

    # The buffers of a row's own gradients already hold what later steps have added.
    later = [normal(*x.shape) for x in own]
    prefix_grad = attention.KV(*(torch.zeros_like(x, dtype=torch.float32) for x in prefix))
    own_grad = attention.KV(*(x.clone() for x in later))
    caches = (prefix, own)
    grads = (prefix_grad, own_grad)
    dq, dk, dv = attention.run_backward(do, o, lse, step_inputs, caches, grads, layout)

    # What later steps added to the new columns is part of dk and dv.
    is_real = (layout.slot >= 0)[:, None, :, None]  # (B, 1, T, 1)
    slot = layout.slot.clamp(min=0).long()[:, None, :, None]
    slot = slot.expand(-1, shape.n_kv_head, -1, shape.head_dim)
    later_k, later_v = (x.gather(2, slot) * is_real for x in later)
    later_k = rows.rotate(later_k.double(), cos.double(), -sin.double())

    # A score's rounding error grows with the score.
    bound = FP16 if shape.dtype == torch.float16 else FP32 * shape.q_scale
    close(o, exact_o, bound, "o")
    close(dq, exact_dq, bound, "dq")
    close(dk, exact_dk + later_k, bound, "dk")
    close(dv, exact_dv + later_v, bound, "dv")

    # The prefix's buffers hold its gradient. A row's own had it added, and the new columns cleared.
    exact_dprefix, exact_down = exact_dcolumns[:2], exact_dcolumns[2:]
    for name, actual, expected in zip("kv", prefix_grad, exact_dprefix):
        close(actual, expected, bound, f"prefix {name}")
    is_new = torch.zeros(len(layout.slot), C + 1, dtype=torch.bool, device=DEVICE)
    is_new.scatter_(1, torch.where(layout.slot >= 0, layout.slot, C).long(), True)
    is_new = is_new[:, None, :C, None]
    for name, actual, expected, before in zip("kv", own_grad, exact_down, later):
        close(actual, (expected + before).masked_fill(is_new, 0), bound, f"own {name}")

    # The new columns are appended to the cache: the rotated k, and v.
    rotated_k = rows.rotate(k.double(), cos.double(), sin.double())
    for columns, expected in zip(own, (rotated_k, v)):
        appended = columns.gather(2, slot).masked_fill(~is_real, 0)
        close(appended, expected * is_real, bound, "append")


def test_a_cpu_attends_in_float32_whatever_the_dtype():
    """Under autocast as well, whose bfloat16 has a slow backward pass; gradients are rounded."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 16, dtype=torch.bfloat16) for h in (6, 3, 3))
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", enabled=dtype == torch.bfloat16):
            y = attention.masked_sdpa(*leaves, mask)
        assert y.dtype == dtype
        y.backward(v.repeat_interleave(2, 1).to(dtype))
        results.append([y.detach(), *(x.grad for x in leaves)])
    for rounded, exact in zip(*results):
        assert torch.equal(rounded, exact.to(torch.bfloat16))


@pytest.mark.parametrize("T", [1, 3])
def test_open_columns(T):
    B = 130  # more than a program counts
    is_real = torch.arange(B * T, device=DEVICE).view(T, B).t() % 3 != 0
    n_own = torch.arange(B, device=DEVICE)
    n_prefix = 2 * n_own + 5
    before = n_own.clone()
    n_before, slot, position = attention.open_columns(is_real, n_own, n_prefix)

    n_real = is_real.long().cumsum(1)
    column = before[:, None] + n_real - 1
    assert torch.equal(n_before, before.int())
    assert torch.equal(slot, torch.where(is_real, column, -1).int())
    assert torch.equal(position, n_prefix[:, None] + column)
    assert torch.equal(n_own, before + n_real[:, -1])


def tiny_llama():
    cfg = LlamaConfig(
        vocab_size=29,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        n_embd=24,
        n_inner=20,
        head_dim=6,
        rope_theta=50.0,
        rope_scaling=None,
        bos=0,
        eos=(1,),
    )
    return Llama(cfg).init_weights(torch.Generator().manual_seed(1)).to(DEVICE)


def chain_with_a_long_tail(llama, prompt, prompt_mask, steps, tail):
    """Use a cache in every way: two prompts with two rollouts each, steps, a few columns, a long
    pass.

    A step is (noise, real), and its input is the hidden state before it plus the noise. Returns the
    hidden states of the last three; of the few columns, that after the last.
    """
    kv_cache = llama.cache(2, 32)
    h = llama(prompt, prompt_mask, kv_cache, last=1)[:, 0].repeat_interleave(2, 0)
    kv_cache.keep(torch.tensor([0, 0, 1, 1], device=DEVICE))
    for noise, real in steps:
        h = llama((h + noise)[:, None], real[:, None], kv_cache)[:, 0]
    tail_mask = torch.ones(tail.shape[:2], dtype=torch.bool, device=DEVICE)
    h_few = llama(tail[:, :3], tail_mask[:, :3], kv_cache, last=1)
    h_tail = llama(tail, tail_mask, kv_cache)
    if torch.is_grad_enabled() and isinstance(kv_cache, cache.StepCache):
        with pytest.raises(RuntimeError, match="must be the last"):
            llama(tail, tail_mask, kv_cache)
    return h, h_few, h_tail


def test_the_cache_agrees_with_the_models_own_and_runs_backward_twice(monkeypatch):
    llama = tiny_llama()
    prompt = normal(2, 7, 24)
    tail = normal(4, 9, 24)
    padding = torch.tensor([[3], [0]], device=DEVICE)
    prompt_mask = torch.arange(7, device=DEVICE) >= padding
    noises = [normal(4, 24) for _ in range(2)]
    reals = [torch.tensor(real, device=DEVICE) for real in ([True] * 4, [True, True, False, True])]

    def loss_and_gradients(choice):
        """Return [loss, *gradients] twice, from two backward passes through one graph."""
        monkeypatch.setenv("MINATP_KERNELS", choice)
        cache_class = KVCache if choice == "torch" else cache.StepCache
        assert isinstance(llama.cache(1, 1), cache_class)

        leaves = [x.clone().requires_grad_() for x in (prompt, tail, noises[0])]
        steps = [(leaves[2], reals[0]), (noises[1], reals[1])]
        h, h_few, h_tail = chain_with_a_long_tail(llama, leaves[0], prompt_mask, steps, leaves[1])

        # Random weights. Row 2 of the chain has skipped the second step.
        torch.manual_seed(3)
        tail_loss = (normal(*h_tail.shape) * h_tail).sum()
        chain_loss = (normal(4, 24) * h)[[0, 1, 3]].sum()
        few_loss = (normal(*h_few.shape) * h_few).sum()
        loss = tail_loss + chain_loss + few_loss

        parameters = [*leaves, *llama.parameters()]
        gradients = [
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            for _ in range(2)
        ]
        return [[loss, *g] for g in gradients]

    expected, _ = loss_and_gradients("torch")
    once, twice = loss_and_gradients("triton")
    for a, b, x in zip(once, twice, expected):
        assert (a is None) == (x is None)
        if a is not None:
            assert torch.equal(a, b)
            close(a, x, 5 * FP32)


# ---- choosing words ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "R, V, dtype, temperature",
    [
        (5, 7, torch.float32, 1.0),
        (3, 1024, torch.float32, 0.7),
        (65, 5001, torch.float32, 1.3),
        (33, 3000, torch.float16, 1.0),
    ],
)
def test_sampling_inverts_the_exact_cdf(R, V, dtype, temperature):
    logits = (3 * normal(R, V + 3)).to(dtype)[:, :V]  # rows that are not contiguous
    u = torch.rand(R, device=DEVICE)
    u[:2] = torch.tensor([0.0, 1 - 2**-24])  # both ends
    word, logp = with_triton(ops.sample, logits, u, temperature)

    # in float64, it is the same word unless u lies on a boundary
    exact_logp = (logits.double() / temperature).log_softmax(-1)
    cdf = exact_logp.exp().cumsum(-1)
    exact_word = (cdf < u.double()[:, None]).sum(1).clamp(max=V - 1)
    at_boundary = (cdf - u[:, None]).abs().amin(1) < 1e-5
    assert ((word == exact_word) | at_boundary).all()
    close(logp, exact_logp.gather(1, word[:, None])[:, 0], 2 * FP32)


@pytest.mark.parametrize("drawn", [True, False])
def test_words_may_be_impossible(drawn):
    """Single ones, and a whole block of the kernel's."""
    logits = normal(9, 3 * sampling.BLOCK + 5)
    logits[:, sampling.BLOCK : 2 * sampling.BLOCK] = -torch.inf
    logits[::2, :3] = -torch.inf
    u = torch.linspace(2**-25, 1 - 2**-24, 9, device=DEVICE) if drawn else None
    word, logp = with_triton(ops.sample, logits, u)
    expected_word, expected_logp = sampling.sample(logits.double(), u)
    assert torch.equal(word, expected_word)
    assert logp.isfinite().all()
    close(logp, expected_logp, 2 * FP32)


@pytest.mark.parametrize("V", [7, 1024, 3000])
def test_the_likeliest_word_is_the_first_of_the_likeliest(V):
    logits = normal(9, V).round()  # with many ties
    word, logp = with_triton(ops.sample, logits)
    assert torch.equal(word, logits.argmax(-1))
    close(logp, logits.double().log_softmax(-1).amax(-1), 2 * FP32)


# ---- rows and the output matrix ------------------------------------------------------------------


def ops_add_rms_norm(x, branch, weight):
    return with_triton(ops.add_rms_norm, x, branch, weight, 1e-5)


def ops_rms_norm(x, weight):
    return with_triton(ops.add_rms_norm, x, None, weight, 1e-5)[1]


def reference_add_rms_norm(x, branch, weight):
    return rows.add_rms_norm(x, branch, weight, 1e-5)


def reference_rms_norm(x, weight):
    return rows.add_rms_norm(x, None, weight, 1e-5)[1]


def ops_add_rms_norm_in_shares(x, branch, weight):
    """Twice, whose shares of the weight's gradient add up; more programs than some have rows."""
    shared = weight.expand(3, -1)
    s, y = with_triton(ops.add_rms_norm, x, branch, shared, 1e-5)
    _, y_2 = with_triton(ops.add_rms_norm, 2 * x, branch, shared, 1e-5)
    return s, y + y_2


def reference_add_rms_norm_twice(x, branch, weight):
    s, y = rows.add_rms_norm(x, branch, weight, 1e-5)
    _, y_2 = rows.add_rms_norm(2 * x, branch, weight, 1e-5)
    return s, y + y_2


def ops_swiglu(gate, up):
    return with_triton(ops.swiglu, gate, up)


def ops_swiglu_of_large_gates(gate, up):
    return with_triton(ops.swiglu, 20 * gate, up)


def reference_swiglu_of_large_gates(gate, up):
    return rows.swiglu(20 * gate, up)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 5), (3, 7), (2, 3, 64), (67, 33), (5, 1031), (2, 8, 31)]
)
def test_rows(shape):
    *batch, D = shape
    x = normal(*shape)
    branch = normal(*batch, 2 * D)[..., ::2]  # elements that are not contiguous
    weight = normal(D)
    gate, up = normal(*batch, 2 * D).chunk(2, -1)  # rows that are not contiguous

    compare(ops_add_rms_norm, reference_add_rms_norm, [x, branch, weight])
    compare(ops_add_rms_norm_in_shares, reference_add_rms_norm_twice, [x, branch, weight])
    compare(ops_rms_norm, reference_rms_norm, [x, weight])
    compare(ops_swiglu_of_large_gates, reference_swiglu_of_large_gates, [gate, up])

    half_inputs = [x.half(), branch.half(), weight.half()]
    compare(ops_add_rms_norm, reference_add_rms_norm, half_inputs, FP16)
    compare(ops_add_rms_norm, reference_add_rms_norm, [x, branch.half(), weight], FP16)
    compare(ops_swiglu, rows.swiglu, [gate.half(), up.half()], FP16)


@pytest.mark.parametrize(
    "B, n_head, T, head_dim",
    [
        (1, 1, 1, 2),
        (1, 3, 5, 6),
        (2, 4, 7, 8),
        (3, 2, 1, 64),
        (2, 5, 11, 10),
        (1, 32, 2, 64),
        (4, 1, 3, 22),
    ],
)
def test_rope(B, n_head, T, head_dim):
    angle = 100 * torch.rand(B, 1, T, head_dim // 2, device=DEVICE)
    cos = angle.cos()
    sin = angle.sin()
    x = normal(B, T, n_head, head_dim).transpose(1, 2)

    def kernel(x):
        return with_triton(ops.rotate, x, cos, sin)

    def reference(x):
        return rows.rotate(x, cos.double(), sin.double())

    compare(kernel, reference, [x])
    compare(kernel, reference, [x.half()], FP16)


@pytest.mark.parametrize(
    "R, D, V, temperature",
    [
        (1, 1, 2, 1.0),
        (1, 16, 7, 0.5),
        (5, 33, 64, 1.0),
        (37, 40, 101, 0.7),
        (3, 7, 1031, 1.0),
        (2, 96, 65, 2.0),
        (19, 5, 3, 1.0),
        (17, 16, 515, 1.3),
    ],
)
def test_linear_cross_entropy(R, D, V, temperature, monkeypatch):
    # Several chunks and shares of the vocabulary, small as this is
    monkeypatch.setattr(cross_entropy, "DL_ELEMENTS", 1024)
    monkeypatch.setattr(cross_entropy, "SHARES", 2)
    h = normal(R, 2 * D)[:, ::2]
    W = normal(V, D) / D**0.5
    target = torch.randint(0, V, (R,), device=DEVICE)
    if R > 1:
        target[0] = V - 1
        target[-1] = 0
        target[1] = cross_entropy.IGNORE

    def kernel(h, W):
        return with_triton(ops.linear_nll, h, W, target, temperature)

    def reference(h, W):
        return cross_entropy.linear_nll(h, W, target, temperature)

    compare(kernel, reference, [h, W])
    compare(kernel, reference, [h.half(), W.half()], FP16)
    assert R == 1 or kernel(h, W)[1] == 0


def test_linear_cross_entropy_of_strided_views():
    target = torch.randint(0, 40, (6, 3), device=DEVICE)[:, 1]

    def kernel(h, W):
        return with_triton(ops.linear_nll, h, W.T, target)

    def reference(h, W):
        return cross_entropy.linear_nll(h, W.T, target)

    compare(kernel, reference, [normal(6, 8), normal(8, 40)])


@torch.no_grad()
def test_logits_of_an_odd_vocabulary_are_the_product():
    """In float32: words are drawn from what scores them, which is not rounded either."""
    for dtype in (torch.float32, torch.float16):
        h, W = normal(5, 16).to(dtype), normal(33, 16).to(dtype)
        got = with_triton(ops.logits, h, W)
        assert got.shape == (5, 33) and got.dtype == torch.float32
        assert got.stride(0) % 16 == 0 or dtype == torch.float32  # several at a time
        close(got, h.double() @ W.double().T, FP32)

    # Nor does autocast round them: these are of the float16 tensors
    with torch.autocast(DEVICE, torch.float16):
        assert torch.equal(with_triton(ops.logits, h, W), got)


def test_logits_and_losses_follow_the_output_matrix():
    """After a write in place, and after a step of an optimizer whose kernel writes."""
    h = normal(5, 16).half()
    W = torch.nn.Parameter(normal(33, 16))
    target = torch.arange(5, device=DEVICE)
    optimizer = torch.optim.AdamW([W], lr=0.1, fused=True)

    def check():
        exact = h.double() @ W.detach().double().T
        with torch.no_grad():
            close(with_triton(ops.logits, h, W), exact, FP16)
        nll = with_triton(ops.linear_nll, h, W, target)
        close(nll, -exact.log_softmax(1)[target, target], FP16)
        return nll

    with torch.autocast(DEVICE, torch.float16):
        check()
        with torch.no_grad():
            W.mul_(-2)
        check().sum().backward()
        optimizer.step()
        check()


def test_linear_cross_entropy_of_extreme_logits_and_of_no_label():
    W = torch.eye(33, device=DEVICE)  # logits are h itself
    target = torch.tensor([2, 3, -100], device=DEVICE)
    h = torch.zeros(3, 33, device=DEVICE)
    h[0, 2] = 1e4  # certain and right
    h[1, 4] = 1e4  # certain and wrong
    h[2] = torch.nan  # no label, so nobody reads it
    h.requires_grad_()

    nll = with_triton(ops.linear_nll, h, W, target)
    assert nll.tolist() == [0, 1e4, 0]
    (dh,) = torch.autograd.grad(nll.sum(), h)
    assert not dh[0].any()
    assert dh[1, 3] == -1 and dh[1, 4] == 1
    assert not dh[2].any()

    # No label in any row, and no row
    unlabelled = torch.full((4,), -100, device=DEVICE)
    assert not with_triton(ops.linear_nll, normal(4, 8), normal(9, 8), unlabelled).any()
    assert with_triton(ops.linear_nll, normal(0, 8), normal(9, 8), target[:0]).shape == (0,)


def test_chunks_of_the_vocabulary_are_whole_tiles_within_the_budget():
    V, tile = 128259, 128
    for R in (1, 192, 2880, 6400, 100_000):
        width = cross_entropy.chunk_width(R, V, tile)
        assert width % tile == 0
        assert R * width <= cross_entropy.DL_ELEMENTS
        # the next wider one would not fit, or all tokens are in one chunk
        assert R * (width + tile) > cross_entropy.DL_ELEMENTS or 0 <= width - V < tile
    assert cross_entropy.chunk_width(10**9, V, tile) == tile


def test_gradient_of_a_float32_weight_is_not_rounded_to_the_dtype_of_the_products():
    h = normal(16, 32).half()
    W = normal(65, 32).requires_grad_()
    target = torch.randint(0, 65, (16,), device=DEVICE)

    nll = cross_entropy.fused_linear_nll(h, W, target)
    (dW,) = torch.autograd.grad(nll.sum(), W)
    assert dW.dtype == torch.float32
    assert not torch.equal(dW, dW.half().float())

    exact = W.detach().half().double().requires_grad_()
    nll = cross_entropy.linear_nll(h.double(), exact, target)
    close(dW, *torch.autograd.grad(nll.sum(), exact), FP16, "dW")


# ---- the hand-derived gradients ------------------------------------------------------------------


class ByHand(torch.autograd.Function):
    """forward(*inputs), whose gradient is backward(*upstream, *inputs)."""

    @staticmethod
    def forward(ctx, forward, backward, *inputs):
        ctx.derived_by_hand = backward
        ctx.save_for_backward(*inputs)
        return forward(*inputs)

    @staticmethod
    def backward(ctx, *upstream):
        return None, None, *ctx.derived_by_hand(*upstream, *ctx.saved_tensors)


def check_gradient(forward, backward, *inputs):
    """Assert by finite differences that `backward` is the gradient of `forward`, in float64."""

    def function(*inputs):
        return ByHand.apply(forward, backward, *inputs)

    assert torch.autograd.gradcheck(function, [x.detach().requires_grad_() for x in inputs])


def double_normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def test_gradients_derived_by_hand():
    check_vae_gradients()
    check_row_gradients()
    check_cross_entropy_gradient()


def check_vae_gradients():
    eps = double_normal(3, 5)
    mu, logvar, z = (double_normal(3, 5) for _ in range(3))

    def sample(mu, logvar):
        return vae.reparameterise(mu, logvar, eps)

    def sample_backward(dz, dkl, dlogp, mu, logvar):
        return vae.reparameterise_backward(dz, dkl, dlogp, mu, logvar, eps)

    def kl_and_score(z, mu, logvar):
        return vae.kl_normal(mu, logvar), vae.gaussian_log_prob(z, mu, logvar)

    check_gradient(sample, sample_backward, mu, logvar)
    check_gradient(kl_and_score, vae.score_backward, z, mu, logvar)


def check_row_gradients():
    def norm(x, branch, weight):
        return rows.add_rms_norm(x, branch, weight, 1e-5)

    def norm_backward(g, dy, x, branch, weight):
        ds, dw = rows.add_rms_norm_backward(g, dy, x + branch, weight, 1e-5)
        return ds, ds, dw

    check_gradient(
        norm, norm_backward, double_normal(2, 3, 4), double_normal(2, 3, 4), double_normal(4)
    )
    check_gradient(rows.swiglu, rows.swiglu_backward, double_normal(3, 4), double_normal(3, 4))

    angle = 9 * double_normal(2, 1, 3, 2)

    def rotate(x):
        return rows.rotate(x, angle.cos(), angle.sin())

    def rotate_backward(dy, x):
        return (rows.rotate(dy, angle.cos(), -angle.sin()),)

    check_gradient(rotate, rotate_backward, double_normal(2, 4, 3, 4))


def check_cross_entropy_gradient():
    target = torch.tensor([0, -100, 6])

    def nll(h, W):
        return cross_entropy.linear_nll(h, W, target, 0.7)

    def nll_backward(g, h, W):
        return cross_entropy.linear_nll_backward(g, h, W, target, 0.7)

    check_gradient(nll, nll_backward, double_normal(3, 4), double_normal(7, 4))


def test_gradient_of_attention_derived_by_hand():
    shape = StepShape([2, 1], 4, 2, 4, P=3, C=4, T=2, dtype=torch.float64)
    layout = random_layout(shape)
    layout = attention.Layout(*(x.cpu() if torch.is_tensor(x) else x for x in layout))
    q, k, v, cos, sin, *columns = (x.cpu() for x in random_step(shape))

    def step(q, k, v, *columns):
        return attention.step_reference(q, k, v, cos, sin, *columns, layout)

    def step_backward(do, q, k, v, *columns):
        return attention.step_backward_reference(do, q, k, v, cos, sin, *columns, layout)

    check_gradient(step, step_backward, q, k, v, *columns)


# ---- the choice, the model, the compiler ---------------------------------------------------------


def test_the_choice(monkeypatch):
    cpu = torch.device("cpu")
    cuda = torch.device("cuda")

    # By default: kernels on a GPU, in any dtype but float64
    monkeypatch.delenv("MINATP_KERNELS", raising=False)
    assert not ops.use_triton(cpu)
    assert ops.use_triton(cuda)
    assert not ops.use_triton(cuda, torch.float64)

    monkeypatch.setenv("MINATP_KERNELS", "torch")
    assert not ops.use_triton(cuda)

    # A choice that is unavailable is an error.
    monkeypatch.setenv("MINATP_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.use_triton(cpu)
    with pytest.raises(ops.Unavailable, match="no kernel for torch.float64"):
        ops.use_triton(cpu, torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = "^environment: MINATP_KERNELS=triton: no kernel runs on cpu"
    with pytest.raises(UserError, match=message):
        pick_device("cpu")

    monkeypatch.setenv("MINATP_KERNELS", "cuda")
    with pytest.raises(ops.Unavailable, match="must be one of auto, torch, triton, not 'cuda'"):
        ops.use_triton(cpu)


TINY_MODEL = """
    --n-layer 1 --n-head 4 --n-kv-head 1 --n-embd 16 --n-inner 24 --vocab-size 160
    --decoder-layers 1 --K 1 --c 1 --optimizer adamw --lr 1e-3 --epochs 1
"""


def sums_in_words():
    """Return ten problems: questions of unequal length, and one or two steps."""
    problems = []
    for a in range(5):
        for b in (2, 3):
            question = f"{a} and {b}" if a % 2 else f"{a}+{b}"
            steps = [f"<<{a}+{b}={a + b}>>"] * (b - 1)
            problems.append(Problem(question, steps, str(a + b)))
    return problems


def train_in_the_last_stage(n_steps=12):
    """Return the losses of a tiny model in the curriculum's last stage: all losses, all kernels.

    With AdamW, since on a GPU Muon multiplies in bfloat16, which makes two runs drift apart.
    """
    cfg = options.parse(TINY_MODEL.split(), "")
    torch.manual_seed(0)
    problems = sums_in_words()
    model, tokenizer = build(cfg, problems)
    model.stage = cfg.K + 1
    model.to(DEVICE)
    encoded = encode_problems(cfg, problems, tokenizer, model)

    run = Run(cfg, None, torch.device(DEVICE), model, tokenizer)
    run.autocast = torch.autocast(DEVICE, enabled=False)
    run.optimizer = GuardedOptimizer(build_optimizer(cfg, model), model, cfg.clip)
    run.optimizer.lr = cfg.lr

    losses = []
    for step in range(n_steps):
        pair = [encoded[step % 10], encoded[(step + 3) % 10]]
        sums, counts = train.sft_gradients(run, pair, model.stage, step)
        loss = total_loss(sums, counts, cfg.loss_weights)
        run.optimizer.step(loss, pair)
        losses.append(loss)
    return torch.stack(losses)


def test_a_model_trains_the_same_with_the_kernels(monkeypatch):
    monkeypatch.setenv("MINATP_KERNELS", "torch")
    expected = train_in_the_last_stage()
    monkeypatch.setenv("MINATP_KERNELS", "triton")
    actual = train_in_the_last_stage()

    assert expected[-5:].mean() < expected[:5].mean()
    assert ((actual - expected) / expected).abs().max() <= 2e-5


@pytest.mark.parametrize("clip", [0.5, 1e6])
def test_the_optimizer_clips_as_it_reads_the_gradients(clip, monkeypatch):
    """To the same steps as clipping first; and the largest norm may also be out of reach."""
    cfg = options.parse([*TINY_MODEL.split(), "--optimizer", "muon"], "")
    trained = []
    for kernels in ("torch", "triton"):
        monkeypatch.setenv("MINATP_KERNELS", kernels)
        model = model_in_autocast_test()
        optimizer = GuardedOptimizer(build_optimizer(cfg, model), model, clip)
        optimizer.lr = 0.01
        for size in (1.0, 30.0):
            for seed, p in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(seed)
                p.grad = size * torch.randn(p.shape, generator=generator).to(DEVICE)
            norm = optimizer.step(torch.zeros((), device=DEVICE), [])
            assert norm > 30
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))

    assert (optimizer.optimizer.grad_scale > 1) == (clip == 0.5)
    close(trained[1], trained[0], 1e-5 if DEVICE == "cpu" else 1e-3)


def model_in_autocast_test():
    torch.manual_seed(0)
    cfg = LlamaConfig(
        vocab_size=40,
        n_layer=1,
        n_head=2,
        n_kv_head=1,
        n_embd=16,
        n_inner=24,
        head_dim=8,
        bos=0,
        eos=(1,),
    )
    model = ATP(cfg, c=1, K=2)
    model.policy.init_weights()
    model.decoder.init_weights()
    model.to(DEVICE)
    model.end = 3
    return model


def encoded_problem(n, n_steps):
    """Return a problem of made-up tokens, whose prompt has 2 + n of them."""
    return Encoded(
        prompt=[5 + n] * (2 + n),
        lines=[[7, 8]] * n_steps,
        step_texts=[[7, 8, 1]] * n_steps,
        rest_text=[],
        answer=[6, 5, 9, 1],
        n_before_answer=1,
        source="",
    )


def everything_under_autocast():
    """Return a small model's losses, log-probabilities and some gradients, as on a GPU.

    Products are in half precision, weights in float32.
    """
    model = model_in_autocast_test()
    problems = [encoded_problem(3, 2), encoded_problem(1, 1)]
    batch = collate(problems, model.K, model).to(DEVICE)
    prompt, prompt_mask = left_pad([[5, 6], [7] * 5], model.end, DEVICE)
    noise = Noise.draw(model, 4, 8, 1).to(DEVICE)

    values = []
    with torch.autocast(DEVICE, torch.float16):
        # Lengths, words and thoughts are set by hand: rounding, and with it the choice of kernels,
        # would change them.
        chains = rollout(model, prompt, prompt_mask, 8, noise, 2)
        chains.n_token = torch.tensor([5, 1, 8, 2], device=DEVICE)
        chains.token = torch.arange(32, device=DEVICE).view(4, 8) % 9 + 2
        chains.n_latent = torch.zeros_like(chains.n_latent) + torch.tensor(
            [2, 1, 0, 2], device=DEVICE
        )
        chains.stopped = torch.zeros_like(chains.stopped)
        chains.z = vae.draw_noise(noise.eps_keys, 16)

        # Scored at once, from z, and step by step, from its noise
        for eps in (None, noise.eps_keys):
            scores = log_probs(model, prompt, prompt_mask, chains, 2, eps)
            values += [scores.logp_z, scores.logp_stop, scores.logp_token]
        values += sft_losses(model, batch, noise.eps_keys[:2]).values()

    weights = [
        model.policy.model.layers[0].self_attn.k_proj.weight,
        model.latent_head.fc[0].weight,
        model.policy.head,
        model.policy.model.norm.weight,
    ]
    values += torch.autograd.grad(sum(x.sum() for x in values), weights)
    assert all(x.dtype == torch.float32 for x in values)
    assert len(read_thoughts(model.decoder, chains.z[:, :1], 1, 2)) == 4
    return values


def two_layers(**switches):
    """Return an ATP without the VAE and φ, with a policy of two layers."""
    torch.manual_seed(0)
    llama = tiny_llama()
    model = ATP(llama.cfg, c=1, K=2, vae=False, stop=False, decode=False, **switches)
    model.policy.load_state_dict(llama.state_dict())
    model.filler, model.end = 2, 3
    return model.to(DEVICE)


@pytest.mark.parametrize("n_steps", [1, 3])
def test_student_and_teacher_share_a_prompt_with_the_kernels(n_steps, monkeypatch):
    """The teacher's text is short enough for the kernel of a step, or a long pass of its own."""
    model = two_layers(project=True)
    problems = [encoded_problem(3, n_steps), encoded_problem(1, 0), encoded_problem(0, 0)]
    problems[2].answer_only = True
    batch = collate(problems, model.K + 1, model, distills=True).to(DEVICE)
    assert (batch.words.ids.shape[1] > cache.MAX_STEP_COLUMNS) == (n_steps == 3)
    parameters = list(model.parameters())

    results = {}
    for choice in ("torch", "triton"):
        monkeypatch.setenv("MINATP_KERNELS", choice)
        monkeypatch.setenv("MINATP_GRAPHS", "0")
        losses = sft_losses(model, batch)
        assert losses.keys() == {"enc", "teacher", "distill"}
        loss = total_loss(losses, batch.counts, {"kl": 0, "distill": 2.0})
        results[choice] = [*losses.values(), *torch.autograd.grad(loss, parameters)]
    for a, b in zip(results["triton"], results["torch"]):
        close(a, b, 10 * FP32)


@pytest.mark.parametrize("fillers", [2, 4])
def test_a_rollout_reads_fillers_with_the_kernels(fillers, monkeypatch):
    """They are few enough for the kernel of a step, or not, with <|end-latent|>."""
    model = two_layers(fillers=fillers)
    assert (fillers * model.K + 1 > cache.MAX_STEP_COLUMNS) == (fillers == 4)
    prompt, prompt_mask = left_pad([[5, 6], [7] * 5], model.end, DEVICE)
    chains = {}
    for choice in ("torch", "triton"):
        monkeypatch.setenv("MINATP_KERNELS", choice)
        chains[choice] = rollout(model, prompt, prompt_mask, 3)
    assert torch.equal(chains["triton"].token, chains["torch"].token)
    close(chains["triton"].logp_token, chains["torch"].logp_token, 10 * FP32)


def test_kernels_under_autocast(monkeypatch):
    monkeypatch.setenv("MINATP_KERNELS", "torch")
    expected = everything_under_autocast()
    monkeypatch.setenv("MINATP_KERNELS", "triton")
    for a, b in zip(everything_under_autocast(), expected):
        close(a, b, 2e-2)


def test_z_kl_and_log_probability_are_one_launch(monkeypatch):
    modes = []
    run_forward = vae.run_forward

    def count_launches(mu, logvar, source, mode):
        modes.append(mode)
        return run_forward(mu, logvar, source, mode)

    monkeypatch.setattr(vae, "run_forward", count_launches)
    monkeypatch.setenv("MINATP_KERNELS", "triton")
    monkeypatch.setenv("MINATP_GRAPHS", "0")
    everything_under_autocast()

    # Rollout: one or two thoughts. Scores: all thoughts at once, then two walked. SFT: two.
    n_rollout = modes.index("score")
    assert 1 <= n_rollout <= 2, modes
    assert modes[n_rollout + 1 :] == ["draw"] * 4, modes


def test_the_benchmark_verifies_before_it_times():
    device = torch.device(DEVICE)
    for case in bench.small_cases(device, torch.float16):
        assert bench.verify(case) <= bench.LIMIT, case.name

    def one_percent_off(mu, logvar):
        return [1.01 * y for y in wrong.reference(mu, logvar)]

    wrong = bench.small_cases(device, torch.float16)[0]
    wrong.kernel = one_percent_off
    assert bench.verify(wrong) > bench.LIMIT


@pytest.mark.parametrize("i", [0, 1, 2])  # z, KL, log p
def test_the_benchmark_notices_nan_in_any_result(i):
    def nan_in_one(mu, logvar):
        outputs = list(case.reference(mu, logvar))
        outputs[i] = outputs[i] * torch.nan
        return outputs

    case = bench.small_cases(torch.device(DEVICE), torch.float16)[0]
    case.kernel = nan_in_one
    ratio = bench.verify(case)
    assert math.isnan(ratio)
    assert not ratio <= bench.LIMIT


def test_the_benchmark_notices_nan_in_one_gradient():
    def nan_in_the_gradient_of_logvar(mu, logvar):
        logvar.register_hook(lambda grad: grad * torch.nan)
        return case.reference(mu, logvar)  # the results are right

    case = bench.small_cases(torch.device(DEVICE), torch.float16)[0]
    case.kernel = nan_in_the_gradient_of_logvar
    assert math.isnan(bench.verify(case))


def test_attention_is_compared_with_a_fused_kernel_of_pytorch(monkeypatch):
    """With enable_gqa and a mask PyTorch has none on a GPU, and would be a weak peer."""
    asked = []
    real_sdpa = F.scaled_dot_product_attention

    def sdpa(q, k, v, **options):
        asked.append((q.shape[1] == k.shape[1], options.get("enable_gqa", False)))
        return real_sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)
    case = bench.small_cases(torch.device(DEVICE), torch.float32)[1]
    inputs = case.inputs()
    exact = case.reference(*[x.double() for x in inputs])
    close(case.peers["SDPA"](*inputs), exact, 4 * FP32)
    assert asked == [(True, False)]


def test_the_timed_inputs_exceed_the_l2_cache():
    l2_cache = 60 * 2**20  # of an H200
    for case in bench.small_cases(torch.device("cpu"), torch.bfloat16):
        size = sum(x.nbytes for x in case.inputs())
        assert bench.copies_beyond(l2_cache, size) * size > 2 * l2_cache
    assert bench.copies_beyond(l2_cache, 10**9) == 1


def test_a_lease_draws_words_with_the_kernel_and_notices_wrong_ones(monkeypatch):
    on_cpu = SimpleNamespace(on_gpu=False, device=torch.device(DEVICE))
    assert lease.wrong_words(on_cpu) == 0
    real_sample = sampling.fused_sample

    def next_word(logits, u):
        word, logp = real_sample(logits, u)
        return (word + 1) % logits.shape[1], logp

    monkeypatch.setattr(sampling, "fused_sample", next_word)
    assert lease.wrong_words(on_cpu) == 4


def test_a_lease_notices_nan_in_any_gradient():
    differences = [(0.5, "a"), (math.nan, "b"), (0.25, "c")]
    for i in range(3):
        assert lease.largest_difference(differences[i:] + differences[:i])[1] == "b"
    assert lease.largest_difference([(0.5, "a"), (0.25, "c")]) == (0.5, "a")

    for cosines in ([math.nan, 0.5], [0.5, math.nan], [0.25, math.nan, 0.5]):
        assert math.isnan(lease.least(cosines))
    assert lease.least([0.5, 0.25]) == 0.25


def test_every_kernel_compiles_for_sm_90_without_spills(compile_report):
    table, errors = compile_report.communicate()
    assert compile_report.returncode == 0, errors

    kernels = {}
    for line in table.splitlines():
        if line.startswith("| "):
            name, *values = line.strip("| ").split(" | ")
            kernels.setdefault(name.split(" ")[0], []).append(values)

    # every kernel is among what minatp launches, in one variant at least
    defined = set()
    for module in (attention, cross_entropy, rows, sampling, vae):
        defined |= {name for name in vars(module) if name.endswith("_kernel")}
    assert defined <= kernels.keys()

    # products run on tensor cores
    for name, variants in kernels.items():
        matrix_instructions = {values[-1] for values in variants}
        if name.startswith("linear_nll"):
            assert matrix_instructions == {"HGMMA"}
        if name.startswith(("own", "prefix")):
            assert matrix_instructions == {"HMMA"}

    # a store of dl in 2-byte pieces, which a mask by the odd V would force, takes 189 registers
    assert all(int(values[1]) <= 128 for values in kernels["linear_nll_backward_kernel"])
