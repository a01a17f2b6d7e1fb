"""The thinking part: a latent head that proposes a thought, a stop head that ends the thinking, and ATP, which holds both
beside the policy LM π and the decoder LM φ (method.md, Sequence)."""
import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn

from kernels import ops
from kernels.common import wide

from .llama import Block, Llama

START, LATENT, END = "<|start-latent|>", "<|latent|>", "<|end-latent|>"


class Thought(NamedTuple):
    """A candidate, or many of them (...), and the Gaussian that it was drawn from. Without the VAE z = μ = h, and the rest is None."""
    z: torch.Tensor       # (..., D)
    mu: torch.Tensor      # (..., D)
    logvar: torch.Tensor  # (..., D)
    kl: torch.Tensor      # (...) KL(N(μ, σ²) ‖ N(0, I)), mean over the dimensions
    logp: torch.Tensor    # (...) log-density of z, summed over them


class LatentHead(nn.Module):
    """h (..., D) -> μ and logσ² of the next thought: x = LayerNorm(W2·GELU(W1·h + b1) + b2), μ = Wμ·x + bμ, logσ² = Wσ·x + bσ.

    `gaussian` is Wμ over Wσ: one product makes both.
    """
    def __init__(self, D, init_logvar=-4.0):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, D), nn.LayerNorm(D))
        self.gaussian = nn.Linear(D, 2 * D)
        nn.init.zeros_(self.gaussian.weight[D:])
        nn.init.constant_(self.gaussian.bias[D:], init_logvar)

    def forward(self, h):
        return wide(self.gaussian(self.fc(h))).chunk(2, -1)


def stop_head(D):
    """z (..., D) -> two logits, 0 continue and 1 stop: Wb·GELU(Wa·z + ba) + bb."""
    return nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 2))


class ATP(nn.Module):
    """π, φ and the two heads.

    vae=False: the thought is the hidden state itself (Coconut). stop=False: reasoning always takes the stage's full length.
    decode=False: no decoder LM. c: latents per step. K: most steps kept latent. stage: the last curriculum stage taught,
    which bounds the thinking: a model in its k-th stage thinks at most k steps and writes the rest.
    """
    def __init__(self, cfg, c=2, K=10, vae=True, stop=True, decode=True, decoder_layers=0, init_logvar=-4.0):
        super().__init__()
        self.c, self.K, self.vae, self.stop, self.decode = c, K, vae, stop, decode
        self.stage = K + 1
        self.longest = 24  # tokens that φ may write for a thought; SFT raises it where a text is longer
        self.end = None  # id of <|end-latent|>
        self.policy = Llama(cfg)
        if decode:
            self.decoder = Llama(replace(cfg, n_layer=decoder_layers or cfg.n_layer))
        if vae:
            self.latent_head = LatentHead(cfg.n_embd, init_logvar)
        if stop:
            self.stop_head = stop_head(cfg.n_embd)

    def propose(self, h, eps=None, z=None, spread=1.0):
        """The candidate after hidden state h (..., D) -> Thought. eps as in kernels/vae.py. z given: that one; neither given: z = μ.

        spread: z ~ N(μ, (spread·σ)²), which kl and logp are of; mu and logvar are the head's own.
        """
        if not self.vae:
            return Thought(wide(h) if z is None else z, wide(h), None, None, None)
        mu, logvar = self.latent_head(h)
        z, kl, logp = ops.reparameterise(mu, logvar if spread == 1 else logvar + 2 * math.log(spread), eps, z)
        return Thought(z, mu, logvar, kl, logp)

    def set_recompute(self, on):
        """Whether MLP activations are computed again in the backward pass. Returns self."""
        for m in self.modules():
            if isinstance(m, Block):
                m.recompute = on
        return self
