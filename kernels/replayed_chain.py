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
from .cache import StepCache
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
    # what the chain reads. A gradient flows to h and to the keys and values
    P, L, n_candidate = rounded_up(cache, plan)
    padding = P - cache.P
    kv = [F.pad(x, (0, 0, padding, 0)) for columns in cache.prefix.values() for x in columns.kv]

    # the rest by name
    given = dict(start=cache.start + padding, owner=cache.owner, n_latent=plan.n_latent)
    if plan.answer_only is not None:
        given["answer_only"] = plan.answer_only
    if plan.eps is not None:
        given["eps"] = F.pad(plan.eps, (0, 0, 0, n_candidate - plan.eps.shape[1]))
    inputs = *given.values(), h, *kv

    # the chain of batches like this one: the same sizes, and whatever else is a number or an
    # address in the graphs
    dtype = compute_dtype(h)
    sizes = [(x.shape, x.dtype) for x in inputs]
    addresses = [p.data_ptr() for p in model.parameters()]
    key = id(model), L, n_candidate, plan.spread, dtype, *sizes, *addresses
    chain = kept_chain(key)
    for gradient in chain.gradients:  # not in a graph: the copies change with the weights only
        copies_of(gradient.weights, gradient.biases, dtype)

    # walk; then one node of autograd stands for all of it, but for the gradients of large weights
    weights = small_weights(model)
    plan_of_all = plan._replace(L=L, n_candidate=n_candidate)
    work = partial(walk, loop, model, weights, plan_of_all, list(given))
    with torch.no_grad():
        n_latent, fields, walked = chain.forward(work, *inputs)
    chain.gradients = walked.gradients
    scalars = [shared(gradient.weights, gradient.biases) for gradient in chain.gradients]
    leaves = *weights.values(), h, *kv
    results = iter(ReplayedChain.apply(chain, walked, scalars, *leaves, *scalars))

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


def kept_chain(key):
    """The KeptChain of all batches with this key; the one used last is at the end of graph.kept."""
    chain = graph.kept.pop(key, None)
    if chain is None:
        # a graph that goes takes its stream's workspace along: its successor gets the stream
        place = graph.Place()
        n_byte = sum(kept.place.n_byte for kept in graph.kept.values())
        if len(graph.kept) == MAX_KEPT or n_byte > MAX_BYTES:
            place = graph.kept.pop(next(iter(graph.kept))).place
            place.forget_graphs()
        chain = KeptChain(place)
    graph.kept[key] = chain
    return chain


# ---- chains of one size --------------------------------------------------------------------------


def small_weights(model):
    """{name in the module of `walk`: parameter}, without those of Linears, whose gradient is
    deferred.
    """
    large = {p for m in model.modules() if isinstance(m, Linear) for p in m.parameters()}
    return {f"model.{name}": p for name, p in model.named_parameters() if p not in large}


class Walked(NamedTuple):
    """What the backward pass needs of a chain; it holds the activations."""

    leaves: list  # what a gradient flows to
    outputs: list  # the latent's fields
    own: list  # Columns of each layer
    gradients: list  # a Gradient of each product of large weights


def walk(loop, model, weights, plan, names, *inputs):
    """The loop under autograd -> n_latent (B,), the latent's fields (B, n_candidate, …) or None,
    and what it Walked.

    names: what the first inputs are. Then come h (B, D), and keys and values of each layer's prefix
    (N, h_kv, P, hd).
    """
    given = dict(zip(names, inputs))

    # leaves of their own: a parameter's node in autograd runs on the stream of the forward pass,
    # and leaving this stream would break the recording
    inputs = *weights.values(), *inputs[len(names) :]
    leaves = [x.detach().requires_grad_() for x in inputs]
    weights = dict(zip(weights, leaves))
    h, *kv = leaves[len(weights) :]

    # the loop as a module, whose parameters can be replaced
    module = nn.Module()
    module.model = model
    module.forward = partial(loop, model)
    scalars = {}
    with torch.enable_grad(), deferred_weight_gradients(scalars):
        # of an RMSNorm the gradients of all latents add up as shares, before they are summed
        for name, weight in weights.items():
            if name.endswith("norm.weight"):
                weights[name] = weight.expand(SHARES, -1)
        cache = StepCache.after_prefix(kv, given.pop("start"), given.pop("owner"), plan.L)
        # (what is left of `given` is of the plan)
        latent, n_latent = functional_call(module, weights, (h, cache, plan._replace(**given)))

    outputs = [x for x in latent if x is not None]
    own = list(cache.own.values())
    gradients = [scalar.gradient for scalar in scalars.values()]
    return n_latent, latent, Walked(leaves, outputs, own, gradients)


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
    """(chain, walked, scalars, *leaves, *scalars) -> what was walked, the outputs and the own
    columns, copied: the next batch overwrites them. scalars: of each product (linear.shared).
    """

    @staticmethod
    def forward(ctx, chain, walked, scalars, *inputs):
        chain.n_batch += 1
        ctx.chain, ctx.n_batch = chain, chain.n_batch
        ctx.walked, ctx.scalars = walked, scalars
        columns = [x for own in walked.own for x in own.kv]
        return tuple(x.clone() for x in walked.outputs + columns)

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
        for scalar, pair in zip(ctx.scalars, pairs):
            if pair:
                scalar.gradient.add(*pair)
        d_leaves = [None if d is None else d.clone() for d in d_leaves]
        return None, None, None, *d_leaves, *[None] * len(pairs)
