"""Linear cross-entropy: −log p of each target from hidden states and the output matrix, without the logits ever being in memory.

    forward    l_v = τ·h·W_v,  lse = log Σ_v exp(l_v),  nll = lse − l_target                       τ: one over the temperature
    backward   with g_r the gradient of row r's nll (any numbers: REINFORCE's are advantages):
               dl_v = g·τ·(exp(l_v − lse) − [v = target]),  dh = dl·W,  dW = dlᵀ·h

Forward: a program takes a block of rows and a share of the vocabulary, and leaves (largest, sum, the target's) of its share, 12 bytes.
Backward: the logits' tiles are computed again and leave as dl, for CHUNK rows at a time; the two products are cuBLAS's. A row without a
target (−100) costs nothing but its place: its nll, its dl and its dh are 0.

Bytes: h and W once each where the L2 cache holds a block of rows; backward moreover 2·CHUNK·V of dl, written and read twice.
Products: 2·R·V·D operations forward, 3 × as many backward.
"""
import torch
import torch.nn.functional as F

from .common import as_rows, power_of_2, tl, triton, wide

IGNORE = -100
CHUNK = 1024  # rows whose dl is in memory at a time: enough for a product of full speed
SHARES = 16   # of the vocabulary in the forward pass
HALF = dict(BR=128, BV=128, BK=64, num_warps=8, num_stages=3)  # tiles of 16-bit inputs


# ---- PyTorch references -------------------------------------------------------------------------------------------------

def token_nll(logits, target):
    """-log p of each target, float32: logits (..., V), target (...) -> (...); 0 where the target is IGNORE."""
    V = logits.shape[-1]
    return F.cross_entropy(wide(logits).reshape(-1, V), target.reshape(-1), ignore_index=IGNORE,
                           reduction="none").view(target.shape)


def linear_nll(h, W, target, temperature=1.0):
    """-log p of each target under softmax(h·Wᵀ/temperature): h (..., D), W (V, D), target (...) -> (...)."""
    logits = F.linear(h, W)
    return token_nll(logits if temperature == 1 else logits / temperature, target)


def backward(g, h, W, target, temperature):
    """(dh, dW) of `linear_nll` on rows h (R, D), by hand."""
    keep = (target != IGNORE)[:, None]
    dl = (h @ W.T / temperature).softmax(1).scatter_add(1, target.clamp(min=0)[:, None], -keep.to(h.dtype))
    dl = torch.where(keep, dl * g[:, None] / temperature, 0.0)
    return dl @ W, dl.T @ h


# ---- kernels ------------------------------------------------------------------------------------------------------------

