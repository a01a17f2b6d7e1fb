"""How fast minatp is, beside the same model as others drive it (minatp/bench/peer.py), in one run.

    python -m minatp.bench                      a small model on a CPU; exits with 1 if a count
                                                misses its gate
    python -m minatp.bench --preset llama-1b    one GPU: the paper's size, bf16 compute over
                                                float32 masters
    python -m minatp.bench --preset llama-1b --fake
                                no GPU: its launches, bytes, FLOPs, waits and recordings, counted,
                                and a modelled time; exits with 1 after a fault, or if a gate that
                                was met is missed. With --works each operation is shown, too

A side must compute the same losses, gradients, chains and log-probabilities, or it is not timed.
All sides take turns, round by round, and a ratio is that of two times of the same round: median
[p10, p90]. Counts (minatp/tools/count.py) do not depend on the machine's load, so it is counts that
have gates. Weights are untrained and shared by all sides; in what is timed no chain ends early.
"""

import json
import math
import os
import statistics
import time
from contextlib import ExitStack, nullcontext
from dataclasses import asdict
from functools import partial
from unittest.mock import patch

import torch

from kernels.common import HAS_TRITON, is_out_of_memory

from ..run.build import llama_config, n_parameters
from ..run.device import autocast, pick_device
from ..run.errors import OutOfMemory, UserError, run_command
from ..run.options import PRESETS, Config, Parser, among
from ..run.saved import replace_file
from ..run.terminal import print0
from ..sft import sft_losses, total_loss
from ..tools import count
from .cases import MAX_NEW, SIZES, WEIGHTS, Case, compare, paper_row, sides, works

# How many times fewer operations, bytes or FLOPs minatp must need than the reference. What it
# reaches is in docs/results.md
GATES = {
    ("SFT, last stage", "ops"): 4,
    ("SFT, last stage", "bytes"): 8,
    ("rollouts", "flops"): 25,
}

# How many times less wall time minatp should need: shown and not enforced
TARGETS = {"SFT, last stage": 2.5, "rollouts": 8}

# Of a side that is not counted: on a GPU all but minatp; and any that runs out of memory while
# PyTorch's operations are counted in place of the kernels
UNCOUNTED = count.Counts(ops=math.nan, bytes=math.nan, flops=math.nan, waits=math.nan)


def main(argv=None):
    # The model, and which sides and works are wanted
    args = parse(argv)
    if args.fake:
        return count_without_gpu(args)
    device = pick_device(args.device or {"tiny": "cpu", "llama-1b": "cuda"}[args.preset])
    case = Case(args.preset, device)

    # minatp itself always stays: every ratio is to its time and its counts
    every = sides(case.model, device)
    chosen_sides = among("--sides", args.sides, every)
    chosen_works = among("--works", args.works, works(case))
    every = {name: every[name] for name in every if name == "minatp" or name in chosen_sides}
    print0(
        f"{args.preset} on {device}, torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"{n_parameters(case.model):,} parameters"
    )

    # --out holds all figures so far: each call replaces the whole file
    def save(**figures):
        if args.out:
            record = {"preset": args.preset, "device": str(device), "torch": torch.__version__}
            replace_file(args.out, json.dumps(record | figures, indent=2) + "\n")

    def save_records(records):
        save(work=records)

    # Compare, and time only the sides that compute the same. Every figure is saved at once
    same = compare(case, every)
    records = measure_all(case, same, chosen_works, args.rounds, save_records)
    growth = [] if args.works else measure_growth(case, *fit_prices(records), args.rounds)
    memory = describe_memory()

    # Gates hold for the whole benchmark on the small model
    has_gates = args.preset == "tiny" and "reference" in same and not args.works

    # A side that computes something else is a miss on any preset
    misses = [f"{name} is not the same computation" for name in every if name not in same]
    if has_gates:
        misses += missed_gates(records)
    save(work=records, growth=growth, memory=memory, missed=misses)
    describe_targets(records)
    for miss in misses:
        print0(f"gate missed: {miss}")
    if has_gates and not misses:
        print0("all gates of counts met")
    return int(bool(misses))


