"""Solve problems and measure the answers: what train.py reports and sample.py shows.

    python -m minatp.evaluate out/sft out/rl           the test set; the first run is the baseline
    python -m minatp.evaluate out/sft out/rl --longer  more steps than were ever taught
    python -m minatp.evaluate out/sft --votes 8        also pass@8 and votes of 8 sampled chains
    python -m minatp.evaluate out/sft --latent-steps 0,1,2,3   also with so many steps exactly
    python -m minatp.evaluate out/sft --file gsm8k/test.jsonl,SVAMP.json   each of several sets

Every accuracy comes with its number of problems and its 95 % interval.
"""

import json
import math
import statistics
import sys
import time
from collections import Counter

import torch

from kernels import graph

from .. import reward
from ..data import collate, left_pad
from ..decoder import as_text, read_chains
from ..problems import numbers
from ..rollout import Noise, rollout
from ..sft import sft_losses
from . import distributed
from .device import Doing, autocast, pick_device, pick_dtype, place, solving_guard
from .errors import UserError
from .huggingface import load_model, locate, read_switches
from .options import LEAST_TEMPERATURE, Parser, add_device_options
from .problem_files import read_problems
from .splits import (
    encode_prompts,
    generate,
    learned_questions,
    options_of,
    paths_of,
    questions_of,
    test_set,
)
from .terminal import print0, progress

BATCH = 500  # problems at once


@torch.no_grad()
def solve(
    model,
    tokenizer,
    prompts,
    max_new,
    batch_size=BATCH,
    noise=None,
    forced=None,
    steps=None,
    keep_z=False,
    after_batch=None,
):
    """Solve each prompt (a list of ids) once -> a list of Chain.

    By the mean policy if noise is None.

    noise (Noise), forced (Forced): of all prompts. steps: how many steps every chain thinks, or
    None if the stop head decides. keep_z: the Chains keep their latents.
    after_batch: called after each batch; it may raise. Prompts of like length share a batch; a
    problem's result depends neither on that nor on its neighbours.
    """
    device = model.device

    # Sort by length, so that little of a batch is padding, and take this rank's share
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    order = distributed.shard(order)
    chains = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        prompt, prompt_mask = left_pad([prompts[i] for i in rows], tokenizer.end, device)

        # Noise and forced latents belong to problems: each batch takes those of its rows
        result = rollout(
            model,
            prompt,
            prompt_mask,
            max_new,
            noise=noise and noise.at(rows).to(device),
            forced=forced and forced.at(rows).to(device),
            steps=steps,
        )

        # Put each chain in the place of its prompt
        in_words = as_text(model, tokenizer, result)
        read_chains(model, tokenizer, result, in_words)
        for b, chain in enumerate(in_words):
            chains[rows[b]] = chain
            if keep_z:
                chain.z = result.z[b, : chain.n_latent].cpu()
        if after_batch:
            after_batch()

    # Give back what the large batches hold on a GPU, then complete the list from all ranks
    graph.release_memory()
    return distributed.merge(chains)


# ---- measures ------------------------------------------------------------------------------------


def wilson(k, n, z=1.959964):
    """The 95 % interval [low, high] of a share k/n (Wilson's score interval)."""
    # The textbook interval, k/n ± 1.96 standard errors, has no width at 0 % and 100 %; this one
    # has. (The clamps are against rounding.)
    centre = k / n + z * z / (2 * n)
    half = z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return [max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)]


