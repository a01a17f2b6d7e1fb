"""python -m minatp.bench --preset llama-1b --fake: what minatp costs on a GPU, without one.

Each work below runs three times on the fake GPU (fake_gpu.py), and the last run is counted: graphs
that are kept have been recorded by then. As in a process of its own, no kernel has been compiled
before the first.

The exit code is 1 after a fault, or if a gate is missed that was met before (`GATES`).
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch

from kernels import ops, replayed_chain

from .. import data, decoder, rl, rollout, sft
from ..latent import ATP
from ..llama import Llama
from ..optim import build_optimizer
from ..run.build import llama_config
from ..run.loop import GuardedOptimizer
from ..run.options import PRESETS, Config, among
from ..run.saved import replace_file
from ..run.terminal import print0
from .cases import MAX_NEW, SIZES, WEIGHTS, paper_row
from .fake_gpu import META, FakeGPU, install, set_region

N_LAYER = 16
SIZE = SIZES["llama-1b"]
READ_WORDS = 24  # that φ writes for a thought

# No wait is allowed in these regions, nor in those within them
NO_WAITS = ("chain", "thinking", "writing", "prompt", "optimizer")


# ---- what runs -----------------------------------------------------------------------------------


class Works:
    """llama-1b with so many layers on the meta device, its optimizer, and what they work on."""

    def __init__(self, gpu, n_layer):
        self.gpu = gpu
        cfg = {**PRESETS["llama-1b"], "epochs": "1", "n_layer": n_layer, "optimizer": "adamw"}
        self.cfg = Config(**cfg)
        vocab_size = self.cfg.vocab_size + 3

        # On the meta device its 2.5 billion parameters (at 16 layers) take no memory
        with META:
            self.model = ATP(llama_config(self.cfg, vocab_size), **self.cfg.switches)
        self.model.end = vocab_size - 1
        optimizer = build_optimizer(self.cfg, self.model)
        self.optimizer = GuardedOptimizer(optimizer, self.model, clip=1.0)
        self.optimizer.lr = 1e-4
        torch.manual_seed(0)

    def by_name(self):
        """{name: function}: what is counted. A function prepares a work, and returns it."""
        return {
            "SFT, first stage": partial(self.sft, 0),
            "SFT, last stage": partial(self.sft, self.model.K + 1),
            "rollouts": self.rollouts,
            "reading thoughts": self.reading,
            "reading half of them": partial(self.reading, 0.5),
            "score": self.score,
            "update": self.update,
            "evaluation": self.evaluation,
        }

    # ---- stage 1 ----

    def sft(self, stage):
        """A step on one micro-batch."""
        rows = [paper_row(self.model.end) for _ in range(SIZE.batch)]
        gradients = self.sft_gradients(stage, rows)

        def step():
            loss = gradients()
            self.optimizer_step(loss)

        return step

    def sft_gradients(self, stage, rows):
        """A forward and a backward pass, as train.sft_gradients does them."""
        model, gpu = self.model, self.gpu
        model.stage = stage
        batch = data.collate(rows, stage, model)
        counts = batch.counts

        # All lengths are known. From here on tensors have shapes alone; the noise is keys
        batch = batch.to(META)
        eps = ops.noise_keys(0, len(rows), model.c * model.K).to(META)

        def work():
            model.stage = stage
            with gpu.region("everything else, forward"), torch.autocast("meta"):
                loss = sft.total_loss(sft.sft_losses(model, batch, eps), counts, WEIGHTS)
            with gpu.region("everything else, backward"):
                loss.backward()
            return loss

        return work

    def optimizer_step(self, loss):
        with self.gpu.region("optimizer"):
            self.optimizer.step(loss, problems=[])
        self.optimizer.unchecked.clear()

    # ---- stage 2 ----

    def prompts(self, n):
        rows = [paper_row(self.model.end) for _ in range(n)]
        return data.left_pad([row.prompt for row in rows], self.model.end, META)

    def rollouts(self):
        """A batch of rollouts, whose rows all take the full length."""
        self.model.stage = self.model.K + 1
        prompt, prompt_mask = self.prompts(SIZE.questions)
        noise = rollout.Noise.draw(self.model, SIZE.questions * SIZE.G, MAX_NEW, seed=1)
        noise = noise.to(META)

        def explore():
            with self.gpu.region("rollouts"), torch.autocast("meta"):
                return rollout.rollout(self.model, prompt, prompt_mask, MAX_NEW, noise, SIZE.G)

        return explore

    def reading(self, share=1.0):
        """φ reads every thought of this share of the rollouts: those whose answer is right."""
        n_thought = round(share * SIZE.questions * SIZE.G) * self.model.K
        z = torch.zeros(n_thought, self.model.c, self.model.policy.cfg.n_embd, device=META)

        def read():
            with self.gpu.region("reading"), torch.autocast("meta"):
                decoder.read_thoughts(self.model.decoder, z, -1, READ_WORDS)

        return read

    def score(self):
        """The log-probability of what the rollouts sampled, and its gradient."""
        model, gpu = self.model, self.gpu
        chains = self.rollouts()()
        prompt, prompt_mask = self.prompts(SIZE.questions)
        advantage = torch.zeros(len(chains.z), 1, device=META)

        def learn():
            with gpu.region("score, forward"), torch.autocast("meta"):
                new = rl.log_probs(model, prompt, prompt_mask, chains, SIZE.G)
                logp = torch.cat((new.logp_z, new.logp_stop, new.logp_token), 1)
                loss, _ = rl.surrogate(logp, logp.detach(), advantage)
                loss = loss.sum() / len(logp)
            with gpu.region("score, backward"):
                loss.backward()
            self.model.zero_grad(set_to_none=True)

        return learn

    def update(self):
        """RL's step of the optimizer: all but φ has a gradient."""
        model = self.model
        loss = torch.zeros((), device=META)
        parameters = [p for name, p in model.named_parameters() if not name.startswith("decoder.")]

        def step():
            for p in parameters:
                p.grad = torch.empty_like(p)
            self.optimizer_step(loss)

        return step

    def evaluation(self):
        """Greedy answers of the mean policy."""
        prompt, prompt_mask = self.prompts(SIZE.evaluated)

        def evaluate():
            self.model.stage = self.model.K + 1
            with self.gpu.region("evaluation"), torch.autocast("meta"):
                rollout.rollout(self.model, prompt, prompt_mask, MAX_NEW)

        return evaluate