@triton.jit
def tile(h, W, row, v, R, V, D, s_h, s_W, BR: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """h[row]·W[v]ᵀ, (BR, BV) float32."""
    acc = tl.zeros([BR, BV], tl.float32)
    for k in range(0, D, BK):
        i = k + tl.arange(0, BK)
        b_h = tl.load(h + row[:, None] * s_h + i[None, :], (row < R)[:, None] & (i < D)[None, :], 0.0)
        b_W = tl.load(W + v[:, None] * s_W + i[None, :], (v < V)[:, None] & (i < D)[None, :], 0.0)
        acc = tl.dot(b_h, tl.trans(b_W), acc, input_precision="ieee")
    return acc


@triton.jit
def forward_kernel(h, W, target, top, total, at_target, R, V, D, s_h, s_W, inverse, width, BR: tl.constexpr, BV: tl.constexpr,
                   BK: tl.constexpr):
    """Program (block of rows, share of the vocabulary)."""
    row, share = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.program_id(1)
    b_target = tl.load(target + row, row < R, -1)
    b_top, b_total, found = tl.full([BR], -float("inf"), tl.float32), tl.zeros([BR], tl.float32), tl.zeros([BR], tl.float32)
    for begin in range(share * width, tl.minimum((share + 1) * width, V), BV):
        v = begin + tl.arange(0, BV).to(tl.int64)
        logit = tl.where((v < V)[None, :], tile(h, W, row, v, R, V, D, s_h, s_W, BR, BV, BK) * inverse, -float("inf"))
        new = tl.maximum(b_top, tl.max(logit, 1))
        b_total = b_total * tl.exp(b_top - new) + tl.sum(tl.exp(logit - new[:, None]), 1)
        b_top = new
        found += tl.sum(tl.where(v[None, :] == b_target[:, None], logit, 0.0), 1)
    out = share * R + row
    tl.store(top + out, b_top, row < R)
    tl.store(total + out, b_total, row < R)
    tl.store(at_target + out, found, row < R)


@triton.jit
def backward_kernel(h, W, target, lse, g, dl, R, V, D, s_h, s_W, s_dl, inverse, BR: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """Program (block of rows, block of the vocabulary): one tile of dl."""
    row, v = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.program_id(1).to(tl.int64) * BV + tl.arange(0, BV)
    b_target = tl.load(target + row, row < R, -1)
    logit = tile(h, W, row, v, R, V, D, s_h, s_W, BR, BV, BK) * inverse
    p = tl.exp(logit - tl.load(lse + row, row < R, 0.0)[:, None])
    p = tl.where(v[None, :] == b_target[:, None], p - 1.0, p)
    b_g = tl.where(b_target >= 0, tl.load(g + row, row < R, 0.0) * inverse, 0.0)
    b_dl = tl.where((b_target >= 0)[:, None], p * b_g[:, None], 0.0)  # a row without a target may hold anything
    tl.store(dl + row[:, None] * s_dl + v[None, :], b_dl, (row < R)[:, None] & (v < V)[None, :])


# ---- under autograd -----------------------------------------------------------------------------------------------------

def blocks(h, V):
    """Tile sizes: a matrix instruction's for 16 bits; for float32, which is for tests, few programs."""
    if h.element_size() > 2:
        return dict(BR=power_of_2(min(h.shape[0], 32), 16), BV=power_of_2(min(V, 256), 16), BK=32)
    return HALF


class LinearNLL(torch.autograd.Function):
    """h (R, D), W (V, D) of one dtype, target (R,) -> −log p (R,) float32."""
    @staticmethod
    def forward(ctx, h, W, target, inverse):
        (R, D), V, b = h.shape, W.shape[0], blocks(h, W.shape[0])
        width = -(-(-(-V // SHARES)) // b["BV"]) * b["BV"]
        shares = -(-V // width)
        top, total, at_target = (h.new_empty(shares, R, dtype=torch.float32) for _ in range(3))
        forward_kernel[(-(-R // b["BR"]), shares)](h, W, target, top, total, at_target, R, V, D, h.stride(0), W.stride(0), inverse,
                                                   width, **b)
        lse = (top + total.log()).logsumexp(0)
        ctx.save_for_backward(h, W, target, lse)
        ctx.inverse = inverse
        return torch.where(target == IGNORE, 0.0, lse - at_target.sum(0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        h, W, target, lse = ctx.saved_tensors
        (R, D), V, b, g = h.shape, W.shape[0], blocks(h, W.shape[0]), g.float().contiguous()
        dh = torch.empty_like(h, memory_format=torch.contiguous_format)
        dW = W.new_zeros(V, D, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        dl = h.new_empty(min(CHUNK, R), -(-V // 16) * 16)[:, :V]  # rows begin at 32 bytes, which cuBLAS likes
        for at in range(0, R, CHUNK):
            part = slice(at, min(at + CHUNK, R))
            n = part.stop - at
            backward_kernel[(-(-n // b["BR"]), -(-V // b["BV"]))](h[part], W, target[part], lse[part], g[part], dl, n, V, D, h.stride(0),
                                                                  W.stride(0), dl.stride(0), ctx.inverse, **b)
            dh[part] = dl[:n] @ W
            if dW is not None:
                dW += dl[:n].T @ h[part]
        return dh, None if dW is None else dW.to(W.dtype), None, None


def apply(h, W, target, temperature=1.0):
    """LinearNLL on h (..., D), target (...), with h and W in one dtype."""
    rows = as_rows(h)
    if not len(rows):
        return rows.sum(1).float().view(target.shape)
    return LinearNLL.apply(rows, W, target.reshape(-1), 1.0 / temperature).view(target.shape)
