"""Stage 1, supervised fine-tuning: its losses (docs/method.md, Stage 1).

    enc   the policy writes the text after the latents; the gradient runs back through all latents
    kl    the latents' Gaussians stay near N(0, I)
    stop  the stop head continues at each step of the problem, and stops after the last
    dec   the decoder LM φ reads each step's latents and writes the step as text; with
          --word-dropout it does not see some of the words. With previews this starts in stage 0,
          with latents that are proposed but not fed back

and, with --distill, CODI's self-distillation (arXiv 2502.21074), in which the same model reads the
same problem in words, as a teacher:

    teacher   it writes the steps and the answer
    distill   at the last position before the answer, the states of every layer after the latents
              should equal the teacher's, which gets no gradient from this

Each loss is a sum over one micro-batch. `total_loss` divides it by its count in the whole batch, so
it does not matter how a batch is split over micro-batches and GPUs.
"""

import torch

from kernels import ops
from kernels.cross_entropy import token_nll

from .chain import Plan, read_prompt, walk
from .decoder import thought_nll


def sft_losses(model, batch, eps=None):
    """The losses of a Batch, each summed over it: {"enc", "kl", …}, those that apply.

    model: an ATP. eps: the noise of the latents, ε (B, ≥ n_candidate, D) or the keys that it is
    drawn from (B, ≥ n_candidate, 2); None: z = μ. Previews need (B, c·K, …).
    """
    # In stage 0 no latent is read, nor in any stage of a method without latents
    if not batch.thinking.n_candidate:
        return losses_in_words(model, batch, eps)

    # Read the prompt, think, and read the text after the latents. A teacher reads the problem in
    # words, after the same prompt
    policy, thinking, text = model.policy, batch.thinking, batch.text
    h, cache = read_batch(policy, batch)
    words_cache = cache.fork() if batch.words else None
    latent, _ = walk_batch(model, batch, h, cache, eps)
    if batch.words:
        h, states = policy(policy.embed(text.ids), text.mask, cache, states_at=text.answer_at)
        distill_losses = distillation(policy, batch, words_cache, states)
    else:
        h, distill_losses = policy(policy.embed(text.ids), text.mask, cache), {}  # (B, Tt, D)
    losses = {"enc": label_nll(policy, h, text), **distill_losses}

    # KL(N(μ, σ²) ‖ N(0, I)) of each used latent
    if model.vae:
        losses["kl"] = latent.kl[thinking.used_at].sum()

    # Stop head: cross-entropy of "continue" at the first latent of each step, of "stop" after them
    z = latent.z  # (B, n_candidate, D)
    if model.stop:
        stop_logits = model.stop_head(z[thinking.stop_at])
        losses["stop"] = token_nll(stop_logits, thinking.stop_label).sum()

    # φ must write each step from its c latents; the gradient reaches them, and through them π. (A
    # dropped candidate can be one column too many for whole steps: it is cut off)
    steps = batch.steps
    if len(steps.target):
        n_step = z.shape[1] // model.c
        z = z[:, : n_step * model.c].unflatten(1, (n_step, model.c))  # (B, n_step, c, D)
        losses["dec"] = decoder_loss(model.decoder, z[steps.row, steps.index], steps)
    return losses


def losses_in_words(model, batch, eps=None):
    """`sft_losses` where no latent is read: prompt and text are, in one pass."""
    policy = model.policy
    has_previews = batch.steps.n_before is not None
    n_text = batch.text.ids.shape[1]
    h = read_as_text(policy, batch, last=None if has_previews else n_text)
    losses = {"enc": label_nll(policy, h[:, -n_text:], batch.text)}

    # Previews: the latents that π proposes before each step. Until φ starts, π reads them, and
    # learns only to read. Then φ reads them, and its gradient teaches π and the latent head what to
    # think
    if has_previews:
        latents = previews(model, h, batch, eps)  # (N, c, D)
        reader = model.decoder
        if not model.decoder_started:
            reader, latents = policy, latents.detach()
        losses["dec"] = decoder_loss(reader, latents, batch.steps)
    return losses


