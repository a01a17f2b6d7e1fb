"""How fast minatp is, beside the same model as others drive it (minatp/peer.py), in one run.

    python -m minatp.bench                        a small model on a CPU; ends with code 1 where a count misses its gate
    python -m minatp.bench --preset llama-1b      one GPU: the paper's size, bf16 compute over float32 masters

All must compute the same losses, gradients, chains and log-probabilities before anything is timed. Then the rounds are timed in
turn, and a ratio is that of two times of one round: median [p10, p90]. Counts (minatp/count.py) do not swing with load, so they
are what is gated. Weights are untrained and shared by all sides; in what is timed no chain ends early.
"""
import json
import math
import os
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from unittest.mock import patch

import torch

from kernels.bench import ceilings
from kernels.common import is_out_of_memory

from . import config, count, data, muon, problems, run
from .explain import read_thoughts
from .latent import ATP
from .loss import sft_loss, surrogate
from .rollout import Noise, rollout, score, supervise, think

BETA, MAX_NEW = 1e-3, 16
GATES = {("SFT, last stage", "ops"): 4, ("SFT, last stage", "bytes"): 8, ("rollouts", "flops"): 25}  # × fewer than the reference
TARGETS = {"SFT, last stage": 2.5, "rollouts": 8}                                                    # × less wall time: shown
SIZES = {  # problems of an SFT step, questions and rollouts of each, problems of an evaluation
    "tiny": dict(batch=32, questions=16, G=8, evaluated=16, check=6),
    "llama-1b": dict(batch=32, questions=16, G=8, evaluated=32, check=2),
}


# ---- who is compared ----------------------------------------------------------------------------------------------------

@dataclass
class Side:
    """One way to compute the method. Each function has the signature of minatp's own."""
    losses: callable    # (batch, eps) -> sums
    thoughts: callable  # (batch, eps) -> z
    rollout: callable   # (prompt, valid, max_new, noise, group) -> Rollout
    score: callable     # (prompt, valid, rollout, group) -> log-probabilities of thoughts, stops, words
    read: callable      # (z, eos, max_new) -> lists of ids
    at_once: bool       # whether evaluation takes its problems in one batch
    bf16: bool = True   # autocast, on a GPU


def sides(model, device):
    """{name: Side}, minatp first; all on the same parameters."""
    from . import peer
    reference, tuned = peer.Reference(model), peer.Tuned(model, static=device.type == "cuda")
    of = lambda p, **switches: Side(p.losses, p.thoughts, p.rollout, p.score, p.read_thoughts, **switches)
    found = {"minatp": Side(partial(supervise, model), lambda batch, eps: think(model, batch, eps)[0].z, partial(rollout, model),
                            partial(score, model), partial(read_thoughts, model.decoder), True),
             "tuned": of(tuned, at_once=True), "reference": of(reference, at_once=False)}
    if device.type == "cuda":
        found["reference float32"] = of(reference, at_once=False, bf16=False)
    return found


# ---- what they work on --------------------------------------------------------------------------------------------------

