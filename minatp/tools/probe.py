"""What a run's latents hold, and whether its answers need them, in numbers.

    python -m minatp.probe out/sft                  on the run's test set
    python -m minatp.probe out/sft --file FILE      on problems of your own
    python -m minatp.probe out/sft --json           for a program

Reading: how well a linear probe (ridge regression) predicts a step's result from the step's
latents, on problems that it was not fitted on. "as written": the result of the problem's own step
in that place; "as φ reads it": the result in φ's words.

Decoding: what φ takes from a thought. The loss of a step as written, in nats, given the step's own
thought, the mean thought, or another problem's. Where all three are low, φ infers the words from
those before them: a result that φ writes need not come from the thought.

Using: accuracy of the greedy answer with no thoughts, with another problem's, or with noisy ones.
"""

import json
from collections import Counter
from dataclasses import dataclass

import torch

from kernels.cross_entropy import IGNORE

from .. import reward
from ..data import pad
from ..decoder import thought_token_nll
from ..rollout import Forced, Noise
from ..run import evaluate
from ..run.device import autocast, pick_device, pick_dtype, solving_guard
from ..run.errors import UserError
from ..run.options import Parser, add_device_options
from ..run.problem_files import read_problems
from ..run.splits import encode_prompts, test_set
from ..run.terminal import print0

SPREADS = (0.5, 1.0, 2.0, 4.0, 8.0)  # noise of the sampled thoughts, in multiples of their σ
RIDGES = tuple(10.0**k for k in range(-3, 5))  # penalties to choose from
FEWEST = 10  # problems

# Rows of the table that the code refers to
OTHER = "thoughts of another problem"
PRIOR = "thoughts drawn from the prior"


def main(argv=None):
    args = parse(argv)
    problems = problems_of(args)
    device = pick_device(args.device)
    model, tokenizer = evaluate.load_trained(args.run, device)
    prompts = encode_prompts(problems, tokenizer, model, args.max_new)

    def solve(noise=None, forced=None):
        """A Chain per problem: by the mean policy unless there is noise."""
        return evaluate.solve(
            model, tokenizer, prompts, args.max_new, noise=noise, forced=forced, keep_z=True
        )

    # The thoughts of the mean policy are probed, and its answers are what others are compared with
    dtype = pick_dtype(args.dtype, device, model)
    with solving_guard(prompts, model, args.max_new, what="probe"), autocast(device, dtype):
        mean = solve()
        if not any(chain.n_latent for chain in mean):
            raise UserError(
                f"{args.run}:0: thinks in words, it has no latents to probe; give a run that has"
            )
        report = {
            "run": args.run,
            "reading": reading(mean, problems, model.c, args.seed),
            "decoding": decoding(model, tokenizer, mean, problems),
            "using": using(model, solve, mean, problems, args),
        }
    evaluate.note_cut_off(args.run, mean, args.max_new)
    print0(json.dumps(report, indent=2) if args.json else table(report))


