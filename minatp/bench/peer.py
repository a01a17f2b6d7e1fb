"""The same model as others drive it, for minatp.bench and its tests alone: Hugging Face's LlamaForCausalLM under the same heads.

Reference  as the authors' code does (zz1358m/ATP-Latent-master, methods/): every row takes every latent of the stage, the embeddings
           are taken apart and stacked again at each latent, the cache is cut and handed on, each word re-reads all that stands before
           it, logits of every position in float32, one decoder call for each thought of a chain, each rollout with its own prompt.
Tuned      as a careful user of transformers would: one cache, SDPA, one decoder call, logits where they are read, all rows in one batch.

Both compute what method.md says, with the very parameters of minatp's model, and take their chance from outside, so that losses,
gradients and answers can be compared with minatp's own.
"""

import torch

from kernels.common import upcast
from kernels.cross_entropy import IGNORE, token_nll
from kernels.vae import draw_noise, gaussian_log_prob, kl_normal

from ..rollout import Rollout, choose_token
from ..run.errors import UserError
from ..run.huggingface import hf_config

try:
    import transformers
    from transformers import DynamicCache, LlamaForCausalLM, StaticCache
except ImportError:
    transformers = None


def need_transformers():
    """Raises UserError where transformers is missing: it is needed here and nowhere else."""
    if transformers is None:
        raise UserError(
            "minatp/peer.py:0: the benchmark compares with transformers, which is not installed; pip install transformers"
        )


def hugging(llama):
    """A Llama as LlamaForCausalLM with SDPA. The parameters are the same tensors: a second 1B model would not fit beside the first."""
    # a generation of its own is never asked for, so it is not told where sequences end
    config = transformers.LlamaConfig(
        **{**hf_config(llama.cfg), "bos_token_id": None, "eos_token_id": None},
        attn_implementation="sdpa",
    )
    with torch.device(llama.freq.device):
        model = LlamaForCausalLM(config)
    weights = dict(llama.named_parameters())
    if llama.cfg.tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    return model


