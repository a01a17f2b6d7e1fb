"""Attention of a latent step: one new position (or a few) of each row against its cached columns.

A column is the key and value of one position. One call rotates q and the new k (RoPE), appends the
new columns to the cache, and attends. The columns that a row attends to lie in two places:

    prefix   the question's columns, left-padded; stored once and shared by a group of rollouts
    own      the row's columns since then, in the order of its real positions

Two numbers describe a ragged row, where its prefix begins and how many own columns it has, so
there is no mask to read.

    forward    s_c = q·k_c/√hd,  p = softmax(s),  o = Σ_c p_c v_c
               The prefix is cut into splits. For each split, one program computes the softmax over
               its columns alone, for all rows of a group at once, and stores that part's o and lse.
               A second kernel attends to a row's own columns and joins the parts: the softmaxes of
               parts are added with the weights exp2(lse_part − lse). An lse is in base 2, log₂ Σ_c
               2^(s_c·log₂e), because a GPU has an instruction for 2^x.
    backward   Δ = do·o,  ds_c = p_c (do·v_c − Δ)/√hd, the gradient of q·k_c
               dq = Σ_c ds_c k_c,  dk_c = Σ ds_c q,  dv_c = Σ p_c do  (sums over the queries)
               dk and dv are added to float32 buffers laid out like the cache. The chain runs
               backward in reverse order, so when a step's turn comes, every later step has already
               added to the columns that this step appended. The step reads those sums, which are
               part of the gradient of its own k and v, and clears them.

Each program owns the columns that it adds to: nothing in these kernels is atomic, and every run
gives the same bits. (kernels/cache.py adds to the buffers, too, where a long pass has read columns.
Its index_add_ is atomic on a GPU.)

Bytes, bf16: forward reads 2·2·hd·h_kv a column. A prefix column is read once for all rows of a
group, not once per row, if their queries fit into one tile; a larger group takes turns, each of
which reads the column again. Own columns are read once for each row, and backward once for every 16
of its queries. With each such read, backward also reads and writes the float32 buffers, 4·4·hd·h_kv
a column. Columns of left padding cost nothing.

kernels/README.md, "How to read attention.py", explains the names and shows where the columns lie.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .common import ceil_div, next_power_of_2, tl, triton, upcast
from .rows import rotate

MIN_SPLIT_COLUMNS = 128  # the prefix is cut into at most ⌈P / this⌉ splits
MAX_TILE_QUERIES = 64  # a program takes at most this many queries of a group at a time
TARGET_PROGRAMS = 264  # enough to keep a large GPU busy: two for each of 132 processors


class KV(NamedTuple):
    """Keys and values of some columns, or their gradients."""

    k: torch.Tensor  # (rows, h_kv, columns, hd)
    v: torch.Tensor  # (rows, h_kv, columns, hd)


class StepInputs(NamedTuple):
    """What one layer computes for T new positions of B rows. q, k and v may have any strides but
    that of the last dimension, which is 1.
    """

    q: torch.Tensor  # (B, h, T, hd), not rotated yet
    k: torch.Tensor  # (B, h_kv, T, hd), not rotated yet
    v: torch.Tensor  # (B, h_kv, T, hd)
    cos: torch.Tensor  # (B, 1, T, hd/2) float32
    sin: torch.Tensor  # (B, 1, T, hd/2) float32


class Layout(NamedTuple):
    """Where the columns of B rows lie; the same for every layer. Tensors: int32 on the device."""

    start: torch.Tensor  # (N,) first real column of each prefix
    owner: torch.Tensor  # (B,) the prefix of each row
    members: torch.Tensor  # (B,) the rows, sorted by their prefix
    member_offsets: torch.Tensor  # (N + 1,) where in `members` the rows of each prefix begin
    mean_group: int  # rows per prefix, B / N rounded up; a hint: only speed depends on it
    n_own: torch.Tensor  # (B,) own columns before this step
    slot: torch.Tensor  # (B, T) own column that each new position fills, < C; −1: it is not real


# ---- PyTorch references --------------------------------------------------------------------------


def visible_mask(layout, P, C):
    """Which of P prefix columns, C own columns and the T new ones each new position attends to,
    (B, T, P + C + T) bool. A position always attends to itself, so no row is empty.
    """
    B, T = layout.slot.shape
    device = layout.slot.device

    # the real columns of the row's prefix, and its own: all of them lie before the new positions
    prefix = torch.arange(P, device=device) >= layout.start[layout.owner][:, None]  # (B, P)
    own = torch.arange(C, device=device) < layout.n_own[:, None]  # (B, C)

    # of the new positions: itself, and the real ones before it
    t = torch.arange(T, device=device)
    earlier = t < t[:, None]  # (T, T)
    itself = t == t[:, None]
    is_real = layout.slot >= 0  # (B, T)
    new = (earlier & is_real[:, None]) | itself  # (B, T, T)

    return torch.cat((prefix[:, None].expand(B, T, P), own[:, None].expand(B, T, C), new), 2)


def masked_sdpa(q, k, v, mask):
    """softmax(q kᵀ/√hd) v of a long pass: q (B, h, T, hd), k and v (B, h_kv, S, hd),
    mask (B, 1, T, S) bool -> (B, h, T, hd).
    """
    dtype = q.dtype
    rep = q.shape[1] // k.shape[1]
    if q.is_cuda and rep > 1:
        # with a mask, PyTorch's fused kernels need as many key heads as query heads
        k = k.repeat_interleave(rep, 1)
        v = v.repeat_interleave(rep, 1)
    elif not q.is_cuda:
        # on a CPU, SDPA's backward pass is up to three times as fast in float32 as in bfloat16
        q, k, v = upcast(q), upcast(k), upcast(v)

    # where they were not repeated, SDPA shares each key head among its query heads
    grouped_heads = q.shape[1] != k.shape[1]
    with torch.autocast("cpu", enabled=False):  # which would cast them back
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped_heads)
    return y.to(dtype)


def gather_columns(prefix, own, new, layout, rep):
    """All columns of each row, the key heads repeated for their query heads: prefix
    (N, h_kv, P, hd), own (B, h_kv, C, hd), new (B, h_kv, T, hd) -> (B, h, P + C + T, hd).
    """
    return torch.cat((prefix[layout.owner], own, new), 2).repeat_interleave(rep, 1)


def attention_probs(q, keys, mask):
    """softmax(q kᵀ/√hd) over the columns: (B, h, T, S).

    q (B, h, T, hd) is rotated; keys (B, h, S, hd), mask (B, T, S).
    """
    scores = q @ keys.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)


def step_reference(q, k, v, cos, sin, prefix_k, prefix_v, own_k, own_v, layout):
    """The step. q (B, h, T, hd), k and v (B, h_kv, T, hd), prefix (N, h_kv, P, hd),
    own (B, h_kv, C, hd) -> o (B, h, T, hd).
    """
    rep = q.shape[1] // k.shape[1]

    # cached keys are stored rotated, so only q and the new k are rotated here
    keys = gather_columns(prefix_k, own_k, rotate(k, cos, sin), layout, rep)
    values = gather_columns(prefix_v, own_v, v, layout, rep)
    mask = visible_mask(layout, prefix_k.shape[2], own_k.shape[2])
    return attention_probs(rotate(q, cos, sin), keys, mask) @ values


def step_backward_reference(do, q, k, v, cos, sin, prefix_k, prefix_v, own_k, own_v, layout):
    """The gradient of `step_reference`, derived by hand, with respect to its seven tensors q, k, v,
    prefix_k, prefix_v, own_k, own_v.
    """
    N, h_kv, P, hd = prefix_k.shape
    C = own_k.shape[2]
    T = q.shape[2]
    rep = q.shape[1] // h_kv

    # the forward pass again
    q = rotate(q, cos, sin)
    keys = gather_columns(prefix_k, own_k, rotate(k, cos, sin), layout, rep)
    values = gather_columns(prefix_v, own_v, v, layout, rep)
    p = attention_probs(q, keys, visible_mask(layout, P, C))  # (B, h, T, columns)

    # through the softmax, to the scores
    delta = (do * (p @ values)).sum(-1, keepdim=True)
    ds = p * (do @ values.mT - delta) * hd**-0.5

    # to the columns; the query heads of one key head add up
    def split_columns(grad):
        return grad.unflatten(1, (h_kv, rep)).sum(2).split((P, C, T), 2)

    d_prefix_k, d_own_k, dk = split_columns(ds.mT @ q)
    d_prefix_v, d_own_v, dv = split_columns(p.mT @ do)

    # the rows that share a prefix add up
    def sum_members(grad):
        return grad.new_zeros(N, *grad.shape[1:]).index_add_(0, layout.owner, grad)

    # ds @ keys and dk are gradients of the rotated q and k: rotate them back
    dq = rotate(ds @ keys, cos, -sin)
    dk = rotate(dk, cos, -sin)
    return dq, dk, dv, sum_members(d_prefix_k), sum_members(d_prefix_v), d_own_k, d_own_v


# ---- kernels: loading and storing tiles ----------------------------------------------------------
# T     new positions of a row          HD = 2·H   size of a head, and of half a head
# REP   query heads per key head        a query   one (row, new position, query head)
#
# Tiles are padded to what a matrix instruction takes, a power of two and at least 16:
# BM queries, BN cached columns, BT new columns (T), BH numbers of half a head (H), BHD of one (HD).
#
# RoPE rotates the pairs (x[i], x[i + H]). So q and k are loaded as two tiles, x1 = x[:H] and
# x2 = x[H:]: the rotation is then elementwise, and q·k = q1·k1 + q2·k2. What is not rotated
# (v, o, do) stays in one tile.


@triton.jit
def half_ptrs(x_ptr, offsets, mask, H: tl.constexpr, BH: tl.constexpr):
    """Pointers (R, BH) to both halves of the heads at `offsets` (R,), and which elements exist."""
    i = tl.arange(0, BH)
    p_x1 = x_ptr + offsets[:, None] + i[None, :]
    p_x2 = x_ptr + offsets[:, None] + H + i[None, :]
    return p_x1, p_x2, mask[:, None] & (i < H)[None, :]


@triton.jit
def load_halves(x_ptr, offsets, mask, H: tl.constexpr, BH: tl.constexpr):
    """Both halves of the heads at `offsets` (R,), (R, BH) each; 0 where there is none."""
    p_x1, p_x2, m = half_ptrs(x_ptr, offsets, mask, H, BH)
    return tl.load(p_x1, m, 0.0), tl.load(p_x2, m, 0.0)


@triton.jit
def store_halves(x_ptr, offsets, x1, x2, mask, H: tl.constexpr, BH: tl.constexpr):
    p_x1, p_x2, m = half_ptrs(x_ptr, offsets, mask, H, BH)
    tl.store(p_x1, x1, m)
    tl.store(p_x2, x2, m)


@triton.jit
def add_halves(x_ptr, offsets, x1, x2, mask, H: tl.constexpr, BH: tl.constexpr):
    """Add to a float32 buffer. Not atomic: no other program touches these columns.

    No barrier is needed inside, since each store depends on its own load, nor between tiles, since
    a column is in one tile of one split. But each turn of the loop over queries adds to the same
    columns, perhaps from other threads, so the callers put a barrier between turns.
    """
    p_x1, p_x2, m = half_ptrs(x_ptr, offsets, mask, H, BH)
    tl.store(p_x1, tl.load(p_x1, m, 0.0) + x1, m)
    tl.store(p_x2, tl.load(p_x2, m, 0.0) + x2, m)


@triton.jit
def head_ptrs(x_ptr, offsets, mask, HD: tl.constexpr, BHD: tl.constexpr):
    """Pointers (R, BHD) to the heads at `offsets` (R,), and which elements exist."""
    i = tl.arange(0, BHD)
    return x_ptr + offsets[:, None] + i[None, :], mask[:, None] & (i < HD)[None, :]


@triton.jit
def load_heads(x_ptr, offsets, mask, HD: tl.constexpr, BHD: tl.constexpr):
    """The heads at `offsets` (R,), (R, BHD); 0 where there is none."""
    p_x, m = head_ptrs(x_ptr, offsets, mask, HD, BHD)
    return tl.load(p_x, m, 0.0)


@triton.jit
def store_heads(x_ptr, offsets, x, mask, HD: tl.constexpr, BHD: tl.constexpr):
    p_x, m = head_ptrs(x_ptr, offsets, mask, HD, BHD)
    tl.store(p_x, x, m)


@triton.jit
def add_heads(x_ptr, offsets, x, mask, HD: tl.constexpr, BHD: tl.constexpr):
    """Add to a float32 buffer. Not atomic: no other program touches these columns."""
    p_x, m = head_ptrs(x_ptr, offsets, mask, HD, BHD)
    tl.store(p_x, tl.load(p_x, m, 0.0) + x, m)


@triton.jit
def load_rotated(
    x_ptr, offsets, cos_ptr, sin_ptr, position, mask,
    dtype: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The heads at `offsets` (R,), rotated in float32 by the angles of `position` (R,), which is a
    row of the (B·T, H) tables cos and sin -> two tiles (R, BH) in `dtype`.
    """
    p_x1, p_x2, m = half_ptrs(x_ptr, offsets, mask, H, BH)
    x1 = tl.load(p_x1, m, 0.0).to(tl.float32)
    x2 = tl.load(p_x2, m, 0.0).to(tl.float32)

    # one angle for each pair (x1[i], x2[i])
    i = tl.arange(0, BH)
    c = tl.load(cos_ptr + position[:, None] * H + i[None, :], m, 0.0)
    s = tl.load(sin_ptr + position[:, None] * H + i[None, :], m, 0.0)

    # callers pass the dtype of the cached keys: a matrix product takes two operands of one dtype
    y1 = x1 * c - x2 * s
    y2 = x2 * c + x1 * s
    return y1.to(dtype), y2.to(dtype)


