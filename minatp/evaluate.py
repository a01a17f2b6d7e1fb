"""Solve problems and measure the answers: what train.py reports and sample.py shows.

    python -m minatp.evaluate out/sft out/rl              the test set, and what each run gained over the first
    python -m minatp.evaluate out/sft out/rl --longer     the built-in task with more steps than were ever taught
    python -m minatp.evaluate out/sft --votes 8           also pass@8, and the vote of 8 chains by majority and by coherence
"""
import json
import math
import statistics
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch

from kernels import graph

from . import checkpoint, config, distributed, problems, reward, run, sets
from .data import left_pad, read_problems
from .explain import read_thoughts
from .rollout import Noise, rollout

BATCH = 500  # problems at once


@dataclass
class Chain:
    """One problem, solved once, as text."""
    thoughts: list    # what φ reads in each latent step; [] without a decoder
    text: str         # what the policy wrote, "### 19" at its end
    ended: bool       # with eos, not by running out of room
    n_latent: int
    n_token: int      # written, eos included
    stop_prob: list   # at each boundary where the stop head was asked
    sigma: list       # mean σ of each latent step; [] without the VAE
    z: torch.Tensor | None = None  # (n_latent, D), where solve was asked to keep it

    @property
    def steps(self):
        """Every reasoning step in words: the thoughts, then the lines written before the answer."""
        lines = [line for t in (*self.thoughts, self.text.partition("### ")[0]) for line in t.split("\n")]
        return [line for line in lines if line.strip()]

    @property
    def answer(self):
        return reward.answer(self.text)