def measure(chains, problems):
    """Accuracy with its interval, lengths and coherence, of one Chain per problem."""
    n = len(problems)
    right = [reward.accuracy(chain.text, p.answer) for chain, p in zip(chains, problems)]

    # Also by the number of true steps, since a mean hides that longer problems are harder
    n_by_steps = Counter(len(p.steps) for p in problems)
    right_by_steps = Counter(len(p.steps) for ok, p in zip(right, problems) if ok)

    coherence = None  # without steps in words it is undefined
    if any(chain.steps for chain in chains):
        coherence = statistics.fmean(reward.coherence(c.steps, c.answer) for c in chains)
    return {
        "n_problems": n,
        "accuracy": sum(right) / n,
        "accuracy_ci95": wilson(sum(right), n),
        # a latent is one pass of π, as a word is, so the two are added up
        "latents": sum(c.n_latent for c in chains) / n,
        "answer_tokens": sum(c.n_token for c in chains) / n,
        "tokens": sum(c.n_latent + c.n_token for c in chains) / n,
        "coherence": coherence,
        "accuracy_by_steps": {s: right_by_steps[s] / n_by_steps[s] for s in sorted(n_by_steps)},
    }


def elect(chains, by):
    """Elect one of several Chains of a problem by vote. The right answer is not used.

    by "majority": the first with the commonest answer. by "coherence": the majority of the most
    coherent ones.
    """
    if by == "coherence":
        coherence = [reward.coherence(c.steps, c.answer) for c in chains]
        chains = [c for c, value in zip(chains, coherence) if value == max(coherence)]

    def key(chain):  # "5" and "5.0" are one answer
        return None if chain.answer is None else reward.parsed(chain.answer)

    # A chain without an answer has no vote. If none has one, the first chain is elected
    votes = Counter(key(c) for c in chains if c.answer is not None)
    commonest = votes.most_common(1)[0][0] if votes else None
    return next(c for c in chains if key(c) == commonest)


def vote(samples, problems):
    """Shares of problems solved by any of k samples, and by the elected one.

    samples: k lists of one Chain per problem.
    """
    n, k = len(problems), len(samples)

    # Regroup: the k chains of each problem
    by_problem = list(zip(*samples))
    right = [
        [reward.accuracy(c.text, p.answer) for c in chains]
        for chains, p in zip(by_problem, problems)
    ]

    # pass@k: the share with a right answer among k. mean: what a single draw solves
    n_pass = sum(any(row) for row in right)
    result = {
        "k": k,
        "pass": n_pass / n,
        "pass_ci95": wilson(n_pass, n),
        "mean": sum(map(sum, right)) / n / k,
    }

    # What k draws are worth without labels: one chain is elected, then judged
    for by in ("majority", "coherence"):
        elected = [elect(chains, by) for chains in by_problem]
        n_right = sum(reward.accuracy(c.text, p.answer) for c, p in zip(elected, problems))
        result |= {by: n_right / n, by + "_ci95": wilson(n_right, n)}
    return result


def paired(after, before, problems):
    """The accuracy gained from `before` to `after`, and its standard error.

    The error is that of the paired differences; None if there is one problem.
    """
    # +1, 0 or −1 for each problem: 0 if both solve it or neither does, however hard it is
    difference = torch.tensor(
        [
            reward.accuracy(a.text, p.answer) - reward.accuracy(b.text, p.answer)
            for a, b, p in zip(after, before, problems)
        ]
    )
    n = len(difference)
    return {
        "gain": float(difference.mean()),
        "gain_se": float(difference.std() / n**0.5) if n > 1 else None,
    }


def agree(a, b):
    """Whether two Chains give the same answer, or, without an answer, the same text."""
    return reward.same(a.answer, b.answer) or a.text == b.text


def describe(result):
    """A result of `measure` in one line."""
    low, high = result["accuracy_ci95"]
    text = (
        f"{result['accuracy']:.1%} of {result['n_problems']} solved [{low:.1%}, {high:.1%}], "
        f"{result['latents']:.1f} latents + {result['answer_tokens']:.1f} tokens"
    )

    # Not every result has these: coherence needs steps in words, `sampled` needs --votes
    if result["coherence"] is not None:
        text += f", coherence {result['coherence']:.1%}"
    if "sampled" in result:
        s = result["sampled"]
        text += (
            f"; of {s['k']} samples: one {s['mean']:.1%}, any {s['pass']:.1%}, "
            f"majority {s['majority']:.1%}, coherence {s['coherence']:.1%}"
        )
    return text


