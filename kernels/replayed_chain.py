"""The chain of latents (minatp/chain.py) on a GPU: two CUDA graphs, forward and backward.

With autograd, a GPU would wait for Python most of the time that the chain takes. Here the loop runs
under autograd while it is recorded, all latents of it, and its backward pass, too. A graph holds
addresses, so it works on tensors of its own: a batch's hidden states, noise and prefix are copied
there, and the results are copied out.

A graph also holds sizes. Batches are rounded up: the prefix to PREFIX columns, by padding that is
not read, and the latents to LATENTS, by some that no row reads. Batches of the same sizes share one
KeptChain, and a run of 100 batches of GSM8K needs 4 or 5. Its first batch runs without graphs,
which compiles the kernels; the second records them.

The weight gradients of large Linears are not recorded. The graph of the backward pass leaves x and
dy of all latents, and one product for each weight follows (kernels/linear.py).

The loop is passed in, so nothing here imports minatp. What it needs of the model:

    propose(h, eps, spread=)         the latent
    policy.step(z, is_fed, cache)    h_{t+1}
    its parameters                   each that a latent passes through gets its gradient here; those
                                     named ….norm.weight or …layernorm.weight are of RMSNorms
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from . import graph
from .common import ceil_div
from .linear import Linear, copies_of, deferred_weight_gradients, shared
from .ops import compute_dtype

PREFIX = 128  # columns of the prefix are rounded up to a multiple of this
LATENTS = 4  # and latents of this
SHARES = 32  # of the gradient of an RMSNorm's weight (rows.AddRMSNorm)

# chains of different sizes that are kept. Each holds the activations of a batch, 1 GB at llama-1b
MAX_KEPT = 8
MAX_BYTES = 12 * 2**30


def run(loop, model, h, cache, plan):
    """Walk the chain from h (B, D), with the gradients that `loop` has under autograd.

    loop: chain.latent_loop. Returns the fields of its Latent, each (B, n_candidate, …) or None, and
    n_latent (B,).
    """
    # what the chain reads: first what a gradient flows to
    P, L, n_candidate = rounded_up(cache, plan)
    padding = P - cache.P
    kv = [F.pad(x, (0, 0, padding, 0)) for x in cache.prefix_kv]

    # the rest by name
    given = {**cache.groups, "n_prefix_real": cache.n_prefix_real, "n_latent": plan.n_latent}
    given["start"] = given["start"] + padding
    if plan.answer_only is not None:
        given["answer_only"] = plan.answer_only
    if plan.eps is not None:
        eps = plan.eps[:, :n_candidate]
        given["eps"] = F.pad(eps, (0, 0, 0, n_candidate - eps.shape[1]))
    inputs = h, *kv, *given.values()

    # the chain of batches like this one: the same sizes, and whatever else is a number or an
    # address in the graphs
    dtype = compute_dtype(h)
    sizes = tuple((x.shape, x.dtype) for x in inputs)
    numbers = L, n_candidate, cache.mean_group, plan.spread, dtype
    addresses = tuple(p.data_ptr() for p in model.parameters())
    chain = kept_chain((id(model), addresses, sizes, tuple(given), numbers), h.device)
    for gradient in chain.gradients:  # not in a graph: the copies change with the weights only
        copies_of(gradient.weights, gradient.biases, dtype)

    # walk; then one node of autograd stands for all of it, but for the gradients of large weights
    weights = small_weights(model)
    plan_of_all = plan._replace(L=L, n_candidate=n_candidate)
    work = partial(walk, Loop(loop, model), weights, cache, plan_of_all, list(given))
    with torch.no_grad():
        n_latent, fields, columns, walked = chain.forward(work, *inputs)
    chain.gradients = walked.gradients
    calls = [shared(gradient.weights, gradient.biases) for gradient in chain.gradients]
    outputs = [x for x in fields if x is not None] + columns
    leaves = h, *kv, *weights.values()
    scalars = [each.scalar for each in calls]
    results = iter(ReplayedChain.apply(chain, walked, calls, outputs, *leaves, *scalars))

    # without what rounding up has added
    fields = [x if x is None else next(results)[:, : plan.n_candidate] for x in fields]
    n_latent = n_latent.clone()
    cache.append_own([x[:, :, : plan.L] for x in results], n_latent)
    return fields, n_latent


def rounded_up(cache, plan):
    """The columns of the prefix, the latents, and the candidates of a chain for these."""
    P = PREFIX * ceil_div(cache.P, PREFIX)
    L = LATENTS * ceil_div(max(plan.L, 1), LATENTS)
    return P, L, max(L + 1, plan.n_candidate)


def kept_chain(key, device):
    """The KeptChain of all batches with this key; the one used last is at the end of graph.kept."""
    chain = graph.kept.pop(key, None)
    if chain is None:
        # a graph that goes takes its stream's workspace along: its successor gets the stream
        place = graph.Place(device)
        n_byte = sum(kept.place.n_byte for kept in graph.kept.values())
        if len(graph.kept) == MAX_KEPT or n_byte > MAX_BYTES:
            place = graph.kept.pop(next(iter(graph.kept))).place
            place.forget_graphs()
        chain = KeptChain(place)
    graph.kept[key] = chain
    return chain


# ---- chains of one size --------------------------------------------------------------------------


class Loop(nn.Module):
    """chain.latent_loop as a module, whose parameters can be replaced (functional_call)."""

    def __init__(self, loop, model):
        super().__init__()
        self.loop = loop
        self.model = model

    def forward(self, *inputs):
        return self.loop(self.model, *inputs)


def small_weights(model):
    """{name: parameter} in a Loop: all but those of Linears, whose gradient is deferred."""
    large = set()
    for module in model.modules():
        if isinstance(module, Linear):
            large |= {module.weight, module.bias}
    return {f"model.{name}": p for name, p in model.named_parameters() if p not in large}


class Walked(NamedTuple):
    """What the backward pass needs of a chain; it holds the activations."""

    leaves: list  # what a gradient flows to
    outputs: list  # the latent's fields
    own: list  # Columns of each layer
    gradients: list  # a Gradient of each product of large weights


def walk(loop, weights, cache, plan, names, *inputs):
    """The loop under autograd -> n_latent, the latent's fields (or None), the columns that it has
    made, keys and values of each layer, and what it Walked. names: of the last inputs.
    """
    n_leaf = len(inputs) - len(names)
    given = dict(zip(names, inputs[n_leaf:]))

    # leaves of their own: a parameter's node in autograd runs on the stream of the forward pass,
    # and leaving this stream would break the recording
    leaves = [x.detach().requires_grad_() for x in (*inputs[:n_leaf], *weights.values())]
    h, *kv = leaves[:n_leaf]
    weights = dict(zip(weights, leaves[n_leaf:]))

    # the prefix and its layout; what is left is of the plan
    n_prefix_real = given.pop("n_prefix_real")
    groups = {name: given.pop(name) for name in cache.groups}
    calls = {}
    with torch.enable_grad(), deferred_weight_gradients(calls):
        # of an RMSNorm the gradients of all latents add up as shares, before they are summed
        for name, weight in weights.items():
            if name.endswith("norm.weight"):
                weights[name] = weight.expand(SHARES, -1)
        cache = cache.with_prefix(kv, groups, n_prefix_real, plan.L)
        latent, n_latent = functional_call(loop, weights, (h, cache, plan._replace(**given)))

    outputs = [x for x in latent if x is not None]
    columns = [x for own in cache.own for x in own.kv]
    gradients = [each.gradient for each in calls.values()]
    return n_latent, latent, columns, Walked(leaves, outputs, cache.own, gradients)


class KeptChain:
    """The chains of all batches of one size, as two graphs."""

    def __init__(self, place):
        self.place = place
        self.forward = graph.ReplayedStep(place)
        self.backward = graph.ReplayedStep(place)
        self.gradients = []  # of the products of large weights; none before the first batch
        self.n_batch = 0

    def differentiate(self, walked, *d_outputs):
        """Autograd's backward pass -> gradients of the leaves, and x and dy of every product."""
        # what was read later in the columns, where the step that has made them collects it
        n = len(walked.outputs)
        for i, own in enumerate(walked.own):
            for grad, d in zip(own.grad_buffers(), d_outputs[n + 2 * i :]):
                grad += d

        # retain_graph: the next batch has the same nodes, if they are recorded. allow_unused: the
        # stop head decides, without a gradient
        d_leaves = torch.autograd.grad(
            walked.outputs,
            walked.leaves,
            d_outputs[:n],
            retain_graph=self.forward.graph is not None,
            allow_unused=True,
        )
        return d_leaves, [gradient.join() for gradient in walked.gradients]


class ReplayedChain(torch.autograd.Function):
    """(chain, walked, calls, outputs, *leaves, *scalars) -> outputs, copied: the next batch
    overwrites them. calls: the Shared of each product; scalars: of their nodes.
    """

    @staticmethod
    def forward(ctx, chain, walked, calls, outputs, *inputs):
        chain.n_batch += 1
        ctx.chain, ctx.n_batch = chain, chain.n_batch
        ctx.walked, ctx.calls = walked, calls
        return tuple(x.clone() for x in outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outputs):
        chain = ctx.chain
        if ctx.n_batch != chain.n_batch:
            raise RuntimeError("a chain's backward pass must come before the next batch is walked")

        # the first batch has no graph, so neither has its backward pass
        if chain.forward.graph is None:
            chain.backward = graph.ReplayedStep(chain.place)
        differentiate = partial(chain.differentiate, ctx.walked)
        d_leaves, pairs = chain.backward(differentiate, *d_outputs)

        # x and dy of one product for each weight
        for calls, pair in zip(ctx.calls, pairs):
            if pair:
                calls.gradient.add(*pair)
        d_leaves = [None if d is None else d.clone() for d in d_leaves]
        return None, None, None, None, *d_leaves, *[None] * len(pairs)
