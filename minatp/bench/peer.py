"""The same model as others drive it: Hugging Face's LlamaForCausalLM under minatp's heads.

For the benchmark and its tests alone. Two ways to drive it:

Reference  as the authors' code does (zz1358m/ATP-Latent-master, methods/). Every row takes every
           latent of the stage. At each latent the embeddings are taken apart and stacked again,
           and the cache is cut and rebuilt. Each word reads everything before it again. Every
           position has float32 logits. Each thought of a chain is a decoder call of its own, and
           each rollout reads its own prompt.
Tuned      as a careful user of transformers would: one cache, SDPA, one decoder call, logits only
           where they are used, all rows in one batch.

Both compute what docs/method.md says, with the very parameters of minatp's model. They are given
all random numbers, so that losses, gradients and answers can be compared with minatp's own.

In shapes, Tq is the length of the prompts, n the latents of the curriculum stage, Tt the length of
the text or the answer, and T = Tq + n + Tt.
"""

from typing import NamedTuple

import torch

from kernels.common import upcast
from kernels.cross_entropy import IGNORE, token_nll
from kernels.sampling import sample
from kernels.vae import draw_noise, gaussian_log_prob, kl_normal

from ..rollout import Rollout
from ..run.errors import UserError
from ..run.huggingface import hf_config

# Nothing else needs transformers, so this module can be imported without it
try:
    import transformers
    from transformers import DynamicCache, LlamaForCausalLM, StaticCache
except ImportError:
    transformers = None
    DynamicCache = StaticCache = object


def need_transformers():
    """Raise UserError if transformers, which is needed here and nowhere else, is not installed."""
    if transformers is None:
        raise UserError(
            "minatp/bench/peer.py:0: the benchmark compares with transformers, which is not "
            "installed; pip install transformers"
        )


def as_hugging_face(llama):
    """A Llama as a LlamaForCausalLM with SDPA.

    They share their parameters: a second 1B model would not fit beside the first.
    """
    # transformers' own generation is never used, so the model need not know where sequences end
    settings = {**hf_config(llama.cfg), "bos_token_id": None, "eos_token_id": None}
    config = transformers.LlamaConfig(**settings, attn_implementation="sdpa")

    # the model's own parameters, which load_state_dict replaces, are never used
    with torch.device(llama.freq.device):
        model = LlamaForCausalLM(config)

    # A tied Llama has no output matrix of its own; LlamaForCausalLM wants it by name all the same
    weights = dict(llama.named_parameters())
    if llama.cfg.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    # assign: the parameters themselves, where the default would copy their values
    model.load_state_dict(weights, assign=True)
    return model