def count_without_gpu(args):
    """The exit code of --fake. Raises UserError."""
    if not HAS_TRITON:
        raise UserError("command line: --fake needs triton, which is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UserError("command line: TRITON_INTERPRET=1 leaves --fake no kernels; unset it")

    from . import fake  # here, because it cannot be imported without Triton

    return fake.main(args)


def parse(argv):
    """The command line. Raises UserError."""
    parser = Parser(__doc__, "minatp.bench")
    add = parser.add_argument
    add("--preset", default="tiny", help="tiny | llama-1b [%(default)s]")
    add("--rounds", type=int, default=5, help="how often each work is timed [%(default)s]")
    add("--sides", default="", help="what to time beside minatp, separated by semicolons [all]")
    add(
        "--works",
        default="",
        help="what is timed, or counted with --fake, separated by semicolons; growth only if all "
        "of it is timed [all]",
    )
    add("--device", default="", help="cpu | cuda | cuda:N [tiny: cpu; llama-1b: cuda]")
    add("--fake", action="store_true", help="count what a GPU would do, without one: llama-1b only")
    add("--layers", type=int, default=16, help="of both LMs, with --fake [%(default)s]")
    add("--out", default="", help="also write all figures to this JSON file")
    args = parser.parse_args(argv)
    if args.preset not in SIZES:
        raise UserError(
            f"command line: --preset must be one of {', '.join(SIZES)}, not {args.preset!r}"
        )
    if args.rounds < 1:
        raise UserError(f"command line: --rounds must be positive, not {args.rounds}")
    if args.fake and args.preset != "llama-1b":
        raise UserError("command line: --fake counts the steps of llama-1b: add --preset llama-1b")
    if args.fake and (args.sides or args.device):
        raise UserError("command line: --fake compares and times nothing: drop --sides, --device")
    if args.layers < 1:
        raise UserError(f"command line: --layers must be positive, not {args.layers}")
    return args


# ---- times and counts of one work ----------------------------------------------------------------


def time_once(work, device, bf16=True):
    """(seconds, peak bytes of a GPU or 0) of work()."""
    on_gpu = device.type == "cuda"

    # Earlier work must not run into this time, nor its memory into this peak
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)

    # Every call opens an autocast of its own, so on a GPU its time includes casts of the weights
    start = time.perf_counter()
    with autocast(device) if bf16 else nullcontext():
        work()

    # A GPU works on after work() has returned
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    return seconds, torch.cuda.max_memory_allocated(device) if on_gpu else 0


