"""The command line of sample.py: its options, and the questions that they ask for."""

import math
import sys
from pathlib import Path

from ..problems import Problem
from ..run.errors import UserError
from ..run.options import LEAST_TEMPERATURE, Parser, add_device_options, flag
from ..run.problem_files import check_text, read_problems
from ..run.splits import test_set
from . import edit


def parse(argv, description):
    """The command line, checked. Raises UserError."""
    parser = Parser(description)
    add = parser.add_argument
    # fmt: off
    add("question", nargs="?", help="a question, or - for stdin [--problems of the test set]")
    add("--run", action="append",
        help="folder of a run, or of a saved model; several: a,b or --run twice [out/sft]")
    add("--file", help="problems (JSON, JSONL, iCoT) or plain questions, one a line")
    add("--problems", type=int,
        help="how many, from the first; 0: all [4, or 50 with --html; of stdin all]")
    add("--html", default="", metavar="FILE", help="write one self-contained page for the browser")
    add("--edit", action="append", default=[],
        help="edit the mean chain and think on from there; may be repeated")
    add("--n", type=int,
        help="chains per question, sampled if more than one [1; with --html 6 beside the mean]")
    add("--vote", default="",
        help="majority | coherence: show only the elected one of the --n chains; sees no answer")
    add("--temperature", type=float,
        help="of the noise and the words; 0: the mean policy [0, or 1 with --n]")
    add("--seed", type=int, default=0,
        help="of the samples and of the choice of built-in problems [%(default)s]")
    add("--max-new", type=int, default=128, help="most tokens of an answer [%(default)s]")
    add_device_options(parser)
    add("--json", action="store_true", help="one JSON object per chain")
    # fmt: on
    args = parser.parse_args(argv)

    # Several runs and edits
    folders = []
    for given in args.run or ["out/sft"]:
        # A name may have a comma
        folders += [given] if Path(given).exists() else map(str.strip, given.split(","))
    args.run = [f for f in folders if f]
    args.edit = [edit.parse(text) for text in args.edit]

    # Defaults that depend on other options
    if (args.n or 0) > 1 and args.temperature == 0:
        raise UserError(
            f"command line: --n {args.n} chains of --temperature 0 would all be the same; "
            "drop one of the two options"
        )
    if args.problems is None and args.question == "-":
        args.problems = 0
    elif args.problems is None:
        args.problems = 50 if args.html else 4
    if args.n is None:
        args.n = 6 if args.html else 1

    # A single chain is the mean policy's; several have to be sampled
    if args.temperature is None:
        args.temperature = float(args.n > 1)
    check(args)
    return args


def check(args):
    """Raise UserError if an option is out of range, or contradicts another."""
    # Each option by itself
    if not args.run:
        raise UserError("command line: --run names no folder")
    for name in ("n", "max_new"):
        if getattr(args, name) < 1:
            raise UserError(
                f"command line: {flag(name)} must be positive, not {getattr(args, name)}"
            )
    if args.n > 10_000:
        raise UserError(
            f"command line: --n {args.n} chains of each question are too many; at most 10000"
        )
    if args.vote and (args.vote not in ("majority", "coherence") or args.n < 2):
        raise UserError(
            "command line: --vote must be majority or coherence, with --n of at least 2, not "
            f"{args.vote!r} of {args.n}"
        )
    # (NaN fails every comparison, and so this one)
    is_temperature = args.temperature == 0 or LEAST_TEMPERATURE <= args.temperature < math.inf
    if not is_temperature or args.problems < 0 or not 0 <= args.seed < 2**32:
        raise UserError(
            "command line: --temperature, --problems and --seed must not be negative; "
            f"--temperature must be finite, and 0 or at least {LEAST_TEMPERATURE}; --seed must be "
            "below 2^32"
        )

    # Options that exclude each other: edits change the mean chain, and the page shows all chains
    edit_of_samples = args.edit and args.temperature and not args.html
    for a, b, both in (
        ("--html", "--json", args.html and args.json),
        ("--html", "--vote", args.html and args.vote),
        ("--edit", "--vote", args.edit and args.vote),
        ("--edit", "--n without --html", edit_of_samples),
    ):
        if both:
            raise UserError(f"command line: {a} cannot be combined with {b}; drop one of them")


# ---- the questions -------------------------------------------------------------------------------


def read_questions(args):
    """The problems that the options ask for. A plain question has no steps and an empty answer.

    Raises UserError if there are none, or they cannot be read.
    """
    # --problems 0 means all: [:None] takes everything
    limit = args.problems or None
    if args.question and args.file:
        raise UserError("command line: give a question or --file, not both")
    if args.question == "-":
        return read_stdin()[:limit]
    if args.question is not None:
        return plain_questions([args.question], "command line")
    if args.file:
        return read_file(args.file)[:limit]

    # All runs get the same problems: those of the first one's test set
    return test_set(args.run[0], args.problems, args.seed)


def read_stdin():
    """One question a line."""
    # It is None if it is closed. A byte order mark is left out, as in a file
    try:
        lines = sys.stdin.read().removeprefix("\ufeff").splitlines() if sys.stdin else []
    except UnicodeDecodeError as e:
        raise UserError(f"stdin:0: is not UTF-8 text ({e.reason})") from None
    return plain_questions(lines, "stdin")


def read_file(path):
    """Problems (JSON, JSONL, iCoT), or plain questions, one a line."""
    # utf-8-sig drops the byte order mark that some editors write
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(
            f"{path}:0: cannot be read ({e}); give problems or plain questions, one a line"
        ) from None

    # JSON, or iCoT's `question||steps #### answer`
    if text.lstrip()[:1] in ("[", "{") or "||" in text:
        return read_problems(path)
    return plain_questions(text.splitlines(), path)


def plain_questions(lines, source):
    """Lines of text -> problems without an answer."""
    # Empty lines are left out but counted: a problem's source is FILE:LINE, for messages
    problems = []
    for i, line in enumerate(lines, 1):
        if line.strip():
            problems.append(Problem(line.strip(), [], "", f"{source}:{i}"))
    if not problems:
        raise UserError(f"{source}:1: contains no question; write one a line")
    for problem in problems:
        check_text(problem.source, problem.question)
    return problems
