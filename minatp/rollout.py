"""Generation: prompt → latents → answer, without gradients.

Evaluation, sample.py and RL's exploration all use it.

It knows nothing of text: prompts come in and chains go out as ids and latents (as_text and
read_chains in decoder.py put them into words).
"""

import math
from dataclasses import dataclass

import torch

from kernels import ops
from kernels.common import upcast
from kernels.graph import DelayedCount, rows_where, unfinished_rows

from .chain import read_prompt
from .data import Rows


@dataclass
class Noise(Rows):
    """All random numbers of B rollouts.

    They are drawn, or fixed by keys, before any batch is made, so that batching does not change
    the random draws of a problem.
    """

    # (B, cK, 2) the seed and offset of each latent's ε (kernels/vae.py)
    eps_keys: torch.Tensor
    # (B, K) uniform, for the decisions to stop
    u_stop: torch.Tensor
    # (B, max_new) uniform, for the words; None: they are greedy
    u_token: torch.Tensor
    # z ~ N(μ, (spread·σ)²)
    spread: float = 1.0
    # of the words
    temperature: float = 1.0

    @staticmethod
    def draw(model, B, max_new, seed, temperature=1.0, spread=None, greedy=False):
        """spread: defaults to the temperature. greedy: sample the latents, but not the words."""
        g = torch.Generator().manual_seed(seed)
        u_stop = torch.rand(B, model.K, generator=g)
        # u in (0, 1): with u = 0 a word of probability 0 would be written
        u_token = None if greedy else torch.rand(B, max_new, generator=g).clamp(min=2**-25)
        return Noise(
            eps_keys=ops.noise_keys(seed, B, model.c * model.K),
            u_stop=u_stop,
            u_token=u_token,
            spread=temperature if spread is None else spread,
            temperature=temperature,
        )


@dataclass
class Forced(Rows):
    """Latents that a rollout must take in place of its own first ones: for edits and probes."""

    # (B, cK, D)
    z: torch.Tensor
    # (B,) how many latents of z count, whole steps
    n: torch.Tensor
    # (B,) bool: the answer follows them; otherwise the model thinks on from there
    ends: torch.Tensor


@dataclass
class Rollout(Rows):
    """B finished chains. Entries past the end of a row are 0 (−1 in token, NaN in stop_prob)."""

    # (B, cK, D) the used latents, then the candidate dropped at a stop
    z: torch.Tensor
    # (B, cK, D), or None without the VAE
    logvar: torch.Tensor
    # (B,) latents used
    n_latent: torch.Tensor
    # (B,) bool: ended by the stop head; z[b, n_latent[b]] is the dropped candidate
    stopped: torch.Tensor
    # (B, K) probability of stopping at each step, NaN where the head was not asked
    stop_prob: torch.Tensor
    # (B, max_new) what was written, eos included
    token: torch.Tensor
    # (B,)
    n_token: torch.Tensor
    # The log-probabilities under which it was sampled, with which tests compare rl.log_probs.
    # (Training computes them again, with gradients, so that its first ratio is exactly 1.)
    # (B, cK) log-density of each candidate
    logp_z: torch.Tensor
    # (B, K) log-probability of each decision taken
    logp_stop: torch.Tensor
    # (B, max_new)
    logp_token: torch.Tensor
    # of the Noise that made it
    spread: float = 1.0
    temperature: float = 1.0

    @property
    def candidate(self):
        """(B, cK) bool: where a latent was proposed, those that were used and the dropped one."""
        column = torch.arange(self.z.shape[1], device=self.z.device)
        return column < (self.n_latent + self.stopped)[:, None]

    def clear_past_end(self):
        """Erase what was proposed and decided past the end of each row."""
        unproposed = ~self.candidate  # (B, cK)
        c = self.z.shape[1] // self.stop_prob.shape[1]
        undecided = unproposed[:, ::c]  # (B, K)
        self.z.masked_fill_(unproposed[..., None], 0)
        if self.logvar is not None:
            self.logvar.masked_fill_(unproposed[..., None], 0)
        self.logp_z.masked_fill_(unproposed, 0)
        self.stop_prob.masked_fill_(undecided, torch.nan)
        self.logp_stop.masked_fill_(undecided, 0)

    @staticmethod
    def empty(model, B, max_new, noise, device):
        """B chains that have not begun."""
        cK, K, D = model.c * model.K, model.K, model.policy.cfg.n_embd

        return Rollout(
            z=torch.zeros(B, cK, D, device=device),
            logvar=torch.zeros(B, cK, D, device=device) if model.vae else None,
            n_latent=torch.zeros(B, dtype=torch.long, device=device),
            stopped=torch.zeros(B, dtype=torch.bool, device=device),
            stop_prob=torch.full((B, K), torch.nan, device=device),
            token=torch.full((B, max_new), -1, device=device),
            n_token=torch.zeros(B, dtype=torch.long, device=device),
            logp_z=torch.zeros(B, cK, device=device),
            logp_stop=torch.zeros(B, K, device=device),
            logp_token=torch.zeros(B, max_new, device=device),
            spread=noise.spread if noise else 1.0,
            temperature=noise.temperature if noise else 1.0,
        )