def count_once(work, device, bf16=True):
    """Counts of work(), under the autocast under which it is timed.

    PyTorch's operations stand in for the kernels, whose launches and products no count can see.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, MINATP_KERNELS="torch"))
        if bf16:
            stack.enter_context(autocast(device))
        return count.count(work)


def attempt(work, model, failures=None, name=None):
    """work(), or None if it runs out of memory; cached memory is then freed.

    failures: a dict, of a peer. Whatever the peer raises then ends this work for it and nothing
    else, and failures[name] is the reason.
    """
    try:
        return work()
    except Exception as e:
        # after a CUDA error nothing in this process can use the GPU
        is_lost = "CUDA error" in str(e)
        if is_out_of_memory(e):
            reason = "ran out of memory"
        elif failures is None or is_lost:
            raise
        else:
            reason = f"failed ({type(e).__name__}: {' '.join(str(e).split())[:120]})"
    # after the except clause, whose traceback holds on to what was computed
    if failures is not None:
        failures[name] = reason
    model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()


# ---- every work by every side --------------------------------------------------------------------


def measure_all(case, every, names, rounds, save):
    """The records (see `measure`) of the works in `names`, printed one by one.

    save: a function that is given all records so far after each of them.
    """
    records = []
    for name, work in works(case).items():
        if name not in names:
            continue

        # Printed and saved at once: a later work may run out of memory
        failures = {}
        measured = measure(case, every, work, rounds, failures)
        record = {"work": name, "tokens": work.n_token, "sides": measured}
        records.append(record)
        describe(record, case)
        save(records)
        for side, reason in failures.items():
            print0(f"    {side:18} {reason}: no time, and no win for minatp")
    return records


def measure(case, every, work, rounds, failures):
    """Time one work, all sides in turn, and count it.

    Returns {side: {"seconds": [one a round], "peak": bytes, and the fields of count.Counts}},
    without the sides that fail: `failures` receives {side: why}. Raises OutOfMemory if minatp runs
    out of memory, and whatever else minatp raises.
    """
    counts = warm_up(case, every, work, failures)
    names = list(counts)
    seconds = {name: [] for name in names}
    peak = dict.fromkeys(names, 0)
    for i in range(rounds):
        # Each round starts with another side, so that none is always the first
        first = i % len(names)
        for name in names[first:] + names[:first]:
            side = every[name]
            once = partial(time_once, partial(work.run, side), case.device, side.bf16)
            timed = attempt(once, case.model, *of_peer(name, failures))

            # A side that fails in any round is not timed at all
            if timed is None:
                names.remove(name)
                continue
            seconds[name].append(timed[0])
            peak[name] = max(peak[name], timed[1])
        need_minatp(names, case)
    return {name: {"seconds": seconds[name], "peak": peak[name], **counts[name]} for name in names}


def of_peer(name, failures):
    """The last arguments of `attempt`: what minatp raises is raised."""
    return () if name == "minatp" else (failures, name)


def warm_up(case, every, work, failures):
    """{side: counts} of the sides that do not fail at a work. Compiles every kernel."""
    counts = {}
    for name, side in every.items():
        # Not timed: sides that fail or have too little memory drop out here. On a GPU twice: the
        # second call records the graphs that are kept
        run = partial(work.run, side)
        once = partial(time_once, run, case.device, side.bf16)
        n_call = 2 if case.machine else 1
        timed = (attempt(once, case.model, *of_peer(name, failures)) for _ in range(n_call))
        if any(each is None for each in timed):
            continue

        # On a GPU only minatp is counted: to count the reference there takes minutes
        counted = None
        if not case.machine or name == "minatp":
            counted = attempt(partial(count_once, run, case.device, side.bf16), case.model)
        counts[name] = asdict(counted or UNCOUNTED)
    need_minatp(counts, case)
    return counts


def need_minatp(names, case):
    """Raise OutOfMemory if minatp is not among the sides that have enough memory."""
    if "minatp" not in names:
        raise OutOfMemory(
            f"minatp/bench/__main__.py:0: minatp itself runs out of memory on {case.device}; "
            "use a larger GPU"
        )


def time_ratio(record, side):
    """(median, p10, p90) of another side's seconds over minatp's in the same round."""
    # What slows the machine for a whole round slows both times of a pair, and cancels
    own = record["sides"]["minatp"]["seconds"]
    ratios = sorted(b / a for a, b in zip(own, record["sides"][side]["seconds"]))

    def quantile(q):
        return ratios[round(q * (len(ratios) - 1))]

    return statistics.median(ratios), quantile(0.1), quantile(0.9)


def count_ratio(record, side, what):
    """How many times as many ops, bytes or flops as minatp another side needs."""
    return record["sides"][side][what] / record["sides"]["minatp"][what]


def missed_gates(records):
    """One sentence for each gate that is not met."""
    by_name = {record["work"]: record for record in records}
    misses = []
    for (work, what), least in GATES.items():
        ratio = count_ratio(by_name[work], "reference", what)
        if ratio < least:
            misses.append(
                f"{work}: only {ratio:.1f} × fewer {what} than the reference; the gate is {least} ×"
            )
    return misses


# ---- what is printed -----------------------------------------------------------------------------


def describe(record, case):
    """Print one work's times, ratios and counts."""
    # minatp's own time and counts
    own = record["sides"]["minatp"]
    seconds = statistics.median(own["seconds"])
    lines = [
        "",
        f"{record['work']:20}{1e3 * seconds:9.1f} ms "
        f"{record['tokens'] / seconds:11,.0f} tokens/s   {own['ops']:,} operations, "
        f"{own['bytes'] / 1e9:.2f} GB, {own['flops'] / 1e9:.2f} GFLOP",
    ]

    # On a GPU: how close that is to what the machine could do
    if case.machine:
        least = Floor(case).seconds(record["work"], own["flops"])
        lines.append(
            f"{'':20}{own['flops'] / seconds / case.machine.flops:9.0%} of the product rate, "
            f"{least / seconds:.0%} of the floor of {1e3 * least:.1f} ms, "
            f"peak {own['peak'] / 2**30:.1f} GiB"
        )

    # The other sides, as multiples of minatp
    for side in record["sides"]:
        if side == "minatp":
            continue
        middle, low, high = time_ratio(record, side)
        lines.append(
            f"    {side:18}{middle:6.1f} × the time [{low:.1f}, {high:.1f}]   "
            f"× operations {count_ratio(record, side, 'ops'):.1f}   "
            f"× bytes {count_ratio(record, side, 'bytes'):.1f}   "
            f"× FLOPs {count_ratio(record, side, 'flops'):.1f}"
        )
    print0("\n".join(lines))


def describe_targets(records):
    """Print the wall times that have a target."""
    shown = []
    for record in records:
        work = record["work"]
        if work in TARGETS and "reference" in record["sides"]:
            middle, _, _ = time_ratio(record, "reference")
            shown.append(f"{work} {middle:.1f} × (target {TARGETS[work]})")
    print0(f"\nwall time, shown and not gated: {', '.join(shown)}")