def fake_gpu():
    """A FakeGPU that minatp takes for a GPU from now on. Parts of the works have regions."""
    # Without graphs the loops ask the device which rows are done
    gpu = FakeGPU(() if os.environ.get("MINATP_GRAPHS") == "0" else NO_WAITS)
    install(gpu, MAX_NEW)
    name_regions(gpu)
    return gpu


def name_regions(gpu):
    for module in (sft, rl, rollout):
        set_region(gpu, module, "read_prompt", "prompt, forward")
    set_region(gpu, sft, "walk", "chain, forward")
    set_region(gpu, sft, "thought_nll", "decoder, forward")
    set_region(gpu, replayed_chain.ReplayedChain, "backward", "chain, backward")
    set_region(gpu, rollout, "think", "thinking")
    for module in (rollout, decoder):
        set_region(gpu, module, "write", "writing")
    for owner, name in ((Llama, "step"), (Llama, "logits"), (ATP, "propose"), (ops, "sample")):
        set_region(gpu, owner, name)


# ---- what is counted -----------------------------------------------------------------------------


@dataclass
class Counts:
    """What one work costs. Every replay of a graph counts."""

    launches: int
    bytes: int
    flops: int
    waits: int  # of the host for the device
    late_waits: int  # for what the device did before the last step
    recordings: int
    specialisations: int
    ms: float  # by the model
    device_ms: float  # of which the device computes


def run(gpu, prepare):
    """The Counts of a work. gpu keeps its regions."""
    with gpu:
        gpu.begin_process()
        gpu.begin()  # what `prepare` runs is of no earlier work
        work = prepare()
        # The first runs without graphs, the second records those that are kept, the third counts
        for _ in range(3):
            gpu.begin()
            work()
    regions = gpu.regions.values()
    return Counts(
        launches=sum(region.times * region.launches.total() for region in regions),
        bytes=sum(region.times * region.bytes.total() for region in regions),
        flops=sum(region.times * region.flops for region in regions),
        waits=gpu.waits.total(),
        late_waits=gpu.late_waits,
        recordings=gpu.n_recording,
        specialisations=len(gpu.launched),
        ms=gpu.clock.now / 1e3,
        device_ms=sum(region.times * region.us for region in regions) / 1e3,
    )


def count_recordings(gpu, n_batch):
    """How many graphs so many SFT steps of the last stage record, with batches of many shapes."""
    works = Works(gpu, n_layer=1)
    model = works.model
    rows = random_rows(16 * SIZE.batch, model.end)
    order = data.batches([row.length for row in rows], SIZE.batch, seed=0)
    with gpu:
        gpu.begin_process()
        gpu.begin()
        for _, chosen in zip(range(n_batch), order):
            gradients = works.sft_gradients(model.K + 1, [rows[i] for i in chosen])
            gradients()
            model.zero_grad(set_to_none=True)
    return gpu.n_recording


def specialisations(n_layer, n_batch):
    """The variants of all kernels that the works meet, and SFT steps of n_batch batches.

    Replaces parts of torch, for good.
    """
    gpu = fake_gpu()
    for prepare in Works(gpu, n_layer).by_name().values():
        run(gpu, prepare)
    count_recordings(gpu, n_batch)
    return list(gpu.specialisations.values())


