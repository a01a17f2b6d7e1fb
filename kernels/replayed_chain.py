"""The chain of latents (minatp/chain.py) on a GPU: π reads one latent by a CUDA graph, every t.

With autograd, a GPU would wait for Python most of the time that the chain takes. Here

    forward    runs the same loop without autograd. π reads z_t by replaying one graph, the same for
               every t (kernels/graph.py). h_t is kept for every t; the cache keeps the keys and
               values.
    backward   for t = n−1 … 0 computes latent t once more from h_t, with autograd, and sends the
               gradient back through it. This is a second graph, again the same for every t.

The price is reading the weights once more for each latent: 2N bytes forward and 4N backward (bf16,
N weights), where autograd reads 2N and 2N.

The loop is passed in, so nothing here imports minatp. What it needs of the model:

    propose(h, eps, spread=)            the latent, a tuple of tensors or None with a field z
    policy.step(z, is_fed, cache)       h_{t+1}
    policy.model["layers"], ["norm"]    π's blocks, and its final norm
    its child modules, by name          all but `policy`, `decoder` and `stop_head` count as part of
                                        the chain: a new child gets its gradient here, too
"""

from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .graph import ReplayedStep
from .linear import CallBuffers


class Chain(NamedTuple):
    """What is to run: `loop` and its arguments, except h."""

    loop: Any  # (model, h, plan, feed) -> hidden states, latent, n_latent: chain.latent_loop
    model: Any
    cache: Any  # a StepCache, which holds the prompt
    plan: Any  # minatp.chain.Plan


def run(loop, model, h, cache, plan):
    """Walk the chain from h (B, D), with the gradients that `loop` has under autograd.

    Returns the fields of its Latent, each (B, n_candidate, …) or None, and n_latent (B,).
    """
    # the weights are inputs of the node only so that it can return their gradients
    n_layer = len(cache.order_tokens)
    chain = Chain(loop, model, cache, plan)
    outputs = ReplayedChain.apply(chain, h, *cache.order_tokens, *chain_weights(model))
    *fields, n_latent = outputs[:-n_layer]

    # whatever the cache reads from here on comes after this node
    cache.order_tokens = list(outputs[-n_layer:])
    return fields, n_latent


# ---- the part of the model that a latent passes through ------------------------------------------


def chain_modules(model):
    """π's layers and final norm, and whatever lies between its hidden state and z."""
    # π counts by its layers and final norm: a latent passes neither its embedding nor its logits.
    # φ and the stop head read z, but make neither z nor the next h
    not_passed = ("policy", "decoder", "stop_head")
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


# ---- the chain as one node of autograd -----------------------------------------------------------


class ReplayedChain(torch.autograd.Function):
    """(chain, h, the cache's order tokens, weights) -> the latent's fields, n_latent, order tokens.

    The order tokens pass through this node, so autograd runs it in order with the nodes of the
    columns before and after the chain (kernels/cache.py).
    """

    @staticmethod
    def forward(ctx, chain, h, *order_tokens_and_weights):
        loop, model, cache, plan = chain
        n_own = cache.n_own.clone()  # before the chain

        # the cache runs this step once, records it, and replays it from then on
        def read_column(z, is_fed):
            return model.policy.step(z, is_fed, cache)

        def feed(z, is_fed):
            return cache.step(read_column, z, is_fed).clone()  # the next replay overwrites it

        hidden, latent, n_latent = loop(model, h, plan, feed)

        # what the backward pass needs, besides the columns in the cache
        n_latent = n_latent.clone()
        ctx.mark_non_differentiable(n_latent)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(torch.stack(hidden), n_latent, n_own, plan.eps)
        ctx.model = model
        ctx.cache = cache.fork()
        ctx.L = plan.L
        ctx.spread = plan.spread
        ctx.autocast = autocast_state(h.device)
        order_tokens = [h.new_empty(()) for _ in cache.order_tokens]
        return *latent, n_latent, *order_tokens

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        hidden, n_latent, n_own, eps = ctx.saved_tensors  # hidden (n_candidate, B, D)
        n_layer = len(ctx.cache.order_tokens)
        d_order_tokens = upstream[-n_layer:]
        d_latent = upstream[: -n_layer - 1]  # in between is n_latent's, None

        # for every column: gradients of the fields that a loss used (z, and in SFT the KL), then ε
        used = [i for i, grad in enumerate(d_latent) if grad is not None]
        per_column = [d_latent[i] for i in used]
        if eps is not None:
            per_column.append(eps)
        per_column = [x.transpose(0, 1).contiguous() for x in per_column]  # (n_candidate, B, …)

        # one latent at a time, the last one first. dh: the gradient of the h that follows it
        again = RecomputedLatent(ctx.model, ctx.cache, ctx.spread, used, n_candidate=len(hidden))
        replayed = ReplayedStep()
        dh = torch.zeros_like(hidden[0])
        with torch.autocast(**ctx.autocast):
            for t in reversed(range(len(hidden))):
                again.buffers.index.fill_(t)
                column = [x[t] for x in per_column]

                # latents from L on were fed to no row, and the loop's h stayed what it was
                if t < ctx.L:
                    is_fed = t < n_latent
                    n_before = n_own + n_latent.clamp(max=t)
                    dh = replayed(again.of_fed_latent, hidden[t], dh, is_fed, n_before, *column)
                elif used:
                    dh = again.of_unfed_latent(hidden[t], dh, *column)

        # in the order of the node's inputs; None for a weight that has no gradient
        weights = chain_weights(ctx.model)
        gradients = again.weight_gradients()
        return None, dh, *d_order_tokens, *(gradients.get(p) for p in weights)


