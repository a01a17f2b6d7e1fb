"""Prompt → latents → answer.

`supervise`  the stops are given and gradients on: SFT.
`rollout`    the model decides, without gradients: evaluation, sample.py and RL's exploration.
`score`      everything sampled is given: the log-probabilities that RL differentiates, in one parallel pass or by walking the chain.
All three go through ATP.propose, the stop head and the same KV cache.
"""
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch

from kernels import ops
from kernels.common import wide
from kernels.cross_entropy import IGNORE, token_nll
from kernels.graph import Late, left, put, some

from .chain import walk
from .explain import thought_nll


def read(policy, prompt, valid, room, group=1):
    """Read prompts (Q, Tq), real where valid, of which each is gone on with `group` times: (hidden states after them (Q·group, D), those of a
    prompt side by side; the cache, with room for so many columns more)."""
    cache = policy.cache(len(prompt), prompt.shape[1] + room)
    h = policy(policy.embed(prompt), valid, cache, 1)[:, 0]
    if group > 1:
        cache.keep(torch.arange(len(h) * group, device=h.device) // group, group)
        h = h.repeat_interleave(group, 0)
    return h, cache


def think(model, batch, eps=None):
    """Read a batch's prompts and walk its latents. Returns what `walk` does, and the cache, ready for the tail."""
    h, cache = read(model.policy, batch.prompt, batch.prompt_valid, batch.L + batch.tail.shape[1])
    eps = ops.prepared(eps, h.shape[-1])
    return *walk(model, h, cache, batch.n_latent, batch.L, batch.n_candidate, eps, batch.free if batch.counts["free"] else None), cache


def tail_valid(batch):
    return torch.cat((torch.ones_like(batch.target[:, :1], dtype=torch.bool), batch.target[:, :-1] >= 0), 1)


def read_text(model, batch):
    """Hidden states (B, Tt, D) of the tail where nothing is latent: prompt and tail are read at once."""
    ids, valid = torch.cat((batch.prompt, batch.tail), 1), torch.cat((batch.prompt_valid, tail_valid(batch)), 1)
    return model.policy(model.policy.embed(ids), valid, model.policy.cache(*ids.shape), batch.tail.shape[1])


def supervise(model, batch, eps=None):
    """Stage 1's losses, each summed over the batch: {"enc", "dec", "stop", "kl"} (those that apply); see loss.sft_loss."""
    thought = None
    if batch.n_candidate:
        thought, n_latent, cache = think(model, batch, eps)
        h = model.policy(model.policy.embed(batch.tail), tail_valid(batch), cache)
    else:
        h = read_text(model, batch)
    labelled = batch.target >= 0
    sums = {"enc": model.policy.nll(h[labelled], batch.target[labelled]).sum()}
    if thought is None:
        return sums
    z = thought.z
    t = torch.arange(z.shape[1], device=z.device)
    used = (t < n_latent[:, None]) & ~batch.free[:, None]                         # (B, n_candidate); a free row has no label
    if model.vae:
        sums["kl"] = thought.kl[used].sum()
    if model.stop:
        dropped = (t == batch.n_latent[:, None]) & batch.asks[:, None]
        asked = (used | dropped) & (t % model.c == 0)
        sums["stop"] = token_nll(model.stop_head(z[asked]), dropped[asked].long()).sum()
    if model.decode and len(batch.thought):
        steps = z[:, : z.shape[1] // model.c * model.c].unflatten(1, (-1, model.c))  # (B, steps, c, D)
        sums["dec"] = thought_nll(model.decoder, steps[batch.thought_row, batch.thought_step], batch.thought).sum()
    return sums


@dataclass
class Noise:
    """What chance decides, drawn for each problem before any batch is made, so that a batch does not change a problem's luck."""
    eps: torch.Tensor    # (B, cK, 2): seed and offset of each thought's ε (kernels/vae.py)
    stop: torch.Tensor   # (B, K) uniform
    token: torch.Tensor  # (B, max_new) uniform; None: the words are greedy
    spread: float = 1.0  # z ~ N(μ, (spread·σ)²)
    temperature: float = 1.0  # of the words

    @staticmethod
    def draw(model, B, max_new, seed, temperature=1.0, spread=None, greedy=False):
        """spread: the temperature where it is not given. greedy: chance in the thoughts alone."""
        g = torch.Generator().manual_seed(seed)
        return Noise(ops.noise(seed, B, model.c * model.K), torch.rand(B, model.K, generator=g),
                     None if greedy else torch.rand(B, max_new, generator=g), temperature if spread is None else spread, temperature)

    def at(self, rows, device):
        pick = lambda t: None if t is None else t[rows].to(device)
        return Noise(pick(self.eps), pick(self.stop), pick(self.token), self.spread, self.temperature)


@dataclass
class Given:
    """Thoughts that the rollout has to take as they are, in place of its own first ones: edits and probes."""
    z: torch.Tensor     # (B, cK, D)
    n: torch.Tensor     # (B,) latents of z that count, whole steps
    ends: torch.Tensor  # (B,) bool: the answer follows them; otherwise the model thinks on from there

    def at(self, rows, device):
        return Given(self.z[rows].to(device), self.n[rows].to(device), self.ends[rows].to(device))


@dataclass
class Rollout:
    """B finished chains. Entries past a row's end are 0 (−1 for tokens)."""
    z: torch.Tensor          # (B, cK, D) the used latents, then the candidate dropped at a stop
    logvar: torch.Tensor     # (B, cK, D) or None without the VAE
    n_latent: torch.Tensor   # (B,) latents used
    stopped: torch.Tensor    # (B,) bool: ended by the stop head, so a dropped candidate stands at z[b, n_latent[b]]
    stop_prob: torch.Tensor  # (B, K) probability of stopping at each question asked, NaN where none was
    token: torch.Tensor      # (B, max_new) what was written, eos included
    n_token: torch.Tensor    # (B,)
    logp_z: torch.Tensor     # (B, cK) log-densities of the candidates, as proposed
    logp_stop: torch.Tensor  # (B, K) log-probabilities of the decisions taken
    logp_token: torch.Tensor  # (B, max_new)
    spread: float = 1.0       # as in the Noise that made it
    temperature: float = 1.0

    @staticmethod
    def empty(model, B, max_new, noise, device):
        """Of B chains that have not begun."""
        zeros = lambda *s: torch.zeros(B, *s, device=device)
        cK, D = model.c * model.K, model.policy.cfg.n_embd
        return Rollout(z=zeros(cK, D), logvar=zeros(cK, D) if model.vae else None, n_latent=zeros().long(), stopped=zeros().bool(),
                       stop_prob=zeros(model.K) + torch.nan, token=zeros(max_new).long() - 1, n_token=zeros().long(), logp_z=zeros(cK),
                       logp_stop=zeros(model.K), logp_token=zeros(max_new), spread=noise.spread if noise else 1.0,
                       temperature=noise.temperature if noise else 1.0)

    def take(self, rows):
        """The chains `rows` (a LongTensor) alone."""
        return replace(self, **{f.name: v[rows] for f in fields(self) if torch.is_tensor(v := getattr(self, f.name))})


THINKS, WRITES, DONE = range(3)


@torch.no_grad()
def rollout(model, prompt, valid, max_new, noise=None, group=1, given=None):
    """Think, stop and answer. prompt (Q, Tq) ids left-padded, valid (Q, Tq) bool; each is read once and continued `group` times,
    which gives B = Q·group rows, those of a prompt side by side.

    noise (Noise of B rows): what chance decides; None is the mean policy: z = μ, stop by argmax, greedy answer.
    given (Given of B rows): no stop is taken before or at these thoughts, whatever the stop head says of them.
    Every tick feeds one column to every unfinished row: a thought, <|end-latent|> or a word. A row is done at eos or after max_new
    words. Done rows leave the batch, at once or, where ticks are CUDA graphs, when they are half of it: early stops save real work.
    Returns a Rollout of B rows.
    """
    policy, c, K, device = model.policy, model.c, min(model.stage, model.K), prompt.device
    h, cache = read(policy, prompt, valid, c * K + 1 + max_new, group)
    B, D = h.shape
    out = Rollout.empty(model, B, max_new, noise, device)
    most = torch.full((B,), c * K, device=device) if given is None else torch.where(given.ends, given.n, c * K).clamp(max=c * K)
    eps = noise and ops.prepared(noise.eps, D)
    eos, end = torch.tensor(policy.cfg.eos, device=device), policy.embed(torch.tensor(model.end, device=device))
    rows = torch.arange(B, device=device)                       # the chain of each row of the batch
    fate, x = torch.zeros_like(rows), end.repeat(B, 1)          # what becomes of it: it THINKS, WRITES or is DONE; what it reads next

    def decide(h, t):
        """What every row makes of its hidden state, h (A, D), at tick t (a tensor, ()): `out`, `fate` and `x`, written in place."""
        thinks, writes = (fate == THINKS) & (t < most[rows]), fate == WRITES
        x.copy_(end)              # of a row that ends its thinking now, and writes next; the others' are put in their places below
        fate.clamp_(min=WRITES)
        if len(b := some(writes, cache.replays)):
            r, real = rows[b], writes[b]
            at = out.n_token[r].clamp(max=max_new - 1)
            token, logp = choose(policy.logits(h[b]), noise, r, at)
            put(out.token, (r, at), token, real)
            put(out.logp_token, (r, at), logp, real)
            out.n_token[r] += real
            put(x, b, policy.embed(token), real)
            put(fate, b, torch.where((token[:, None] == eos).any(1) | (at + 1 == max_new), DONE, WRITES), real)
        if len(b := some(thinks, cache.replays)):
            r, real, at = rows[b], thinks[b], t.clamp(max=c * K - 1).expand(len(b))
            thought = model.propose(h[b], noise and eps[r, at], spread=out.spread)
            z = thought.z if given is None else torch.where((t < given.n[r])[:, None], given.z[r, at], thought.z)
            put(out.z, (r, at), z, real)
            if model.vae:
                put(out.logvar, (r, at), thought.logvar, real)
                put(out.logp_z, (r, at), thought.logp, real)
            stop = torch.zeros_like(real)
            if model.stop:
                asked, logp = real & (t % c == 0), wide(model.stop_head(z)).log_softmax(-1)
                stop = logp[:, 1] > logp[:, 0] if noise is None else noise.stop[r, at // c] < logp[:, 1].exp()
                stop = stop & asked if given is None else stop & asked & (t >= given.n[r])
                put(out.stop_prob, (r, at // c), logp[:, 1].exp(), asked)
                put(out.logp_stop, (r, at // c), torch.where(stop, logp[:, 1], logp[:, 0]), asked)
                put(out.stopped, r, stop, real)
            out.n_latent[r] += real & ~stop
            put(x, b, z, real & ~stop)
            put(fate, b, torch.where(stop, WRITES, THINKS), real)

    tick = lambda t: decide(policy.step(x, fate < DONE, cache), t)
    done = Late(cache.replays)
    decide(h, torch.zeros_like(rows[0]))
    for t in range(1, c * K + max_new + 1):
        n_done = done(fate == DONE)
        if n_done == len(rows):
            break
        if (b := left(fate == DONE, n_done, cache.replays)) is not None:
            rows, fate, x, done = rows[b], fate[b], x[b], Late(cache.replays)
            cache.keep(b)
        cache.step(tick, torch.full_like(rows[0], t))
    longest = int(out.n_token.max())
    out.token, out.logp_token = out.token[:, :longest], out.logp_token[:, :longest]
    return out


def choose(logits, noise, rows, at):
    """Next tokens (A,) and their log-probabilities from logits (A, V): greedy, or by uniform number `at` (A,) of the chains `rows` (A,)."""
    logits = wide(logits)
    logp = (logits / noise.temperature if noise and noise.temperature != 1 else logits).log_softmax(-1)
    if noise is None or noise.token is None:
        token = logp.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1)
        token = torch.searchsorted(cdf, noise.token[rows, at][:, None] * cdf[:, -1:])[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(1, token[:, None])[:, 0]


class Score(NamedTuple):
    """Log-probabilities as Rollout has them, and the Gaussians that the thoughts came from."""
    logp_z: torch.Tensor      # (B, cK)
    logp_stop: torch.Tensor   # (B, K)
    logp_token: torch.Tensor  # (B, Tt)
    mu: torch.Tensor          # (B, cK, D) or, without the VAE, hidden states
    logvar: torch.Tensor      # (B, cK, D) or None without the VAE
    candidate: torch.Tensor   # (B, cK) bool: where a thought was proposed


def score(model, prompt, valid, r, group=1, eps=None):
    """Log-probability of everything in Rollout r, with gradients: its B = Q·group rows are of prompt (Q, Tq), valid (Q, Tq), which is read
    once for its group.

    eps None: z is given, so the chain need not be walked. All that followed the prompt is read at once, the dropped candidate
    scored from the hidden state before it and never fed.
    eps, the noise of the rollout: z is a function of the weights and that noise (the reparameterisation), so its
    density is not an action's; the chain is walked, and the stops and words send their gradient back through every latent.
    """
    policy, c = model.policy, model.c
    (B, L), Tt = r.z.shape[:2], r.token.shape[1]
    longest = 0 if eps is None else int(r.n_latent.max())  # asked for before a GPU has anything to do
    column = torch.arange(max(L, Tt), device=prompt.device)
    used, written = column[:L] < r.n_latent[:, None], column[:Tt] < r.n_token[:, None]
    candidate = used | ((column[:L] == r.n_latent[:, None]) & r.stopped[:, None])
    h_prompt, cache = read(policy, prompt, valid, L + Tt, group)
    tail = policy.embed(torch.cat((torch.full((B, 1), model.end, device=prompt.device), r.token[:, :-1].clamp(min=0)), 1))
    logp_z, logp_stop = r.logp_z.new_zeros(B, L), r.logp_stop.new_zeros(B, model.K)
    if eps is None:
        h = policy(torch.cat((r.z, tail), 1), torch.cat((used, written), 1), cache)
        after = h[:, L:]
        # column t's proposal comes from the column before it; unused columns in between hold nothing that is read
        thought = model.propose(torch.cat((h_prompt[:, None], h[:, : L - 1]), 1), z=r.z, spread=r.spread)
        if model.vae:
            logp_z = torch.where(candidate, thought.logp, 0.0)
    else:
        thought, _ = walk(model, h_prompt, cache, r.n_latent, longest, L, ops.prepared(eps, r.z.shape[-1]), spread=r.spread)
        after = policy(tail, written, cache)
    if model.stop:
        logp = wide(model.stop_head(thought.z[:, ::c])).log_softmax(-1)        # (B, K, 2)
        taken = torch.where(used[:, ::c], logp[..., 0], logp[..., 1])
        logp_stop = torch.where(candidate[:, ::c], taken, 0.0)
    logp_token = -policy.nll(after, r.token.masked_fill(~written, IGNORE), r.temperature)
    return Score(logp_z, logp_stop, logp_token, thought.mu, thought.logvar, candidate)
