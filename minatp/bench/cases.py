"""What the benchmark compares: the sides, what they work on, and whether they compute the same.

Side      one way to compute the method: minatp's own, or one of peer.py's
Case      a model, its problems and batches of them, for one preset on one device
works     what is timed
compare   leaves out every side whose results are not minatp's
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

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
from ..sft import read_batch, sft_losses, total_loss, walk_batch
from ..tools import count

WEIGHTS = {"kl": 1e-3}  # of the losses
MAX_NEW = 16  # tokens of an answer, and of a step that the decoder writes
TOLERANCE = 1e-3  # relative L2 error up to which two sides compute the same in float32


@dataclass
class Sizes:
    """How much each side works on."""

    batch: int  # problems of an SFT step
    questions: int  # of a batch of rollouts
    G: int  # rollouts per question
    evaluated: int  # problems of an evaluation
    check: int  # problems for which results are compared


# The paper's batches for SFT and RL, whatever the size of the model
SIZES = {
    "tiny": Sizes(batch=32, questions=16, G=8, evaluated=16, check=6),
    "llama-1b": Sizes(batch=32, questions=16, G=8, evaluated=32, check=2),
}


@dataclass
class Side:
    """One way to compute the method. Each function has the signature of minatp's own."""

    # gradients flow through all but rollout and read_thoughts

    losses: Callable  # (batch, eps) -> {name: sum}
    thoughts: Callable  # (batch, eps) -> z
    rollout: Callable  # (prompt, prompt_mask, max_new, noise, group) -> Rollout
    log_probs: Callable  # (prompt, prompt_mask, rollout, group) -> those of latents, stops, words
    read_thoughts: Callable  # (z, eos, max_new) -> lists of ids
    batched_evaluation: bool  # whether it evaluates all problems in one batch, or one at a time
    bf16: bool = True  # whether it runs under autocast on a GPU


def sides(model, device):
    """{name: Side}, minatp first; all on the same parameters. Raises UserError."""
    from . import peer  # here, because transformers takes seconds to import

    # Tuned has a cache of fixed size on a GPU. One that grows is copied at every word; one of fixed
    # size is attended to in full, also where it is still empty
    on_gpu = device.type == "cuda"
    reference = peer.Reference(model)
    tuned = peer.Tuned(model, static=on_gpu)

    # minatp's own functions take the model; a Side's have it already
    def thoughts(batch, eps):
        h, cache = read_batch(model.policy, batch)
        latent, _ = walk_batch(model, batch, h, cache, eps)
        return latent.z

    def side_of(p, **switches):
        return Side(p.losses, p.thoughts, p.rollout, p.log_probs, p.read_thoughts, **switches)

    # The reference evaluates one problem at a time, as the authors' code does
    every = {
        "minatp": Side(
            losses=partial(sft_losses, model),
            thoughts=thoughts,
            rollout=partial(rollout, model),
            log_probs=partial(log_probs, model),
            read_thoughts=partial(read_thoughts, model.decoder),
            batched_evaluation=True,
        ),
        "tuned": side_of(tuned, batched_evaluation=True),
        "reference": side_of(reference, batched_evaluation=False),
    }

    # On a CPU there is no autocast, so this would be the same side once more
    if on_gpu:
        every["reference float32"] = side_of(reference, batched_evaluation=False, bf16=False)
    return every


# ---- what they work on ---------------------------------------------------------------------------