@torch.no_grad()
def solve(model, tokens, prompts, max_new, batch_size=BATCH, seed=None, temperature=1.0, between=None, noise=None, given=None,
          keep=False):
    """One Chain per prompt (a list of ids). The mean policy, or sampled where a seed is given.

    noise (Noise), given (Given): of all prompts, for chance and thoughts of the caller's choice. keep: Chains with their latents.
    between: called after each batch; it may raise.
    Prompts of like length share a batch; a problem's result depends neither on that nor on its neighbours.
    """
    device = model.policy.freq.device
    if seed is not None:
        noise = Noise.draw(model, len(prompts), max_new, seed, temperature)
    order = distributed.mine(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    chains = [None] * len(prompts)
    for start in range(0, len(order), batch_size):
        rows = order[start:start + batch_size]
        r = rollout(model, *left_pad([prompts[i] for i in rows], tokens.end, device), max_new, noise and noise.at(rows, device),
                    given=given and given.at(rows, device))
        for b, (i, chain) in enumerate(zip(rows, as_text(model, tokens, r))):
            chains[i] = chain
            if keep:
                chain.z = r.z[b, : chain.n_latent].cpu()
        if between:
            between()
    graph.release()
    return distributed.merged(chains)


def as_text(model, tokens, r):
    """Rollout -> a list of Chains."""
    c, K = model.c, model.K
    step_used = torch.arange(K, device=r.z.device) * c < r.n_latent[:, None]     # (B, K)
    row, s = step_used.nonzero(as_tuple=True)
    thoughts = [[] for _ in range(len(r.z))]
    if model.decode:
        texts = read_thoughts(model.decoder, r.z.unflatten(1, (K, c))[row, s], tokens.eos[0], model.longest)
        for b, ids in zip(row.tolist(), texts):
            thoughts[b].append(tokens.decode(ids))
    sigma = (0.5 * r.logvar).exp().mean(-1).unflatten(1, (K, c)).mean(-1).tolist() if model.vae else None
    out = []
    for b, (n_latent, n, ids, asked) in enumerate(zip(r.n_latent.tolist(), r.n_token.tolist(), r.token.tolist(), r.stop_prob.tolist())):
        out.append(Chain(thoughts[b], tokens.decode(ids[:n]), n > 0 and ids[n - 1] in tokens.eos, n_latent, n,
                         [p for p in asked if not math.isnan(p)], sigma[b][: n_latent // c] if model.vae else []))
    return out


def wilson(k, n, z=1.959964):
    """95 % interval [low, high] of a share k/n (Wilson's score interval)."""
    centre, half = k / n + z * z / (2 * n), z * math.sqrt(k / n * (1 - k / n) / n + z * z / (4 * n * n))
    return [max(0.0, (centre - half) / (1 + z * z / n)), min(1.0, (centre + half) / (1 + z * z / n))]


def measure(chains, problems):
    """Accuracy with its interval, lengths and coherence of one chain per problem."""
    right = [reward.accuracy(c.text, p.answer) for c, p in zip(chains, problems)]
    by_steps = Counter(len(p.steps) for p in problems)
    solved = Counter(len(p.steps) for r, p in zip(right, problems) if r)
    spoken = any(c.steps for c in chains)  # a method whose thoughts nobody reads has no coherence
    n = len(problems)
    return {
        "n_problems": n, "accuracy": sum(right) / n, "accuracy_ci95": wilson(sum(right), n),
        "latents": sum(c.n_latent for c in chains) / n, "answer_tokens": sum(c.n_token for c in chains) / n,
        "tokens": sum(c.n_latent + c.n_token for c in chains) / n,
        "coherence": statistics.fmean(reward.coherence(c.steps, c.answer) for c in chains) if spoken else None,
        "accuracy_by_steps": {s: solved[s] / by_steps[s] for s in sorted(by_steps)},
    }


def elect(chains, by):
    """The chain that speaks for several of one problem. No answer is looked at.

    by "majority": the first with the commonest answer. by "coherence": those that cohere best, then the majority of them.
    """
    if by == "coherence":
        best = max(reward.coherence(c.steps, c.answer) for c in chains)
        chains = [c for c in chains if reward.coherence(c.steps, c.answer) == best]
    key = lambda c: c.answer if c.answer is None or (n := reward.number(c.answer)) is None else n
    votes = Counter(key(c) for c in chains if c.answer is not None)
    commonest = votes.most_common(1)[0][0] if votes else None
    return next(c for c in chains if key(c) == commonest)


def vote(samples, problems):
    """samples: k lists of one Chain per problem. Shares of problems solved by any of the k, and by the chain elected."""
    n = len(problems)
    each = list(zip(*samples))
    solved = sum(any(reward.accuracy(c.text, p.answer) for c in chains) for chains, p in zip(each, problems))
    out = {"k": len(samples), "pass": solved / n, "pass_ci95": wilson(solved, n),
           "mean": sum(reward.accuracy(c.text, p.answer) for chains, p in zip(each, problems) for c in chains) / n / len(samples)}
    for by in ("majority", "coherence"):
        right = sum(reward.accuracy(elect(chains, by).text, p.answer) for chains, p in zip(each, problems))
        out |= {by: right / n, by + "_ci95": wilson(right, n)}
    return out


def tell(m):
    """A measurement in one line."""
    low, high = m["accuracy_ci95"]
    coherence = "" if m["coherence"] is None else f", coherence {m['coherence']:.1%}"
    sampled = "" if not (s := m.get("sampled")) else f"; of {s['k']} samples: one {s['mean']:.1%}, any {s['pass']:.1%}, majority {s['majority']:.1%}, coherence {s['coherence']:.1%}"
    return (f"{m['accuracy']:.1%} of {m['n_problems']} solved [{low:.1%}, {high:.1%}], {m['latents']:.1f} latents + "
            f"{m['answer_tokens']:.1f} tokens{coherence}{sampled}")


def paired(after, before, problems):
    """Accuracy gained from `before` to `after` (one Chain per problem each) and its standard error, by the differences (None for one problem)."""
    d = torch.tensor([reward.accuracy(a.text, p.answer) - reward.accuracy(b.text, p.answer) for a, b, p in zip(after, before, problems)])
    return {"gain": float(d.mean()), "gain_se": float(d.std() / len(d) ** 0.5) if len(d) > 1 else None}


def tell_gain(m):
    """What `paired` found, in words."""
    error = "" if m["gain_se"] is None else f" ± {100 * m['gain_se']:.1f} (standard error)"
    return f"gained {100 * m['gain']:+.1f} points{error}"


def agree(a, b):
    """Whether two Chains answer alike; those that give no answer, where they write the same."""
    return reward.same(a.answer, b.answer) or a.text == b.text


def reward_variance(model, tokens, prompts, golds, judge, max_new, seed, n_thought=6, n_word=4, **chance):
    """Where the reward's variance within a question comes from: (share of the thoughts, total), by a nested design.

    Each question gets n_thought draws of the thoughts and each of those n_word draws of the words. judge(chain, gold) -> reward.
    """
    B, device = len(prompts), model.policy.freq.device
    noise = Noise.draw(model, B * n_thought * n_word, max_new, seed, **chance)
    cell = torch.arange(B * n_thought * n_word) // n_word * n_word
    noise.eps, noise.stop = noise.eps[cell], noise.stop[cell]
    prompt, valid = left_pad(prompts, tokens.end, device)
    r = rollout(model, prompt, valid, max_new, noise.at(slice(None), device), n_thought * n_word)
    graph.release()
    R = torch.tensor([judge(c, golds[i // (n_thought * n_word)]) for i, c in enumerate(as_text(model, tokens, r))])
    R = R.view(B, n_thought, n_word)
    within = R.var(2).mean()
    between = (R.mean(2).var(1).mean() - within / n_word).clamp(min=0)
    total = between + within
    return float(between / total) if total > 0 else 0.0, float(total)


def main(argv=None):
    parser = config.Parser(__doc__, "minatp.evaluate")
    parser.add_argument("run", nargs="+", help="folders of runs, or of saved models")
    parser.add_argument("--file", default="", help="problems (JSON, JSONL, iCoT) [the first run's test set]")
    parser.add_argument("--longer", action="store_true", help="problems of the built-in task with 5 and 6 steps")
    parser.add_argument("--problems", type=int, default=0, help="how many, 0: all [%(default)s]")
    parser.add_argument("--votes", type=int, default=0, help="chains to sample for each problem [%(default)s]")
    parser.add_argument("--temperature", type=float, default=1.0, help="of those [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of those [%(default)s]")
    parser.add_argument("--max-new", type=int, default=128, help="most tokens of an answer [%(default)s]")
    parser.add_argument("--device", default="", help="cpu | cuda | cuda:N [cuda where there is one]")
    parser.add_argument("--json", action="store_true", help="one JSON object a run")
    args = parser.parse_args(argv)
    if args.file and args.longer:
        raise config.UserError("command line: give --file or --longer, not both")
    if min(args.problems, args.votes, args.max_new - 1) < 0 or not 0 < args.temperature < math.inf or not 0 <= args.seed < 2**32:
        raise config.UserError("command line: --problems, --votes and --seed must not be negative, --max-new and --temperature positive")
    if args.file:
        asked = read_problems(args.file)[: args.problems or None]
    elif args.longer:
        asked = problems.generate("longer", args.problems or 3000, 0)
    else:
        asked = sets.test_set(args.run[0], args.problems)
    device, first = run.pick_device(args.device), None
    for folder in args.run:  # before the first is measured
        checkpoint.locate(folder)
    for folder in args.run:
        model, tokens = checkpoint.load(folder)
        run.place(model, device).eval()
        prompts = sets.prompts(asked, tokens, model, args.max_new)
        told = run.progress(folder, -(-len(prompts) // BATCH) * (1 + args.votes))
        solved = partial(solve, model, tokens, prompts, args.max_new, BATCH, between=told, temperature=args.temperature)
        with run.tool_memory("evaluation", prompts, model, args.max_new), run.autocast(device):
            chains = solved()
            m = measure(chains, asked)
            if args.votes:
                m["sampled"] = vote([solved(seed=args.seed * 1000 + k) for k in range(args.votes)], asked)
        if first:
            m |= paired(chains, first, asked)
        first = first or chains
        run.say(json.dumps({"run": folder, **m}) if args.json else f"{folder}: {tell(m)}"
                + (f"; {tell_gain(m)}" if "gain" in m else ""))


if __name__ == "__main__":
    sys.exit(config.guarded(main))
