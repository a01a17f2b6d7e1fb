"""One lease of a GPU: does it work, what does it cost, where does the time go.

    python3 -m minatp.bench.lease PRESET DEVICE OUT [part …]

PRESET is tiny or llama-1b, and OUT a folder. The parts, in this order by default:

loss      the losses of a batch by kernels and by PyTorch, in float32 and in bf16
verify    the error of each Triton kernel over PyTorch's own (kernels/bench.py), and sampled words
same      gradients with CUDA graphs against those without, in float32
memory    whether steps of changing shapes leave memory behind
sft       times of SFT steps, and how long the host takes to launch them
rl        times of rollouts, of reading their thoughts, and of the policy gradient
profile   kernels by time, in profile_sft.txt and profile_rollouts.txt

If a part fails, the others run all the same, but for one thing: after a CUDA error, or a CUDA graph
that could not be recorded, no part of this process could use the GPU, so it ends, with exit code 3.
Each figure is written to OUT/lease.json as soon as it is known, because a lease can end at any
moment. lease.sh makes the most of ten minutes.
"""

import json
import math
import os
import statistics
import time
import traceback
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from kernels import bench, graph, sampling

from ..decoder import read_thoughts
from ..optim import build_optimizer
from ..rl import log_probs, surrogate
from ..rollout import Noise, rollout
from ..run.device import autocast, pick_device
from ..run.errors import UserError, run_command
from ..run.loop import GuardedOptimizer
from ..run.options import Parser, among
from ..sft import sft_losses, total_loss
from .cases import MAX_NEW, SIZES, WEIGHTS, Case

LOST_CONTEXT = 3  # exit code: no later part of this process could use the GPU


def main(argv=None):
    parser = Parser(__doc__, "minatp.bench.lease")
    add = parser.add_argument
    add("preset", choices=SIZES)
    add("device", help="cpu | cuda | cuda:N")
    add("out", type=Path, help="folder for the figures")
    add("parts", nargs="*", metavar="part", help="see above [all]")
    add("--rounds", type=int, default=5, help="most times that each work is timed [%(default)s]")
    args = parser.parse_args(argv)
    parts = among("part", ";".join(args.parts), PARTS)
    if args.rounds < 1:
        raise UserError(f"command line: --rounds must be positive, not {args.rounds}")

    # A part that fails does not keep the others from running, as long as the GPU can be used
    lease = Lease(args.preset, pick_device(args.device), args.out, args.rounds)

    for name in parts:
        try:
            lease.reset_peak_memory()
            PARTS[name](lease)
        # whatever it is, the figures of the other parts are worth having
        except (Exception, graph.CaptureFailed) as e:
            lease.report(f"FAILED {name}", f"{type(e).__name__}: {str(e)[:400]}")
            traceback.print_exc(limit=-6)
            is_lost = lease.on_gpu and "CUDA error" in str(e)
            if is_lost or isinstance(e, graph.CaptureFailed):
                return LOST_CONTEXT  # lease.sh continues with its next process
            # what a failed part leaves in the gradients would change the next part's
            lease.model.zero_grad(set_to_none=True)
    return 0