class Case:
    """A model, its problems, and batches of them, for one preset on one device."""

    def __init__(self, preset, device):
        self.size, self.device = SIZES[preset], device
        # AdamW, because that is what the authors' code uses
        self.cfg = Config(**{**PRESETS[preset], "epochs": "1", "optimizer": "adamw"})

        # A trained model would be no faster, so none is needed
        torch.manual_seed(0)
        if preset == "tiny":
            self.build_tiny()
        else:
            self.build_untrained()
        place(self.model, device)

        self.machine = None  # a GPU's measured bandwidth and product rate
        if device.type == "cuda":
            bytes_per_us, flops_per_us = ceilings(device)
            self.machine = count.Machine(1e6 * bytes_per_us, 1e6 * flops_per_us)

    def build_tiny(self):
        """The built-in task's model, tokenizer and problems."""
        labelled = problems.generate("labelled", 400, 0)
        self.model, tokenizer = build(self.cfg, labelled)
        self.rows = data.encode(labelled, tokenizer, self.model)
        self.eos = tokenizer.eos[0]

    def build_untrained(self):
        """An untrained model of the paper's size, and problems of random ids.

        They are as slow as trained weights and real problems.
        """
        cfg = self.cfg

        # Both LMs are created on the device: 10 GB in float32
        with self.device:
            self.model = ATP(llama_config(cfg, cfg.vocab_size + 3), **cfg.switches)
        self.model.policy.init_weights()
        self.model.decoder.init_weights()

        # The noise, which all sides share, outweighs the mean. An untrained chain is chaotic
        # otherwise: a rounding error grows from latent to latent, until there is nothing to compare
        with torch.no_grad():
            self.model.latent_head.gaussian.weight[: cfg.n_embd] *= 0.1

        # The three tokens that are added come last, and <|end-latent|> last of all
        self.model.end = cfg.vocab_size + 2
        self.eos = 1
        self.rows = [paper_row(self.model.end) for _ in range(64)]

    def set_ragged(self, ragged):
        """Choose whether chains end at all lengths, by chance, or never before their full length.

        Ragged chains are for comparing results. Full-length chains are for timing: the most work,
        and the same for every side.
        """
        model, g = self.model, torch.Generator().manual_seed(0)

        # The stop head: random logits, or "continue" whatever z is
        first, last = model.stop_head[0], model.stop_head[2]
        with torch.no_grad():
            first.weight.copy_(torch.randn(first.weight.shape, generator=g))
            first.bias.zero_()
            last.weight.copy_(torch.randn(last.weight.shape, generator=g) * ragged)
            last.bias.copy_(torch.tensor([0.0, 0.0] if ragged else [50.0, 0.0]))

        # Words: every fourth ends an answer (<|end-latent|>, id 4, does not), or none does
        cfg = model.policy.cfg
        cfg.eos = tuple(range(1, cfg.vocab_size, 4)) if ragged else (-1,)

        # φ's readings: likewise, they end at eos or never
        self.decoder_eos = self.eos if ragged else -1

    def batch(self, stage, rows=None):
        """(Batch at a curriculum stage, its noise); also sets the model to that stage.

        rows: Encoded; as many as an SFT step has by default.
        """
        model = self.model

        # The peers read the stage from the model, not from the batch
        model.stage = stage

        # noise as numbers, not as keys of a generator (kernels/vae.py): every side can use it
        batch = data.collate(rows or self.rows[: self.size.batch], stage, model).to(self.device)
        shape = len(batch.prompt), model.c * model.K, model.policy.cfg.n_embd
        eps = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        return batch, eps.to(self.device)

    def prompts(self, n):
        """(prompt, prompt_mask) of the first n problems."""
        return data.left_pad([row.prompt for row in self.rows[:n]], self.model.end, self.device)


def paper_row(vocab_size, n_prompt=90, n_step=10, step_length=9, n_answer=6):
    """A problem of random ids, with the lengths of a typical GSM8k-Aug problem."""

    def ids(n):
        # never 0 or 1, bos and eos of an untrained model
        return torch.randint(2, vocab_size, (n,)).tolist()

    # `rest_text` is empty, because no problem has more steps than become latents
    steps = [ids(step_length) for _ in range(n_step)]
    return data.Encoded(
        prompt=ids(n_prompt),
        lines=steps,
        step_texts=steps,
        rest_text=[],
        answer=ids(n_answer),
        n_before_answer=1,
        source="",
    )


# ---- what is timed -------------------------------------------------------------------------------


class Work(NamedTuple):
    """Something to time."""

    run: Callable  # (side): forwards, and backwards and update if there are any
    n_token: int  # tokens and latents that it reads or writes


def works(case):
    """{name: Work}: everything that is timed."""
    case.set_ragged(False)

    # One optimizer for all works: its moments take twice the memory of the weights
    update = update_of(case)
    return {
        **sft_works(case, update),
        "prompt and latents": latents_work(case),
        **rl_works(case, update),
        "evaluation": evaluation_work(case),
    }


def update_of(case):
    """The function update(loss): a backward pass and an optimizer step."""
    optimizer = GuardedOptimizer(build_optimizer(case.cfg, case.model), case.model, clip=1.0)
    optimizer.lr = 0.0  # every round has the same weights

    def update(loss):
        loss.backward()
        optimizer.step(loss, problems=[])
        # `check`, which training calls at every log line, would empty it; nothing does so here
        optimizer.unchecked.clear()

    return update