def interval(result):
    """The 95 % interval of an accuracy, for a table."""
    low, high = result["accuracy_ci95"]
    return f"[{low:6.1%}, {high:6.1%}]"


def describe_latent_steps(rows):
    """A table with a line for each of the `rows` that by_latent_steps returns."""
    columns = f"{'accuracy':>8}  {'95 %':>16}  {'latents + tokens':>16}  problems"
    lines = [f"  latent steps  {columns}  points over the free run"]
    for row in rows:
        length = f"{row['latents']:.1f} + {row['answer_tokens']:.1f}"
        gain = f"{100 * row['gain']:+.1f}"
        if row["gain_se"] is not None:
            gain += f" ± {100 * row['gain_se']:.1f}"
        lines.append(
            f"{row['steps']:14}  {row['accuracy']:8.1%}  {interval(row)}  {length:>16}  "
            f"{row['n_problems']:8}  {gain}"
        )
    return "\n".join(lines)


def describe_gain(result):
    """A result of `paired` in words."""
    text = f"gained {100 * result['gain']:+.1f} points"
    if result["gain_se"] is not None:
        text += f" ± {100 * result['gain_se']:.1f} (standard error)"
    return text


# ---- in a training run (loop.Run) ----------------------------------------------------------------


@torch.no_grad()
def diagnose(run):
    """RL's diagnostics: do latents matter to the reward, and does φ still read them?

    Its reading is compared with that of the SFT policy's latents.
    """
    # On 24 questions, a rough estimate that is cheap enough for every validation
    with run.autocast:
        share, total = reward_variance(run, run.splits.val[:24])
    result = {"thought_share": share, "reward_variance": total}

    # φ is frozen, so drift > 0 means that π's latents have moved away from what φ can read
    if run.reading_rows:
        reading = reading_nll(run, run.model)
        result |= {"reading": reading, "drift": reading - run.reading_at_start}
    return result


def describe_diagnosis(result):
    """A result of `diagnose` in words."""
    text = f"{result['thought_share']:.0%} of the reward's variance from thoughts"
    if "reading" in result:
        text += f"; reading {result['reading']:.2f} nats ({result['drift']:+.2f})"
    return text


@torch.no_grad()
def reading_nll(run, model):
    """−log p that φ gives the true steps of run.reading_rows, per step; None without any."""
    if not run.reading_rows:
        return None

    # Teacher-forced, as in SFT, but at z = μ: no noise is given
    nll, n_step, size = 0.0, 0, run.cfg.eval_batch
    for i in range(0, len(run.reading_rows), size):
        rows = run.reading_rows[i : i + size]
        longest = max(row.length for row in rows)
        run.doing = Doing("reading validation problems", len(rows), longest, "--eval-batch")
        batch = collate(rows, model.stage, model)
        with run.autocast:
            nll += float(sft_losses(model, batch.to(run.device))["dec"])
        n_step += batch.counts["dec"]
    run.doing = run.between_batches
    return nll / n_step


