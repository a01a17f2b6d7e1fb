"""The chain of latents, with gradients through every one of them.

    forward    t = 0 … n−1: z_t, μ_t, logσ²_t, … = propose(h_t, ε_t);  h_{t+1} = π(z_t | the cache)     (h_t is method.md's h_{t−1})
    backward   t = n−1 … 0: the gradient of z_t, from the loss and from later columns, goes to h_t, the weights and earlier columns

Autograd does it on a CPU. A GPU would wait for Python most of that time, so `ByHand` does it there: forward without autograd, keeping h_t and,
in the cache, keys and values; backward each latent is computed once more, with autograd, and sent back. Either is one CUDA graph that is
replayed for every t (kernels/graph.py). The price is one more reading of the weights a latent: 2N bytes forward and 4N backward (bf16, N
weights), where autograd reads 2N and 2N.
"""
from contextlib import contextmanager

import torch
from torch.autograd.function import once_differentiable

from kernels.graph import Replayed
from kernels.linear import Stacks, deferred

from .latent import Latent


def read_prompt(policy, prompt, prompt_mask, room, group=1):
    """Read prompts (Q, Tq) once, each to be continued `group` times.

    Returns the hidden states after them (Q·group, D), those of one prompt side by side, and the cache, with room for so many
    more columns.
    """
    cache = policy.cache(len(prompt), prompt.shape[1] + room)
    h = policy(policy.embed(prompt), prompt_mask, cache, 1)[:, 0]
    if group > 1:
        rows = torch.arange(len(h) * group, device=h.device) // group
        cache.keep(rows, group)
        h = h.repeat_interleave(group, 0)
    return h, cache


def walk(model, h, cache, n_latent, L, n_candidate, eps=None, free=None, spread=1.0):
    """Think n_candidate latents, with gradients.

    h (B, D): the hidden state after the prompt, which is in the cache. n_latent (B,): how many each row uses, L at most; those of a row of
    `free` (B,) bool are at most so many, and it stops where generation would. eps (B, ≥ n_candidate, …) as in kernels/vae.py, or None for z = μ;
    spread as in ATP.propose. Returns the Latent (B, n_candidate), None where there is none, and n_latent as used. A row's dropped
    candidate stands at column n_latent.
    """
    if not n_candidate:
        return None, n_latent
    if cache.replays and torch.is_grad_enabled():
        found = ByHand.apply((model, cache, L, n_candidate, free, spread), h, n_latent, eps, *cache.thread, *weights(model))
        cache.thread = list(found[PARTS + 1:])
        return Latent(*found[:PARTS]), found[PARTS]
    step = lambda z, real: model.policy.step(z, real, cache)
    with deferred(model):  # the gradient of each weight is one product for the whole chain, not one a latent
        _, thought, n_latent = loop(model, h, L, n_candidate, n_latent, eps, free, spread, step)
    return thought, n_latent


PARTS = len(Latent._fields)


def parts(model):
    """The modules that a latent passes through."""
    heads = [m for name, m in model.named_children() if name not in ("policy", "decoder", "stop_head")]
    return [*model.policy.model["layers"], model.policy.model["norm"], *heads]


def weights(model):
    return [p for m in parts(model) for p in m.parameters()]


@contextmanager
def instead(modules, others):
    """Inside, the parameters in {parameter: tensor} are the tensors."""
    places = [(m._parameters, name, p) for module in modules for m in module.modules() for name, p in m._parameters.items() if p in others]
    for at, name, p in places:
        at[name] = others[p]
    try:
        yield
    finally:
        for at, name, p in places:
            at[name] = p


def loop(model, h, L, n_candidate, n_latent, eps, free, spread, step):
    """The chain itself, of which L latents are fed. step(z, real) gives the hidden state after z (B, D), read by the rows where real (B,).
    Returns all h_t (n_candidate of (B, D)), the Latent (B, n_candidate), and n_latent as used."""
    hidden, proposed = [], []
    for t in range(n_candidate):
        hidden.append(h)
        proposed.append(model.propose(h, None if eps is None else eps[:, t], spread=spread))
        z = proposed[-1].z
        if free is not None and model.stop and t % model.c == 0:
            stops = free & (n_latent > t) & (model.stop_head(z.detach()).argmax(-1) == 1)
            n_latent = torch.where(stops, t, n_latent)
        if t < L:
            h = step(z, t < n_latent)
    return hidden, Latent(*(None if x[0] is None else torch.stack(x, 1) for x in zip(*proposed))), n_latent


