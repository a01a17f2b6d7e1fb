"""How the tests of the kernels compare floating-point numbers: on which device, and how closely."""

import os

import torch

DEVICE = "cpu" if os.environ["TRITON_INTERPRET"] == "1" else "cuda"

# Largest relative error in L2. A GPU computes exp(x) as 2^(x·log₂e), whose exponent is rounded: an
# error of 1e-6 at x = 30. In float16 every input, result and operand is rounded to 2⁻¹¹.
FP32 = 1e-6 if DEVICE == "cpu" else 4e-6
FP16 = 2e-3


def close(actual, expected, bound=FP32, name=""):
    """Assert that the relative error in L2 is at most `bound`.

    If the expected values are practically 0, the error is their absolute error's root mean square.
    """
    expected = expected.double()
    norm = expected.norm()
    root_n = expected.numel() ** 0.5
    if norm > 1e-3 * root_n:
        scale = norm
    else:
        scale = root_n or 1
    error = (actual.double() - expected).norm() / scale
    assert error <= bound, f"{name}: {error:.2e}"


def normal(*shape, dtype=torch.float32):
    """Return standard normals on the device of the tests, drawn in float32."""
    return torch.randn(shape, device=DEVICE).to(dtype)
