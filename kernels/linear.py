"""Linear layers: one product for several that read the same x, one weight gradient for many calls.

    y_t = x_t·Wᵀ + b
    each call's backward pass          dx_t = dy_t·W
    once, after all of them            dW = Σ_t dy_tᵀ·x_t,  db = Σ_t Σ_rows dy_t

W holds the weights of one Linear, or of several that read the same x, stacked (`together`). It is a
copy in the dtype of the product (common.kept_copy).

Autograd would compute a dW at every call and add it to the sum. With 32 rows that is little
arithmetic, but it writes and reads a tensor of the weight's full size each time. Here short calls
store their (x_t, dy_t), and dW is one product over the rows of all of them. A long call (LONG) has
a product of its own, which adds to the sum so far. Two autograd functions do this:

    LinearCall       one call                            backward: dx; (x, dy) goes to the Gradient
    WeightGradient   a dummy scalar made from the        backward: dW and db. Autograd runs it when
                     weights, an input of each call      every LinearCall has run (the rule named in
                                                         kernels/cache.py)

Where kernels run, all calls of a weight share one WeightGradient, as long as their graph is alive.
Elsewhere only the calls of large weights in the chain of latents do (deferred_weight_gradients).
"""

import math
from contextlib import contextmanager
from weakref import WeakValueDictionary

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .common import addmm, as_rows, kept_copy
from .ops import compute_dtype, has_kernel

# fewest elements of a weight whose gradient is deferred without kernels: for a smaller one, the
# Python of these functions costs more than the products that it saves (measured on a CPU)
MIN_ELEMENTS = 2**17

# rows from which on a call is long: to join so many with those of other calls moves more data than
# adding to dW
LONG = 1024

# ---- gradients -----------------------------------------------------------------------------------


class Gradient:
    """The gradients of some stacked weights and of their biases. The backward pass of each call
    adds to them.
    """

    def __init__(self, weights, biases, long):
        """long: from how many rows on a call has a product of its own."""
        self.weights = weights
        self.biases = biases
        self.long = long
        self.pairs = []  # (x, dy) of short calls, not multiplied yet
        self.dW = self.db = None

    def add(self, x, dy):
        """A call: x (rows, in), dy (rows, out)."""
        if len(x) < self.long:
            self.pairs.append((x, dy))
        else:
            self.multiply(x, dy)

    def multiply(self, x, dy):
        # the product sums over the rows; db in the weights' dtype, because dy may have autocast's
        dtype = self.weights[0].dtype
        self.dW = addmm(self.dW, dy.t(), x, dtype)
        if self.biases:
            db = dy.sum(0, dtype=dtype)
            self.db = db if self.db is None else self.db + db

    def join(self):
        """x and dy of the short calls, one below the other, which are forgotten. []: none."""
        joined = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*self.pairs)]
        self.pairs.clear()
        return joined

    def sums(self):
        """The gradient of each weight and each bias, None without a call; begins anew."""
        if self.pairs:
            self.multiply(*self.join())
        if self.dW is None:
            return [None] * len(self.weights + self.biases)
        parts = [*self.dW.split([len(W) for W in self.weights])]
        if self.biases:  # of one Linear: several in one product have none
            parts.append(self.db)
        self.dW = self.db = None
        return parts


