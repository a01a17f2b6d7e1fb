"""No disk space, no memory, or numbers that are not finite.

The run ends with one line on stderr and an exit code of its own; nothing that was saved is lost.
"""

import os
import re
import shutil

import pytest
import torch

import train
from minatp.optim import build_optimizer
from minatp.problems import Problem
from minatp.run import options
from minatp.run.errors import NotFinite, NotWritten
from minatp.run.folder import Log
from minatp.run.huggingface import load_model
from minatp.run.loop import GuardedOptimizer
from minatp.run.saved import checkpoints, newest_checkpoint, replace_file

from runs import TINY, facts, go, process, training

# ---- a full disk ---------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint(undisturbed, context, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    folder, _ = undisturbed["sft"]
    shutil.copytree(folder, out)
    shutil.rmtree(checkpoints(out)[-1])
    (last,) = checkpoints(out)

    # The next checkpoint does not fit
    with process(context, training, ["--resume", "--out", out], log, 40_000) as p:
        p.join()
    line = log.read_text().splitlines()[-1]
    assert p.exitcode == 74, line
    message = (
        rf"{out}/checkpoints/00000016:0: cannot be written \(.*\): "
        r"([\d,]+) bytes are needed and [\d,]+ are free"
    )
    match = re.match(message, line)
    assert match, line

    # The bytes needed are those of the weights and their two moments
    model, _ = load_model(last)
    weights = sum(4 * p.numel() for p in model.parameters())
    needed = int(match[1].replace(",", ""))
    assert 3 * weights <= needed <= 3 * weights + 2**21

    # The last checkpoint is intact and alone, and the run continues from it
    assert newest_checkpoint(out) == last
    assert [file.name for file in (out / "checkpoints").iterdir()] == [last.name]
    go("--resume", "--out", out)
    assert facts(out) == facts(folder)


def test_a_full_disk_under_metrics_jsonl(tmp_path):
    cfg = options.parse([*TINY, "--out", str(tmp_path)], "")
    log = Log(cfg, {"step": 0, "seconds": 0.0})
    log.file = open("/dev/full", "w")
    message = r"metrics.jsonl:0: cannot be written \(No space left on device\): 12 bytes are needed"
    with pytest.raises(NotWritten, match=message):
        log.write({"step": 1})


def test_a_full_disk_under_a_file_that_is_replaced(tmp_path):
    (tmp_path / "there").write_text("old")
    os.symlink("/dev/full", tmp_path / "there.tmp")
    with pytest.raises(NotWritten, match="there:0: .* 3 bytes are needed"):
        replace_file(tmp_path / "there", "new")
    assert (tmp_path / "there").read_text() == "old"


def test_free_disk_space_is_not_asked_for_if_something_else_is_wrong(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotWritten, match=r"\(Is a directory\).*fix this, then"):
        replace_file(tmp_path / "folder", "new")


# ---- what is not finite --------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "loss, gradient, reason",
    [(1.0, INF, "gradient norm (inf|nan)"), (NAN, 1.0, "loss nan"), (INF, 1.0, "loss inf")],
)
def test_steps_that_are_not_finite_are_not_taken(loss, gradient, reason, undisturbed):
    """Nor any step after them, until `check` raises; parameters and moments keep their bits."""
    model, _ = load_model(undisturbed["sft"][0])
    optimizer = build_optimizer(options.parse([*TINY, "--out", "o"], ""), model)
    guarded_optimizer = GuardedOptimizer(optimizer, model, clip=1.0)

    def take_step(step, loss, gradient):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        problems = [Problem("q", [], "1", f"a.json:{step}")]
        guarded_optimizer.lr = 0.1
        guarded_optimizer.n_done = step
        guarded_optimizer.step(torch.tensor(loss), problems)

    def tensors():
        moments = [v for state in optimizer.state.values() for v in state.values()]
        return [*model.parameters(), *moments]

    take_step(1, 1.0, 1.0)
    guarded_optimizer.check()
    before = [tensor.clone() for tensor in tensors()]
    take_step(2, loss, gradient)
    take_step(3, 1.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(), strict=True))
    with pytest.raises(NotFinite, match=rf"step 3: .*{reason}.*problems a.json:2$"):
        guarded_optimizer.check()


