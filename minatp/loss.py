"""Losses as pure functions of tensors: per-token and per-row values, and the one place where they are added up."""
import math

import torch
import torch.nn.functional as F

IGNORE = -100  # a target without a label


def token_nll(logits, target):
    """-log p of each target, float32: logits (..., V), target (...) -> (...); 0 where the target is IGNORE."""
    V = logits.shape[-1]
    return F.cross_entropy(logits.float().reshape(-1, V), target.reshape(-1), ignore_index=IGNORE,
                           reduction="none").view(target.shape)


def kl_normal(mu, logvar):
    """KL(N(μ, σ²) ‖ N(0, I)) of each row, mean over the dimensions: (..., D) -> (...)."""
    return 0.5 * (mu.pow(2) + logvar.exp() - 1 - logvar).mean(-1)


def gaussian_log_prob(z, mu, logvar):
    """log N(z; μ, σ²) of each row, summed over the dimensions: (..., D) -> (...)."""
    return -0.5 * ((z - mu).pow(2) * torch.exp(-logvar) + logvar + math.log(2 * math.pi)).sum(-1)


def sft_loss(sums, counts, beta):
    """L = L_enc + L_dec + L_stop + β·L_KL (method.md, Stage 1).

    sums: a dict of summed losses (scalars) of one micro-batch; counts: what each is a mean over, counted in the whole batch
    (all micro-batches and ranks), so that accumulating gives the same gradient as one large batch. Returns the scalar loss.
    """
    weight = {"enc": 1.0, "dec": 1.0, "stop": 1.0, "kl": beta}
    return sum(weight[name] * value / max(1, counts[name]) for name, value in sums.items())
