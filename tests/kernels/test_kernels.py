"""Every kernel in Triton's interpreter against float64, the hand-derived gradients, ε, the compiler, and a model trained with them.

TRITON_INTERPRET=0 runs the same tests compiled, on the GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]  # numpy's: exp of −∞, NaN that a mask drops

import train
from kernels import attention, bench, cache, cross_entropy, ops, rows, vae
from minatp import data, run
from minatp.data import Problem
from minatp.explain import read_thoughts
from minatp.latent import ATP
from minatp.llama import KVCache, Llama, LlamaConfig
from minatp.rollout import Noise, rollout, score, sft_losses

from floats import DEVICE, FP16, FP32, close, normal


@pytest.fixture(scope="module", autouse=True)
def compiled():
    """The compiler at work beside the other tests."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.Popen(
        [sys.executable, "-m", "kernels.compile_report", "--sm", "90"],
        env=env,
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield child
    child.kill()
    child.communicate()


def compare(kernel, reference, inputs, bound=FP32):
    """Values and gradients of both, for upstream gradients that differ from element to element."""
    mine = [x.detach().requires_grad_() for x in inputs]
    theirs = [x.detach().double().requires_grad_() for x in inputs]
    got, want = ([y] if torch.is_tensor(y) else y for y in (kernel(*mine), reference(*theirs)))
    up = [torch.randn_like(y) for y in got]
    got_d, want_d = (
        torch.autograd.grad(got, mine, up),
        torch.autograd.grad(want, theirs, [g.double() for g in up]),
    )
    for name, a, b in [(f"result {i}", a, b) for i, (a, b) in enumerate(zip(got, want))] + [
        (f"gradient {i}", a, b) for i, (a, b) in enumerate(zip(got_d, want_d))
    ]:
        close(a, b, bound, name)


# ---- the VAE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 5), (2, 3, 13), (5, 64), (7, 31), (2, 129)])
def test_vae(shape):
    both = normal(*shape[:-1], 2 * shape[-1])
    mu, logvar = both.chunk(2, -1)  # rows that do not lie side by side
    eps, key = (
        normal(*shape),
        ops.noise(-12345678901234, *shape[:-1]).to(DEVICE)
        * torch.tensor([1, 2**33 + 1], device=DEVICE),
    )
    drawn = vae.drawn(key, shape[-1], torch.float64)
    compare(
        lambda m, v: vae.apply(m, v, key),
        lambda m, v: vae.reparameterise(m, v, drawn),
        [mu, logvar],
    )
    compare(
        lambda m, v: vae.apply(m, v, eps),
        lambda m, v: vae.reparameterise(m, v, eps.double()),
        [mu, logvar],
    )
    compare(vae.apply, vae.reparameterise, [mu, logvar])
    compare(
        lambda m, v, z: vae.apply(m, v, z=z),
        lambda m, v, z: vae.reparameterise(m, v, z=z),
        [mu, logvar, mu + logvar.exp() * eps],
    )


def test_vae_in_fp16_and_at_extremes():
    half = torch.float16
    mu, logvar, eps = (
        normal(3, 37, dtype=half),
        normal(3, 37, dtype=half),
        normal(3, 37, dtype=half),
    )
    compare(
        lambda m, v: vae.apply(m, v, eps),
        lambda m, v: vae.reparameterise(m, v, eps.double()),
        [mu, logvar],
        FP16,
    )
    mu, logvar = 1e3 * normal(2, 37), torch.linspace(-30, 30, 74, device=DEVICE).view(2, 37)
    compare(
        lambda m, v: vae.apply(m, v, eps[:2]),
        lambda m, v: vae.reparameterise(m, v, eps[:2].double()),
        [mu, logvar],
    )


def draw(seed, offset, D, block=vae.BLOCK):
    zero = torch.zeros(len(offset), D, device=DEVICE)
    return vae.run_forward(zero, zero, key(seed, offset), vae.DRAW, block)[0]


