"""Linear layers that are called again and again on a few rows, and whose weight gradient is computed once.

    y_t = x_t·Wᵀ + b        each call's backward:  dx_t = dy_t·W        once, after all of them:  dW = Σ_t dy_tᵀ·x_t,  db = Σ_t Σ_rows dy_t

Autograd would make dW at every call and add it up: of 32 rows that is little arithmetic for gradients of the whole weight's
size, written and read again. Here each call puts (x_t, dy_t) aside, and dW is one product over the rows of all calls. Two nodes do it:

    Call    one call of a layer                           backward: dx; puts x and dy aside
    Gather  a scalar that holds nothing, read by the      backward: dW and db; autograd runs it when every Call's has run,
            layer's calls and made of its weights         and adds what it returns to the gradients of W's other uses
"""
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .common import as_rows
from .ops import compute_dtype

LEAST = 2**17  # elements of a weight: a smaller one's products cost less than the Python of these nodes (measured on a CPU)


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, aside, W, b):
        ctx.aside, ctx.dtype, ctx.has_bias = aside, W.dtype, b is not None
        ctx.set_materialize_grads(False)
        return W.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        x, dy = (as_rows(torch.cat(all)) for all in zip(*ctx.aside))  # (rows of all calls, in), (…, out)
        ctx.aside.clear()
        return None, (dy.t() @ x).to(ctx.dtype), dy.sum(0, dtype=ctx.dtype) if ctx.has_bias else None


class Call(torch.autograd.Function):
    @staticmethod
    def forward(ctx, aside, gather, x, W, b):
        ctx.aside = aside
        ctx.save_for_backward(x, W)
        return F.linear(x, W, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        ctx.aside.append((x, dy))
        return None, None, dy @ W, None, None


class Deferred:
    """The forward of a Linear while its weight gradient is deferred. Autocast's copy of the weights is made at the first call."""
    def __init__(self, linear):
        self.linear, self.aside, self.gather = linear, [], None

    def __call__(self, x):
        """x (..., in) -> (..., out)."""
        if self.gather is None:
            W, b, dtype = self.linear.weight, self.linear.bias, compute_dtype(x)
            self.gather = Gather.apply(self.aside, W, b)
            self.W, self.b = W.detach().to(dtype), None if b is None else b.detach().to(dtype)
        return Call.apply(self.aside, self.gather, x.to(self.W.dtype), self.W, self.b)


@contextmanager
def deferred(module):
    """Inside, the calls of each large Linear of `module` share one computation of its weight gradient."""
    linears = [m for m in module.modules() if isinstance(m, nn.Linear) and m.weight.numel() >= LEAST]
    for m in linears:
        m.forward = Deferred(m)
    try:
        yield
    finally:
        for m in linears:
            del m.forward
