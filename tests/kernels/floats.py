"""What the tests of the kernels compare with, and how closely."""

import os

import torch

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"
FP32 = (
    1e-6 if DEVICE == "cpu" else 4e-6
)  # relative L2; a GPU's exp(x) is 2^(x·log₂e), which rounds the exponent: 1e-6 at x = 30
FP16 = 2e-3  # relative L2: every input, result and operand of a product is rounded to 2⁻¹¹


def close(got, want, bound=FP32, what=""):
    """Relative L2; where the true value is next to nothing, the error's root mean square."""
    want = want.double()
    error = (got.double() - want).norm() / (
        want.norm() if want.norm() > 1e-3 * want.numel() ** 0.5 else want.numel() ** 0.5 or 1
    )
    assert error <= bound, f"{what}: {error:.2e}"


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)