def reward_variance(run, problems, n_thought=6, n_word=4):
    """Where the variance of the reward within a question comes from: (share of latents, total).

    A nested design: n_thought draws of the thoughts of each question, and of each of those n_word
    draws of the words.
    """
    cfg, model, Q = run.cfg, run.model, len(problems)
    n = n_thought * n_word

    # Chains of one thought take latents and stops from one draw; each has words of its own
    noise = Noise.draw(model, Q * n, run.max_new, cfg.seed, spread=cfg.spread, greedy=cfg.greedy)
    same_thoughts = torch.arange(Q * n) // n_word * n_word
    noise.eps_keys, noise.u_stop = noise.eps_keys[same_thoughts], noise.u_stop[same_thoughts]

    # At most --eval-batch chains at once, but all n chains of a question
    rewards, size = [], max(1, cfg.eval_batch // n)
    for i in range(0, Q, size):
        batch = problems[i : i + size]
        rows = torch.arange(i * n, (i + len(batch)) * n)
        rewards += sampled_rewards(run, batch, noise.at(rows).to(run.device), n)
    run.doing = run.between_batches
    R = torch.tensor(rewards).view(Q, n_thought, n_word)

    # The means over n_word words differ by within / n_word even if the thoughts do not matter: take
    # that off, and what is left between them is due to the thoughts
    within = R.var(2).mean()
    between = (R.mean(2).var(1).mean() - within / n_word).clamp(min=0)
    total = between + within
    return float(between / total) if total > 0 else 0.0, float(total)


def sampled_rewards(run, problems, noise, n):
    """The rewards of n sampled chains of each problem, as in training: a list of len(problems)·n.

    noise: of these chains, on the run's device.
    """
    cfg, model = run.cfg, run.model
    prompts = run.tokenizer.prompts([p.question for p in problems])
    prompt, prompt_mask = left_pad(prompts, run.tokenizer.end, run.device)
    length = prompt.shape[1] + model.c * model.K + 1 + run.max_new
    run.doing = Doing("chains of validation problems", len(problems) * n, length, "--eval-batch")

    result = rollout(model, prompt, prompt_mask, run.max_new, noise, n)
    graph.release_memory()
    chains = as_text(model, run.tokenizer, result)
    answers = [p.answer for p in problems for _ in range(n)]
    which = reward.chains_to_read(cfg, chains, answers)
    read_chains(model, run.tokenizer, result, chains, which)
    return [reward.chain_reward(cfg, *each)[0] for each in zip(chains, answers)]


def test(run):
    """Measure the test sets: {name: result}. RL's beside its start, on the same problems."""
    cfg, tests = run.cfg, {}
    for name, problems in run.splits.tests.items():
        start = time.perf_counter()

        # The reported accuracy is that of the mean policy
        chains = run.solve(problems)
        result = tests[name] = measure(chains, problems)
        result["test_seconds"] = time.perf_counter() - start

        # With --votes also sampled chains; their seeds follow from --seed
        if cfg.votes:
            seeds = [cfg.seed * 1000 + k for k in range(cfg.votes)]
            result["sampled"] = vote([run.solve(problems, seed) for seed in seeds], problems)

        # More measures: on numbers not seen in training (built-in task), and against RL's start
        print0(f"test ({name}): {describe(result)}")
        if not cfg.data:
            test_new_numbers(run, problems, chains, result)
        if cfg.stage == "rl":
            compare_with_start(run, name, problems, chains, result)
    return tests


def test_new_numbers(run, problems, chains, result):
    """The built-in task: measure the problems whose numbers are in no training problem."""
    cfg, splits = run.cfg, run.splits

    # The questions of RL count in SFT as well, so that (given the same --answers) both are measured
    # on the same problems
    learned_from = splits.train + (splits.answers or generate("answers", cfg.answers, 0))
    known = {numbers(p) for p in learned_from}
    new = [i for i, p in enumerate(problems) if numbers(p) not in known]
    if new:
        result["new_numbers"] = measure([chains[i] for i in new], [problems[i] for i in new])
        print0(f"  numbers that are in no training problem: {describe(result['new_numbers'])}")


def compare_with_start(run, name, problems, chains, result):
    """Add the accuracy of the model that RL started from, and what was gained over it."""
    # The start solves the same problems, so that the gain is paired
    before = run.solve(problems, model=run.start_model)
    start = measure(before, problems)
    result |= {
        "start_accuracy": start["accuracy"],
        "start_coherence": start["coherence"],
        "start_tokens": start["tokens"],
        **paired(chains, before, problems),
    }
    print0(f"start ({name}): {describe(start)}; {describe_gain(result)}")


# ---- python -m minatp.evaluate -------------------------------------------------------------------


def parse(argv):
    """The command line, checked. Raises UserError."""
    parser = Parser(__doc__, "minatp.evaluate")
    add = parser.add_argument
    add("run", nargs="+", help="folders of runs, or of saved models")
    add(
        "--file",
        default="",
        help="problems, as for --data; a,b: several [the first run's test set]",
    )
    add("--longer", action="store_true", help="problems of the built-in task with 5 and 6 steps")
    add("--problems", type=int, default=0, help="how many; 0: all [%(default)s]")
    add("--votes", type=int, default=0, help="chains to sample for each problem [%(default)s]")
    add(
        "--latent-steps",
        default="",
        help="also think exactly so many steps, without asking the stop head; such as 0,1,2,3",
    )
    add("--temperature", type=float, default=1.0, help="of the sampled chains [%(default)s]")
    add("--seed", type=int, default=0, help="of the sampled chains [%(default)s]")
    add("--max-new", type=int, default=128, help="most tokens of an answer [%(default)s]")
    add_device_options(parser)
    add("--json", action="store_true", help="one JSON object per run")
    args = parser.parse_args(argv)

    if args.file and args.longer:
        raise UserError("command line: give --file or --longer, not both")
    # (NaN fails every comparison. torch's CPU generator looks at 32 bits of a seed)
    least = LEAST_TEMPERATURE
    is_temperature = least <= args.temperature < math.inf
    for option, value, is_valid, expected in (
        ("--problems", args.problems, args.problems >= 0, "not be negative"),
        ("--votes", args.votes, args.votes >= 0, "not be negative"),
        ("--max-new", args.max_new, args.max_new > 0, "be positive"),
        ("--temperature", args.temperature, is_temperature, f"be finite, and at least {least}"),
        ("--seed", args.seed, 0 <= args.seed < 2**32, "not be negative or above 2^32 - 1"),
    ):
        if not is_valid:
            raise UserError(f"command line: {option} must {expected}, not {value}")
    args.latent_steps = parse_latent_steps(args.latent_steps)
    return args


def parse_latent_steps(text):
    """ "0,1,2" -> [0, 1, 2], in ascending order. Raises UserError."""
    if not text:
        return []
    try:
        numbers = sorted({int(number) for number in text.split(",")})
        if numbers[0] < 0:
            raise ValueError
    except ValueError:
        raise UserError(
            "command line: --latent-steps must be whole numbers ≥ 0 separated by commas, such as "
            f"0,1,2, not {text!r}"
        ) from None
    return numbers


def check_latent_steps(folder, latent_steps):
    """Raise UserError unless the run in a folder can think so many steps (an ascending list)."""
    if not latent_steps:
        return

    # A plain LLaMA, a run that has only learned to write its steps, or one that has fillers or
    # nothing in their place, has no latent step
    saved = read_switches(folder)
    has_latents = saved and "fillers" not in saved
    most = min(saved["stage"], saved["K"]) if has_latents else 0
    if not most:
        raise UserError(
            f"command line: --latent-steps: {folder} does not think in latents; leave the option "
            "out for this run"
        )
    if latent_steps[-1] > most:
        raise UserError(
            f"command line: --latent-steps {latent_steps[-1]}: {folder} has learned at most {most} "
            f"latent steps; give 0 … {most}"
        )


def problem_sets(args):
    """The sets of problems that the command line asks for: {their file, or "": a list}."""
    if args.file:
        files = paths_of("--file", args.file)
        return {file: read_problems(file)[: args.problems or None] for file in files}
    if args.longer:
        return {"": generate("longer", args.problems or 3000, 0)}

    # All runs are measured on the test set of the first
    return {"": test_set(args.run[0], args.problems)}


def main(argv=None):
    args = parse(argv)
    sets = problem_sets(args)
    device = pick_device(args.device)
    for folder in args.run:  # before the first is measured
        locate(folder)
        check_latent_steps(folder, args.latent_steps)
        note_learned(folder, sets, args)

    for file, problems in sets.items():
        first = None  # the chains of the first run
        for folder in args.run:
            chains, result = evaluate_run(folder, problems, device, args)

            # Every later run is compared with the first, problem by problem
            if first:
                result |= paired(chains, first, problems)
            first = first or chains
            report(folder, file, result, args)


def note_learned(folder, sets, args):
    """Say on stderr how many of the problems to be measured a run was trained on, if any.

    sets: {name: problems}.
    """
    # The built-in sets never overlap
    if not args.file:
        first = options_of(args.run[0])
        if not first or not first.data:
            return

    learned, why_unknown = learned_questions(folder)
    questions = questions_of(p for problems in sets.values() for p in problems)
    n = len(learned & questions)
    if n:
        sys.stderr.write(
            f"note: {folder}: was trained on {n:,} of the {len(questions):,} questions\n"
        )
    if why_unknown:
        sys.stderr.write(f"note: {folder}: unknown what it was trained on: {why_unknown}\n")


def report(folder, file, result, args):
    """Print the result of one run on one set."""
    if args.json:
        of_file = {"file": file} if file else {}
        print0(json.dumps({"run": folder, **of_file, **result}))
        return
    gain = f"; {describe_gain(result)}" if "gain" in result else ""
    of_file = f" on {file}" if file else ""
    print0(f"{folder}{of_file}: {describe(result)}{gain}")
    if args.latent_steps:
        print0(describe_latent_steps(result["latent_steps"]))


def load_trained(folder, device):
    """The model in a folder, on a device and in eval mode -> (ATP, Tokenizer). Raises UserError.

    Says on stderr if the model has learned nothing of latents.
    """
    directory = locate(folder)
    model, tokenizer = load_model(directory)
    if not read_switches(directory):
        sys.stderr.write(
            f"note: {folder}: has no minatp/, so its latent head, stop head and φ are untrained\n"
        )
    return place(model, device).eval(), tokenizer


def evaluate_run(folder, problems, device, args):
    """(chains, result) of one run on the problems."""
    model, tokenizer = load_trained(folder, device)
    prompts = encode_prompts(problems, tokenizer, model, args.max_new)

    # The batches of one pass by the mean policy, and of one for each vote and number of steps
    n_pass = 1 + args.votes + len(args.latent_steps)
    advance = progress(folder, -(-len(prompts) // BATCH) * n_pass)

    def solve_all(noise=None, steps=None):
        return solve(
            model,
            tokenizer,
            prompts,
            args.max_new,
            noise=noise,
            steps=steps,
            after_batch=advance,
        )

    # The mean policy, then a pass for each sampled chain, with noise of its own
    dtype = pick_dtype(args.dtype, device, model)
    with solving_guard(prompts, model, args.max_new, BATCH), autocast(device, dtype):
        chains = solve_all()
        result = measure(chains, problems)
        if args.votes:
            samples = []
            for k in range(args.votes):
                seed = args.seed * 1000 + k
                noise = Noise.draw(model, len(prompts), args.max_new, seed, args.temperature)
                samples.append(solve_all(noise))
            result["sampled"] = vote(samples, problems)
        if args.latent_steps:
            result["latent_steps"] = by_latent_steps(solve_all, args.latent_steps, chains, problems)
    note_cut_off(folder, chains, args.max_new)
    return chains, result


def note_cut_off(run, chains, max_new):
    """Report on stderr how many answers --max-new cut off, if any."""
    n = sum(not chain.ended for chain in chains)
    if n:
        sys.stderr.write(
            f"note: {run}: --max-new {max_new} cut off {n:,} of {len(chains):,} answers\n"
        )


def by_latent_steps(solve, latent_steps, free, problems):
    """Measure chains of a given number of latent steps: a list of dicts, one for each number.

    solve(steps=n) -> a Chain for each problem, whose latents are the model's own. free: the Chains
    in which the stop head decides, with which each is compared, problem by problem.
    """
    rows = []
    for n in latent_steps:
        chains = solve(steps=n)
        rows.append({"steps": n, **measure(chains, problems), **paired(chains, free, problems)})
    return rows
