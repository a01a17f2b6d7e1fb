"""What a run's latents hold, and whether its answers need them: one table of numbers.

    python -m minatp.probe out/sft            --json for a program; --file, --problems for problems of your own

Reading: how much of a step's result a linear probe (ridge regression) reads from the step's latents, on problems that it was not
fitted on. "as written": the result in the problem's own step of that place; "as φ reads it": the result in φ's words.
Using: accuracy of the greedy answer when the thoughts are taken away, or are another problem's, or noisy.
"""

import json

import torch

from .. import reward
from ..rollout import Forced, Noise
from ..run import evaluate
from ..run.device import autocast, pick_device, place, solving_guard
from ..run.errors import UserError
from ..run.huggingface import load_model
from ..run.options import Parser
from ..run.problem_files import read_problems
from ..run.splits import encode_prompts, test_set
from ..run.terminal import print0

SPREADS = (0.5, 1.0, 2.0, 4.0, 8.0)
RIDGES = tuple(10.0**k for k in range(-3, 5))


def main(argv=None):
    parser = Parser(__doc__, "minatp.probe")
    parser.add_argument("run", help="folder of a run, or of a saved model")
    parser.add_argument(
        "--file", default="", help="problems (JSON, JSONL, iCoT) [the run's test set]"
    )
    parser.add_argument("--problems", type=int, default=1000, help="how many of them [%(default)s]")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split, the shuffle and the noise [%(default)s]"
    )
    parser.add_argument(
        "--max-new", type=int, default=128, help="most tokens of an answer [%(default)s]"
    )
    parser.add_argument(
        "--device", default="", help="cpu | cuda | cuda:N [cuda where there is one]"
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    args = parser.parse_args(argv)
    if args.problems < 10 or args.max_new < 1:
        raise UserError(
            f"command line: --problems must be at least 10 and --max-new positive, not {args.problems}, {args.max_new}"
        )
    if not 0 <= args.seed < 2**32:
        raise UserError(
            f"command line: --seed must not be negative and below 2^32, not {args.seed}"
        )
    found = (
        read_problems(args.file)[: args.problems]
        if args.file
        else test_set(args.run, args.problems)
    )
    if len(found) < 10:
        raise UserError(
            f"{args.file or args.run}:0: has {len(found)} problems; a probe needs at least 10"
        )
    device = pick_device(args.device)
    model, tokenizer = load_model(args.run)
    place(model, device).eval()
    prompts = encode_prompts(found, tokenizer, model, args.max_new)
    with solving_guard(prompts, model, args.max_new, what="probe"), autocast(device):
        solve = lambda **how: evaluate.solve(
            model, tokenizer, prompts, args.max_new, keep_z=True, **how
        )
        mean = solve()
        if not any(c.n_latent for c in mean):
            raise UserError(
                f"{args.run}:0: thinks in words, it has no latents to probe; give a run that has"
            )
        report = {
            "run": args.run,
            "reading": reading(mean, found, model.c, args.seed),
            "using": using(model, solve, mean, found, args),
        }
    print0(json.dumps(report, indent=2) if args.json else table(report))


# ---- reading ------------------------------------------------------------------------------------------------------------


def reading(chains, problems, c, seed):
    """Probes of the steps' results: a list of dicts (see `probe`), one for each thing that a result can be taken from."""
    x, owner = torch.cat([chain.z.reshape(-1, c * chain.z.shape[-1]) for chain in chains]), []
    for i, chain in enumerate(chains):
        owner += [(i, t) for t in range(chain.n_latent // c)]
    sources = {
        "as written": [p.steps for p in problems],
        "as φ reads it": [chain.thoughts for chain in chains],
    }
    out = []
    for name, texts in sources.items():
        results = [
            reward.result_as_float(texts[i][t]) if t < len(texts[i]) else None for i, t in owner
        ]
        known = torch.tensor([r is not None for r in results])
        group = torch.tensor([i for i, _ in owner])[known]
        if known.sum() >= 20 and len(group.unique()) >= 6:
            y = torch.tensor([r for r in results if r is not None], dtype=torch.float64)
            out.append({"result": name, **probe(x[known].double(), y, group, seed)})
    return out


def probe(x, y, group, seed=0):
    """How linear the numbers y (N,) are in x (N, D), judged on a third of the groups (N,), problems that the fit never sees.

    "r2": of ridge regression on sign(y)·log(1 + |y|); "accuracy": of the ridge classifier, a value seen in the fit being a class;
    "commonest": of always saying the commonest value. The ridge is chosen on a quarter of the fit's groups.
    """
    ids = group.unique()
    order = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
    held, tuning, fit = (
        order[: len(order) // 3],
        order[len(order) // 3 : len(order) // 2],
        order[len(order) // 2 :],
    )
    test, tune, train = (torch.isin(group, part) for part in (held, tuning, fit))
    values, label = y.unique(return_inverse=True)
    known = torch.isin(label, label[train | tune])
    target = torch.cat(
        (
            y.sign()[:, None] * y.abs().log1p()[:, None],
            torch.eye(len(values), dtype=x.dtype)[label],
        ),
        1,
    )
    explained = lambda out, rows: r2(out[:, 0], target[rows, 0])
    named = lambda out, rows: float((out[:, 1:].argmax(1) == label[rows]).double().mean())
    tried, best = {k: ridge_fit(x[train], target[train], k)(x[tune]) for k in RIDGES}, []
    for score in (explained, named):
        ridge = max(RIDGES, key=lambda k: score(tried[k], tune))
        best.append(ridge_fit(x[~test], target[~test], ridge)(x[test]))
    right = int(((best[1][:, 1:].argmax(1) == label[test]) & known[test]).sum())
    n, commonest = int(test.sum()), label[~test].mode().values
    return {
        "n_steps": n,
        "n_problems": len(held),
        "n_values": len(values),
        "r2": r2(best[0][:, 0], target[test, 0]),
        "accuracy": right / n,
        "accuracy_ci95": evaluate.wilson(right, n),
        "commonest": float((label[test] == commonest).double().mean()),
    }


def ridge_fit(x, y, ridge):
    """Least squares with a penalty ridge·|W|² on standardised x (N, D) -> a function of x that predicts y (N, E)."""
    mean, scale = x.mean(0), x.std(0).clamp(min=1e-9)
    z, level = (x - mean) / scale, y.mean(0)
    W = torch.linalg.solve(
        z.T @ z + ridge * torch.eye(z.shape[1], dtype=z.dtype), z.T @ (y - level)
    )
    return lambda x: (x - mean) / scale @ W + level


def r2(guess, y):
    """Share of the variance of y (N,) that the guess explains; negative where the mean is better."""
    return float(1 - (guess - y).pow(2).sum() / (y - y.mean()).pow(2).sum().clamp(min=1e-30))


# ---- using --------------------------------------------------------------------------------------------------------------


def using(model, solve, mean, problems, args):
    """Accuracy with the thoughts as they are and changed: a list of dicts. Sets of thoughts keep each problem's own length, save
    those of another problem, which bring theirs."""
    c, n = model.c, torch.tensor([chain.n_latent for chain in mean])
    own = torch.zeros(len(mean), c * model.K, model.policy.cfg.n_embd)
    for i, chain in enumerate(mean):
        own[i, : n[i]] = chain.z
    g = torch.Generator().manual_seed(args.seed)
    donor = torch.empty(len(mean), dtype=torch.long)
    order = sorted(
        torch.randperm(len(mean), generator=g).tolist(), key=lambda i: int(n[i])
    )  # neighbours are of like length
    donor[order] = torch.tensor(order[1:] + order[:1])
    always = torch.ones(len(mean), dtype=torch.bool)
    chance = torch.randn(own.shape, generator=g)
    forced = {
        "thoughts of another problem": Forced(own[donor], n[donor], always),
        "thoughts all zero": Forced(0 * own, n, always),
        "thoughts drawn from the prior": Forced(chance, n, always),
        "no thoughts": Forced(own, 0 * n, always),
    }
    if not model.vae:
        del forced["thoughts drawn from the prior"]
    chains = {"as they are": mean} | {name: solve(forced=given) for name, given in forced.items()}
    for spread in SPREADS if model.vae else ():
        noise = Noise.draw(model, len(mean), args.max_new, args.seed, spread=spread, greedy=True)
        noise.stop.fill_(0.5)  # the likelier decision
        chains[f"σ × {spread:g}"] = solve(noise=noise)
    out = [
        {"thoughts": name, **judged(found, problems), "same_answer": agreement(found, mean)}
        for name, found in chains.items()
    ]
    out[1]["donor_answer"] = agreement(
        chains["thoughts of another problem"], [mean[i] for i in donor.tolist()]
    )
    return out


def judged(chains, problems):
    m = evaluate.measure(chains, problems)
    return {k: m[k] for k in ("n_problems", "accuracy", "accuracy_ci95", "latents")}


def agreement(a, b):
    """Share of problems that two lists of Chains answer alike."""
    return sum(evaluate.agree(x, y) for x, y in zip(a, b)) / len(a)


def table(report):
    """The report in columns."""
    head = f"{'a linear probe reads a result':32} {'R²':>6}  {'accuracy':>8}  {'95 %':>16}  {'commonest':>9}  steps (problems)"
    lines = [report["run"], *(["", head] if report["reading"] else [])]
    span = lambda r: f"[{r['accuracy_ci95'][0]:6.1%}, {r['accuracy_ci95'][1]:6.1%}]"
    lines += [
        f"{r['result']:32} {r['r2']:6.3f}  {r['accuracy']:8.1%}  {span(r)}  {r['commonest']:9.1%}  {r['n_steps']} ({r['n_problems']})"
        for r in report["reading"]
    ]
    lines += [
        "",
        f"{'thoughts':32} {'accuracy':>8}  {'95 %':>16}  {'answer as before':>16}  {'latents':>7}  problems",
    ]
    lines += [
        f"{r['thoughts']:32} {r['accuracy']:8.1%}  {span(r)}  {r['same_answer']:16.1%}  {r['latents']:7.1f}  {r['n_problems']}"
        + (f"   the other problem's answer: {r['donor_answer']:.1%}" if "donor_answer" in r else "")
        for r in report["using"]
    ]
    return "\n".join(lines)