def spoil_losses(losses):
    return {**losses, "enc": losses["enc"] * NAN}


def spoil_surrogate(result):
    objective, clamped = result
    return objective * NAN, clamped


def spoil_reward(result):
    reward, parts = result
    return reward + INF, parts


@pytest.mark.parametrize(
    "stage, name, calls_per_step, spoil",
    [
        ("sft", "sft_losses", 1, spoil_losses),
        ("rl", "surrogate", 1, spoil_surrogate),
        ("rl", "chain_reward", 16, spoil_reward),
    ],
)
def test_a_run_that_is_not_finite_exits_3(
    stage, name, calls_per_step, spoil, undisturbed, commands, tmp_path, capsys, monkeypatch
):
    """From the seventh step on a value is not finite."""
    real = getattr(train, name)
    n_call = 0

    def spoiled(*args):
        nonlocal n_call
        n_call += 1
        result = real(*args)
        return spoil(result) if n_call > 6 * calls_per_step else result

    monkeypatch.setattr(train, name, spoiled)
    rare_checks = ("--log-every", 1000, "--save-every", 5)
    go(*commands[stage], "--out", tmp_path, *rare_checks, expect=3)
    monkeypatch.undo()

    # The message names the step and its problems, though the host looks at it later
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the step was not taken" in err
    assert re.search(r"^step \d+: .*problems built-in (labelled|answers):\d+(,\d+)*", err)
    step = int(re.match(r"step (\d+)", err)[1])
    if name == "surrogate":
        assert step >= 7  # it is not called for a batch without a signal
    else:
        assert step == 7

    # Nothing that is not finite was saved, so the run can be resumed
    assert int(checkpoints(tmp_path)[-1].name) < step
    go("--resume", "--out", tmp_path)
    assert facts(tmp_path)["files"] == facts(undisturbed[stage][0])["files"]


# ---- memory --------------------------------------------------------------------------------------


def cpu_full(*args, **kwargs):
    torch.empty(1 << 55, dtype=torch.uint8)


def gpu_full(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


MICRO_BATCH = "--micro-batch or --batch-size"
ROLLOUTS = "--batch-size or --G"
MODEL_SIZE = "--batch-size or the size of the model"


# fmt: off
@pytest.mark.parametrize("full", [cpu_full, gpu_full])
@pytest.mark.parametrize("stage, name, place, size, remedy", [
    ("sft", "train.sft_losses", "sft, stage 0, step 1", r"4 × \d+", MICRO_BATCH),
    ("sft", "minatp.run.evaluate.solve", "evaluation", r"4 × \d+", "--eval-batch"),
    ("rl", "train.rollout", "rl, step 1", r"16 × \d+", ROLLOUTS),
    ("rl", "train.log_probs", r"rl, step \d+", r"(4|8|12|16) × \d+", ROLLOUTS),
    # Where nothing better is known
    ("sft", "minatp.optim.Muon.step", "--stage sft", "4 × 512", MODEL_SIZE),
    ("sft", "minatp.run.evaluate.measure", "--stage sft", "4 × 512", MODEL_SIZE),
])
# fmt: on
def test_out_of_memory_exits_4(
    full, stage, name, place, size, remedy, commands, tmp_path, capsys, monkeypatch
):
    """The message says what was computed, how large the batch was, and which option to lower."""
    monkeypatch.setattr(name, full)
    go(*commands[stage], "--out", tmp_path, expect=4)
    message = f"{place}: out of memory with a batch of {size} tokens: lower {remedy}\n"
    assert re.fullmatch(message, capsys.readouterr().err)


def test_a_dry_run_out_of_memory_exits_4_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "sft_losses", cpu_full)
    go(*TINY, "--dry-run", "--out", tmp_path / "never", expect=4)
    message = capsys.readouterr().err
    assert message.startswith("sft, stage 0, step 1: out of memory") and message.count("\n") == 1


def test_other_runtime_errors_are_not_taken_for_memory(tmp_path, monkeypatch):
    def mistaken(*args, **kwargs):
        torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr(train, "sft_losses", mistaken)
    with pytest.raises(RuntimeError, match="size"):
        train.main([*TINY, "--out", str(tmp_path)])
