"""The decoder LM φ, which reads latents back as text.

It takes the c latents of a step as input embeddings and writes the step. With previews, it reads
bos first, and π does the reading until φ starts (docs/method.md).

thought_nll      −log p of the true text of a step: the loss that teaches φ, and the latents. SFT
                 needs nothing else of this file
read_thoughts    what φ writes greedily for each step
as_text          a whole Rollout as a list of Chains; φ has not read their thoughts yet
read_chains      φ reads the thoughts of some of these chains, or of all
"""

import math
from dataclasses import dataclass

import torch

from kernels.common import cast_once
from kernels.cross_entropy import IGNORE

from . import reward
from .rollout import write


def thought_embeddings(decoder, z):
    """The input embeddings that φ starts from: the latents z (N, c, D), after bos if it reads bos.

    Returns x (N, c or 1 + c, D) and its mask, all True (N, c or 1 + c).
    """
    if decoder.reads_bos:
        bos = torch.full((len(z), 1), decoder.cfg.bos, device=z.device)
        z = torch.cat((decoder.embed(bos), z), 1)
    return z, torch.ones(z.shape[:2], dtype=torch.bool, device=z.device)


def thought_nll(decoder, z, target, target_at, unseen=None):
    """−log p of each step's text, (N,): the sum of `thought_token_nll` over its tokens."""
    return thought_token_nll(decoder, z, target, target_at, unseen).sum(1)


def thought_token_nll(decoder, z, target, target_at, unseen=None):
    """−log p of each token of each step's text, 0 where padded: (N, Ts).

    z (N, c, D): the step's latents. target (N, Ts): its ids and eos, IGNORE where padded.
    target_at: where `target` has an id, (rows, columns). unseen (N, Ts − 1) bool: words that φ must
    write but does not read, since their embeddings are 0; None: it reads all.
    """
    # φ reads the latents, then the text up to its last id
    thought, all_real = thought_embeddings(decoder, z)
    words = decoder.embed(target[:, :-1].clamp(min=0))
    if unseen is not None:
        words = words.masked_fill(unseen[..., None], 0)
    x = torch.cat((thought, words), 1)
    mask = torch.cat((all_real, target[:, :-1] != IGNORE), 1)

    # the hidden state after the last latent predicts the first id
    h = decoder(x, mask, decoder.cache(*x.shape[:2]), last=target.shape[1])  # (N, Ts, D)
    nll = decoder.nll(h[target_at], target[target_at])
    return nll.new_zeros(target.shape).index_put(target_at, nll)


@torch.no_grad()
def read_thoughts(decoder, z, eos, max_new):
    """What φ writes greedily for each step.

    z (N, c, D) -> N lists of at most max_new ids, each up to, and without, the id `eos`.
    """
    if not len(z):
        return []
    with cast_once(decoder):  # saves casts under autocast, and changes no result
        x, all_real = thought_embeddings(decoder, z)
        cache = decoder.cache(len(x), x.shape[1] + max_new)
        h = decoder(x, all_real, cache, last=1)[:, 0]
        token, _ = write(decoder, h, cache, max_new, [eos])
    return [[i for i in ids if i not in (eos, -1)] for ids in token.tolist()]


# ---- whole chains --------------------------------------------------------------------------------


@dataclass
class Chain:
    """One problem, solved once, as text."""

    # what φ reads in each latent step; [] without a decoder; None before `read_chains`
    thoughts: list | None
    # what the policy wrote, ending in "### 19"
    text: str
    # with eos, not by running out of room
    ended: bool
    n_latent: int
    # written, eos included
    n_token: int
    # of each step at which the stop head was asked
    stop_prob: list
    # mean σ of each latent step; [] without the VAE
    sigma: list
    # (n_latent, D), if `solve` was asked to keep it
    z: torch.Tensor | None = None

    @property
    def steps(self):
        """Every reasoning step in words: the thoughts, then the lines written before the answer."""
        assert self.thoughts is not None, "φ has not read this chain (reward.needs_thoughts)"
        written = self.text.partition("### ")[0]
        lines = [line for text in (*self.thoughts, written) for line in text.split("\n")]
        return [line for line in lines if line.strip()]

    @property
    def answer(self):
        return reward.answer(self.text)


def as_text(model, tokenizer, rollout):
    """A Rollout of B chains -> a list of B Chains, their `thoughts` None: φ reads them later."""
    c, K = model.c, model.K
    B = len(rollout.z)
    sigma = [[]] * B
    if model.vae:
        of_latent = (0.5 * rollout.logvar).exp().mean(-1)  # (B, cK)
        sigma = of_latent.unflatten(1, (K, c)).mean(-1).tolist()

    chains = []
    n_latent, n_token = rollout.n_latent.tolist(), rollout.n_token.tolist()
    token, stop_prob = rollout.token.tolist(), rollout.stop_prob.tolist()
    for b in range(B):
        ids = token[b][: n_token[b]]
        chain = Chain(
            thoughts=None,
            text=tokenizer.decode(ids),
            ended=bool(ids) and ids[-1] in tokenizer.eos,
            n_latent=n_latent[b],
            n_token=n_token[b],
            stop_prob=[p for p in stop_prob[b] if not math.isnan(p)],
            sigma=sigma[b][: n_latent[b] // c],
        )
        chains.append(chain)
    return chains


def read_chains(model, tokenizer, rollout, chains, which=None):
    """Let φ put the thoughts of some chains into words, all of them in one batch.

    chains: those of the Rollout, from `as_text`; they receive their `thoughts`. which: the indices
    of those to read; None: all.
    """
    c, K = model.c, model.K
    which = list(range(len(chains))) if which is None else which
    for b in which:
        chains[b].thoughts = []
    if not model.decode or not which:
        return

    # Only latent steps that were used: past the end of a chain there are none
    rows = torch.tensor(which, device=rollout.z.device)
    steps = rollout.z[rows].unflatten(1, (K, c))  # (rows, K, c, D)
    used = torch.arange(K, device=rows.device) * c < rollout.n_latent[rows, None]  # (rows, K)
    row, step = used.nonzero(as_tuple=True)
    texts = read_thoughts(model.decoder, steps[row, step], tokenizer.eos[0], model.longest)
    for i, ids in zip(row.tolist(), texts):
        chains[which[i]].thoughts.append(tokenizer.decode(ids))
