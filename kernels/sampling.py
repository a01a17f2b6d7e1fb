"""Choosing a word from logits ℓ (R, V): drawn from softmax(ℓ/τ), or the likeliest.

    m = max_v ℓ_v/τ,   Z = Σ_v exp(ℓ_v/τ − m)
    drawn: the first word v with Σ_{w ≤ v} exp(ℓ_w/τ − m) ≥ u·Z, for u uniform in (0, 1)
    log p(v) = ℓ_v/τ − m − log Z

In PyTorch this is a log-softmax, its exponential and a cumulative sum, each of which reads and
writes all V numbers of a row, and a search. The kernels read a row once, 2V bytes in bf16, and one
of its blocks again:

    block_sums_kernel     the maximum of each block of a row, and its sum of exponentials
    choose_word_kernel    from these, m, Z and the block that u·Z falls into, which is read again

The cumulative sums are float32 either way, so a word can differ from exact arithmetic's only where
u lies within rounding of a boundary between two words.
"""

import torch

from .common import as_rows, ceil_div, next_power_of_2, row_stride, tl, triton, upcast

BLOCK = 1024  # words of a block

# ---- PyTorch reference ---------------------------------------------------------------------------


def sample(logits, u=None, temperature=1.0):
    """logits (R, V), u (R,) uniform in (0, 1) -> a word of each row (R,) and its log p (R,).

    u None: the likeliest word. (u = 0 would be the first word, whatever its probability, and a u·Z
    that the sum misses by rounding is the last.)
    """
    logits = upcast(logits)
    if temperature != 1:
        logits = logits / temperature
    logp = logits.log_softmax(-1)
    if u is None:
        word = logp.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1)
        word = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:])[:, 0]
        word = word.clamp(max=logits.shape[-1] - 1)
    return word, logp.gather(1, word[:, None])[:, 0]


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def block_sums_kernel(
    logits_ptr, max_ptr, sum_ptr,
    logits_row_stride,
    V, n_blocks,
    inverse_temperature,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The maximum of one block of one row's ℓ/τ, and Σ exp(ℓ/τ − that maximum)."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)

    # Past the last word ℓ is −∞, which adds exp(−∞) = 0
    words = block * BLOCK + tl.arange(0, BLOCK)  # (BLOCK,)
    logits_ptrs = logits_ptr + row * logits_row_stride + words
    logits = tl.load(logits_ptrs, mask=words < V, other=-float("inf")).to(tl.float32)
    logits *= inverse_temperature

    block_max = tl.max(logits, 0)
    # A block of −∞ alone has the sum 0: −∞ − (−∞) would be NaN
    subtracted = tl.where(block_max == -float("inf"), 0.0, block_max)
    block_sum = tl.sum(tl.exp(logits - subtracted), 0)
    tl.store(max_ptr + row * n_blocks + block, block_max)
    tl.store(sum_ptr + row * n_blocks + block, block_sum)


@triton.jit
def choose_word_kernel(
    logits_ptr, max_ptr, sum_ptr, u_ptr, word_ptr, logp_ptr,
    logits_row_stride,
    V, n_blocks,
    inverse_temperature,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One row's word and its log p. u_ptr None: the likeliest. BLOCKS: n_blocks or more."""
    row = tl.program_id(0).to(tl.int64)

    # m and Z, from the maxima and sums of the blocks
    blocks = tl.arange(0, BLOCKS)  # (BLOCKS,)
    is_block = blocks < n_blocks
    block_max = tl.load(max_ptr + row * n_blocks + blocks, is_block, other=-float("inf"))
    block_sum = tl.load(sum_ptr + row * n_blocks + blocks, is_block, other=0.0)
    m = tl.max(block_max, 0)
    weight = block_sum * tl.exp(block_max - m)  # (BLOCKS,)
    Z = tl.sum(weight, 0)

    # The block that holds the word: the first with m, or the first whose cumulative weight reaches
    # u·Z. (The last block may miss it by rounding; a row of NaN has no m.)
    if u_ptr is None:
        block = tl.minimum(tl.min(tl.where(block_max == m, blocks, BLOCKS), 0), n_blocks - 1)
    else:
        target = tl.load(u_ptr + row) * Z
        below = tl.cumsum(weight, 0) < target
        block = tl.minimum(tl.sum((below & is_block).to(tl.int32), 0), n_blocks - 1)

    # Read it
    offsets = tl.arange(0, BLOCK)  # (BLOCK,)
    words = block * BLOCK + offsets
    logits_ptrs = logits_ptr + row * logits_row_stride + words
    logits = tl.load(logits_ptrs, mask=words < V, other=-float("inf")).to(tl.float32)
    logits *= inverse_temperature

    # The word, likewise, as its offset in the block. (The sum within a block may also miss u·Z by
    # rounding. As cdf only grows, the number of words below u·Z is the offset of the first at it.)
    last = tl.minimum(BLOCK, V - block * BLOCK) - 1
    if u_ptr is None:
        offset = tl.minimum(tl.min(tl.where(logits == m, offsets, BLOCK - 1), 0), last)
    else:
        before = tl.sum(tl.where(blocks < block, weight, 0.0), 0)
        cdf = before + tl.cumsum(tl.exp(logits - m), 0)
        offset = tl.minimum(tl.sum((cdf < target).to(tl.int32), 0), last)

    logit = tl.sum(tl.where(offsets == offset, logits, 0.0), 0)
    tl.store(word_ptr + row, (block * BLOCK + offset).to(tl.int64))
    tl.store(logp_ptr + row, logit - m - tl.log(Z))


def fused_sample(logits, u=None, temperature=1.0):
    """The same as `sample`, by the kernels."""
    logits = as_rows(logits)
    assert u is None or u.is_contiguous()  # the kernel takes u[row] at u_ptr + row
    R, V = logits.shape
    n_blocks = ceil_div(V, BLOCK)
    maxima = torch.empty(R, n_blocks, device=logits.device)
    sums = torch.empty_like(maxima)
    word = torch.empty(R, dtype=torch.long, device=logits.device)
    logp = torch.empty(R, device=logits.device)

    block_sums_kernel[(R, n_blocks)](
        logits, maxima, sums, row_stride(logits), V, n_blocks, 1 / temperature, BLOCK=BLOCK
    )
    choose_word_kernel[(R,)](
        logits, maxima, sums, u, word, logp,
        row_stride(logits), V, n_blocks, 1 / temperature,
        BLOCK=BLOCK, BLOCKS=next_power_of_2(n_blocks),
    )  # fmt: skip
    return word, logp