class Case:
    """A model, its problems, and a batch of each kind, of one preset on one device."""
    def __init__(self, preset, device):
        self.size, self.device = SIZES[preset], device
        self.cfg = config.Config(**{**config.PRESETS[preset], "epochs": "1", "optimizer": "adamw"})  # as the others' code has it
        torch.manual_seed(0)
        if preset == "tiny":
            given = problems.generate("labelled", 400, 0)
            self.model, tokens = run.build(self.cfg, given)
            self.rows = data.encode(given, tokens, self.model.K, self.cfg.block_size)
            self.eos = tokens.eos[0]
        else:  # neither weights nor a tokenizer are needed to be as slow as with them
            with device:
                self.model = ATP(run.shape(self.cfg, self.cfg.vocab_size + 3), **self.cfg.switches)
            self.model.policy.init_weights()
            self.model.decoder.init_weights()
            self.model.end, self.eos = self.cfg.vocab_size + 2, 1
            self.rows = [paper_row(self.model.end) for _ in range(64)]
        run.place(self.model, device)
        self.machine = count.Machine(*(1e6 * x for x in ceilings(device))) if device.type == "cuda" else None

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
        model.policy.cfg.eos = tuple(range(1, model.policy.cfg.vocab_size, 4)) if on else (-1,)  # <|end-latent|>, 4, is none
        self.eos_read = self.eos if on else -1

    def batch(self, stage, rows=None):
        """(data.Batch at a curriculum stage, its noise), and the model set to that stage. rows: Encoded [as many as an SFT step has]."""
        model = self.model
        model.stage = stage
        batch = data.collate(rows or self.rows[: self.size["batch"]], stage, model).to(self.device)
        eps = torch.randn(len(batch.prompt), model.c * model.K, model.policy.cfg.n_embd, generator=torch.Generator().manual_seed(1))
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
    steps = run.Steps(muon.build(case.cfg, model), model, 1.0)
    K, G = model.K, size["G"]
    found = {}
    case.ragged(False)

    def update(loss):
        """Backwards and one step, with a learning rate of 0, so that every round has the same weights."""
        loss.backward()
        steps.take(0.0, loss, 0, [])
        steps.seen.clear()

    def sft(side, stage):
        batch, eps = case.batch(stage)
        update(sft_loss(side.losses(batch, eps), batch.counts, BETA))

    for name, stage in (("first", 0), ("middle", (K + 1) // 2), ("last", K + 1)):
        batch, _ = case.batch(stage)
        n = int(batch.prompt_valid.sum() + batch.n_latent.sum() + (batch.target >= 0).sum() + (batch.thought >= 0).sum())
        found[f"SFT, {name} stage"] = partial(sft, stage=stage), n

    def latents(side):
        batch, eps = case.batch(K + 1)
        side.thoughts(batch, eps).sum().backward()
        model.zero_grad(set_to_none=True)

    found["prompt and latents"] = latents, int(batch.prompt_valid.sum() + batch.n_latent.sum())
    prompt, valid = case.prompts(size["questions"])
    noise = Noise.draw(model, len(prompt) * G, MAX_NEW, 1).at(slice(None), device)
    r = rollout(model, prompt, valid, MAX_NEW, noise, G)
    z = r.z.unflatten(1, (K, -1)).flatten(0, 1)  # (N, c, D)
    found["rollouts"] = lambda side: side.rollout(prompt, valid, MAX_NEW, noise, G), int(r.n_latent.sum() + r.n_token.sum())
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
        sft_loss(sums, batch.counts, BETA).backward()
        found = [sums[k].detach().view(1) for k in sorted(sums)] + [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        model.zero_grad(set_to_none=True)
        return found

    for stage in (0, (model.K + 1) // 2, model.K + 1):
        yield learned(stage), None
    for chance in (None, chances(case)):
        r = side.rollout(prompt, valid, MAX_NEW, chance, 2)
        yield [], (r.n_latent.tolist(), [row[:n] for row, n in zip(r.token.tolist(), r.n_token.tolist())])
    z = torch.cat([r.z for r in own]).unflatten(1, (model.K, -1))
    z = z[torch.arange(model.K, device=z.device) * model.c < torch.cat([r.n_latent for r in own])[:, None]]
    yield [v.detach().flatten() for r in own for v in side.score(prompt, valid, r, 2)[:3]], side.read(z, case.eos_read, MAX_NEW)


def chances(case):
    """Noise of the compared chains. Words of a large vocabulary are greedy: untrained, all have about the same probability, less than a
    hundred times float32's rounding of their sum, so that now and then two sides would draw neighbours."""
    noise = Noise.draw(case.model, 2 * case.size["check"], MAX_NEW, 3, greedy=case.model.policy.cfg.vocab_size > 10**4)
    return noise.at(slice(None), case.device)


def compare(case, every):
    """{name: side} without those whose losses, gradients, chains, thoughts or log-probabilities are not minatp's, in float32."""
    case.ragged(True)
    case.model.stage = case.model.K + 1
    own = [every["minatp"].rollout(*case.prompts(case.size["check"]), MAX_NEW, chance, 2) for chance in (None, chances(case))]
    same = dict(every)
    for name, side in every.items():
        if not side.bf16:  # the reference once more
            continue
        worst, alike = 0.0, True
        for (values, exact), (want, want_exact) in zip(results(case, side, own), results(case, every["minatp"], own)):
            alike = alike and exact == want_exact
            errors = [float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(values, want) if len(b)]
            worst = max(worst, *errors, 0.0, key=lambda e: (e != e, e)) if len(values) == len(want) else float("inf")  # NaN is the worst
        if worst <= 1e-3 and alike:
            run.say(f"{name:18} same losses, gradients, log-probabilities (to {worst:.0e}), chains and thoughts")
        else:
            run.say(f"{name:18} DIFFERS from minatp (by {worst:.1e}, {'the same' if alike else 'other'} chains): it is not timed; report it")
            same = {k: s for k, s in same.items() if not k.startswith(name)}  # nor in float32
    if "minatp" not in same:
        raise config.UserError("minatp/bench.py:0: minatp does not compute the same twice, so there is nothing to time; report it")
    return same


# ---- times --------------------------------------------------------------------------------------------------------------

def seconds_of(work, device, bf16=True):
    """(seconds, peak bytes of a GPU or 0) of work()."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    with run.autocast(device) if bf16 else nullcontext():
        work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, torch.cuda.max_memory_allocated(device) if on_gpu else 0


def counted(work, device, bf16=True):
    """Counts of work() under the autocast that its times have. PyTorch's operations stand in for the kernels, whose launches and
    products no count sees."""
    with patch.dict(os.environ, MINATP_KERNELS="torch"), run.autocast(device) if bf16 else nullcontext():
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


UNCOUNTED = count.Counts(*[math.nan] * 4)  # PyTorch's operations, which are counted, can need memory that the kernels do not


def warm_up(work, every, case):
    """{name: counts} of the sides that a work fits on the device with; every kernel is compiled then."""
    counts = {}
    for s, side in every.items():
        once = (partial(work, side), case.device, side.bf16)
        if attempt(lambda: seconds_of(*once), case.model):
            told = not case.machine or s == "minatp"  # of a GPU's peers the times alone are: to count the reference takes minutes
            counts[s] = asdict(told and attempt(lambda: counted(*once), case.model) or UNCOUNTED)
    need_minatp(counts, case)
    return counts


def need_minatp(fits, case):
    if "minatp" not in fits:
        raise config.OutOfMemory(f"minatp/bench.py:0: minatp itself runs out of memory on {case.device}; take a larger GPU")


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
            for s in fits[i % len(fits):] + fits[:i % len(fits)]:
                if timed := attempt(lambda: seconds_of(partial(work, every[s]), case.device, every[s].bf16), case.model):
                    times[s].append(timed[0])
                    peak[s] = max(peak[s], timed[1])
                else:
                    fits.remove(s)
            need_minatp(fits, case)
        found.append({"work": name, "tokens": n_token, "sides": {s: {"seconds": times[s], "peak": peak[s], **counts[s]} for s in fits}})
        tell(found[-1], case)
        save(found)
        for s in every.keys() - fits:
            run.say(f"    {s:18} ran out of memory: no time, and no win")
    return found


def ratio(record, other):
    """(median, p10, p90) of the paired ratios of another side's seconds to minatp's."""
    pairs = sorted(b / a for a, b in zip(record["sides"]["minatp"]["seconds"], record["sides"][other]["seconds"]))
    at = lambda q: pairs[round(q * (len(pairs) - 1))]
    return statistics.median(pairs), at(0.1), at(0.9)


def fewer(record, other, what):
    """How many times fewer ops, bytes or flops minatp needs than another side."""
    return record["sides"][other][what] / record["sides"]["minatp"][what]


def tell(record, case):
    """Print one work's times, ratios and counts."""
    own = record["sides"]["minatp"]
    seconds = statistics.median(own["seconds"])
    text = (f"\n{record['work']:20}{1e3 * seconds:9.1f} ms {record['tokens'] / seconds:11,.0f} tokens/s   {own['ops']:,} operations, "
            f"{own['bytes'] / 1e9:.2f} GB, {own['flops'] / 1e9:.2f} GFLOP")
    if case.machine:
        least = floor(case, record["work"], own["flops"])
        text += (f"\n{'':20}{own['flops'] / seconds / case.machine.flops:9.0%} of the product rate, {least / seconds:.0%} of the floor of "
                 f"{1e3 * least:.1f} ms, peak {own['peak'] / 2**30:.1f} GiB")
    for name in list(record["sides"])[1:]:
        middle, low, high = ratio(record, name)
        text += (f"\n    {name:18}{middle:6.1f} × the time [{low:.1f}, {high:.1f}]   × operations {fewer(record, name, 'ops'):.1f}   "
                 f"× bytes {fewer(record, name, 'bytes'):.1f}   × FLOPs {fewer(record, name, 'flops'):.1f}")
    run.say(text)


def floor(case, work, flops):
    """Least seconds of one of `works` on the case's machine: products at the product rate; passes of one position after another
    that each read the weights; AdamW, which reads and writes 28 bytes a parameter."""
    model, size, m = case.model, case.size, case.machine
    cfg, n, rows = model.policy.cfg, model.c * model.K, size["questions"] * size["G"]
    count_of = lambda *parts: sum(p.numel() for part in parts for p in part.parameters())
    layers, Tq = count_of(model.policy.model.layers), max(len(r.prompt) for r in case.rows)

    def one_by_one(passes, rows, T, words):
        """Seconds of so many positions of each row, logits or not."""
        return passes * max(count.pass_bytes(cfg, rows, T, words) / m.bandwidth,
                            2 * rows * (layers + words * cfg.vocab_size * cfg.n_embd) / m.flops)

    adamw = 28 * count_of(model) / m.bandwidth
    if work == "reading thoughts":
        return one_by_one(MAX_NEW, rows * model.K, model.c + MAX_NEW, True)
    if work == "RL update":
        return flops / m.flops + adamw - 28 * count_of(model.decoder) / m.bandwidth
    if work in ("rollouts", "evaluation"):
        asked, rows = (size["questions"], rows) if work == "rollouts" else (size["evaluated"],) * 2
        return (2 * layers * asked * Tq / m.flops + one_by_one(n, rows, Tq + n, False) + one_by_one(MAX_NEW, rows, Tq + n + MAX_NEW, True))
    n = {"SFT, first stage": 0, "SFT, middle stage": model.c * ((model.K + 1) // 2)}.get(work, n)
    chain = 2 * one_by_one(n, size["batch"], Tq + n, False)  # forwards and backwards; weight gradients can wait (minatp/chain.py reads thrice)
    return (flops - 4 * n * size["batch"] * layers) / m.flops + chain + adamw * work.startswith("SFT")


def missed(found):
    """What to say of each gate that is not met."""
    by_name = {r["work"]: r for r in found}
    return [f"{work}: only {got:.1f} × fewer {what} than the reference, and {least} × are asked for"
            for (work, what), least in GATES.items() if (got := fewer(by_name[work], "reference", what)) < least]


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
    vary = [(key, value) for key in base for value in (base[key] // 2, base[key], 2 * base[key], 4 * base[key])]
    run.say(f"\nSFT step of the last stage, forwards and backwards; base: K {K}, batch {base['batch']}, {base['question']} tokens of question"
            f"\npredicted: {1e6 * per_op:.1f} µs an operation and {1e12 * per_flop:.1f} ms a GFLOP, fitted to the times above"
            "\n                 operations     GFLOP   predicted ms   measured ms")
    for key, value in vary:
        at = {**base, key: value}
        model.K = at["K"]
        batch, eps = case.batch(at["K"] + 1, rows=[paper_row(256, at["question"], at["K"])] * at["batch"])

        def step():
            sft_loss(supervise(model, batch, eps), batch.counts, BETA).backward()
            model.zero_grad(set_to_none=True)

        timed = [attempt(lambda: seconds_of(step, case.device), model) for _ in range(rounds + 1)][1:]  # kernels are compiled in the first
        if None in timed:
            run.say(f"{key:>9}{value:5}   out of memory")
            continue
        c, seconds = attempt(lambda: counted(step, case.device), model) or UNCOUNTED, statistics.median(s for s, _ in timed)
        predicted = per_op * c.ops + per_flop * c.flops
        rows.append({"varied": key, "value": value, **asdict(c), "predicted": predicted, "seconds": seconds})
        run.say(f"{key:>9}{value:5}{c.ops:14,}{c.flops / 1e9:10.2f}{1e3 * predicted:15.1f}{1e3 * seconds:14.1f}")
    model.K = K
    return rows


def tell_memory():
    """Print what an SFT step of the paper's size needs. Returns the bytes by part."""
    cfg = config.Config(**{**config.PRESETS["llama-1b"], "epochs": "1"})
    row = paper_row(cfg.vocab_size)
    parts = count.training_memory(run.shape(cfg, cfg.vocab_size + 3), cfg.K, cfg.c, cfg.batch_size, row)
    lean = count.training_memory(run.shape(cfg, cfg.vocab_size + 3), cfg.K, cfg.c, cfg.batch_size, row, recompute=True)
    gb = lambda n: f"{n / 1e9:.1f} GB"
    run.say(f"\nmemory of an SFT step at Llama-3.2-1B's size, last stage, batch {cfg.batch_size}, K {cfg.K}, {len(row.prompt)} tokens of "
            f"question (computed, not measured): {gb(sum(parts.values()))}\n    " + ", ".join(f"{k} {gb(v)}" for k, v in parts.items())
            + f"\n    with --recompute {gb(sum(lean.values()))}: activations {gb(lean['activations'])}")
    return parts


def chosen_of(option, given, known):
    """Names separated by semicolons; all that are known where none is given. Raises UserError for any other."""
    names = [name.strip() for name in given.split(";") if name.strip()] or known
    for name in names:
        if name not in known:
            raise config.UserError(f"command line: {option}: there is no {name!r}; there are {'; '.join(known)}")
    return names


def main(argv=None):
    parser = config.Parser(__doc__, "minatp.bench")
    parser.add_argument("--preset", default="tiny", help="tiny | llama-1b [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is timed [%(default)s]")
    parser.add_argument("--sides", default="", help="whom minatp is timed beside, separated by semicolons [all]")
    parser.add_argument("--works", default="", help="what is timed, likewise; how time grows is told where it is all [all]")
    parser.add_argument("--device", default="", help="cpu | cuda | cuda:N [tiny: cpu; llama-1b: cuda]")
    parser.add_argument("--out", default="", help="write every figure to this JSON file as well")
    args = parser.parse_args(argv)
    if args.preset not in SIZES:
        raise config.UserError(f"command line: --preset must be one of {', '.join(SIZES)}, not {args.preset!r}")
    if args.rounds < 1:
        raise config.UserError(f"command line: --rounds must be positive, not {args.rounds}")
    device = run.pick_device(args.device or {"tiny": "cpu", "llama-1b": "cuda"}[args.preset])
    case = Case(args.preset, device)
    every = sides(case.model, device)
    chosen, only = (chosen_of(option, given, known) for option, given, known in
                    (("--sides", args.sides, list(every)), ("--works", args.works, list(works(case)))))
    every = {name: side for name, side in every.items() if name == "minatp" or name in chosen}
    run.say(f"{args.preset} on {device}, torch {torch.__version__}, {torch.get_num_threads()} threads; {run.size(case.model)}")
    same = compare(case, every)
    record = {"preset": args.preset, "device": str(device), "torch": torch.__version__}
    save = lambda **more: args.out and config.replace_file(args.out, json.dumps(record | more, indent=2) + "\n")
    found = measure(case, same, args.rounds, lambda found: save(work=found), only)
    rows = [] if args.works else growth(case, *fit(found), args.rounds)
    memory = tell_memory()
    gated = args.preset == "tiny" and "reference" in same and not args.works
    misses = [f"{name} is not the same computation" for name in every if name not in same] + (missed(found) if gated else [])
    save(work=found, growth=rows, memory=memory, missed=misses)
    shown = ", ".join(f"{work} {ratio(r, 'reference')[0]:.1f} × (target {TARGETS[work]})" for r in found
                      if (work := r["work"]) in TARGETS and "reference" in r["sides"])
    run.say(f"\nwall time, shown and not gated: {shown}" + "".join(f"\ngate missed: {m}" for m in misses)
            + ("\nall gates of counts met" if gated and not misses else ""))
    return int(bool(misses))


if __name__ == "__main__":
    sys.exit(config.guarded(main))