class ByHand(torch.autograd.Function):
    """`loop` with a StepCache, as one node of autograd. The cache's threads pass through it, so that it runs in order with the nodes of other
    columns (kernels/cache.py)."""
    @staticmethod
    def forward(ctx, settings, h, n_latent, eps, *threads_and_weights):
        model, cache, L, n_candidate, free, spread = settings
        n_own = cache.n_own.clone()
        read = lambda z, real: model.policy.step(z, real, cache)
        step = lambda z, real: cache.step(read, z, real).clone()
        hidden, thought, n_latent = loop(model, h, L, n_candidate, n_latent, eps, free, spread, step)
        n_latent = n_latent.clone()
        ctx.mark_non_differentiable(n_latent)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(torch.stack(hidden), n_latent, n_own, eps)
        ctx.model, ctx.L, ctx.spread, ctx.cache = model, L, spread, cache.fork()
        kind = h.device.type
        ctx.autocast = dict(device_type=kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
        return *thought, n_latent, *(h.new_empty(()) for _ in cache.thread)

    @staticmethod
    @once_differentiable
    def backward(ctx, *upstream):
        (hidden, n_latent, n_own, eps), model, cache = ctx.saved_tensors, ctx.model, ctx.cache
        thought, threads = upstream[:PARTS], upstream[PARTS + 1:]
        used = [i for i, x in enumerate(thought) if x is not None]  # what a loss read: z, and in SFT the KL
        given = [x.transpose(0, 1).contiguous() for x in (*thought, eps) if x is not None]
        stacks = Stacks(parts(model), len(hidden), hidden.device)
        added = {p: torch.zeros_like(p) for p in weights(model) if p.requires_grad and p not in stacks.parameters}

        def back(h, dh, real, before, *given, fed=True):
            """The gradient of h_t, from those of what was used of its Latent (`given`, then ε_t) and, where z_t was fed, dh of h_{t+1}. The
            weights' gradients are left in `stacks` and `added`."""
            d, noise = list(given[:len(used)]), given[len(used):]
            # cache.n_own goes back to where it stood before column t, whose keys and values are computed and written once more. Later columns
            # have had their backward pass by now, and a step reads none but earlier ones.
            # fresh leaves: a parameter's own node in autograd runs on the forward pass's stream, and leaving ours would break the recording
            h, fresh = h.detach().requires_grad_(), {p: p.detach().requires_grad_() for p in added}
            with torch.enable_grad(), stacks.calls(), instead(parts(model), fresh):
                thought = model.propose(h, *noise, spread=ctx.spread)
                found = [thought[i] for i in used]
                if fed:
                    cache.n_own.copy_(before)
                    cache.thread = [h.new_empty((), requires_grad=True) for _ in threads]
                    found += [model.policy.step(thought.z, real, cache), *cache.thread]
                    d += [dh, *map(torch.empty_like, cache.thread)]
                sent, *more = torch.autograd.grad(found, [h, *fresh.values()], d, allow_unused=True)
            for total, x in zip(added.values(), more):
                if x is not None:
                    total += x
            return sent if fed else sent + dh

        dh, replayed = torch.zeros_like(hidden[0]), Replayed()
        with torch.autocast(**ctx.autocast):
            for t in reversed(range(len(hidden))):
                stacks.at.fill_(t)
                inputs = hidden[t], dh, t < n_latent, n_own + n_latent.clamp(max=t), *(x[t] for x in given)
                if t < ctx.L:
                    dh = replayed(back, *inputs)
                elif used:  # proposed, but fed by no row
                    dh = back(*inputs, fed=False)
        cache.thread = [None] * len(threads)  # which hold the last pass, and so all that `stacks` has
        found = added | stacks.gradients()
        return None, dh, None, None, *threads, *(found.get(p) for p in weights(model))
