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
