"""The VAE's sampling step in one pass over mu and logvar: z, and each row's KL and log-probability.

    forward    z = μ + σ·ε,  σ = exp(½ logσ²)
               KL = ½ mean_i(μ² + σ² − 1 − logσ²)
               log p = −½ Σ_i(u² + logσ² + log 2π),  u = (z − μ)/σ
    backward   g, g_KL and g_p are the gradients of z, KL and log p.
               z drawn, so that u = ε is a constant:
                   dμ     = g + g_KL·μ/D
                   dlogσ² = ½ g·σ·ε + ½ g_KL·(σ² − 1)/D − ½ g_p
               z given, so that u depends on z, μ and σ:
                   dz     = −g_p·u/σ
                   dμ     = g_KL·μ/D + g_p·u/σ
                   dlogσ² = ½ g_KL·(σ² − 1)/D + ½ g_p·(u² − 1)

The kernels have four modes. A mode says what is read besides mu and logvar, the `source`, and what
z and u are:

    mode     source           z         u           used for
    draw     seed, offset     μ + σ·ε   ε, drawn    sampling a thought on a GPU
    given    ε                μ + σ·ε   ε, read     the same, with noise given: tests, a dry run
    score    z                source    (z − μ)/σ   the log-probability of an action taken before
    mean     nothing          μ         0           a thought without noise

In the modes score and mean the caller already has z, and the kernel computes only KL and log p.

Callers pass noise as `eps`, which is one of two things: ε itself, floats (..., D); or keys, int64
(..., 2), the seed and the offset from which each row's ε is drawn. ε is Philox-4x32 of seed, offset
and column, and of nothing else: block size, batch and neighbours do not change it (the device does,
by rounding). The backward pass can therefore draw ε again instead of reading it. Keys are read from
device memory, so that a captured CUDA graph draws new noise at every replay. A Philox counter gives
four numbers, its lanes: counter i gives columns i, ⌈D/4⌉ + i, 2⌈D/4⌉ + i and 3⌈D/4⌉ + i.

Bytes per element, inputs in bf16. z stays float32, because its density is asked for later.

    mode     forward                backward
    draw     4 read, 4 written       8 read, 4 written
    given    8 read, 4 written      12 read, 4 written
    score    8 read                  8 read, 8 written
    mean     4 read                  4 read, 4 written

KL and log p are 8 bytes per row, and keys 16. The training loops keep mu and logvar in float32: 4
more bytes are read, and backward also writes 4 more.
"""

import math

import torch

from .common import (
    as_rows,
    ceil_div,
    empty_contiguous,
    next_power_of_2,
    row_stride,
    tl,
    triton,
    upcast,
)

BLOCK = 512  # Philox counters that a program takes at a time, of four columns each
# Warps of a program. On an H200, 8 are the fastest of 1, 2, 4, 8 and 16 with 65,536 rows; with 32
# rows, 16 are 0.4 µs faster.
WARPS = 8


# ---- PyTorch references --------------------------------------------------------------------------


def kl_normal(mu, logvar):
    """KL(N(μ, σ²) ‖ N(0, I)) of each row, mean over the dimensions: (..., D) -> (...)."""
    mu = upcast(mu)
    logvar = upcast(logvar)
    return 0.5 * (mu.pow(2) + logvar.exp() - 1 - logvar).mean(-1)


def gaussian_log_prob(z, mu, logvar):
    """log N(z; μ, σ²) of each row, sum over the dimensions: (..., D) -> (...)."""
    z = upcast(z)
    mu = upcast(mu)
    logvar = upcast(logvar)
    u_squared = (z - mu).pow(2) * torch.exp(-logvar)
    return -0.5 * (u_squared + logvar + math.log(2 * math.pi)).sum(-1)


def reparameterise(mu, logvar, eps=None, z=None):
    """Return z = μ + σε (..., D), and its rows' KL and log-probability (...).

    eps: ε or keys, as above. With z given, that z is used; with neither, z = μ.
    """
    if z is None:
        z = upcast(mu)
        if eps is not None:
            z = z + torch.exp(0.5 * upcast(logvar)) * draw_noise(eps, mu.shape[-1])
    return z, kl_normal(mu, logvar), gaussian_log_prob(z, mu, logvar)


