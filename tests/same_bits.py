"""Shows that two checkouts of this project train to the same bits.

    python tests/same_bits.py BEFORE AFTER                     every run, a few minutes
    python tests/same_bits.py BEFORE AFTER --only 'rl*'        some runs, by name or pattern
    python tests/same_bits.py BEFORE AFTER --out DIR           keep what the runs wrote

A matrix of very small runs is trained with each checkout, and everything that a run writes is
compared except for times: the weights, the optimizer's moments, the state to resume from, every
number in metrics.jsonl and summary.json. A run that is stopped and resumed must also end like the
same run without the stop.

The comparison relies only on the command line, `train.main(argv)`, and on the format of the output,
so that everything behind them can be moved.
"""

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path

FOREIGN_MODEL = Path(__file__).parent / "fixtures" / "conformance" / "policy"  # not made by us
STOPPED = 75  # exit code of a run that was stopped on request and has saved everything
PATIENCE = 300  # seconds that a separate process may take

# One thread, so that both sides add in the same order. No checkout gets a __pycache__
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


# ---- the matrix ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    name: str
    options: str
    start: str = ""  # the run that --init names
    processes: int = 1
    resumes: str = ""  # this one is stopped and resumed, and must end like the run of that name


SIZES = (
    "--n-layer 1 --n-head 2 --n-kv-head 1 --n-embd 16 --n-inner 24 --decoder-layers 1 "
    "--vocab-size 300 --K 2 "
)
PROBLEMS = "--labelled 60 --answers 20 --val-size 4 --test-size 6 "
FILES = "--data {data}/train.json --val {data}/val.jsonl --test {data}/test.json,{data}/test.txt "
RATE = "--lr .02 --warmup 5 "
EVERY = "--batch-size 4 --log-every 3 --save-every 100 --device cpu "

SFT = "--stage sft " + SIZES + RATE + EVERY
SHORT = "--epochs .27 "
ONE_STAGE = "--epochs 1 "  # of a method without a curriculum
TAUGHT = "--epochs .2,.2,.2,2 "  # some answers have the right form, so that RL has a signal
FILES_TAUGHT = "--epochs .2,.2,.2,5 "  # some of the answers are right
MANY_STEPS = "--epochs .7 --save-every 7 "  # to be stopped after the first checkpoint

RL = "--stage rl --G 4 --lr .003 " + EVERY
UPDATES = "--updates 6 "
MANY_UPDATES = "--updates 16 --save-every 4 --val-every 6 "

