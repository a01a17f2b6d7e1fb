"""Small runs for the tests: options, what two runs must agree on, and processes to kill."""

import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import train
from minatp.run import checkpoint
from minatp.run.errors import guarded
from minatp.run.huggingface import load_model
from minatp.run.saved import checkpoints, newest_checkpoint

# A small model that another program has saved
MODEL = Path(__file__).parent / "fixtures" / "conformance" / "policy"

# A problem in a file
GOOD = '{"question": "q", "steps": ["<<1+1=2>>"], "answer": "2"}'

# SFT: 4 stages of 4 steps, one checkpoint a step
TINY = (
    "--n-layer 1 --n-head 2 --n-kv-head 1 --n-embd 16 --n-inner 24 --decoder-layers 1 --K 2 "
    "--labelled 60 --answers 20 --val-size 4 --test-size 6 --batch-size 4 "
    "--decoder-start previews --epochs .27 --log-every 2 --save-every 1 --device cpu"
).split()

# SFT until some of the model's answers have the right form, so that RL finds rewards that differ
TAUGHT = [*TINY, *"--lr .02 --warmup 5 --epochs .2,.2,.2,2 --save-every 100".split()]

# RL: 12 steps, one checkpoint a step; needs --init
TINY_RL = (
    "--stage rl --labelled 60 --answers 20 --val-size 4 --test-size 6 --batch-size 4 "
    "--G 4 --updates 12 --log-every 5 --save-every 1 --val-every 4 "
    "--lr .003 --anchor 0.5 --kl 0.01 --device cpu"
).split()


def go(*argv, expect=0):
    """Run train.py in this process and check its exit code."""
    assert guarded(train.main, [str(a) for a in argv]) == expect


# ---- what a run must end with --------------------------------------------------------------------

TIMED = ("seconds", "tokens_per_second", "test_seconds")


def facts(out):
    """What two runs with the same options must agree on, to the bit.

    These are the hash of every file of the model and of the optimizer, and every number in
    state.json, summary.json and metrics.jsonl, except for times.
    """
    last = f"checkpoints/{checkpoints(out)[-1].name}"
    files = {}
    for folder in ("final", last):
        for name, digest in read_json(out / folder / "manifest.json")["sha256"].items():
            files[folder, name] = digest
    assert (last, "optimizer.safetensors") in files
    del files[last, "state.json"]  # its hash depends on times

    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "files": files,
        "state": exact(read_json(out / last / "state.json")),
        "summary": exact(read_json(out / "summary.json")),
        "metrics": [exact(record) for record in records],
    }


def read_json(path):
    return json.loads(path.read_text())


def exact(value):
    """A JSON value without times, and with every bit of its floats."""
    if isinstance(value, dict):
        return {name: exact(inner) for name, inner in value.items() if name not in TIMED}
    if isinstance(value, list):
        return [exact(inner) for inner in value]
    if isinstance(value, float):
        return value.hex()
    return value


# ---- what each training step works on ------------------------------------------------------------


@contextmanager
def watched(stage):
    """Yield a list to which each training step appends its problems, curriculum stage and chance.

    No step may use the global random generator: chance follows from the seed and the number of the
    step, so that a resumed run has the same.
    """
    name, describe = {
        "sft": ("sft_gradients", describe_sft_step),
        "rl": (
            "rollout",
            describe_rl_step,
        ),  # validations have a rollout of their own, in evaluate.py
    }[stage]
    real = getattr(train, name)
    steps, global_states = [], []

    def watch(*args):
        steps.append(describe(*args))
        global_states.append(torch.get_rng_state())
        return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, name, watch)
        yield steps
    assert all(torch.equal(state, global_states[0]) for state in global_states)


def describe_sft_step(run, problems, stage, step):
    """The noise follows from the number of the step."""
    return [row.source for row in problems], stage, step


def describe_rl_step(model, prompt, prompt_mask, max_new, noise, group):
    return prompt.tolist(), model.stage, float(noise.eps_keys.sum()).hex()


# ---- processes -----------------------------------------------------------------------------------


def processes():
    """The multiprocessing context of the tests: a server imports everything once, then forks."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs", "torch._dynamo"])
    return context


@contextmanager
def process(context, body, *args):
    """Run body(*args) in a process of its own, which is killed at the end if it still runs."""
    p = context.Process(target=body, args=args)
    p.start()
    try:
        yield p
    finally:
        p.kill()
        p.join()


def into(log):
    """Redirect stdout and stderr of this process to a file."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)


def training(argv, log, largest_file=None, pause=0.0):
    """Body of a process: train.py.

    largest_file: bytes; writing a larger file fails, as on a full disk. pause: seconds a step.
    """
    into(log)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    real_gradients = train.sft_gradients

    def slow_gradients(*args, **kwargs):
        time.sleep(pause)
        return real_gradients(*args, **kwargs)

    train.sft_gradients = slow_gradients
    sys.exit(guarded(train.main, [str(a) for a in argv]))


def writing(start, out, log, acknowledge):
    """Body of a process: save checkpoints without end, and send (step, seconds) after each.

    In the checkpoint of step n every number of the first parameter is n. The steps continue from
    the newest checkpoint in `out`, if there is one. start: folder of the model.
    """
    into(log)
    model, tokenizer = load_model(start)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = 0
    if checkpoints(out):
        step = checkpoint.restore_optimizer(newest_checkpoint(out), model, optimizer)["step"]
    first_parameter = next(model.parameters())
    while True:
        step += 1
        with torch.no_grad():
            first_parameter.fill_(float(step))
        start_time = time.perf_counter()
        checkpoint.save_checkpoint(out, {"step": step}, model, tokenizer, optimizer)
        acknowledge.send((step, time.perf_counter() - start_time))


def run_python(*argv):
    """What `python argv` prints, in a process of its own, where it must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in ("MINATP_KERNELS", "MINATP_GRAPHS", "TRITON_INTERPRET"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
