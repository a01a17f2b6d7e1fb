"""The parts of a layer that are bound by memory: the residual's addition with RMSNorm, RoPE, and SwiGLU.

    add + RMSNorm   s = x + a,  r = (mean(s²) + ε)^−½,  n = s·r,  y = n·w
                    dn = dy·w,  ds = g + r·(dn − n·mean(dn·n)),  dx = da = ds,  dw = Σ_rows dy·n           (g: the gradient of s)
    RoPE            y₁ = x₁cos − x₂sin,  y₂ = x₂cos + x₁sin; the gradient is the rotation by −sin
    SwiGLU          y = g·σ(g)·u;  du = dy·g·σ(g),  dg = dy·u·σ(g)·(1 + g·(1 − σ(g)))

Bytes an element, x in float32 and the rest in bf16 (training under autocast): add + RMSNorm forward 4 + 2 read, 4 + 2 written, backward
2 + 4 + 4 read, 4 + 2 written; RoPE 2 + 2; SwiGLU forward 2·2 + 2, backward 3·2 + 2·2.
"""
import torch
import torch.nn.functional as F

from .common import as_rows, power_of_2, tl, triton, wide


# ---- PyTorch references -------------------------------------------------------------------------------------------------

def add_rms_norm(x, a, weight, eps):
    """(x + a, its RMSNorm) of (..., D); a None is nothing to add. The cast back comes before the weight, as in the published model."""
    s = x if a is None else x + a
    s32 = wide(s)
    return s, (s32 * torch.rsqrt(s32.pow(2).mean(-1, keepdim=True) + eps)).to(s.dtype) * weight


def add_rms_norm_backward(g, dy, s, weight, eps):
    """(ds, dw) from the gradients of both results; the gradient of x and of a is ds."""
    r = torch.rsqrt(s.pow(2).mean(-1, keepdim=True) + eps)
    n, dn = s * r, dy * weight
    return g + r * (dn - n * (dn * n).mean(-1, keepdim=True)), (dy * n).flatten(0, -2).sum(0)


def rotate(x, cos, sin):
    """RoPE: rotate the pairs (x_i, x_{i+hd/2}) of x (B, h, T, hd) by the angles in cos, sin (B, 1, T, hd/2)."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def swiglu(gate, up):
    """silu(gate)·up."""
    return F.silu(gate) * up


def swiglu_backward(dy, gate, up):
    """(dgate, dup)."""
    p = torch.sigmoid(gate)
    return dy * up * p * (1 + gate * (1 - p)), dy * gate * p


# ---- kernels ------------------------------------------------------------------------------------------------------------

@triton.jit
def norm_forward(x, a, weight, s, y, rstd, s_x, s_a, rows, D, eps, HAS_A: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """Program: BM rows."""
    row, i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, BD)
    m = (row < rows)[:, None] & (i < D)[None, :]
    b_s = tl.load(x + row[:, None] * s_x + i[None, :], m, 0.0)
    if HAS_A:
        b_s = (b_s.to(tl.float32) + tl.load(a + row[:, None] * s_a + i[None, :], m, 0.0).to(tl.float32)).to(s.dtype.element_ty)
        tl.store(s + row[:, None] * D + i[None, :], b_s, m)
    b_s = b_s.to(tl.float32)
    r = tl.rsqrt(tl.sum(b_s * b_s, 1) / D + eps)
    n = (b_s * r[:, None]).to(s.dtype.element_ty).to(tl.float32)
    b_w = tl.load(weight + i, i < D, 0.0).to(tl.float32)
    tl.store(y + row[:, None] * D + i[None, :], n * b_w[None, :], m)
    tl.store(rstd + row, r, row < rows)


@triton.jit
def norm_backward(g, dy, s, weight, rstd, ds, part_dw, s_g, s_dy, s_s, rows, D, HAS_G: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """Program: every num_programs-th block of BM rows, and one row of dw's partial sums."""
    i = tl.arange(0, BD)
    b_w = tl.load(weight + i, i < D, 0.0).to(tl.float32)
    dw = tl.zeros([BD], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, BM), tl.num_programs(0)):
        row = tl.full([], block, tl.int64) * BM + tl.arange(0, BM)
        m = (row < rows)[:, None] & (i < D)[None, :]
        r = tl.load(rstd + row, row < rows, 0.0)[:, None]
        n = tl.load(s + row[:, None] * s_s + i[None, :], m, 0.0).to(tl.float32) * r
        b_dy = tl.load(dy + row[:, None] * s_dy + i[None, :], m, 0.0).to(tl.float32)
        dn = b_dy * b_w[None, :]
        b_ds = r * (dn - n * (tl.sum(dn * n, 1) / D)[:, None])
        if HAS_G:
            b_ds += tl.load(g + row[:, None] * s_g + i[None, :], m, 0.0).to(tl.float32)
        tl.store(ds + row[:, None] * D + i[None, :], b_ds, m)
        dw += tl.sum(b_dy * n, 0)
    tl.store(part_dw + tl.program_id(0) * D + i, dw, i < D)


