"""Linear layers that are called again and again on a few rows, and whose weight gradient is computed once.

    y_t = x_t·Wᵀ + b        each call's backward:  dx_t = dy_t·W        once, after all of them:  dW = Σ_t dy_tᵀ·x_t,  db = Σ_t Σ_rows dy_t

Autograd would make dW at every call and add it up: of 32 rows that is little arithmetic for gradients of the whole weight's
size, written and read again. Here each call puts (x_t, dy_t) aside, and dW is one product over the rows of all calls. Two nodes do it:

    Call    one call of a layer                           backward: dx; puts x and dy aside
    Gather  a scalar that holds nothing, read by the      backward: dW and db; autograd runs it when every Call's has run,
            layer's calls and made of its weights         and adds what it returns to the gradients of W's other uses

A CUDA graph cannot append to a list. Its calls write x_t and dy_t into row t of buffers (`Stacks`), and the chain asks these for dW and db
at the end.
"""
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .common import as_rows
from .ops import compute_dtype

LEAST = 2**17  # elements of a weight: a smaller one's products cost less than the Python of these nodes (measured on a CPU)


def products(x, dy, dtype, has_bias):
    """dW and db (None without a bias) of all calls: x (..., in), dy (..., out)."""
    x, dy = as_rows(x), as_rows(dy)
    return (dy.t() @ x).to(dtype), dy.sum(0, dtype=dtype) if has_bias else None


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, aside, W, b):
        ctx.aside, ctx.dtype, ctx.has_bias = aside, W.dtype, b is not None
        ctx.set_materialize_grads(False)
        return W.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        found = products(*map(torch.cat, zip(*ctx.aside)), ctx.dtype, ctx.has_bias)
        ctx.aside.clear()
        return None, *found


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
    """The forward of a Linear while its weight gradient is deferred. Autocast's copy of the weights is made at the first call. aside: a Stack,
    and its owner computes dW; None: Gather does."""
    def __init__(self, linear, aside=None):
        self.linear, self.aside, self.gather, self.W = linear, [] if aside is None else aside, None, None

    def __call__(self, x):
        """x (..., in) -> (..., out)."""
        if self.W is None:
            W, b, dtype = self.linear.weight, self.linear.bias, compute_dtype(x)
            if isinstance(self.aside, list):
                self.gather = Gather.apply(self.aside, W, b)
            self.W, self.b = W.detach().to(dtype), None if b is None else b.detach().to(dtype)
        return Call.apply(self.aside, self.gather, x.to(self.W.dtype), self.W, self.b)


def large(modules):
    """Every Linear in them whose weight gradient is put off."""
    return [m for module in modules for m in module.modules() if isinstance(m, nn.Linear) and m.weight.numel() >= LEAST]


@contextmanager
def calls(forward):
    """Inside, each Linear of {Linear: function} is that function."""
    for m, f in forward.items():
        m.forward = f
    try:
        yield
    finally:
        for m in forward:
            del m.forward


def deferred(module):
    """Inside, the calls of each large Linear of `module` share one computation of its weight gradient."""
    return calls({m: Deferred(m) for m in large([module])})


class Stack:
    """x and dy of one layer's calls, each in row `at` (1,) of n."""
    def __init__(self, n, at):
        self.n, self.at, self.pair = n, at, None

    def append(self, pair):
        if self.pair is None:
            self.pair = [x.new_zeros(self.n, *x.shape) for x in pair]
        for rows, x in zip(self.pair, pair):
            rows.index_copy_(0, self.at, x[None])


class Stacks:
    """x and dy of all large Linears of some modules. `at`: the row of those that are called next, (1,) on the device."""
    def __init__(self, modules, n, device):
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.layers = {m: Deferred(m, Stack(n, self.at)) for m in large(modules)}
        self.parameters = {p for m in self.layers for p in m.parameters()}

    def calls(self):
        """Inside, their calls are put aside here."""
        return calls(self.layers)

    def gradients(self):
        """{parameter: its gradient} of all calls."""
        found = {}
        for m, layer in self.layers.items():
            if layer.aside.pair is not None:
                dW, db = products(*layer.aside.pair, m.weight.dtype, m.bias is not None)
                found |= {m.weight: dW} | ({} if db is None else {m.bias: db})
        return found
