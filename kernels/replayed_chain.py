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

    propose(h, eps, spread=)            the latent
    policy.step(z, is_fed, cache)       h_{t+1}
    policy.model["layers"], ["norm"]    π's blocks, and its final norm
    its child modules, by name          all but `policy` and `decoder` count as part of the chain: a
                                        new child gets its gradient here, too
"""

from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from . import graph
from .common import ceil_div
from .linear import deferred_linears, join_calls, replaced_forwards
from .ops import compute_dtype

PREFIX = 128  # columns of the prefix are rounded up to a multiple of this
LATENTS = 4  # and latents of this
MAX_KEPT = 8  # chains of different sizes; each keeps the activations of a batch, 1 GB at llama-1b


def run(loop, model, h, cache, plan):
    """Walk the chain from h (B, D), with the gradients that `loop` has under autograd.

    loop: chain.latent_loop. Returns the fields of its Latent, each (B, n_candidate, …) or None, and
    n_latent (B,).
    """
    chain = kept_chain(model, h, cache, plan)
    for layer in chain.layers:
        layer.copies(compute_dtype(h))  # not in a graph: they change with the weights only

    # what a gradient flows to
    padding = chain.P - cache.P
    kv = [F.pad(x, (0, 0, padding, 0)) for layer in cache.prefix_kv.values() for x in layer]
    leaves = [h, *kv, *chain.small_weights]

    # the rest, by name
    given = {**cache.groups, "n_prefix_real": cache.n_prefix_real, "n_latent": plan.n_latent}
    given["start"] = given["start"] + padding
    if plan.answer_only is not None:
        given["answer_only"] = plan.answer_only
    if plan.eps is not None:
        eps = plan.eps[:, : chain.n_candidate]
        given["eps"] = F.pad(eps, (0, 0, 0, chain.n_candidate - eps.shape[1]))

    # the node, and those of the large weights' gradients
    work = partial(chain.walk, partial(loop, model), cache, plan, list(given))
    calls = [[] for _ in chain.layers]
    scalars = [layer.weight_gradient(c) for layer, c in zip(chain.layers, calls)]
    inputs = leaves + list(given.values())
    outputs = ReplayedChain.apply(chain, work, calls, len(inputs), *inputs, *scalars)

    # without what rounding up has added
    n_latent, outputs = outputs[0], list(outputs[1:])
    n_column = 2 * len(cache.own)
    cache.append_own([x[:, :, : plan.L] for x in outputs[-n_column:]], n_latent)
    fields = iter(x[:, : plan.n_candidate] for x in outputs[:-n_column])
    return [next(fields) if present else None for present in chain.has_field], n_latent


def kept_chain(model, h, cache, plan):
    """The KeptChain of batches like this one."""
    # the rows of the batch, the columns of the prefix, the latents
    P = PREFIX * ceil_div(cache.P, PREFIX)
    L = LATENTS * ceil_div(max(plan.L, 1), LATENTS)
    n_candidate = max(L + 1, plan.n_candidate)
    sizes = (*h.shape, len(cache.start), cache.max_group, P, L, n_candidate)

    # whatever else is a number or an address in the graphs
    is_given = plan.eps is None, plan.answer_only is None
    dtypes = h.dtype, cache.prefix[0].kv.k.dtype, compute_dtype(h)
    addresses = tuple(p.data_ptr() for p in chain_weights(model))
    key = id(model), addresses, sizes, is_given, dtypes, plan.spread

    chain = graph.kept.pop(key, None)
    if chain is None:
        # a graph that goes takes its stream's workspace along: its successor gets the stream
        place = graph.Place(h.device)
        if len(graph.kept) == MAX_KEPT:
            place = graph.kept.pop(next(iter(graph.kept))).place
            place.last_graph = None
        chain = KeptChain(model, P, L, n_candidate, place)
    graph.kept[key] = chain  # the one used last at the end
    return chain


# ---- the part of the model that a latent passes through ------------------------------------------


def chain_modules(model):
    """π's layers and final norm, and whatever lies between its hidden state and z."""
    # π counts by its layers and final norm: a latent passes neither its embedding nor its logits.
    # φ reads z, but makes neither z nor the next h
    not_passed = ("policy", "decoder")
    heads = [module for name, module in model.named_children() if name not in not_passed]
    return [*model.policy.model["layers"], model.policy.model["norm"], *heads]


def chain_weights(model):
    return [p for module in chain_modules(model) for p in module.parameters()]


@contextmanager
def replaced_parameters(modules, replacements):
    """Inside, the parameters in {parameter: tensor} are the tensors."""
    places = []
    for root in modules:
        for module in root.modules():
            for name, p in module._parameters.items():
                if p in replacements:
                    places.append((module._parameters, name, p))

    # straight into the modules' dicts: setattr refuses a plain tensor in a parameter's place
    for parameters, name, p in places:
        parameters[name] = replacements[p]
    try:
        yield
    finally:
        for parameters, name, p in places:
            parameters[name] = p