def random_rows(n, vocab_size):
    """Problems of random ids, with lengths as those of GSM8k-Aug vary."""
    g = torch.Generator().manual_seed(0)
    n_prompt = (60 * torch.exp(0.45 * torch.randn(n, generator=g))).clamp(20, 220).long().tolist()
    n_step = torch.randint(1, 9, (n,), generator=g).tolist()
    step_length = torch.randint(6, 14, (n,), generator=g).tolist()
    n_answer = torch.randint(3, 8, (n,), generator=g).tolist()
    lengths = zip(n_prompt, n_step, step_length, n_answer)
    return [paper_row(vocab_size, *four) for four in lengths]


# ---- gates ---------------------------------------------------------------------------------------

# The least that each work can take on an H200, in ms: products at 790 TFLOP/s; latents and words
# that read the weights one after another at 4.3 TB/s; 28 bytes a parameter for AdamW
FLOORS = {
    "SFT, first stage": 60.0,
    "SFT, last stage": 127.0,
    "rollouts": 22.8,
    "reading thoughts": 99.1,
    "reading half of them": 49.5,
    "score": 48.4,
    "update": 8.6,
}
# φ reads the chains whose answer is right: here half of them, or at most all
RL_STEP = ("rollouts", "reading half of them", "score", "update")
RL_STEP_AT_MOST = ("rollouts", "reading thoughts", "score", "update")

# The model's constants (fake_gpu.py) were chosen once, by these estimates of others:
#
#                                              estimated       model
#     latent step, forward                         1.24        1.18  ms
#     latent step, backward                        3.6         3.71
#     step of a rollout                            2.05        1.97
#     SFT, first stage                            97          92.8
#     SFT, last stage                            265 – 290   279.3
#     rollouts, those of cf08be8                  99 – 109    96
#     reading thoughts                           164         164.5
#     RL step, with the rollouts of cf08be8      375 – 470   363


@dataclass
class Gate:
    """A figure, and the most that it should be."""

    name: str
    most: float
    figure: Callable  # (Measured) -> the figure
    # Whether a miss makes the exit code 1. Set it to True in the change that first meets the gate
    holds: bool


@dataclass
class Measured:
    """All that the gates look at."""

    counts: dict  # work -> Counts
    regions: dict  # work -> {name: Region}
    n_recording: int  # of 100 SFT steps

    def launches(self, work, region, n):
        """Launches of a recorded step of a region, its parts included. The loop has n steps."""
        regions = self.regions[work]
        parts = [regions[name] for name in regions if name.split(":")[0] == f"{region}, graph"]
        if not parts:  # nothing was recorded
            return math.nan

        # A graph is one step, and is replayed for each but the first, or it is all n of them
        n_launch = sum(part.launches.total() for part in parts)
        return n_launch / n if parts[0].n_replay == 1 else n_launch

    def plumbing(self):
        """GB that the backward pass of SFT's last stage moves, but for products and kernels."""
        n_byte = 0
        for name, region in self.regions["SFT, last stage"].items():
            if "backward" in name and ", graph" not in name:
                for operation, n in region.bytes.items():
                    if not operation.startswith("triton:") and operation not in PRODUCTS:
                        n_byte += n
        return n_byte / 1e9


SDPA = "aten._scaled_dot_product_efficient_attention"
PRODUCTS = {"aten.mm", "aten.bmm", "aten.addmm", SDPA, f"{SDPA}_backward"}

# Of the paper: latents of a chain, and of a step of thought
N_LATENT = 20
C = 2


def latent_step(measured):
    return measured.launches("SFT, last stage", "chain, forward", N_LATENT)


def latent_backward_step(measured):
    return measured.launches("SFT, last stage", "chain, backward", N_LATENT)


