"""Watch a model think: every thought read back as text, and the answer.

    python sample.py                         some problems of the test set, with the run in out/sft
    python sample.py "Ann has 5 pens. …"     a question of your own; - reads stdin, one a line
    python sample.py --n 8 --temperature 1   several sampled chains of each question
    python sample.py --edit "drop 2"         does the answer change without thought 2?
    python sample.py --run out/sft,out/rl --html thoughts.html   a page: the runs side by side

Other edits: "swap 1 2", and "replace 2 WITH", where WITH is zero, prior, next (the next problem's
thought) or the words of a thought, as in "replace 1 <<3*2=6>>".
"""

import os
import sys
import time

from minatp.rollout import Noise
from minatp.run import evaluate
from minatp.run.device import autocast, pick_device, pick_dtype, solving_guard
from minatp.run.errors import run_command
from minatp.run.huggingface import locate
from minatp.run.splits import encode_prompts
from minatp.tools import edit, page, show
from minatp.tools.sample_options import parse, read_questions


def main(argv=None):
    args = parse(argv, __doc__)
    problems = read_questions(args)
    device = pick_device(args.device)
    for folder in args.run:  # fail before the first run thinks
        locate(folder)

    # Think: a column for each run, and one for each edit of its chains
    columns = []
    for folder, name in zip(args.run, show.short_names(args.run)):
        columns += think(folder, name, problems, args, device)

    # Show them as JSON, on a page or in the terminal
    if args.json:
        show.print_json(columns, problems)
        return

    # No colours in a file, in a pipe, or against the user's NO_COLOR
    paint = show.Paint(sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    if args.html:
        page.write(args.html, columns, problems)
        print(f"{len(problems)} problems in {args.html}")
    else:
        show.print_chains(columns, problems, paint)

    for column in columns:
        print(paint("dim", show.summary(column, columns, problems)))


def think(folder, name, problems, args, device):
    """Solve all problems with one run -> show.Columns: its own chains, then each edit of them."""
    model, tokenizer = evaluate.load_trained(folder, device)
    prompts = encode_prompts(problems, tokenizer, model, args.max_new)

    def solve(prompts, seed=None, forced=None):
        """A Chain per prompt: by the mean policy, or sampled if there is a seed."""
        # The temperature applies to the latents' Gaussians and to the words alike
        noise = None
        if seed is not None:
            noise = Noise.draw(model, len(prompts), args.max_new, seed, args.temperature)
        return evaluate.solve(
            model, tokenizer, prompts, args.max_new, noise=noise, forced=forced, keep_z=True
        )

    columns, sampled = [], []

    def add_column(edit_text, chains, solved, start):
        """chains: per problem those to show. solved: all Chains that were made since `start`."""
        seconds = time.perf_counter() - start
        n_position = show.count_positions(solved)
        columns.append(show.Column(name, edit_text, model.c, chains, seconds, n_position))

    dtype = pick_dtype(args.dtype, device, model)
    with solving_guard(prompts, model, args.max_new, what="sample"), autocast(device, dtype):
        # The mean chain of each problem …
        start = time.perf_counter()
        if args.html or not args.temperature:
            mean = solve(prompts)
            add_column("", [[chain] for chain in mean], mean, start)

        # … or sampled chains: on a page beside the mean, in the terminal in its place
        if args.temperature:
            samples = [solve(prompts, seed=args.seed * 1000 + k) for k in range(args.n)]
            sampled = [list(chains) for chains in zip(*samples)]  # per problem
            if args.vote:
                sampled = [[evaluate.elect(chains, args.vote)] for chains in sampled]
            if not args.html:
                add_column("", sampled, sum(samples, []), start)

        # Edit the mean chains and let the model think on. (There are some whenever there is --edit:
        # sample_options.check)
        pool = []  # chains of more problems, to take thoughts from
        if any(e.by_words for e in args.edit):
            donors = edit.donors(folder, problems)
            pool = solve(encode_prompts(donors, tokenizer, model, args.max_new))
        for e in args.edit:
            start = time.perf_counter()
            forced, applies = edit.force(e, model, mean, mean + pool, args.seed)
            solved = solve(prompts, forced=forced)
            chains = [[chain] if applied else [] for chain, applied in zip(solved, applies)]
            add_column(e.text, chains, solved, start)

        # The page also shows φ's runner-up readings and the latents in a plane
        if args.html:
            page.add_details(columns, model, tokenizer, sampled)
    return columns


if __name__ == "__main__":
    run_command(main)
