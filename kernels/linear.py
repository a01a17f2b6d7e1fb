"""Linear layers: one product for several that read the same x, one weight gradient for many calls.

    y_t = x_t·Wᵀ + b
    each call's backward pass          dx_t = dy_t·W
    once, after all of them            dW = Σ_t dy_tᵀ·x_t,  db = Σ_t Σ_rows dy_t

W is the weights of one Linear or of several, one below the other (Merged). It is a copy in the
dtype of the product, made anew only when a weight has changed, and always at the same address: a
CUDA graph that reads it may be replayed after any number of optimizer steps.

Autograd would compute a dW at every call and add it to the sum. With 32 rows a call that is little
arithmetic for a gradient of the weight's full size, written and read again each time. Here each
call stores its (x_t, dy_t), and dW is one product over the rows of all calls. Two nodes do it:

    LinearCall       one call                            backward: dx; stores (x, dy)
    WeightGradient   a dummy scalar made from the        backward: dW and db. Autograd runs it when
                     weights, an input of each call      every LinearCall has run (the rule named in
                                                         kernels/cache.py), and adds its results to
                                                         the gradients of W's other uses

The chain whose backward pass is a CUDA graph (kernels/replayed_chain.py) makes no WeightGradient:
its nodes follow that graph, which leaves the pairs.
"""

from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from .common import as_rows, mm_float32
from .ops import compute_dtype, has_kernel

# elements of a weight: for a smaller one, the products cost less than the Python of these nodes
# (measured on a CPU)
MIN_ELEMENTS = 2**17

# the first of some parameters -> {(how many, dtype, device): [their copy, what it was made from]}
copies = WeakIdKeyDictionary()


def kept_copy(parameters, dtype):
    """Some parameters, one below the other, in dtype: a copy without a gradient, which stays at its
    address and is written again when one of them has changed. No copy if one is enough as it is.

    What is written through `.data` is not noticed before the next step of an optimizer: call
    forget_sources after it.
    """
    first = parameters[0]
    if len(parameters) == 1 and first.dtype == dtype:
        return first.detach()

    kept = copies.setdefault(first, {})
    key = len(parameters), dtype, first.device
    if key not in kept:
        n_row = sum(map(len, parameters))
        empty = torch.empty(n_row, *first.shape[1:], dtype=dtype, device=first.device)
        kept[key] = [empty, None]

    # a parameter's version counts the writes to it
    copy, copied = kept[key]
    source = [(p.data_ptr(), p._version) for p in parameters]
    if copied != source:
        kept[key][1] = source
        with torch.no_grad():
            for part, p in zip(copy.split([len(p) for p in parameters]), parameters):
                part.copy_(p)
    return copy


def forget_sources(*_):
    """After a step of any optimizer, every copy is written again: the version of a parameter does
    not count what a fused optimizer writes.
    """
    for kept in copies.values():
        for entry in kept.values():
            entry[1] = None


register_optimizer_step_post_hook(forget_sources)


def join_calls(calls):
    """x (rows, in) and dy (rows, out) of a list of calls, one below the other; empties the list."""
    joined = []
    for tensors in zip(*calls):
        rows = [as_rows(x) for x in tensors]
        joined.append(torch.cat(rows) if len(rows) > 1 else rows[0])
    calls.clear()
    return joined


def weight_gradients(x, dy, weights, biases):
    """The gradients of some weights, one below the other in W, and of their biases: two lists."""
    # the product sums over the rows
    dtype = weights[0].dtype
    dW = mm_float32(dy.t(), x) if dtype == torch.float32 else dy.t() @ x

    # summed in the parameter's dtype, because dy may have autocast's
    db = dy.sum(0, dtype=dtype) if biases else dy[0, :0]
    return dW.split([len(W) for W in weights]), db.split([len(b) for b in biases])


class WeightGradient(torch.autograd.Function):
    """(calls, weights, biases, *both) -> a dummy scalar. calls: the list that LinearCall fills."""

    @staticmethod
    def forward(ctx, calls, weights, biases, *parameters):
        ctx.calls = calls
        ctx.weights = weights
        ctx.biases = biases

        # LinearCall returns no gradient of the dummy: it arrives here as None, not as zeros
        ctx.set_materialize_grads(False)
        return parameters[0].new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        # by now every call that leads to the loss has added its pair
        if not ctx.calls:
            return None, None, None, *[None] * len(ctx.weights + ctx.biases)
        dWs, dbs = weight_gradients(*join_calls(ctx.calls), ctx.weights, ctx.biases)
        return None, None, None, *dWs, *dbs


