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
from weakref import WeakKeyDictionary

import torch
from torch.autograd.function import once_differentiable

from . import graph
from .cache import all_gradients
from .common import ceil_div, is_out_of_memory
from .linear import deferred_linears, join_calls, replaced_forwards, weight_gradients
from .ops import compute_dtype

PREFIX = 128  # columns of the prefix are rounded up to a multiple of this
LATENTS = 4  # and latents of this
MAX_KEPT = 8  # chains of different sizes; each keeps the activations of a batch, 1 GB at llama-1b

# model -> {sizes: KeptChain}, the one used last at the end
kept = WeakKeyDictionary()


def run(loop, model, h, cache, plan):
    """Walk the chain from h (B, D), with the gradients that `loop` has under autograd.

    loop: chain.latent_loop. Returns the fields of its Latent, each (B, n_candidate, …) or None, and
    n_latent (B,).
    """
    # the weights are inputs of the node only so that it can return their gradients
    n_layer = len(cache.order_tokens)
    chain = kept_chain(model, h, cache, plan)
    inputs = h, *cache.order_tokens, *chain_weights(model)
    outputs = ReplayedChain.apply(chain, partial(loop, model), cache, plan, *inputs)
    *fields, n_latent = outputs[:-n_layer]

    # whatever the cache reads from here on comes after this node
    cache.order_tokens = list(outputs[-n_layer:])
    return fields, n_latent


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
    key = sizes, is_given, dtypes, plan.spread, addresses

    chains = kept.setdefault(model, {})
    chain = chains.pop(key, None)
    if chain is None:
        # a graph that goes takes its stream's workspace along: its successor gets the stream
        place = graph.Place(h.device)
        if len(chains) == MAX_KEPT:
            place = chains.pop(next(iter(chains))).place
            place.last_graph = None
        chain = KeptChain(model, h, cache.at_fixed_addresses(P, L), plan, n_candidate, place)
    chains[key] = chain
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
    """The chains of all batches of one size: what the graphs read and write, and the graphs."""

    def __init__(self, model, h, cache, plan, n_candidate, place):
        """cache: one at fixed addresses."""
        self.place = place
        self.cache = cache
        self.modules = chain_modules(model)

        # inputs
        self.h = torch.zeros_like(h).requires_grad_()
        eps = plan.eps
        if eps is not None:
            eps = eps.new_zeros(len(eps), n_candidate, *eps.shape[2:])
        self.plan = plan._replace(
            n_latent=plan.n_latent.clone(),
            L=cache.own[0].kv.k.shape[2],
            n_candidate=n_candidate,
            eps=eps,
            answer_only=None if plan.answer_only is None else plan.answer_only.clone(),
        )

        # large weights: x and dy of every latent are collected, for one product
        self.layers = deferred_linears(self.modules, has_node=False)
        large = {p for layer in self.layers.values() for p in (*layer.weights, *layer.biases)}
        self.small_weights = [p for p in chain_weights(model) if p not in large]

        self.n_batch = 0
        self.forward_graph = None
        # by the indices of the fields that a loss uses: their gradients, and the recorded results
        self.d_fields = {}
        self.backward_graphs = {}

    def record(self, work):
        """graph.record; if memory runs out, once more without the chains of other sizes."""
        try:
            return graph.record(work, self.place)
        except RuntimeError as e:
            if not is_out_of_memory(e):
                raise
        for chains in kept.values():
            for key in [key for key, chain in chains.items() if chain is not self]:
                del chains[key]
        return graph.record(work, self.place)

    # ---- forward ----

    def forward(self, loop, h, cache, plan):
        """Walk the chain of a batch, whose cache this is -> the latent's fields and n_latent, which
        the next batch overwrites.
        """
        self.load(h, cache, plan)
        work = partial(self.walk, loop)

        # the first batch runs, the second is recorded. Recording runs nothing: it is replayed, too
        if self.n_batch == 0:
            self.fields, self.n_latent = work()
        elif self.forward_graph is None:
            self.forward_graph, (self.fields, self.n_latent) = self.record(work)
        if self.forward_graph is not None:
            self.forward_graph.replay()
        self.n_batch += 1

        cache.continue_like(self.cache, plan.L)
        return self.fields, self.n_latent

    def load(self, h, cache, plan):
        """Copy a batch to where the graphs read it."""
        self.h.copy_(h)
        self.cache.start_like(cache)
        self.plan.n_latent.copy_(plan.n_latent)
        if plan.answer_only is not None:
            self.plan.answer_only.copy_(plan.answer_only)
        if plan.eps is not None:
            n = min(plan.eps.shape[1], self.plan.n_candidate)
            self.plan.eps[:, :n].copy_(plan.eps[:, :n])

        # not in the graph: an optimizer step changes the weights, not each batch
        for layer in self.layers.values():
            layer.copies(compute_dtype(h))

    def walk(self, loop):
        """The loop under autograd -> the latent's fields and n_latent."""
        # leaves on the memory of the small weights. A parameter's own node in autograd runs on the
        # stream of the forward pass, and leaving this stream would break the recording. (`data`,
        # because autograd would count the optimizer's writes to what `detach` returns, and refuse.
        # New ones for each walk: of others, autocast may have a copy made outside the graph)
        self.leaves = {p: p.data.requires_grad_(p.requires_grad) for p in self.small_weights}

        self.cache.order_tokens = [self.h.new_empty(()) for _ in self.cache.own]
        with (
            torch.enable_grad(),
            replaced_forwards(self.layers),
            replaced_parameters(self.modules, self.leaves),
        ):
            # clones: autograd may keep what it is given, and the next batch overwrites the inputs
            eps = None if self.plan.eps is None else self.plan.eps.clone()
            return loop(self.h.clone(), self.plan._replace(eps=eps), self.cache)

    # ---- backward ----

    def backward(self, d_fields, prefix, own, L):
        """The backward pass of the last batch -> the gradients of h and of {parameter: its own}.

        d_fields: of the fields (B, n_candidate, …), None where no loss uses one. prefix, own: the
        batch's Columns, of every layer; the gradients of the first L own columns are taken, and
        those of the prefix added.
        """
        used = tuple(i for i, grad in enumerate(d_fields) if grad is not None)
        own_grads = [x[:, :, :L] for x in all_gradients(own)]
        self.load_gradients(used, d_fields, own_grads)
        torch._foreach_zero_(own_grads)

        # as in the forward pass: the first runs, which compiles the kernels
        work = partial(self.differentiate, used)
        recorded = self.backward_graphs.get(used)
        if used not in self.backward_graphs or self.forward_graph is None:
            results = work()
            self.backward_graphs[used] = None
        else:
            if recorded is None:
                recorded = self.backward_graphs[used] = self.record(work)
            backward_graph, results = recorded
            backward_graph.replay()

        padding = self.cache.P - prefix[0].kv.k.shape[2]
        added = [x[:, :, padding:] for x in all_gradients(self.cache.prefix)]
        torch._foreach_add_(all_gradients(prefix), added)
        return self.gradients(*results)

    def load_gradients(self, used, d_fields, own_grads):
        """Copy the gradients of a batch's results to where the graphs read them."""
        for i in used:
            if i not in self.d_fields:
                self.d_fields[i] = torch.zeros_like(self.fields[i])
            n = d_fields[i].shape[1]
            self.d_fields[i][:, :n].copy_(d_fields[i])
            self.d_fields[i][:, n:].zero_()

        torch._foreach_zero_(all_gradients(self.cache.prefix))
        buffers = all_gradients(self.cache.own)
        torch._foreach_zero_(buffers)
        torch._foreach_copy_([x[:, :, : own_grads[0].shape[2]] for x in buffers], own_grads)

    def differentiate(self, used):
        """Autograd's backward pass -> gradients of h and of the leaves, and of every large Linear
        the x and dy of all latents.
        """
        for layer in self.layers.values():
            layer.calls.clear()

        # an order token's gradient holds no number, but its path makes autograd run the cache's
        # nodes
        order_tokens = self.cache.order_tokens
        outputs = [self.fields[i] for i in used] + order_tokens
        grads = [self.d_fields[i] for i in used] + [torch.empty_like(x) for x in order_tokens]

        # allow_unused: the stop head decides, without a gradient. retain_graph: the next batch has
        # the same nodes
        leaves = [x for x in self.leaves.values() if x.requires_grad]
        dh, *d_leaves = torch.autograd.grad(
            outputs, [self.h, *leaves], grads, retain_graph=True, allow_unused=True
        )
        called = [layer for layer in self.layers.values() if layer.calls]
        return dh, d_leaves, [(layer, *join_calls(layer.calls)) for layer in called]

    def gradients(self, dh, d_leaves, pairs):
        """The gradient of h, and {parameter: its gradient}, in memory of their own."""
        gradients = {}
        parameters = [p for p in self.leaves if p.requires_grad]
        for p, grad in zip(parameters, d_leaves):
            gradients[p] = None if grad is None else grad.clone()
        for layer, x, dy in pairs:
            dWs, dbs = weight_gradients(x, dy, layer.weights, layer.biases)
            gradients |= zip([*layer.weights, *layer.biases], [*dWs, *dbs])
        return dh.clone(), gradients