@torch.no_grad()
def rollout(model, prompt, prompt_mask, max_new, noise=None, group=1, forced=None, steps=None):
    """Think, stop and answer -> a Rollout of B = Q·group rows.

    prompt (Q, Tq): ids padded on the left; prompt_mask (Q, Tq) bool. Each prompt is read once and
    continued `group` times, and the rows of one prompt stand side by side.
    noise: a Noise of B rows, or None for the mean policy: z = μ, stop by argmax, greedy answer.
    forced: a Forced of B rows, or None. No stop is taken before the end of the forced latents,
    whatever the stop head says.
    steps: every row thinks exactly so many steps, and the stop head is not asked; None: it is.
    Raises ValueError if the model has not learned so many steps.
    """
    policy = model.policy
    n_step = min(model.stage, model.K) if model.fillers is None else 0  # most steps of thought
    if steps is not None:
        if not 0 <= steps <= n_step:
            raise ValueError(f"steps must be 0 … {n_step}, not {steps}")
        n_step = steps
    given = [*model.fillers_at(model.stage), model.end]  # what it reads after its thoughts
    room = model.c * n_step + len(given) + max_new
    h, cache = read_prompt(policy, prompt, prompt_mask, room, group)
    out = Rollout.empty(model, len(h), max_new, noise, h.device)

    # 1. All rows think. One that stops waits for the others
    think(model, h, cache, n_step, out, noise, forced, may_stop=steps is None)

    # 2. All rows read <|end-latent|>, after the fillers of a method that has them, and write
    given = torch.tensor(given, device=h.device).expand(len(h), -1)
    h = policy(policy.embed(given), torch.ones_like(given, dtype=torch.bool), cache)[:, -1]
    token, logp_token = write(policy, h, cache, max_new, policy.cfg.eos, noise)
    out.n_token = (token >= 0).sum(1)

    # Trim to the longest answer
    longest = int(out.n_token.max())
    out.token, out.logp_token = token[:, :longest], logp_token[:, :longest]
    return out


# On a CPU the two loops compute only the rows that are still active, so an early stop saves work.
# There, cache.repeat(f, x) is f(x), rows_where(mask) is mask.nonzero()[:, 0], count_done(mask) is
# int(mask.sum()), and unfinished_rows gives the rows to keep (None: all of them).
#
# On a GPU a step is a CUDA graph, recorded once and replayed on the same memory (kernels/graph.py).
# So what outlives a step is written in place, steps are counted on the device, and shapes are
# fixed: all rows are computed, and a mask says whose results count.