MATRIX = [
    # Stage 1: the methods, and ours without its parts.
    Run("sft", SFT + PROBLEMS + TAUGHT),
    Run("no-cot", SFT + PROBLEMS + ONE_STAGE + "--method no-cot"),
    Run("cot", SFT + PROBLEMS + ONE_STAGE + "--method cot"),
    Run("coconut", SFT + PROBLEMS + SHORT + "--method coconut"),
    Run("sim-cot", SFT + PROBLEMS + SHORT + "--method sim-cot"),
    Run("icot", SFT + PROBLEMS + SHORT + "--method icot"),
    Run("pause", SFT + PROBLEMS + SHORT + "--method pause --c 2"),
    Run("codi", SFT + PROBLEMS + ONE_STAGE + "--method codi"),
    Run("codi-sim-cot", SFT + PROBLEMS + ONE_STAGE + "--method codi-sim-cot --c 2"),
    Run("distill", SFT + PROBLEMS + SHORT + "--distill 2 --micro-batch 3 --answers-share .5"),
    Run("no-vae", SFT + PROBLEMS + SHORT + "--no-vae"),
    Run("no-stop", SFT + PROBLEMS + SHORT + "--no-stop"),
    Run("no-decoder", SFT + PROBLEMS + SHORT + "--no-decoder"),
    # Stage 1: how it is trained and measured.
    Run("micro-batches", SFT + PROBLEMS + SHORT + "--micro-batch 3"),
    Run("adamw", SFT + PROBLEMS + SHORT + "--optimizer adamw"),
    Run("recompute", SFT + PROBLEMS + SHORT + "--recompute"),
    Run("answers-share", SFT + PROBLEMS + SHORT + "--answers-share .5"),
    Run("votes", SFT + PROBLEMS + SHORT + "--votes 3 --temperature .8 --eval-batch 4"),
    Run("seed", SFT + PROBLEMS + SHORT + "--seed 5 --max-new 9 --beta .1 --clip .1"),
    Run("two-latents", SFT + PROBLEMS + SHORT + "--c 2 --n-layer 2 --decoder-layers 0"),
    Run("llama-preset", SFT + FILES + "--epochs .2 --preset llama-1b --decoder-layers 1"),
    Run("sft-init", SFT + PROBLEMS + SHORT, start="sft"),
    Run("sft-init-cot", SFT + PROBLEMS + SHORT, start="cot"),
    Run("foreign-init", f"--init {FOREIGN_MODEL} --K 2 " + EVERY + RATE + PROBLEMS + SHORT),
    # Stage 1: problems from files.
    Run("files", SFT + FILES + FILES_TAUGHT),
    Run("files-no-cot", SFT + FILES + ONE_STAGE + "--method no-cot"),
    Run("files-answers-share", SFT + FILES + SHORT + "--answers-share .25"),
    Run("files-held-out", SFT + SHORT + "--data {data}/train.json --val-size 5"),
    Run("files-init", SFT + FILES + SHORT, start="sft"),
    # Stage 2. The first has the preset's options, pathwise gradients and an anchor among them.
    Run("rl", RL + PROBLEMS + UPDATES + "--val-every 4", start="sft"),
    Run("rl-score", RL + PROBLEMS + UPDATES + "--estimator score", start="sft"),
    Run(
        "rl-latent-weight",
        RL + PROBLEMS + UPDATES + "--estimator score --latent-weight .1 --distill 1",
        start="sft",
    ),
    Run(
        "rl-placebo-latents",
        RL + PROBLEMS + UPDATES + "--estimator score --placebo-latents",
        start="sft",
    ),
    Run("rl-no-anchor", RL + PROBLEMS + UPDATES + "--anchor 0", start="sft"),
    Run(
        "rl-score-no-anchor", RL + PROBLEMS + UPDATES + "--estimator score --anchor 0", start="sft"
    ),
    Run("rl-anchor", RL + PROBLEMS + UPDATES + "--anchor .3 --micro-batch 2", start="sft"),
    Run("rl-grpo", RL + PROBLEMS + UPDATES + "--updates-per-batch 2 --lr .02", start="sft"),
    Run(
        "rl-grpo-score",
        RL + PROBLEMS + UPDATES + "--updates-per-batch 3 --estimator score --kl .02 --anchor .5",
        start="sft",
    ),
    Run("rl-kl", RL + PROBLEMS + UPDATES + "--kl .05", start="sft"),
    Run("rl-greedy", RL + PROBLEMS + UPDATES + "--greedy --spread 8", start="sft"),
    Run("rl-adamw", RL + PROBLEMS + UPDATES + "--optimizer adamw --recompute", start="sft"),
    Run("rl-votes", RL + PROBLEMS + UPDATES + "--votes 2 --seed 3 --eval-batch 3", start="sft"),
    Run("rl-two-latents", RL + PROBLEMS + UPDATES + "--kl .01", start="two-latents"),
    # Stage 2 where some answers are right, so that coherence counts: problems from files.
    Run("rl-files", RL + FILES + UPDATES + "--kl .01", start="files"),
    Run("rl-no-answers", RL + FILES + UPDATES + "--no-answers --anchor 0", start="files"),
    Run("rl-placebo", RL + FILES + UPDATES + "--placebo", start="files"),
    Run("rl-normalise", RL + FILES + UPDATES + "--normalise", start="files"),
    Run("rl-rloo", RL + FILES + UPDATES + "--baseline rloo", start="files"),
    Run("rl-strict", RL + FILES + UPDATES + "--coherence strict --w-coh 1", start="files"),
    Run("rl-strict-alone", RL + FILES + UPDATES + "--coherence strict --no-answers", start="files"),
    Run("rl-spread", RL + FILES + UPDATES + "--spread .5 --w-acc 2 --w-fmt .1", start="files"),
    # Two processes under torchrun.
    Run(
        "two-processes", SFT + PROBLEMS + SHORT + "--micro-batch 1 --answers-share .5", processes=2
    ),
    Run(
        "rl-two-processes",
        RL + PROBLEMS + UPDATES + "--kl .01 --anchor .5 --placebo",
        start="sft",
        processes=2,
    ),
    # Stopped and resumed.
    Run("whole", SFT + PROBLEMS + MANY_STEPS),
    Run("resumed", SFT + PROBLEMS + MANY_STEPS, resumes="whole"),
    Run("rl-whole", RL + PROBLEMS + MANY_UPDATES + "--kl .01", start="sft"),
    Run(
        "rl-resumed",
        RL + PROBLEMS + MANY_UPDATES + "--kl .01",
        start="sft",
        resumes="rl-whole",
    ),
]