class Lease:
    """The case that every part works on, a stopwatch, and the figures so far."""

    def __init__(self, preset, device, out, rounds):
        self.start = time.perf_counter()
        self.device, self.on_gpu = device, device.type == "cuda"
        self.out, self.figures = out, {}
        self.rounds = rounds  # most times that a work is timed
        out.mkdir(parents=True, exist_ok=True)

        # What is worked on
        self.case = Case(preset, device)
        self.model = self.case.model
        self.recording_ms = []  # of each CUDA graph recorded so far: the host's ms
        self.watch_recordings()

        # The machine, and what a large copy and a large product reach on it
        machine = self.case.machine
        self.report(
            "on",
            {
                "device": torch.cuda.get_device_name() if self.on_gpu else "cpu",
                "torch": torch.__version__,
                "ceilings": machine and vars(machine),
            },
        )

    def watch_recordings(self):
        """Time every recording of a CUDA graph from now on."""
        # kernels.graph looks `record` up at every call, so replacing it there reaches all callers
        real_record = graph.record

        def timed_record(work, device):
            start = time.perf_counter()
            result = real_record(work, device)
            self.recording_ms.append(1e3 * (time.perf_counter() - start))
            return result

        graph.record = timed_record

    def report(self, name, value):
        """Add a figure to lease.json, and print it."""
        self.figures[name] = value
        (self.out / "lease.json").write_text(json.dumps(self.figures, indent=1))
        seconds = time.perf_counter() - self.start
        print(f"[{seconds:6.1f} s] {name}: {json.dumps(value)[:900]}", flush=True)

    def reset_peak_memory(self):
        """Forget the peak so far, so that a part reports its own."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def synchronize(self):
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def time(self, work, n=5, n_warm=2):
        """{"ms": median, "least": ms, "recordings": a call, "host ms of them": a call} of work().

        n: how often it is timed, after n_warm calls that are not; both at most self.rounds.
        """
        # The first calls compile kernels and fill PyTorch's pool of memory
        n, n_warm = min(n, self.rounds), min(n_warm, self.rounds)
        for _ in range(n_warm):
            work()

        # The GPU must be idle when a call begins, and done when its time is taken
        ms, n_recording = [], len(self.recording_ms)
        for _ in range(n):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            ms.append(1e3 * (time.perf_counter() - start))

        # How much of it went into recording graphs
        recording_ms = self.recording_ms[n_recording:]
        return {
            "ms": statistics.median_high(ms),
            "least": min(ms),
            "recordings": len(recording_ms) / n,
            "host ms of them": sum(recording_ms) / n,
        }


def without_graphs(work):
    """work() as if there were no CUDA graphs."""
    with patch.dict(os.environ, MINATP_GRAPHS="0"):
        return work()


# ---- loss ----------------------------------------------------------------------------------------


def loss(lease):
    """The losses of a batch by kernels and by PyTorch, in float32 and in bf16.

    In bf16 both are off by rounding, and the kernels should be no further off than PyTorch.
    """
    rows = lease.case.rows[:8]

    def losses(in_bf16):
        values, _, _ = gradients(lease, rows, in_bf16)
        return values

    by_kernels = {name: losses(name == "bf16") for name in ("float32", "bf16")}
    with patch.dict(os.environ, MINATP_KERNELS="torch", MINATP_GRAPHS="0"):
        by_pytorch = {name: losses(name == "bf16") for name in ("float32", "bf16")}

    exact = by_pytorch["float32"]
    for name, values in (
        ("kernels in float32", by_kernels["float32"]),
        ("kernels in bf16", by_kernels["bf16"]),
        ("PyTorch in bf16", by_pytorch["bf16"]),
    ):
        differences = {key: (values[key] - exact[key]) / abs(exact[key]) for key in exact}
        lease.report(f"losses by {name}, over PyTorch's in float32, less 1", differences)


# ---- verify --------------------------------------------------------------------------------------


def verify(lease):
    """The error of each kernel in bf16 over PyTorch's own, both against float64."""
    # Without a GPU: the same cases at shapes that a CPU computes in seconds, for a test
    make_cases = bench.cases if lease.on_gpu else bench.small_cases
    for case in make_cases(lease.device, torch.bfloat16):
        try:
            lease.report(f"error of {case.name} over PyTorch's", round(bench.verify(case), 3))
        except Exception as e:  # the other kernels' errors are worth having
            lease.report(f"FAILED {case.name}", f"{type(e).__name__}: {str(e)[:300]}")
    lease.report("sampled words that are wrong", wrong_words(lease))


