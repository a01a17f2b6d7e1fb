"""How fast minatp is, beside the same model as others drive it (minatp/peer.py), in one run.

    python -m minatp.bench                        a small model on a CPU; ends with code 1 where a count misses its gate
    python -m minatp.bench --preset llama-1b      one GPU: the paper's size, bf16 compute over float32 masters

A side must compute the same losses, gradients, chains and log-probabilities, or it is not timed. The rounds are timed in turn, and a ratio is
that of two times of one round: median [p10, p90]. Counts (minatp/count.py) do not swing with load, so they
are what is gated. Weights are untrained and shared by all sides; in what is timed no chain ends early.
"""

import json
import math
import os
import statistics
import time
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from unittest.mock import patch

import torch

from kernels.common import is_out_of_memory

from ..run.build import llama_config, n_parameters
from ..run.device import autocast, pick_device
from ..run.errors import OutOfMemory, UserError, run_command
from ..run.options import PRESETS, Config, Parser, among
from ..run.saved import replace_file
from ..run.terminal import print0
from ..sft import sft_losses, total_loss
from ..tools import count
from .cases import BETA, MAX_NEW, SIZES, Case, compare, paper_row, sides, works

GATES = {
    ("SFT, last stage", "ops"): 4,
    ("SFT, last stage", "bytes"): 8,
    ("rollouts", "flops"): 25,
}  # × fewer than the reference
TARGETS = {"SFT, last stage": 2.5, "rollouts": 8}  # × less wall time: shown


# ---- times --------------------------------------------------------------------------------------------------------------


def seconds_of(work, device, bf16=True):
    """(seconds, peak bytes of a GPU or 0) of work()."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    with autocast(device) if bf16 else nullcontext():
        work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, torch.cuda.max_memory_allocated(device) if on_gpu else 0


def counted(work, device, bf16=True):
    """Counts of work() under the autocast that its times have. PyTorch's operations stand in for the kernels, whose launches and
    products no count sees."""
    with (
        patch.dict(os.environ, MINATP_KERNELS="torch"),
        autocast(device) if bf16 else nullcontext(),
    ):
        return count.count(work)


def attempt(did, model):
    """did(), or None where the GPU runs out of memory, which is then made free again."""
    try:
        return did()
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
    model.zero_grad(set_to_none=True)  # outside the except, which holds on to what was computed
    torch.cuda.empty_cache()


UNCOUNTED = count.Counts(
    *[math.nan] * 4
)  # PyTorch's operations, which are counted, can need memory that the kernels do not


def warm_up(work, every, case):
    """{name: counts} of the sides that a work fits on the device with; every kernel is compiled then."""
    counts = {}
    for s, side in every.items():
        once = (partial(work, side), case.device, side.bf16)
        if attempt(lambda: seconds_of(*once), case.model):
            told = (
                not case.machine or s == "minatp"
            )  # of a GPU's peers the times alone are: to count the reference takes minutes
            counts[s] = asdict(told and attempt(lambda: counted(*once), case.model) or UNCOUNTED)
    need_minatp(counts, case)
    return counts


def need_minatp(fits, case):
    if "minatp" not in fits:
        raise OutOfMemory(
            f"minatp/bench.py:0: minatp itself runs out of memory on {case.device}; take a larger GPU"
        )


def measure(case, every, rounds, save=lambda found: None, only=()):
    """[{"work", "tokens", "sides": {name: {"seconds": [of each round], "peak", counts}}}] of the works named in `only`, of all where it is
    empty; save: is given it after each work."""
    found = []
    for name, (work, n_token) in works(case).items():
        if only and name not in only:
            continue
        counts = warm_up(work, every, case)
        fits, times, peak = list(counts), {s: [] for s in counts}, dict.fromkeys(counts, 0)
        for i in range(rounds):
            for s in fits[i % len(fits) :] + fits[: i % len(fits)]:
                if timed := attempt(
                    lambda: seconds_of(partial(work, every[s]), case.device, every[s].bf16),
                    case.model,
                ):
                    times[s].append(timed[0])
                    peak[s] = max(peak[s], timed[1])
                else:
                    fits.remove(s)
            need_minatp(fits, case)
        found.append(
            {
                "work": name,
                "tokens": n_token,
                "sides": {s: {"seconds": times[s], "peak": peak[s], **counts[s]} for s in fits},
            }
        )
        describe(found[-1], case)
        save(found)
        for s in every.keys() - fits:
            print0(f"    {s:18} ran out of memory: no time, and no win")
    return found


def ratio(record, other):
    """(median, p10, p90) of the paired ratios of another side's seconds to minatp's."""
    pairs = sorted(
        b / a
        for a, b in zip(record["sides"]["minatp"]["seconds"], record["sides"][other]["seconds"])
    )
    at = lambda q: pairs[round(q * (len(pairs) - 1))]
    return statistics.median(pairs), at(0.1), at(0.9)


def fewer(record, other, what):
    """How many times fewer ops, bytes or flops minatp needs than another side."""
    return record["sides"][other][what] / record["sides"]["minatp"][what]


def describe(record, case):
    """Print one work's times, ratios and counts."""
    own = record["sides"]["minatp"]
    seconds = statistics.median(own["seconds"])
    text = (
        f"\n{record['work']:20}{1e3 * seconds:9.1f} ms {record['tokens'] / seconds:11,.0f} tokens/s   {own['ops']:,} operations, "
        f"{own['bytes'] / 1e9:.2f} GB, {own['flops'] / 1e9:.2f} GFLOP"
    )
    if case.machine:
        least = floor(case, record["work"], own["flops"])
        text += (
            f"\n{'':20}{own['flops'] / seconds / case.machine.flops:9.0%} of the product rate, {least / seconds:.0%} of the floor of "
            f"{1e3 * least:.1f} ms, peak {own['peak'] / 2**30:.1f} GiB"
        )
    for name in list(record["sides"])[1:]:
        middle, low, high = ratio(record, name)
        text += (
            f"\n    {name:18}{middle:6.1f} × the time [{low:.1f}, {high:.1f}]   × operations {fewer(record, name, 'ops'):.1f}   "
            f"× bytes {fewer(record, name, 'bytes'):.1f}   × FLOPs {fewer(record, name, 'flops'):.1f}"
        )
    print0(text)