def chosen(patterns):
    """The runs of the matrix whose names match, and the runs that those need."""
    by_name = {run.name: run for run in MATRIX}
    wanted = {name for name in by_name for pattern in patterns if fnmatch(name, pattern)}
    for pattern in patterns:
        if not any(fnmatch(name, pattern) for name in by_name):
            sys.exit(f"--only: no run is called {pattern!r}; there are: {' '.join(by_name)}")
    for name in list(wanted):
        wanted |= {by_name[name].start, by_name[name].resumes}
    return [run for run in MATRIX if run.name in wanted]


# ---- problems in files --------------------------------------------------------------------------


def write_problems(folder):
    """Write training, validation and test problems, in each format that can be read."""
    folder.mkdir(parents=True)
    chance = random.Random(0)
    questions = [
        (a, b, c, thing)
        for a in (1, 2)
        for b in (1, 2)
        for c in (1, 2, 3)
        for thing in ("balls", "cups", "eggs", "figs", "hats", "keys", "maps")
    ]
    chance.shuffle(questions)
    every = [problem(*numbers) for numbers in questions]
    train, val, test_json, test_icot = every[:64], every[64:70], every[70:75], every[75:80]
    for record in train[::8]:
        record["steps"] = []  # known by its answer alone
    (folder / "train.json").write_text(json.dumps([*train, *val[:1]], indent=1))  # one is held out
    (folder / "val.jsonl").write_text("".join(json.dumps(record) + "\n" for record in val))
    (folder / "test.json").write_text(json.dumps(test_json))
    (folder / "test.txt").write_text("".join(in_one_line(record) for record in test_icot))


def problem(a, b, c, thing):
    """A problem with one step, or with two if c is more than 1."""
    text = f"A box holds {a} {thing} and {b} more are put in."
    steps = [f"<<{a}+{b}={a + b}>>"]
    if c > 1:
        text += f" Then there are {c} boxes like it."
        steps.append(f"<<{a + b}*{c}={(a + b) * c}>>")
    answer = steps[-1].removesuffix(">>").split("=")[1]
    question = f"{text} How many {thing} are there?"
    return {"question": question, "steps": steps, "answer": answer}


def in_one_line(record):
    """A problem in the format of iCoT."""
    return f"{record['question']}||{' '.join(record['steps'])} #### {record['answer']}\n"


# ---- training -----------------------------------------------------------------------------------


def train_all(checkouts, runs, folder, jobs):
    """Train the runs with each checkout, NAME in folder/SIDE/NAME, by `jobs` processes for each."""
    spawn = multiprocessing.get_context("spawn")  # a fresh interpreter, which knows no checkout
    # a run that others start from has to be there before them
    for ready in ([r for r in runs if not r.start], [r for r in runs if r.start]):
        children = []
        for side, checkout in checkouts.items():
            (folder / side).mkdir(exist_ok=True)
            for job in range(jobs):
                body = (checkout, ready[job::jobs], folder / side, job)
                children.append(spawn.Process(target=child, args=body, daemon=True))
        for one in children:
            one.start()
        for one in children:
            one.join()


def child(checkout, runs, folder, job):
    """The body of a process that trains with one checkout. Its output goes into a file."""
    log = os.open(folder / f"output-{job}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    import train

    assert Path(train.__file__).parent == checkout, f"{train.__file__} is not of {checkout}"
    for run in runs:
        print(f"---- {run.name}", flush=True)
        try:
            train_one(train.main, checkout, run, folder)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            failure = f"{type(error).__name__}: {error} (see output-{job}.log with --out)"
            (folder / f"{run.name}.failed").write_text(" ".join(failure.split()))


def train_one(main, checkout, run, folder):
    out = folder / run.name
    argv = [*run.options.format(data=folder.parent / "data").split(), "--out", str(out)]
    if run.start:
        argv += ["--init", str(folder / run.start)]
    if run.processes > 1:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(run.processes)]
        command = [sys.executable, *torchrun, "--master-port", str(free_port()), "train.py", *argv]
        code = subprocess.run(command, cwd=checkout, timeout=PATIENCE).returncode
        if code:
            raise RuntimeError(f"train.py in {run.processes} processes ended with {code}")
    elif run.resumes:
        stop_in_the_middle([sys.executable, "train.py", *argv], checkout, out)
        main(["--resume", "--out", str(out)])
    else:
        main(argv)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def stop_in_the_middle(command, checkout, out):
    """Run train.py and stop it as soon as it has saved its first checkpoint."""
    process = subprocess.Popen(command, cwd=checkout)
    try:
        deadline = time.monotonic() + PATIENCE
        while not checkpoints(out) and process.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no checkpoint in {PATIENCE} seconds")
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        code = process.wait(PATIENCE)
    finally:
        process.kill()
    if code != STOPPED or (out / "summary.json").exists():
        raise RuntimeError(f"did not stop in the middle: train.py ended with {code}")


