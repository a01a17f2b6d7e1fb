"""Watch a model think: every thought read back as text, and the answer.

    python sample.py                          some problems of the test set, with the run in out/sft
    python sample.py "Ann has 5 pens. …"      a question of yours; - reads one question a line from stdin
    python sample.py --n 8 --temperature 1    several sampled chains of each question
    python sample.py --run out/sft,out/rl --html thoughts.html    a page to look at: thoughts, links, latents; runs side by side
    python sample.py --edit "drop 2"          without thought 2: does the answer change? Also "swap 1 2" and "replace 2 WITH",
                                              WITH being zero, prior, next (problem's) or words: "replace 1 <<3*2=6>>"
"""
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minatp import reward
from minatp.problems import Problem
from minatp.rollout import Noise
from minatp.run import evaluate
from minatp.run.device import autocast, pick_device, place, solving_guard
from minatp.run.errors import UserError, run_command
from minatp.run.huggingface import load_model, locate
from minatp.run.options import Parser, flag
from minatp.run.problem_files import check_text, read_problems
from minatp.run.splits import encode_prompts, test_set
from minatp.tools import edit, page


def main(argv=None):
    args = options(argv)
    asked = questions(args)
    device = pick_device(args.device)
    for folder in args.run:  # before the first thinks
        locate(folder)
    shows = [show for folder, name in zip(args.run, names(args.run)) for show in think(args, folder, name, asked, device)]
    rows = list(zip(asked, zip(*(show.chains for show in shows))))  # (problem, the chains of each show)
    if args.json:
        for p, found in rows:
            for show, chains in zip(shows, found):
                for chain in chains:
                    print(json.dumps(record(p, chain, show), ensure_ascii=False))
        return
    paint = Paint(sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    if args.html:
        page.write(args.html, [show.view for show in shows], asked)
        print(f"{len(asked)} problems in {args.html}")
    else:
        for p, found in rows:
            print("\n" + paint.bold(p.question))
            for show, chains in zip(shows, found):
                if len(shows) > 1:
                    print(paint.dim(f"  {show.name}" + ("" if chains else ": does not apply")))
                for chain in chains:
                    print("\n".join(draw(p, chain, show.c, paint)))
    for show in shows:
        print(paint.dim(closing(show, shows, asked)))


def options(argv):
    """The command line, checked. Raises UserError."""
    parser = Parser(__doc__)
    parser.add_argument("question", nargs="?", help="a question, or - for stdin [--problems of the test set]")
    parser.add_argument("--run", action="append", help="folder of a run, or of a saved model; several: a,b or once more [out/sft]")
    parser.add_argument("--file", help="problems (JSON, JSONL, iCoT) or plain questions, one a line")
    parser.add_argument("--problems", type=int, help="how many of a file or of the test set, 0: all [4, or 50 with --html]")
    parser.add_argument("--html", default="", metavar="FILE", help="write a page that shows all of it, for a browser, with no network")
    parser.add_argument("--edit", action="append", default=[], help="edit the mean chain and think on from there; may be given again")
    parser.add_argument("--n", type=int, help="chains per question; more than one are sampled [1; beside the mean in --html: 6]")
    parser.add_argument("--vote", default="", help="majority | coherence: show the one elected of the --n chains; no answer is looked at")
    parser.add_argument("--temperature", type=float, help="of the noise and the words; 0: the mean policy [0, or 1 with --n]")
    parser.add_argument("--seed", type=int, default=0, help="of the samples and of the problems chosen [%(default)s]")
    parser.add_argument("--max-new", type=int, default=128, help="most tokens of an answer [%(default)s]")
    parser.add_argument("--device", default="", help="cpu | cuda | cuda:N [cuda where there is one]")
    parser.add_argument("--json", action="store_true", help="one JSON object per chain")
    args = parser.parse_args(argv)
    args.run = [f for given in args.run or ["out/sft"] for f in given.split(",") if f]
    args.edit = [edit.parse(text) for text in args.edit]
    if not args.run:
        raise UserError("command line: --run names no folder")
    if args.n is not None and args.n > 1 and args.temperature == 0:
        raise UserError(f"command line: --n {args.n} chains of --temperature 0 would be one and the same; leave one away")
    args.problems = args.problems if args.problems is not None else 50 if args.html else 4
    args.n = args.n if args.n is not None else 6 if args.html else 1
    args.temperature = args.temperature if args.temperature is not None else float(args.n > 1)
    for name in ("n", "max_new"):
        if getattr(args, name) < 1:
            raise UserError(f"command line: {flag(name)} must be positive, not {getattr(args, name)}")
    if args.n > 10_000:
        raise UserError(f"command line: --n {args.n} chains of each question are too many; at most 10000")
    if args.vote not in ("", "majority", "coherence") or args.vote and args.n < 2:
        raise UserError(f"command line: --vote must be majority or coherence, with --n of at least 2, not {args.vote!r} of {args.n}")
    if not 0 <= args.temperature < math.inf or args.problems < 0 or not 0 <= args.seed < 2**32:
        raise UserError("command line: --temperature, --problems and --seed must not be negative, nor without end")
    for a, b, wrong in (("--html", "--json", args.html and args.json), ("--html", "--vote", args.html and args.vote),
                        ("--edit", "--vote", args.edit and args.vote),
                        ("--edit", "--n without --html", args.edit and not args.html and args.temperature)):
        if wrong:
            raise UserError(f"command line: {a} does not go with {b}; leave one away")
    return args


@dataclass
class Show:
    """What a run, or an edit of it, makes of all questions."""
    run: str
    c: int         # latents a thought
    edit: str
    chains: list   # per question a list of Chains, [] where the edit does not apply
    seconds: float
    view: page.View | None = None

    @property
    def name(self):
        return f"{self.run} · {self.edit}" if self.edit else self.run


def names(folders):
    """Short names of runs, different where the folders are."""
    short = [(p.parent if p.name == "final" else p).name or f for f in folders for p in [Path(f).absolute()]]
    return [f if short.count(s) > 1 else s for f, s in zip(folders, short)]


def think(args, folder, name, asked, device):
    """Shows of one run: its chains, then those of every edit."""
    model, tokenizer = load_model(folder)
    place(model, device).eval()
    prompts = encode_prompts(asked, tokenizer, model, args.max_new)
    def solve(prompts=prompts, seed=None, forced=None):
        noise = None if seed is None else Noise.draw(model, len(prompts), args.max_new, seed, args.temperature)
        return evaluate.solve(model, tokenizer, prompts, args.max_new, noise=noise, forced=forced, keep_z=True)

    began = time.perf_counter()
    with solving_guard(prompts, model, args.max_new, what="sample"), autocast(device):
        if args.html or not args.temperature:
            mean = solve()
            shows = [Show(name, model.c, "", [[c] for c in mean], time.perf_counter() - began)]
        sampled = [solve(seed=args.seed * 1000 + k) for k in range(args.n)] if args.temperature else []
        sampled = [list(chains) for chains in zip(*sampled)]
        if args.vote and sampled:
            sampled = [[evaluate.elect(found, args.vote)] for found in sampled]
        if not args.html and sampled:
            shows = [Show(name, model.c, "", sampled, time.perf_counter() - began)]
        pool = solve(encode_prompts(donors(folder), tokenizer, model, args.max_new)) if any(e.words for e in args.edit) else []
        for e in args.edit:
            began = time.perf_counter()
            given, applies = edit.given(e, model, mean, mean + pool, args.seed)
            chains = [[c] if a else [] for c, a in zip(solve(forced=given), applies)]
            shows.append(Show(name, model.c, e.text, chains, time.perf_counter() - began))
        if args.html:
            plane = page.Plane.fit(mean, model.c)
            for show in shows:
                chains = [found[0] if found else None for found in show.chains]
                told = iter(page.read(model, tokenizer, [c for c in chains if c]))
                show.view = page.View(show.name, show.edit, chains, [] if show.edit else sampled, [next(told) if c else [] for c in chains],
                                      model.c, plane)
    return shows


def donors(folder):
    """Problems whose thoughts "replace 1 WORDS" may take, beside those that are shown: of the run's test set, where it brings one."""
    try:
        return test_set(folder, 500)
    except UserError:
        return []


def questions(args):
    """The problems to show; a bare question has an empty answer. Raises UserError."""
    if args.question and args.file:
        raise UserError("command line: give a question or --file, not both")
    if args.question == "-":
        try:
            return bare(sys.stdin.read().splitlines(), "stdin")[: args.problems or None]
        except UnicodeDecodeError as e:
            raise UserError(f"stdin:0: is not UTF-8 text ({e.reason})")
    if args.question is not None:
        return bare([args.question], "command line")
    if not args.file:
        return test_set(args.run[0], args.problems, args.seed)
    try:
        text = Path(args.file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{args.file}:0: cannot be read ({e}); give problems or plain questions, one a line")
    is_problems = text.lstrip()[:1] in ("[", "{") or "||" in text
    return (read_problems(args.file) if is_problems else bare(text.splitlines(), args.file))[: args.problems or None]


def bare(lines, where):
    found = [Problem(line.strip(), [], "", f"{where}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UserError(f"{where}:1: holds no question; write one a line")
    for p in found:
        check_text(p.source, p.question)
    return found


def record(p, chain, show):
    """One chain as JSON."""
    return {"run": show.run, "edit": show.edit, "question": p.question, "thoughts": chain.thoughts, "steps": chain.steps,
            "coherent": reward.coherent(chain.steps, chain.answer), "stop_prob": chain.stop_prob, "sigma": chain.sigma,
            "text": chain.text, "answer": chain.answer, "gold": p.answer or None,
            "right": bool(reward.accuracy(chain.text, p.answer)) if p.answer else None, "latents": chain.n_latent, "tokens": chain.n_token}


class Paint:
    def __init__(self, on):
        self.on = on

    def __getattr__(self, name):
        code = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}[name]
        return lambda text: f"\x1b[{code}m{text}\x1b[0m" if self.on else text


def draw(p, chain, c, paint):
    """Lines that show one chain, whose thoughts are of c latents."""
    rows, counted = page.rows_of(chain, c)
    used = dict(zip(counted, reward.coherent(chain.steps, chain.answer)))
    width = max([len(row["text"]) for row in rows] + [12])
    thoughts, written = [], []
    for i, row in enumerate(rows):
        facts = [paint.green("used  ") if used[i] else paint.yellow("unused")] if i in used else []
        facts += [f"{sign} {row[name]:.3f}" for sign, name in (("stop", "stop"), ("σ", "sigma")) if name in row]
        is_thought = "thought" in row
        (thoughts if is_thought else written).append(f"  {'◆' if is_thought else '·'} {paint.cyan(row['text'].ljust(width))}  {'  '.join(facts)}")
    if chain.n_latent and not chain.thoughts:
        thoughts.append(paint.dim(f"  {chain.n_latent} latents, which nothing reads (no decoder LM)"))
    if len(chain.stop_prob) > chain.n_latent // c:
        thoughts.append("  ■ " + "stop".ljust(width) + f"  {'':6}  stop {chain.stop_prob[-1]:.3f}")
    answer = chain.answer if chain.answer is not None else chain.text
    verdict = "" if not p.answer else paint.green("  ✓") if reward.accuracy(chain.text, p.answer) else paint.red(f"  ✗ it is {p.answer}")
    ended = "" if chain.ended else paint.dim("  (cut off)")
    return [*thoughts, *written, f"  → {paint.bold(answer)}{verdict}{ended}"]


def closing(show, shows, asked):
    """The last line of a run or an edit: how many are right, how long the chains are, how fast they came; what an edit changed."""
    every = [(p, c) for p, found in zip(asked, show.chains) for c in found]
    judged = [bool(reward.accuracy(c.text, p.answer)) for p, c in every if p.answer]
    right = f"{sum(judged)} of {len(judged)} right · " if judged else ""
    if show.edit:
        whole = next(s for s in shows if s.run == show.run)
        before = [(p, a[0], b[0]) for p, a, b in zip(asked, whole.chains, show.chains) if b]
        changed = sum(not evaluate.agree(a, b) for _, a, b in before)
        were = sum(bool(reward.accuracy(a.text, p.answer)) for p, a, _ in before if p.answer)
        return f"{show.name}: another answer in {changed} of {len(before)}" + (f" · {right}{were} unedited" if judged else "")
    latents, words = sum(c.n_latent for _, c in every), sum(c.n_token for _, c in every)
    return (f"\n{right}{latents / len(every):.1f} latents + {words / len(every):.1f} tokens a chain · "
            f"{(latents + words) / show.seconds:,.0f} tokens/s · {show.name}")


if __name__ == "__main__":
    run_command(main)
