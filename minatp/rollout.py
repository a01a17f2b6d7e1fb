"""Generation: prompt → latents → answer, without gradients.

Evaluation, sample.py and RL's exploration all use it.

It knows nothing of text: prompts come in and chains go out as ids and latents (decoder.as_text puts
them into words).
"""

from dataclasses import dataclass, fields, replace

import torch

from kernels import ops
from kernels.common import upcast
from kernels.graph import DelayedCount, rows_where, unfinished_rows, write_where

from .chain import read_prompt


@dataclass
class Noise:
    """All random numbers of B rollouts.

    They are drawn before any batch is made, so that batching does not change a problem's luck.
    """

    # (B, cK, 2) the seed and offset of each latent's ε (kernels/vae.py)
    eps_keys: torch.Tensor
    # (B, K) uniform
    stop: torch.Tensor
    # (B, max_new) uniform; None: the words are greedy
    token: torch.Tensor
    # z ~ N(μ, (spread·σ)²)
    spread: float = 1.0
    # of the words
    temperature: float = 1.0

    @staticmethod
    def draw(model, B, max_new, seed, temperature=1.0, spread=None, greedy=False):
        """spread: defaults to the temperature. greedy: sample the latents, but not the words."""
        g = torch.Generator().manual_seed(seed)
        return Noise(
            eps_keys=ops.noise_keys(seed, B, model.c * model.K),
            stop=torch.rand(B, model.K, generator=g),
            token=None if greedy else torch.rand(B, max_new, generator=g),
            spread=temperature if spread is None else spread,
            temperature=temperature,
        )

    def at(self, rows, device):
        """The noise of some rows, on a device."""
        token = None if self.token is None else self.token[rows].to(device)
        return replace(
            self,
            eps_keys=self.eps_keys[rows].to(device),
            stop=self.stop[rows].to(device),
            token=token,
        )


@dataclass
class Forced:
    """Latents that a rollout must take in place of its own first ones: for edits and probes."""

    # (B, cK, D)
    z: torch.Tensor
    # (B,) how many latents of z count, whole steps
    n: torch.Tensor
    # (B,) bool: the answer follows them; otherwise the model thinks on from there
    ends: torch.Tensor

    def at(self, rows, device):
        """Those of some rows, on a device."""
        return Forced(self.z[rows].to(device), self.n[rows].to(device), self.ends[rows].to(device))


@dataclass
class Rollout:
    """B finished chains. Entries past the end of a row are 0, of token −1, of stop_prob NaN."""

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
    # (B, cK) log-density of each candidate, when proposed. (Training computes these three again,
    # with gradients: rl.log_probs)
    logp_z: torch.Tensor
    # (B, K) log-probability of each decision taken
    logp_stop: torch.Tensor
    # (B, max_new)
    logp_token: torch.Tensor
    # of the Noise that made it
    spread: float = 1.0
    temperature: float = 1.0

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

    def select(self, rows):
        """The chains `rows` (a LongTensor) alone."""
        selected = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if torch.is_tensor(value):
                selected[f.name] = value[rows]
        return replace(self, **selected)


THINKS, WRITES, DONE = range(3)