def parse(argv):
    """The command line, checked. Raises UserError."""
    parser = Parser(__doc__, "minatp.probe")
    add = parser.add_argument
    add("run", help="folder of a run, or of a saved model")
    add("--file", default="", help="problems (JSON, JSONL, iCoT) [the run's test set]")
    add("--problems", type=int, default=1000, help="how many of them [%(default)s]")
    add("--seed", type=int, default=0, help="of the split, the shuffle and the noise [%(default)s]")
    add("--max-new", type=int, default=128, help="most tokens of an answer [%(default)s]")
    add_device_options(parser)
    add("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args(argv)

    if args.problems < FEWEST or args.max_new < 1:
        raise UserError(
            f"command line: --problems must be at least {FEWEST} and --max-new positive, not "
            f"{args.problems}, {args.max_new}"
        )

    # torch's CPU generator looks at 32 bits of a seed: a larger one would repeat a smaller one
    if not 0 <= args.seed < 2**32:
        raise UserError(
            f"command line: --seed must not be negative or above 2^32 - 1, not {args.seed}"
        )
    return args


def problems_of(args):
    """The problems that the command line asks for. Raises UserError if they are too few."""
    if args.file:
        problems = read_problems(args.file)[: args.problems]
    else:
        problems = test_set(args.run, args.problems)
    if len(problems) < FEWEST:
        raise UserError(
            f"{args.file or args.run}:0: has {len(problems)} problems; "
            f"a probe needs at least {FEWEST}"
        )
    return problems


# ---- reading -------------------------------------------------------------------------------------


def reading(chains, problems, c, seed):
    """Probes of the steps' results: a list of dicts (see `probe`), one per source of results."""
    # A row for each thought: its latents, its problem and its place in the chain
    x = torch.cat([chain.z.reshape(-1, c * chain.z.shape[-1]) for chain in chains])
    thoughts = [(i, t) for i, chain in enumerate(chains) for t in range(chain.n_latent // c)]
    problem_of = torch.tensor([i for i, _ in thoughts])

    # What a thought may hold: the result of the problem's own step in that place, or of what φ
    # reads in it (without φ there are no results, and that probe is left out)
    sources = {
        "as written": [problem.steps for problem in problems],
        "as φ reads it": [chain.thoughts for chain in chains],
    }
    probes = []
    for name, steps in sources.items():
        # Some thoughts have no step in that place, and some steps no result
        results = [
            reward.result_as_float(steps[i][t]) if t < len(steps[i]) else None for i, t in thoughts
        ]
        known = torch.tensor([result is not None for result in results])
        y = torch.tensor([r for r in results if r is not None], dtype=torch.float64)
        group = problem_of[known]
        if len(y) >= 20 and len(group.unique()) >= 6:  # enough to fit and to test
            probes.append({"result": name, **probe(x[known].double(), y, group, seed)})
    return probes


def probe(x, y, group, seed=0):
    """How well y (N,) is a linear function of x (N, D), judged on problems that the fit never sees.

    group (N,): the problem of each row. Returns a dict with
    "r2": of ridge regression on sign(y)·log(1 + |y|);
    "accuracy", "accuracy_ci95": of a ridge classifier whose classes are the values seen in the fit;
    "commonest": the accuracy of always saying the commonest value.
    """
    parts = split(group, seed)
    tune, test = parts.tune, parts.test
    fitted = ~test  # once the ridge is chosen, the rows it was chosen on join the fit

    # Targets. Column 0 is the number, compressed, as results span orders of magnitude; the others
    # are one class for each value
    values, label = y.unique(return_inverse=True)
    size = y.sign() * y.abs().log1p()
    one_hot = torch.eye(len(values), dtype=x.dtype)[label]
    target = torch.cat((size[:, None], one_hot), 1)

    def explained(out, rows):
        return r2(out[:, 0], target[rows, 0])

    def named(out, rows):
        return float((out[:, 1:].argmax(1) == label[rows]).double().mean())

    # Choose a ridge for each of the two measures, then fit again with more rows
    tuning = {ridge: ridge_fit(x[parts.fit], target[parts.fit], ridge)(x[tune]) for ridge in RIDGES}
    predicted = []
    for score in (explained, named):
        scores = {ridge: score(out, tune) for ridge, out in tuning.items()}
        best = max(RIDGES, key=scores.get)
        predicted.append(ridge_fit(x[fitted], target[fitted], best)(x[test]))
    number, classes = predicted[0][:, 0], predicted[1][:, 1:]

    # Judge both on the test rows. A value that the fit has never seen counts as wrong
    known = torch.isin(label, label[fitted])[test]
    n_right = int(((classes.argmax(1) == label[test]) & known).sum())
    n = int(test.sum())
    commonest = label[fitted].mode().values
    return {
        "n_steps": n,
        "n_problems": parts.n_test_group,
        "n_values": len(values),
        "r2": r2(number, target[test, 0]),
        "accuracy": n_right / n,
        "accuracy_ci95": evaluate.wilson(n_right, n),
        "commonest": float((label[test] == commonest).double().mean()),
    }


@dataclass
class Parts:
    """Rows of a probe: masks (N,). No group has rows in two of them."""

    fit: torch.Tensor
    tune: torch.Tensor  # to choose the ridge on
    test: torch.Tensor
    n_test_group: int


def split(group, seed):
    """Split the groups at random: a third to test, a sixth to choose the ridge, half to fit."""
    # By problem and not by row: the thoughts of one problem share numbers, and on both sides of the
    # split they would flatter the probe
    ids = group.unique()
    order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    third, half = len(order) // 3, len(order) // 2
    return Parts(
        fit=torch.isin(group, order[half:]),
        tune=torch.isin(group, order[third:half]),
        test=torch.isin(group, order[:third]),
        n_test_group=third,
    )


def ridge_fit(x, y, ridge):
    """Least squares with a penalty ridge·|W|² on standardised x (N, D).

    Returns a function of x (M, D) that predicts y (M, E).
    """
    # Standardise, so that one penalty suits all dimensions
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-9)
    level = y.mean(0)  # the intercept, which is not penalised
    z = (x - mean) / scale

    # The normal equations: (zᵀz + ridge·I)·W = zᵀ(y − level)
    penalty = ridge * torch.eye(z.shape[1], dtype=z.dtype)
    W = torch.linalg.solve(z.T @ z + penalty, z.T @ (y - level))

    def predict(x):
        # The fit's mean and scale, whatever rows these are
        return (x - mean) / scale @ W + level

    return predict


def r2(prediction, y):
    """The share of the variance of y (N,) that is explained; negative if the mean is better."""
    residual = (prediction - y).pow(2).sum()
    return float(1 - residual / (y - y.mean()).pow(2).sum().clamp(min=1e-30))


# ---- decoding ------------------------------------------------------------------------------------


def decoding(model, tokenizer, chains, problems):
    """What φ takes from a thought: a dict for the words of a step up to its last "=", and one for
    the words after it. [] without φ, or if one problem has more than half of the steps.

    chains: a list of Chain, with z. The dicts have −log p of the words, a mean over the steps in
    nats, given the step's own thought ("own"), the mean of all thoughts ("mean"), and the thought
    of another problem ("other"); then other − own ("more") and its standard error ("more_se").

    The steps are as written, and the thoughts are the model's. So where π has erred, "own" is high.
    """
    if not model.decode:
        return []
    thoughts, steps, problem_of = thoughts_with_steps(model, chains, problems)

    # The thought half the list away is another problem's, unless one has more than half the list
    N, n_of_problem = len(steps), Counter(problem_of)
    if max(n_of_problem.values(), default=1) > N // 2:
        return []
    z = torch.stack(thoughts)  # (N, c, D)
    given = {"own": z, "mean": z.mean(0).expand_as(z), "other": z.roll(N // 2, 0)}

    # The loss of each part of each step. (A token that covers more than "=" is in the second part)
    texts = tokenizer.encode_split(steps, [step.rindex("=") + 1 for step in steps])
    nll = {name: step_nll(model, x, texts, tokenizer.eos[0]) for name, x in given.items()}
    rows = []
    for part, words in enumerate(("up to =", "after =")):
        more = nll["other"][:, part] - nll["own"][:, part]
        row = {"words": words, **{name: float(x[:, part].mean()) for name, x in nll.items()}}
        row |= {"more": float(more.mean()), "more_se": standard_error(more, problem_of)}
        rows.append({**row, "n_steps": N, "n_problems": len(n_of_problem)})
    return rows


def thoughts_with_steps(model, chains, problems):
    """The thoughts for which the problem has a step, as written, with a result.

    Returns three lists of N: the thoughts (c, D), their steps, and the indices of their problems.
    """
    c, K = model.c, model.K
    thoughts, steps, problem_of = [], [], []
    for i, (chain, problem) in enumerate(zip(chains, problems)):
        # If there are more than K steps, the K-th thought stands for several
        n_step = len(problem.steps) if len(problem.steps) <= K else K - 1
        for t, step in enumerate(problem.steps[: min(n_step, chain.n_latent // c)]):
            if reward.result(step) is not None:
                thoughts.append(chain.z[c * t : c * t + c])
                steps.append(step)
                problem_of.append(i)
    return thoughts, steps, problem_of


@torch.no_grad()
def step_nll(model, z, texts, eos):
    """φ's −log p of N steps, each in two parts, given thoughts z (N, c, D) -> (N, 2).

    texts: N pairs, the ids of a step and how many of them are the first part. eos ends the second.
    """
    parts = []
    for i in range(0, len(z), 64):
        some = texts[i : i + 64]
        text = pad([[*ids, eos] for ids, _ in some], IGNORE).to(model.device)
        target_at = (text != IGNORE).nonzero(as_tuple=True)
        latents = z[i : i + 64].to(model.device)
        nll = thought_token_nll(model.decoder, latents, text, target_at).double().cpu()  # (n, Ts)

        n_first = torch.tensor([n for _, n in some])
        is_first = torch.arange(nll.shape[1]) < n_first[:, None]
        parts.append(torch.stack(((nll * is_first).sum(1), (nll * ~is_first).sum(1)), 1))
    return torch.cat(parts)


def standard_error(x, group):
    """Of the mean of x (N,), whose entries may be correlated within a group. group: N indices."""
    of_group = torch.zeros(max(group) + 1, dtype=x.dtype)
    of_group.index_add_(0, torch.tensor(group), x - x.mean())
    return float(of_group.norm() / len(x))


# ---- using ---------------------------------------------------------------------------------------


def using(model, solve, mean, problems, args):
    """Accuracy with the run's own thoughts and with changed ones: a list of dicts.

    Zeros and draws from the prior are as many thoughts as the problem's own. Another problem's
    thoughts may be more or fewer, and at a wider σ the stop head decides anew how many there are.
    """
    # Put other thoughts in place of the run's own
    forced, donor = changed_thoughts(model, mean, args.seed)
    chains = {"as they are": mean}
    for name, thoughts in forced.items():
        chains[name] = solve(forced=thoughts)

    # Sample the thoughts, ever more widely, and decide the rest greedily
    for spread in SPREADS if model.vae else ():
        noise = Noise.draw(model, len(mean), args.max_new, args.seed, spread=spread, greedy=True)
        noise.u_stop.fill_(0.5)  # the stop head takes its likelier decision
        chains[f"σ × {spread:g}"] = solve(noise=noise)

    # Compare the answers
    rows = []
    for name, changed in chains.items():
        measured = evaluate.measure(changed, problems)
        row = {"thoughts": name}
        for key in ("n_problems", "accuracy", "accuracy_ci95", "latents"):
            row[key] = measured[key]
        row["same_answer"] = agreement(changed, mean)

        # If the thoughts decide the answer, and not the question, it is the donor's
        if name == OTHER:
            row["donor_answer"] = agreement(changed, [mean[i] for i in donor.tolist()])
        rows.append(row)
    return rows


def changed_thoughts(model, mean, seed):
    """What takes the place of the thoughts of the Chains `mean` -> ({name: Forced}, donor).

    donor (N,): the problem whose thoughts each problem gets, one with about as many.
    """
    # The chains' own thoughts, padded to cK
    N, D = len(mean), model.policy.cfg.n_embd
    n = torch.tensor([chain.n_latent for chain in mean])
    own = torch.zeros(N, model.c * model.K, D)
    for i, chain in enumerate(mean):
        own[i, : n[i]] = chain.z

    # Shuffled, then sorted by length, each problem gets the thoughts of the one after it
    lengths = n.tolist()

    def length(i):
        return lengths[i]

    g = torch.Generator().manual_seed(seed)
    order = sorted(torch.randperm(N, generator=g).tolist(), key=length)
    donor = torch.empty(N, dtype=torch.long)
    donor[order] = torch.tensor(order[1:] + order[:1])

    # "no thoughts" forces none of them (n = 0): the answer follows the question at once
    always = torch.ones(N, dtype=torch.bool)  # the answer follows the forced thoughts
    drawn = torch.randn(own.shape, generator=g)
    forced = {
        OTHER: Forced(own[donor], n[donor], always),
        "thoughts all zero": Forced(0 * own, n, always),
        PRIOR: Forced(drawn, n, always),
        "no thoughts": Forced(own, 0 * n, always),
    }
    if not model.vae:  # no prior
        del forced[PRIOR]
    return forced, donor


def agreement(a, b):
    """The share of problems that two lists of Chains answer alike."""
    return sum(evaluate.agree(x, y) for x, y in zip(a, b)) / len(a)


# ---- the table -----------------------------------------------------------------------------------


def table(report):
    """The report in columns."""
    lines = [report["run"]]

    # Reading
    if report["reading"]:
        title = "a linear probe reads a result"
        columns = f"{'R²':>6}  {'accuracy':>8}  {'95 %':>16}  {'commonest':>9}  steps (problems)"
        lines += ["", f"{title:32} {columns}"]
    for row in report["reading"]:
        lines.append(
            f"{row['result']:32} {row['r2']:6.3f}  {row['accuracy']:8.1%}  "
            f"{evaluate.interval(row)}  {row['commonest']:9.1%}  "
            f"{row['n_steps']} ({row['n_problems']})"
        )

    # Decoding
    if report["decoding"]:
        columns = f"{'own thought':>11}  {'mean thought':>12}  {'other':>8}  {'other − own':>15}"
        lines += ["", f"{'words that φ writes, nats':32} {columns}  steps (problems)"]
    for row in report["decoding"]:
        more = f"{row['more']:.3f} ± {row['more_se']:.3f}"
        lines.append(
            f"{row['words']:32} {row['own']:11.3f}  {row['mean']:12.3f}  {row['other']:8.3f}  "
            f"{more:>15}  {row['n_steps']} ({row['n_problems']})"
        )

    # Using
    columns = f"{'accuracy':>8}  {'95 %':>16}  {'answer as before':>16}  {'latents':>7}  problems"
    lines += ["", f"{'thoughts':32} {columns}"]
    for row in report["using"]:
        line = (
            f"{row['thoughts']:32} {row['accuracy']:8.1%}  {evaluate.interval(row)}  "
            f"{row['same_answer']:16.1%}  {row['latents']:7.1f}  {row['n_problems']}"
        )
        if "donor_answer" in row:
            line += f"   the other problem's answer: {row['donor_answer']:.1%}"
        lines.append(line)
    return "\n".join(lines)
