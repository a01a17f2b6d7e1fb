"""What the benchmark (minatp/bench.py) compares: the sides, what they work on, and whether they compute the same."""

from dataclasses import dataclass
from functools import partial

import torch

from kernels.bench import ceilings

from .. import data, problems
from ..decoder import read_thoughts
from ..latent import ATP
from ..optim import build_optimizer
from ..rl import log_probs, surrogate
from ..rollout import Noise, rollout
from ..run.build import build, llama_config
from ..run.device import place
from ..run.errors import UserError
from ..run.loop import GuardedOptimizer
from ..run.options import PRESETS, Config
from ..run.terminal import print0
from ..sft import sft_losses, think, total_loss
from ..tools import count

BETA, MAX_NEW = 1e-3, 16
SIZES = {  # problems of an SFT step, questions and rollouts of each, problems of an evaluation
    "tiny": dict(batch=32, questions=16, G=8, evaluated=16, check=6),
    "llama-1b": dict(batch=32, questions=16, G=8, evaluated=32, check=2),
}


@dataclass
class Side:
    """One way to compute the method. Each function has the signature of minatp's own."""

    losses: callable  # (batch, eps) -> sums
    thoughts: callable  # (batch, eps) -> z
    rollout: callable  # (prompt, valid, max_new, noise, group) -> Rollout
    score: (
        callable  # (prompt, valid, rollout, group) -> log-probabilities of thoughts, stops, words
    )
    read: callable  # (z, eos, max_new) -> lists of ids
    at_once: bool  # whether evaluation takes its problems in one batch
    bf16: bool = True  # autocast, on a GPU


def sides(model, device):
    """{name: Side}, minatp first; all on the same parameters."""
    from . import peer

    reference, tuned = peer.Reference(model), peer.Tuned(model, static=device.type == "cuda")
    of = lambda p, **switches: Side(
        p.losses, p.thoughts, p.rollout, p.score, p.read_thoughts, **switches
    )
    found = {
        "minatp": Side(
            partial(sft_losses, model),
            lambda batch, eps: think(model, batch, eps)[0].z,
            partial(rollout, model),
            partial(log_probs, model),
            partial(read_thoughts, model.decoder),
            True,
        ),
        "tuned": of(tuned, at_once=True),
        "reference": of(reference, at_once=False),
    }
    if device.type == "cuda":
        found["reference float32"] = of(reference, at_once=False, bf16=False)
    return found


# ---- what they work on --------------------------------------------------------------------------------------------------


class Case:
    """A model, its problems, and a batch of each kind, of one preset on one device."""

    def __init__(self, preset, device):
        self.size, self.device = SIZES[preset], device
        self.cfg = Config(
            **{**PRESETS[preset], "epochs": "1", "optimizer": "adamw"}
        )  # as the others' code has it
        torch.manual_seed(0)
        if preset == "tiny":
            given = problems.generate("labelled", 400, 0)
            self.model, tokenizer = build(self.cfg, given)
            self.rows = data.encode(given, tokenizer, self.model)
            self.eos = tokenizer.eos[0]
        else:  # neither weights nor a tokenizer are needed to be as slow as with them
            with device:
                self.model = ATP(
                    llama_config(self.cfg, self.cfg.vocab_size + 3), **self.cfg.switches
                )
            self.model.policy.init_weights()
            self.model.decoder.init_weights()
            self.model.end, self.eos = self.cfg.vocab_size + 2, 1
            self.rows = [paper_row(self.model.end) for _ in range(64)]
        place(self.model, device)
        self.machine = (
            count.Machine(*(1e6 * x for x in ceilings(device))) if device.type == "cuda" else None
        )

    def ragged(self, on):
        """Whether chains end at all lengths, by chance (for the comparison of results), or never before their full length (for
        times: the most work, and the same for all)."""
        model, g = self.model, torch.Generator().manual_seed(0)
        first, last = model.stop_head[0], model.stop_head[2]
        with torch.no_grad():
            first.weight.copy_(torch.randn(first.weight.shape, generator=g))
            first.bias.zero_()
            last.weight.copy_(torch.randn(last.weight.shape, generator=g) * on)
            last.bias.copy_(torch.tensor([0.0, 0.0] if on else [50.0, 0.0]))
        model.policy.cfg.eos = (
            tuple(range(1, model.policy.cfg.vocab_size, 4)) if on else (-1,)
        )  # <|end-latent|>, 4, is none
        self.eos_read = self.eos if on else -1

    def batch(self, stage, rows=None):
        """(data.Batch at a curriculum stage, its noise), and the model set to that stage. rows: Encoded [as many as an SFT step has]."""
        model = self.model
        model.stage = stage
        batch = data.collate(rows or self.rows[: self.size["batch"]], stage, model).to(self.device)
        eps = torch.randn(
            len(batch.prompt),
            model.c * model.K,
            model.policy.cfg.n_embd,
            generator=torch.Generator().manual_seed(1),
        )
        return batch, eps.to(self.device)

    def prompts(self, n):
        return data.left_pad([r.prompt for r in self.rows[:n]], self.model.end, self.device)