def wrong_words(lease):
    """How many of the words that the kernel draws are not those of float64's cumulative softmax.

    A word is right if u lies in its interval, or within 1e-5 of it.
    """
    # A batch of rollouts of llama-1b; without a GPU a few rows, for a test
    R, V = (128, 128259) if lease.on_gpu else (4, 67)
    torch.manual_seed(0)
    logits = (3 * torch.randn(R, V, device=lease.device)).bfloat16()
    u = torch.rand(R, device=lease.device)
    word, _ = sampling.fused_sample(logits, u)

    # Its interval ends at the cumulative probability, and is as long as its own
    p = logits.double().softmax(-1)
    end = p.cumsum(-1).gather(1, word[:, None])[:, 0]
    begin = end - p.gather(1, word[:, None])[:, 0]
    is_right = (u > begin - 1e-5) & (u < end + 1e-5)
    return int((~is_right).sum())


# ---- same, memory --------------------------------------------------------------------------------


def same(lease):
    """Chains by CUDA graphs against the same chains by autograd, in float32.

    Batches of two sizes come one after another: an address of an earlier batch would show.
    """
    case, model = lease.case, lease.model
    for i, rows in enumerate(ragged_batches(case.rows)):
        # With graphs, then by autograd, on the same rows and noise
        work = partial(gradients, lease, rows, in_bf16=False)
        with_graphs = work()
        plain = without_graphs(work)
        lease.report(f"same {i}", compare_gradients(with_graphs, plain))
    model.zero_grad(set_to_none=True)


def ragged_batches(rows):
    """Four batches of some Encoded rows, whose chains have many lengths.

    The first, the third and the fourth have one size: that is run, recorded and replayed. The
    second, between them, has fewer and shorter questions.
    """
    # In each eight one row keeps all of its steps
    ragged = []
    for i, row in enumerate(rows[:24]):
        n = len(row.lines) - i % min(8, len(row.lines))
        ragged.append(replace(row, lines=row.lines[:n], step_texts=row.step_texts[:n]))
    short_prompts = [replace(row, prompt=row.prompt[:37]) for row in ragged[8:13]]
    return ragged[:8], short_prompts, ragged[8:16], ragged[16:]


def compare_gradients(with_graphs, plain):
    """How far two results of `gradients` differ, in the gradients that both of them have."""
    losses, norms, samples = with_graphs
    plain_losses, plain_norms, plain_samples = plain

    # The norm of every gradient; and the direction of some, which a norm does not show
    differences = []
    for name, norm in plain_norms.items():
        if name in norms:
            differences.append((abs(norms[name] - norm) / (norm + 1e-12), name))
    cosines = []
    for name, sample in plain_samples.items():
        if name in samples:
            cosines.append(float(F.cosine_similarity(samples[name], sample, 0)))

    # "keys": whether both ways give the same parameters a gradient
    return {
        "losses": losses,
        "without graphs": plain_losses,
        "norms differ by": largest_difference(differences),
        "least cosine": least(cosines),
        "keys": norms.keys() == plain_norms.keys(),
    }


def largest_difference(differences):
    """The largest of (difference, name) pairs. NaN is the largest of all."""

    def size(pair):
        difference, name = pair
        return (math.inf if math.isnan(difference) else difference), name

    return max(differences, key=size)


def least(values):
    """The least of some numbers. NaN if one is NaN."""
    return math.nan if any(math.isnan(x) for x in values) else min(values)