def label_nll(policy, h, text):
    """−log p of what the policy writes, a Text, after the hidden states h (B, T, D), summed."""
    return policy.nll(h[text.target_at], text.target[text.target_at]).sum()


def decoder_loss(reader, latents, steps):
    """L_dec: −log p of N Steps, read from their latents (N, c, D), summed."""
    return thought_nll(reader, latents, steps.target, steps.target_at, steps.unseen).sum()


def distillation(policy, batch, cache, states):
    """The losses of the teacher and of the student, each summed over a Batch.

    cache: has read the prompts. states (n_layer, N, D): the student's, before the answer.
    """
    words = batch.words
    h, teacher = policy(policy.embed(words.ids), words.mask, cache, states_at=words.answer_at)
    nll = label_nll(policy, h, words)
    return {"teacher": nll, "distill": state_distance(states, teacher.detach()).sum()}


def state_distance(student, teacher):
    """mean |student − teacher| over the standard deviation of the teacher, both over D; then the
    mean over the layers. (n_layer, N, D) -> (N,)
    """
    difference = (student - teacher).abs().mean(-1)  # (n_layer, N)
    return (difference / teacher.std(-1)).mean(0)


def total_loss(losses, counts, weights):
    """L = L_enc + L_dec + L_stop + β·L_KL (+ L_teacher + W·L_distill), the scalar to differentiate.

    losses: sums over a micro-batch. counts: what each is a mean over, counted in the whole batch
    (all micro-batches and ranks), so that accumulated gradients are those of one large batch.
    weights: {"kl": β, "distill": W}; that of every other loss is 1.
    """
    return sum(
        weights.get(name, 1.0) * loss / max(1, counts[name]) for name, loss in losses.items()
    )


def read_batch(policy, batch):
    """Read the prompts of a Batch: (h (B, D), the cache, with room for what follows)."""
    room = batch.thinking.L + batch.text.ids.shape[1]
    if batch.words:
        room = max(room, batch.words.ids.shape[1])
    return read_prompt(policy, batch.prompt, batch.prompt_mask, room)


def walk_batch(model, batch, h, cache, eps=None):
    """Walk the latents of a Batch whose prompts have been read (`read_batch`).

    Returns (Latent (B, n_candidate), n_latent as used).
    """
    # From keys to ε (B, ≥ n_candidate, D). On a GPU the keys stay: a kernel draws ε on the way
    eps = ops.prepare_noise(eps, h.shape[-1])
    thinking = batch.thinking
    answer_only = thinking.answer_only if batch.counts["answer_only"] else None
    plan = Plan(thinking.n_latent, thinking.L, thinking.n_candidate, eps, answer_only)
    return walk(model, h, cache, plan)


def read_as_text(policy, batch, last=None):
    """Read the prompts and batch.text in a single pass.

    Returns the hidden states (B, Tq + Tt, D), or those of the `last` columns alone.
    """
    ids = torch.cat((batch.prompt, batch.text.ids), 1)
    mask = torch.cat((batch.prompt_mask, batch.text.mask), 1)
    return policy(policy.embed(ids), mask, policy.cache(*ids.shape), last=last)


def previews(model, h, batch, eps=None):
    """What the policy would think before each of N steps in words: z (N, c, D).

    No latent is fed back, so the c latents of a step are proposed from the c states just before it.
    h (B, Tq + Tt, D): from `read_as_text`. eps: as in `sft_losses`.
    """
    of_step = torch.arange(model.c, device=h.device)
    steps = batch.steps
    row = steps.row[:, None]
    first = batch.prompt.shape[1] + steps.n_before - model.c
    h = h[row, (first[:, None] + of_step).clamp(min=0)]
    if eps is not None:
        eps = ops.prepare_noise(eps, h.shape[-1])
        eps = eps[row, model.c * steps.index[:, None] + of_step]
    return model.propose(h, eps).z
