"""Losses as pure functions of tensors: RL's advantages and surrogate, and the one place where SFT's are added up.

The values of a token and of a row (token_nll, kl_normal, gaussian_log_prob) stand beside the kernels that compute them.
"""
import torch


def advantages(reward, baseline="mean", normalise=False):
    """reward (B, G) -> advantage (B, G), 0 where a group's rewards are all equal: it teaches nothing.

    baseline "mean": the group's mean; "rloo": the mean of the others. normalise: over the group's deviation, as in method.md; left away by
    default, because it blows up groups that differ in coherence alone.
    """
    G = reward.shape[1]
    mean = reward.mean(1, keepdim=True)
    advantage = (reward - mean) * (G / (G - 1) if baseline == "rloo" else 1.0)
    equal = (reward == reward[:, :1]).all(1, keepdim=True)
    if normalise:
        advantage = advantage / (reward.std(1, keepdim=True) + 1e-6)
    return advantage.masked_fill(equal, 0.0)


def surrogate(logp, old, advantage, clip=0.2):
    """Clipped policy gradient of each decision: logp, old (B, T) and advantage (B, 1) -> loss (B, T), and where it was clamped.

    Where old is logp itself the ratio is 1 and the gradient is REINFORCE's, −advantage·∇logp.
    """
    ratio = (logp - old).clamp(-3, 3).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    return -torch.minimum(ratio * advantage, clipped * advantage), (ratio - clipped).abs() > 0


def sft_loss(sums, counts, beta):
    """L = L_enc + L_dec + L_stop + β·L_KL (method.md, Stage 1).

    sums: a dict of summed losses (scalars) of one micro-batch; counts: what each is a mean over, counted in the whole batch
    (all micro-batches and ranks), so that accumulating gives the same gradient as one large batch. Returns the scalar loss.
    """
    weight = {"enc": 1.0, "dec": 1.0, "stop": 1.0, "kl": beta}
    return sum(weight[name] * value / max(1, counts[name]) for name, value in sums.items())