def autocast_state(device):
    """The arguments of torch.autocast that restore its present state."""
    kind = device.type
    dtype = torch.get_autocast_dtype(kind)
    return dict(device_type=kind, dtype=dtype, enabled=torch.is_autocast_enabled(kind))


class RecomputedLatent:
    """The backward pass of one latent, which computes the latent once more.

    Serves every latent of a chain; the gradients of the weights add up here.
    """

    def __init__(self, model, cache, spread, used, n_candidate):
        """used: the indices of the latent's fields that have a gradient."""
        self.model = model
        self.cache = cache
        self.spread = spread
        self.used = used
        self.modules = chain_modules(model)

        # large weights: x and dy of every latent are stored, for one product at the end
        self.buffers = CallBuffers(self.modules, n_candidate, cache.n_own.device)
        # all other weights: summed latent by latent
        self.sums = {}
        for p in chain_weights(model):
            if p.requires_grad and p not in self.buffers.parameters:
                self.sums[p] = torch.zeros_like(p)

    def of_fed_latent(self, h, dh_next, is_fed, n_own, *column):
        """The gradient of h_t (B, D), for a latent that was fed.

        dh_next (B, D): the gradient of h_{t+1}. is_fed (B,): the rows that read z_t. n_own (B,):
        own columns before it. column: the used fields' gradients (B, …), then ε_t if there is.
        """
        return self.gradient(h, column, (dh_next, is_fed, n_own))

    def of_unfed_latent(self, h, dh_next, *column):
        """The same for a candidate that was not fed: the loop's next h is h_t itself."""
        return self.gradient(h, column) + dh_next

    def gradient(self, h, column, reading=None):
        """Compute latent t once more, and send its gradients back -> the gradient of h_t.

        reading: the arguments of `read_again` after z, if z_t was fed.
        """
        n_used = len(self.used)
        grads = list(column[:n_used])
        noise = column[n_used:]

        # fresh leaves: a parameter's own node in autograd runs on the stream of the forward pass,
        # and leaving this stream would break the recording
        h = h.detach().requires_grad_()
        leaves = {p: p.detach().requires_grad_() for p in self.sums}

        with (
            torch.enable_grad(),
            self.buffers.recording(),
            replaced_parameters(self.modules, leaves),
        ):
            latent = self.model.propose(h, *noise, spread=self.spread)
            outputs = [latent[i] for i in self.used]
            if reading is not None:
                next_outputs, next_grads = self.read_again(latent.z, *reading)
                outputs += next_outputs
                grads += next_grads

            # allow_unused: a candidate that was not fed has not passed π's weights
            inputs = [h, *leaves.values()]
            dh, *d_leaves = torch.autograd.grad(outputs, inputs, grads, allow_unused=True)

        # in place: a graph adds to the same memory at each replay
        for total, grad in zip(self.sums.values(), d_leaves):
            if grad is not None:
                total += grad
        return dh

    def read_again(self, z, dh_next, is_fed, n_own):
        """Read z_t as the forward pass did -> h_{t+1} and the order tokens, and their gradients."""
        # n_own goes back to where it stood before column t, so that the column's keys and values
        # are computed and written once more. Later columns have had their backward pass by now,
        # and a step reads earlier columns only.
        cache = self.cache
        cache.n_own.copy_(n_own)
        cache.order_tokens = [dh_next.new_empty((), requires_grad=True) for _ in cache.order_tokens]
        h_next = self.model.policy.step(z, is_fed, cache)

        # an order token's gradient holds no number, but its path makes autograd run the cache's
        # nodes
        d_order_tokens = [torch.empty_like(order_token) for order_token in cache.order_tokens]
        return [h_next, *cache.order_tokens], [dh_next, *d_order_tokens]

    def weight_gradients(self):
        """{parameter: its gradient} over all latents."""
        # the order tokens hold the graph of the last latent, and so all of the buffers
        self.cache.order_tokens = [None] * len(self.cache.order_tokens)
        return self.sums | self.buffers.gradients()