def gradients(lease, rows, in_bf16=True):
    """SFT's last stage on some Encoded rows.

    in_bf16: on a GPU, under autocast.

    Returns ({loss: sum}, {parameter: norm of its gradient}, {parameter: part of its gradient}); the
    last holds six parameters.
    """
    case, model = lease.case, lease.model
    batch, eps = case.batch(model.K + 1, rows)
    with autocast(lease.device) if in_bf16 else nullcontext():
        losses = sft_losses(model, batch, eps)
        loss = total_loss(losses, batch.counts, WEIGHTS)
    loss.backward()

    # Norms of all, samples of the first and the last three
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = {name: grad.float().norm().item() for name, grad in grads.items()}
    names = [name for name, grad in grads.items() if grad.numel() > 100]
    samples = {}

    # A part of each is enough: the whole embedding of llama-1b would be 1 GB. (A short one has a
    # direction by chance)
    for name in names[:3] + names[-3:]:
        samples[name] = grads[name].float().flatten()[:200_000].clone()
    model.zero_grad(set_to_none=True)
    return {name: float(value.detach()) for name, value in losses.items()}, norms, samples


def memory(lease):
    """Whether steps of changing shapes leave memory behind."""
    if not lease.on_gpu:
        return

    # Nothing of a step should stay allocated after it: graphs or caches that stay would add up
    mebibytes = []
    for i in range(6):
        gradients(lease, lease.case.rows[: 8 + 3 * i])
        allocated, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        mebibytes.append((allocated >> 20, reserved >> 20))
    lease.report("MiB allocated, reserved after each step", mebibytes)


# ---- times ---------------------------------------------------------------------------------------


def sft_step(lease):
    """The function step(stage, update=True): an SFT step, with or without that of the optimizer."""
    case, model = lease.case, lease.model
    optimizer = GuardedOptimizer(build_optimizer(case.cfg, model), model, clip=1.0)
    optimizer.lr = 0.0  # every call has the same weights
    case.set_ragged(False)

    def step(stage, update=True):
        batch, eps = case.batch(stage)
        with autocast(lease.device):
            loss = total_loss(sft_losses(model, batch, eps), batch.counts, WEIGHTS)
        loss.backward()
        if update:
            optimizer.step(loss, problems=[])
            # `check`, which training calls at every log line, would empty it; nothing does so here
            optimizer.unchecked.clear()
        else:
            model.zero_grad(set_to_none=True)

    return step


def sft(lease):
    """Times of SFT steps at the first and the last stage, and their peak memory."""
    step, last_stage = sft_step(lease), lease.model.K + 1

    # All of a step, and its gradients alone: the difference is the optimizer's
    for stage in (0, last_stage):
        lease.report(f"SFT stage {stage}", lease.time(partial(step, stage)))
        gradients_only = lease.time(partial(step, stage, update=False))
        lease.report(f"SFT stage {stage}, no update", gradients_only)
        lease.report(f"SFT stage {stage}, ms of the host", host_times(lease, stage))

    # Memory, and what CUDA graphs are worth
    peak = torch.cuda.max_memory_allocated() / 2**30 if lease.on_gpu else 0
    lease.report("peak GiB", peak)
    plain = without_graphs(partial(lease.time, partial(step, last_stage), n=3, n_warm=1))
    lease.report("SFT last stage without graphs", plain)


def host_times(lease, stage):
    """ms that the host takes to launch each pass of an SFT step, and then waits for the GPU.

    A wait of nothing would mean that the GPU waits for the host. Medians of three.
    """
    case, model = lease.case, lease.model
    batch, eps = case.batch(stage)
    times = []
    for _ in range(3):
        lease.synchronize()
        begin = time.perf_counter()
        with autocast(lease.device):
            loss = total_loss(sft_losses(model, batch, eps), batch.counts, WEIGHTS)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        lease.synchronize()
        end = time.perf_counter()
        times.append((forward - begin, backward - forward, end - backward))
        model.zero_grad(set_to_none=True)
    medians = [1e3 * statistics.median(each) for each in zip(*times)]
    return dict(zip(("forward", "backward", "wait"), medians))