def key(seed, offset):
    return torch.stack((torch.full_like(offset, seed), offset), 1)


def test_eps_is_standard_normal_and_independent():
    e = draw(7, torch.arange(48, device=DEVICE), 1024)
    n = e.numel() ** 0.5
    assert (
        abs(e.mean()) < 4 / n
        and abs(e.var() - 1) < 4 * 2**0.5 / n
        and abs(e.pow(4).mean() - 3) < 4 * 96**0.5 / n
    )
    assert abs(e.pow(3).mean()) < 4 * 15**0.5 / n and 3.5 < e.abs().max() < 6
    cosine = torch.nn.functional.normalize(e, dim=1)
    between = (cosine @ cosine.T)[~torch.eye(48, dtype=torch.bool, device=DEVICE)]
    assert between.abs().max() < 5 / 1024**0.5  # rows, which are steps' and problems' offsets
    assert (
        abs((e[:, 1:] * e[:, :-1]).mean()) < 4 / n
        and abs((e[:, 256:] * e[:, :-256]).mean()) < 5 / n
    )  # columns, lanes


def test_eps_depends_on_seed_offset_and_column_alone():
    offset = torch.tensor([3, 2**40 + 5, 3, 0], device=DEVICE)
    e = draw(11, offset, 203)
    assert torch.equal(e[0], e[2]) and not (e[0] == e[1]).any()
    assert not (draw(12, offset, 203) == e).any()
    assert all(torch.equal(draw(11, offset, 203, block), e) for block in (16, 64))
    assert torch.equal(draw(11, offset[1:2], 203), e[1:2])
    # backward draws it again: with μ = logσ² = 0 and dz = 1, dlogσ² is ε/2
    zero, one = torch.zeros(4, 203, device=DEVICE), torch.ones(4, 203, device=DEVICE)
    none = torch.zeros(4, device=DEVICE)
    back = [
        vae.run_backward(one, none, none, zero, zero, key(11, offset), vae.DRAW, block)[1]
        for block in (16, 64)
    ]
    assert torch.equal(2 * back[0], e) and torch.equal(back[0], back[1])


# ---- attention ----------------------------------------------------------------------------------------------------------

SHAPES = [  # prompts' rows, h, h_kv, d, columns of the prefix, of a row, new positions, dtype, size of q
    ([1], 1, 1, 8, 5, 3, 1, torch.float32, 1),  # one row whose prefix is all padding
    ([2, 1], 4, 1, 6, 17, 5, 1, torch.float32, 1),  # four query heads a key head
    ([1, 3], 2, 2, 16, 33, 4, 3, torch.float32, 1),
    ([5], 4, 1, 8, 20, 3, 1, torch.float32, 1),  # a group in two turns
    ([1, 1, 1], 6, 2, 10, 7, 11, 2, torch.float32, 1),
    ([2, 1], 4, 1, 6, 9, 37, 7, torch.float32, 1),  # a row's queries in two turns
    ([2], 8, 2, 4, 40, 2, 1, torch.float32, 100),  # scores in the hundreds
    ([2, 2], 4, 1, 64, 19, 35, 1, torch.float32, 1),
    ([2, 3], 4, 1, 16, 19, 5, 1, torch.float16, 1),
]


