"""SIGKILL at any moment: no checkpoint is damaged, no finished save is lost, no bit differs.

MINATP_LONG=1 kills each stage at least 20 times and the writer of checkpoints 500 times; without
it, a few times.
"""

import json
import os
import random
import shutil
import time

import pytest
import torch

from minatp.run import checkpoint
from minatp.run.huggingface import load_model
from minatp.run.saved import checkpoints, fault

from runs import facts, process, training, writing

LONG = os.environ.get("MINATP_LONG") == "1"


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_killed_at_any_moment(stage, undisturbed, commands, context, tmp_path, capfd):
    """A run that gets to its end between the kills ends as if it had never been killed."""
    expected = facts(undisturbed[stage][0])
    out, log = tmp_path / "run", tmp_path / "log"
    chance = random.Random(stage)
    n_wanted = 20 if LONG else 3
    n_kill = n_complete = 0
    while n_kill < n_wanted or n_complete == 0:
        # Kill it shortly after one of the next checkpoints; after enough kills let it end
        goal = newest_step(out) + chance.randrange(6) if n_kill < n_wanted else 1000
        with process(context, training, command_after_kill(commands[stage], out), log) as p:
            while p.is_alive() and newest_step(out) < goal:
                time.sleep(0.005)
            p.join(chance.uniform(0, 0.3))
            was_killed = p.is_alive()

        if was_killed:
            n_kill += 1
            check_checkpoints(out, goal)
        else:
            n_complete += 1
            assert p.exitcode == 0, log.read_text()
            assert facts(out) == expected
            shutil.rmtree(out)

    assert "warning" not in log.read_text()
    with capfd.disabled():
        print(f" [{stage}: {n_kill} kills, {n_complete} runs ended]", end="")


def command_after_kill(command, out):
    """What a user or a scheduler starts next: a resume, or the run itself if nothing was saved."""
    if checkpoints(out):
        return ["--resume", "--out", out]
    return [*command, "--out", out]


def newest_step(out):
    """The step of a run's newest checkpoint; 0 if there is none."""
    saved = checkpoints(out)
    return int(saved[-1].name) if saved else 0


def check_checkpoints(out, goal):
    """All checkpoints are intact and can be loaded; the newest is at least of the step `goal`."""
    saved = checkpoints(out)
    assert not any(fault(folder) for folder in saved)

    # A step is logged before it is saved, so the last one in the log may not be saved
    lines = (out / "metrics.jsonl").read_text().splitlines(True) if saved else []
    logged = [json.loads(line)["step"] for line in lines if line.endswith("\n")]
    last = max(logged, default=0)
    assert newest_step(out) >= max(last - 1, goal)
    assert len(saved) >= min(2, last - 1)

    for folder in saved:
        model, _ = load_model(folder)
        state = checkpoint.restore_optimizer(folder, model, torch.optim.AdamW(model.parameters()))
        assert state["step"] == int(folder.name)


def test_the_writer_of_checkpoints_killed_at_any_moment(undisturbed, context, tmp_path, capfd):
    out, log = tmp_path / "run", tmp_path / "log"
    (out / "checkpoints").mkdir(parents=True)
    start, _ = undisturbed["sft"]
    chance = random.Random(0)
    n_kill = 500 if LONG else 25
    n_save = 0
    for _ in range(n_kill):
        # Kill it somewhere in the saves after its first
        reader, writer = context.Pipe(False)
        with process(context, writing, start, out, log, writer):
            assert reader.poll(120)
            first = reader.recv()
            _, seconds = first
            time.sleep(chance.uniform(0, 2 * seconds))
        writer.close()
        acknowledged = [first, *messages(reader)]
        n_save += len(acknowledged)
        last_step, _ = acknowledged[-1]

        saved = checkpoints(out)
        assert len(saved) >= min(2, last_step)
        assert int(saved[-1].name) >= last_step
        assert [fault(folder) for folder in saved] == [None] * len(saved)

        # Every number of the first parameter is the step
        model, _ = load_model(saved[-1])
        first_parameter = next(model.parameters())
        assert first_parameter.unique().tolist() == [int(saved[-1].name)]
    with capfd.disabled():
        print(f" [{n_kill} kills, {n_save} saves]", end="")


def messages(reader):
    """What a process has sent into a pipe before it ended."""
    received = []
    try:
        while True:
            received.append(reader.recv())
    except EOFError:
        return received