# ---- the chain as one node of autograd -----------------------------------------------------------


class ReplayedChain(torch.autograd.Function):
    """(chain, loop, cache, plan, h, the cache's order tokens, weights) -> the latent's fields,
    n_latent, order tokens.

    The order tokens pass through this node, so autograd runs it in order with the nodes of the
    columns before and after the chain (kernels/cache.py).
    """

    @staticmethod
    def forward(ctx, chain, loop, cache, plan, h, *order_tokens_and_weights):
        n_layer = len(cache.own)
        fields, n_latent = chain.forward(loop, h, cache, plan)
        fields = [None if x is None else x[:, : plan.n_candidate].clone() for x in fields]
        n_latent = n_latent.clone()

        # what the backward pass needs, besides what the chain holds. (`keep` replaces entries of
        # the cache's lists)
        ctx.chain = chain
        ctx.n_batch = chain.n_batch
        ctx.columns = list(cache.prefix), list(cache.own), plan.L
        ctx.weights = order_tokens_and_weights[n_layer:]
        ctx.mark_non_differentiable(n_latent)
        ctx.set_materialize_grads(False)
        order_tokens = [h.new_empty(()) for _ in range(n_layer)]
        return *fields, n_latent, *order_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        if ctx.n_batch != ctx.chain.n_batch:
            raise RuntimeError("a chain's backward pass must come before the next batch is walked")
        n_layer = len(ctx.chain.cache.own)
        d_order_tokens = upstream[-n_layer:]
        d_fields = upstream[: -n_layer - 1]  # in between is n_latent's, None

        # in the order of the node's inputs; None for a weight that has no gradient
        dh, gradients = ctx.chain.backward(d_fields, *ctx.columns)
        d_weights = map(gradients.get, ctx.weights)
        return None, None, None, None, dh, *d_order_tokens, *d_weights
