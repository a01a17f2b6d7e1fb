"""The decoder LM φ: it reads the c latents of a step as input embeddings and writes the step as text."""
import torch

from .loss import IGNORE


def thought_nll(decoder, z, text):
    """-log p of each thought's text, summed over its tokens. z (N, c, D), text (N, Ts) ids with IGNORE as padding -> (N,)."""
    c, read = z.shape[1], text[:, :-1].clamp(min=0)
    x = torch.cat((z, decoder.embed(read)), 1)
    valid = torch.cat((text.new_ones(len(text), c, dtype=torch.bool), text[:, :-1] != IGNORE), 1)
    h = decoder(x, valid, decoder.cache(*x.shape[:2]))[:, c - 1:]
    labelled = text != IGNORE
    nll = decoder.nll(h[labelled], text[labelled])
    return torch.zeros(text.shape, device=z.device).masked_scatter(labelled, nll).sum(1)


@torch.no_grad()
def read_thoughts(decoder, z, eos, max_new=24):
    """What φ writes greedily for each thought. z (N, c, D) -> N lists of ids, up to the id `eos` that φ was taught to write.

    A thought that has ended leaves the batch.
    """
    N, c, _ = z.shape
    texts = [[] for _ in range(N)]
    if not N:
        return texts
    rows, cache = torch.arange(N, device=z.device), decoder.cache(N, c + max_new)
    h = decoder(z, torch.ones(N, c, dtype=torch.bool, device=z.device), cache)[:, -1]
    for _ in range(max_new):
        token = decoder.logits(h).argmax(-1)
        going = token != eos
        for row, t, on in zip(rows.tolist(), token.tolist(), going.tolist()):
            if on:
                texts[row].append(t)
        if not going.any():
            break
        if not going.all():
            rows, token = rows[going], token[going]
            cache.keep(going.nonzero()[:, 0])
        h = decoder(decoder.embed(token)[:, None], torch.ones(len(rows), 1, dtype=torch.bool, device=z.device), cache)[:, 0]
    return texts