def floor(case, work, flops):
    """Least seconds of one of `works` on the case's machine: products at the product rate; passes of one position after another
    that each read the weights; AdamW, which reads and writes 28 bytes a parameter."""
    model, size, m = case.model, case.size, case.machine
    cfg, n, rows = model.policy.cfg, model.c * model.K, size["questions"] * size["G"]
    count_of = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())
    layers, Tq = count_of(model.policy.model.layers), max(len(r.prompt) for r in case.rows)

    def one_by_one(passes, rows, T, words):
        """Seconds of so many positions of each row, logits or not."""
        return passes * max(
            count.pass_bytes(cfg, rows, T, words) / m.bandwidth,
            2 * rows * (layers + words * cfg.vocab_size * cfg.n_embd) / m.flops,
        )

    adamw = 28 * count_of(model) / m.bandwidth
    if work == "reading thoughts":
        return one_by_one(MAX_NEW, rows * model.K, model.c + MAX_NEW, True)
    if work == "RL update":
        return flops / m.flops + adamw - 28 * count_of(model.decoder) / m.bandwidth
    if work in ("rollouts", "evaluation"):
        asked, rows = (size["questions"], rows) if work == "rollouts" else (size["evaluated"],) * 2
        return (
            2 * layers * asked * Tq / m.flops
            + one_by_one(n, rows, Tq + n, False)
            + one_by_one(MAX_NEW, rows, Tq + n + MAX_NEW, True)
        )
    n = {"SFT, first stage": 0, "SFT, middle stage": model.c * ((model.K + 1) // 2)}.get(work, n)
    chain = 2 * one_by_one(
        n, size["batch"], Tq + n, False
    )  # forwards and backwards; weight gradients can wait (minatp/chain.py reads thrice)
    return (
        (flops - 4 * n * size["batch"] * layers) / m.flops + chain + adamw * work.startswith("SFT")
    )


def missed(found):
    """What to say of each gate that is not met."""
    by_name = {r["work"]: r for r in found}
    return [
        f"{work}: only {got:.1f} × fewer {what} than the reference, and {least} × are asked for"
        for (work, what), least in GATES.items()
        if (got := fewer(by_name[work], "reference", what)) < least
    ]


# ---- how time grows -----------------------------------------------------------------------------------------------------


def fit(found):
    """Seconds per operation and per FLOP that explain minatp's times of `found` best, in relative error; neither is negative."""
    own = [o for r in found if math.isfinite((o := r["sides"]["minatp"])["ops"])]
    seconds = torch.tensor([statistics.median(o["seconds"]) for o in own], dtype=torch.float64)
    A = torch.tensor([[o["ops"], o["flops"]] for o in own], dtype=torch.float64) / seconds[:, None]
    both = torch.linalg.lstsq(A, torch.ones(len(own), 1, dtype=torch.float64)).solution[:, 0]
    if both.min() >= 0:
        return both.tolist()
    alone = 1 / A.mean(0)  # one of them explains it all
    return [float(alone[0]), 0.0] if both[1] < 0 else [0.0, float(alone[1])]


def growth(case, per_op, per_flop, rounds):
    """Print how minatp's SFT step of the last stage (forwards and backwards) grows with K, batch and question, beside what its
    counts predict at the two prices. Returns the rows."""
    model, K, rows = case.model, case.model.K, []
    base = {"K": K, "batch": case.size["batch"] // 2, "question": 64}
    vary = [
        (key, value)
        for key in base
        for value in (base[key] // 2, base[key], 2 * base[key], 4 * base[key])
    ]
    print0(
        f"\nSFT step of the last stage, forwards and backwards; base: K {K}, batch {base['batch']}, {base['question']} tokens of question"
        f"\npredicted: {1e6 * per_op:.1f} µs an operation and {1e12 * per_flop:.1f} ms a GFLOP, fitted to the times above"
        "\n                 operations     GFLOP   predicted ms   measured ms"
    )
    for key, value in vary:
        at = {**base, key: value}
        model.K = at["K"]
        batch, eps = case.batch(
            at["K"] + 1, rows=[paper_row(256, at["question"], at["K"])] * at["batch"]
        )

        def step():
            total_loss(sft_losses(model, batch, eps), batch.counts, BETA).backward()
            model.zero_grad(set_to_none=True)

        timed = [attempt(lambda: seconds_of(step, case.device), model) for _ in range(rounds + 1)][
            1:
        ]  # kernels are compiled in the first
        if None in timed:
            print0(f"{key:>9}{value:5}   out of memory")
            continue
        c, seconds = (
            attempt(lambda: counted(step, case.device), model) or UNCOUNTED,
            statistics.median(s for s, _ in timed),
        )
        predicted = per_op * c.ops + per_flop * c.flops
        rows.append(
            {"varied": key, "value": value, **asdict(c), "predicted": predicted, "seconds": seconds}
        )
        print0(
            f"{key:>9}{value:5}{c.ops:14,}{c.flops / 1e9:10.2f}{1e3 * predicted:15.1f}{1e3 * seconds:14.1f}"
        )
    model.K = K
    return rows


def describe_memory():
    """Print what an SFT step of the paper's size needs. Returns the bytes by part."""
    cfg = Config(**{**PRESETS["llama-1b"], "epochs": "1"})
    row = paper_row(cfg.vocab_size)
    parts = count.training_memory(
        llama_config(cfg, cfg.vocab_size + 3), cfg.K, cfg.c, cfg.batch_size, row
    )
    lean = count.training_memory(
        llama_config(cfg, cfg.vocab_size + 3), cfg.K, cfg.c, cfg.batch_size, row, recompute=True
    )
    gb = lambda n: f"{n / 1e9:.1f} GB"
    print0(
        f"\nmemory of an SFT step at Llama-3.2-1B's size, last stage, batch {cfg.batch_size}, K {cfg.K}, {len(row.prompt)} tokens of "
        f"question (computed, not measured): {gb(sum(parts.values()))}\n    "
        + ", ".join(f"{k} {gb(v)}" for k, v in parts.items())
        + f"\n    with --recompute {gb(sum(lean.values()))}: activations {gb(lean['activations'])}"
    )
    return parts


def main(argv=None):
    parser = Parser(__doc__, "minatp.bench")
    parser.add_argument("--preset", default="tiny", help="tiny | llama-1b [%(default)s]")
    parser.add_argument(
        "--rounds", type=int, default=5, help="times that each is timed [%(default)s]"
    )
    parser.add_argument(
        "--sides", default="", help="whom minatp is timed beside, separated by semicolons [all]"
    )
    parser.add_argument(
        "--works",
        default="",
        help="what is timed, likewise; how time grows is told where it is all [all]",
    )
    parser.add_argument(
        "--device", default="", help="cpu | cuda | cuda:N [tiny: cpu; llama-1b: cuda]"
    )
    parser.add_argument("--out", default="", help="write every figure to this JSON file as well")
    args = parser.parse_args(argv)
    if args.preset not in SIZES:
        raise UserError(
            f"command line: --preset must be one of {', '.join(SIZES)}, not {args.preset!r}"
        )
    if args.rounds < 1:
        raise UserError(f"command line: --rounds must be positive, not {args.rounds}")
    device = pick_device(args.device or {"tiny": "cpu", "llama-1b": "cuda"}[args.preset])
    case = Case(args.preset, device)
    every = sides(case.model, device)
    chosen, only = among("--sides", args.sides, every), among("--works", args.works, works(case))
    every = {name: side for name, side in every.items() if name == "minatp" or name in chosen}
    print0(
        f"{args.preset} on {device}, torch {torch.__version__}, {torch.get_num_threads()} threads; {n_parameters(case.model):,} parameters"
    )
    same = compare(case, every)
    record = {"preset": args.preset, "device": str(device), "torch": torch.__version__}
    save = lambda **more: (
        args.out and replace_file(args.out, json.dumps(record | more, indent=2) + "\n")
    )
    found = measure(case, same, args.rounds, lambda found: save(work=found), only)
    rows = [] if args.works else growth(case, *fit(found), args.rounds)
    memory = describe_memory()
    gated = args.preset == "tiny" and "reference" in same and not args.works
    misses = [f"{name} is not the same computation" for name in every if name not in same] + (
        missed(found) if gated else []
    )
    save(work=found, growth=rows, memory=memory, missed=misses)
    shown = ", ".join(
        f"{work} {ratio(r, 'reference')[0]:.1f} × (target {TARGETS[work]})"
        for r in found
        if (work := r["work"]) in TARGETS and "reference" in r["sides"]
    )
    print0(
        f"\nwall time, shown and not gated: {shown}"
        + "".join(f"\ngate missed: {m}" for m in misses)
        + ("\nall gates of counts met" if gated and not misses else "")
    )
    return int(bool(misses))


if __name__ == "__main__":
    run_command(main)