def reparameterise_backward(dz, dkl, dlogp, mu, logvar, eps):
    """Return (dμ, dlogσ²) of `reparameterise` with ε given. dz (rows, D), dkl and dlogp (rows,)."""
    D = mu.shape[-1]
    dkl = dkl[:, None]
    dlogp = dlogp[:, None]
    sigma = torch.exp(0.5 * logvar)

    # ε is a constant, so log p depends on logσ² alone
    dmu = dz + dkl * mu / D
    dlogvar = 0.5 * (dz * sigma * eps + dkl * (logvar.exp() - 1) / D - dlogp)
    return dmu, dlogvar


def score_backward(dkl, dlogp, z, mu, logvar):
    """Return (dz, dμ, dlogσ²) of `kl_normal` and `gaussian_log_prob`. dkl and dlogp (rows,)."""
    D = mu.shape[-1]
    dkl = dkl[:, None]
    dlogp = dlogp[:, None]

    # z is an input here: log p depends on z and μ through u
    inverse_sigma = torch.exp(-0.5 * logvar)
    u = (z - mu) * inverse_sigma
    dmu_from_logp = dlogp * u * inverse_sigma
    dlogvar = 0.5 * (dkl * (logvar.exp() - 1) / D + dlogp * (u * u - 1))
    return -dmu_from_logp, dkl * mu / D + dmu_from_logp, dlogvar


def draw_noise(eps, D, dtype=torch.float32):
    """Return ε (..., D): eps itself, or drawn in `dtype` if eps is keys (..., 2)."""
    if eps.dtype != torch.int64:
        return eps
    keys = eps.reshape(-1, 2)
    return philox(keys, D).to(dtype).view(*eps.shape[:-1], D)


# Philox-4x32-10 (Salmon et al. 2011): multipliers of the counter, increments of the key, rounds
MULTIPLIER_0 = 0xD2511F53
MULTIPLIER_1 = 0xCD9E8D57
INCREMENT_0 = 0x9E3779B9
INCREMENT_1 = 0xBB67AE85
ROUNDS = 10
LOW_32_BITS = 0xFFFFFFFF


def philox(keys, D):
    """Return the standard normals (rows, D), float64, that the kernels draw from keys (rows, 2).

    The Philox key is a row's seed. Its counter is (i, 0, offset), with i = 0 … ⌈D/4⌉ − 1.
    """
    seed = keys[:, 0:1]
    offset = keys[:, 1:2]
    i = torch.arange(ceil_div(D, 4), device=keys.device)

    # PyTorch has no unsigned 32-bit arithmetic, so the words lie in int64 and are masked.
    k0 = seed & LOW_32_BITS
    k1 = seed >> 32 & LOW_32_BITS
    c0 = i
    c1 = torch.zeros_like(i)
    c2 = offset & LOW_32_BITS
    c3 = offset >> 32 & LOW_32_BITS

    # A round multiplies two words of the counter, and mixes the products' halves with the key.
    for _ in range(ROUNDS):
        high_0, low_0 = multiply_32(MULTIPLIER_0, c0)
        high_1, low_1 = multiply_32(MULTIPLIER_1, c2)
        c0 = high_1 ^ c1 ^ k0
        c1 = low_1
        c2 = high_0 ^ c3 ^ k1
        c3 = low_0
        k0 = k0 + INCREMENT_0 & LOW_32_BITS
        k1 = k1 + INCREMENT_1 & LOW_32_BITS

    # Four random words a counter are four normals, one for each lane of columns.
    lane_0, lane_1 = box_muller_reference(c0, c1)
    lane_2, lane_3 = box_muller_reference(c2, c3)
    return torch.cat((lane_0, lane_1, lane_2, lane_3), 1)[:, :D]


def multiply_32(a, b):
    """Return the high and the low 32 bits of the product of two 32-bit numbers.

    int64 may overflow: that leaves all 64 bits right but read as a negative number, and the shift's
    copies of the sign are masked.
    """
    product = a * b
    return product >> 32 & LOW_32_BITS, product & LOW_32_BITS


def uniform_reference(bits):
    """Return Triton's uint_to_uniform_float of 32 bits: a float32 in [0, 1), here as float64."""
    # Read the word as signed and fold the negative half over: 0 … 2³¹ − 1. The factor is just below
    # 2⁻³¹, because float32 rounds the largest magnitude up to 2³¹ and the result must stay below 1.
    signed = torch.where(bits >= 1 << 31, bits - (1 << 32), bits)
    magnitude = torch.where(signed < 0, -signed - 1, signed)
    return magnitude.float().mul(4.6566127342e-10).double()