@torch.no_grad()
def rollout(model, prompt, prompt_mask, max_new, noise=None, group=1, forced=None, steps=None):
    """Think, stop and answer.

    prompt (Q, Tq): ids padded on the left; prompt_mask (Q, Tq) bool. Each prompt is read once and
    continued `group` times: B = Q·group rows, those of one prompt side by side.
    noise: a Noise of B rows, or None for the mean policy: z = μ, stop by argmax, greedy answer.
    forced: a Forced of B rows, or None. No stop is taken before the end of the forced latents,
    whatever the stop head says.
    steps: every row thinks exactly so many steps, and the stop head is not asked; None: it is.
    Returns a Rollout of B rows. Raises ValueError if the model has not learned so many steps.

    At every tick each unfinished row reads one position x, and its hidden state h decides:

        THINKS    propose z from h. At the first latent of a step the stop head may drop it:
                      then x ← <|end-latent|>, and the row WRITES from the next tick on;
                  otherwise x ← z, unless the row has all its latents: x ← <|end-latent|>, WRITES
        WRITES    choose the next word from h; x ← the word. At eos or after max_new words: DONE
    """
    policy, c, device = model.policy, model.c, prompt.device
    most_steps = min(model.stage, model.K)
    if steps is not None:
        if not 0 <= steps <= most_steps:
            raise ValueError(f"steps must be 0 … {most_steps}, not {steps}")
        most_steps = steps
    most = c * most_steps  # latents of a row
    eos = torch.tensor(policy.cfg.eos, device=device)
    end_latent = policy.embed(torch.tensor(model.end, device=device))  # (D,)

    # Read the prompts, and make room for what each of the B chains will be
    h, cache = read_prompt(policy, prompt, prompt_mask, most + 1 + max_new, group)
    B, D = h.shape
    out = Rollout.empty(model, B, max_new, noise, device)
    eps = noise and ops.prepare_noise(noise.eps_keys, D)  # ε; on a GPU still its keys

    # How many latents each row may have
    limit = torch.full((B,), most, device=device)
    if forced is not None:
        limit = torch.where(forced.ends, forced.n, most).clamp(max=most)

    # On a CPU, rows_where gives the rows that are due, and write_where(a, i, v, due) is a[i] = v.
    # In a CUDA graph shapes are fixed: rows_where gives all rows, write_where stores what is due
    fixed_shape = cache.replays_steps

    # The state of the batch. It is written in place, and ticks are counted on the device, because
    # a CUDA graph replays a tick on the same memory
    rows = torch.arange(B, device=device)  # which of the B chains each row is
    doing = torch.zeros_like(rows)  # THINKS, WRITES or DONE
    x = end_latent.repeat(B, 1)  # (rows, D) what each row reads next

    def write_words(h, writes):
        """Where writes (rows,): choose the next word from hidden states h (rows, D)."""
        b = rows_where(writes, fixed_shape)
        if not len(b):
            return
        row, due = rows[b], writes[b]

        # The n-th word of each chain, greedy or sampled
        n = out.n_token[row].clamp(max=max_new - 1)
        token, logp = choose_token(policy.logits(h[b]), noise, row, n)
        write_where(out.token, (row, n), token, due)
        write_where(out.logp_token, (row, n), logp, due)
        out.n_token[row] += due

        # It is read next, unless it ends the answer
        write_where(x, b, policy.embed(token), due)
        ended = (token[:, None] == eos).any(1) | (n + 1 == max_new)
        write_where(doing, b, torch.where(ended, DONE, WRITES), due)

    def think(h, t, thinks):
        """Where thinks (rows,): propose latent t from h (rows, D), and stop there or keep it."""
        b = rows_where(thinks, fixed_shape)
        if not len(b):
            return
        row, due = rows[b], thinks[b]
        column = t.clamp(max=most - 1).expand(len(b))

        # Propose z ~ N(μ, σ²), or take the forced latent
        latent = model.propose(h[b], noise and eps[row, column], spread=out.spread)
        z = latent.z
        if forced is not None:
            is_forced = t < forced.n[row]
            z = torch.where(is_forced[:, None], forced.z[row, column], z)
        write_where(out.z, (row, column), z, due)
        if model.vae:
            write_where(out.logvar, (row, column), latent.logvar, due)
            write_where(out.logp_z, (row, column), latent.logp, due)

        # At the first latent of a step the stop head reads the candidate: stop drops it
        stop = torch.zeros_like(due)
        if model.stop and steps is None:
            asked = due & (t % c == 0)
            logp = upcast(model.stop_head(z)).log_softmax(-1)  # (rows, 2): continue, stop
            if noise is None:
                stop = logp[:, 1] > logp[:, 0]
            else:
                stop = noise.stop[row, column // c] < logp[:, 1].exp()
            stop = stop & asked
            if forced is not None:
                stop = stop & ~is_forced
            step = row, column // c
            write_where(out.stop_prob, step, logp[:, 1].exp(), asked)
            write_where(out.logp_stop, step, torch.where(stop, logp[:, 1], logp[:, 0]), asked)
            write_where(out.stopped, row, stop, due)

        # A latent that is kept is read next; after a stop it is <|end-latent|>
        out.n_latent[row] += due & ~stop
        write_where(x, b, z, due & ~stop)
        write_where(doing, b, torch.where(stop, WRITES, THINKS), due)

    def tick(t, h=None):
        """Read one position of every row (or take h (rows, D) as read) and decide what comes next.

        t: a tensor, ().
        """
        if h is None:
            h = policy.step(x, doing < DONE, cache)
        # Who does what at this tick: decided before the state below is overwritten
        thinks = (doing == THINKS) & (t < limit[rows])
        writes = doing == WRITES

        # A row that has had all its latents reads <|end-latent|>, then writes. So would any other,
        # but write_words and think overwrite it below
        x.copy_(end_latent)
        doing.clamp_(min=WRITES)
        write_words(h, writes)
        think(h, t, thinks)

    # The first tick has read the prompt already. Done rows leave the batch, at once or, in CUDA
    # graphs, when they are half of it: an early stop saves real work
    count_done = DelayedCount(fixed_shape)
    tick(torch.zeros_like(rows[0]), h)
    for t in range(1, most + max_new + 1):
        n_done = count_done(doing == DONE)
        if n_done == len(rows):
            break
        keep = unfinished_rows(doing == DONE, n_done, fixed_shape)
        if keep is not None:
            rows, doing, x = rows[keep], doing[keep], x[keep]
            cache.keep(keep)
            count_done = DelayedCount(fixed_shape)
        cache.step(tick, torch.full_like(rows[0], t))

    # Trim to the longest answer
    longest = int(out.n_token.max())
    out.token, out.logp_token = out.token[:, :longest], out.logp_token[:, :longest]
    return out


def choose_token(logits, noise, row, n):
    """The n-th words (rows,) of some rows and their log-probabilities, from logits (rows, V).

    Greedy, or by inverting the cumulative distribution at the uniform number drawn for that word.
    """
    logits = upcast(logits)
    if noise and noise.temperature != 1:
        logits = logits / noise.temperature
    logp = logits.log_softmax(-1)
    if noise is None or noise.token is None:
        token = logp.argmax(-1)
    else:
        cdf = logp.exp().cumsum(-1)
        u = noise.token[row, n][:, None] * cdf[:, -1:]
        token = torch.searchsorted(cdf, u)[:, 0].clamp(max=logits.shape[-1] - 1)
    return token, logp.gather(1, token[:, None])[:, 0]
