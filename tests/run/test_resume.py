"""Runs that stop in any way and are resumed: from an intact checkpoint, to the same bits."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from minatp.optim import build_optimizer
from minatp.run import checkpoint, evaluate, options
from minatp.run.build import build
from minatp.run.huggingface import load_model
from minatp.run.saved import checkpoints, fault, newest_checkpoint
from minatp.run.splits import load_splits

from runs import TINY, facts, go, process, training, watched

# ---- a resumed run is the run --------------------------------------------------------------------


class Crash(BaseException):
    """The process ends here. No `except Exception` may stop that."""


@pytest.mark.parametrize(
    "stage, last_saved, last_done",
    [
        *(("sft", 1, 1), ("sft", 2, 2), ("sft", 3, 3), ("sft", 5, 7), ("sft", 8, 8)),
        *(("rl", 3, 3), ("rl", 6, 7), ("rl", 8, 8)),
    ],
)
def test_a_resumed_run_is_the_run(
    stage, last_saved, last_done, undisturbed, commands, tmp_path, monkeypatch
):
    """Data order, chance, curriculum and every bit of the result.

    The run is cut before φ starts, just when it does (step 2) or later; amid an epoch and between
    two log lines (step 3); with steps lost since the last save; or between a save and the
    validation that follows it (step 8, the end of an SFT stage).
    """
    folder, steps = undisturbed[stage]
    real = checkpoint.save_checkpoint

    def save_and_crash(out, state, *args):
        if state["step"] <= last_saved:
            real(out, state, *args)
        if state["step"] == last_done:
            raise Crash

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_and_crash)
    with watched(stage) as steps_before, pytest.raises(Crash):
        train.main([str(a) for a in (*commands[stage], "--out", tmp_path)])
    monkeypatch.undo()
    with watched(stage) as steps_after:
        go("--resume", "--out", tmp_path)

    assert len(steps) == {"sft": 16, "rl": 12}[stage]
    assert steps_before == steps[:last_done]
    assert steps_after == steps[last_saved:]
    assert facts(tmp_path) == facts(folder)
    validated = [r["step"] for r in facts(tmp_path)["metrics"] if "validation" in r]
    assert validated == {"sft": [4, 8, 12, 16], "rl": [4, 8, 12]}[stage]


@pytest.mark.parametrize(
    "argv, last",
    [
        ("--method codi-sim-cot --epochs .54", 5),
        ("--method pause", 5),
        ("--distill 2", 5),
        ("--decoder-start copy", 3),  # φ starts after the fourth step
    ],
)
def test_a_resumed_run_of_a_method_is_the_run(argv, last, tmp_path, monkeypatch):
    """Between two log lines, whose averages count the teacher's losses as well."""
    command = [*TINY, *argv.split()]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(*command, "--out", whole)
    real = checkpoint.save_checkpoint

    def save_and_crash(out, state, *args):
        real(out, state, *args)
        if state["step"] == last:
            raise Crash

    monkeypatch.setattr(checkpoint, "save_checkpoint", save_and_crash)
    with pytest.raises(Crash):
        train.main([str(a) for a in (*command, "--out", cut)])
    monkeypatch.undo()
    go("--resume", "--out", cut)
    assert facts(cut) == facts(whole)


def test_same_seed_same_bits_other_seed_other_numbers(undisturbed, context, tmp_path):
    """Also in another process. That a resumed run has the same bits is tested above."""

    def trained(name, *more):
        out = tmp_path / name
        with process(context, training, [*TINY, *more, "--out", out], tmp_path / "log") as p:
            p.join()
        assert p.exitcode == 0
        return facts(out)

    same = trained("same")
    assert same == facts(undisturbed["sft"][0])

    other = trained("other", "--seed", 1)
    assert len(same["metrics"]) == len(other["metrics"])
    for record, other_record in zip(same["metrics"], other["metrics"]):
        if "loss" in record:
            assert record["loss"] != other_record["loss"]


def test_a_run_that_was_out_of_memory_continues_with_smaller_micro_batches(
    undisturbed, tmp_path, refused
):
    """As the message asks for; it changes no more than rounding."""
    folder, _ = undisturbed["sft"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(checkpoints(tmp_path)[-1])  # the last step is taken once more
    resume = ["--resume", "--out", str(tmp_path)]
    go(*resume, "--micro-batch", 1, "--eval-batch", 2, "--recompute")

    cfg = options.of_run(tmp_path / "config.json")
    assert (cfg.micro_batch, cfg.eval_batch, cfg.recompute) == (1, 2, True)
    pairs = zip(load_model(tmp_path)[0].parameters(), load_model(folder)[0].parameters())
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)

    # A run of another batch is another run
    refused(train.main, [*resume, "--batch-size", "2"], f"{tmp_path}/config.json:1: ", "drop the")
    refused(train.main, [*resume, "--micro-batch", "-1"], "command line: ", "not be negative")


def test_all_of_the_optimizer_is_restored_to_the_parameters_device(tmp_path):
    cfg = options.parse(TINY, "")
    model, tokenizer = build(cfg, load_splits(cfg).train)
    optimizer = build_optimizer(cfg, model)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    checkpoint.save_checkpoint(tmp_path, {"step": 1}, model, tokenizer, optimizer)

    model.to("meta")  # a device that every machine has
    restored = build_optimizer(cfg, model)
    checkpoint.restore_optimizer(newest_checkpoint(tmp_path), model, restored)
    found = {
        (name, v.device.type) for state in restored.state.values() for name, v in state.items()
    }
    assert found == {(name, "meta") for name in ("step", "exp_avg", "exp_avg_sq", "momentum")}