def box_muller_reference(bits_a, bits_b):
    """Return two standard normals, from two blocks of random bits."""
    u = uniform_reference(bits_a)
    v = uniform_reference(bits_b)

    # u can be 0, which has no logarithm.
    radius = (-2 * u.clamp(min=1e-7).log()).sqrt()
    angle = 2 * math.pi * v
    return radius * angle.cos(), radius * angle.sin()


# ---- kernels -------------------------------------------------------------------------------------
# A Philox counter gives four numbers, one for each lane. For D = 10, ⌈D/4⌉ = 3 counters:
#
#     lane       0        1        2        3
#     counter    0 1 2    0 1 2    0 1 2    0 1 2
#     column     0 1 2    3 4 5    6 7 8    9 – –      column = lane·⌈D/4⌉ + counter, if it is < D


@triton.jit
def box_muller(bits_a, bits_b):
    """Return two standard normals, from two blocks of random bits.

    cos and sin are Taylor polynomials after a reduction to an eighth of a turn. The angle is less
    than a turn, so the library's slow path for large angles, which takes a stack, is not needed.
    """
    u = tl.uint_to_uniform_float(bits_a)
    v = tl.uint_to_uniform_float(bits_b)
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u, 1e-7)))

    # The angle 2πv is x from the nearest quarter turn, at most an eighth of a turn away.
    quarter = tl.floor(4.0 * v + 0.5)
    x = (v - 0.25 * quarter) * 6.283185307179586

    # sin x and cos x. Their next terms, x¹¹/11! and x¹²/12!, are below the rounding of float32.
    y = x * x
    s = x * (1.0 + y * (-1.0 / 6 + y * (1.0 / 120 + y * (-1.0 / 5040 + y * (1.0 / 362880)))))
    c = 1.0 + y * (
        -0.5 + y * (1.0 / 24 + y * (-1.0 / 720 + y * (1.0 / 40320 + y * (-1.0 / 3628800))))
    )

    # Turn back by the quarters: an odd number swaps sine and cosine. Then each gets its sign.
    odd = (quarter == 1.0) | (quarter == 3.0)
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where((quarter == 1.0) | (quarter == 2.0), -cos, cos)
    sin = tl.where((quarter == 2.0) | (quarter == 3.0), -sin, sin)
    return radius * cos, radius * sin


@triton.jit
def draw(key_ptr, counters):
    """Draw four standard normals, the lanes, for each of the int32 counters, from one row's key."""
    seed = tl.load(key_ptr)
    offset = tl.load(key_ptr + 1)

    # Philox's counter is (i, 0, offset), and its key is the seed.
    zero = counters * 0
    offset_low = zero + offset.to(tl.int32)
    offset_high = zero + (offset >> 32).to(tl.int32)
    bits_0, bits_1, bits_2, bits_3 = tl.philox(seed, counters, zero, offset_low, offset_high)
    eps_0, eps_1 = box_muller(bits_0, bits_1)
    eps_2, eps_3 = box_muller(bits_2, bits_3)
    return eps_0, eps_1, eps_2, eps_3