def position_ids(mask):
    """Positions (B, T) that count the real columns of mask (B, T)."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def repeat_prompts(prompt, prompt_mask, group):
    """Prompts once for each of their `group` rollouts."""
    return prompt.repeat_interleave(group, 0), prompt_mask.repeat_interleave(group, 0)


def as_rollout(z, n_latent, stopped, token):
    """A Rollout with only its latents, how many of them are used, and its words.

    z (B, n, D), n_latent (B,), stopped (B,) bool, token (B, Tt) with −1 after the end of a row.
    """
    # Comparisons take log-probabilities from log_probs, so those of a rollout stay empty
    used = torch.arange(z.shape[1], device=z.device) < n_latent[:, None]
    empty = z.new_zeros(len(z), 0)
    return Rollout(
        z=z * used[..., None],
        logvar=None,
        n_latent=n_latent,
        stopped=stopped,
        stop_prob=empty,
        token=token,
        n_token=(token >= 0).sum(1),
        logp_z=empty,
        logp_stop=empty,
        logp_token=empty,
    )


class Columns(NamedTuple):
    """Prompts, room for latents, and a text, side by side."""

    ids: torch.Tensor  # (B, T); those of latents are arbitrary
    mask: torch.Tensor  # (B, T) bool
    n_prompt: int


class ThinkResult(NamedTuple):
    """What `Reference.think` makes of Columns."""

    x: torch.Tensor  # (B, T, D) input embeddings, the latents in their places
    mask: torch.Tensor  # (B, T) bool
    cache: object  # a DynamicCache of all columns before the last latent; None without latents
    logits: list  # float32, of the columns that were read, in pieces
    mu: torch.Tensor  # (B, n, D); None without latents
    logvar: torch.Tensor  # (B, n, D); None without latents


class Scored(NamedTuple):
    """Finished rollouts as one sequence of columns, to be read in one pass."""

    x: torch.Tensor  # (B, T, D) prompt, latents, <|end-latent|> and all words but the last
    mask: torch.Tensor  # (B, T) bool
    used: torch.Tensor  # (B, n) bool: latents that the chain uses
    written: torch.Tensor  # (B, Tt) bool: words of the chain
    candidate: torch.Tensor  # (B, n) bool: used, or dropped at a stop


class Reference:
    """The model as the authors' code drives it.

    model: the ATP whose weights and curriculum stage it uses. Its methods return what minatp's
    sft_losses, think, rollout, log_probs and read_thoughts return.
    """

    def __init__(self, model):
        need_transformers()
        self.model = model
        self.c, self.end = model.c, model.end
        self.D = model.policy.cfg.n_embd
        self.stop_head = model.stop_head
        self.policy = as_hugging_face(model.policy)
        self.decoder = as_hugging_face(model.decoder)

    @property
    def n_latent(self):
        """Latents of the curriculum stage."""
        return self.c * min(self.model.stage, self.model.K)

    def propose(self, h, eps=None):
        """z, μ and log σ² (..., D) after h (..., D), in plain PyTorch. eps None: z = μ."""
        mu, logvar = self.model.latent_head(h)
        z = mu if eps is None else mu + torch.exp(0.5 * logvar) * eps
        return z, mu, logvar

    def embed(self, ids):
        return self.policy.get_input_embeddings()(ids)

    def decoder_embed(self, ids):
        return self.decoder.get_input_embeddings()(ids)

    # ---- stage 1 ----

    def losses(self, batch, eps):
        """{"enc", "dec", "stop", "kl"}, each summed over a Batch without answer-only rows.

        eps (B, ≥ n, D).
        """
        n, Tq = self.n_latent, batch.prompt.shape[1]
        t = torch.arange(n, device=eps.device)
        used = t < batch.thinking.n_latent[:, None]

        # Think, then read the text; logits of all columns, although only the text is labelled
        thought = self.think(self.columns(batch), eps)
        x = thought.x

        # `think` proposes the last latent and does not read it; in stage 0 it reads nothing at all
        unread = slice(Tq + n - 1 if n else 0, x.shape[1])
        text_logits = self.read(x, thought.mask, unread, thought.cache).logits.float()
        logits = torch.cat((*thought.logits, text_logits), 1)
        unlabelled = batch.text.target.new_full((len(batch.text.target), Tq + n), IGNORE)
        target = torch.cat((unlabelled, batch.text.target), 1)
        losses = {"enc": token_nll(logits, target).sum()}
        if not n:
            return losses

        # The stop head decides at the first latent of a step: to continue, or to drop it
        z = x[:, Tq : Tq + n]  # (B, n, D)
        dropped = (t == batch.thinking.n_latent[:, None]) & batch.thinking.has_stop[:, None]
        is_decision = (used | dropped) & (t % self.c == 0)
        losses["kl"] = kl_normal(thought.mu, thought.logvar)[used].sum()
        losses["stop"] = token_nll(self.stop_head(z), dropped.long())[is_decision].sum()

        # The decoder is called for every step
        losses["dec"] = sum(self.step_nll(z, batch, s) for s in range(n // self.c))
        return losses

    def columns(self, batch):
        """A Batch as Columns."""
        shape = len(batch.prompt), self.n_latent
        room = torch.full(shape, self.end, device=batch.prompt.device)
        used = torch.arange(self.n_latent, device=room.device) < batch.thinking.n_latent[:, None]
        ids = torch.cat((batch.prompt, room, batch.text.ids), 1)
        mask = torch.cat((batch.prompt_mask, used, batch.text.mask), 1)
        return Columns(ids, mask, batch.prompt.shape[1])

    def thoughts(self, batch, eps):
        """The prompt and the chain of latents alone: z (B, n, D)."""
        Tq = batch.prompt.shape[1]
        thought = self.think(self.columns(batch), eps)
        return thought.x[:, Tq : Tq + self.n_latent]

    def think(self, columns, eps, decide=None):
        """Read Columns up to their last latent, one latent after another -> ThinkResult.

        decide(z, t): which rows (B,) stop at latent t, for rollouts; None: the mask tells.
        """
        n, Tq = self.n_latent, columns.n_prompt
        x, mask = self.embed(columns.ids), columns.mask.clone()
        cache, logits, mus, logvars = None, [], [], []

        # What has to be read before latent t: for the first the prompt, then latent t − 1
        unread = slice(0, Tq)
        for t in range(n):
            # The hidden state of the last column before the latent
            out = self.read(x, mask, unread, cache)
            logits.append(out.logits.float())
            cache = out.past_key_values
            h = out.hidden_states[-1][:, -1]

            # Take the embeddings apart, put each row's latent in its place, and stack them again
            column = Tq + t
            B, T = x.shape[:2]
            rows = [[x[b, i] for i in range(T)] for b in range(B)]
            for b in range(B):
                z, mu, logvar = self.propose(h[b], None if eps is None else eps[b, t])
                rows[b][column] = z
                mus.append(mu)
                logvars.append(logvar)
            x = torch.stack([torch.stack(row) for row in rows])

            # A row that stops at a step drops its latent and all later ones
            if decide and t % self.c == 0:
                mask[decide(x[:, column], t), column : Tq + n] = False
            unread = slice(column, column + 1)

        # μ and log σ² were appended for every row of every latent: n·B of (D,) -> (B, n, D)
        def by_row(values):
            if not n:
                return None
            return torch.stack(values).unflatten(0, (n, -1)).transpose(0, 1)

        return ThinkResult(x, mask, cache, logits, by_row(mus), by_row(logvars))

    def read(self, x, mask, unread, cache):
        """The policy's output for the columns `unread` (a slice) of x (B, T, D).

        The cache holds columns before them; it is cut to their start and built anew.
        """
        start, end = unread.start, unread.stop
        if cache is not None:
            # Nothing lies after `start` here: the cut is made because the authors' code makes it
            layers = [(kv.keys[:, :, :start], kv.values[:, :, :start]) for kv in cache.layers]
            cache = DynamicCache(layers)
        return self.policy(
            inputs_embeds=x[:, unread],
            attention_mask=mask[:, :end].long(),
            position_ids=position_ids(mask)[:, unread],
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )

    def step_nll(self, z, batch, s):
        """The decoder's loss of step s of every problem that has one, in a call of its own.

        z (B, n, D): all latents.
        """
        # Problems with fewer latent steps have no text for this one
        rows = (batch.steps.index == s).nonzero()[:, 0]
        if not len(rows):
            return 0.0
        text, problems = batch.steps.target[rows], batch.steps.row[rows]
        z = z[:, s * self.c : (s + 1) * self.c]  # (B, c, D)

        # The decoder reads the step's latents and its text up to the last id
        x = []
        for b, ids in zip(problems.tolist(), text):
            x.append(torch.cat((z[b], self.decoder_embed(ids[:-1].clamp(min=0)))))
        mask = torch.cat((text.new_ones(len(text), self.c), (text[:, :-1] != IGNORE).long()), 1)
        # The hidden state after the last latent predicts the first id
        out = self.decoder(
            inputs_embeds=torch.stack(x), attention_mask=mask, position_ids=position_ids(mask)
        )
        logits = out.logits.float()
        return token_nll(logits[:, self.c - 1 :], text).sum()

    # ---- generation ----

    @torch.no_grad()
    def rollout(self, prompt, prompt_mask, max_new, noise=None, group=1):
        """As minatp.rollout.rollout, but without what RL records beside latents and words."""
        prompt, prompt_mask = repeat_prompts(prompt, prompt_mask, group)
        (B, Tq), n, device = prompt.shape, self.n_latent, prompt.device

        # Think. Every row takes all n latents; those after its stop are masked
        def decide(z, t):
            return self.stops(z, t, noise)

        # The columns of the latents count as real until a row stops; <|end-latent|> always is
        room = torch.full((B, n + 1), self.end, device=device)  # latents and <|end-latent|>
        ids = torch.cat((prompt, room), 1)
        mask = torch.cat((prompt_mask, torch.ones_like(room, dtype=torch.bool)), 1)

        # z ~ N(μ, (spread·σ)²): the noise is widened in place of σ
        eps = None if noise is None else noise.spread * draw_noise(noise.eps_keys, self.D)
        thought = self.think(Columns(ids, mask, Tq), eps, decide)

        # A row's latents are those whose columns are still real
        x, mask = thought.x, thought.mask
        z = x[:, Tq : Tq + n]
        n_latent = mask[:, Tq : Tq + n].sum(1)

        # Write. Each word reads everything again, and has logits of everything, for the last one
        writing = torch.ones(B, dtype=torch.bool, device=device)
        words = []
        for i in range(max_new):
            out = self.policy(
                inputs_embeds=x,
                attention_mask=mask.long(),
                position_ids=position_ids(mask),
                use_cache=False,
            )
            logits = out.logits.float()
            token = self.choose(logits[:, -1], noise, i)
            words.append(token.masked_fill(~writing, -1))

            # Rows that have ended stay in the batch until all have
            writing = writing & ~self.ends(token)
            if not writing.any():
                break
            x = torch.cat((x, self.embed(token)[:, None]), 1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)

        # Only the stop head ends the thinking before n latents
        return as_rollout(z, n_latent, n_latent < n, torch.stack(words, 1))

    def choose(self, logits, noise, i):
        """The i-th word of every row, greedy or drawn, from logits (B, V)."""
        if noise is None or noise.u_token is None:
            return sample(logits)[0]
        return sample(logits, noise.u_token[:, i], noise.temperature)[0]

    def stops(self, z, t, noise):
        """Whether each row (B,) stops at latent t, its candidate being z (B, D)."""
        logp = upcast(self.stop_head(z)).log_softmax(-1)  # (B, 2): continue, stop
        if noise is None:
            return logp[:, 1] > logp[:, 0]
        return noise.u_stop[:, t // self.c] < logp[:, 1].exp()

    def ends(self, token):
        """Which of the words token (B,) end an answer."""
        return torch.isin(token, torch.tensor(self.model.policy.cfg.eos, device=token.device))

    @torch.no_grad()
    def read_thoughts(self, z, eos, max_new):
        """As decoder.read_thoughts: z (N, c, D) -> N lists of ids.

        Each word reads the thought and the words before it again.
        """
        texts = [[] for _ in z]
        rows, x = torch.arange(len(z), device=z.device), z
        for _ in range(max_new if len(z) else 0):
            token = self.decoder(inputs_embeds=x).logits.float()[:, -1].argmax(-1)
            for row, word in zip(rows.tolist(), token.tolist()):
                if word != eos:
                    texts[row].append(word)
            # Thoughts that have ended leave the batch
            writing = token != eos
            if not writing.any():
                break
            x = torch.cat((x[writing], self.decoder_embed(token[writing])[:, None]), 1)
            rows = rows[writing]
        return texts

    # ---- stage 2 ----

    def log_probs(self, prompt, prompt_mask, chains, group=1):
        """As rl.log_probs: those of latents (B, n), stops (B, K) and words (B, Tt) of a Rollout.

        Each chain reads its own prompt. The chains are taken to have spread 1 and temperature 1, as
        all chains of the benchmark have.
        """
        # One pass over prompt, latents and words, with logits of all columns
        scored = self.scored(*repeat_prompts(prompt, prompt_mask, group), chains)
        out = self.policy(
            inputs_embeds=scored.x,
            attention_mask=scored.mask.long(),
            position_ids=position_ids(scored.mask),
            output_hidden_states=True,
        )
        # A latent was proposed from the column before it; so was a word
        Tq, n = prompt.shape[1], chains.z.shape[1]
        h = out.hidden_states[-1][:, Tq - 1 : Tq + n - 1]
        logp_z, logp_stop = self.latent_log_probs(h, chains, scored)
        logp = out.logits.float()[:, Tq + n :].log_softmax(-1)
        logp_token = logp.gather(-1, chains.token.clamp(min=0)[..., None])[..., 0]
        return logp_z, logp_stop, logp_token * scored.written

    def scored(self, prompt, prompt_mask, chains):
        """The columns of a Rollout `chains`, each row with its own prompt -> Scored."""
        # Which columns hold a used latent, a word, a candidate dropped at a stop
        n, Tt = chains.z.shape[1], chains.token.shape[1]
        column = torch.arange(max(n, Tt), device=prompt.device)
        used = column[:n] < chains.n_latent[:, None]
        written = column[:Tt] < chains.n_token[:, None]
        dropped = (column[:n] == chains.n_latent[:, None]) & chains.stopped[:, None]

        # After its latents a chain read <|end-latent|> and all words but the last
        end_latent = torch.full_like(chains.token[:, :1], self.end)
        text = torch.cat((end_latent, chains.token[:, :-1].clamp(min=0)), 1)
        x = torch.cat((self.embed(prompt), chains.z, self.embed(text)), 1)
        mask = torch.cat((prompt_mask, used, written), 1)
        return Scored(x, mask, used, written, used | dropped)

    def latent_log_probs(self, h, chains, scored):
        """Log-probabilities of latents (B, n), drawn with spread 1, and stops (B, K).

        h (B, n, D): the hidden state before each latent.
        """
        _, mu, logvar = self.propose(h, None)

        # The decision at the first latent of each step: continue if the chain uses it, else stop
        logp = upcast(self.stop_head(chains.z[:, :: self.c])).log_softmax(-1)  # (B, K, 2)
        decision = torch.where(scored.used[:, :: self.c], logp[..., 0], logp[..., 1])
        logp_z = gaussian_log_prob(chains.z, mu, logvar) * scored.candidate
        return logp_z, decision * scored.candidate[:, :: self.c]


class OneDtype:
    """A cache with keys of the values' dtype.

    Under autocast RoPE leaves the keys in float32. A StaticCache takes its dtype from them, and
    refuses the values; a DynamicCache would keep twice the bytes and cast them at every word.
    """

    def update(self, key_states, value_states, *args, **kwargs):
        return super().update(key_states.to(value_states.dtype), value_states, *args, **kwargs)


class GrowingCache(OneDtype, DynamicCache):
    pass


class FixedCache(OneDtype, StaticCache):
    pass


class Tuned(Reference):
    """The same model, driven as well as plain transformers allows."""

    def __init__(self, model, static=False):
        """static: generate into a FixedCache, not into a cache that grows."""
        super().__init__(model)
        self.static = static

    def hidden(self, llama, x, mask, cache=None):
        """Last hidden states of the new columns x (B, T_new, D); no logits.

        mask (B, T): of the cached columns and the new ones.
        """
        out = llama.model(
            inputs_embeds=x,
            attention_mask=mask.long(),
            position_ids=position_ids(mask)[:, -x.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
        )
        return out.last_hidden_state

    def empty_cache(self, llama, T):
        """A cache for generation, for at most T columns."""
        if self.static:
            return FixedCache(llama.config, max_cache_len=T)
        return GrowingCache()

    # ---- stage 1 ----

    def walk(self, batch, eps):
        """Read the prompts of a Batch and think.

        Returns ([(z, μ, log σ²) of each candidate], the mask so far, the cache).
        """
        thinking = batch.thinking
        column = torch.arange(thinking.L, device=thinking.n_latent.device)
        used = column < thinking.n_latent[:, None]
        mask, cache = batch.prompt_mask, GrowingCache()
        candidates = []
        h = self.hidden(self.policy, self.embed(batch.prompt), mask, cache)[:, -1]
        for t in range(thinking.n_candidate):
            # the last candidate may be one that every row drops: then no row reads it
            candidate = self.propose(h, eps[:, t])
            candidates.append(candidate)
            # all rows read it; where it is not used its column is masked for good
            if t < thinking.L:
                z, _, _ = candidate
                mask = torch.cat((mask, used[:, t : t + 1]), 1)
                h = self.hidden(self.policy, z[:, None], mask, cache)[:, -1]
        return candidates, mask, cache

    def thoughts(self, batch, eps):
        candidates, _, _ = self.walk(batch, eps)
        return torch.stack([z for z, _, _ in candidates], 1)

    def losses(self, batch, eps):
        # Think, then read the text; logits of the labelled positions alone
        candidates, mask, cache = self.walk(batch, eps)
        x = self.embed(batch.text.ids)
        h = self.hidden(self.policy, x, torch.cat((mask, batch.text.mask), 1), cache)
        labelled = batch.text.target >= 0
        logits = self.policy.lm_head(h[labelled])
        losses = {"enc": token_nll(logits, batch.text.target[labelled]).sum()}
        if not candidates:
            return losses

        # The KL of used latents; the stop head at the first latent of each step
        z, mu, logvar = (torch.stack(values, 1) for values in zip(*candidates))
        t = torch.arange(len(candidates), device=z.device)
        used = t < batch.thinking.n_latent[:, None]
        dropped = (t == batch.thinking.n_latent[:, None]) & batch.thinking.has_stop[:, None]
        is_decision = (used | dropped) & (t % self.c == 0)
        losses["kl"] = kl_normal(mu[used], logvar[used]).sum()
        stop_logits = self.stop_head(z[is_decision])
        losses["stop"] = token_nll(stop_logits, dropped[is_decision].long()).sum()

        # The decoder reads all steps of all problems in one call
        n_step = len(candidates) // self.c
        steps = z[:, : n_step * self.c].unflatten(1, (-1, self.c))  # (B, n_step, c, D)
        latents = steps[batch.steps.row, batch.steps.index]  # (N, c, D)
        losses["dec"] = self.steps_nll(latents, batch.steps.target)
        return losses

    def steps_nll(self, z, text):
        """The decoder's loss of all steps in one call. z (N, c, D), text (N, Ts)."""
        # Each row: the latents of a step, then its text up to the last id
        x = torch.cat((z, self.decoder_embed(text[:, :-1].clamp(min=0))), 1)
        latent_mask = text.new_ones(len(text), self.c, dtype=torch.bool)
        mask = torch.cat((latent_mask, text[:, :-1] != IGNORE), 1)

        # The hidden state after the last latent predicts the first id
        labelled = text != IGNORE
        h = self.hidden(self.decoder, x, mask)[:, self.c - 1 :]
        return token_nll(self.decoder.lm_head(h[labelled]), text[labelled]).sum()

    # ---- generation ----

    @torch.no_grad()
    def rollout(self, prompt, prompt_mask, max_new, noise=None, group=1):
        prompt, mask = repeat_prompts(prompt, prompt_mask, group)
        (B, Tq), n, device = prompt.shape, self.n_latent, prompt.device
        rows = torch.arange(B, device=device)
        writing = torch.ones(B, dtype=torch.bool, device=device)
        cache = self.empty_cache(self.policy, Tq + n + 1 + max_new)

        # Think until every row has stopped
        thinking, thoughts = writing, []
        eps = None if noise is None else noise.spread * draw_noise(noise.eps_keys, self.D)
        h = self.hidden(self.policy, self.embed(prompt), mask, cache)[:, -1]
        for t in range(n):
            z, _, _ = self.propose(h, None if eps is None else eps[:, t])

            # A row that stops drops its candidate, and reads masked columns from then on
            if t % self.c == 0:
                thinking = thinking & ~self.stops(z, t, noise)
                if not thinking.any():
                    break
            thoughts.append(torch.where(thinking[:, None], z, 0.0))
            mask = torch.cat((mask, thinking[:, None]), 1)
            h = self.hidden(self.policy, z[:, None], mask, cache)[:, -1]
        n_latent = mask[:, Tq:].sum(1)

        # Write until every row has ended. The first thing read is <|end-latent|>
        token, words = torch.full_like(rows, self.end), []
        for i in range(max_new):
            # rows that have ended read on, in masked columns
            mask = torch.cat((mask, writing[:, None]), 1)
            h = self.hidden(self.policy, self.embed(token)[:, None], mask, cache)[:, -1]
            logits = self.policy.lm_head(h)
            token = self.choose(logits, noise, i)
            words.append(token.masked_fill(~writing, -1))
            writing = writing & ~self.ends(token)
            if not writing.any():
                break

        # If all rows stopped early, z has fewer columns than minatp's, which no comparison looks at
        z = torch.stack(thoughts, 1) if thoughts else h.new_zeros(B, 0, h.shape[-1])
        return as_rollout(z, n_latent, n_latent < n, torch.stack(words, 1))

    @torch.no_grad()
    def read_thoughts(self, z, eos, max_new):
        texts = [[] for _ in z]

        # Thoughts that have ended stay in the batch until all have. The host keeps `writing`, since
        # it collects the words
        writing = torch.ones(len(z), dtype=torch.bool)
        cache = self.empty_cache(self.decoder, z.shape[1] + max_new)
        mask, x = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device), z
        for _ in range(max_new if len(z) else 0):
            h = self.hidden(self.decoder, x, mask, cache)[:, -1]
            token = self.decoder.lm_head(h).argmax(-1)
            writing = writing & (token != eos).cpu()
            for text, word, goes_on in zip(texts, token.tolist(), writing.tolist()):
                if goes_on:
                    text.append(word)
            if not writing.any():
                break

            # The word is the next column, real in every row
            x = self.decoder_embed(token)[:, None]
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        return texts

    # ---- stage 2 ----

    def log_probs(self, prompt, prompt_mask, chains, group=1):
        # One pass over everything; logits only where a word was written
        scored = self.scored(*repeat_prompts(prompt, prompt_mask, group), chains)
        Tq, n = prompt.shape[1], chains.z.shape[1]
        h = self.hidden(self.policy, scored.x, scored.mask)
        logp_z, logp_stop = self.latent_log_probs(h[:, Tq - 1 : Tq + n - 1], chains, scored)
        written = scored.written
        nll = token_nll(self.policy.lm_head(h[:, Tq + n :][written]), chains.token[written])
        logp_token = torch.zeros_like(written, dtype=nll.dtype).masked_scatter(written, -nll)
        return logp_z, logp_stop, logp_token
