"""Counts the functions that a reader has to enter to follow one training step.

    python tests/trace_step.py                 of this checkout
    python tests/trace_step.py --repo DIR      of another

A small run is trained on the CPU. Counted is every named function of train.py and minatp/ (not of
kernels/) that is entered during its second step. A step lies between two returns of the optimizer's
`step`; this one includes no log line, checkpoint or validation. The exit code is 1 if there are
more functions or files than the --most-… allow.
"""

import argparse
import contextlib
import inspect
import io
import os
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

SMALL = (
    "--device cpu --labelled 60 --answers 20 --val-size 4 --test-size 6 --batch-size 4 "
    "--log-every 1000 --save-every 1000 "
)
SIZES = "--n-layer 1 --n-head 2 --n-kv-head 1 --n-embd 16 --n-inner 24 --decoder-layers 1 --K 2 "
# SFT is traced in stage K of the curriculum, where all parts have work: thoughts, the decoder LM,
# the stop head, and words written after the thoughts
SFT = "--stage sft --epochs 0,0,.4,0 " + SMALL + SIZES
# RL starts from a model whose answers sometimes have the right form, so that rewards differ
TAUGHT = "--stage sft --epochs .2,.2,.2,2 --lr .02 --warmup 5 " + SMALL + SIZES
RL = "--stage rl --G 4 --updates 8 --val-every 1000 --anchor 1 --estimator path --lr .003 " + SMALL

OPTIMIZER_FILES = ("muon.py", "optim.py")  # in older checkouts, and here


class SecondStep:
    """Records the functions of a repository that are entered during the second step of a run."""

    def __init__(self, repo):
        self.repo = repo
        self.steps = 0  # taken by the optimizer
        self.entered = set()  # code objects

    def __enter__(self):
        sys.setprofile(self.record)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)

    def record(self, frame, event, _):
        code = frame.f_code
        if event == "call" and self.steps == 1:
            self.entered.add(code)
        is_step = code.co_name == "step" and code.co_filename.endswith(OPTIMIZER_FILES)
        if event == "return" and is_step and self.repo in Path(code.co_filename).parents:
            self.steps += 1
            if self.steps == 2:
                sys.setprofile(None)  # the rest of the run need not be slow

    def by_file(self):
        """{file of the repository: names of its functions that were entered}"""
        names = defaultdict(set)
        for code in self.entered:
            file = Path(code.co_filename)
            if self.repo not in file.parents:
                continue
            file = file.relative_to(self.repo)
            is_ours = file == Path("train.py") or file.parts[0] == "minatp"
            has_name = not code.co_name.startswith("<")  # unlike a lambda or a comprehension
            is_function = code.co_flags & inspect.CO_OPTIMIZED  # unlike the body of a class
            if is_ours and has_name and is_function:
                names[str(file)].add(code.co_qualname.replace(".<locals>", ""))
        return {file: sorted(names[file]) for file in sorted(names)}


def quietly(main, options, out, *more):
    """Run train.py in this process, without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        main([*options.split(), "--out", str(out), *more])


def trace(repo, folder):
    """{"SFT": {file: names}, "RL": {file: names}} of a checkout. folder: for the runs."""
    sys.path.insert(0, str(repo))
    import train

    assert Path(train.__file__).parent == repo, f"{train.__file__} is not of {repo}"
    quietly(train.main, TAUGHT, folder / "taught")
    traced = {}
    for name, options, more in (("SFT", SFT, []), ("RL", RL, ["--init", str(folder / "taught")])):
        with SecondStep(repo) as second:
            quietly(train.main, options, folder / name, *more)
        if second.steps < 2:
            sys.exit(f"{name}: no two steps of an optimizer in {' or '.join(OPTIMIZER_FILES)}")
        traced[name] = second.by_file()
    return traced


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parents[1]
    parser.add_argument("--repo", type=Path, default=here, help="a checkout [%(default)s]")
    for stage, functions, files in (("sft", 45, 11), ("rl", 75, 14)):
        parser.add_argument(f"--most-{stage}", type=int, default=functions, help="[%(default)s]")
        parser.add_argument(f"--most-{stage}-files", type=int, default=files, help="[%(default)s]")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
    with tempfile.TemporaryDirectory() as folder:
        traced = trace(args.repo.resolve(), Path(folder))
    most = {"SFT": (args.most_sft, args.most_sft_files), "RL": (args.most_rl, args.most_rl_files)}
    too_many = False
    for name, files in traced.items():
        n_functions, n_files = sum(map(len, files.values())), len(files)
        most_functions, most_files = most[name]
        print(
            f"{name}: {n_functions} functions in {n_files} files "
            f"(at most {most_functions} in {most_files})"
        )
        too_many |= n_functions > most_functions or n_files > most_files
    for name, files in traced.items():
        print(f"\n{name}")
        for file, names in files.items():
            print(f"  {file:24} {len(names):3}  {', '.join(names)}")
    return too_many


if __name__ == "__main__":
    sys.exit(main())