@triton.jit
def reparameterise_forward_kernel(
    mu_ptr, logvar_ptr, source_ptr, z_ptr, kl_ptr, logp_ptr,
    mu_row_stride, logvar_row_stride, source_row_stride,
    D,
    MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: z, KL and log p of one row. The head of this file has the table of modes."""
    row = tl.program_id(0).to(tl.int64)
    n_counters = tl.cdiv(D, 4)  # and columns of a lane

    # Σ(μ² + σ² − 1 − logσ²) and Σ(u² + logσ²): BLOCK partial sums each, added up at the end
    kl_sum = tl.zeros([BLOCK], tl.float32)
    logp_sum = tl.zeros([BLOCK], tl.float32)

    for start in range(0, n_counters, BLOCK):
        counters = start + tl.arange(0, BLOCK)
        if MODE == "draw":
            drawn = draw(source_ptr + row * source_row_stride, counters)  # one ε for each lane

        # The four lanes of columns, which share their counters. A counter past the last one would
        # give a column of the next lane, which must not be counted twice.
        for lane in tl.static_range(4):
            col_ids = lane * n_counters + counters
            mask = (counters < n_counters) & (col_ids < D)
            mu_ptrs = mu_ptr + row * mu_row_stride + col_ids
            mu = tl.load(mu_ptrs, mask, other=0.0).to(tl.float32)
            logvar_ptrs = logvar_ptr + row * logvar_row_stride + col_ids
            logvar = tl.load(logvar_ptrs, mask, other=0.0).to(tl.float32)

            # u = (z − μ)/σ: the noise that makes z
            if MODE == "draw":
                u = drawn[lane]
            elif MODE == "given":
                eps_ptrs = source_ptr + row * source_row_stride + col_ids
                u = tl.load(eps_ptrs, mask, other=0.0).to(tl.float32)
            elif MODE == "score":
                z_ptrs = source_ptr + row * source_row_stride + col_ids
                z = tl.load(z_ptrs, mask, other=0.0).to(tl.float32)
                u = (z - mu) * tl.exp(-0.5 * logvar)
            else:
                u = tl.zeros([BLOCK], tl.float32)

            # z is new in the two modes that sample.
            if MODE == "draw" or MODE == "given":
                tl.store(z_ptr + row * D + col_ids, mu + tl.exp(0.5 * logvar) * u, mask)

            # Columns that do not exist add nothing to the row's sums.
            kl_sum += tl.where(mask, mu * mu + tl.exp(logvar) - 1.0 - logvar, 0.0)
            logp_sum += tl.where(mask, u * u + logvar, 0.0)

    # What the sums leave out: the mean over D, the factors ±½, and log 2π once for each column
    tl.store(kl_ptr + row, 0.5 * tl.sum(kl_sum) / D)
    log_2pi = 1.8378770664093453
    tl.store(logp_ptr + row, -0.5 * (tl.sum(logp_sum) + D * log_2pi))


@triton.jit
def reparameterise_backward_kernel(
    mu_ptr, logvar_ptr, source_ptr, dz_ptr, dkl_ptr, dlogp_ptr, dmu_ptr, dlogvar_ptr, dsource_ptr,
    mu_row_stride, logvar_row_stride, source_row_stride, dz_row_stride,
    D,
    MODE: tl.constexpr, HAS_DZ: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of one row. dmu, dlogvar and dsource are contiguous.

    HAS_DZ: the loss uses a z that the forward kernel computed, so in mode draw or given.
    """
    row = tl.program_id(0).to(tl.int64)
    n_counters = tl.cdiv(D, 4)  # and columns of a lane

    # The row's two upstream gradients. The KL is a mean over D.
    g_kl = tl.load(dkl_ptr + row) / D
    g_p = tl.load(dlogp_ptr + row)

    for start in range(0, n_counters, BLOCK):
        counters = start + tl.arange(0, BLOCK)
        if MODE == "draw":
            drawn = draw(source_ptr + row * source_row_stride, counters)  # the same ε as forward

        for lane in tl.static_range(4):
            col_ids = lane * n_counters + counters
            mask = (counters < n_counters) & (col_ids < D)
            mu_ptrs = mu_ptr + row * mu_row_stride + col_ids
            mu = tl.load(mu_ptrs, mask, other=0.0).to(tl.float32)
            logvar_ptrs = logvar_ptr + row * logvar_row_stride + col_ids
            logvar = tl.load(logvar_ptrs, mask, other=0.0).to(tl.float32)

            # Through the KL, and through logσ² in log p: in every mode
            dmu = g_kl * mu
            dlogvar = 0.5 * (g_kl * (tl.exp(logvar) - 1.0) - g_p)

            # Through u = (z − μ)/σ in log p: z is given
            if MODE == "score":
                inverse_sigma = tl.exp(-0.5 * logvar)
                z_ptrs = source_ptr + row * source_row_stride + col_ids
                z = tl.load(z_ptrs, mask, other=0.0).to(tl.float32)
                u = (z - mu) * inverse_sigma
                dmu_from_logp = g_p * u * inverse_sigma
                tl.store(dsource_ptr + row * D + col_ids, -dmu_from_logp, mask)
                dmu += dmu_from_logp
                dlogvar += 0.5 * g_p * u * u

            # Through z = μ + σ·ε: z was sampled
            if HAS_DZ:
                dz_ptrs = dz_ptr + row * dz_row_stride + col_ids
                dz = tl.load(dz_ptrs, mask, other=0.0).to(tl.float32)
                if MODE == "draw":
                    eps = drawn[lane]
                else:
                    eps_ptrs = source_ptr + row * source_row_stride + col_ids
                    eps = tl.load(eps_ptrs, mask, other=0.0).to(tl.float32)
                dmu += dz
                dlogvar += 0.5 * dz * tl.exp(0.5 * logvar) * eps

            # The stores round to the dtypes of mu and logvar.
            tl.store(dmu_ptr + row * D + col_ids, dmu, mask)
            tl.store(dlogvar_ptr + row * D + col_ids, dlogvar, mask)


# ---- launches, under autograd --------------------------------------------------------------------


def counter_block(D, block):
    """Return how many Philox counters a program takes at a time: at most those of a whole row."""
    return min(block, next_power_of_2(ceil_div(D, 4)))


def run_forward(mu, logvar, source, mode, block=BLOCK):
    """Launch the forward kernel on mu, logvar (rows, D) and the mode's source, rows at any stride.

    Returns z (rows, D), None in modes score and mean, and kl and logp (rows,), all float32.
    """
    n_rows, D = mu.shape

    # z is float32 whatever mu is: its density is asked for later.
    samples = mode in ("draw", "given")
    z = mu.new_empty(n_rows, D, dtype=torch.float32) if samples else None
    kl = mu.new_empty(n_rows, dtype=torch.float32)
    logp = mu.new_empty(n_rows, dtype=torch.float32)

    # One program for each row
    if n_rows:
        reparameterise_forward_kernel[(n_rows,)](
            mu, logvar, source, z, kl, logp,
            row_stride(mu), row_stride(logvar), row_stride(source),
            D,
            MODE=mode, BLOCK=counter_block(D, block), num_warps=WARPS,
        )  # fmt: skip
    return z, kl, logp


def run_backward(dz, dkl, dlogp, mu, logvar, source, mode, block=BLOCK):
    """Launch the backward kernel. dz (rows, D), None for zero; dkl and dlogp (rows,).

    Returns (dmu, dlogvar, dsource), each in its input's dtype. dsource is dz in mode score, where z
    is an input; else None.
    """
    n_rows, D = mu.shape
    dmu = empty_contiguous(mu)
    dlogvar = empty_contiguous(logvar)
    dsource = source.new_empty(n_rows, D) if mode == "score" else None

    # One program for each row, as in the forward pass
    if n_rows:
        reparameterise_backward_kernel[(n_rows,)](
            mu, logvar, source, dz, dkl, dlogp, dmu, dlogvar, dsource,
            row_stride(mu), row_stride(logvar), row_stride(source), row_stride(dz),
            D,
            MODE=mode, HAS_DZ=dz is not None, BLOCK=counter_block(D, block), num_warps=WARPS,
        )  # fmt: skip
    return dmu, dlogvar, dsource


class Gaussian(torch.autograd.Function):
    """mu, logvar (rows, D) and the mode's source -> z (None in modes score and mean), kl, logp."""

    @staticmethod
    def forward(ctx, mu, logvar, source, mode):
        ctx.save_for_backward(mu, logvar, source)
        ctx.mode = mode

        # A result that the loss does not use has gradient None, so that dz need not be read.
        ctx.set_materialize_grads(False)
        return run_forward(mu, logvar, source, mode)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dz, dkl, dlogp):
        mu, logvar, source = ctx.saved_tensors

        # KL and log p are one number per row: zeros stand in for a gradient that is missing.
        zeros = mu.new_zeros(len(mu), dtype=torch.float32)
        dkl = zeros if dkl is None else dkl.float().contiguous()
        dlogp = zeros if dlogp is None else dlogp.float().contiguous()
        dz = None if dz is None else as_rows(dz)

        dmu, dlogvar, dsource = run_backward(dz, dkl, dlogp, mu, logvar, source, ctx.mode)
        return dmu, dlogvar, dsource, None


def fused_reparameterise(mu, logvar, eps=None, z=None):
    """Return what `reparameterise` returns, from one launch of the kernel."""
    # What is given decides the mode.
    if z is not None:
        mode, source = "score", z
    elif eps is None:
        mode, source = "mean", None
    elif eps.dtype == torch.int64:
        mode, source = "draw", eps
    else:
        mode, source = "given", eps

    # The kernel does not broadcast: it would read past the end of a smaller tensor.
    width = 2 if mode == "draw" else mu.shape[-1]
    assert logvar.shape == mu.shape
    assert source is None or source.shape == (*mu.shape[:-1], width)

    # The kernel sees rows. It returns a z only if it has sampled it.
    source_rows = None if source is None else as_rows(source)
    new_z, kl, logp = Gaussian.apply(as_rows(mu), as_rows(logvar), source_rows, mode)
    if mode == "mean":
        z = upcast(mu)
    elif mode != "score":
        z = new_z.view(mu.shape)
    row_shape = mu.shape[:-1]
    return z, kl.view(row_shape), logp.view(row_shape)