class WeightGradient(torch.autograd.Function):
    """(gradient, *its weights, *its biases) -> a dummy scalar."""

    @staticmethod
    def forward(ctx, gradient, *parameters):
        ctx.gradient = gradient
        # LinearCall returns no gradient of the dummy: it arrives here as None, not as zeros
        ctx.set_materialize_grads(False)
        return parameters[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        # by now every call that leads to the loss has been added
        return None, *ctx.gradient.sums()


# Ids of weights -> the scalar of their calls that are alive: a call keeps it, and its gradient the
# weights, so that no id can be another's
alive = WeakValueDictionary()

# inside deferred_weight_gradients: ({ids of weights: scalar}, whether these are linked to the
# weights). Outside it is None, and calls look in `alive`, if kernels run
scope = None


@contextmanager
def deferred_weight_gradients(calls=None):
    """Inside, all calls of a large Linear, long ones too, share one product for its weight's
    gradient, and share it with no call outside. calls: a dict that receives {ids of weights: their
    scalar}. Then these are not linked to the weights, whose nodes stay out of the graph of the
    calls, and the caller reads each scalar.gradient itself. One may not be inside another.
    """
    global scope
    scope = ({}, True) if calls is None else (calls, False)
    try:
        yield
    finally:
        scope = None


def shared(weights, biases):
    """The scalar for a new call. All calls with these weights share it, and its .gradient."""
    calls, is_linked = scope or (alive, True)
    key = tuple(map(id, weights))
    # (looked up once: what is alive can go at any time)
    scalar = calls.get(key)
    if scalar is None:
        gradient = Gradient(weights, biases, LONG if calls is alive else math.inf)
        parameters = weights + biases
        if not is_linked:
            parameters = [p.detach().requires_grad_(p.requires_grad) for p in parameters]
        scalar = calls[key] = WeightGradient.apply(gradient, *parameters)
        scalar.gradient = gradient  # where the calls find it
    return scalar


# ---- products ------------------------------------------------------------------------------------


def side_by_side(parts):
    """Join tensors (..., n_i) to (..., Σ n_i): no copy if they are neighbours in memory."""
    # where the whole would begin by each of its parts: they are neighbours if all agree
    places = set()
    width = 0
    for x in parts:
        places.add((x.untyped_storage().data_ptr(), x.storage_offset() - width, x.stride()))
        width += x.shape[-1]
    if len(places) > 1:
        return torch.cat(parts, -1)
    first = parts[0]
    return first.as_strided((*first.shape[:-1], width), first.stride())


class LinearCall(torch.autograd.Function):
    """(scalar, x, W, b, sizes) -> x·Wᵀ + b, as parts of these sizes. scalar: from `shared`. The
    backward pass adds (x, dy) to scalar.gradient. As an input of every call, scalar makes autograd
    run WeightGradient last.
    """

    @staticmethod
    def forward(ctx, scalar, x, W, b, sizes):
        ctx.scalar = scalar
        ctx.shape = x.shape
        x = as_rows(x)
        ctx.save_for_backward(x)
        # not saved: autograd would refuse a W that an optimizer step has changed between two
        # replays, as it should
        ctx.W = W
        return linear_of_rows(x, W, b, ctx.shape).split(sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *parts):
        (x,) = ctx.saved_tensors
        dy = as_rows(side_by_side(parts))
        if ctx.needs_input_grad[0]:  # the weights are not frozen
            ctx.scalar.gradient.add(x, dy)
        return None, (dy @ ctx.W).view(ctx.shape), None, None, None


def linear_of_rows(rows, W, b, shape):
    """x·Wᵀ + b (..., out) of an x (..., in) of this shape, given as its rows (R, in).

    F.linear of x itself would be a batch of B products if the rows of x (B, T, in) are not side by
    side in memory, and each of them would read W.
    """
    return F.linear(rows, W, b).view(*shape[:-1], len(W))


def product(x, linears):
    """x (..., in) -> x·Wᵀ + b (..., out) of each of some Linears, in one product, whose weight
    gradient is deferred.
    """
    weights = [m.weight for m in linears]
    biases = [m.bias for m in linears if m.bias is not None]

    # only inside autocast is the dtype known
    W, b = copies_of(weights, biases, compute_dtype(x))
    x = x.to(W.dtype)
    sizes = [len(W) for W in weights]
    if not torch.is_grad_enabled():
        return linear_of_rows(as_rows(x), W, b, x.shape).split(sizes, -1)
    return LinearCall.apply(shared(weights, biases), x, W, b, sizes)


def copies_of(weights, biases, dtype):
    """(W, b) in dtype, as they are now."""
    return kept_copy(weights, dtype), kept_copy(biases, dtype) if biases else None


class Linear(nn.Linear):
    """An nn.Linear that computes with the kept copy where kernels run. Its weight gradient can be
    deferred.
    """

    def forward(self, x):
        is_deferred = scope is not None and self.weight.numel() >= MIN_ELEMENTS
        if is_deferred or has_kernel(x, self.weight):
            return product(x, [self])[0]
        return super().forward(x)


def together(x, *linears):
    """The results of some Linears without a bias that read the same x: one product where kernels
    run, and all are Linears of this file. Another module in a Linear's place is called by itself.
    """
    are_plain = all(type(m) is Linear for m in linears)
    if are_plain and has_kernel(x, linears[0].weight):
        return product(x, linears)
    return [linear(x) for linear in linears]