def thinking_tick(measured):
    return measured.launches("rollouts", "thinking", N_LATENT // C) / C


def writing_tick(measured):
    return measured.launches("rollouts", "writing", MAX_NEW)


def waits_of_sft(measured):
    return measured.counts["SFT, last stage"].waits


def waits_of_a_tick(measured):
    return measured.counts["rollouts"].late_waits / (N_LATENT + MAX_NEW)


def sft_ms(measured):
    return measured.counts["SFT, last stage"].ms


def rl_ms(measured):
    return sum(measured.counts[work].ms for work in RL_STEP)


def recordings(measured):
    return measured.n_recording


GATES = [
    Gate("launches of a latent step", 165, latent_step, holds=True),
    Gate("launches of a latent's backward step", 350, latent_backward_step, holds=True),
    Gate("launches of a thinking tick", 200, thinking_tick, holds=True),
    Gate("launches of a writing tick", 220, writing_tick, holds=True),
    Gate("waits of the host, an SFT micro-batch", 1, waits_of_sft, holds=True),
    Gate("waits of the host, a tick of a rollout", 0.25, waits_of_a_tick, holds=True),
    Gate("GB moved beside products, SFT backward", 45, Measured.plumbing, holds=True),
    Gate("ms, SFT last stage", 190, sft_ms, holds=True),
    Gate("ms, RL step, half of the answers right", 275, rl_ms, holds=True),
    Gate("recordings in 100 SFT steps", 12, recordings, holds=True),
]


# ---- tables --------------------------------------------------------------------------------------


def main(args):
    """Returns the exit code. args: the command line of python -m minatp.bench."""
    gpu = fake_gpu()
    works = Works(gpu, args.layers).by_name()
    chosen = among("--works", args.works, works)

    # A line a work
    print0(
        f"llama-1b with {args.layers} layers, on a GPU that is not there\n"
        "late: waits for what the device did before its last step; variants: of Triton kernels;\n"
        "ms: by the model in minatp/bench/fake_gpu.py; device: for so long the device computes\n\n"
        "work                  launches       GB    TFLOP waits late recordings variants"
        "        ms  (device)    floor"
    )
    counts, regions = {}, {}
    for name in works:
        if name in chosen:
            counts[name] = run(gpu, works[name])
            regions[name] = gpu.regions
            print_work(name, counts[name], FLOORS.get(name) if args.layers == N_LAYER else None)
    if args.works:  # looked at more closely
        for name in chosen:
            print_regions(name, regions[name])

    # The gates are those of all works at full depth
    missed = []
    if not args.works and args.layers == N_LAYER:
        print_rl_step(counts)
        missed = print_gates(Measured(counts, regions, count_recordings(gpu, 100)))
    save(args.out, counts, regions, gpu.faults, missed)
    for fault in sorted(set(gpu.faults)):
        print0(f"FAULT: {fault}")
    return int(bool(missed or gpu.faults))


def print_work(name, counts, floor):
    print0(
        f"{name:20}{counts.launches:10,}{counts.bytes / 1e9:9.1f}{counts.flops / 1e12:9.2f}"
        f"{counts.waits:6}{counts.late_waits:5}{counts.recordings:11}{counts.specialisations:9}"
        f"{counts.ms:10.1f}{counts.device_ms:10.1f}" + (f"{floor:9.1f}" if floor else "")
    )


def print_regions(work, regions):
    """A line a region, and its operations by bytes. A graph's launches are those of one replay."""
    for name, region in regions.items():
        replays = f" × {region.n_replay} replays" if region.n_replay else ""
        print0(
            f"\n{work} > {name}: {region.launches.total():,} launches, "
            f"{region.bytes.total() / 1e9:.3f} GB, {region.flops / 1e12:.3f} TFLOP, "
            f"{region.us / 1e3:.3f} ms{replays}"
        )
        for operation, n_byte in region.bytes.most_common():
            n_launch = region.launches[operation]
            print0(f"    {operation:50}{n_launch:6,} launches{n_byte / 1e9:10.4f} GB")


def print_rl_step(counts):
    """The sum of its works. How much φ reads depends on the answers."""
    print0("")
    for answers, works in (("half of the answers", RL_STEP), ("all answers", RL_STEP_AT_MOST)):
        ms = sum(counts[work].ms for work in works)
        floor = sum(FLOORS[work] for work in works)
        print0(f"RL step, {answers} right: {ms:.1f} ms, floor {floor:.1f}")


def print_gates(measured):
    """A line a gate. Returns those that are missed and should hold."""
    print0(f"\n{'gate':42}{'now':>9}{'most':>9}")
    missed = []
    for gate in GATES:
        figure = gate.figure(measured)
        is_met = figure <= gate.most
        verdict = "met" if is_met else "missed"
        if gate.holds and not is_met:
            verdict = "MISSED, and was met before"
            missed.append(gate.name)
        print0(f"{gate.name:42}{figure:9.1f}{gate.most:9g}  {verdict}")
    return missed


def save(path, counts, regions, faults, missed):
    """Write all figures to --out, if it is given."""
    if not path:
        return
    works = {}
    for name, each in counts.items():
        parts = {}
        for part, region in regions[name].items():
            parts[part] = {
                "launches": region.launches.total(),
                "kernels": sum(n for op, n in region.launches.items() if op.startswith("triton:")),
                "bytes": region.bytes.total(),
                "flops": region.flops,
                "us": region.us,
                "replays": region.n_replay,
            }
        works[name] = {**asdict(each), "regions": parts}
    record = {"works": works, "faults": faults, "missed": missed}
    replace_file(path, json.dumps(record, indent=2) + "\n")