def think(model, h, cache, n_step, out, noise=None, forced=None, may_stop=True):
    """Think at most n_step steps after hidden states h (B, D), which are overwritten.

    may_stop: whether the stop head is asked; if it is not, every row thinks all its steps.
    `out`, a Rollout of B rows, receives the latents, their densities, and the stops.
    """
    policy, c = model.policy, model.c
    B, D = h.shape
    eps = ops.prepare_noise(noise.eps_keys if noise else None, D)  # ε; on a GPU still its keys
    fixed_shape = cache.fixed_shape

    # How many latents each row may have, and which rows still think
    limit = torch.full((B,), c * n_step, device=h.device)
    if forced is not None:
        limit = torch.where(forced.ends, forced.n, limit).clamp(max=c * n_step)
    thinks = limit > 0

    def think_step(s):
        """Step s, a tensor (), of every row that still thinks: c latents, or a stop."""
        b = rows_where(thinks, fixed_shape)
        step = s.expand_as(b)  # the host would have to read an index of shape ()
        for j in range(c):
            # Propose z ~ N(μ, σ²), or take the forced latent
            t = c * step + j
            eps_t = None if eps is None else eps[b, t]
            latent = model.propose(h[b], eps_t, spread=out.spread)
            z = latent.z
            if forced is not None:
                is_forced = t < forced.n[b]
                z = torch.where(is_forced[:, None], forced.z[b, t], z)
            out.z[b, t] = z
            if model.vae:
                out.logvar[b, t] = latent.logvar
                out.logp_z[b, t] = latent.logp

            # At the first latent of a step the stop head reads the candidate: a stop drops it
            if j == 0 and model.stop and may_stop:
                stop, logp = decide_stop(model, z, noise.u_stop[b, step] if noise else None)
                if forced is not None:
                    stop = stop & ~is_forced
                out.stop_prob[b, step] = logp[:, 1].exp()
                out.logp_stop[b, step] = torch.where(stop, logp[:, 1], logp[:, 0])
                thinks[b] = thinks[b] & ~stop

                # Only the others continue
                others = rows_where(~stop, fixed_shape)
                b, step, z = b[others], step[others], z[others]
                if not len(b):
                    return

            # Feed z_t to π, whose hidden state proposes the next latent
            cache.rows = b if len(b) < B else slice(None)
            h[b] = policy.step(z, thinks[b], cache)
            out.n_latent += thinks
        thinks.logical_and_(out.n_latent < limit)

    # With CUDA graphs the host checks only about every 4 latents whether all rows are done
    count_done = DelayedCount(fixed_shape, every=math.ceil(4 / c))
    for s in range(n_step):
        if count_done(~thinks) == B:
            break
        cache.repeat(think_step, torch.full((), s, device=h.device))
    cache.rows = slice(None)

    out.stopped = out.n_latent < limit

    # With fixed shapes, ended rows were computed as well
    out.clear_past_end()


def decide_stop(model, z, u=None):
    """Whether the stop head stops at candidates z (rows, D): (rows,) bool, and log p (rows, 2).

    The columns of log p are "continue" and "stop". u (rows,): uniform numbers to sample with;
    None: the likelier of the two.
    """
    logp = upcast(model.stop_head(z)).log_softmax(-1)
    if u is None:
        return logp[:, 1] > logp[:, 0], logp
    return u < logp[:, 1].exp(), logp


@torch.no_grad()
def write(llama, h, cache, max_new, eos, noise=None):
    """Write after hidden states h (B, D), each row up to one of the ids `eos`, at most max_new ids.

    noise: a Noise of B rows; None: greedy. Returns the ids (B, max_new), −1 past the end of a row,
    and their log-probabilities (B, max_new). Both the policy and φ write with it.
    """
    B = len(h)
    is_sampled = noise is not None and noise.u_token is not None
    temperature = noise.temperature if noise else 1.0
    eos = torch.tensor(eos, device=h.device)
    token = torch.full((B, max_new), -1, device=h.device)
    logp_token = torch.zeros(B, max_new, device=h.device)

    # The rows that are still in the batch: which each is, whether it writes, its last word
    rows = torch.arange(B, device=h.device)
    writes = torch.ones(B, dtype=torch.bool, device=h.device)
    word = torch.zeros_like(rows)

    def next_word(n):
        """Read the last word of every row, and write the n-th."""
        write_word(n, llama.step(llama.embed(word), writes, cache))

    def write_word(n, h):
        """Write the n-th word of every row, n a tensor (), after hidden states h (rows, D)."""
        column = n.expand_as(rows)

        # The word at which the cumulative softmax(logits/temperature) reaches u, or the likeliest
        u = noise.u_token[rows, column] if is_sampled else None
        chosen, logp = ops.sample(llama.logits(h), u, temperature)
        token[rows, column] = torch.where(writes, chosen, -1)
        logp_token[rows, column] = torch.where(writes, logp, 0.0)
        word.copy_(chosen)
        writes.logical_and_((chosen[:, None] != eos).all(1))

    # Rows that have ended leave the batch: at once or, in CUDA graphs, when they are half of it
    fixed_shape = cache.fixed_shape
    count_done = DelayedCount(fixed_shape)
    write_word(torch.zeros_like(rows[0]), h)
    for n in range(1, max_new):
        n_done = count_done(~writes)
        if n_done == len(rows):
            break
        keep = unfinished_rows(~writes, n_done, fixed_shape)
        if keep is not None:
            rows, writes, word = rows[keep], writes[keep], word[keep]
            cache.keep(keep)
            count_done = DelayedCount(fixed_shape)
        cache.repeat(next_word, torch.full_like(rows[0], n))
    return token, logp_token