@triton.jit
def rotate_kernel(x, cos, sin, y, s_xb, s_xh, s_xt, T, h, n, sign, H: tl.constexpr, BH: tl.constexpr, BM: tl.constexpr):
    """Program: BM of the n heads of all positions; y is (B, T, h, d) in memory."""
    head, i = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, BH)
    m, position = (head < n)[:, None] & (i < H)[None, :], head // h
    c = tl.load(cos + position[:, None] * H + i[None, :], m, 0.0).to(tl.float32)
    s = tl.load(sin + position[:, None] * H + i[None, :], m, 0.0).to(tl.float32) * sign
    at = x + (position // T * s_xb + position % T * s_xt + head % h * s_xh)[:, None] + i[None, :]
    x1, x2 = tl.load(at, m, 0.0).to(tl.float32), tl.load(at + H, m, 0.0).to(tl.float32)
    out = y + head[:, None] * (2 * H) + i[None, :]
    tl.store(out, x1 * c - x2 * s, m)
    tl.store(out + H, x2 * c + x1 * s, m)


@triton.jit
def swiglu_forward_kernel(gate, up, y, s_g, s_u, rows, D, BM: tl.constexpr, BD: tl.constexpr):
    """Program: BM rows of BD columns."""
    row, i = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None], (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
    m = (row < rows) & (i < D)
    g = tl.load(gate + row * s_g + i, m, 0.0).to(tl.float32)
    u = tl.load(up + row * s_u + i, m, 0.0).to(tl.float32)
    tl.store(y + row * D + i, g * tl.sigmoid(g) * u, m)


@triton.jit
def swiglu_backward_kernel(dy, gate, up, dgate, dup, s_dy, s_g, s_u, rows, D, BM: tl.constexpr, BD: tl.constexpr):
    row, i = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None], (tl.program_id(1) * BD + tl.arange(0, BD))[None, :]
    m = (row < rows) & (i < D)
    b_dy = tl.load(dy + row * s_dy + i, m, 0.0).to(tl.float32)
    g = tl.load(gate + row * s_g + i, m, 0.0).to(tl.float32)
    u = tl.load(up + row * s_u + i, m, 0.0).to(tl.float32)
    p = tl.sigmoid(g)
    tl.store(dgate + row * D + i, b_dy * u * p * (1.0 + g * (1.0 - p)), m)
    tl.store(dup + row * D + i, b_dy * g * p, m)


# ---- under autograd -----------------------------------------------------------------------------------------------------

PROGRAMS = 264  # of the norm's backward pass: each leaves one row of dw to be added up
BLOCK = 1024    # elements in a program


def norm_blocks(D):
    """Whole rows, several where they are short."""
    BD = power_of_2(D)
    return dict(BM=max(1, BLOCK // BD), BD=BD, num_warps=4 if BD <= 4096 else 8)


def tiles(D):
    """Part of a row, or several rows where they are short."""
    BD = min(BLOCK, power_of_2(D))
    return dict(BM=BLOCK // BD, BD=BD)


class AddRMSNorm(torch.autograd.Function):
    """x, a (rows, D), weight (D,) -> s = x + a in x's dtype, y in `dtype`. a None: s is x itself."""
    @staticmethod
    def forward(ctx, x, a, weight, eps, dtype):
        rows, D = x.shape
        s = x if a is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        y, rstd, block = x.new_empty(rows, D, dtype=dtype), x.new_empty(rows, dtype=torch.float32), norm_blocks(D)
        norm_forward[(-(-rows // block["BM"]),)](x, a, weight, s, y, rstd, x.stride(0), 0 if a is None else a.stride(0), rows, D, eps,
                                                 HAS_A=a is not None, **block)
        ctx.save_for_backward(s, weight, rstd)
        ctx.a_dtype = None if a is None else a.dtype
        ctx.set_materialize_grads(False)
        return s if a is not None else None, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g, dy):
        s, weight, rstd = ctx.saved_tensors
        (rows, D), block = s.shape, norm_blocks(s.shape[1])
        if dy is None:  # only the sum was used
            return g, None if ctx.a_dtype is None else g.to(ctx.a_dtype), None, None, None
        programs = min(PROGRAMS, -(-rows // block["BM"]))
        dy, g = as_rows(dy), None if g is None else as_rows(g)
        ds, part_dw = torch.empty_like(s, memory_format=torch.contiguous_format), s.new_empty(programs, D, dtype=torch.float32)
        norm_backward[(programs,)](g, dy, s, weight, rstd, ds, part_dw, 0 if g is None else g.stride(0), dy.stride(0),
                                   s.stride(0), rows, D, HAS_G=g is not None, **block)
        return ds, None if ctx.a_dtype is None else ds.to(ctx.a_dtype), part_dw.sum(0).to(weight.dtype), None, None


def run_rotate(x, cos, sin, sign):
    """RoPE of x (B, h, T, d) at any stride but the last dimension's -> the same shape, (B, T, h, d) in memory. sign −1 rotates back."""
    B, h, T, d = x.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    y = x.new_empty(B, T, h, d)
    BH, n = power_of_2(d // 2), B * T * h
    BM = max(1, BLOCK // BH)
    rotate_kernel[(-(-n // BM),)](x, cos, sin, y, *x.stride()[:3], T, h, n, sign, H=d // 2, BH=BH, BM=BM)
    return y.transpose(1, 2)


class Rotate(torch.autograd.Function):
    """RoPE: x (B, h, T, d), cos and sin (B, 1, T, d/2), without a gradient."""
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return run_rotate(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        return run_rotate(dy, *ctx.saved_tensors, -1.0), None, None


class SwiGLU(torch.autograd.Function):
    """gate, up (rows, D), rows at any stride -> silu(gate)·up."""
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        (rows, D), y = gate.shape, torch.empty_like(gate, memory_format=torch.contiguous_format)
        t = tiles(D)
        swiglu_forward_kernel[(-(-rows // t["BM"]), -(-D // t["BD"]))](gate, up, y, gate.stride(0), up.stride(0), rows, D, **t)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        (rows, D), dy = gate.shape, as_rows(dy)
        dgate, dup = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, up))
        t = tiles(D)
        grid = -(-rows // t["BM"]), -(-D // t["BD"])
        swiglu_backward_kernel[grid](dy, gate, up, dgate, dup, dy.stride(0), gate.stride(0), up.stride(0), rows, D, **t)
        return dgate, dup
