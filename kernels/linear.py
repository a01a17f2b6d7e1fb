"""Linear layers that are called many times on a few rows: one weight gradient for all calls.

    y_t = x_t·Wᵀ + b
    each call's backward pass          dx_t = dy_t·W
    once, after all of them            dW = Σ_t dy_tᵀ·x_t,  db = Σ_t Σ_rows dy_t

Autograd would compute a dW at every call and add it to the sum. With 32 rows a call that is little
arithmetic for a gradient of the weight's full size, written and read again each time. Here each
call stores its (x_t, dy_t), and dW is one product over the rows of all calls. Two nodes do it:

    LinearCall       one call of a layer                 backward: dx; stores (x, dy)
    WeightGradient   a dummy scalar made from the        backward: dW and db. Autograd runs it when
                     weights, an input of each call      every LinearCall has run (the rule named in
                                                         kernels/cache.py), and adds its results to
                                                         the gradients of W's other uses

A CUDA graph cannot append to a list. There the calls write x_t and dy_t to row t of preallocated
buffers (CallBuffers), and the chain asks these for dW and db at the end.
"""

from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .common import as_rows
from .ops import compute_dtype

# elements of a weight: for a smaller one, the products cost less than the Python of these nodes
# (measured on a CPU)
MIN_ELEMENTS = 2**17


def weight_gradient(x, dy, dtype, has_bias):
    """(dW, db) of all calls, db None without a bias: x (..., in), dy (..., out)."""
    # all rows of all calls, one below the other: the product sums over them
    x = as_rows(x)
    dy = as_rows(dy)
    dW = (dy.t() @ x).to(dtype)

    # summed in the parameter's dtype, because dy may have autocast's
    db = dy.sum(0, dtype=dtype) if has_bias else None
    return dW, db


class WeightGradient(torch.autograd.Function):
    """(calls, W, b) -> a dummy scalar. calls: the list of (x, dy) that LinearCall fills."""

    @staticmethod
    def forward(ctx, calls, W, b):
        ctx.calls = calls
        ctx.dtype = W.dtype
        ctx.has_bias = b is not None

        # LinearCall returns no gradient of the dummy: it arrives here as None, not as zeros
        ctx.set_materialize_grads(False)
        return W.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        # by now every call that leads to the loss has added its pair
        xs, dys = zip(*ctx.calls)
        dW, db = weight_gradient(torch.cat(xs), torch.cat(dys), ctx.dtype, ctx.has_bias)
        ctx.calls.clear()  # free them
        return None, dW, db


class LinearCall(torch.autograd.Function):
    """(calls, dummy, x, W, b) -> x·Wᵀ + b. Without a gradient for W and b: backward appends (x, dy)
    to `calls`. dummy: WeightGradient's scalar, which makes autograd run that node last.
    """

    @staticmethod
    def forward(ctx, calls, dummy, x, W, b):
        ctx.calls = calls
        ctx.save_for_backward(x, W)
        return F.linear(x, W, b)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, W = ctx.saved_tensors
        ctx.calls.append((x, dy))
        return None, None, dy @ W, None, None


class DeferredLinear:
    """The forward of a Linear whose weight gradient is deferred.

    buffer: a CallBuffer whose owner computes dW; None: WeightGradient computes it.
    """

    def __init__(self, linear, buffer=None):
        self.linear = linear
        self.buffer = buffer

        # takes each call's (x, dy): a list, or a CallBuffer, which has `append`, too
        self.calls = [] if buffer is None else buffer
        self.dummy = None
        self.W = None  # until the first call

    def prepare(self, dtype):
        """Cast the weights once for all calls, as autocast would. Make the node that yields dW."""
        W, b = self.linear.weight, self.linear.bias
        if self.buffer is None:
            self.dummy = WeightGradient.apply(self.calls, W, b)

        # detached: no gradient reaches W and b through these copies
        self.W = W.detach().to(dtype)
        self.b = None if b is None else b.detach().to(dtype)

    def __call__(self, x):
        """x (..., in) -> (..., out)."""
        # not before the first call: only inside autocast is the dtype known
        if self.W is None:
            self.prepare(compute_dtype(x))
        return LinearCall.apply(self.calls, self.dummy, x.to(self.W.dtype), self.W, self.b)


def large_linears(modules):
    """Every Linear in `modules` whose weight gradient is worth deferring."""
    return [
        m
        for module in modules
        for m in module.modules()
        if isinstance(m, nn.Linear) and m.weight.numel() >= MIN_ELEMENTS
    ]


@contextmanager
def replaced_forwards(forwards):
    """Inside, each module of {module: function} has the function as its forward."""
    # an attribute of the instance hides the method of its class
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward  # the class's own shows again


def deferred_weight_gradients(module):
    """Inside, all calls of a large Linear of `module` share one weight-gradient product."""
    return replaced_forwards({m: DeferredLinear(m) for m in large_linears([module])})


class CallBuffer:
    """x and dy of one layer's calls: call `index` (1,) writes row `index` of n_calls."""

    def __init__(self, n_calls, index):
        self.n_calls = n_calls
        self.index = index
        self.x = None  # (n_calls, ..., in) after the first call
        self.dy = None  # (n_calls, ..., out)

    def append(self, call):
        """Store (x, dy) of the current call."""
        x, dy = call

        # zeros, because a layer may be called for some latents only: π does not read those that are
        # fed to no row
        if self.x is None:
            self.x = x.new_zeros(self.n_calls, *x.shape)
            self.dy = dy.new_zeros(self.n_calls, *dy.shape)

        # the row is read from the device, so that each replay of a graph writes another
        self.x.index_copy_(0, self.index, x[None])
        self.dy.index_copy_(0, self.index, dy[None])


class CallBuffers:
    """x and dy of every large Linear of some modules.

    index (1,) on the device: the row that the next calls write.
    """

    def __init__(self, modules, n_calls, device):
        # one tensor, shared by the buffers of all layers
        self.index = torch.zeros(1, dtype=torch.long, device=device)
        self.layers = {}  # {Linear: its DeferredLinear}
        for m in large_linears(modules):
            self.layers[m] = DeferredLinear(m, CallBuffer(n_calls, self.index))

        # the parameters whose gradients are found here, and need no other sum
        self.parameters = {p for m in self.layers for p in m.parameters()}

    def recording(self):
        """Inside, the layers' calls are stored here."""
        return replaced_forwards(self.layers)

    def gradients(self):
        """{parameter: its gradient} over all calls."""
        gradients = {}
        for m, layer in self.layers.items():
            calls = layer.buffer
            if calls.x is None:  # never called
                continue
            has_bias = m.bias is not None
            dW, db = weight_gradient(calls.x, calls.dy, m.weight.dtype, has_bias)
            gradients[m.weight] = dW
            if has_bias:
                gradients[m.bias] = db
        return gradients