class Exploration:
    """A batch of rollouts to be made again and again; the last one is kept."""

    def __init__(self, lease):
        case, self.model = lease.case, lease.model
        self.device, self.G = lease.device, case.size.G
        self.prompt, self.prompt_mask = case.prompts(case.size.questions)
        n_chain = len(self.prompt) * self.G

        # Drawn once, so that all calls make the same chains until set_ragged changes the weights
        self.noise = Noise.draw(self.model, n_chain, MAX_NEW, seed=1).to(self.device)
        self.chains = None

    def __call__(self):
        self.model.stage = self.model.K + 1
        with autocast(self.device):
            self.chains = rollout(
                self.model, self.prompt, self.prompt_mask, MAX_NEW, self.noise, self.G
            )


def rl(lease):
    """Times of the parts of an RL step."""
    case, model = lease.case, lease.model

    # Rollouts of full length: the most work that there can be
    explore = Exploration(lease)
    case.set_ragged(False)
    lease.report("rollouts, full length", lease.time(explore, n=3))

    # Their thoughts in words, and the policy gradient with random advantages
    chains = explore.chains
    z = chains.z.unflatten(1, (model.K, -1)).flatten(0, 1)  # (N, c, D)
    advantage = torch.randn(len(chains.z), 1, device=lease.device)

    def read():
        with autocast(lease.device):
            read_thoughts(model.decoder, z, case.decoder_eos, MAX_NEW)

    def learn():
        with autocast(lease.device):
            # The paper's estimator, score: one pass over what was sampled
            new = log_probs(model, explore.prompt, explore.prompt_mask, chains, explore.G)
            logp = torch.cat((new.logp_z, new.logp_stop, new.logp_token), 1)
            each, _ = surrogate(logp, logp.detach(), advantage)
            loss = each.sum() / len(logp)
        loss.backward()
        model.zero_grad(set_to_none=True)

    lease.report("reading thoughts", lease.time(read, n=3, n_warm=1))
    lease.report("RL gradients", lease.time(learn, n=3, n_warm=1))

    # Chains that end at all lengths
    case.set_ragged(True)
    lease.report("rollouts, ragged", lease.time(explore, n=3))

    # Rows leave no batch as small as this one (graph.FEWEST_ROWS). If they did, the difference is
    # what leaving saves, less what recording anew costs
    with patch.object(graph, "FEWEST_ROWS", 2):
        lease.report("rollouts, ragged, rows leave", lease.time(explore, n=3))

    # What CUDA graphs are worth
    case.set_ragged(False)
    plain = without_graphs(partial(lease.time, explore, n=2, n_warm=1))
    lease.report("rollouts without graphs", plain)


def profile(lease):
    """Kernels by time: an SFT step of the last stage, and a batch of rollouts."""
    step = sft_step(lease)
    explore = Exploration(lease)

    def train():
        step(lease.model.K + 1)

    for name, work in (("sft", train), ("rollouts", explore)):
        # twice before: the first compiles kernels, the second records the graphs that are kept
        work()
        work()
        activity = ProfilerActivity.CUDA if lease.on_gpu else ProfilerActivity.CPU
        with torch_profile(activities=[activity]) as profiler:
            work()
            lease.synchronize()

        # the table goes to a file, its head to the figures
        key = "self_device_time_total" if lease.on_gpu else "self_cpu_time_total"
        events = profiler.key_averages()
        table = events.table(sort_by=key, row_limit=60, max_name_column_width=90)
        (lease.out / f"profile_{name}.txt").write_text(table)

        # Names that are cut can become equal: a Counter adds their times
        ms = Counter()
        for event in events:
            ms[f"{event.key[:60]} × {event.count}"] += getattr(event, key) / 1e3
        longest = {label: round(value, 2) for label, value in ms.most_common(14)}
        lease.report(f"profile {name}, ms", {"all": ms.total(), **longest})


# In this order by default: whether it is right comes before how fast it is
PARTS = {
    "loss": loss,
    "verify": verify,
    "same": same,
    "memory": memory,
    "sft": sft,
    "rl": rl,
    "profile": profile,
}


if __name__ == "__main__":
    run_command(main)
