"""The one place that chooses: Triton on a CUDA device, PyTorch elsewhere. The model calls these names and does not know.

    MINATP_KERNELS=auto | torch | triton        a choice that cannot be had is an error
    TRITON_INTERPRET=1                          Triton's interpreter, which runs the kernels on a CPU: slow, for tests
"""
import os

import torch

from . import vae
from .common import HAS_TRITON

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
    wide = any(x.dtype == torch.float64 for x in tensors)
    return use_triton(tensors[0].device, torch.float64 if wide else tensors[0].dtype)


# ---- the VAE ------------------------------------------------------------------------------------------------------------

def reparameterise(mu, logvar, eps):
    """z = μ + σε, its KL and its log-probability by row: (..., D), (...), (...)."""
    return vae.apply(mu, logvar, eps, mode=vae.GIVEN) if serves(mu, eps) else vae.reparameterise(mu, logvar, eps)


def draw(mu, logvar, seed, offset):
    """As `reparameterise`, ε drawn by Philox of seed (1,) and offset (...), int64: one draw for each value of a row's offset."""
    if serves(mu):
        return vae.apply(mu, logvar, seed=seed, offset=offset, mode=vae.DRAW)
    return vae.reparameterise(mu, logvar, vae.philox(seed, offset.reshape(-1), mu.shape[-1]).view(mu.shape).to(mu.dtype))


def kl_normal(mu, logvar):
    """KL(N(μ, σ²) ‖ N(0, I)) of each row, mean over the dimensions: (..., D) -> (...)."""
    return vae.apply(mu, logvar)[1] if serves(mu) else vae.kl_normal(mu, logvar)


def gaussian_log_prob(z, mu, logvar):
    """log N(z; μ, σ²) of each row, summed over the dimensions: (..., D) -> (...)."""
    return vae.apply(mu, logvar, z, mode=vae.SCORE)[2] if serves(z, mu) else vae.gaussian_log_prob(z, mu, logvar)
