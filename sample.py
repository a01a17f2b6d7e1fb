"""Watch a model think: every thought read back as text, and the answer.

    python sample.py                          some problems of the test set, with the run in out/sft
    python sample.py "Ann has 5 pens. …"      a question of yours; - reads one question a line from stdin
    python sample.py --n 8 --temperature 1    several sampled chains of each question
"""
import argparse
import json
import math
import os
import sys
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from pathlib import Path

from minatp import checkpoint, config, data, evaluate, problems, reward, run


def main(argv=None):
    parser = config.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("question", nargs="?", help="a question, or - for stdin [--problems of the test set]")
    parser.add_argument("--run", default="out/sft", help="folder of a run, or of a saved model [%(default)s]")
    parser.add_argument("--file", help="problems (JSON, JSONL, iCoT) or plain questions, one a line")
    parser.add_argument("--problems", type=int, default=4, help="how many of a file or of the test set, 0: all [%(default)s]")
    parser.add_argument("--n", type=int, default=1, help="chains per question; more than one are sampled [%(default)s]")
    parser.add_argument("--vote", default="", help="majority | coherence: of the --n chains show the one elected, without looking at the answer")
    parser.add_argument("--temperature", type=float, help="of the noise and the words; 0: the mean policy [0, or 1 with --n]")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the problems chosen [%(default)s]")
    parser.add_argument("--max-new", type=int, default=128, help="most tokens of an answer [%(default)s]")
    parser.add_argument("--device", default="", help="cpu | cuda | cuda:N [cuda where there is one]")
    parser.add_argument("--json", action="store_true", help="one JSON object per chain")
    parser.known = [o for action in parser._actions for o in action.option_strings]
    args = parser.parse_args(argv)
    for name in ("n", "max_new"):
        if getattr(args, name) < 1:
            raise config.UserError(f"command line: {config.flag(name)} must be positive, not {getattr(args, name)}")
    if args.vote not in ("", "majority", "coherence") or args.vote and args.n < 2:
        raise config.UserError(f"command line: --vote must be majority or coherence, with --n of at least 2, not {args.vote!r} of {args.n}")
    temperature = args.temperature if args.temperature is not None else float(args.n > 1)
    if not 0 <= temperature < math.inf or args.problems < 0 or not 0 <= args.seed < 2**32:
        raise config.UserError("command line: --temperature, --problems and --seed must not be negative, nor without end")

    asked = questions(args)
    device = run.pick_device(args.device)
    model, tokens = checkpoint.load(args.run)
    model.to(device).eval()
    prompts = [tokens.prompt(p.question) for p in asked]
    room = model.policy.cfg.block_size - model.c * model.K - args.max_new - 1
    for p, prompt in zip(asked, prompts):
        if len(prompt) > room:
            raise config.UserError(f"{p.at}: the question {p.question[:40]!r} … is {len(prompt)} tokens long and there is room for "
                                   f"{room}; shorten it or lower --max-new")
    began = time.perf_counter()
    with run.memory("sample.py", len(prompts), max(map(len, prompts)) + args.max_new, "--problems or --max-new"), run.autocast(device):
        samples = [evaluate.solve(model, tokens, prompts, args.max_new, seed=args.seed * 1000 + k if temperature else None,
                                  temperature=temperature or 1.0) for k in range(args.n)]
    seconds = time.perf_counter() - began
    chains = [(p, [s[i] for s in samples]) for i, p in enumerate(asked)]
    if args.vote:
        chains = [(p, [evaluate.elect(found, args.vote)]) for p, found in chains]
    if args.json:
        for p, found in chains:
            for chain in found:
                print(json.dumps(record(p, chain), ensure_ascii=False))
        return
    paint = Paint(sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    for p, found in chains:
        print("\n" + paint.bold(p.question))
        for chain in found:
            print("\n".join(draw(p, chain, paint)))
    print(paint.dim(closing(chains, seconds, args.run)))


def questions(args):
    """The problems to show; a bare question has an empty answer. Raises UserError."""
    if args.question and args.file:
        raise config.UserError("command line: give a question or --file, not both")
    if args.question == "-":
        found = bare(sys.stdin.read().splitlines(), "stdin")
    elif args.question is not None:
        found = bare([args.question], "command line")
    elif args.file:
        try:
            text = Path(args.file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise config.UserError(f"{args.file}:0: cannot be read ({e}); give problems or plain questions, one a line")
        is_problems = text.lstrip()[:1] in ("[", "{") or "||" in text
        found = data.read_problems(args.file) if is_problems else bare(text.splitlines(), args.file)
    else:
        path = Path(args.run) / "config.json"
        trained = config.of_run(path) if path.exists() else config.Config(data="?")
        if trained.data:
            if not trained.test:
                raise config.UserError(f"{args.run}:0: was not trained on the built-in task; give a question or --file")
            found = [p for f in trained.test.split(",") for p in data.read_problems(f)]
        else:
            found = problems.generate("test", (args.problems or 1000) * (args.seed + 1), 0)[-(args.problems or 1000):]
    return found[: args.problems] if args.problems and args.question is None else found


def bare(lines, where):
    found = [data.Problem(line.strip(), [], "", f"{where}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise config.UserError(f"{where}:1: holds no question; write one a line")
    for p in found:
        data.need_text(p.at, p.question)
    return found


def record(p, chain):
    """One chain as JSON."""
    return {"question": p.question, "thoughts": chain.thoughts, "steps": chain.steps, "coherent": reward.coherent(chain.steps, chain.answer),
            "stop_prob": chain.stop_prob, "sigma": chain.sigma, "text": chain.text, "answer": chain.answer, "gold": p.answer or None,
            "right": bool(reward.accuracy(chain.text, p.answer)) if p.answer else None, "latents": chain.n_latent, "tokens": chain.n_token}


class Paint:
    def __init__(self, on):
        self.on = on

    def __getattr__(self, name):
        code = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}[name]
        return lambda text: f"\x1b[{code}m{text}\x1b[0m" if self.on else text


def draw(p, chain, paint):
    """Lines that show one chain."""
    coherent = reward.coherent(chain.steps, chain.answer)
    steps = chain.steps if chain.steps else [""] * len(chain.sigma)
    width = max([len(s) for s in steps] + [12])
    lines = []
    for i, step in enumerate(steps):
        is_thought = i < len(chain.thoughts) or not chain.thoughts and chain.sigma
        facts = [paint.green("used  ") if coherent[i] else paint.yellow("unused")] if step else []
        if is_thought and i < len(chain.stop_prob):
            facts.append(f"stop {chain.stop_prob[i]:.3f}")
        if is_thought and i < len(chain.sigma):
            facts.append(f"σ {chain.sigma[i]:.3f}")
        lines.append(f"  {'◆' if is_thought else '·'} {paint.cyan(step.ljust(width))}  " + "  ".join(facts))
    if not steps and chain.n_latent:
        lines.append(paint.dim(f"  ◆ {chain.n_latent} latents, which nothing reads (no decoder LM)"))
    if len(chain.stop_prob) > len(chain.thoughts):
        lines.append("  ■ " + "stop".ljust(width) + f"  {'':6}  stop {chain.stop_prob[-1]:.3f}")
    answer = chain.answer if chain.answer is not None else chain.text
    verdict = "" if not p.answer else paint.green("  ✓") if reward.accuracy(chain.text, p.answer) else paint.red(f"  ✗ it is {p.answer}")
    ended = "" if chain.ended else paint.dim("  (cut off)")
    return [*lines, f"  → {paint.bold(answer)}{verdict}{ended}"]


def closing(chains, seconds, where):
    """The last line: how many are right, how long the chains are, how fast they came."""
    every = [(p, c) for p, found in chains for c in found]
    judged = [bool(reward.accuracy(c.text, p.answer)) for p, c in every if p.answer]
    right = f"{sum(judged)} of {len(judged)} right · " if judged else ""
    latents, words = sum(c.n_latent for _, c in every), sum(c.n_token for _, c in every)
    return (f"\n{right}{latents / len(every):.1f} latents + {words / len(every):.1f} tokens a chain · "
            f"{(latents + words) / seconds:,.0f} tokens/s · {where}")


if __name__ == "__main__":
    try:
        sys.exit(config.guarded(main))
    except BrokenPipeError:  # sample.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
