"""The one place that chooses kernels: Triton on a CUDA device, PyTorch elsewhere. The model calls these names and does not know.

    MINATP_KERNELS=auto | torch | triton        a choice that cannot be had is an error
    MINATP_GRAPHS=0                             no CUDA graphs (kernels/graph.py)
    TRITON_INTERPRET=1                          Triton's interpreter, which runs the kernels on a CPU: slow, for tests
"""
import math
import os

import torch

from . import cross_entropy, rows, vae
from .cache import StepCache
from .common import HAS_TRITON, as_rows

CHOICES = ("auto", "torch", "triton")


class Unavailable(Exception):
    """The kernels asked for cannot be had here."""


def use_triton(device, dtype=torch.float32):
    """Whether the kernels serve tensors of this device and dtype. Raises Unavailable where MINATP_KERNELS asks for what is not there."""
    choice = os.environ.get("MINATP_KERNELS", "auto")
    if choice not in CHOICES:
        raise Unavailable(f"MINATP_KERNELS must be one of {', '.join(CHOICES)}, not {choice!r}")
    if choice == "torch":
        return False
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    missing = ("triton is not installed" if not HAS_TRITON else
               f"there is no kernel for {dtype}" if dtype == torch.float64 else
               f"there is none for {device.type}, save under TRITON_INTERPRET=1" if device.type != "cuda" and not interpreted else "")
    if choice == "triton" and missing:
        raise Unavailable(f"MINATP_KERNELS=triton: {missing}")
    return not missing and (device.type == "cuda" or choice == "triton")


def serves(*tensors):
    """Whether the kernels serve these tensors, which lie on one device."""
    return use_triton(tensors[0].device, torch.float64 if any(x.dtype == torch.float64 for x in tensors) else tensors[0].dtype)


# ---- the VAE ------------------------------------------------------------------------------------------------------------

def noise(seed, *shape):
    """ε not drawn yet: its seed and an offset of its own for each, (*shape, 2) int64 on the CPU."""
    offset = torch.arange(math.prod(shape)).view(shape)
    return torch.stack((torch.full_like(offset, seed), offset), -1)


def prepared(eps, D):
    """ε for many calls of `reparameterise`: left to its kernel where that serves, else drawn here, all at once. None stays None."""
    return eps if eps is None or use_triton(eps.device) else vae.drawn(eps, D)


def reparameterise(mu, logvar, eps=None, z=None):
    """z = μ + σε (..., D), its rows' KL(N(μ, σ²) ‖ N(0, I)), mean over the dimensions, and log N(z; μ, σ²), their sum (...). ε given or drawn
    (kernels/vae.py). z given: that one; neither given: z = μ."""
    return (vae.apply if serves(mu, logvar, *(() if z is None else (z,))) else vae.reparameterise)(mu, logvar, eps, z)


# ---- a layer ------------------------------------------------------------------------------------------------------------

def compute_dtype(x):
    """What a product of x is computed in: autocast's dtype where that is on, else x's own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def add_rms_norm(x, a, weight, eps):
    """(x + a, its RMSNorm) of (..., D), the norm in the dtype of the products that read it. a None: there is nothing to add."""
    if not serves(x, weight):
        return rows.add_rms_norm(x, a, weight, eps)
    s, y = rows.AddRMSNorm.apply(as_rows(x), None if a is None else as_rows(a), weight, eps, compute_dtype(x))
    return x if a is None else s.view(x.shape), y.view(x.shape)


def rotate(x, cos, sin):
    """RoPE: rotate the pairs (x_i, x_{i+hd/2}) of x (B, h, T, hd) by the angles in cos, sin (B, 1, T, hd/2)."""
    return rows.Rotate.apply(x, cos, sin) if serves(x, cos) else rows.rotate(x, cos, sin)


def swiglu(gate, up):
    """silu(gate)·up, (..., D)."""
    return rows.SwiGLU.apply(as_rows(gate), as_rows(up)).view(gate.shape) if serves(gate, up) else rows.swiglu(gate, up)


def cache(reference, cfg, B, T, weight):
    """An empty cache for B rows and at most T columns, where `weight` lies: a StepCache where the kernels serve, else `reference(…)`."""
    return (StepCache if serves(weight) else reference)(cfg, B, T, weight.device)


def linear_nll(h, W, target, temperature=1.0):
    """-log p of each target under softmax(h·Wᵀ/temperature), float32, 0 where it is −100: h (..., D), W (V, D), target (...) -> (...)."""
    if not serves(h, W):
        return cross_entropy.linear_nll(h, W, target, temperature)
    dtype = compute_dtype(h)
    return cross_entropy.apply(h.to(dtype), W.to(dtype), target, temperature)