# ---- what a run writes ---------------------------------------------------------------------------

ABSENT = "(absent)"  # differs from null
TIMED = ("seconds", "tokens_per_second", "test_seconds")
LATER = ("dtype",)  # older checkouts do not write these


def checkpoints(out):
    """Folders of a run's checkpoints, oldest first."""
    return sorted((out / "checkpoints").glob("[0-9]" * 8))


def facts(out):
    """What two runs must agree on, to the bit; the same as `facts` in runs.py.

    It stands here again because runs.py belongs to one of the checkouts.
    """
    last = f"checkpoints/{checkpoints(out)[-1].name}"
    files = {}
    for folder in ("final", last):
        manifest = json.loads((out / folder / "manifest.json").read_text())
        files |= {f"{folder}/{name}": digest for name, digest in manifest["sha256"].items()}
    assert f"{last}/optimizer.safetensors" in files
    del files[f"{last}/state.json"]  # its hash depends on times
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return {
        "files": files,
        "state": exact(json.loads((out / last / "state.json").read_text())),
        "summary": exact(json.loads((out / "summary.json").read_text())),
        "metrics": [exact(json.loads(line)) for line in lines],
    }


def exact(value):
    """A JSON value without times and later fields, and with every bit of its floats."""
    if isinstance(value, dict):
        return {name: exact(v) for name, v in value.items() if name not in TIMED + LATER}
    if isinstance(value, list):
        return [exact(inner) for inner in value]
    if isinstance(value, float):
        return value.hex()
    return value


def differences(one, other, place=""):
    """The places where two facts differ, such as "metrics.3.loss"."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one | other:
            yield from differences(
                one.get(name, ABSENT), other.get(name, ABSENT), f"{place}.{name}"
            )
    elif isinstance(one, list) and isinstance(other, list):
        for i, (a, b) in enumerate(zip_longest(one, other, fillvalue=ABSENT)):
            yield from differences(a, b, f"{place}.{i}")
    elif type(one) is not type(other) or one != other:
        yield place.removeprefix(".")


# ---- comparing ----------------------------------------------------------------------------------


def verdict(run, before, after):
    """What is wrong with a run; "" if nothing is. before, after: folders with a checkout's runs."""
    for side, folder in (("BEFORE", before), ("AFTER", after)):
        failure = folder / f"{run.name}.failed"
        if failure.exists():
            return f"failed in {side}: {failure.read_text()}"
        if not (folder / run.name / "summary.json").exists():
            return f"did not finish in {side}"
    reached = facts(after / run.name)
    places = list(differences(facts(before / run.name), reached))
    if places:
        return f"differs in {shorten(places)}"
    if run.resumes:
        places = list(differences(facts(after / run.resumes), reached))
        if places:
            return f"differs from {run.resumes}, the run without a stop, in {shorten(places)}"

    # RL without rewards that differ changes nothing
    signals = [record["signal"] for record in reached["metrics"] if "signal" in record]
    if signals and not any(float.fromhex(share) for share in signals):
        return "is the same, but had no rewards to learn from, so it shows nothing"
    return ""


def shorten(places):
    """The first three, and how many more there are."""
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    return ", ".join(places[:3]) + more


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE", help="a checkout")
    parser.add_argument("after", type=Path, metavar="AFTER", help="another")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="NAME", help="these runs [all]")
    parser.add_argument("--jobs", type=int, default=1, help="processes for each checkout [1]")
    parser.add_argument("--out", type=Path, help="new folder for the runs [a temporary one]")
    args = parser.parse_args()
    runs = chosen(args.only)
    checkouts = {"before": args.before.resolve(), "after": args.after.resolve()}
    for checkout in checkouts.values():
        if not (checkout / "train.py").exists():
            parser.error(f"{checkout} has no train.py")
    os.environ.update(ENVIRONMENT)
    start = time.monotonic()
    n_same = 0
    print(f"{len(runs)} runs with each checkout …", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.out or Path(temporary) / "runs").resolve()
        write_problems(folder / "data")
        train_all(checkouts, runs, folder, args.jobs)
        for run in runs:
            wrong = verdict(run, folder / "before", folder / "after")
            n_same += not wrong
            print(f"{run.name:20} {wrong or 'equal'}")
    seconds = time.monotonic() - start
    print(f"{n_same} of {len(runs)} runs are the same, to the bit ({seconds:.0f} s)")
    return n_same < len(runs)


if __name__ == "__main__":
    sys.exit(main())