def side_by_side(parts):
    """Join tensors (..., n_i) to (..., Σ n_i): no copy if they are neighbours in memory."""
    first = parts[0]
    end = first.storage_offset()
    for x in parts:
        place = x.untyped_storage().data_ptr(), x.storage_offset(), x.stride()
        if place != (first.untyped_storage().data_ptr(), end, first.stride()):
            return torch.cat(parts, -1)
        end += x.shape[-1]
    width = end - first.storage_offset()
    return first.as_strided((*first.shape[:-1], width), first.stride())


class LinearCall(torch.autograd.Function):
    """(calls, dummy, x, W, b, sizes) -> x·Wᵀ + b, as parts of these sizes. Without a gradient for W
    and b: backward appends (x, dy) to `calls`. dummy: WeightGradient's scalar, which makes autograd
    run that node last.
    """

    @staticmethod
    def forward(ctx, calls, dummy, x, W, b, sizes):
        ctx.calls = calls
        ctx.save_for_backward(x)
        # not saved: autograd would refuse a W that an optimizer step has changed between two
        # replays, as it should
        ctx.W = W
        return F.linear(x, W, b).split(sizes, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *parts):
        (x,) = ctx.saved_tensors
        dy = side_by_side(parts)
        ctx.calls.append((x, dy))
        return None, None, dy @ ctx.W, None, None, None


class DeferredLinear:
    """The forward of a Linear, or of some that are merged, whose weight gradient is deferred.

    has_node: a WeightGradient computes it; otherwise whoever made this object.
    """

    def __init__(self, linears, has_node=True):
        self.weights = [m.weight for m in linears]
        self.biases = [m.bias for m in linears if m.bias is not None]
        self.parameters = [*self.weights, *self.biases]
        self.has_node = has_node
        self.calls = []  # (x, dy) of each
        self.dummy = None

    def __call__(self, x):
        """x (..., in) -> (..., out), or the tuple of those of the merged ones."""
        # only inside autocast is the dtype known
        W, b = self.copies(compute_dtype(x))
        x = x.to(W.dtype)
        sizes = [len(W) for W in self.weights]
        if torch.is_grad_enabled():
            if self.has_node and self.dummy is None:
                self.dummy = self.weight_gradient(self.calls)
            parts = LinearCall.apply(self.calls, self.dummy, x, W, b, sizes)
        else:
            parts = F.linear(x, W, b).split(sizes, -1)
        return parts if len(parts) > 1 else parts[0]

    def weight_gradient(self, calls):
        """The scalar of a new WeightGradient."""
        return WeightGradient.apply(calls, self.weights, self.biases, *self.parameters)

    def copies(self, dtype):
        """(W, b) in dtype, as they are now."""
        b = kept_copy(self.biases, dtype) if self.biases else None
        return kept_copy(self.weights, dtype), b


class Linear(nn.Linear):
    """An nn.Linear that computes with the kept copy where kernels run."""

    def forward(self, x):
        if not has_kernel(x, self.weight):
            return super().forward(x)
        return DeferredLinear([self])(x)


class Merged(nn.Module):
    """Some Linears without a bias that read the same x -> a list of their results.

    Where kernels run they are one product. They remain the owner's: here is no parameter.
    """

    def __init__(self, *linears):
        super().__init__()
        self.linears = linears  # a tuple, so that they are not registered once more

    def forward(self, x):
        if not has_kernel(x, self.linears[0].weight):
            return [linear(x) for linear in self.linears]
        return DeferredLinear(self.linears)(x)


def deferred_linears(modules, has_node=True):
    """{module: its DeferredLinear} of the Linears whose weight gradient is worth deferring, and of
    all that compute with a kept copy. A Merged that is one product stands for its Linears.
    """
    inner = [m for module in modules for m in module.modules()]
    merged = [m for m in inner if isinstance(m, Merged) and has_kernel(m.linears[0].weight)]
    products = {m: m.linears for m in merged}

    within = {linear for m in merged for linear in m.linears}
    for m in inner:
        if not isinstance(m, nn.Linear) or m in within:
            continue
        has_copy = isinstance(m, Linear) and has_kernel(m.weight)
        if has_copy or m.weight.numel() >= MIN_ELEMENTS:
            products[m] = [m]
    return {m: DeferredLinear(linears, has_node) for m, linears in products.items()}


@contextmanager
def replaced_forwards(layers):
    """Inside, each module of {module: DeferredLinear} computes by it."""
    # an attribute of the instance hides the method of its class
    for module, layer in layers.items():
        module.forward = layer
    try:
        yield
    finally:
        for module in layers:
            del module.forward  # the class's own shows again


def deferred_weight_gradients(module):
    """Inside, all calls of a large Linear of `module` share one weight-gradient product."""
    return replaced_forwards(deferred_linears([module]))