# ---- chains of one size --------------------------------------------------------------------------


class KeptChain:
    """The chains of all batches of one size, as two graphs."""

    def __init__(self, model, P, L, n_candidate, place):
        self.P = P
        self.L = L
        self.n_candidate = n_candidate
        self.place = place
        self.forward = graph.ReplayedStep(place)
        self.backward = graph.ReplayedStep(place)
        self.walked = None  # leaves and results, which hold the activations
        self.n_batch = 0

        # large weights: x and dy of every latent are collected, for one product
        self.modules = chain_modules(model)
        self.forwards = deferred_linears(self.modules, has_node=False)
        self.layers = list(self.forwards.values())
        large = {p for layer in self.layers for p in layer.parameters}
        self.small_weights = [p for p in chain_weights(model) if p not in large]

    def walk(self, loop, cache, plan, names, *inputs):
        """The loop under autograd -> n_latent, the latent's fields, and the columns that it has
        made, keys and values of each layer. names: of the last inputs.
        """
        n_leaf = len(inputs) - len(names)
        given = dict(zip(names, inputs[n_leaf:]))
        with torch.enable_grad():
            # leaves of their own: a parameter's node in autograd runs on the stream of the forward
            # pass, and leaving this stream would break the recording
            leaves = [x.detach().requires_grad_() for x in inputs[:n_leaf]]
            n_column = 2 * len(cache.own)
            h, kv = leaves[0], leaves[1 : 1 + n_column]
            weights = dict(zip(self.small_weights, leaves[1 + n_column :]))

            # the prefix and its layout; what is left is of the plan
            n_prefix_real = given.pop("n_prefix_real")
            groups = {name: given.pop(name) for name in cache.groups}
            cache = cache.with_prefix(kv, groups, n_prefix_real, self.L)
            plan = plan._replace(L=self.L, n_candidate=self.n_candidate, **given)

            with replaced_forwards(self.forwards), replaced_parameters(self.modules, weights):
                latent, n_latent = loop(h, plan, cache)
            self.has_field = [x is not None for x in latent]
            outputs = [x for x in latent if x is not None] + cache.read_own(self.L)
            self.walked = leaves, outputs
            return n_latent, *outputs

    def differentiate(self, leaves, outputs, *d_outputs):
        """Autograd's backward pass -> gradients of the leaves, and of every large Linear the x and
        dy of all latents, an empty list if it was not called.
        """
        for layer in self.layers:
            layer.calls.clear()

        # retain_graph: the next batch has the same nodes. allow_unused: the stop head decides,
        # without a gradient
        d_leaves = torch.autograd.grad(
            outputs, leaves, d_outputs, retain_graph=True, allow_unused=True
        )
        return d_leaves, [layer.calls and join_calls(layer.calls) for layer in self.layers]


class ReplayedChain(torch.autograd.Function):
    """(chain, work, calls, n, n inputs, scalars) -> the results of work(*inputs).

    calls and scalars: of the WeightGradients that follow in the backward pass (kernels/linear.py).
    """

    @staticmethod
    def forward(ctx, chain, work, calls, n, *inputs_and_scalars):
        ctx.chain = chain
        ctx.calls = calls
        ctx.n_other = len(inputs_and_scalars)
        chain.n_batch += 1
        ctx.n_batch = chain.n_batch

        # copies: the next batch overwrites the results
        n_latent, *outputs = (
            x.detach().clone() for x in chain.forward(work, *inputs_and_scalars[:n])
        )
        ctx.mark_non_differentiable(n_latent)

        # without a graph, the activations go with this node
        ctx.walked = chain.walked
        if chain.forward.graph is None:
            chain.walked = None
        return n_latent, *outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *d_outputs):
        if ctx.n_batch != ctx.chain.n_batch:
            raise RuntimeError("a chain's backward pass must come before the next batch is walked")

        # the first batch has no graph, so neither has its backward pass
        if ctx.chain.forward.graph is None:
            ctx.chain.backward = graph.ReplayedStep(ctx.chain.place)
        differentiate = partial(ctx.chain.differentiate, *ctx.walked)
        d_leaves, pairs = ctx.chain.backward(differentiate, *d_outputs)

        # x and dy of one product for each weight
        for calls, pair in zip(ctx.calls, pairs):
            if pair:
                calls.append(pair)
        d_leaves = [None if d is None else d.clone() for d in d_leaves]
        rest = [None] * (ctx.n_other - len(d_leaves))
        return None, None, None, None, *d_leaves, *rest
