"""Stage 2, reinforcement: what turns rewards into a loss (docs/method.md, Stage 2).

advantages    reward − the mean of its group
log_probs     the log-probability of everything that a rollout sampled: latents, stops, words
surrogate     the policy gradient of each of these decisions, clipped
kl_to_start   how far the policy has moved from the one that SFT left
"""

from typing import NamedTuple

import torch

from kernels import ops
from kernels.common import upcast
from kernels.cross_entropy import IGNORE

from .chain import Plan, read_prompt, walk
from .latent import gaussian_kl


def advantages(reward, baseline="mean", normalise=False):
    """reward (Q, G), of G rollouts of each of Q questions -> advantage (Q, G).

    0 where all rewards of a group are equal: such a group teaches nothing.
    baseline "mean": the group's mean. "rloo": the mean of the others of the group.
    normalise: divide by the group's standard deviation. Off by default, although the paper does it:
    a group that differs in coherence alone then counts as much as one that differs in answers.
    """
    if baseline not in ("mean", "rloo"):
        raise ValueError(f"no such baseline: {baseline!r}")
    G = reward.shape[1]
    mean = reward.mean(1, keepdim=True)
    advantage = reward - mean
    if baseline == "rloo":
        advantage = advantage * (G / (G - 1))  # = reward − the mean of the G − 1 others
    if normalise:
        advantage = advantage / (reward.std(1, keepdim=True) + 1e-6)
    all_equal = (reward == reward[:, :1]).all(1, keepdim=True)
    return advantage.masked_fill(all_equal, 0.0)


def surrogate(logp, old, advantage, clip=0.2):
    """The clipped loss of each decision, whose gradient is the policy gradient (PPO, GRPO).

    logp, old (B, T), advantage (B, 1 or T) -> loss (B, T), clamped (B, T) bool: the ratio π/π_old
    is outside 1 ± clip. (The gradient is 0 there only if the advantage would push it further out.)

    The log-ratio is first clipped to ± 3. If old is logp itself the ratio is 1 and the gradient is
    REINFORCE's, −advantage·∇logp.
    """
    ratio = (logp - old).clamp(-3, 3).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    return loss, ratio != clipped


class LogProbs(NamedTuple):
    """Log-probabilities as in Rollout, but with gradients, and the Gaussians of the latents."""

    # (B, cK); 0 with path, where a latent is no action
    logp_z: torch.Tensor
    # (B, K)
    logp_stop: torch.Tensor
    # (B, Tt)
    logp_token: torch.Tensor
    # (B, cK, D); without the VAE the latents themselves
    mu: torch.Tensor
    # (B, cK, D), or None without the VAE
    logvar: torch.Tensor


def log_probs(model, prompt, prompt_mask, rollout, group=1, eps=None):
    """The log-probability of everything that a Rollout sampled, with gradients -> LogProbs.

    Its B = Q·group rows belong to prompt, prompt_mask (Q, Tq), which is read once for its group.
    There are two estimators: score (`score_chain`) and, if `eps` is given, path (`walk_chain`).
    eps: the noise of the rollout, as in `sft_losses`.
    """
    policy, c = model.policy, model.c
    B, cK, _ = rollout.z.shape
    Tt = rollout.token.shape[1]
    # The largest number of latents in a row. Read now, while the GPU is idle: later the host would
    # have to wait for it
    L = 0 if eps is None else int(rollout.n_latent.max())

    # Which columns hold a used latent, a candidate, a word
    column = torch.arange(max(cK, Tt), device=prompt.device)
    used = column[:cK] < rollout.n_latent[:, None]  # (B, cK)
    candidate = rollout.candidate  # (B, cK)
    written = column[:Tt] < rollout.n_token[:, None]  # (B, Tt)

    # After the latents the policy read <|end-latent|> and all words but the last: n_token ids
    h, cache = read_prompt(policy, prompt, prompt_mask, cK + Tt, group)
    end_latent = torch.full((B, 1), model.end, device=prompt.device)
    text = policy.embed(torch.cat((end_latent, rollout.token[:, :-1].clamp(min=0)), 1))

    logp_z = rollout.z.new_zeros(B, cK)
    if eps is None:
        latent, h_text = score_chain(model, h, cache, rollout, text, used, written)
        if model.vae:
            logp_z = torch.where(candidate, latent.logp, 0.0)
    else:
        latent, h_text = walk_chain(model, h, cache, rollout, text, written, eps, L)

    # The stop head decided at the first latent of each step
    logp_stop = rollout.z.new_zeros(B, model.K)
    if model.stop:
        logp = upcast(model.stop_head(latent.z[:, ::c])).log_softmax(-1)  # (B, K, 2)
        taken = torch.where(used[:, ::c], logp[..., 0], logp[..., 1])
        logp_stop = torch.where(candidate[:, ::c], taken, 0.0)

    target = rollout.token.masked_fill(~written, IGNORE)
    logp_token = -policy.nll(h_text, target, rollout.temperature)
    return LogProbs(logp_z, logp_stop, logp_token, latent.mu, latent.logvar)


def score_chain(model, h, cache, rollout, text, used, written):
    """Score: the latents of a Rollout are given. -> (Latent (B, cK), hidden states of the text).

    A latent is an action with density N(z; μ, σ²), so nothing needs to be walked: latents and text,
    embeddings (B, Tt, D), are read in one parallel pass after hidden states h (B, D). The candidate
    dropped at a stop counts too, since it was sampled.
    """
    cK = rollout.z.shape[1]
    states = model.policy(torch.cat((rollout.z, text), 1), torch.cat((used, written), 1), cache)
    # The latent in column t was proposed from the column before it
    h_before = torch.cat((h[:, None], states[:, : cK - 1]), 1)
    latent = model.propose(h_before, z=rollout.z, spread=rollout.spread)
    return latent, states[:, cK:]


def walk_chain(model, h, cache, rollout, text, written, eps, L):
    """Path: z = μ + σε is a function of the weights. Returns what `score_chain` does.

    Only stops and words are actions. The chain is walked again with the same noise, so their
    gradient runs back through every latent; then one pass reads the text, embeddings (B, Tt, D).
    L: the largest number of latents in a row.
    """
    cK, D = rollout.z.shape[1:]
    eps = ops.prepare_noise(eps, D)
    plan = Plan(rollout.n_latent, L=L, n_candidate=cK, eps=eps, spread=rollout.spread)
    latent, _ = walk(model, h, cache, plan)
    return latent, model.policy(text, written, cache)


def kl_to_start(new, start, candidate):
    """KL(π ‖ π_start), a scalar: the sum over all latents, stops and words of the chains.

    new, start: LogProbs of the same B rollouts under either policy. candidate (B, cK): that of the
    Rollout.
    Latents: exact, between the heads' Gaussians (without --spread). Stops and words: estimated from
    the samples (k3, exp(r) − 1 − r), whose gradient is that of KL(π_start ‖ π). Words of --greedy
    are no samples: their share is a distance, and no estimate of the KL.
    """

    # e^r can overflow: from r = 10 on it continues as a line, which still pulls the policy back
    def k3(logp, logp_start):
        r = logp_start - logp
        bounded = r.clamp(max=10)
        return (bounded.exp() * (1 + (r - bounded)) - 1 - r).sum()

    kl_z = gaussian_kl(new.mu, new.logvar, start.mu, start.logvar)[candidate].sum()
    return kl_z + k3(new.logp_stop, start.logp_stop) + k3(new.logp_token, start.logp_token)