def step_inputs(sizes, h, h_kv, d, P, C, T, dtype=torch.float64, size=1.0):
    """(q … own_v), Where and the own columns that are live; half of the new positions are not real, rows are in any order."""
    B, N = sum(sizes), len(sizes)
    owner = torch.repeat_interleave(torch.arange(N), torch.tensor(sizes))[torch.randperm(B)]
    members = owner.argsort(stable=True)
    first = torch.searchsorted(owner[members].contiguous(), torch.arange(N + 1))
    start, n_own, valid = (
        torch.randint(0, P, (N,)),
        torch.randint(0, C - T + 1, (B,)),
        torch.rand(B, T) > 0.5,
    )
    start[0], n_own[0] = P, 0  # a prefix that is all padding, a row with nothing of its own
    valid[-1] = True
    slot = torch.where(valid, n_own[:, None] + valid.long().cumsum(1) - 1, -1)
    narrow = lambda x: x.int().to(DEVICE)
    w = attention.Where(
        *map(narrow, (start, owner, members, first)), max(sizes), narrow(n_own), narrow(slot)
    )
    x = [
        normal(B, T, n, d, dtype=dtype).transpose(1, 2) for n in (h, h_kv, h_kv)
    ]  # as the projections leave them
    angle = 30 * torch.rand(
        B,
        1,
        T,
        d // 2,
        device=DEVICE,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    stored = [
        normal(n, h_kv, columns, d, dtype=dtype) for n, columns in ((N, P), (N, P), (B, C), (B, C))
    ]
    return (
        [size * x[0], *x[1:], angle.cos(), angle.sin(), *stored],
        w,
        (torch.arange(C) < n_own[:, None])[:, None, :, None].to(DEVICE),
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape):
    sizes, h, h_kv, d, P, C, T, dtype, size = shape
    inputs, w, live = step_inputs(*shape)
    q, k, v, cos, sin, *stored = inputs
    exact = [x.double().requires_grad_(i not in (3, 4)) for i, x in enumerate(inputs)]
    want = attention.step(*exact, w)
    do = normal(*want.transpose(1, 2).shape, dtype=dtype).transpose(1, 2)
    dq, dk, dv, *stored_d = torch.autograd.grad(want, exact[:3] + exact[5:], do.double())

    columns = torch.arange(P, device=DEVICE) >= w.start[:, None]
    prefix = [x.masked_fill(~columns[:, None, :, None], torch.nan) for x in stored[:2]]
    own = [x.masked_fill(~live, torch.nan) for x in stored[2:]]
    later = [normal(*own[0].shape) for _ in own]  # what later steps have added
    grad_prefix, grad_own = (
        [torch.zeros_like(x, dtype=torch.float32) for x in prefix],
        [x.clone() for x in later],
    )
    o, lse = attention.run_forward(q, k, v, cos, sin, prefix, own, w)
    got = attention.run_backward(
        do, o, lse, q, k, v, cos, sin, prefix, own, grad_prefix, grad_own, w
    )

    bound = (
        FP16 if dtype == torch.float16 else FP32 * size
    )  # a score's rounding error grows with the score
    close(o, want, bound, "o")
    real = (w.slot >= 0)[:, None, :, None]
    index = w.slot.clamp(min=0).long()[:, None, :, None].expand(-1, h_kv, -1, d)
    added = [x.gather(2, index) * real for x in later]
    close(got[0], dq, bound, "dq")
    close(got[1], dk + rows.rotate(added[0].double(), cos.double(), -sin.double()), bound, "dk")
    close(got[2], dv + added[1], bound, "dv")
    new = torch.zeros(len(live), C + 1, dtype=torch.bool, device=DEVICE).scatter_(
        1, torch.where(w.slot >= 0, w.slot, C).long(), True
    )
    new = new[:, None, :C, None]
    for name, g, want_g, before in zip(
        ("prefix k", "prefix v", "own k", "own v"), grad_prefix + grad_own, stored_d, [0, 0, *later]
    ):
        close(g, (want_g + before).masked_fill(new, 0) if "own" in name else want_g, bound, name)
    for x, appended in zip(own, (rows.rotate(k.double(), cos.double(), sin.double()), v)):
        close(x.gather(2, index).masked_fill(~real, 0), appended * real, bound, "append")


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


def two_rollouts(llama, x, valid, steps, tail, tail_valid):
    """A shared prompt, a chain whose steps feed on each other, a row that leaves, and a long tail."""
    c = llama.cache(2, 32)
    h = llama(x, valid, c, 1)[:, 0].repeat_interleave(2, 0)
    c.keep(torch.tensor([0, 0, 1, 1], device=DEVICE))
    for noise, alive in steps:
        h = llama((h + noise)[:, None], alive[:, None], c)[:, 0]
    c.keep(torch.tensor([0, 3, 2], device=DEVICE))
    y = llama(tail, tail_valid, c)
    return h, y, llama(tail[:, :1], tail_valid[:, :1], c)


def test_the_cache_agrees_with_the_models_own_and_runs_backward_twice(monkeypatch):
    llama, true = tiny_llama(), torch.ones(3, 9, dtype=torch.bool, device=DEVICE)
    x, end = normal(2, 7, 24), normal(3, 9, 24)
    valid = torch.arange(7, device=DEVICE) >= torch.tensor([[3], [0]], device=DEVICE)
    steps = [
        (normal(4, 24), torch.tensor(alive, device=DEVICE))
        for alive in ([True] * 4, [True, True, False, True])
    ]
    grads = {}
    for choice in ("torch", "triton"):
        monkeypatch.setenv("MINATP_KERNELS", choice)
        assert isinstance(llama.cache(1, 1), KVCache if choice == "torch" else cache.StepCache)
        leaves = [t.clone().requires_grad_() for t in (x, end, steps[0][0])]
        h, y, last = two_rollouts(
            llama, leaves[0], valid, [(leaves[2], steps[0][1]), steps[1]], leaves[1], true
        )
        torch.manual_seed(2)
        loss = (
            (normal(*y.shape) * y).sum()
            + (normal(4, 24) * h)[[0, 1, 3]].sum()
            + (normal(*last.shape) * last).sum()
        )
        wanted = [*leaves, *llama.parameters()]
        for _ in range(2):
            grads.setdefault(choice, []).append(
                [loss, *torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)]
            )
    for a, b, want in zip(*grads["triton"], grads["torch"][0]):
        assert (a is None) == (want is None)
        if a is not None:
            assert torch.equal(a, b)
            close(a, want, 5 * FP32)