def paper_row(vocab_size, n_prompt=90, n_step=10, per_step=9, n_answer=6):
    """A problem of random ids, of about a GSM8k-Aug problem's lengths."""
    ids = lambda n: torch.randint(2, vocab_size, (n,)).tolist()
    steps = [ids(per_step) for _ in range(n_step)]
    return data.Encoded(ids(n_prompt), steps, steps, [], ids(n_answer), "")


def works(case):
    """{name: (work(side), tokens)}: what is timed, forwards, backwards and update, and how many tokens each takes in or writes."""
    model, size, device = case.model, case.size, case.device
    steps = GuardedOptimizer(build_optimizer(case.cfg, model), model, 1.0)
    K, G = model.K, size["G"]
    found = {}
    case.ragged(False)

    def update(loss):
        """Backwards and one step, with a learning rate of 0, so that every round has the same weights."""
        loss.backward()
        steps.step(0.0, loss, 0, [])
        steps.unchecked.clear()

    def sft(side, stage):
        batch, eps = case.batch(stage)
        update(total_loss(side.losses(batch, eps), batch.counts, BETA))

    for name, stage in (("first", 0), ("middle", (K + 1) // 2), ("last", K + 1)):
        batch, _ = case.batch(stage)
        n = int(
            batch.prompt_mask.sum()
            + batch.n_latent.sum()
            + (batch.target >= 0).sum()
            + (batch.step_text >= 0).sum()
        )
        found[f"SFT, {name} stage"] = partial(sft, stage=stage), n

    def latents(side):
        batch, eps = case.batch(K + 1)
        side.thoughts(batch, eps).sum().backward()
        model.zero_grad(set_to_none=True)

    found["prompt and latents"] = latents, int(batch.prompt_mask.sum() + batch.n_latent.sum())
    prompt, valid = case.prompts(size["questions"])
    noise = Noise.draw(model, len(prompt) * G, MAX_NEW, 1).at(slice(None), device)
    r = rollout(model, prompt, valid, MAX_NEW, noise, G)
    z = r.z.unflatten(1, (K, -1)).flatten(0, 1)  # (N, c, D)
    found["rollouts"] = (
        lambda side: side.rollout(prompt, valid, MAX_NEW, noise, G),
        int(r.n_latent.sum() + r.n_token.sum()),
    )
    found["reading thoughts"] = lambda side: side.read(z, case.eos_read, MAX_NEW), len(z) * MAX_NEW
    advantage = torch.randn(len(r.z), 1, generator=torch.Generator().manual_seed(2)).to(device)

    def learn(side):
        logp = torch.cat(side.score(prompt, valid, r, G)[:3], 1)
        update(surrogate(logp, logp.detach(), advantage)[0].sum() / len(logp))

    found["RL update"] = learn, int(r.n_latent.sum() + r.n_token.sum())
    asked, asked_valid = case.prompts(size["evaluated"])

    def evaluate(side):
        for rows in [slice(None)] if side.at_once else [slice(i, i + 1) for i in range(len(asked))]:
            side.rollout(asked[rows], asked_valid[rows], MAX_NEW)

    found["evaluation"] = evaluate, len(asked) * (model.c * K + MAX_NEW)
    return found


# ---- the same results ---------------------------------------------------------------------------------------------------


def results(case, side, own):
    """What a side computes in float32, a piece at a time, for the gradients of three stages do not fit a GPU at the paper's size:
    (tensors, what has to be equal). own: the chains that everyone scores and reads, minatp's."""
    model, size = case.model, case.size
    prompt, valid = case.prompts(size["check"])

    def learned(stage):
        batch, eps = case.batch(stage, case.rows[: size["check"]])
        sums = side.losses(batch, eps)
        total_loss(sums, batch.counts, BETA).backward()
        found = [sums[k].detach().view(1) for k in sorted(sums)] + [
            p.grad.flatten() for p in model.parameters() if p.grad is not None
        ]
        model.zero_grad(set_to_none=True)
        return found

    for stage in (0, (model.K + 1) // 2, model.K + 1):
        yield learned(stage), None
    for chance in (None, chances(case)):
        r = side.rollout(prompt, valid, MAX_NEW, chance, 2)
        yield (
            [],
            (
                r.n_latent.tolist(),
                [row[:n] for row, n in zip(r.token.tolist(), r.n_token.tolist())],
            ),
        )
    z = torch.cat([r.z for r in own]).unflatten(1, (model.K, -1))
    z = z[
        torch.arange(model.K, device=z.device) * model.c
        < torch.cat([r.n_latent for r in own])[:, None]
    ]
    yield (
        [v.detach().flatten() for r in own for v in side.score(prompt, valid, r, 2)[:3]],
        side.read(z, case.eos_read, MAX_NEW),
    )


def chances(case):
    """Noise of the compared chains. Words of a large vocabulary are greedy: untrained, all have about the same probability, less than a
    hundred times float32's rounding of their sum, so that now and then two sides would draw neighbours."""
    noise = Noise.draw(
        case.model,
        2 * case.size["check"],
        MAX_NEW,
        3,
        greedy=case.model.policy.cfg.vocab_size > 10**4,
    )
    return noise.at(slice(None), case.device)


def compare(case, every):
    """{name: side} without those whose losses, gradients, chains, thoughts or log-probabilities are not minatp's, in float32."""
    case.ragged(True)
    case.model.stage = case.model.K + 1
    own = [
        every["minatp"].rollout(*case.prompts(case.size["check"]), MAX_NEW, chance, 2)
        for chance in (None, chances(case))
    ]
    same = dict(every)
    for name, side in every.items():
        if not side.bf16:  # the reference once more
            continue
        worst, alike = 0.0, True
        for (values, exact), (want, want_exact) in zip(
            results(case, side, own), results(case, every["minatp"], own)
        ):
            alike = alike and exact == want_exact
            errors = [
                float((a - b).norm() / b.norm().clamp(min=1e-12))
                for a, b in zip(values, want)
                if len(b)
            ]
            worst = (
                max(worst, *errors, 0.0, key=lambda e: (e != e, e))
                if len(values) == len(want)
                else float("inf")
            )  # NaN is the worst
        if worst <= 1e-3 and alike:
            print0(
                f"{name:18} same losses, gradients, log-probabilities (to {worst:.0e}), chains and thoughts"
            )
        else:
            print0(
                f"{name:18} DIFFERS from minatp (by {worst:.1e}, {'the same' if alike else 'other'} chains): it is not timed; report it"
            )
            same = {k: s for k, s in same.items() if not k.startswith(name)}  # nor in float32
    if "minatp" not in same:
        raise UserError(
            "minatp/bench.py:0: minatp does not compute the same twice, so there is nothing to time; report it"
        )
    return same