@triton.jit
def store_unrotated(
    x_ptr, offsets, x1, x2, cos_ptr, sin_ptr, position, mask,
    H: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """The backward pass of `load_rotated`: rotate a gradient back by the same angles; store it."""
    p_x1, p_x2, m = half_ptrs(x_ptr, offsets, mask, H, BH)
    i = tl.arange(0, BH)
    c = tl.load(cos_ptr + position[:, None] * H + i[None, :], m, 0.0)
    s = tl.load(sin_ptr + position[:, None] * H + i[None, :], m, 0.0)

    # as in `load_rotated`, with −sin
    tl.store(p_x1, x1 * c + x2 * s, m)
    tl.store(p_x2, x2 * c - x1 * s, m)


# ---- kernels: which queries, which columns -------------------------------------------------------
# `query` is the index of a query in a contiguous (B, h, T) tensor: query·HD is its place in o.


@triton.jit
def group_queries(
    members_ptr, begin, end, i_kv, h,
    T: tl.constexpr, REP: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The queries of key head i_kv of the rows members[begin : end], as many as fit into BM.

    Returns (BM,) each: row, position, head, query, and whether there is such a query.
    """
    # the tile's order: row, then position, then query head
    i_query = tl.arange(0, BM)  # in the tile
    member = begin + i_query // (T * REP)
    # a row's queries never lie in two tiles
    mask = (i_query < BM // (T * REP) * (T * REP)) & (member < end)

    # int64: the offsets computed from b can exceed 2³¹
    b = tl.load(members_ptr + member, mask, 0).to(tl.int64)
    t = (i_query // REP) % T
    head = i_kv * REP + i_query % REP
    return b, t, head, (b * h + head) * T + t, mask


@triton.jit
def row_queries(b, i_kv, first, h, T: tl.constexpr, REP: tl.constexpr, BM: tl.constexpr):
    """BM queries of row b for key head i_kv, from the `first` on.

    Returns (BM,) each: position, head, query, and whether there is such a query.
    """
    i_query = first + tl.arange(0, BM)  # among the T·REP queries of the row
    t = i_query // REP
    head = i_kv * REP + i_query % REP
    return t, head, (b * h + head) * T + t, i_query < T * REP


@triton.jit
def sees_new(t, new, slot, T: tl.constexpr):
    """Which new columns a query at position t (BM,) attends to, (BM, BT): the real ones before it,
    and itself always.
    """
    earlier = (new[None, :] < t[:, None]) & (slot >= 0)[None, :]
    itself = new[None, :] == t[:, None]
    return (earlier | itself) & (new < T)[None, :]


# ---- kernels: the arithmetic of one tile ---------------------------------------------------------


@triton.jit
def dot(a, b):
    """a·b in full precision: float32 operands are not rounded to TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def tile_scores(b_q1, b_q2, b_k1, b_k2, scale, sees):
    """Scores (BM, BN) in units of log 2, so that the softmax is exp2; −inf where a query does not
    attend.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    b_s = dot(b_q1, tl.trans(b_k1)) + dot(b_q2, tl.trans(b_k2))
    return tl.where(sees, b_s * (scale * LOG2_E), -float("inf"))


@triton.jit
def empty_softmax(BM: tl.constexpr, BHD: tl.constexpr):
    """A running softmax that has seen no column: the largest score (BM,), the sum of
    exp2(score − largest) (BM,), and the sum of the values with these weights (BM, BHD).
    """
    b_max = tl.full([BM], -float("inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_acc = tl.zeros([BM, BHD], tl.float32)
    return b_max, b_sum, b_acc


@triton.jit
def update_softmax(b_s, b_v, b_max, b_sum, b_acc):
    """Add a tile of columns, scores (BM, BN) and values (BN, BHD), to a running softmax."""
    new_max = tl.maximum(b_max, tl.max(b_s, 1))
    safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)  # −inf − −inf would be NaN
    b_p = tl.exp2(b_s - safe_max[:, None])  # (BM, BN)
    rescale = tl.exp2(b_max - safe_max)  # what was summed so far was relative to the old maximum
    b_sum = b_sum * rescale + tl.sum(b_p, 1)
    b_acc = b_acc * rescale[:, None] + dot(b_p.to(b_v.dtype), b_v)
    return new_max, b_sum, b_acc


@triton.jit
def load_upstream(
    do_ptr, do_offsets, o_ptr, lse_ptr, query, mask,
    dtype: tl.constexpr, HD: tl.constexpr, BHD: tl.constexpr,
):  # fmt: skip
    """What the backward pass knows of its queries: do (BM, BHD), Δ = do·o (BM,) and lse (BM,)."""
    # Δ = Σ_c p_c (do·v_c), which is do·o: the sum over all columns needs no pass of its own
    b_do = load_heads(do_ptr, do_offsets, mask, HD, BHD)
    b_o = load_heads(o_ptr, query * HD, mask, HD, BHD)
    b_delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)

    # lse 0 where there is no query: the scores there are −inf, and exp2(−inf − 0) is 0, not NaN
    b_lse = tl.load(lse_ptr + query, mask, 0.0)
    return b_do.to(dtype), b_delta, b_lse


@triton.jit
def tile_backward(b_s, b_lse, b_delta, b_q1, b_q2, b_do, b_k1, b_k2, b_v, scale):
    """One tile's share of the gradients: dq (BM, BH) in two halves, dk (BN, BH) in two halves,
    dv (BN, BHD).
    """
    # the weights again, and from them ds. The scores are in units of log 2, but ds is the gradient
    # of q·k itself: its factor is scale, without log₂e
    b_p = tl.exp2(b_s - b_lse[:, None])  # (BM, BN)
    b_dp = dot(b_do, tl.trans(b_v))
    b_ds = (b_p * (b_dp - b_delta[:, None]) * scale).to(b_k1.dtype)

    # dq sums over the tile's columns; dk and dv sum over its queries, hence the transposes
    b_pt = tl.trans(b_p.to(b_k1.dtype))  # (BN, BM)
    b_dst = tl.trans(b_ds)
    b_dq1 = dot(b_ds, b_k1)
    b_dq2 = dot(b_ds, b_k2)
    b_dk1 = dot(b_dst, b_q1)
    b_dk2 = dot(b_dst, b_q2)
    b_dv = dot(b_pt, b_do)
    return b_dq1, b_dq2, b_dk1, b_dk2, b_dv


# ---- kernels: forward ----------------------------------------------------------------------------


@triton.jit
def open_columns_kernel(
    is_real_ptr, n_own_ptr, n_prefix_ptr, n_before_ptr, slot_ptr, position_ptr,
    stride_real_b, stride_real_t, B, T, BLOCK: tl.constexpr,
):  # fmt: skip
    """See `open_columns`. Grid (⌈B / BLOCK⌉,)."""
    b = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = b < B
    n_own = tl.load(n_own_ptr + b, mask, other=0)
    n_prefix = tl.load(n_prefix_ptr + b, mask, other=0)
    tl.store(n_before_ptr + b, n_own, mask)

    # a row's columns one after another: a real one is the next of its own
    for t in range(T):
        is_real = tl.load(is_real_ptr + b * stride_real_b + t * stride_real_t, mask, other=0)
        tl.store(slot_ptr + b * T + t, tl.where(is_real != 0, n_own, -1), mask)
        n_own += is_real
        tl.store(position_ptr + b * T + t, tl.maximum(n_prefix + n_own - 1, 0), mask)
    tl.store(n_own_ptr + b, n_own, mask)


@triton.jit
def prefix_forward_kernel(
    q_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr,
    start_ptr, members_ptr, member_offsets_ptr,
    part_o_ptr, part_lse_ptr,
    stride_qb, stride_qh, stride_qt,
    scale, B, h, P, split_width,
    T: tl.constexpr, REP: tl.constexpr,
    H: tl.constexpr, BH: tl.constexpr, BHD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (prefix, key head, split): the softmax of the group's queries over the split's
    columns.

    Grid (N, h_kv, n_splits). BM: the queries of a mean group, at most MAX_TILE_QUERIES; BN 32.
    """
    i_n = tl.program_id(0)
    i_kv = tl.program_id(1)
    i_split = tl.program_id(2)
    HD: tl.constexpr = 2 * H
    k_dtype: tl.constexpr = k_cache_ptr.dtype.element_ty

    # the columns of this prefix and key head, (P, HD), and those of the split that are real
    cache_offset = (i_n.to(tl.int64) * tl.num_programs(1) + i_kv) * P * HD
    k_cache_ptr += cache_offset
    v_cache_ptr += cache_offset
    begin = tl.load(start_ptr + i_n)
    end = tl.minimum((i_split + 1) * split_width, P)
    first_tile = tl.maximum(i_split * split_width, begin // BN * BN)

    # the rows of the group; one turn, unless they have more queries than fit into BM
    first_member = tl.load(member_offsets_ptr + i_n)
    end_member = tl.load(member_offsets_ptr + i_n + 1)
    for member in range(first_member, end_member, BM // (T * REP)):
        # load the group's queries
        b, t, head, query, mask = group_queries(
            members_ptr, member, end_member, i_kv, h, T, REP, BM
        )
        q_offsets = b * stride_qb + head * stride_qh + t * stride_qt
        b_q1, b_q2 = load_rotated(
            q_ptr, q_offsets, cos_ptr, sin_ptr, b * T + t, mask, k_dtype, H, BH
        )  # (BM, BH)

        # loop over the split's columns
        b_max, b_sum, b_acc = empty_softmax(BM, BHD)
        for tile in range(first_tile, end, BN):
            column = tile + tl.arange(0, BN)
            is_real = (column >= begin) & (column < end)
            b_k1, b_k2 = load_halves(k_cache_ptr, column * HD, is_real, H, BH)  # (BN, BH)
            b_s = tile_scores(b_q1, b_q2, b_k1, b_k2, scale, is_real[None, :])  # (BM, BN)
            b_v = load_heads(v_cache_ptr, column * HD, is_real, HD, BHD)  # (BN, BHD)
            b_max, b_sum, b_acc = update_softmax(b_s, b_v, b_max, b_sum, b_acc)

        # store the part; a split of padding alone has o = 0 and lse = −inf, and so no weight
        has_columns = b_sum > 0.0
        b_sum = tl.where(has_columns, b_sum, 1.0)
        b_lse = tl.where(has_columns, b_max + tl.log2(b_sum), -float("inf"))
        part = query + i_split.to(tl.int64) * B * h * T
        store_heads(part_o_ptr, part * HD, b_acc / b_sum[:, None], mask, HD, BHD)
        tl.store(part_lse_ptr + part, b_lse, mask)


@triton.jit
def own_forward_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr,
    n_own_ptr, slot_ptr,
    part_o_ptr, part_lse_ptr, o_ptr, lse_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt,
    scale, B, h, C, n_splits,
    T: tl.constexpr, REP: tl.constexpr,
    H: tl.constexpr, BH: tl.constexpr, BHD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Program (row, key head): append the new columns, attend to the row's own columns, and join
    the prefix's parts.

    Grid (B, h_kv). BM: all T·REP queries of the row, at least 16; BN 32. At T = 1 and 4 query heads
    for a key head, 4 of the 16 rows of the tile are queries and the others are padding.
    """
    b = tl.program_id(0).to(tl.int64)
    i_kv = tl.program_id(1)
    HD: tl.constexpr = 2 * H
    k_dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
    v_dtype: tl.constexpr = v_cache_ptr.dtype.element_ty

    # the own columns of this row and key head, (C, HD)
    cache_offset = (b * tl.num_programs(1) + i_kv) * C * HD
    k_cache_ptr += cache_offset
    v_cache_ptr += cache_offset

    # load the row's queries
    t, head, query, mask = row_queries(b, i_kv, 0, h, T, REP, BM)
    q_offsets = b * stride_qb + head * stride_qh + t * stride_qt
    b_q1, b_q2 = load_rotated(
        q_ptr, q_offsets, cos_ptr, sin_ptr, b * T + t, mask, k_dtype, H, BH
    )  # (BM, BH)

    # load the new columns
    new = tl.arange(0, BT)
    is_new = new < T
    k_offsets = b * stride_kb + i_kv * stride_kh + new * stride_kt
    v_offsets = b * stride_vb + i_kv * stride_vh + new * stride_vt
    new_k1, new_k2 = load_rotated(
        k_ptr, k_offsets, cos_ptr, sin_ptr, b * T + new, is_new, k_dtype, H, BH
    )  # (BT, BH)
    new_v = load_heads(v_ptr, v_offsets, is_new, HD, BHD).to(v_dtype)  # (BT, BHD)

    # append those that are real
    slot = tl.load(slot_ptr + b * T + new, is_new, -1)
    store_halves(k_cache_ptr, slot * HD, new_k1, new_k2, slot >= 0, H, BH)
    store_heads(v_cache_ptr, slot * HD, new_v, slot >= 0, HD, BHD)

    # attend to the new columns, which are still in registers
    b_max, b_sum, b_acc = empty_softmax(BM, BHD)
    new_s = tile_scores(b_q1, b_q2, new_k1, new_k2, scale, sees_new(t, new, slot, T))  # (BM, BT)
    b_max, b_sum, b_acc = update_softmax(new_s, new_v, b_max, b_sum, b_acc)

    # loop over the own columns of earlier steps: n_own does not count those appended above
    n_own = tl.load(n_own_ptr + b)
    for tile in range(0, n_own, BN):
        column = tile + tl.arange(0, BN)
        is_own = column < n_own
        b_k1, b_k2 = load_halves(k_cache_ptr, column * HD, is_own, H, BH)  # (BN, BH)
        b_s = tile_scores(b_q1, b_q2, b_k1, b_k2, scale, is_own[None, :])  # (BM, BN)
        b_v = load_heads(v_cache_ptr, column * HD, is_own, HD, BHD)  # (BN, BHD)
        b_max, b_sum, b_acc = update_softmax(b_s, b_v, b_max, b_sum, b_acc)

    # join the prefix's splits: a part is like one more tile, whose largest score is its lse and
    # whose sum is 1. tl.full makes an int64 of the loop index, which has no .to() under the
    # interpreter: there it is a Python int
    for split in range(n_splits):
        part = query + tl.full([], split, tl.int64) * B * h * T
        part_lse = tl.load(part_lse_ptr + part, mask, -float("inf"))

        # a query that does not exist may have seen no column: with a maximum of 0 it gets no NaN
        new_max = tl.where(mask, tl.maximum(b_max, part_lse), 0.0)
        rescale = tl.exp2(b_max - new_max)
        weight = tl.exp2(part_lse - new_max)
        part_o = load_heads(part_o_ptr, part * HD, mask, HD, BHD)
        b_acc = b_acc * rescale[:, None] + weight[:, None] * part_o
        b_sum = b_sum * rescale + weight
        b_max = new_max

    # store o and lse; each query has seen itself, so its sum is not 0
    b_sum = tl.where(mask, b_sum, 1.0)
    store_heads(o_ptr, query * HD, b_acc / b_sum[:, None], mask, HD, BHD)
    tl.store(lse_ptr + query, b_max + tl.log2(b_sum), mask)


# ---- kernels: backward ---------------------------------------------------------------------------


@triton.jit
def prefix_backward_kernel(
    q_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, k_grad_ptr, v_grad_ptr,
    start_ptr, members_ptr, member_offsets_ptr,
    do_ptr, o_ptr, lse_ptr, part_dq_ptr,
    stride_qb, stride_qh, stride_qt, stride_dob, stride_doh, stride_dot,
    scale, B, h, P, split_width,
    T: tl.constexpr, REP: tl.constexpr,
    H: tl.constexpr, BH: tl.constexpr, BHD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program (prefix, key head, split): add the group's dk and dv to the split's columns, and
    store the split's share of dq, which is still rotated.

    Grid (N, h_kv, n_splits). BM: the queries of a mean group, at most MAX_TILE_QUERIES; BN 16.
    """
    i_n = tl.program_id(0)
    i_kv = tl.program_id(1)
    i_split = tl.program_id(2)
    HD: tl.constexpr = 2 * H
    k_dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
    v_dtype: tl.constexpr = v_cache_ptr.dtype.element_ty

    # the columns of this prefix and key head, (P, HD), and those of the split that are real
    cache_offset = (i_n.to(tl.int64) * tl.num_programs(1) + i_kv) * P * HD
    k_cache_ptr += cache_offset
    v_cache_ptr += cache_offset
    k_grad_ptr += cache_offset
    v_grad_ptr += cache_offset
    begin = tl.load(start_ptr + i_n)
    end = tl.minimum((i_split + 1) * split_width, P)
    first_tile = tl.maximum(i_split * split_width, begin // BN * BN)

    # turns over the rows of the group, as in the forward kernel
    first_member = tl.load(member_offsets_ptr + i_n)
    end_member = tl.load(member_offsets_ptr + i_n + 1)
    for member in range(first_member, end_member, BM // (T * REP)):
        # load the group's queries and the gradients of their results
        b, t, head, query, mask = group_queries(
            members_ptr, member, end_member, i_kv, h, T, REP, BM
        )
        q_offsets = b * stride_qb + head * stride_qh + t * stride_qt
        do_offsets = b * stride_dob + head * stride_doh + t * stride_dot
        b_q1, b_q2 = load_rotated(
            q_ptr, q_offsets, cos_ptr, sin_ptr, b * T + t, mask, k_dtype, H, BH
        )  # (BM, BH)
        b_do, b_delta, b_lse = load_upstream(
            do_ptr, do_offsets, o_ptr, lse_ptr, query, mask, v_dtype, HD, BHD
        )

        # loop over the split's columns
        b_dq1 = tl.zeros([BM, BH], tl.float32)
        b_dq2 = tl.zeros([BM, BH], tl.float32)
        for tile in range(first_tile, end, BN):
            column = tile + tl.arange(0, BN)
            is_real = (column >= begin) & (column < end)
            b_k1, b_k2 = load_halves(k_cache_ptr, column * HD, is_real, H, BH)  # (BN, BH)
            sees = is_real[None, :] & mask[:, None]
            b_s = tile_scores(b_q1, b_q2, b_k1, b_k2, scale, sees)  # (BM, BN)
            b_v = load_heads(v_cache_ptr, column * HD, is_real, HD, BHD)  # (BN, BHD)
            dq1, dq2, b_dk1, b_dk2, b_dv = tile_backward(
                b_s, b_lse, b_delta, b_q1, b_q2, b_do, b_k1, b_k2, b_v, scale
            )

            # dq stays in registers until the split ends; dk and dv join what other steps have added
            b_dq1 += dq1
            b_dq2 += dq2
            add_halves(k_grad_ptr, column * HD, b_dk1, b_dk2, is_real, H, BH)
            add_heads(v_grad_ptr, column * HD, b_dv, is_real, HD, BHD)

        # store the split's share of dq; own_backward_kernel adds them up and rotates the sum back
        part = query + i_split.to(tl.int64) * B * h * T
        store_halves(part_dq_ptr, part * HD, b_dq1, b_dq2, mask, H, BH)

        # The next turn of the loop reads and writes the same gradient columns. The barrier orders
        # this program's reads and writes between turns: without it, a thread that is ahead could
        # read a column before another has written its sum.
        tl.debug_barrier()


@triton.jit
def own_backward_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, k_grad_ptr, v_grad_ptr,
    n_own_ptr, slot_ptr,
    do_ptr, o_ptr, lse_ptr, part_dq_ptr, dq_ptr, dk_ptr, dv_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, stride_dob, stride_doh, stride_dot,
    scale, B, h, C, n_splits,
    T: tl.constexpr, REP: tl.constexpr,
    H: tl.constexpr, BH: tl.constexpr, BHD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Program (row, key head): add dk and dv to the own columns, collect what was added to the new
    ones, and finish dq, dk and dv.

    Grid (B, h_kv). BM 16, BN 16. It takes BM queries at a time, so that the registers suffice
    however many queries the row has.
    """
    b = tl.program_id(0).to(tl.int64)
    i_kv = tl.program_id(1)
    HD: tl.constexpr = 2 * H
    k_dtype: tl.constexpr = k_cache_ptr.dtype.element_ty
    v_dtype: tl.constexpr = v_cache_ptr.dtype.element_ty

    # the own columns of this row and key head, (C, HD)
    cache_offset = (b * tl.num_programs(1) + i_kv) * C * HD
    k_cache_ptr += cache_offset
    v_cache_ptr += cache_offset
    k_grad_ptr += cache_offset
    v_grad_ptr += cache_offset
    n_own = tl.load(n_own_ptr + b)

    # load the new columns, not from the cache: those that are not real have no place there
    new = tl.arange(0, BT)
    is_new = new < T
    k_offsets = b * stride_kb + i_kv * stride_kh + new * stride_kt
    v_offsets = b * stride_vb + i_kv * stride_vh + new * stride_vt
    new_k1, new_k2 = load_rotated(
        k_ptr, k_offsets, cos_ptr, sin_ptr, b * T + new, is_new, k_dtype, H, BH
    )  # (BT, BH)
    new_v = load_heads(v_ptr, v_offsets, is_new, HD, BHD).to(v_dtype)  # (BT, BHD)

    # their gradients begin with what later steps added
    slot = tl.load(slot_ptr + b * T + new, is_new, -1)
    new_dk1, new_dk2 = load_halves(k_grad_ptr, slot * HD, slot >= 0, H, BH)  # (BT, BH)
    new_dv = load_heads(v_grad_ptr, slot * HD, slot >= 0, HD, BHD)  # (BT, BHD)

    for first in range(0, T * REP, BM):
        # load the row's queries and the gradients of their results
        t, head, query, mask = row_queries(b, i_kv, first, h, T, REP, BM)
        q_offsets = b * stride_qb + head * stride_qh + t * stride_qt
        do_offsets = b * stride_dob + head * stride_doh + t * stride_dot
        b_q1, b_q2 = load_rotated(
            q_ptr, q_offsets, cos_ptr, sin_ptr, b * T + t, mask, k_dtype, H, BH
        )  # (BM, BH)
        b_do, b_delta, b_lse = load_upstream(
            do_ptr, do_offsets, o_ptr, lse_ptr, query, mask, v_dtype, HD, BHD
        )

        # the new columns: their dk and dv add up in registers, over all queries of the row
        sees_new_columns = sees_new(t, new, slot, T) & mask[:, None]
        new_s = tile_scores(b_q1, b_q2, new_k1, new_k2, scale, sees_new_columns)  # (BM, BT)
        b_dq1, b_dq2, add_dk1, add_dk2, add_dv = tile_backward(
            new_s, b_lse, b_delta, b_q1, b_q2, b_do, new_k1, new_k2, new_v, scale
        )
        new_dk1 += add_dk1
        new_dk2 += add_dk2
        new_dv += add_dv

        # the prefix's splits: their shares of dq
        for split in range(n_splits):
            part = query + tl.full([], split, tl.int64) * B * h * T
            part_dq1, part_dq2 = load_halves(part_dq_ptr, part * HD, mask, H, BH)
            b_dq1 += part_dq1
            b_dq2 += part_dq2

        # loop over the own columns of earlier steps
        for tile in range(0, n_own, BN):
            column = tile + tl.arange(0, BN)
            is_own = column < n_own
            b_k1, b_k2 = load_halves(k_cache_ptr, column * HD, is_own, H, BH)  # (BN, BH)
            sees = is_own[None, :] & mask[:, None]
            b_s = tile_scores(b_q1, b_q2, b_k1, b_k2, scale, sees)  # (BM, BN)
            b_v = load_heads(v_cache_ptr, column * HD, is_own, HD, BHD)  # (BN, BHD)
            dq1, dq2, b_dk1, b_dk2, b_dv = tile_backward(
                b_s, b_lse, b_delta, b_q1, b_q2, b_do, b_k1, b_k2, b_v, scale
            )
            b_dq1 += dq1
            b_dq2 += dq2
            add_halves(k_grad_ptr, column * HD, b_dk1, b_dk2, is_own, H, BH)
            add_heads(v_grad_ptr, column * HD, b_dv, is_own, HD, BHD)

        # dq is complete: every column that these queries attend to has added its share
        store_unrotated(dq_ptr, query * HD, b_dq1, b_dq2, cos_ptr, sin_ptr, b * T + t, mask, H, BH)

        # As in the prefix: the next queries add to the same columns. And the new columns must have
        # been read by all threads before they are cleared.
        tl.debug_barrier()

    # clear the buffers at the new columns
    zero_half = tl.zeros([BT, BH], tl.float32)
    store_halves(k_grad_ptr, slot * HD, zero_half, zero_half, slot >= 0, H, BH)
    store_heads(v_grad_ptr, slot * HD, tl.zeros([BT, BHD], tl.float32), slot >= 0, HD, BHD)

    # store dk and dv of the new columns, contiguous (B, h_kv, T, HD)
    new_row = (b * tl.num_programs(1) + i_kv) * T + new
    store_unrotated(
        dk_ptr, new_row * HD, new_dk1, new_dk2, cos_ptr, sin_ptr, b * T + new, is_new, H, BH
    )
    store_heads(dv_ptr, new_row * HD, new_dv, is_new, HD, BHD)


# ---- launches ------------------------------------------------------------------------------------
# A tile has BM queries and BN columns. BN is smaller backward because of the registers: a tile of
# the backward pass also holds do and five products. own_backward_kernel takes its queries 16 at a
# time: beyond that there are more turns of its loop, and not more registers.
#
# To change a tile: BM, BN and BT are powers of two, and at least 16 (tl.dot). A split need not be a
# multiple of BN, since columns past its end are masked, but then its last tile is partly empty. All
# kernels run with Triton's 3 stages, and with its 4 warps but for own_forward_kernel, whose
# programs have little work: with 128 rows on an H200, 2 warps take 7.6 µs and 4 take 11.6. (With 32
# rows the others are slower with 2, and prefix_forward_kernel needs all registers with 1.) The
# tests shrink MIN_SPLIT_COLUMNS and MAX_TILE_QUERIES, so that few columns make several splits and
# turns. Check registers and spills with python -m kernels.compile_report.
FORWARD_BN = 32
BACKWARD_BN = 16
OWN_WARPS = 2


def head_constants(h, h_kv, hd, T):
    """The compile-time sizes that all four kernels share."""
    H = hd // 2
    return dict(T=T, REP=h // h_kv, H=H, BH=next_power_of_2(H, 16), BHD=next_power_of_2(hd, 16))


def query_tile(n_rows, queries_per_row):
    """BM for a program that takes the queries of n_rows rows: all of them, or as many rows at a
    time as MAX_TILE_QUERIES allows, one at least. Rounded up to a power of two.
    """
    most = max(MAX_TILE_QUERIES, queries_per_row)
    return next_power_of_2(min(n_rows * queries_per_row, most), 16)


def split_prefix(P, n_programs):
    """(number of splits, columns in each) of P prefix columns, for a grid of n_programs × splits:
    enough to fill the device, but at most ⌈P / MIN_SPLIT_COLUMNS⌉. A width is a multiple of
    FORWARD_BN, so 139 columns are two splits of 96 and 43.
    """
    most = ceil_div(P, MIN_SPLIT_COLUMNS)
    wanted = ceil_div(TARGET_PROGRAMS, n_programs)
    n_splits = max(1, min(most, wanted))

    # whole tiles; as the width is rounded up, fewer splits may be enough
    width = max(1, ceil_div(ceil_div(P, n_splits), FORWARD_BN)) * FORWARD_BN
    return max(1, ceil_div(P, width)), width


def open_columns(is_real, n_own, n_prefix):
    """Give every row new columns, real where is_real (B, T) bool. n_own (B,): own columns of each
    row, updated in place; n_prefix (B,): real columns of its prefix.

    Returns n_own as it was (B,) and the slots (B, T), int32, and the positions (B, T): where there
    is no real column, that of the last one.
    """
    B, T = is_real.shape
    n_before = n_own.new_empty(B, dtype=torch.int32)
    slot = n_own.new_empty(B, T, dtype=torch.int32)
    position = n_own.new_empty(B, T)
    open_columns_kernel[(ceil_div(B, 128),)](
        is_real.view(torch.uint8), n_own, n_prefix, n_before, slot, position,
        *is_real.stride(), B, T, BLOCK=128,
    )  # fmt: skip
    return n_before, slot, position


def run_forward(inputs, prefix, own, layout):
    """One step. Writes the new columns of `inputs` (StepInputs) to `own` (KV) at layout.slot.

    prefix (KV): (N, h_kv, P, hd); own (KV): (B, h_kv, C, hd). Returns o (B, h, T, hd), and its lse
    (B, h, T) float32 in units of log 2.
    """
    q, k, v, cos, sin = inputs
    B, h, T, hd = q.shape
    N, h_kv, P, _ = prefix.k.shape
    C = own.k.shape[2]
    scale = hd**-0.5
    constants = head_constants(h, h_kv, hd, T)
    queries_per_row = T * h // h_kv
    n_splits, split_width = split_prefix(P, N * h_kv)

    # the parts are float32, so that o is rounded once, when they are joined
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    part_o = q.new_empty(n_splits, B, h, T, hd, dtype=torch.float32)
    part_lse = q.new_empty(n_splits, B, h, T, dtype=torch.float32)
    lse = q.new_empty(B, h, T, dtype=torch.float32)

    # the second launch reads the parts that the first has written: kernels of a stream run in order
    prefix_forward_kernel[(N, h_kv, n_splits)](
        q, cos, sin, prefix.k, prefix.v,
        layout.start, layout.members, layout.member_offsets,
        part_o, part_lse,
        *q.stride()[:3],
        scale, B, h, P, split_width,
        **constants, BM=query_tile(layout.mean_group, queries_per_row), BN=FORWARD_BN,
    )  # fmt: skip
    own_forward_kernel[(B, h_kv)](
        q, k, v, cos, sin, own.k, own.v,
        layout.n_own, layout.slot,
        part_o, part_lse, o, lse,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        scale, B, h, C, n_splits,
        **constants, BM=query_tile(1, queries_per_row), BN=FORWARD_BN, BT=next_power_of_2(T, 16),
        num_warps=OWN_WARPS,
    )  # fmt: skip
    return o, lse


def run_backward(do, o, lse, inputs, caches, grads, layout):
    """dq, dk, dv of a step whose results were o and lse.

    caches: (prefix, own), as in `run_forward`; grads: their float32 gradient buffers, likewise a
    pair of KV. Adds to the buffers, and clears own's at layout.slot.
    """
    q, k, v, cos, sin = inputs
    prefix, own = caches
    prefix_grad, own_grad = grads
    B, h, T, hd = q.shape
    N, h_kv, P, _ = prefix.k.shape
    C = own.k.shape[2]
    scale = hd**-0.5
    constants = head_constants(h, h_kv, hd, T)
    queries_per_row = T * h // h_kv
    n_splits, split_width = split_prefix(P, N * h_kv)

    # dq, dk and dv are contiguous, whatever the strides of q, k and v
    part_dq = q.new_empty(n_splits, B, h, T, hd, dtype=torch.float32)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk = torch.empty_like(k, memory_format=torch.contiguous_format)
    dv = torch.empty_like(v, memory_format=torch.contiguous_format)

    # the prefix first, again: own_backward_kernel needs its shares of dq
    prefix_backward_kernel[(N, h_kv, n_splits)](
        q, cos, sin, prefix.k, prefix.v, prefix_grad.k, prefix_grad.v,
        layout.start, layout.members, layout.member_offsets,
        do, o, lse, part_dq,
        *q.stride()[:3], *do.stride()[:3],
        scale, B, h, P, split_width,
        **constants, BM=query_tile(layout.mean_group, queries_per_row), BN=BACKWARD_BN,
    )  # fmt: skip
    own_backward_kernel[(B, h_kv)](
        q, k, v, cos, sin, own.k, own.v, own_grad.k, own_grad.v,
        layout.n_own, layout.slot,
        do, o, lse, part_dq, dq, dk, dv,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3],
        scale, B, h, C, n_splits,
        **constants, BM=16, BN=BACKWARD_BN, BT=next_power_of_2(T, 16),
    )  # fmt: skip
    return dq, dk, dv