# ---- rows and the output matrix -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 5), (3, 7), (2, 3, 64), (67, 33), (5, 1031), (2, 8, 31)]
)
def test_rows(shape):
    x, a, w = normal(*shape), normal(*shape[:-1], 2 * shape[-1])[..., ::2], normal(shape[-1])
    compare(
        lambda x, a, w: ops_triton(ops.add_rms_norm, x, a, w, 1e-5),
        lambda x, a, w: rows.add_rms_norm(x, a, w, 1e-5),
        [x, a, w],
    )
    compare(
        lambda x, w: ops_triton(ops.add_rms_norm, x, None, w, 1e-5)[1],
        lambda x, w: rows.add_rms_norm(x, None, w, 1e-5)[1],
        [x, w],
    )
    gate, up = normal(*shape[:-1], 2 * shape[-1]).chunk(2, -1)
    compare(
        lambda g, u: ops_triton(ops.swiglu, 20 * g, u),
        lambda g, u: rows.swiglu(20 * g, u),
        [gate, up],
    )
    half = [t.half() for t in (x, a, w)]
    compare(
        lambda x, a, w: ops_triton(ops.add_rms_norm, x, a, w, 1e-5),
        lambda x, a, w: rows.add_rms_norm(x, a, w, 1e-5),
        half,
        FP16,
    )
    compare(lambda g, u: ops_triton(ops.swiglu, g, u), rows.swiglu, [gate.half(), up.half()], FP16)


def ops_triton(op, *args):
    """op with the kernels, as MINATP_KERNELS=triton has it."""
    before = os.environ.get("MINATP_KERNELS")
    os.environ["MINATP_KERNELS"] = "triton"
    try:
        return op(*args)
    finally:
        os.environ.pop("MINATP_KERNELS") if before is None else os.environ.update(
            MINATP_KERNELS=before
        )


