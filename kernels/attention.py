"""Attention of one new position (or a few) of each sequence against its cached keys and values: the step of a latent chain.

A row's columns lie in two places: the question's, left-padded, in the prefix, which a group of rollouts shares, and its own since
then, in the order of its real positions. Ragged rows are two numbers, where the prefix begins and how many own columns there are;
there is no mask. RoPE of q and k and the append to the cache are part of the step.

    forward    s_c = q·k_c/√d,  p = softmax(s),  o = Σ p_c v_c,      q and the new k rotated by their position
               The prefix's part: its own softmax over a split of the columns, for all rows of a group at once, leaves (o, lse).
               The own part then goes on from there: softmaxes of parts are joined with the weights exp(lse_part − lse).
    backward   Δ = do·o,  ds_c = p_c (do·v_c − Δ),  dq = Σ ds_c k_c/√d,  dk_c = Σ ds_c q/√d,  dv_c = Σ p_c do
               dk and dv are added into buffers laid out as the cache. The chain runs backward in reverse order, so when a step's turn
               comes, every later step has added to the step's own columns: it reads them there, and clears them.

Every program owns the columns it adds to, so nothing is atomic and every run gives the same bits.
Bytes, bf16: forward 2·2·d·h_kv a column, a prefix column once per group and not once per row. Backward the same and 4·4·d·h_kv for the
float32 buffers, read and written. Columns of left padding cost nothing.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .common import power_of_2, tl, triton
from .rows import rotate

COLUMNS = 128   # of the prefix, at least, in a split
QUERIES = 64    # of a group that a program takes at a time
PROGRAMS = 264  # that keep a large GPU busy: two for each of 132 processors


class Where(NamedTuple):
    """Where the columns of B rows lie; the same for every layer. int32 on the device but `group`."""
    start: torch.Tensor    # (N,) first real column of each prefix
    owner: torch.Tensor    # (B,) the prefix of each row
    members: torch.Tensor  # (B,) the rows, those of a prefix side by side
    first: torch.Tensor    # (N + 1,) where in `members` those of each prefix begin
    group: int             # most rows of one prefix
    n_own: torch.Tensor    # (B,) own columns before this step
    slot: torch.Tensor     # (B, T) the own column of each new position, −1 where it is not real


# ---- PyTorch references -------------------------------------------------------------------------------------------------

def visible(w, P, C):
    """What each new position sees of P prefix columns, C own ones and the new ones, (B, T, P + C + T): itself always."""
    (B, T), arange = w.slot.shape, lambda n: torch.arange(n, device=w.slot.device)
    prefix = (arange(P) >= w.start[w.owner][:, None])[:, None].expand(B, T, P)
    own = (arange(C) < w.n_own[:, None])[:, None].expand(B, T, C)
    t = arange(T)
    return torch.cat((prefix, own, ((t < t[:, None]) & (w.slot >= 0)[:, None]) | (t == t[:, None])), 2)


def masked_sdpa(q, k, v, mask):
    """softmax(q kᵀ/√hd) v of a long pass: q (B, h, T, hd), k and v (B, h_kv, S, hd), mask (B, 1, T, S) bool. On a GPU the key/value heads
    are repeated: beside a mask PyTorch's fused kernels want as many as there are query heads."""
    rep = q.shape[1] // k.shape[1]
    if q.is_cuda and rep > 1:
        k, v = (x.repeat_interleave(rep, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def scores(q, k, cos, sin, prefix_k, own_k, w):
    """Rotated q, all keys by query head, and the softmax (B, h, T, columns)."""
    rep, see = q.shape[1] // k.shape[1], visible(w, prefix_k.shape[2], own_k.shape[2])
    q = rotate(q, cos, sin)
    K = torch.cat((prefix_k[w.owner], own_k, rotate(k, cos, sin)), 2).repeat_interleave(rep, 1)
    return q, K, (q @ K.mT * q.shape[-1] ** -0.5).masked_fill(~see[:, None], -torch.inf).softmax(-1)


def step(q, k, v, cos, sin, prefix_k, prefix_v, own_k, own_v, w):
    """The step: q (B, h, T, d), k and v (B, h_kv, T, d), prefix (N, h_kv, P, d), own (B, h_kv, C, d) -> o (B, h, T, d)."""
    p = scores(q, k, cos, sin, prefix_k, own_k, w)[2]
    return p @ torch.cat((prefix_v[w.owner], own_v, v), 2).repeat_interleave(q.shape[1] // k.shape[1], 1)


def step_backward(do, q, k, v, cos, sin, prefix_k, prefix_v, own_k, own_v, w):
    """The gradient of `step` with respect to its seven tensors q, k, v, prefix_k, prefix_v, own_k, own_v, by hand."""
    (N, h_kv, P, d), C, rep = prefix_k.shape, own_k.shape[2], q.shape[1] // k.shape[1]
    q, K, p = scores(q, k, cos, sin, prefix_k, own_k, w)
    V = torch.cat((prefix_v[w.owner], own_v, v), 2).repeat_interleave(rep, 1)
    ds = p * (do @ V.mT - (do * (p @ V)).sum(-1, keepdim=True)) * d**-0.5
    fold = lambda x: x.unflatten(1, (h_kv, rep)).sum(2).split((P, C, v.shape[2]), 2)
    shared = lambda x: x.new_zeros(N, *x.shape[1:]).index_add_(0, w.owner, x)
    (dpk, dok, dk), (dpv, dov, dv) = fold(ds.mT @ q), fold(p.mT @ do)
    return rotate(ds @ K, cos, -sin), rotate(dk, cos, -sin), dv, shared(dpk), shared(dpv), dok, dov


# ---- kernels ------------------------------------------------------------------------------------------------------------
# D, H: a head's size and half of it; BD, BH: the same, padded to what a matrix instruction takes. x1 and x2: halves of a head.

@triton.jit
def load_rotated(x, offset, cos, sin, at, mask, H: tl.constexpr, BH: tl.constexpr):
    """Both halves of the heads at `offset`, rotated by the angles of position `at`, float32."""
    i = tl.arange(0, BH)
    m = mask[:, None] & (i < H)[None, :]
    x1 = tl.load(x + offset[:, None] + i[None, :], m, 0.0).to(tl.float32)
    x2 = tl.load(x + offset[:, None] + H + i[None, :], m, 0.0).to(tl.float32)
    c = tl.load(cos + at[:, None] * H + i[None, :], m, 0.0)
    s = tl.load(sin + at[:, None] * H + i[None, :], m, 0.0)
    return x1 * c - x2 * s, x2 * c + x1 * s


@triton.jit
def store_unrotated(x, offset, x1, x2, cos, sin, at, mask, H: tl.constexpr, BH: tl.constexpr):
    """The transpose of `load_rotated`: rotate back and write."""
    i = tl.arange(0, BH)
    m = mask[:, None] & (i < H)[None, :]
    c = tl.load(cos + at[:, None] * H + i[None, :], m, 0.0)
    s = tl.load(sin + at[:, None] * H + i[None, :], m, 0.0)
    tl.store(x + offset[:, None] + i[None, :], x1 * c + x2 * s, m)
    tl.store(x + offset[:, None] + H + i[None, :], x2 * c - x1 * s, m)


@triton.jit
def load_halves(x, offset, mask, H: tl.constexpr, BH: tl.constexpr):
    i = tl.arange(0, BH)
    m = mask[:, None] & (i < H)[None, :]
    return tl.load(x + offset[:, None] + i[None, :], m, 0.0), tl.load(x + offset[:, None] + H + i[None, :], m, 0.0)


@triton.jit
def load_whole(x, offset, mask, D: tl.constexpr, BD: tl.constexpr):
    i = tl.arange(0, BD)
    return tl.load(x + offset[:, None] + i[None, :], mask[:, None] & (i < D)[None, :], 0.0)


@triton.jit
def add_halves(x, offset, x1, x2, mask, H: tl.constexpr, BH: tl.constexpr):
    """Add into a float32 buffer that no other program touches."""
    i = tl.arange(0, BH)
    m = mask[:, None] & (i < H)[None, :]
    at = x + offset[:, None] + i[None, :]
    tl.store(at, tl.load(at, m, 0.0) + x1, m)
    tl.store(at + H, tl.load(at + H, m, 0.0) + x2, m)


@triton.jit
def add_whole(x, offset, value, mask, D: tl.constexpr, BD: tl.constexpr):
    i = tl.arange(0, BD)
    m = mask[:, None] & (i < D)[None, :]
    at = x + offset[:, None] + i[None, :]
    tl.store(at, tl.load(at, m, 0.0) + value, m)


@triton.jit
def similarity(q1, q2, k1, k2, scale, see):
    """Scores in units of log 2, so that exp2 is the softmax's exponential; −inf where nothing is seen."""
    s = tl.dot(q1, tl.trans(k1), input_precision="ieee") + tl.dot(q2, tl.trans(k2), input_precision="ieee")
    return tl.where(see, s * (scale * 1.4426950408889634), -float("inf"))


@triton.jit
def absorb(s, v, top, total, acc):
    """One block of scores and values into a running softmax (top, total, acc)."""
    new = tl.maximum(top, tl.max(s, 1))
    safe = tl.where(new == -float("inf"), 0.0, new)  # a row that has seen nothing yet
    p, keep = tl.exp2(s - safe[:, None]), tl.exp2(top - safe)
    return new, total * keep + tl.sum(p, 1), acc * keep[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")


@triton.jit
def flow_back(s, lse, delta, q1, q2, do, k1, k2, v, scale):
    """One block's share: (dq1, dq2) of the queries, (dk1, dk2, dv) of the block's columns."""
    p = tl.exp2(s - lse[:, None])
    ds = (p * (tl.dot(do, tl.trans(v), input_precision="ieee") - delta[:, None]) * scale).to(k1.dtype)
    pt, dst = tl.trans(p.to(k1.dtype)), tl.trans(ds)
    return (tl.dot(ds, k1, input_precision="ieee"), tl.dot(ds, k2, input_precision="ieee"), tl.dot(dst, q1, input_precision="ieee"),
            tl.dot(dst, q2, input_precision="ieee"), tl.dot(pt, do, input_precision="ieee"))


@triton.jit
def group_queries(members, begin, end, j, h, T: tl.constexpr, REP: tl.constexpr, BM: tl.constexpr):
    """The queries for key head j of members begin … end: row, position, head, their place in a (B, h, T) tensor, which are real."""
    m = tl.arange(0, BM)
    member = begin + m // (T * REP)
    real = (m < BM // (T * REP) * (T * REP)) & (member < end)
    b = tl.load(members + member, real, 0).to(tl.int64)
    t, head = (m // REP) % T, j * REP + m % REP
    return b, t, head, (b * h + head) * T + t, real


@triton.jit
def prefix_forward(q, cos, sin, K, V, start, members, first, part_o, part_lse, s_qb, s_qh, s_qt, scale, B, h, P, width,
                   T: tl.constexpr, REP: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
                   BM: tl.constexpr, BN: tl.constexpr):
    """Program (group, key head, split): softmax of the group's queries over the split's columns."""
    n, j, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    D: tl.constexpr = 2 * H
    base = (n.to(tl.int64) * tl.num_programs(1) + j) * P * D
    K, V = K + base, V + base
    begin, end = tl.load(start + n), tl.minimum((split + 1) * width, P)
    i = tl.arange(0, BD)
    for member in range(tl.load(first + n), tl.load(first + n + 1), BM // (T * REP)):  # one turn, unless the group is large
        b, t, head, place, real = group_queries(members, member, tl.load(first + n + 1), j, h, T, REP, BM)
        q1, q2 = load_rotated(q, b * s_qb + head * s_qh + t * s_qt, cos, sin, b * T + t, real, H, BH)
        q1, q2 = q1.to(K.dtype.element_ty), q2.to(K.dtype.element_ty)
        top, total, acc = tl.full([BM], -float("inf"), tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, BD], tl.float32)
        for c in range(tl.maximum(split * width, begin // BN * BN), end, BN):
            col = c + tl.arange(0, BN)
            see = (col >= begin) & (col < end)
            k1, k2 = load_halves(K, col * D, see, H, BH)
            top, total, acc = absorb(similarity(q1, q2, k1, k2, scale, see[None, :]), load_whole(V, col * D, see, D, BD),
                                     top, total, acc)
        some = tl.where(total > 0.0, total, 1.0)
        place += split.to(tl.int64) * B * h * T
        tl.store(part_o + place[:, None] * D + i[None, :], acc / some[:, None], real[:, None] & (i < D)[None, :])
        tl.store(part_lse + place, tl.where(total > 0.0, top + tl.log2(some), -float("inf")), real)


@triton.jit
def own_forward(q, k, v, cos, sin, K, V, n_own, slot, part_o, part_lse, o, lse, s_qb, s_qh, s_qt, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt,
                scale, B, h, C, splits, T: tl.constexpr, REP: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr):
    """Program (row, key head): append the new columns, attend to the row's own ones, and join the prefix's parts."""
    b, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    D: tl.constexpr = 2 * H
    m = tl.arange(0, BM)
    t, head, real = m // REP, j * REP + m % REP, m < T * REP
    place = (b * h + head) * T + t
    q1, q2 = load_rotated(q, b * s_qb + head * s_qh + t * s_qt, cos, sin, b * T + t, real, H, BH)
    q1, q2 = q1.to(K.dtype.element_ty), q2.to(K.dtype.element_ty)
    base, have = (b * tl.num_programs(1) + j) * C * D, tl.load(n_own + b)
    K, V = K + base, V + base

    new = tl.arange(0, BT)
    n1, n2 = load_rotated(k, b * s_kb + j * s_kh + new * s_kt, cos, sin, b * T + new, new < T, H, BH)
    n1, n2 = n1.to(K.dtype.element_ty), n2.to(K.dtype.element_ty)
    v_new = load_whole(v, b * s_vb + j * s_vh + new * s_vt, new < T, D, BD).to(V.dtype.element_ty)
    at = tl.load(slot + b * T + new, new < T, -1)
    i, ii = tl.arange(0, BH), tl.arange(0, BD)
    where = at[:, None] * D
    tl.store(K + where + i[None, :], n1, (at >= 0)[:, None] & (i < H)[None, :])
    tl.store(K + where + H + i[None, :], n2, (at >= 0)[:, None] & (i < H)[None, :])
    tl.store(V + where + ii[None, :], v_new, (at >= 0)[:, None] & (ii < D)[None, :])

    see = (((new[None, :] < t[:, None]) & (at >= 0)[None, :]) | (new[None, :] == t[:, None])) & (new < T)[None, :]
    top, total, acc = tl.full([BM], -float("inf"), tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM, BD], tl.float32)
    top, total, acc = absorb(similarity(q1, q2, n1, n2, scale, see), v_new, top, total, acc)
    for c in range(0, have, BN):
        col = c + tl.arange(0, BN)
        k1, k2 = load_halves(K, col * D, col < have, H, BH)
        top, total, acc = absorb(similarity(q1, q2, k1, k2, scale, (col < have)[None, :]),
                                 load_whole(V, col * D, col < have, D, BD), top, total, acc)
    for split in range(splits):
        part = place + tl.full([], split, tl.int64) * B * h * T
        other = tl.load(part_lse + part, real, -float("inf"))
        both = tl.where(real, tl.maximum(top, other), 0.0)
        keep, weight = tl.exp2(top - both), tl.exp2(other - both)
        acc = acc * keep[:, None] + weight[:, None] * load_whole(part_o, part * D, real, D, BD)
        top, total = both, total * keep + weight
    total = tl.where(real, total, 1.0)
    tl.store(o + place[:, None] * D + ii[None, :], acc / total[:, None], real[:, None] & (ii < D)[None, :])
    tl.store(lse + place, top + tl.log2(total), real)


@triton.jit
def prefix_backward(q, cos, sin, K, V, gK, gV, start, members, first, do, o, lse, part_dq, s_qb, s_qh, s_qt, s_ob, s_oh, s_ot, scale, B, h,
                    P, width, T: tl.constexpr, REP: tl.constexpr, H: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr):
    """Program (group, key head, split): add the group's dk and dv of the split's columns, leave the split's share of dq, rotated."""
    n, j, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    D: tl.constexpr = 2 * H
    base = (n.to(tl.int64) * tl.num_programs(1) + j) * P * D
    K, V, gK, gV = K + base, V + base, gK + base, gV + base
    begin, end = tl.load(start + n), tl.minimum((split + 1) * width, P)
    i = tl.arange(0, BH)
    for member in range(tl.load(first + n), tl.load(first + n + 1), BM // (T * REP)):
        b, t, head, place, real = group_queries(members, member, tl.load(first + n + 1), j, h, T, REP, BM)
        q1, q2 = load_rotated(q, b * s_qb + head * s_qh + t * s_qt, cos, sin, b * T + t, real, H, BH)
        q1, q2 = q1.to(K.dtype.element_ty), q2.to(K.dtype.element_ty)
        b_do = load_whole(do, b * s_ob + head * s_oh + t * s_ot, real, D, BD)
        delta = tl.sum(b_do.to(tl.float32) * load_whole(o, place * D, real, D, BD).to(tl.float32), 1)
        b_do, b_lse = b_do.to(V.dtype.element_ty), tl.load(lse + place, real, 0.0)
        dq1, dq2 = tl.zeros([BM, BH], tl.float32), tl.zeros([BM, BH], tl.float32)
        for c in range(tl.maximum(split * width, begin // BN * BN), end, BN):
            col = c + tl.arange(0, BN)
            see = (col >= begin) & (col < end)
            k1, k2 = load_halves(K, col * D, see, H, BH)
            s = similarity(q1, q2, k1, k2, scale, see[None, :] & real[:, None])
            e1, e2, dk1, dk2, dv = flow_back(s, b_lse, delta, q1, q2, b_do, k1, k2, load_whole(V, col * D, see, D, BD), scale)
            dq1, dq2 = dq1 + e1, dq2 + e2
            add_halves(gK, col * D, dk1, dk2, see, H, BH)
            add_whole(gV, col * D, dv, see, D, BD)
        at = part_dq + (place + split.to(tl.int64) * B * h * T)[:, None] * D + i[None, :]
        tl.store(at, dq1, real[:, None] & (i < H)[None, :])
        tl.store(at + H, dq2, real[:, None] & (i < H)[None, :])
        tl.debug_barrier()  # the next members add to the same columns


@triton.jit
def own_backward(q, k, v, cos, sin, K, V, gK, gV, n_own, slot, do, o, lse, part_dq, dq, dk, dv, s_qb, s_qh, s_qt, s_kb, s_kh, s_kt,
                 s_vb, s_vh, s_vt, s_ob, s_oh, s_ot, scale, B, h, C, splits, T: tl.constexpr, REP: tl.constexpr, H: tl.constexpr,
                 BH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr):
    """Program (row, key head): add dk and dv of the own columns, take what was added to the new ones, and finish dq, dk, dv. BM queries at a
    time: all of several positions at once would not fit into the registers."""
    b, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    D: tl.constexpr = 2 * H
    base, have = (b * tl.num_programs(1) + j) * C * D, tl.load(n_own + b)
    K, V, gK, gV = K + base, V + base, gK + base, gV + base
    i, ii, new = tl.arange(0, BH), tl.arange(0, BD), tl.arange(0, BT)
    fresh = new < T
    n1, n2 = load_rotated(k, b * s_kb + j * s_kh + new * s_kt, cos, sin, b * T + new, fresh, H, BH)
    n1, n2 = n1.to(K.dtype.element_ty), n2.to(K.dtype.element_ty)
    v_new = load_whole(v, b * s_vb + j * s_vh + new * s_vt, fresh, D, BD).to(V.dtype.element_ty)
    at = tl.load(slot + b * T + new, fresh, -1)
    dk1, dk2 = load_halves(gK, at * D, at >= 0, H, BH)  # what later steps added
    dv_new = load_whole(gV, at * D, at >= 0, D, BD)
    for first in range(0, T * REP, BM):
        m = first + tl.arange(0, BM)
        t, head, real = m // REP, j * REP + m % REP, m < T * REP
        place = (b * h + head) * T + t
        q1, q2 = load_rotated(q, b * s_qb + head * s_qh + t * s_qt, cos, sin, b * T + t, real, H, BH)
        q1, q2 = q1.to(K.dtype.element_ty), q2.to(K.dtype.element_ty)
        b_do = load_whole(do, b * s_ob + head * s_oh + t * s_ot, real, D, BD)
        delta = tl.sum(b_do.to(tl.float32) * load_whole(o, place * D, real, D, BD).to(tl.float32), 1)
        b_do, b_lse = b_do.to(V.dtype.element_ty), tl.load(lse + place, real, 0.0)
        see = (((new[None, :] < t[:, None]) & (at >= 0)[None, :]) | (new[None, :] == t[:, None])) & fresh[None, :] & real[:, None]
        dq1, dq2, f1, f2, g = flow_back(similarity(q1, q2, n1, n2, scale, see), b_lse, delta, q1, q2, b_do, n1, n2, v_new, scale)
        dk1, dk2, dv_new = dk1 + f1, dk2 + f2, dv_new + g
        for split in range(splits):
            e1, e2 = load_halves(part_dq, (place + tl.full([], split, tl.int64) * B * h * T) * D, real, H, BH)
            dq1, dq2 = dq1 + e1, dq2 + e2
        for c in range(0, have, BN):
            col = c + tl.arange(0, BN)
            k1, k2 = load_halves(K, col * D, col < have, H, BH)
            s = similarity(q1, q2, k1, k2, scale, (col < have)[None, :] & real[:, None])
            e1, e2, f1, f2, g = flow_back(s, b_lse, delta, q1, q2, b_do, k1, k2, load_whole(V, col * D, col < have, D, BD), scale)
            dq1, dq2 = dq1 + e1, dq2 + e2
            add_halves(gK, col * D, f1, f2, col < have, H, BH)
            add_whole(gV, col * D, g, col < have, D, BD)
        store_unrotated(dq, place * D, dq1, dq2, cos, sin, b * T + t, real, H, BH)
        tl.debug_barrier()  # the next queries add to the same columns; and all is read before it is cleared
    where = at[:, None] * D
    tl.store(gK + where + i[None, :], tl.zeros([BT, BH], tl.float32), (at >= 0)[:, None] & (i < H)[None, :])
    tl.store(gK + where + H + i[None, :], tl.zeros([BT, BH], tl.float32), (at >= 0)[:, None] & (i < H)[None, :])
    tl.store(gV + where + ii[None, :], tl.zeros([BT, BD], tl.float32), (at >= 0)[:, None] & (ii < D)[None, :])
    new_place = (b * tl.num_programs(1) + j) * T + new
    store_unrotated(dk, new_place * D, dk1, dk2, cos, sin, b * T + new, fresh, H, BH)
    tl.store(dv + new_place[:, None] * D + ii[None, :], dv_new, fresh[:, None] & (ii < D)[None, :])


# ---- launches -----------------------------------------------------------------------------------------------------------

def blocks(h, h_kv, d, T, rows, columns):
    """Compile-time sizes for a program of `rows` rows, or of as many as QUERIES allows, and `columns` columns at a time."""
    queries = min(rows * T * (h // h_kv), max(QUERIES, T * (h // h_kv)))
    return dict(T=T, REP=h // h_kv, H=d // 2, BH=power_of_2(d // 2, 16), BD=power_of_2(d, 16), BM=power_of_2(queries, 16), BN=columns)


def split_prefix(P, programs):
    """(splits, columns in each): enough to fill the device, none of fewer than COLUMNS."""
    splits = max(1, min(-(-P // COLUMNS), -(-PROGRAMS // programs)))
    width = -(-P // splits)
    return splits, -(-width // 32) * 32


def run_forward(q, k, v, cos, sin, prefix, own, w):
    """The step, `own` (keys, values) being written at w.slot. Shapes as in `step`; cos and sin (B, T, d/2) float32.

    q, k, v at any stride but for the last dimension's. Returns o (B, h, T, d) and its lse (B, h, T) float32, in units of log 2.
    """
    (B, h, T, d), (N, h_kv, P, _), scale = q.shape, prefix[0].shape, q.shape[-1] ** -0.5
    splits, width = split_prefix(P, N * h_kv)
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    part_o, part_lse = q.new_empty(splits, B, h, T, d, dtype=torch.float32), q.new_empty(splits, B, h, T, dtype=torch.float32)
    lse = q.new_empty(B, h, T, dtype=torch.float32)
    strides = [s for x in (q, k, v) for s in x.stride()[:3]]
    prefix_forward[(N, h_kv, splits)](q, cos, sin, *prefix, w.start, w.members, w.first, part_o, part_lse, *strides[:3], scale, B, h, P,
                                      width, **blocks(h, h_kv, d, T, w.group, 32))
    own_forward[(B, h_kv)](q, k, v, cos, sin, *own, w.n_own, w.slot, part_o, part_lse, o, lse, *strides, scale, B, h, own[0].shape[2],
                           splits, BT=power_of_2(T, 16), **blocks(h, h_kv, d, T, 1, 32))
    return o, lse


def run_backward(do, o, lse, q, k, v, cos, sin, prefix, own, g_prefix, g_own, w):
    """dq, dk, dv of the step; adds to the float32 buffers g_prefix and g_own (keys, values), and clears g_own at w.slot."""
    (B, h, T, d), (N, h_kv, P, _), scale = q.shape, prefix[0].shape, q.shape[-1] ** -0.5
    splits, width = split_prefix(P, N * h_kv)
    part_dq = q.new_empty(splits, B, h, T, d, dtype=torch.float32)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    strides = [s for x in (q, k, v, do) for s in x.stride()[:3]]
    prefix_backward[(N, h_kv, splits)](q, cos, sin, *prefix, *g_prefix, w.start, w.members, w.first, do, o, lse, part_dq, *strides[:3],
                                       *strides[9:], scale, B, h, P, width, **blocks(h, h_kv, d, T, w.group, 16))
    own_backward[(B, h_kv)](q, k, v, cos, sin, *own, *g_own, w.n_own, w.slot, do, o, lse, part_dq, dq, dk, dv, *strides, scale, B, h,
                            own[0].shape[2], splits, BT=power_of_2(T, 16), **blocks(h, h_kv, d, T, 1, 16) | {"BM": 16})
    return dq, dk, dv
