"""The choice between Triton and PyTorch: Triton on a CUDA device, PyTorch elsewhere.

The model calls the functions below and does not know which of the two runs. Each states its
formula. The file that it calls holds the kernel, the backward pass and the PyTorch reference.

Two choices are made elsewhere. Where kernels run, Llama.cache takes the cache of kernels/cache.py,
which uses the attention kernels for a step of up to MAX_STEP_COLUMNS positions, and PyTorch's SDPA
for a longer pass. Without kernels, KVCache.attend in minatp/llama.py uses SDPA
(attention.masked_sdpa) or two plain products.

    MINATP_KERNELS=auto | torch | triton    auto is the default; triton is an error if unavailable
    MINATP_GRAPHS=0                         no CUDA graphs (kernels/graph.py)
    TRITON_INTERPRET=1                      with triton: kernels on a CPU, slow, for tests
"""

import math
import os

import torch
import torch.nn.functional as F

from . import cross_entropy, rows, sampling, vae
from .common import HAS_TRITON, as_rows

CHOICES = ("auto", "torch", "triton")


class Unavailable(Exception):
    """MINATP_KERNELS names kernels that cannot run here, or that do not exist."""


# ---- the choice ----------------------------------------------------------------------------------


def use_triton(device, dtype=torch.float32):
    """Return whether tensors of this device and dtype are computed by the Triton kernels.

    Raises Unavailable if MINATP_KERNELS=triton and they cannot be.
    """
    # The environment is read at every call, so that one process can compare kernels and PyTorch.
    choice = os.environ.get("MINATP_KERNELS", "auto")
    if choice not in CHOICES:
        raise Unavailable(f"MINATP_KERNELS must be one of {', '.join(CHOICES)}, not {choice!r}")
    if choice == "torch":
        return False

    # The interpreter is slow, so a CPU uses it only if it is asked to.
    if choice == "auto" and device.type != "cuda":
        return False

    # auto falls back to PyTorch. If kernels were asked for and cannot run, that is an error.
    obstacle = obstacle_to_triton(device, dtype)
    if choice == "triton" and obstacle:
        raise Unavailable(f"MINATP_KERNELS=triton: {obstacle}")
    return not obstacle


def obstacle_to_triton(device, dtype):
    """Return why no kernel can compute on this device and dtype. None if kernels can."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not HAS_TRITON:
        return "triton is not installed"

    # Kernels compute in float32, so a float64 tensor would lose precision.
    if dtype == torch.float64:
        return f"there is no kernel for {dtype}"
    if device.type != "cuda" and not interpreted:
        return f"no kernel runs on {device.type} without TRITON_INTERPRET=1"
    return None


def has_kernel(*tensors):
    """Return whether these tensors, on one device, are computed by the Triton kernels."""
    # One float64 tensor is enough to rule the kernels out, whatever the dtypes of the others.
    any_float64 = any(x.dtype == torch.float64 for x in tensors)
    return use_triton(tensors[0].device, torch.float64 if any_float64 else tensors[0].dtype)


def compute_dtype(x):
    """Return the dtype in which a product with x is computed: autocast's if it is on, else x's."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype


# ---- the VAE -------------------------------------------------------------------------------------


def noise_keys(seed, *shape):
    """Return the keys of noise ε that is not drawn yet: int64 (*shape, 2) on the CPU.

    A key is a seed and an offset. All have this seed, and each has an offset of its own.
    """
    # The offset is a latent's place in the order of `shape`. It goes with the key, so a latent's ε
    # stays the same when the keys are cut into micro-batches or shared among processes.
    offset = torch.arange(math.prod(shape)).view(shape)
    return torch.stack((torch.full_like(offset, seed), offset), -1)


def prepare_noise(eps, D):
    """Prepare eps for many calls of `reparameterise`. None stays None.

    Where kernels run, each call draws its ε from the keys. Elsewhere ε is drawn here, all at once:
    keys (..., 2) -> ε (..., D).
    """
    if eps is None or use_triton(eps.device):
        return eps
    return vae.draw_noise(eps, D)


def reparameterise(mu, logvar, eps=None, z=None):
    """Return z = μ + σε (..., D), and each row's KL(N(μ, σ²) ‖ N(0, I)) and log N(z; μ, σ²) (...).

    The KL is a mean over the dimensions, the log-probability a sum. eps: ε (..., D), or its keys
    (..., 2). With z given, that z is used; with neither, z = μ. Kernel: kernels/vae.py.
    """
    tensors = (mu, logvar) if z is None else (mu, logvar, z)
    if has_kernel(*tensors):
        return vae.fused_reparameterise(mu, logvar, eps, z)
    return vae.reparameterise(mu, logvar, eps, z)


# ---- a layer -------------------------------------------------------------------------------------


def add_rms_norm(x, branch, weight, eps):
    """Return s = x + branch and y = weight·s / sqrt(mean(s²) + eps), both (..., D).

    branch None: there is nothing to add, and s is x. The kernel writes y in the dtype of the
    products that read it. Kernel: kernels/rows.py.
    """
    if not has_kernel(x, weight):
        return rows.add_rms_norm(x, branch, weight, eps)

    # The kernel sees rows. Without a branch it returns no s, because s is x itself.
    branch_rows = None if branch is None else as_rows(branch)
    s, y = rows.AddRMSNorm.apply(as_rows(x), branch_rows, weight, eps, compute_dtype(x))
    s = x if branch is None else s.view(x.shape)
    return s, y.view(x.shape)


def rotate(x, cos, sin):
    """RoPE: (x₁, x₂) -> (x₁·cos − x₂·sin, x₂·cos + x₁·sin), with x₁ and x₂ the halves of each head.

    x (B, nh, T, hd), cos and sin (B, 1, T, hd/2), contiguous. Kernel: kernels/rows.py.
    """
    if has_kernel(x, cos):
        return rows.Rotate.apply(x, cos, sin)
    return rows.rotate(x, cos, sin)


def swiglu(gate, up):
    """Return silu(gate)·up (..., D). Kernel: kernels/rows.py."""
    if has_kernel(gate, up):
        return rows.SwiGLU.apply(as_rows(gate), as_rows(up)).view(gate.shape)
    return rows.swiglu(gate, up)


def linear_nll(h, W, target, temperature=1.0):
    """Return −log softmax(h·Wᵀ/temperature)[target], float32, 0 where the target is IGNORE (−100).

    h (..., D), W (V, D), target (...) -> (...). Kernel: kernels/cross_entropy.py.
    """
    if not has_kernel(h, W):
        return cross_entropy.linear_nll(h, W, target, temperature)

    # autocast casts the inputs of PyTorch's products, but knows nothing of a kernel.
    return cross_entropy.fused_linear_nll(h.to(compute_dtype(h)), W, target, temperature)


def logits(h, W):
    """Return h·Wᵀ (..., V): h (..., D), W (V, D). From kernels it is float32."""
    # The kernels' copy of W has no gradient.
    if torch.is_grad_enabled() or not has_kernel(h, W):
        return F.linear(h, W)
    return cross_entropy.logits(h.to(compute_dtype(h)), W)


def sample(logits, u=None, temperature=1.0):
    """Choose a word of each row: logits (R, V), u (R,) uniform in (0, 1) -> word, log p, both (R,).

    It is the first word at which the cumulative softmax(logits/temperature) reaches u. With u None
    it is the likeliest. Kernel: kernels/sampling.py.
    """
    if has_kernel(logits):
        return sampling.fused_sample(logits, u, temperature)
    return sampling.sample(logits, u, temperature)
