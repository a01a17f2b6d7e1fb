"""Linear cross-entropy: −log p of each target from hidden states, with the logits never in memory.

    forward    l_v = β·h·W_v,  lse = log Σ_v exp(l_v),  nll = lse − l_target,  β = 1/temperature
    backward   with g the gradient of a row's nll (any number: in REINFORCE it is an advantage)
               dl_v = g·β·(exp(l_v − lse) − [v = target]),  dh = dl·W,  dW = dlᵀ·h

With LLaMA's 128,259 tokens, the logits would be by far the largest tensor of a training step.

Forward: a program takes a block of rows and a share of the vocabulary. It walks its share tile by
tile with a running maximum and a running sum of exponentials, so that nothing overflows. It leaves
three numbers per row, 12 bytes: the maximum, the sum, and the target's logit (0 if the target is in
another share). PyTorch then joins the shares.

Backward: the tiles of logits are computed again and stored as dl, for all R rows and one chunk of
the vocabulary at a time. cuBLAS computes the two products with dl: the chunk's rows of dW, which
are then finished, and the chunk's part of dh. A row without a target (IGNORE) has an nll, dl and dh
of 0, whatever its hidden state holds. For dW that state must be finite: the product adds 0·h, and
0·NaN is NaN.

Bytes with 16-bit products: h and W are read once each, if the blocks of rows that run at the same
time share a tile of W in the L2 cache (so they are the grid's first axis). W is a copy, which is
written again after each step of the optimizer: 6·V·D bytes if W is float32. The backward pass also
moves dl, 2·R·V bytes, written once and read twice; it writes dW once, in float32, 4·V·D; and each
chunk adds its product to dh in float32, 16·R·D bytes.
(Chunks of rows would add to dW instead, and V is far larger than R.)
Operations for R rows: 2·R·V·D forward and 6·R·V·D backward, a third of them for the logits again.
"""

import torch
import torch.nn.functional as F

from .common import (
    as_rows,
    ceil_div,
    kept_copy,
    mm_float32,
    next_power_of_2,
    tl,
    triton,
    upcast,
)

IGNORE = -100  # the target of a position that has none, as in PyTorch
DL_ELEMENTS = 2**27  # of dl that are in memory at a time: 268 MB in 16 bits

# The most shares of the vocabulary in the forward pass: 1,024 rows are only 8 blocks of rows, too
# few programs for a large GPU. A share is a whole number of tiles, so 128,259 tokens make 63 shares
# and 504 programs. (With 3,200 rows, too, 64 were faster on an H200 than 16: 3.8 against 4.4 ms.)
SHARES = 64

# Tiles for 16-bit inputs: rows and tokens of a tile, and columns of h multiplied at a time
HALF_PRECISION_BLOCKS = {
    "BLOCK_ROWS": 128,
    "BLOCK_V": 128,
    "BLOCK_D": 64,
    "num_warps": 8,
    "num_stages": 3,
}


# ---- PyTorch references --------------------------------------------------------------------------


def token_nll(logits, target):
    """−log p of each target, float32, 0 at IGNORE: logits (..., V), target (...) -> (...)."""
    V = logits.shape[-1]
    nll = F.cross_entropy(
        upcast(logits).reshape(-1, V),
        target.reshape(-1),
        ignore_index=IGNORE,
        reduction="none",
    )
    return nll.view(target.shape)


def linear_nll(h, W, target, temperature=1.0):
    """Return −log p of each target under softmax(h·Wᵀ/temperature).

    h (..., D), W (V, D), target (...) -> (...). 0 at IGNORE.
    """
    logits = F.linear(h, W)  # (..., V)
    if temperature != 1:
        logits = logits / temperature
    return token_nll(logits, target)