def describe_memory():
    """Print how much memory an SFT step of the paper's size needs. Returns the bytes by part."""
    # Nothing of this size is allocated: weights are counted on the meta device, activations on
    # narrow models. 3: the tokens that latents add to the vocabulary
    cfg = Config(**{**PRESETS["llama-1b"], "epochs": "1"})
    llama = llama_config(cfg, cfg.vocab_size + 3)
    row = paper_row(cfg.vocab_size)
    parts = count.training_memory(llama, cfg.K, cfg.c, cfg.batch_size, row)
    lean = count.training_memory(llama, cfg.K, cfg.c, cfg.batch_size, row, recompute=True)

    def gigabytes(n):
        return f"{n / 1e9:.1f} GB"

    by_part = ", ".join(f"{name} {gigabytes(n)}" for name, n in parts.items())
    print0(
        f"\nmemory of an SFT step at Llama-3.2-1B's size, last stage, batch {cfg.batch_size}, "
        f"K {cfg.K}, {len(row.prompt)} tokens of question (computed, not measured): "
        f"{gigabytes(sum(parts.values()))}\n    {by_part}\n"
        f"    with --recompute {gigabytes(sum(lean.values()))}: "
        f"activations {gigabytes(lean['activations'])}"
    )
    return parts


# ---- the least time ------------------------------------------------------------------------------


