"""What the kernel files share: Triton where it is installed, and the shapes that kernels take."""
import types

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # macOS and Windows have no wheel: the references beside the kernels serve, and no kernel is ever launched
    triton = types.SimpleNamespace(jit=lambda kernel: kernel)
    tl = types.SimpleNamespace(constexpr=None)

HAS_TRITON = hasattr(triton, "__version__")


def is_out_of_memory(error):
    """Whether an exception is a failed allocation: of Python, of PyTorch, or of CUDA, cuBLAS, Triton or the CPU, which only say so."""
    said = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or isinstance(error, RuntimeError) and any(s in str(error) for s in said)


def wide(x):
    """x in float32; float64 stays, so that a test can ask for it."""
    return x if x.dtype == torch.float64 else x.float()


def as_rows(x):
    """x (..., D) -> (rows, D) with neighbouring elements side by side; a view wherever the strides allow one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def power_of_2(n, least=1):
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())