def test_a_resumed_rl_run_is_compared_with_its_own_start(undisturbed, tmp_path, capsys):
    shutil.copytree(undisturbed["rl"][0], tmp_path / "rl")
    config_file = tmp_path / "rl" / "config.json"
    config = json.loads(config_file.read_text())
    shutil.copytree(config["init"], tmp_path / "sft")
    config_file.write_text(json.dumps({**config, "init": str(tmp_path / "sft")}))
    go("--resume", "--out", tmp_path / "rl")

    weights = tmp_path / "sft" / "final" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1e-4
    save_file(tensors, weights)
    go("--resume", "--out", tmp_path / "rl", expect=2)
    err = capsys.readouterr().err
    assert err.startswith(f"{tmp_path}/sft:0: is not what this run started from")


# ---- broken checkpoints --------------------------------------------------------------------------


def flip_bit(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1 << random.Random(file.name).randrange(8)
    file.write_bytes(data)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("damage", [flip_bit, truncate, Path.unlink])
def test_a_broken_checkpoint_is_skipped(damage, undisturbed, tmp_path, capsys):
    """Whichever of its files is damaged: one warning, and the checkpoint before it is used."""
    folder, _ = undisturbed["sft"]
    newest = checkpoints(folder)[-1]
    names = [file.relative_to(newest) for file in newest.rglob("*") if file.is_file()]
    assert len(names) > 8
    for name in names:
        out = tmp_path / str(name).replace("/", ".")
        shutil.copytree(folder, out)
        good, newest = checkpoints(out)
        damage(newest / name)
        assert newest_checkpoint(out) == good
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert err.startswith(f"warning: {newest}: is broken")

    go("--resume", "--out", out)
    assert capsys.readouterr().err.count("warning") == 1
    assert facts(out) == facts(folder)


def test_what_is_no_checkpoint_is_left_alone(undisturbed, tmp_path, capsys):
    """A user's copy and a desktop's files are not read as checkpoints, and not removed."""
    folder, _ = undisturbed["sft"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    good, newest = checkpoints(tmp_path)
    copy = newest.with_name(f"{newest.name}-copy2")
    newest.rename(copy)
    for name in (".DS_Store", "notes.1", "99999999"):
        (good.parent / name).write_text("")

    go("--resume", "--out", tmp_path)
    (good.parent / "99999999").unlink()
    assert capsys.readouterr().err.count("warning") == 1  # of the file whose name is a step
    assert facts(tmp_path) == facts(folder)
    left = {file.name for file in good.parent.iterdir()}
    assert left == {good.name, newest.name, copy.name, ".DS_Store", "notes.1"}


def test_one_flipped_bit_anywhere_in_a_manifest_is_seen(undisturbed, tmp_path):
    good = tmp_path / "good"
    shutil.copytree(checkpoints(undisturbed["sft"][0])[-1], good)
    manifest = good / "manifest.json"
    text = manifest.read_bytes()
    assert fault(good) is None
    for i in range(len(text)):
        flipped = text[i] ^ 1 << i % 8
        manifest.write_bytes(text[:i] + bytes([flipped]) + text[i + 1 :])
        assert fault(good), (i, text[i])


def test_a_run_without_final_serves_its_newest_checkpoint(undisturbed, tmp_path):
    folder, _ = undisturbed["sft"]
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "final")
    from_checkpoint, _ = load_model(tmp_path)
    from_final, _ = load_model(folder)
    pairs = zip(from_checkpoint.parameters(), from_final.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


# ---- stopped on request --------------------------------------------------------------------------


def test_ctrl_c_ends_the_step_saves_and_exits_75(undisturbed, commands, tmp_path):
    """`python train.py` itself, which has no other save due; the resumed run is the run."""
    program = Path(train.__file__).parent / "train.py"
    no_saves = ("--save-every", 1000, "--val-every", 1000)
    command = [sys.executable, program, *commands["rl"], "--out", tmp_path, *no_saves]
    p = subprocess.Popen(
        [str(a) for a in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in p.stdout:
        if line.startswith("rl from"):
            break
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 75, err
    assert "stopping after" in out
    assert err == (
        f"{tmp_path}:0: stopped on request, everything is saved; continue with "
        f"--resume --out {tmp_path}\n"
    )

    (saved,) = checkpoints(tmp_path)
    assert 1 <= int(saved.name) < 12
    go("--resume", "--out", tmp_path)
    assert facts(tmp_path)["files"] == facts(undisturbed["rl"][0])["files"]


def test_a_second_signal_ends_at_once(context, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    endless = 300  # seconds a step
    with process(context, training, [*TINY, "--out", out], log, None, endless) as p:
        wait_for(log, "files in")
        os.kill(p.pid, signal.SIGTERM)
        wait_for(log, "stopping after this step; once more: at once")
        os.kill(p.pid, signal.SIGTERM)
        p.join(20)
        assert p.exitcode == -signal.SIGTERM
        assert not checkpoints(out)


def wait_for(log, text):
    deadline = time.monotonic() + 60
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, text
        time.sleep(0.01)


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(undisturbed, tmp_path, monkeypatch):
    real = evaluate.rollout
    n_rollout = 0

    def rollout_and_signal(*args, **kwargs):
        nonlocal n_rollout
        n_rollout += 1
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(evaluate, "rollout", rollout_and_signal)
    go(*TINY, "--eval-batch", 1, "--out", tmp_path, expect=75)
    monkeypatch.undo()
    assert n_rollout == 1  # of 4 problems
    assert signal.getsignal(signal.SIGTERM) == handler
    assert checkpoints(tmp_path)[-1].name == "00000004"

    go("--resume", "--out", tmp_path)
    assert facts(tmp_path)["files"] == facts(undisturbed["sft"][0])["files"]