@pytest.mark.parametrize(
    "B, h, T, d",
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
def test_rope(B, h, T, d):
    angle = 100 * torch.rand(B, 1, T, d // 2, device=DEVICE)
    x = normal(B, T, h, d).transpose(1, 2)
    exact = lambda x: rows.rotate(x, angle.cos().double(), angle.sin().double())
    compare(lambda x: ops_triton(ops.rotate, x, angle.cos(), angle.sin()), exact, [x])
    compare(lambda x: ops_triton(ops.rotate, x, angle.cos(), angle.sin()), exact, [x.half()], FP16)


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
    ],
)
def test_linear_cross_entropy(R, D, V, temperature, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK", 16)
    monkeypatch.setattr(cross_entropy, "SHARES", 2)
    h, W, target = (
        normal(R, 2 * D)[:, ::2],
        normal(V, D) / D**0.5,
        torch.randint(0, V, (R,), device=DEVICE),
    )
    if R > 1:
        target[0], target[-1], target[1] = V - 1, 0, cross_entropy.IGNORE
    kernel = lambda h, W: ops_triton(ops.linear_nll, h, W, target, temperature)
    compare(kernel, lambda h, W: cross_entropy.linear_nll(h, W, target, temperature), [h, W])
    compare(
        kernel,
        lambda h, W: cross_entropy.linear_nll(h, W, target, temperature),
        [h.half(), W.half()],
        FP16,
    )
    assert R == 1 or kernel(h, W)[1] == 0


def test_linear_cross_entropy_of_extreme_logits_and_of_no_label():
    W, target = torch.eye(33, device=DEVICE), torch.tensor([2, 3, -100], device=DEVICE)
    h = torch.zeros(3, 33, device=DEVICE)
    h[0, 2], h[1, 4], h[2] = (
        1e4,
        1e4,
        torch.nan,
    )  # certain and right, certain and wrong, and what nobody reads
    h.requires_grad_()
    nll = ops_triton(ops.linear_nll, h, W, target)
    assert nll.tolist() == [0, 1e4, 0]
    (dh,) = torch.autograd.grad(nll.sum(), h)
    assert dh[1, 3] == -1 and dh[1, 4] == 1 and not dh[0].any() and not dh[2].any()
    none = ops_triton(
        ops.linear_nll, normal(4, 8), normal(9, 8), torch.full((4,), -100, device=DEVICE)
    )
    assert not none.any() and ops_triton(
        ops.linear_nll, normal(0, 8), normal(9, 8), target[:0]
    ).shape == (0,)


# ---- the hand-derived gradients -----------------------------------------------------------------------------------------


class ByHand(torch.autograd.Function):
    """forward(*xs) whose gradient is backward(*upstream, *xs), for gradcheck."""

    @staticmethod
    def forward(ctx, forward, backward, *xs):
        ctx.by_hand = backward
        ctx.save_for_backward(*xs)
        return forward(*xs)

    @staticmethod
    def backward(ctx, *g):
        return None, None, *ctx.by_hand(*g, *ctx.saved_tensors)


def check(forward, backward, *xs):
    assert torch.autograd.gradcheck(
        lambda *xs: ByHand.apply(forward, backward, *xs), [x.detach().requires_grad_() for x in xs]
    )


def test_gradients_derived_by_hand():
    r = lambda *s: torch.randn(s, dtype=torch.float64)
    eps, target = r(3, 5), torch.tensor([0, -100, 6])
    check(
        lambda m, v: vae.reparameterise(m, v, eps),
        lambda dz, dkl, dp, m, v: vae.backward(dz, dkl, dp, m, v, eps),
        r(3, 5),
        r(3, 5),
    )
    check(
        lambda z, m, v: (vae.kl_normal(m, v), vae.gaussian_log_prob(z, m, v)),
        vae.score_backward,
        r(3, 5),
        r(3, 5),
        r(3, 5),
    )
    norm = lambda g, dy, x, a, w: (lambda ds, dw: (ds, ds, dw))(
        *rows.add_rms_norm_backward(g, dy, x + a, w, 1e-5)
    )
    check(lambda x, a, w: rows.add_rms_norm(x, a, w, 1e-5), norm, r(2, 3, 4), r(2, 3, 4), r(4))
    check(rows.swiglu, rows.swiglu_backward, r(3, 4), r(3, 4))
    angle = 9 * r(2, 1, 3, 2)
    check(
        lambda x: rows.rotate(x, angle.cos(), angle.sin()),
        lambda g, x: (rows.rotate(g, angle.cos(), -angle.sin()),),
        r(2, 4, 3, 4),
    )
    check(
        lambda h, W: cross_entropy.linear_nll(h, W, target, 0.7),
        lambda g, h, W: cross_entropy.backward(g, h, W, target, 0.7),
        r(3, 4),
        r(7, 4),
    )


def test_gradient_of_attention_derived_by_hand():
    inputs, w, _ = step_inputs([2, 1], 4, 2, 4, 3, 4, 2)
    q, k, v, cos, sin, *stored = (x.cpu() for x in inputs)
    w = attention.Where(*(x.cpu() if torch.is_tensor(x) else x for x in w))
    check(
        lambda q, k, v, *s: attention.step(q, k, v, cos, sin, *s, w),
        lambda do, q, k, v, *s: attention.step_backward(do, q, k, v, cos, sin, *s, w),
        q,
        k,
        v,
        *stored,
    )


# ---- the choice, the model, the compiler --------------------------------------------------------------------------------


def test_the_choice(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("MINATP_KERNELS", raising=False)
    assert (
        not ops.use_triton(cpu)
        and ops.use_triton(torch.device("cuda"))
        and not ops.use_triton(torch.device("cuda"), torch.float64)
    )
    monkeypatch.setenv("MINATP_KERNELS", "torch")
    assert not ops.use_triton(torch.device("cuda"))
    monkeypatch.setenv("MINATP_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert ops.use_triton(cpu)
    with pytest.raises(ops.Unavailable, match="no kernel for torch.float64"):
        ops.use_triton(cpu, torch.float64)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        UserError, match="^environment: MINATP_KERNELS=triton: there is none for cpu"
    ):
        pick_device("cpu")
    monkeypatch.setenv("MINATP_KERNELS", "cuda")
    with pytest.raises(ops.Unavailable, match="must be one of auto, torch, triton, not 'cuda'"):
        ops.use_triton(cpu)


def losses(steps=30):
    """Of a tiny model, trained in the curriculum's last stage: latents, VAE, stop head and decoder; prompts of unequal length."""
    cfg = options.parse(
        "--n-layer 1 --n-head 4 --n-kv-head 1 --n-embd 16 --n-inner 24 --vocab-size 160 --decoder-layers 1 --K 1 --c 1 "
        "--lr 1e-3 --epochs 1".split(),
        "",
    )
    torch.manual_seed(0)
    chosen = [
        Problem(
            f"{a} and {b}" if a % 2 else f"{a}+{b}", [f"<<{a}+{b}={a + b}>>"] * (b - 1), str(a + b)
        )
        for a in range(5)
        for b in (2, 3)
    ]
    model, tokenizer = build(cfg, chosen)
    model.stage = cfg.K + 1
    encoded, optimizer, told = (
        encode_problems(cfg, chosen, tokenizer, model),
        build_optimizer(cfg, model.to(DEVICE)),
        [],
    )
    take = Steps(optimizer, model, cfg.clip).take
    for step in range(steps):
        pair = [encoded[step % 10], encoded[(step + 3) % 10]]
        sums, counts = train.sft_gradients(
            cfg, model, tokenizer, pair, model.stage, step, torch.device(DEVICE)
        )
        told.append(train.total_loss(sums, counts, cfg.beta))
        take(cfg.lr, told[-1], step, pair)
    return torch.stack(told)


def test_a_model_trains_the_same_with_the_kernels(monkeypatch):
    monkeypatch.setattr(run, "autocast", lambda device: torch.autocast(device.type, enabled=False))
    monkeypatch.setenv("MINATP_KERNELS", "torch")
    want = losses()
    monkeypatch.setenv("MINATP_KERNELS", "triton")
    got = losses()
    assert want[-5:].mean() < want[:5].mean()
    assert ((got - want) / want).abs().max() <= 2e-5


def under_autocast():
    """Losses, some gradients and log-probabilities of a small model in half precision over float32 weights, as on a GPU."""
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
    model.policy.init_weights(), model.decoder.init_weights()
    model.to(DEVICE).end = 3
    row = lambda n, m: data.Encoded(
        [5 + n] * (2 + n), [[7, 8]] * m, [[7, 8, 1]] * m, [], [6, 5, 9, 1], ""
    )
    batch = data.collate([row(3, 2), row(1, 1)], model.K, model).to(DEVICE)
    prompt, valid = data.left_pad([[5, 6], [7] * 5], model.end, DEVICE)
    noise = Noise.draw(model, 4, 8, 1).at(slice(None), DEVICE)
    found = []
    with torch.autocast(DEVICE, torch.float16):
        r = rollout(model, prompt, valid, 8, noise, 2)
        r.n_token.clamp_(min=1)
        r.token.clamp_(min=2)  # chains of which nothing depends on the choice of kernels
        r.n_latent, r.stopped = (
            r.n_latent * 0 + torch.tensor([2, 1, 0, 2], device=DEVICE),
            r.stopped & False,
        )
        r.z = vae.drawn(noise.eps, 16)
        for z_given in (None, noise.eps):
            s = score(model, prompt, valid, r, 2, z_given)
            found += [s.logp_z, s.logp_stop, s.logp_token]
        sums = sft_losses(model, batch, noise.eps[:2])
        found += sums.values()
    wanted = [
        model.policy.model.layers[0].self_attn.k_proj.weight,
        model.latent_head.fc[0].weight,
        model.policy.head,
        model.policy.model.norm.weight,
    ]
    found += torch.autograd.grad(sum(x.sum() for x in found), wanted)
    assert all(x.dtype == torch.float32 for x in found)
    assert len(read_thoughts(model.decoder, r.z[:, :1], 1, 2)) == 4
    return found


def test_kernels_under_autocast(monkeypatch):
    monkeypatch.setenv("MINATP_KERNELS", "torch")
    want = under_autocast()
    monkeypatch.setenv("MINATP_KERNELS", "triton")
    for a, b in zip(under_autocast(), want):
        close(a, b, 2e-2)


def test_z_kl_and_log_probability_are_one_launch(monkeypatch):
    launched, launch = [], vae.run_forward
    monkeypatch.setattr(vae, "run_forward", lambda *a: launched.append(a[3]) or launch(*a))
    monkeypatch.setenv("MINATP_KERNELS", "triton")
    monkeypatch.setenv("MINATP_GRAPHS", "0")
    under_autocast()
    n = launched.index(vae.SCORE)
    assert 1 <= n <= 2 and launched[n + 1 :] == [vae.DRAW] * 4, (
        launched
    )  # rollout; score: all thoughts at once, or 2 walked; SFT: 2


def test_the_benchmark_verifies_before_it_times():
    for case in bench.small_cases(torch.device(DEVICE), torch.float16):
        assert bench.verify(case) <= bench.LIMIT, case.name
    wrong = bench.small_cases(torch.device(DEVICE), torch.float16)[0]
    wrong.kernel = lambda mu, logvar: [1.01 * y for y in wrong.reference(mu, logvar)]
    assert bench.verify(wrong) > bench.LIMIT


def test_every_kernel_compiles_for_sm_90_without_spills(compiled):
    table, errors = compiled.communicate()
    assert compiled.returncode == 0, errors
    from kernels.compile_report import cases

    lines = {
        line.split(" | ")[0].strip("| "): line
        for line in table.splitlines()
        if line.startswith("| ")
    }
    assert {name for name, _, _ in cases()} <= lines.keys()
    assert all("HGMMA" in lines[f"linear cross-entropy {way}"] for way in ("forward", "backward"))
    assert all("MMA" in line for name, line in lines.items() if name.startswith("attention"))
