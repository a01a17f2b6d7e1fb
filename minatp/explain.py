"""The decoder LM φ: it reads the c latents of a step as input embeddings and writes the step as text."""
import math
from contextlib import contextmanager

import torch

from kernels.common import wide
from kernels.cross_entropy import IGNORE
from kernels.graph import Late, left


def thought_nll(decoder, z, text):
    """-log p of each thought's text, summed over its tokens. z (N, c, D), text (N, Ts) ids with IGNORE as padding -> (N,)."""
    c, read = z.shape[1], text[:, :-1].clamp(min=0)
    x = torch.cat((z, decoder.embed(read)), 1)
    valid = torch.cat((text.new_ones(len(text), c, dtype=torch.bool), text[:, :-1] != IGNORE), 1)
    h = decoder(x, valid, decoder.cache(*x.shape[:2]))[:, c - 1:]
    labelled = text != IGNORE
    nll = decoder.nll(h[labelled], text[labelled])
    return nll.new_zeros(text.shape).masked_scatter(labelled, nll).sum(1)


@contextmanager
def cast_once(module):
    """Inside, autocast keeps its copies of a frozen module's weights, too, where it would make them anew for every word: it goes by
    requires_grad."""
    frozen = [p for p in module.parameters() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


@torch.no_grad()
def read_thoughts(decoder, z, eos, max_new):
    """What φ writes greedily for each thought. z (N, c, D) -> N lists of ids, up to the id `eos` that φ was taught to write.

    Thoughts that have ended leave the batch, at once or, where ticks are CUDA graphs, when they are half of it.
    """
    N, c, _ = z.shape
    if not N:
        return []
    cache = decoder.cache(N, c + max_new)
    rows, reads = torch.arange(N, device=z.device), torch.ones(N, dtype=torch.bool, device=z.device)  # thoughts of the batch; still read
    word, text = rows.new_full((N,), eos), rows.new_full((N, max_new), eos)

    def write(h, t):
        """The next word of every thought, from hidden states h (A, D) at tick t (a tensor, ()); eos where it has ended."""
        word.copy_(torch.where(reads, decoder.logits(h).argmax(-1), eos))
        text[rows, t.expand_as(rows)] = word
        reads.copy_(word != eos)

    tick = lambda t: write(decoder.step(decoder.embed(word), reads, cache), t)
    done = Late(cache.replays)
    with cast_once(decoder):
        write(decoder(z, torch.ones(N, c, dtype=torch.bool, device=z.device), cache, 1)[:, 0], torch.zeros_like(rows[0]))
        for t in range(1, max_new):
            n_done = done(~reads)
            if n_done == len(rows):
                break
            if (b := left(~reads, n_done, cache.replays)) is not None:
                rows, reads, word, done = rows[b], reads[b], word[b], Late(cache.replays)
                cache.keep(b)
            cache.step(tick, torch.full_like(rows[0], t))
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in text.tolist()]


@torch.no_grad()
def readings(decoder, z, eos, n, max_new):
    """The n likeliest readings of each thought, by beam search. z (N, c, D) -> N lists of (ids, probability), likeliest first.

    Readings that do not end within max_new tokens are left out.
    """
    N, c, _ = z.shape
    found = [[] for _ in range(N)]
    if not N:
        return found
    cache = decoder.cache(N, c + max_new)
    h = decoder(z, torch.ones(N, c, dtype=torch.bool, device=z.device), cache)[:, -1]
    total, ids = z.new_zeros(N, 1), [[[]] for _ in range(N)]  # (N, beams): log-probability and words of what is not ended yet
    for _ in range(max_new):
        beams = total.shape[1]
        logp = total[..., None] + wide(decoder.logits(h)).log_softmax(-1).view(N, beams, -1)
        for row, ended in enumerate(logp[..., eos].tolist()):
            found[row] += [(ids[row][b], p) for b, p in enumerate(ended)]
        logp[..., eos] = -torch.inf
        total, best = logp.flatten(1).topk(n)
        parent, token = best // logp.shape[-1], best % logp.shape[-1]
        ids = [[ids[row][b] + [t] for b, t in zip(bs, ts)] for row, (bs, ts) in enumerate(zip(parent.tolist(), token.tolist()))]
        found = [sorted(f, key=lambda r: -r[1])[:n] for f in found]
        if all(f[-1][1] >= t and len(f) == n for f, t in zip(found, total[:, 0].tolist())):
            break  # what goes on only gets less likely
        cache.keep((torch.arange(N, device=z.device)[:, None] * beams + parent).flatten())
        h = decoder(decoder.embed(token.flatten())[:, None], torch.ones(N * n, 1, dtype=torch.bool, device=z.device), cache)[:, 0]
    return [[(words, math.exp(p)) for words, p in f] for f in found]
