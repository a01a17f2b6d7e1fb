"""Stage 1, supervised fine-tuning: its four losses (docs/method.md, Stage 1).

    enc   the policy writes the text after the latents; the gradient runs back through all latents
    kl    the latents' Gaussians stay near N(0, I)
    stop  the stop head continues at each step of the problem, and stops after the last
    dec   the decoder LM φ reads each step's latents and writes the step as text

Each loss is a sum over one micro-batch. `total_loss` divides it by its count in the whole batch, so
it does not matter how a batch is split over micro-batches and GPUs.
"""

import torch

from kernels import ops
from kernels.cross_entropy import token_nll

from .chain import Plan, read_prompt, walk
from .decoder import thought_nll


def sft_losses(model, batch, eps=None):
    """The losses of a Batch, each summed over it: {"enc", "kl", "stop", "dec"}, those that apply.

    model: an ATP. eps: the noise of the latents, ε (B, ≥ n_candidate, D) or the keys that it is
    drawn from (B, ≥ n_candidate, 2); None: z = μ.
    """
    policy = model.policy

    # Read the prompt, think, and read the text after the latents. In stage 0 everything is text
    latent = None
    if batch.n_candidate:
        latent, _, cache = walk_batch(model, batch, eps)
        h = policy(policy.embed(batch.text), batch.text_mask, cache)  # (B, Tt, D)
    else:
        h = read_as_text(policy, batch)

    # −log p of every labelled token
    labelled = batch.target_at
    losses = {"enc": policy.nll(h[labelled], batch.target[labelled]).sum()}
    if latent is None:
        return losses

    # KL(N(μ, σ²) ‖ N(0, I)) of each used latent
    if model.vae:
        losses["kl"] = latent.kl[batch.used_at].sum()

    # Stop head: cross-entropy of "continue" at the first latent of each step, of "stop" after them
    z = latent.z  # (B, n_candidate, D)
    if model.stop:
        stop_logits = model.stop_head(z[batch.stop_at])
        losses["stop"] = token_nll(stop_logits, batch.stop_label).sum()

    # φ must write each step from its c latents; the gradient reaches them, and through them π. (A
    # dropped candidate can be one column too many for whole steps: it is cut off)
    if model.decode and len(batch.step_text):
        n_step = z.shape[1] // model.c
        steps = z[:, : n_step * model.c].unflatten(1, (n_step, model.c))  # (B, n_step, c, D)
        latents = steps[batch.step_row, batch.step_index]  # (N, c, D)
        text, text_at = batch.step_text, batch.step_text_at
        losses["dec"] = thought_nll(model.decoder, latents, text, text_at).sum()
    return losses


def total_loss(losses, counts, beta):
    """L = L_enc + L_dec + L_stop + β·L_KL, the scalar to differentiate.

    losses: sums over a micro-batch. counts: what each is a mean over, counted in the whole batch
    (all micro-batches and ranks), so that accumulated gradients are those of one large batch.
    """
    weight = {"enc": 1.0, "dec": 1.0, "stop": 1.0, "kl": beta}
    return sum(weight[name] * loss / max(1, counts[name]) for name, loss in losses.items())


def walk_batch(model, batch, eps=None):
    """Read the prompts of a Batch and walk its latents.

    Returns (Latent (B, n_candidate), n_latent as used, the cache after them).
    """
    room = batch.L + batch.text.shape[1]
    h, cache = read_prompt(model.policy, batch.prompt, batch.prompt_mask, room)
    # From keys to ε (B, ≥ n_candidate, D). On a GPU the keys stay: a kernel draws ε on the way
    eps = ops.prepare_noise(eps, h.shape[-1])
    answer_only = batch.answer_only if batch.counts["answer_only"] else None
    plan = Plan(batch.n_latent, batch.L, batch.n_candidate, eps, answer_only)
    latent, n_latent = walk(model, h, cache, plan)
    return latent, n_latent, cache


def read_as_text(policy, batch):
    """Hidden states (B, Tt, D) at batch.text if nothing is latent: a single pass."""
    ids = torch.cat((batch.prompt, batch.text), 1)
    mask = torch.cat((batch.prompt_mask, batch.text_mask), 1)
    return policy(policy.embed(ids), mask, policy.cache(*ids.shape), last=batch.text.shape[1])