def positions(mask):
    """Position ids (B, T) that count the real columns of mask (B, T)."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


class Reference:
    """model: the ATP whose weights and stage are taken. Results are those of supervise, rollout, score and read_thoughts."""

    def __init__(self, model):
        need_transformers()
        self.model, self.c, self.end, self.stop_head = model, model.c, model.end, model.stop_head
        self.D = model.policy.cfg.n_embd
        self.policy, self.decoder = hugging(model.policy), hugging(model.decoder)

    def propose(self, h, eps=None):
        """z, μ and logσ² (..., D) after h (..., D), in plain PyTorch. eps None: z = μ."""
        mu, logvar = self.model.latent_head(h)
        return mu if eps is None else mu + torch.exp(0.5 * logvar) * eps, mu, logvar

    @property
    def n_latent(self):
        """Latents of the curriculum's stage."""
        return self.c * min(self.model.stage, self.model.K)

    # ---- stage 1 ----

    def losses(self, batch, eps):
        """{"enc", "dec", "stop", "kl"}, summed over the batch, of a data.Batch without free rows; eps (B, ≥ latents of the stage, D)."""
        n, Tq = self.n_latent, batch.prompt.shape[1]
        t = torch.arange(n, device=eps.device)
        used = t < batch.n_latent[:, None]
        x, mask, cache, logits, mu, logvar = self.think(*self.columns(batch), Tq, n, eps)
        logits = torch.cat(
            (*logits, self.read(x, mask, Tq + n - 1 if n else 0, x.shape[1], cache).logits.float()),
            1,
        )
        target = torch.cat(
            (batch.target.new_full((len(batch.target), Tq + n), IGNORE), batch.target), 1
        )
        sums = {"enc": token_nll(logits, target).sum()}
        if n:
            z = x[:, Tq : Tq + n]
            dropped = (t == batch.n_latent[:, None]) & batch.has_stop[:, None]
            asked = (used | dropped) & (t % self.c == 0)
            sums["kl"] = kl_normal(mu, logvar)[used].sum()
            sums["stop"] = token_nll(self.stop_head(z), dropped.long())[asked].sum()
            sums["dec"] = sum(
                self.read_step(z[:, s * self.c : (s + 1) * self.c], batch, s)
                for s in range(n // self.c)
            )
        return sums

    def columns(self, batch):
        """A batch as ids (B, T), latents being any, and mask (B, T)."""
        room = torch.full((len(batch.prompt), self.n_latent), self.end, device=batch.prompt.device)
        used = torch.arange(self.n_latent, device=room.device) < batch.n_latent[:, None]
        return torch.cat((batch.prompt, room, batch.text), 1), torch.cat(
            (batch.prompt_mask, used, batch.text_mask), 1
        )

    def thoughts(self, batch, eps):
        """The prompt and the chain of latents alone: z (B, latents, D)."""
        Tq, n = batch.prompt.shape[1], self.n_latent
        return self.think(*self.columns(batch), Tq, n, eps)[0][:, Tq : Tq + n]

    def think(self, ids, mask, Tq, n, eps, decide=None):
        """Read ids (B, T), whose columns Tq … Tq+n are latents. Returns the embeddings with the thoughts in place, the mask, the
        cache, the logits of the columns read, μ and logσ². decide(z, t) -> which rows stop there, where they are not told."""
        x, mask = self.policy.get_input_embeddings()(ids), mask.clone()
        cache, low, high, logits, means, logvars = None, 0, Tq, [], [], []
        for t in range(n):
            out = self.read(x, mask, low, high, cache)
            logits.append(out.logits.float())
            cache, h = out.past_key_values, out.hidden_states[-1][:, -1]
            parts = [[x[b, i] for i in range(x.shape[1])] for b in range(len(x))]
            for b in range(len(x)):
                parts[b][high], mu, logvar = self.propose(h[b], None if eps is None else eps[b, t])
                means.append(mu)
                logvars.append(logvar)
            x = torch.stack([torch.stack(row) for row in parts])
            if decide and t % self.c == 0:
                mask[decide(x[:, high], t), high : Tq + n] = False
            low, high = high, high + 1
        by_row = lambda v: torch.stack(v).unflatten(0, (n, -1)).transpose(0, 1) if n else None
        return x, mask, cache, logits, by_row(means), by_row(logvars)

    def read(self, x, mask, low, high, cache):
        """The columns low … high, after those of the cache, which is cut to them and built anew."""
        if cache is not None:
            cache = DynamicCache(
                [(layer.keys[:, :, :low], layer.values[:, :, :low]) for layer in cache.layers]
            )
        return self.policy(
            inputs_embeds=x[:, low:high],
            attention_mask=mask[:, :high].long(),
            position_ids=positions(mask)[:, low:high],
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )

    def read_step(self, z, batch, s):
        """Decoder's loss of step s of every problem that has one, a call for itself. z (B, c, D)."""
        at = (batch.step_index == s).nonzero()[:, 0]
        if not len(at):
            return 0.0
        text, rows = batch.step_text[at], batch.step_row[at]
        pairs = [
            torch.cat((z[b], self.decoder.get_input_embeddings()(ids[:-1].clamp(min=0))))
            for b, ids in zip(rows.tolist(), text)
        ]
        mask = torch.cat((text.new_ones(len(text), self.c), (text[:, :-1] != IGNORE).long()), 1)
        logits = self.decoder(
            inputs_embeds=torch.stack(pairs), attention_mask=mask, position_ids=positions(mask)
        ).logits.float()
        return token_nll(logits[:, self.c - 1 :], text).sum()

    # ---- generation ----

    @torch.no_grad()
    def rollout(self, prompt, valid, max_new, noise=None, group=1):
        """As minatp.rollout.rollout: used thoughts, how many, and the words; what RL records beside them comes from score."""
        prompt, valid = prompt.repeat_interleave(group, 0), valid.repeat_interleave(group, 0)
        (B, Tq), n = prompt.shape, self.n_latent
        columns = torch.full((B, n + 1), self.end, device=prompt.device)
        mask = torch.cat((valid, torch.ones_like(columns, dtype=torch.bool)), 1)
        eps = None if noise is None else noise.spread * draw_noise(noise.eps, self.D)
        x, mask, *_ = self.think(
            torch.cat((prompt, columns), 1), mask, Tq, n, eps, lambda z, t: self.stops(z, t, noise)
        )
        n_latent, z = mask[:, Tq : Tq + n].sum(1), x[:, Tq : Tq + n]
        rows, written, going = (
            torch.arange(B, device=x.device),
            [],
            torch.ones(B, dtype=torch.bool, device=x.device),
        )
        for i in range(max_new):
            # all of it again, logits of all of it, for the last one
            logits = self.policy(
                inputs_embeds=x,
                attention_mask=mask.long(),
                position_ids=positions(mask),
                use_cache=False,
            ).logits.float()
            token, _ = choose_token(logits[:, -1], noise, rows, torch.full_like(rows, i))
            written.append(token.masked_fill(~going, -1))
            going = going & ~torch.isin(
                token, torch.tensor(self.model.policy.cfg.eos, device=x.device)
            )
            if not going.any():
                break
            x = torch.cat((x, self.policy.get_input_embeddings()(token)[:, None]), 1)
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
        return chains(z, n_latent, n_latent < n, torch.stack(written, 1))

    def stops(self, z, t, noise):
        logp = upcast(self.stop_head(z)).log_softmax(-1)
        return (
            logp[:, 1] > logp[:, 0]
            if noise is None
            else noise.stop[:, t // self.c] < logp[:, 1].exp()
        )

    @torch.no_grad()
    def read_thoughts(self, z, eos, max_new):
        """As decoder.read_thoughts; every word re-reads the thought and what was written. z (N, c, D) -> N lists of ids."""
        texts, rows, x = [[] for _ in z], torch.arange(len(z), device=z.device), z
        for _ in range(max_new if len(z) else 0):
            token = self.decoder(inputs_embeds=x).logits.float()[:, -1].argmax(-1)
            for row, word in zip(rows.tolist(), token.tolist()):
                if word != eos:
                    texts[row].append(word)
            going = token != eos
            if not going.any():
                break
            x = torch.cat((x[going], self.decoder.get_input_embeddings()(token[going])[:, None]), 1)
            rows = rows[going]
        return texts

    # ---- stage 2 ----

    def score(self, prompt, valid, r, group=1):
        """As minatp.rollout.score: (logp_z (B, cK), logp_stop (B, K), logp_token (B, Tt)), each chain with its own prompt."""
        x, mask, used, written, candidate = self.sequence(prompt, valid, r, group)
        out = self.policy(
            inputs_embeds=x,
            attention_mask=mask.long(),
            position_ids=positions(mask),
            output_hidden_states=True,
        )
        Tq, L = prompt.shape[1], r.z.shape[1]
        _, mu, logvar = self.propose(out.hidden_states[-1][:, Tq - 1 : Tq + L - 1], None)
        logp = out.logits.float()[:, Tq + L :].log_softmax(-1)
        logp_token = logp.gather(-1, r.token.clamp(min=0)[..., None])[..., 0] * written
        return self.densities(r, mu, logvar, used, candidate) + (logp_token,)

    def sequence(self, prompt, valid, r, group):
        L, Tt = r.z.shape[1], r.token.shape[1]
        at = torch.arange(max(L, Tt), device=prompt.device)
        used, written = at[:L] < r.n_latent[:, None], at[:Tt] < r.n_token[:, None]
        candidate = used | ((at[:L] == r.n_latent[:, None]) & r.stopped[:, None])
        tail = torch.cat(
            (torch.full_like(r.token[:, :1], self.end), r.token[:, :-1].clamp(min=0)), 1
        )
        embed = self.policy.get_input_embeddings()
        x = torch.cat((embed(prompt.repeat_interleave(group, 0)), r.z, embed(tail)), 1)
        return (
            x,
            torch.cat((valid.repeat_interleave(group, 0), used, written), 1),
            used,
            written,
            candidate,
        )

    def densities(self, r, mu, logvar, used, candidate):
        logp = upcast(self.stop_head(r.z[:, :: self.c])).log_softmax(-1)
        taken = torch.where(used[:, :: self.c], logp[..., 0], logp[..., 1])
        return gaussian_log_prob(r.z, mu, logvar) * candidate, taken * candidate[:, :: self.c]


class Tuned(Reference):
    """The same, as tuned as plain transformers allows. static: generation into a StaticCache and not a growing one."""

    def __init__(self, model, static=False):
        super().__init__(model)
        self.static = static

    def hidden(self, llama, x, mask, cache=None):
        """Last hidden states of the new columns x, mask (B, T) being that of the cached and the new ones; no logits."""
        return llama.model(
            inputs_embeds=x,
            attention_mask=mask.long(),
            position_ids=positions(mask)[:, -x.shape[1] :],
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def walk(self, batch, eps):
        """(z, μ, logσ²) of each latent, the mask so far and the cache."""
        used = torch.arange(batch.L, device=batch.n_latent.device) < batch.n_latent[:, None]
        mask, cache, found = batch.prompt_mask, DynamicCache(), []
        h = self.hidden(self.policy, self.policy.get_input_embeddings()(batch.prompt), mask, cache)[
            :, -1
        ]
        for t in range(batch.n_candidate):
            found.append(self.propose(h, eps[:, t]))
            if t < batch.L:
                mask = torch.cat((mask, used[:, t : t + 1]), 1)
                h = self.hidden(self.policy, found[-1][0][:, None], mask, cache)[:, -1]
        return found, mask, cache

    def thoughts(self, batch, eps):
        return torch.stack([z for z, _, _ in self.walk(batch, eps)[0]], 1)

    def losses(self, batch, eps):
        found, mask, cache = self.walk(batch, eps)
        x = self.policy.get_input_embeddings()(batch.text)
        h = self.hidden(self.policy, x, torch.cat((mask, batch.text_mask), 1), cache)
        labelled = batch.target >= 0
        sums = {"enc": token_nll(self.policy.lm_head(h[labelled]), batch.target[labelled]).sum()}
        if found:
            z, mu, logvar = (torch.stack(v, 1) for v in zip(*found))
            t = torch.arange(len(found), device=z.device)
            used, dropped = (
                t < batch.n_latent[:, None],
                (t == batch.n_latent[:, None]) & batch.has_stop[:, None],
            )
            asked = (used | dropped) & (t % self.c == 0)
            sums["kl"] = kl_normal(mu[used], logvar[used]).sum()
            sums["stop"] = token_nll(self.stop_head(z[asked]), dropped[asked].long()).sum()
            steps = z[:, : len(found) // self.c * self.c].unflatten(1, (-1, self.c))
            sums["dec"] = self.read_steps(steps[batch.step_row, batch.step_index], batch.step_text)
        return sums

    def read_steps(self, z, text):
        """Decoder's loss of all thoughts z (N, c, D) in one call."""
        x = torch.cat((z, self.decoder.get_input_embeddings()(text[:, :-1].clamp(min=0))), 1)
        mask = torch.cat(
            (text.new_ones(len(text), self.c, dtype=torch.bool), text[:, :-1] != IGNORE), 1
        )
        labelled = text != IGNORE
        h = self.hidden(self.decoder, x, mask)[:, self.c - 1 :]
        return token_nll(self.decoder.lm_head(h[labelled]), text[labelled]).sum()

    def cache(self, llama, T):
        return StaticCache(llama.config, max_cache_len=T) if self.static else DynamicCache()

    @torch.no_grad()
    def rollout(self, prompt, valid, max_new, noise=None, group=1):
        prompt, mask = prompt.repeat_interleave(group, 0), valid.repeat_interleave(group, 0)
        (B, Tq), n, embed = prompt.shape, self.n_latent, self.policy.get_input_embeddings()
        rows, going = (
            torch.arange(B, device=prompt.device),
            torch.ones(B, dtype=torch.bool, device=prompt.device),
        )
        cache, thinking, thoughts, written = (
            self.cache(self.policy, Tq + n + 1 + max_new),
            going,
            [],
            [],
        )
        eps = None if noise is None else noise.spread * draw_noise(noise.eps, self.D)
        h = self.hidden(self.policy, embed(prompt), mask, cache)[:, -1]
        for t in range(n):
            z, _, _ = self.propose(h, None if eps is None else eps[:, t])
            if t % self.c == 0:
                thinking = thinking & ~self.stops(z, t, noise)
                if not thinking.any():
                    break
            thoughts.append(torch.where(thinking[:, None], z, 0.0))
            mask = torch.cat((mask, thinking[:, None]), 1)
            h = self.hidden(self.policy, z[:, None], mask, cache)[:, -1]
        n_latent, token = mask[:, Tq:].sum(1), torch.full_like(rows, self.end)
        for i in range(max_new):
            mask = torch.cat((mask, going[:, None]), 1)
            h = self.hidden(self.policy, embed(token)[:, None], mask, cache)[:, -1]
            token, _ = choose_token(self.policy.lm_head(h), noise, rows, torch.full_like(rows, i))
            written.append(token.masked_fill(~going, -1))
            going = going & ~torch.isin(
                token, torch.tensor(self.model.policy.cfg.eos, device=token.device)
            )
            if not going.any():
                break
        z = torch.stack(thoughts, 1) if thoughts else h.new_zeros(B, 0, h.shape[-1])
        return chains(z, n_latent, n_latent < n, torch.stack(written, 1))

    @torch.no_grad()
    def read_thoughts(self, z, eos, max_new):
        texts, cache, going = (
            [[] for _ in z],
            self.cache(self.decoder, z.shape[1] + max_new),
            torch.ones(len(z), dtype=torch.bool),
        )
        mask, x = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device), z
        for _ in range(max_new if len(z) else 0):
            token = self.decoder.lm_head(self.hidden(self.decoder, x, mask, cache)[:, -1]).argmax(
                -1
            )
            going = going & (token != eos).cpu()
            for row, (word, on) in enumerate(zip(token.tolist(), going.tolist())):
                if on:
                    texts[row].append(word)
            if not going.any():
                break
            x, mask = (
                self.decoder.get_input_embeddings()(token)[:, None],
                torch.cat((mask, torch.ones_like(mask[:, :1])), 1),
            )
        return texts

    def score(self, prompt, valid, r, group=1):
        x, mask, used, written, candidate = self.sequence(prompt, valid, r, group)
        Tq, L = prompt.shape[1], r.z.shape[1]
        h = self.hidden(self.policy, x, mask)
        _, mu, logvar = self.propose(h[:, Tq - 1 : Tq + L - 1], None)
        nll = token_nll(self.policy.lm_head(h[:, Tq + L :][written]), r.token[written])
        return self.densities(r, mu, logvar, used, candidate) + (
            torch.zeros_like(written, dtype=nll.dtype).masked_scatter(written, -nll),
        )


def chains(z, n_latent, stopped, token):
    """A Rollout with the used thoughts and the words alone."""
    z = z * (torch.arange(z.shape[1], device=z.device) < n_latent[:, None])[..., None]
    nothing = z.new_zeros(len(z), 0)
    return Rollout(
        z, None, n_latent, stopped, nothing, token, (token >= 0).sum(1), nothing, nothing, nothing
    )
