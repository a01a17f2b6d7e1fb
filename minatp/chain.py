"""The chain of latents, with gradients through every one of them.

    forward    for t = 0 … n−1:  z_t = propose(h_t, ε_t),  h_{t+1} = π(z_t | the cache)
    backward   for t = n−1 … 0:  the gradient of z_t comes from the losses and from all that was
               read later, through h_{t+1} and through the key and value of z_t's column. It
               continues to h_t, to the weights, and to the columns before t

`latent_loop` is all of it: autograd keeps the graph of the n latents and runs it backward.
"""

from typing import NamedTuple

import torch

from kernels import replayed_chain
from kernels.linear import deferred_weight_gradients

from .latent import Latent


def read_prompt(policy, prompt, prompt_mask, room, group=1):
    """Read prompts (Q, Tq) once, each to be continued `group` times.

    Returns the hidden states after them (Q·group, D), those of one prompt side by side, and the
    cache, with room for so many more columns.
    """
    cache = policy.cache(len(prompt), prompt.shape[1] + room)
    h = policy(policy.embed(prompt), prompt_mask, cache, last=1)[:, 0]
    if group > 1:
        rows = torch.arange(len(h) * group, device=h.device) // group
        cache.keep(rows)
        h = h.repeat_interleave(group, 0)
    return h, cache


class Plan(NamedTuple):
    """How far B rows think, and their noise."""

    # (B,) latents that each row uses; of an answer_only row, at most
    n_latent: torch.Tensor
    # the most latents of a row: latents 0 … L−1 are fed to π
    L: int
    # latents to propose, at least L: those past L are proposed, but fed to no row
    n_candidate: int
    # ε (B, ≥ n_candidate, D), or on a GPU the keys that it is drawn from; None: z = μ
    eps: torch.Tensor | None = None
    # (B,) bool: rows that stop when the stop head says so
    answer_only: torch.Tensor | None = None
    # as in ATP.propose
    spread: float = 1.0


def walk(model, h, cache, plan):
    """Think, with gradients.

    h (B, D): the hidden state after the prompt, which is in the cache. plan.n_candidate: not 0.
    Returns the proposed Latent (B, n_candidate), and how many of them each row used (B,). The
    candidate that a row dropped is in column n_latent.
    """
    # On a GPU the same loop, and its backward pass, are CUDA graphs (kernels/replayed_chain.py)
    if cache.replays_steps and torch.is_grad_enabled():
        fields, n_latent = replayed_chain.run(latent_loop, model, h, cache, plan)
        return Latent(*fields), n_latent

    # Without a graph the loop runs as it stands. Inside deferred_weight_gradients the gradients are
    # the same, to rounding, but in the backward pass that of each weight is one product for the
    # whole chain, not one for each latent
    with deferred_weight_gradients():
        return latent_loop(model, h, cache, plan)


def latent_loop(model, h, cache, plan):
    """The loop of `walk`, from h (B, D) -> (Latent (B, n_candidate, …), n_latent (B,))."""
    n_latent = plan.n_latent
    latents = []
    for t in range(plan.n_candidate):
        # Propose z_t from h_t
        eps = None if plan.eps is None else plan.eps[:, t]
        latent = model.propose(h, eps, spread=plan.spread)
        latents.append(latent)

        # A row without known steps asks the stop head before each step, as in generation
        if plan.answer_only is not None and model.stop and t % model.c == 0:
            says_stop = model.stop_head(latent.z.detach()).argmax(-1) == 1
            stops = plan.answer_only & (n_latent > t) & says_stop
            n_latent = torch.where(stops, t, n_latent)

        # Feed z_t to π, in the rows that use it. What the others propose from here on is masked out
        # by the caller
        if t < plan.L:
            h = model.policy.step(latent.z, t < n_latent, cache)

    # A list of Latents (B, …) -> one Latent (B, n_candidate, …), None where they have None
    fields = []
    for values in zip(*latents):
        fields.append(None if values[0] is None else torch.stack(values, 1))
    return Latent(*fields), n_latent
