"""The VAE's sampling step in one pass over μ and logσ²: draw ε, z, the KL and the log-probability of each row.

    forward    z = μ + σ·ε,  σ = exp(½ logσ²)                    KL = ½ mean_i(μ² + σ² − 1 − logσ²)
               log p = −½ Σ_i(u² + logσ² + log 2π)                u = ε, or (z − μ)/σ where z is given
    backward   with g, gKL, gp the gradients of z, KL and log p:
               dμ      = g + gKL·μ/D                              and, z given:  dμ += gp·u/σ,  dz = −gp·u/σ
               dlogσ²  = ½ g·σ·ε + ½ gKL·(σ² − 1)/D − ½ gp                       dlogσ² += ½ gp·u²
Four modes: ε drawn here, ε given, z given (the score of an action), and the mean, z = μ, which only has the rows' values.

`eps` is one of two things: floats (..., D), the ε itself; or int64 (..., 2), the seed and offset that each row's ε is drawn from. That is
Philox-4x32 of (seed, offset, column) and of nothing else: no block size, batch or neighbour changes it (a device does by rounding), and the
backward pass draws it again instead of reading it. Both are read from device memory, so that a captured CUDA graph draws anew at every replay.
Column j·⌈D/4⌉ + i takes lane j of counter i.

Bytes an element, inputs in bf16: forward 4 read, 4 written (z stays float32, its density is asked for later); backward 4 + 4 read,
4 written. ε given: 4 more read, both ways. z given: forward 8 read, backward 8 read and 8 written. The rows' values are 8 bytes a row.
(The training loops keep μ and logσ² in float32, 8 read.)
"""
import math

import torch

from .common import as_rows, power_of_2, tl, triton, wide

DRAW, GIVEN, SCORE, MEAN = 0, 1, 2, 3
BLOCK = 512  # counters a program takes at a time: 4 elements each


# ---- PyTorch references -------------------------------------------------------------------------------------------------

def kl_normal(mu, logvar):
    """KL(N(μ, σ²) ‖ N(0, I)) of each row, mean over the dimensions: (..., D) -> (...)."""
    mu, logvar = wide(mu), wide(logvar)
    return 0.5 * (mu.pow(2) + logvar.exp() - 1 - logvar).mean(-1)