class Floor:
    """The least time that each work can take on the case's GPU.

    Products run at the measured product rate. Positions that are read one after another each read
    the weights, and the keys and values up to their own. AdamW reads and writes 28 bytes a
    parameter.
    """

    def __init__(self, case):
        model, self.size, self.machine = case.model, case.size, case.machine
        self.llama = model.policy.cfg
        self.c, self.K = model.c, model.K
        self.n_prompt = max(len(row.prompt) for row in case.rows)
        self.n_layer_parameter = n_parameters(model.policy.model.layers)

        # AdamW in float32 reads weight, gradient and two moments, and writes all but the gradient
        self.adamw = 28 * n_parameters(model) / self.machine.bandwidth
        self.adamw_decoder = 28 * n_parameters(model.decoder) / self.machine.bandwidth

    def seconds(self, work, flops):
        """Least seconds of a work (a name of `works`) that needs so many FLOPs."""
        size, n_chain = self.size, self.size.questions * self.size.G

        # The works of RL, and evaluation. Generation takes its positions one after another
        if work == "reading thoughts":  # the c latents at once, then all words but the last
            return self.one_by_one(MAX_NEW, n_chain * self.K, self.c, logits=True)
        if work == "RL update":  # it leaves the decoder as it is
            return flops / self.machine.flops + self.adamw - self.adamw_decoder
        if work == "rollouts":
            return self.generation(size.questions, n_chain)
        if work == "evaluation":
            return self.generation(size.evaluated, size.evaluated)

        # Forwards and backwards. An SFT step has an update, too; `prompt and latents` has none
        seconds = self.training(work, flops)
        return seconds + self.adamw if work.startswith("SFT") else seconds

    def one_by_one(self, n_pass, rows, T, logits):
        """n_pass passes, each of one position of `rows` sequences, whose length is T at the first.

        Each makes its sequence longer by one.
        """
        # The products of a pass
        n_parameter = self.n_layer_parameter
        if logits:
            n_parameter += self.llama.vocab_size * self.llama.n_embd
        products = 2 * rows * n_parameter / self.machine.flops

        # Each pass is limited by them, or by reading weights, keys and values
        seconds = 0.0
        for length in range(T, T + n_pass):
            bytes_read = count.pass_bytes(self.llama, rows, length, logits)
            seconds += max(bytes_read / self.machine.bandwidth, products)
        return seconds

    def generation(self, n_prompt, rows):
        """Read n_prompt prompts, then think and write in `rows` rows."""
        n, T = self.c * self.K, self.n_prompt

        # The tokens of all prompts are read at once, so the products are the limit
        prompts = 2 * self.n_layer_parameter * n_prompt * T / self.machine.flops

        # Then n latents, <|end-latent|> and all words but the last, one after another. Only words
        # need logits
        thinking = self.one_by_one(n, rows, T + 1, logits=False)
        writing = self.one_by_one(MAX_NEW, rows, T + n + 1, logits=True)
        return prompts + thinking + writing

    def training(self, work, flops):
        """Forwards and backwards, with the chain of latents one by one.

        Its weight gradients can wait for the end. (minatp/chain.py reads the weights three times.)
        """
        # Latent steps of the stage. `prompt and latents` has all K, as the last stage has
        n_step = {"SFT, first stage": 0, "SFT, middle stage": (self.K + 1) // 2}.get(work, self.K)
        n, rows = self.c * n_step, self.size.batch

        # One latent after another, forwards, then the gradient of its input: each reads the weights
        chain = 2 * self.one_by_one(n, rows, self.n_prompt + 1, logits=False)

        # All other FLOPs, weight gradients included, are large products
        flops_of_chain = 4 * n * rows * self.n_layer_parameter
        return (flops - flops_of_chain) / self.machine.flops + chain


# ---- how time grows ------------------------------------------------------------------------------


def fit_prices(records):
    """(seconds per operation, seconds per FLOP) that explain minatp's times best.

    Least squares of the relative errors; neither price is negative.
    """
    # Of each work: seconds, operations, FLOPs. Those that could not be counted tell nothing
    own = [record["sides"]["minatp"] for record in records]
    own = [figures for figures in own if math.isfinite(figures["ops"])]
    seconds = [statistics.median(figures["seconds"]) for figures in own]
    seconds = torch.tensor(seconds, dtype=torch.float64)[:, None]
    counts = [[figures["ops"], figures["flops"]] for figures in own]

    # Solve price · counts / seconds = 1
    A = torch.tensor(counts, dtype=torch.float64) / seconds
    ones = torch.ones(len(own), 1, dtype=torch.float64)
    per_op, per_flop = torch.linalg.lstsq(A, ones).solution[:, 0].tolist()

    if per_op >= 0 and per_flop >= 0:
        return per_op, per_flop

    # If one price would be negative, the other explains it all: least squares again, of one column
    op_alone, flop_alone = (A.sum(0) / A.square().sum(0)).tolist()
    return (op_alone, 0.0) if per_flop < 0 else (0.0, flop_alone)


def measure_growth(case, per_op, per_flop, rounds):
    """Print how minatp's SFT step of the last stage grows with K, the batch and the question.

    Beside each time is the time that its counts predict at the two prices. The step is forwards and
    backwards. Returns a list of records.
    """
    # One of three sizes varies, the other two stay at the base
    model, K = case.model, case.model.K
    base = {"K": K, "batch": case.size.batch // 2, "question": 64}
    print0(
        f"\nSFT step of the last stage, forwards and backwards; base: K {K}, "
        f"batch {base['batch']}, {base['question']} tokens of question\n"
        f"predicted: {1e6 * per_op:.1f} µs an operation and {1e12 * per_flop:.1f} ms a GFLOP, "
        "fitted to the times above\n"
        "                 operations     GFLOP   predicted ms   measured ms"
    )

    records = []
    for name in base:
        for value in (base[name] // 2, base[name], 2 * base[name], 4 * base[name]):
            step = growth_step(case, **{**base, name: value})
            once = partial(time_once, step, case.device)
            timed = [attempt(once, model) for _ in range(rounds + 1)]
            timed = timed[1:]  # the first compiles kernels
            if None in timed:
                print0(f"{name:>9}{value:5}   out of memory")
                continue

            # Measured beside predicted
            counts = attempt(partial(count_once, step, case.device), model) or UNCOUNTED
            seconds = statistics.median(seconds for seconds, _ in timed)
            predicted = per_op * counts.ops + per_flop * counts.flops
            figures = {**asdict(counts), "predicted": predicted, "seconds": seconds}
            records.append({"varied": name, "value": value, **figures})
            print0(
                f"{name:>9}{value:5}{counts.ops:14,}{counts.flops / 1e9:10.2f}"
                f"{1e3 * predicted:15.1f}{1e3 * seconds:14.1f}"
            )

    # growth_step has changed it
    model.K = K
    return records


def growth_step(case, K, batch, question):
    """A function that runs an SFT step of the last stage, forwards and backwards.

    Every one of its `batch` problems has K steps and a question of so many tokens. Sets model.K.
    """
    model = case.model
    model.K = K

    # Ids below 256 are in the vocabulary of both presets
    rows = [paper_row(256, question, K)] * batch
    collated, eps = case.batch(K + 1, rows)

    def step():
        losses = sft_losses(model, collated, eps)
        total_loss(losses, collated.counts, WEIGHTS).backward()
        model.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    run_command(main)
