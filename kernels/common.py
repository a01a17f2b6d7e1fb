"""What the kernel files share: an optional Triton, the dtypes and shapes that kernels take, and
copies of weights in the dtype of products.
"""

import types
from contextlib import contextmanager

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

try:
    import triton
    import triton.language as tl
except ImportError:
    # Triton has no wheel for macOS and Windows. The PyTorch references run there. These stand-ins
    # only let the files that define kernels be imported: no kernel is ever launched.
    def leave_uncompiled(kernel):
        return kernel

    triton = types.SimpleNamespace(jit=leave_uncompiled)
    tl = types.SimpleNamespace(constexpr=None)

# The stand-in above has no __version__.
HAS_TRITON = hasattr(triton, "__version__")

# How a RuntimeError says that it is a failed allocation: on the CPU; in CUDA or Triton; in cuBLAS
OUT_OF_MEMORY_MESSAGES = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error):
    """Return whether an exception is a failed allocation.

    Python and PyTorch's CUDA allocator raise classes of their own. CUDA, cuBLAS, Triton and the CPU
    allocator of PyTorch raise a plain RuntimeError, which only its message tells apart.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError):
        return False
    message = str(error)
    return any(fragment in message for fragment in OUT_OF_MEMORY_MESSAGES)


def upcast(x):
    """Return x in float32. float64 stays float64, so that tests can compute in it."""
    if x.dtype == torch.float64:
        return x
    return x.float()


def as_rows(x):
    """Flatten x (..., D) to (rows, D), each row contiguous; a view where the strides allow it."""
    rows = x.reshape(-1, x.shape[-1])

    # Kernels take rows at any distance, but a row's elements side by side. The stride within a row
    # of one element means nothing.
    if rows.stride(1) == 1 or rows.shape[1] == 1:
        return rows
    return rows.contiguous()


def row_stride(x):
    """Return the distance between two rows of x, in elements. 0 if x is None."""
    # None is an input that this launch does not have: its kernel reads nothing at the stride.
    return 0 if x is None else x.stride(0)


def empty_contiguous(x):
    """Return uninitialized memory of x's shape and dtype, contiguous whatever the strides of x."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def mm_float32(a, b, out=None):
    """Return a·b in float32, whatever the dtype of a and b, in `out` if it is given.

    A matrix instruction sums products of 16-bit numbers in float32, so nothing has to be rounded.
    """
    # PyTorch has no such product on a CPU, where this makes the weight gradients of a chain in
    # bfloat16. (Autocast would round them again)
    if a.device.type == "cpu" or a.dtype == torch.float32:
        with torch.autocast("cpu", enabled=False):
            return torch.mm(a.float(), b.float(), out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def addmm(total, a, b, dtype):
    """Return total + a·b in dtype, written over `total`; a·b if that is None.

    dtype: float32, as in mm_float32, or that of a and b.
    """
    if total is None:
        return mm_float32(a, b) if dtype == torch.float32 else a @ b
    if a.device.type == "cpu" or a.dtype == dtype:
        return total.addmm_(a.to(dtype), b.to(dtype))
    return torch.addmm(total, a, b, out_dtype=dtype, out=total)


def ceil_div(n, divisor):
    """Return n / divisor, rounded up: how many blocks of size `divisor` cover n elements."""
    return -(-n // divisor)


def next_power_of_2(n, least=1):
    """Return the smallest power of two that is at least n and at least `least` (a power of two)."""
    return max(least, 1 << (n - 1).bit_length())


# ---- copies of weights in the dtype of products --------------------------------------------------

# the first of some parameters -> {(how many, rows, dtype, device): [their copy, its source]}
copies = WeakIdKeyDictionary()


def kept_copy(parameters, dtype, multiple=1):
    """Return some parameters, one below the other, in dtype, as a copy without a gradient.

    It is made anew only when a parameter has changed, and always at the same address: a CUDA graph
    that reads it may be replayed after any number of optimizer steps. Rows of zeros make its length
    a multiple of `multiple`. There is no copy if one parameter is enough as it is.

    What is written through `.data` is not noticed before the next step of an optimizer: call
    forget_sources after it.
    """
    first = parameters[0]
    n_row = ceil_div(sum(map(len, parameters)), multiple) * multiple
    if len(parameters) == 1 and first.dtype == dtype and len(first) == n_row:
        return first.detach()

    kept = copies.setdefault(first, {})
    key = len(parameters), n_row, dtype, first.device
    if key not in kept:
        zeros = torch.zeros(n_row, *first.shape[1:], dtype=dtype, device=first.device)
        kept[key] = [zeros, None]

    # A parameter's version counts the writes to it.
    copy, copied = kept[key]
    source = [(p.data_ptr(), p._version) for p in parameters]
    if copied != source:
        kept[key][1] = source
        with torch.no_grad():
            begin = 0
            for p in parameters:
                copy[begin : begin + len(p)].copy_(p)
                begin += len(p)
    return copy


def forget_sources(*_):
    """After a step of any optimizer, have every copy written again: the version of a parameter does
    not count what a fused optimizer writes.
    """
    for kept in copies.values():
        for entry in kept.values():
            entry[1] = None


register_optimizer_step_post_hook(forget_sources)


@contextmanager
def cast_once(module):
    """Inside, autocast keeps its low-precision copies of a frozen module's weights.

    It caches them only for weights that require a gradient; otherwise each word would cast them all
    again.
    """
    # Setting the flag is enough. Callers are under no_grad, so no graph is built.
    frozen = [p for p in module.parameters() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)