def gaussian_log_prob(z, mu, logvar):
    """log N(z; μ, σ²) of each row, summed over the dimensions: (..., D) -> (...)."""
    z, mu, logvar = wide(z), wide(mu), wide(logvar)
    return -0.5 * ((z - mu).pow(2) * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(-1)


def reparameterise(mu, logvar, eps=None, z=None):
    """z = μ + σε of (..., D), its rows' KL and log-probability (...). z given: that one; neither given: z = μ."""
    if z is None:
        z = wide(mu) if eps is None else wide(mu) + torch.exp(0.5 * wide(logvar)) * drawn(eps, mu.shape[-1])
    return z, kl_normal(mu, logvar), gaussian_log_prob(z, mu, logvar)


def backward(dz, dkl, dlogp, mu, logvar, eps):
    """The gradient (dμ, dlogσ²) of `reparameterise`. dz (rows, D), dkl and dlogp (rows,)."""
    D, dkl, dlogp = mu.shape[-1], dkl[:, None], dlogp[:, None]
    return dz + dkl * mu / D, 0.5 * (dz * torch.exp(0.5 * logvar) * eps + dkl * (logvar.exp() - 1) / D - dlogp)


def score_backward(dkl, dlogp, z, mu, logvar):
    """The gradient (dz, dμ, dlogσ²) of `gaussian_log_prob` and `kl_normal`. dkl and dlogp (rows,)."""
    D, dkl, dlogp = mu.shape[-1], dkl[:, None], dlogp[:, None]
    u = (z - mu) * torch.exp(-0.5 * logvar)
    pull = dlogp * u * torch.exp(-0.5 * logvar)
    return -pull, dkl * mu / D + pull, 0.5 * (dkl * (logvar.exp() - 1) / D + dlogp * (u * u - 1))


def drawn(eps, D, dtype=torch.float32):
    """The ε (..., D) that `eps` is or names."""
    return eps if eps.dtype != torch.int64 else philox(eps.reshape(-1, 2), D).to(dtype).view(*eps.shape[:-1], D)


def philox(key, D):
    """The standard normals (rows, D) float64 that the kernels draw from the seeds and offsets key (rows, 2) int64."""
    k0, k1, low, high = (key[:, i:i + 1] >> s & 0xFFFFFFFF for i in (0, 1) for s in (0, 32))
    column = torch.arange(-(-D // 4), device=key.device)
    c = [column, torch.zeros_like(column), low, high]
    top = lambda a, b: (a * b) >> 32 & 0xFFFFFFFF  # int64 wraps, which leaves these bits alone
    for _ in range(10):
        A, B = 0xD2511F53, 0xCD9E8D57
        c = [top(B, c[2]) ^ c[1] ^ k0, B * c[2] & 0xFFFFFFFF, top(A, c[0]) ^ c[3] ^ k1, A * c[0] & 0xFFFFFFFF]
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    signed = [torch.where(x >= 1 << 31, x - (1 << 32), x) for x in c]
    u = [torch.where(x < 0, -x - 1, x).float().mul(4.6566127342e-10).double() for x in signed]
    normal = []
    for a, b in ((u[0], u[1]), (u[2], u[3])):  # Box and Muller
        r = (-2 * a.clamp(min=1e-7).log()).sqrt()
        normal += [r * (2 * math.pi * b).cos(), r * (2 * math.pi * b).sin()]
    return torch.cat(normal, 1)[:, :D]


# ---- kernels ------------------------------------------------------------------------------------------------------------

@triton.jit
def box_muller(a, b):
    """Two standard normals from two blocks of random bits. The angle is less than a turn, so it needs no library's slow path."""
    u, v = tl.uint_to_uniform_float(a), tl.uint_to_uniform_float(b)
    r = tl.sqrt(-2.0 * tl.log(tl.maximum(u, 1e-7)))
    quarter = tl.floor(4.0 * v + 0.5)
    x = (v - 0.25 * quarter) * 6.283185307179586  # within an eighth of a turn of the axis
    y = x * x
    s = x * (1.0 + y * (-1.0 / 6 + y * (1.0 / 120 + y * (-1.0 / 5040 + y * (1.0 / 362880)))))
    c = 1.0 + y * (-0.5 + y * (1.0 / 24 + y * (-1.0 / 720 + y * (1.0 / 40320 + y * (-1.0 / 3628800)))))
    odd = (quarter == 1.0) | (quarter == 3.0)
    cos, sin = tl.where(odd, s, c), tl.where(odd, c, s)
    cos = tl.where((quarter == 1.0) | (quarter == 2.0), -cos, cos)
    sin = tl.where((quarter == 2.0) | (quarter == 3.0), -sin, sin)
    return r * cos, r * sin


@triton.jit
def draw(seed, offset, i):
    """Four standard normals for each counter i (int32) of the row's offset (int64)."""
    zero = i * 0
    a, b, c, d = tl.philox(seed, i, zero, zero + offset.to(tl.int32), zero + (offset >> 32).to(tl.int32))
    e0, e1 = box_muller(a, b)
    e2, e3 = box_muller(c, d)
    return e0, e1, e2, e3


@triton.jit
def forward_kernel(mu, logvar, given, z, kl, logp, s_mu, s_logvar, s_given, D, MODE: tl.constexpr, BLOCK: tl.constexpr):
    """Program: one row. given: its seed and offset (MODE 0), ε (1), z (2) or nothing (3)."""
    row = tl.program_id(0).to(tl.int64)
    Q = tl.cdiv(D, 4)
    sum_kl, sum_p = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, Q, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if MODE == 0:
            e0, e1, e2, e3 = draw(tl.load(given + row * s_given), tl.load(given + row * s_given + 1), i)
        for lane in tl.static_range(4):
            col = lane * Q + i
            m = (i < Q) & (col < D)
            b_mu = tl.load(mu + row * s_mu + col, m, 0.0).to(tl.float32)
            b_lv = tl.load(logvar + row * s_logvar + col, m, 0.0).to(tl.float32)
            e = tl.zeros([BLOCK], tl.float32)
            if MODE == 0:
                e = e0 if lane == 0 else e1 if lane == 1 else e2 if lane == 2 else e3
            elif MODE == 1:
                e = tl.load(given + row * s_given + col, m, 0.0).to(tl.float32)
            elif MODE == 2:
                e = (tl.load(given + row * s_given + col, m, 0.0).to(tl.float32) - b_mu) * tl.exp(-0.5 * b_lv)
            if MODE <= 1:
                tl.store(z + row * D + col, b_mu + tl.exp(0.5 * b_lv) * e, m)
            sum_kl += tl.where(m, b_mu * b_mu + tl.exp(b_lv) - 1.0 - b_lv, 0.0)
            sum_p += tl.where(m, e * e + b_lv, 0.0)
    tl.store(kl + row, 0.5 * tl.sum(sum_kl) / D)
    tl.store(logp + row, -0.5 * (tl.sum(sum_p) + D * 1.8378770664093453))


@triton.jit
def backward_kernel(mu, logvar, given, dz, dkl, dlogp, dmu, dlogvar, dgiven, s_mu, s_logvar, s_given, s_dz, D,
                    MODE: tl.constexpr, HAS_DZ: tl.constexpr, BLOCK: tl.constexpr):
    """Program: one row."""
    row = tl.program_id(0).to(tl.int64)
    Q = tl.cdiv(D, 4)
    g_kl, g_p = tl.load(dkl + row) / D, tl.load(dlogp + row)
    for start in range(0, Q, BLOCK):
        i = start + tl.arange(0, BLOCK)
        if MODE == 0:
            e0, e1, e2, e3 = draw(tl.load(given + row * s_given), tl.load(given + row * s_given + 1), i)
        for lane in tl.static_range(4):
            col = lane * Q + i
            m = (i < Q) & (col < D)
            b_mu = tl.load(mu + row * s_mu + col, m, 0.0).to(tl.float32)
            b_lv = tl.load(logvar + row * s_logvar + col, m, 0.0).to(tl.float32)
            b_dmu = g_kl * b_mu
            b_dlv = 0.5 * (g_kl * (tl.exp(b_lv) - 1.0) - g_p)
            if MODE == 2:
                inverse = tl.exp(-0.5 * b_lv)
                u = (tl.load(given + row * s_given + col, m, 0.0).to(tl.float32) - b_mu) * inverse
                pull = g_p * u * inverse
                tl.store(dgiven + row * D + col, -pull, m)
                b_dmu += pull
                b_dlv += 0.5 * g_p * u * u
            if HAS_DZ:
                g = tl.load(dz + row * s_dz + col, m, 0.0).to(tl.float32)
                if MODE == 0:
                    e = e0 if lane == 0 else e1 if lane == 1 else e2 if lane == 2 else e3
                else:
                    e = tl.load(given + row * s_given + col, m, 0.0).to(tl.float32)
                b_dmu += g
                b_dlv += 0.5 * g * tl.exp(0.5 * b_lv) * e
            tl.store(dmu + row * D + col, b_dmu, m)
            tl.store(dlogvar + row * D + col, b_dlv, m)


# ---- launches -----------------------------------------------------------------------------------------------------------

def run_forward(mu, logvar, given, mode, block=BLOCK):
    """mu, logvar (rows, D) and given (rows, D) or (rows, 2), rows at any stride -> z (rows, D) float32 (None where it is not new), kl, logp
    (rows,) float32."""
    rows, D = mu.shape
    z = mu.new_empty(rows, D, dtype=torch.float32) if mode <= GIVEN else None
    kl, logp = (mu.new_empty(rows, dtype=torch.float32) for _ in range(2))
    if rows:
        forward_kernel[(rows,)](mu, logvar, given, z, kl, logp, mu.stride(0), logvar.stride(0),
                                0 if given is None else given.stride(0), D, MODE=mode, BLOCK=min(block, power_of_2(-(-D // 4))))
    return z, kl, logp


def run_backward(dz, dkl, dlogp, mu, logvar, given, mode, block=BLOCK):
    """The gradients (dμ, dlogσ², dz of SCORE or None), in the dtypes of their tensors. dz None counts as zero."""
    rows, D = mu.shape
    dmu, dlogvar = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (mu, logvar))
    dgiven = given.new_empty(rows, D) if mode == SCORE else None
    if rows:
        backward_kernel[(rows,)](mu, logvar, given, dz, dkl, dlogp, dmu, dlogvar, dgiven, mu.stride(0), logvar.stride(0),
                                 0 if given is None else given.stride(0), 0 if dz is None else dz.stride(0), D,
                                 MODE=mode, HAS_DZ=dz is not None, BLOCK=min(block, power_of_2(-(-D // 4))))
    return dmu, dlogvar, dgiven


class Gaussian(torch.autograd.Function):
    """The kernels under autograd: mu, logvar, given as rows -> z, kl, logp; z is None where it is `given` or the mean."""
    @staticmethod
    def forward(ctx, mu, logvar, given, mode):
        ctx.save_for_backward(mu, logvar, given)
        ctx.mode = mode
        ctx.set_materialize_grads(False)
        return run_forward(mu, logvar, given, mode)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dz, dkl, dlogp):
        mu, logvar, given = ctx.saved_tensors
        zero = mu.new_zeros(len(mu), dtype=torch.float32)
        dkl, dlogp = (zero if g is None else g.float().contiguous() for g in (dkl, dlogp))
        dz = None if dz is None else as_rows(dz)
        dmu, dlogvar, dgiven = run_backward(dz, dkl, dlogp, mu, logvar, given, ctx.mode)
        return dmu, dlogvar, dgiven, None


def apply(mu, logvar, eps=None, z=None):
    """`reparameterise` by the kernels, in one launch."""
    mode = SCORE if z is not None else MEAN if eps is None else DRAW if eps.dtype == torch.int64 else GIVEN
    new, kl, logp = Gaussian.apply(*(None if x is None else as_rows(x) for x in (mu, logvar, eps if z is None else z)), mode)
    z = z if mode == SCORE else wide(mu) if mode == MEAN else new.view(mu.shape)
    return z, kl.view(mu.shape[:-1]), logp.view(mu.shape[:-1])