def linear_nll_backward(g, h, W, target, temperature):
    """Return (dh, dW) of `linear_nll` for h (R, D). g (R,) is the gradient of each row's nll."""
    has_target = (target != IGNORE)[:, None]
    p = (h @ W.T / temperature).softmax(1)  # (R, V)

    # dl = g·β·(p − one_hot(target)). A row without a target has none.
    column = target.clamp(min=0)[:, None]
    dl = p.scatter_add(1, column, -has_target.to(h.dtype))
    dl = torch.where(has_target, dl * g[:, None] / temperature, 0.0)
    return dl @ W, dl.T @ h


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def logits_tile(
    h_ptr, W_ptr,
    row_ids, v_ids,
    R, V, D,
    h_row_stride, W_row_stride,
    BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Return h[row_ids]·W[v_ids]ᵀ, (BLOCK_ROWS, BLOCK_V) float32."""
    # A product over all of D is added up from slices of BLOCK_D columns, which fit on the chip.
    logits = tl.zeros([BLOCK_ROWS, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        col_ids = start + tl.arange(0, BLOCK_D)
        h_ptrs = h_ptr + row_ids[:, None] * h_row_stride + col_ids[None, :]
        h_mask = (row_ids < R)[:, None] & (col_ids < D)[None, :]
        h = tl.load(h_ptrs, h_mask, other=0.0)  # (BLOCK_ROWS, BLOCK_D)
        W_ptrs = W_ptr + v_ids[:, None] * W_row_stride + col_ids[None, :]
        W_mask = (v_ids < V)[:, None] & (col_ids < D)[None, :]
        W = tl.load(W_ptrs, W_mask, other=0.0)  # (BLOCK_V, BLOCK_D)

        # "ieee": float32 inputs, which tests and --dtype float32 have, are not rounded to TF32.
        logits = tl.dot(h, tl.trans(W), logits, input_precision="ieee")
    return logits


@triton.jit
def linear_nll_forward_kernel(
    h_ptr, W_ptr, target_ptr, max_ptr, sum_ptr, target_logit_ptr,
    R, V, D,
    h_row_stride, W_row_stride,
    inverse_temperature, share_size,
    BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: a block of rows and a share of the vocabulary, share_size tokens.

    Writes the share's part of the softmax: max, sum and target_logit, each (shares, R) float32.
    """
    row_ids = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    row_mask = row_ids < R
    share = tl.program_id(1)

    # No token is −1 or IGNORE: where there is no target, its logit stays 0.
    target = tl.load(target_ptr + row_ids, row_mask, other=-1)

    # Over the tiles so far: the largest logit, Σ exp(logit − largest), and the target's logit
    running_max = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_ROWS], tl.float32)
    target_logit = tl.zeros([BLOCK_ROWS], tl.float32)

    # Walk the share. The last one may be shorter than the others.
    share_start = share * share_size
    share_end = tl.minimum((share + 1) * share_size, V)
    for start in range(share_start, share_end, BLOCK_V):
        v_ids = start + tl.arange(0, BLOCK_V).to(tl.int64)
        v_mask = (v_ids < V)[None, :]  # (1, BLOCK_V)
        logits = logits_tile(
            h_ptr, W_ptr,
            row_ids, v_ids,
            R, V, D,
            h_row_stride, W_row_stride,
            BLOCK_ROWS, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        logits = tl.where(v_mask, logits * inverse_temperature, -float("inf"))

        # A new maximum rescales the sum so far. Every tile has a token, so new_max is finite, and
        # at the first tile the old sum counts 0·exp(−inf) = 0.
        new_max = tl.maximum(running_max, tl.max(logits, 1))
        rescale = tl.exp(running_max - new_max)
        running_sum = running_sum * rescale + tl.sum(tl.exp(logits - new_max[:, None]), 1)
        running_max = new_max

        # At most one tile of one share has the target; the others add 0.
        is_target = v_ids[None, :] == target[:, None]
        target_logit += tl.sum(tl.where(is_target, logits, 0.0), 1)

    # A program owns its entries of the three results, so nothing is atomic.
    out_offsets = share * R + row_ids
    tl.store(max_ptr + out_offsets, running_max, row_mask)
    tl.store(sum_ptr + out_offsets, running_sum, row_mask)
    tl.store(target_logit_ptr + out_offsets, target_logit, row_mask)


@triton.jit
def linear_nll_backward_kernel(
    h_ptr, W_ptr, target_ptr, lse_ptr, g_ptr, dl_ptr,
    R, V, D,
    h_row_stride, W_row_stride, dl_row_stride,
    inverse_temperature, chunk_start,
    BLOCK_ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: one tile of dl, BLOCK_ROWS × BLOCK_V.

    W and dl are a chunk of the vocabulary, V tokens from chunk_start on.
    """
    row_ids = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    v_ids = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_mask = row_ids < R
    target = tl.load(target_ptr + row_ids, row_mask, other=-1)

    # The same logits as in the forward pass, and their softmax
    logits = logits_tile(
        h_ptr, W_ptr,
        row_ids, v_ids,
        R, V, D,
        h_row_stride, W_row_stride,
        BLOCK_ROWS, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    logits = logits * inverse_temperature
    lse = tl.load(lse_ptr + row_ids, row_mask, other=0.0)
    p = tl.exp(logits - lse[:, None])  # (BLOCK_ROWS, BLOCK_V)

    # dl = g·β·(p − one_hot(target)), and 0 in a row without a target, even if it holds NaN
    is_target = chunk_start + v_ids[None, :] == target[:, None]
    p_minus_one_hot = tl.where(is_target, p - 1.0, p)
    has_target = target >= 0
    g = tl.load(g_ptr + row_ids, row_mask, other=0.0) * inverse_temperature
    g = tl.where(has_target, g, 0.0)
    dl = tl.where(has_target[:, None], p_minus_one_hot * g[:, None], 0.0)

    # The store rounds dl to the dtype of h, for the products. dl has room for whole tiles, so no
    # column is masked and a thread stores 16 bytes at a time. The columns past V are 0.
    dl = tl.where((v_ids < V)[None, :], dl, 0.0)
    dl_ptrs = dl_ptr + row_ids[:, None] * dl_row_stride + v_ids[None, :]
    tl.store(dl_ptrs, dl, row_mask[:, None])


# ---- launches, under autograd --------------------------------------------------------------------


def product_blocks(h, V):
    """Return the tile sizes for hidden states h (R, D) and V tokens.

    16 bits: those of the matrix instruction. float32, which tests and --dtype float32 use: few
    programs.
    """
    if h.element_size() <= 2:
        return HALF_PRECISION_BLOCKS
    return {
        "BLOCK_ROWS": next_power_of_2(min(h.shape[0], 32), 16),
        "BLOCK_V": next_power_of_2(min(V, 256), 16),
        "BLOCK_D": 32,
    }


def chunk_width(R, V, tile):
    """Return how many tokens have their dl in memory at a time: whole tiles, at least one."""
    widest = ceil_div(V, tile) * tile
    return min(widest, max(tile, DL_ELEMENTS // R // tile * tile))


def product_copy(W, dtype):
    """Return W (V, D) in dtype. In 16 bits it gets rows of zeros up to a multiple of 16.

    With an odd V the products dl·W and h·Wᵀ would be loaded or stored 2 bytes at a time. Then the
    rows of `logits` are a multiple of 16 apart, too, so that sampling.py's loads are aligned.
    """
    return kept_copy([W], dtype, multiple=16 if dtype.itemsize == 2 else 1)


class LinearNLL(torch.autograd.Function):
    """h (R, D), W (V, D), W_copy, target (R,) -> −log p (R,) float32.

    W_copy is product_copy(W) in h's dtype, the dtype of the products. The gradient of a float32 W
    is not rounded to it.
    """

    @staticmethod
    def forward(ctx, h, W, W_copy, target, inverse_temperature):
        R, D = h.shape
        V = W.shape[0]
        blocks = product_blocks(h, V)

        # Each share is a whole number of tiles.
        tiles_per_share = ceil_div(ceil_div(V, SHARES), blocks["BLOCK_V"])
        share_size = tiles_per_share * blocks["BLOCK_V"]
        shares = ceil_div(V, share_size)

        # What the programs leave of a row's logits: three numbers for each share
        share_max = h.new_empty(shares, R, dtype=torch.float32)
        share_sum = h.new_empty(shares, R, dtype=torch.float32)
        target_logit = h.new_empty(shares, R, dtype=torch.float32)
        grid = (ceil_div(R, blocks["BLOCK_ROWS"]), shares)
        linear_nll_forward_kernel[grid](
            h, W_copy, target, share_max, share_sum, target_logit,
            R, V, D,
            h.stride(0), W_copy.stride(0),
            inverse_temperature, share_size,
            **blocks,
        )  # fmt: skip

        # Join the shares. One of them has the target's logit; the others have 0.
        lse = (share_max + share_sum.log()).logsumexp(0)
        ctx.save_for_backward(h, W_copy, target, lse)
        ctx.V = V
        ctx.W_dtype = W.dtype
        ctx.inverse_temperature = inverse_temperature
        return torch.where(target == IGNORE, 0.0, lse - target_logit.sum(0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        h, W, target, lse = ctx.saved_tensors
        R, D = h.shape
        V = ctx.V
        blocks = product_blocks(h, V)
        g = g.float().contiguous()

        # dh is a sum over chunks: in 16 bits, each addition would round it. A chunk has all of its
        # rows of dW. A frozen W needs none.
        dh = h.new_zeros(R, D, dtype=torch.float32)
        dW = W.new_empty(V, D, dtype=torch.float32) if ctx.needs_input_grad[1] else None

        # dl of one chunk of the vocabulary at a time. Its rows begin at multiples of a tile.
        width = chunk_width(R, V, blocks["BLOCK_V"])
        dl = h.new_empty(R, width)

        for start in range(0, V, width):
            chunk = slice(start, min(start + width, V))
            n_tokens = chunk.stop - start
            grid = (ceil_div(R, blocks["BLOCK_ROWS"]), ceil_div(n_tokens, blocks["BLOCK_V"]))
            linear_nll_backward_kernel[grid](
                h, W[chunk], target, lse, g, dl,
                R, n_tokens, D,
                h.stride(0), W.stride(0), dl.stride(0),
                ctx.inverse_temperature, start,
                **blocks,
            )  # fmt: skip

            # The next chunk overwrites dl, so both of its products are taken here. That of dh goes
            # on over the rows of zeros that W may end with.
            W_chunk = W[start : start + width]
            dh += mm_float32(dl[:, : len(W_chunk)], W_chunk)
            if dW is not None:
                mm_float32(dl[:, :n_tokens].T, h, out=dW[chunk])

        return dh.to(h.dtype), None if dW is None else dW.to(ctx.W_dtype), None, None, None


def fused_linear_nll(h, W, target, temperature=1.0):
    """Return what `linear_nll` returns, from the kernels. h has the dtype of the products.

    A target is IGNORE or 0 … V − 1; this is not checked.
    """
    h_rows = as_rows(h)

    # No rows: nothing to launch. The result still depends on h, for autograd.
    if len(h_rows) == 0:
        return h_rows.sum(1).float().view(target.shape)

    # The kernels take neighbours in a row of W, and among the targets, to be neighbours in memory.
    W_copy = as_rows(product_copy(W, h.dtype))
    targets = target.reshape(-1).contiguous()
    nll = LinearNLL.apply(h_rows, W, W_copy, targets, 1.0 / temperature)
    return nll.view(target.shape)


def logits(h, W):
    """Return h·Wᵀ (..., V) in float32, without a gradient. h (..., D) has the dtype of the product.

    They are not rounded to 16 bits: linear_nll, which scores what is drawn from them, does not
    round them either.
    """
    product = mm_float32(as_rows(h), product_copy(W, h.dtype).T)
    return product[:, : len(W)].view(*h.shape[:-1], len(W))
