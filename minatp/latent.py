"""The parts that think: the latent head, the stop head, and ATP (docs/method.md, Sequence).

The latent head proposes the next latent, the stop head ends the thinking. ATP holds both beside the
policy LM π and the decoder LM φ.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn

from kernels import ops
from kernels.common import upcast
from kernels.linear import Linear

from .llama import Block, Llama


class Latent(NamedTuple):
    """A candidate latent, or many (...), and the Gaussian that the head gave for it.

    Without the VAE z = mu is the hidden state itself (Coconut) or its projection (CODI), and the
    rest is None.
    """

    # (..., D)
    z: torch.Tensor
    # (..., D)
    mu: torch.Tensor
    # (..., D)
    logvar: torch.Tensor
    # (...) KL(N(μ, σ²) ‖ N(0, I)), mean over the dimensions
    kl: torch.Tensor
    # (...) log N(z; μ, σ²), summed over the dimensions
    logp: torch.Tensor


def gaussian_kl(mu, logvar, mu_0, logvar_0):
    """KL(N(μ, σ²) ‖ N(μ₀, σ₀²)), summed over the dimensions. All (..., D) -> (...).

    = ½ Σ(log σ₀² − log σ² + (σ² + (μ − μ₀)²)/σ₀² − 1)
    """
    square = logvar.exp() + (mu - mu_0).pow(2)
    return 0.5 * (logvar_0 - logvar + square * torch.exp(-logvar_0) - 1).sum(-1)


class LatentHead(nn.Module):
    """h (..., D) -> μ and log σ² of the next latent.

    x = LayerNorm(W2·GELU(W1·h + b1) + b2),  μ = Wμ·x + bμ,  log σ² = Wσ·x + bσ.
    `gaussian` is Wμ stacked on Wσ, so that one product makes both.
    """

    def __init__(self, D, init_logvar=-4.0):
        super().__init__()
        self.fc = projection(D)
        self.gaussian = Linear(D, 2 * D)

        # σ starts the same for every h
        nn.init.zeros_(self.gaussian.weight[D:])
        nn.init.constant_(self.gaussian.bias[D:], init_logvar)

    @torch.no_grad()
    def standardise(self, h):
        """Make an untrained head subtract the mean of hidden states h (N, D) and divide by their
        standard deviation in each dimension, plus 2 % of the root mean square of all of h.

        In a published model a few dimensions are nearly the same in every state, and larger than
        all others together: without this, μ would hardly depend on the problem.
        """
        std = h.std(0, correction=0)
        std += 0.02 * h.square().mean().sqrt()  # what is nearly constant stays small
        first = self.fc[0]
        first.weight.div_(std)
        first.bias.sub_(first.weight @ h.mean(0))

    def forward(self, h):
        mu, logvar = upcast(self.gaussian(self.fc(h))).chunk(2, -1)
        return mu, logvar


def projection(D):
    """LayerNorm(W2·GELU(W1·h + b1) + b2): the latent head's x or, alone, the latent of CODI."""
    return nn.Sequential(Linear(D, D), nn.GELU(), Linear(D, D), nn.LayerNorm(D))


def stop_head(D):
    """z (..., D) -> two logits, 0: continue, 1: stop.  Wb·GELU(Wa·z + ba) + bb."""
    return nn.Sequential(Linear(D, D), nn.GELU(), Linear(D, 2))


class ATP(nn.Module):
    """The policy π, the decoder φ and the two heads.

    c: latents per reasoning step. K: the largest number of latent steps.
    vae=False: the latent is the hidden state itself (Coconut) or, with project=True, a projection
    of it (CODI). decode=False: no decoder LM.
    stop=False: no stop head; the thinking always takes the full length of the stage.
    fillers: the number of <|latent|> tokens per step, in place of latents; None: latents.
    previews: in stage 0, π proposes latents before each written step. π learns to read them, then
    φ, which starts as its copy. Both read bos first (docs/method.md, Previews).

    A run saves all parameters and no buffers. Muon trains the matrices of `latent_head` and
    `projection`, by these names (optim.py).
    """

    def __init__(
        self,
        cfg,
        c=2,
        K=10,
        vae=True,
        stop=True,
        decode=True,
        project=False,
        fillers=None,
        previews=False,
        decoder_layers=0,
        init_logvar=-4.0,
    ):
        """cfg: the LlamaConfig of π. decoder_layers: of φ; 0 means as many as π."""
        super().__init__()
        self.c, self.K = c, K
        self.vae, self.stop, self.decode = vae, stop, decode
        self.project, self.fillers = project, fillers
        self.previews = previews and decode

        # The last curriculum stage taught. It bounds the thinking: a model in its k-th stage thinks
        # at most k steps and writes the rest.
        self.stage = K + 1
        self.longest = 24  # most tokens that φ writes for a step; SFT raises it if a text is longer
        self.filler = self.end = None  # ids of <|latent|>, the filler, and of <|end-latent|>

        self.policy = Llama(cfg)
        # Whether φ has become a model of its own. Only read in stage 0
        self.decoder_started = False
        if decode:
            self.decoder = Llama(replace(cfg, n_layer=decoder_layers or cfg.n_layer))
            self.policy.reads_bos = self.decoder.reads_bos = previews
        if vae:
            self.latent_head = LatentHead(cfg.n_embd, init_logvar)
        if project:
            self.projection = projection(cfg.n_embd)
        if stop:
            self.stop_head = stop_head(cfg.n_embd)

    @property
    def device(self):
        return self.policy.freq.device

    def start_decoder(self):
        """Make φ a copy of π, or of its lower layers. From now on it is trained by itself."""
        self.decoder.start_from(self.policy)
        self.decoder_started = True

    def fillers_at(self, stage):
        """The fillers of every problem at a curriculum stage, a list of ids; [] with latents."""
        return [self.filler] * ((self.fillers or 0) * min(stage, self.K))

    def propose(self, h, eps=None, z=None, spread=1.0):
        """The candidate after hidden state h (..., D) -> Latent.

        eps (..., D): ε, so that z = μ + σ·ε; None: z = μ. (On a GPU it is (..., 2), the seed and
        offset from which a kernel draws ε.) z: take that one; only its KL and density are computed.
        spread widens the Gaussian: z ~ N(μ, (spread·σ)²), and kl and logp are of that one. mu and
        logvar stay the head's.
        """
        if not self.vae:
            h = upcast(self.projection(h) if self.project else h)
            return Latent(h if z is None else z, h, None, None, None)
        mu, logvar = self.latent_head(h)
        spread_logvar = logvar if spread == 1 else logvar + 2 * math.log(spread)
        # z = μ + exp(½ log σ²)·ε
        # KL(N(μ, σ²) ‖ N(0, I)) = ½ mean(μ² + σ² − 1 − log σ²)
        # log N(z; μ, σ²) = −½ Σ((z − μ)²/σ² + log σ² + log 2π)
        z, kl, logp = ops.reparameterise(mu, spread_logvar, eps, z)
        return Latent(z, mu, logvar, kl, logp)

    def set_recompute(self, on):
        """Whether the backward pass recomputes MLP activations, to save memory. Returns self."""
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute = on
        return self