def sft_works(case, update):
    """An SFT step at the first, a middle and the last stage of the curriculum."""
    K = case.model.K

    def train(side, stage):
        # Collating is a part of every side's time, as it is of a training step's
        batch, eps = case.batch(stage)
        update(total_loss(side.losses(batch, eps), batch.counts, WEIGHTS))

    sft = {}
    for name, stage in (("first", 0), ("middle", (K + 1) // 2), ("last", K + 1)):
        batch, _ = case.batch(stage)

        # What π reads up to its last latent, and what π and φ have to write
        n_read = batch.prompt_mask.sum() + batch.thinking.n_latent.sum()
        n_written = (batch.text.target >= 0).sum() + (batch.steps.target >= 0).sum()
        n_token = int(n_read + n_written)
        sft[f"SFT, {name} stage"] = Work(partial(train, stage=stage), n_token)
    return sft


def latents_work(case):
    """The prompt and the chain of latents alone, forwards and backwards."""
    model = case.model

    def think_and_back(side):
        batch, eps = case.batch(model.K + 1)
        # any loss would do that has a gradient at every latent
        side.thoughts(batch, eps).sum().backward()
        model.zero_grad(set_to_none=True)

    batch, _ = case.batch(model.K + 1)
    return Work(think_and_back, int(batch.prompt_mask.sum() + batch.thinking.n_latent.sum()))


def rl_works(case, update):
    """The parts of an RL step: rollouts, reading their thoughts, and the update."""
    model, G = case.model, case.size.G
    model.stage = model.K + 1
    prompt, prompt_mask = case.prompts(case.size.questions)

    # Drawn once, so that every side explores the same chains in every round
    noise = Noise.draw(model, len(prompt) * G, MAX_NEW, seed=1).to(case.device)

    # One batch of chains, which every side reads and learns from
    chains = rollout(model, prompt, prompt_mask, MAX_NEW, noise, G)
    n_token = int(chains.n_latent.sum() + chains.n_token.sum())
    z = chains.z.unflatten(1, (model.K, -1)).flatten(0, 1)  # (N, c, D)

    # Random advantages do: the work does not depend on their values
    g = torch.Generator().manual_seed(2)
    advantage = torch.randn(len(chains.z), 1, generator=g).to(case.device)

    # The three parts, in the order of a training step
    def explore(side):
        model.stage = model.K + 1
        side.rollout(prompt, prompt_mask, MAX_NEW, noise, G)

    def read(side):
        side.read_thoughts(z, case.decoder_eos, MAX_NEW)

    def learn(side):
        # The paper's estimator, score. Against itself every ratio is 1: plain REINFORCE
        logp_z, logp_stop, logp_token = side.log_probs(prompt, prompt_mask, chains, G)[:3]
        logp = torch.cat((logp_z, logp_stop, logp_token), 1)
        loss, _ = surrogate(logp, logp.detach(), advantage)
        update(loss.sum() / len(logp))

    return {
        "rollouts": Work(explore, n_token),
        "reading thoughts": Work(read, len(z) * MAX_NEW),
        "RL update": Work(learn, n_token),
    }


def evaluation_work(case):
    """Greedy answers of the mean policy."""
    model = case.model
    prompt, prompt_mask = case.prompts(case.size.evaluated)

    def evaluate(side):
        model.stage = model.K + 1
        batch_size = len(prompt) if side.batched_evaluation else 1
        for i in range(0, len(prompt), batch_size):
            rows = slice(i, i + batch_size)
            side.rollout(prompt[rows], prompt_mask[rows], MAX_NEW)

    return Work(evaluate, len(prompt) * (model.c * model.K + MAX_NEW))


# ---- the same results ----------------------------------------------------------------------------


def compare(case, every):
    """{name: Side} without those that do not compute what minatp computes.

    Losses, gradients and log-probabilities must agree in float32, chains and thoughts must be the
    same. Raises UserError if minatp does not even agree with itself.
    """
    # minatp's chains, greedy and sampled, two of each question, which every side scores and reads
    case.set_ragged(True)
    case.model.stage = case.model.K + 1
    minatp = every["minatp"]
    prompts = case.prompts(case.size.check)
    chains = [minatp.rollout(*prompts, MAX_NEW, noise, 2) for noise in (None, check_noise(case))]

    # minatp is compared, too, with a second run of itself
    same = dict(every)
    for name, side in every.items():
        if not side.bf16:  # the reference once more: in float32 they are the same
            continue
        error, equal = difference(case, side, minatp, chains)
        if error <= TOLERANCE and equal:
            print0(
                f"{name:18} same losses, gradients, log-probabilities (to {error:.0e}), chains "
                "and thoughts"
            )
        else:
            which = "the same" if equal else "other"
            print0(
                f"{name:18} DIFFERS from minatp (by {error:.1e}, {which} chains): it is not "
                "timed; report it"
            )
            # nor is it timed in float32
            del same[name]
            same.pop(f"{name} float32", None)
    if "minatp" not in same:
        raise UserError(
            "minatp/bench/cases.py:0: minatp does not compute the same twice, so there is "
            "nothing to time; report it"
        )
    return same


def difference(case, side, minatp, chains):
    """(largest relative error of a side's tensors, whether what must be equal is equal)."""
    largest, all_equal = 0.0, True

    # Both sides compute piece by piece, so that only one piece of each is in memory
    pairs = zip(results(case, side, chains), results(case, minatp, chains))
    for (tensors, exact), (expected_tensors, expected_exact) in pairs:
        largest = worse(largest, largest_error(tensors, expected_tensors))
        all_equal = all_equal and exact == expected_exact
    return largest, all_equal


def results(case, side, chains):
    """Yield what a side computes in float32, as pairs (tensors, what has to be equal).

    A piece at a time, because the gradients of three stages do not fit a GPU at the paper's size.
    chains: minatp's Rollouts, which every side scores and reads.
    """
    model = case.model
    K, c = model.K, model.c

    # SFT at three stages
    for stage in (0, (K + 1) // 2, K + 1):
        yield losses_and_gradients(case, side, stage), None

    # Chains, greedy and sampled: how many latents, and which words
    prompt, prompt_mask = case.prompts(case.size.check)
    for noise in (None, check_noise(case)):
        r = side.rollout(prompt, prompt_mask, MAX_NEW, noise, 2)
        words = [ids[:n] for ids, n in zip(r.token.tolist(), r.n_token.tolist())]
        yield [], (r.n_latent.tolist(), words)

    # Of minatp's chains: the log-probabilities, and every used thought in words
    log_probabilities = []
    for r in chains:
        parts = side.log_probs(prompt, prompt_mask, r, 2)[:3]
        log_probabilities += [logp.detach().flatten() for logp in parts]
    steps = torch.cat([r.z for r in chains]).unflatten(1, (K, c))  # (B, K, c, D)
    n_latent = torch.cat([r.n_latent for r in chains])
    used = torch.arange(K, device=steps.device) * c < n_latent[:, None]  # (B, K)
    yield log_probabilities, side.read_thoughts(steps[used], case.decoder_eos, MAX_NEW)


def losses_and_gradients(case, side, stage):
    """The losses of a side at one stage, and the gradient of each parameter, as flat tensors."""
    model = case.model

    batch, eps = case.batch(stage, case.rows[: case.size.check])
    losses = side.losses(batch, eps)
    total_loss(losses, batch.counts, WEIGHTS).backward()

    # Sorted by name, because sides compute their losses in different orders. A parameter that has a
    # gradient on one side alone makes the lists differ in length, which `largest_error` notices
    tensors = [losses[name].detach().view(1) for name in sorted(losses)]
    tensors += [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return tensors


def check_noise(case):
    """The Noise of the compared chains.

    With a large vocabulary the words are greedy. Untrained, all words have about the same
    probability, less than a hundred times float32's rounding of their sum, so that two sides would
    now and then draw neighbouring words.
    """
    n_chain = 2 * case.size.check
    greedy = case.model.policy.cfg.vocab_size > 10**4
    return Noise.draw(case.model, n_chain, MAX_NEW, 3, greedy=greedy).to(case.device)


def largest_error(tensors, expected):
    """The largest relative L2 error of a list of tensors; infinite if one is missing."""
    if len(tensors) != len(expected):
        return math.inf
    largest = 0.0
    for x, y in zip(tensors, expected):
        # the clamp keeps 0/0 from being NaN: if both are 0 everywhere, they agree
        if len(x):
            largest = worse(largest, float((x - y).norm() / y.norm().clamp(min=1e-12)))
    return largest


def worse(a, b):
    """The larger of two errors. NaN is the worst of all."""
    return a if math.isnan(a) or a > b else b
