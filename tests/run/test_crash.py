"""Nothing lost: runs that are killed, asked to stop, out of disk or memory, or fed what is not finite; and what a resume makes of it.

MINATP_LONG=1 kills 20 times and more in each stage and the writer of checkpoints 500 times; otherwise a few times.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from minatp import checkpoint, config, data, evaluate, muon, run, sets
from minatp.folder import Log
from runs import TAUGHT, TINY, TINY_RL, facts, go, process, processes, training, writing

LONG = os.environ.get("MINATP_LONG") == "1"


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """{stage: command line}; RL starts from a model that knows enough for its rewards to differ."""
    start = tmp_path_factory.mktemp("start")
    go(*TAUGHT, "--out", start)
    return {"sft": TINY, "rl": [*TINY_RL, "--init", start]}


def test_all_of_the_optimizer_is_restored_to_the_parameters_device(tmp_path):
    model, tokenizer = build(options.parse(TINY, ""), load_splits(options.parse(TINY, "")).train)
    optimizer = build_optimizer(options.parse(TINY, ""), model)
    sum(p.sum() for p in model.parameters()).backward()
    optimizer.step()
    checkpoint.save_checkpoint(tmp_path, {"step": 1}, model, tokenizer, optimizer)
    model.to("meta")  # a device that every machine has
    checkpoint.restore(checkpoint.newest_checkpoint(tmp_path), model, again := build_optimizer(options.parse(TINY, ""), model))
    assert {(k, v.device.type) for state in again.state.values() for k, v in state.items()} == {
        (k, "meta") for k in ("step", "exp_avg", "exp_avg_sq", "momentum")}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, options):
    """{stage: (folder, what watched() saw)} of runs that nothing happened to."""
    runs = {}
    for stage in options:
        folder = tmp_path_factory.mktemp("whole") / stage
        with watched(stage) as seen:
            go(*options[stage], "--out", folder)
        runs[stage] = folder, seen
    assert all(float.fromhex(r["signal"]) > 0 for r in facts(folder)["metrics"] if "signal" in r)
    return runs


@contextmanager
def watched(stage):
    """A list that grows by (problems, curriculum stage, chance) at each training step."""
    name = {"sft": "sft_gradients", "rl": "rollout"}[stage]
    real, seen, global_chance = getattr(train, name), [], []

    def watch(*a, **k):
        if sys._getframe(1).f_code.co_name == stage:  # not where a validation or RL's anchor calls it
            what = ([r.at for r in a[3]], a[4], a[5]) if stage == "sft" else (a[1].tolist(), a[0].stage, float(a[4].eps.sum()).hex())
            seen.append(what)
            global_chance.append(torch.get_rng_state())
        return real(*a, **k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, name, watch)
        yield seen
    assert all(torch.equal(s, global_chance[0]) for s in global_chance)  # only chance that follows from seed and step is used


@pytest.fixture(scope="module")
def context():
    return processes()


def restarted(options, out):
    """The command that a user, or a scheduler, gives after an accident."""
    return ["--resume", "--out", out] if checkpoint.checkpoints(out) else [*options, "--out", out]


# ---- SIGKILL ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_killed_at_any_moment(stage, whole, options, context, tmp_path, capfd):
    """Every kill leaves whole checkpoints and no acknowledged save is lost; every run that gets through ends as if never killed."""
    want, out, log, chance = facts(whole[stage][0]), tmp_path / "run", tmp_path / "log", random.Random(stage)
    newest = lambda: int(saved[-1].name) if (saved := checkpoint.checkpoints(out)) else 0
    kills, completed, wanted = 0, 0, 20 if LONG else 3
    while kills < wanted or not completed:
        goal = newest() + chance.randrange(6) if kills < wanted else 1000
        with process(context, training, restarted(options[stage], out), log) as p:
            while p.is_alive() and newest() < goal:
                time.sleep(0.005)
            p.join(chance.uniform(0, 0.3))
            killed = p.is_alive()
        if killed:
            kills += 1
            saved = checkpoint.checkpoints(out)
            assert not any(map(checkpoint.fault, saved))
            lines = (out / "metrics.jsonl").read_text().splitlines(True) if saved else []
            last = max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)  # a line tells before it saves
            assert len(saved) >= min(2, last - 1) and newest() >= max(last - 1, goal)
            for folder in saved:
                model, _ = load_model(folder)
                assert checkpoint.restore(folder, model, torch.optim.AdamW(model.parameters()))["step"] == int(folder.name)
        else:
            assert p.exitcode == 0, log.read_text()
            assert facts(out) == want
            shutil.rmtree(out)
            completed += 1
    assert "warning" not in log.read_text()
    with capfd.disabled():
        print(f" [{stage}: {kills} kills, {completed} runs ended]", end="")


def test_the_writer_of_checkpoints_killed_at_any_moment(whole, context, tmp_path, capfd):
    out, chance, saves = tmp_path / "run", random.Random(0), 0
    (out / "checkpoints").mkdir(parents=True)
    for kill in range(500 if LONG else 25):
        reader, writer = context.Pipe(False)
        with process(context, writing, whole["sft"][0], out, tmp_path / "log", writer):
            assert reader.poll(120)  # it writes
            acknowledged, seconds = reader.recv()
            time.sleep(chance.uniform(0, 2 * seconds))  # anywhere in the saves after the first
        writer.close()
        saves += 1
        try:
            while True:
                (acknowledged, _), saves = reader.recv(), saves + 1
        except EOFError:
            pass
        saved = checkpoint.checkpoints(out)
        assert len(saved) >= min(2, acknowledged) and int(saved[-1].name) >= acknowledged
        assert [checkpoint.fault(folder) for folder in saved] == [None] * len(saved)
        first = next(load_model(saved[-1])[0].parameters())
        assert first.unique().tolist() == [int(saved[-1].name)]
    with capfd.disabled():
        print(f" [{kill + 1} kills, {saves} saves]", end="")


# ---- the three cut points, step by step ---------------------------------------------------------------------------------

def test_a_resumed_rl_run_is_compared_with_its_own_start(whole, tmp_path, capsys):
    shutil.copytree(whole["rl"][0], tmp_path / "rl")
    config_file, weights = tmp_path / "rl" / "config.json", tmp_path / "sft" / "final" / "model.safetensors"
    told = json.loads(config_file.read_text())
    shutil.copytree(told["init"], tmp_path / "sft")
    config_file.write_text(json.dumps({**told, "init": str(tmp_path / "sft")}))
    go("--resume", "--out", tmp_path / "rl")
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1e-4
    save_file(tensors, weights)
    go("--resume", "--out", tmp_path / "rl", expect=2)
    assert capsys.readouterr().err.startswith(f"{tmp_path}/sft:0: is not what this run began from")


class Crash(BaseException):
    pass


@pytest.mark.parametrize("stage, saved, done", [("sft", 3, 3), ("sft", 5, 7), ("sft", 8, 8), ("rl", 3, 3), ("rl", 6, 7), ("rl", 8, 8)])
def test_a_resumed_run_is_the_run(stage, saved, done, whole, options, tmp_path, monkeypatch):
    """Data order, chance, curriculum and every bit of the result, whether cut amid an epoch and between two progress lines, with steps
    lost since the last save, or at a stage's end (8 of each) between its last save and its validation."""
    (folder, reference), real = whole[stage], checkpoint.save_checkpoint

    def save(out, state, *a):
        if state["step"] <= saved:
            real(out, state, *a)
        if state["step"] == done:
            raise Crash

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    with watched(stage) as before, pytest.raises(Crash):
        train.main([str(a) for a in (*options[stage], "--out", tmp_path)])
    monkeypatch.undo()
    with watched(stage) as after:
        go("--resume", "--out", tmp_path)
    assert before == reference[:done] and after == reference[saved:]
    assert facts(tmp_path) == facts(folder)
    validations = [r["step"] for r in facts(tmp_path)["metrics"] if "validation" in r]
    assert validations == {"sft": [4, 8, 12, 16], "rl": [4, 8, 12]}[stage]


def test_same_seed_same_bits_other_seed_other_numbers(whole, context, tmp_path):
    """Level 1, seeded, and level 2, bitwise on the same machine; test_a_resumed_run_is_the_run is level 3."""
    with process(context, training, [*TINY, "--out", tmp_path / "same"], tmp_path / "log") as p:
        p.join()
    assert p.exitcode == 0 and facts(tmp_path / "same") == facts(whole["sft"][0])
    with process(context, training, [*TINY, "--seed", 1, "--out", tmp_path / "other"], tmp_path / "log") as p:
        p.join()
    mine, other = (facts(d)["metrics"] for d in (tmp_path / "same", tmp_path / "other"))
    assert len(mine) == len(other) and all(a["loss"] != b["loss"] for a, b in zip(mine, other) if "loss" in a)


# ---- broken checkpoints -------------------------------------------------------------------------------------------------

def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1 << random.Random(file.name).randrange(8)
    file.write_bytes(data)


def truncate(file):
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink])
def test_a_broken_checkpoint_is_skipped(harm, whole, tmp_path, capsys):
    """Any file of it, its manifest too: one warning, and the checkpoint before it is used."""
    names = [f.relative_to(c) for c in checkpoint.checkpoints(whole["sft"][0])[-1:] for f in c.rglob("*") if f.is_file()]
    assert len(names) > 8
    for name in names:
        out = tmp_path / str(name).replace("/", ".")
        shutil.copytree(whole["sft"][0], out)
        good, newest = checkpoint.checkpoints(out)
        harm(newest / name)
        assert checkpoint.newest_checkpoint(out) == good
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith(f"warning: {newest}: is broken")
    go("--resume", "--out", out)
    assert capsys.readouterr().err.count("warning") == 1 and facts(out) == facts(whole["sft"][0])


def test_what_is_no_checkpoint_is_left_alone(whole, tmp_path, capsys):
    """A copy that a user made, a desktop's files: neither read as checkpoints, nor removed, nor stumbled over."""
    shutil.copytree(whole["sft"][0], tmp_path, dirs_exist_ok=True)
    good, newest = checkpoint.checkpoints(tmp_path)
    newest.rename(newest.with_name(f"{newest.name}-copy2"))
    (good.parent / ".DS_Store").write_text("")
    (good.parent / "notes.1").write_text("")
    (good.parent / "99999999").write_text("")
    go("--resume", "--out", tmp_path)
    (good.parent / "99999999").unlink()
    assert capsys.readouterr().err.count("warning") == 1 and facts(tmp_path) == facts(whole["sft"][0])
    assert {f.name for f in good.parent.iterdir()} == {good.name, newest.name, f"{newest.name}-copy2", ".DS_Store", "notes.1"}


def test_one_flipped_bit_anywhere_in_a_manifest_is_seen(whole):
    good = checkpoint.checkpoints(whole["sft"][0])[-1]
    text = (good / "manifest.json").read_bytes()
    assert checkpoint.fault(good) is None
    try:
        for i in range(len(text)):
            (good / "manifest.json").write_bytes(text[:i] + bytes([text[i] ^ 1 << i % 8]) + text[i + 1:])
            assert checkpoint.fault(good), (i, text[i])
    finally:
        (good / "manifest.json").write_bytes(text)


def test_a_run_without_final_serves_its_newest_checkpoint(whole, tmp_path):
    shutil.copytree(whole["sft"][0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "final")
    (a, _), (b, _) = load_model(tmp_path), load_model(whole["sft"][0])
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


# ---- asked to stop ------------------------------------------------------------------------------------------------------

def test_ctrl_c_ends_the_step_saves_and_exits_75(whole, options, tmp_path):
    """python train.py itself, RL, with no save due but the last; the resumed run is the run."""
    root = Path(train.__file__).parent
    command = [sys.executable, root / "train.py", *options["rl"], "--out", tmp_path, "--save-every", 1000, "--val-every", 1000]
    p = subprocess.Popen([str(a) for a in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in p.stdout:
        if line.startswith("rl from"):
            break
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 75, err
    assert err == f"{tmp_path}:0: stopped when asked to, all is saved; go on with --resume --out {tmp_path}\n" and "stopping after" in out
    saved, = checkpoint.checkpoints(tmp_path)
    assert 1 <= int(saved.name) < 12
    go("--resume", "--out", tmp_path)
    a, b = (facts(d)["files"] for d in (tmp_path, whole["rl"][0]))
    assert a == b


def test_a_second_signal_ends_at_once(options, context, tmp_path):
    log = tmp_path / "log"
    with process(context, training, [*TINY, "--out", tmp_path / "run"], log, None, 300) as p:
        wait_for(log, "files in")
        os.kill(p.pid, signal.SIGTERM)
        wait_for(log, "stopping after this step; once more: at once")
        os.kill(p.pid, signal.SIGTERM)
        p.join(20)
        assert p.exitcode == -signal.SIGTERM and not checkpoint.checkpoints(tmp_path / "run")


def wait_for(log, text):
    deadline = time.monotonic() + 60
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline, text
        time.sleep(0.01)


def test_a_signal_in_an_evaluation_does_not_wait_for_its_end(whole, options, tmp_path, monkeypatch):
    real, seen = evaluate.rollout, []

    def signalled(*a, **k):
        seen.append(os.kill(os.getpid(), signal.SIGTERM))
        return real(*a, **k)

    monkeypatch.setattr(evaluate, "rollout", signalled)
    before = signal.getsignal(signal.SIGTERM)
    go(*TINY, "--eval-batch", 1, "--out", tmp_path, expect=75)
    assert len(seen) == 1 and signal.getsignal(signal.SIGTERM) == before and checkpoint.checkpoints(tmp_path)[-1].name == "00000004"
    monkeypatch.undo()
    go("--resume", "--out", tmp_path)
    assert facts(tmp_path)["files"] == facts(whole["sft"][0])["files"]


# ---- a full disk --------------------------------------------------------------------------------------------------------

def test_a_full_disk_leaves_the_last_checkpoint(whole, context, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(whole["sft"][0], out)
    shutil.rmtree(checkpoint.checkpoints(out)[-1])
    last, = checkpoint.checkpoints(out)
    with process(context, training, ["--resume", "--out", out], log, 40_000) as p:
        p.join()
    line = log.read_text().splitlines()[-1]
    needed = re.match(rf"{out}/checkpoints/00000016:0: cannot be written \(.*\): ([\d,]+) bytes are needed and [\d,]+ are free", line)
    assert p.exitcode == 74 and needed, line
    model, _ = load_model(last)
    weights = sum(4 * p.numel() for p in model.parameters())
    assert 3 * weights <= int(needed[1].replace(",", "")) <= 3 * weights + 2**21  # with two moments
    assert checkpoint.newest_checkpoint(out) == last and [c.name for c in (out / "checkpoints").iterdir()] == [last.name]
    go("--resume", "--out", out)
    assert facts(out) == facts(whole["sft"][0])


def test_a_full_disk_under_the_other_files(tmp_path):
    cfg = options.parse([*TINY, "--out", str(tmp_path)], "")
    log = Log(cfg, {"step": 0, "seconds": 0.0})
    log.file = open("/dev/full", "w")
    with pytest.raises(NotWritten, match=r"metrics.jsonl:0: cannot be written \(No space left on device\): 12 bytes are needed"):
        log.write({"step": 1})
    (tmp_path / "there").write_text("old")
    os.symlink("/dev/full", tmp_path / "there.tmp")
    with pytest.raises(NotWritten, match="there:0: .* 3 bytes are needed"):
        replace_file(tmp_path / "there", "new")
    assert (tmp_path / "there").read_text() == "old"
    with pytest.raises(NotWritten, match=r"\(Is a directory\).*: mend that, then"):
        (tmp_path / "folder").mkdir()
        replace_file(tmp_path / "folder", "new")


# ---- what is not finite -------------------------------------------------------------------------------------------------

def test_steps_that_are_not_finite_are_not_taken(whole):
    """Nor any after them, until `check` tells; parameters and moments keep their bits."""
    model, _ = load_model(whole["sft"][0])
    optimizer = build_optimizer(options.parse([*TINY, "--out", "o"], ""), model)
    problem = lambda at: [data.Problem("q", [], "1", at)]

    def take(steps, step, loss, gradient):
        for p in model.parameters():
            p.grad = torch.full_like(p, gradient)
        steps.take(0.1, torch.tensor(loss), step, problem(f"a.json:{step}"))

    inf, nan = float("inf"), float("nan")
    for loss, gradient, told in ((1.0, inf, "gradient norm (inf|nan)"), (nan, 1.0, "loss nan"), (inf, 1.0, "loss inf")):
        steps = Steps(optimizer, model, 1.0)
        take(steps, 1, 1.0, 1.0)
        steps.check()
        before = [p.clone() for p in model.parameters()] + [v.clone() for s in optimizer.state.values() for v in s.values()]
        take(steps, 2, loss, gradient)
        take(steps, 3, 1.0, 1.0)
        after = [*model.parameters(), *(v for s in optimizer.state.values() for v in s.values())]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        with pytest.raises(NotFinite, match=rf"step 3: .*{told}.*problems a.json:2$"):
            steps.check()


@pytest.mark.parametrize("stage, name, poison", [
    ("sft", "supervise", lambda sums: {**sums, "enc": sums["enc"] * float("nan")}),
    ("rl", "policy_loss", lambda out: (out[0] * float("nan"), *out[1:])),
    ("rl", "judge", lambda out: (out[0] + float("inf"), out[1])),
])
def test_a_run_that_is_not_finite_exits_3(stage, name, poison, whole, options, tmp_path, capsys, monkeypatch):
    real, calls = getattr(train, name), []

    def poisoned(*a):
        calls.append(0)
        return poison(real(*a)) if len(calls) >= 7 else real(*a)

    monkeypatch.setattr(train, name, poisoned)
    go(*options[stage], "--out", tmp_path, "--log-every", 1000, "--save-every", 5, expect=3)
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "nothing was changed" in err
    assert re.search(r"^step \d+: .*problems built-in (labelled|answers):\d+(,\d+)*", err)
    named = int(re.match(r"step (\d+)", err)[1])
    assert named == 7 or name == "policy_loss" and named > 7  # a batch without a signal has none
    saved = checkpoint.checkpoints(tmp_path)[-1]
    assert int(saved.name) < named
    monkeypatch.undo()
    go("--resume", "--out", tmp_path)
    assert facts(tmp_path)["files"] == facts(whole[stage][0])["files"]


# ---- memory -------------------------------------------------------------------------------------------------------------

def cpu_full(*a, **k):
    torch.empty(1 << 55, dtype=torch.uint8)


def gpu_full(*a, **k):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("full", [cpu_full, gpu_full])
@pytest.mark.parametrize("stage, name, told", [
    ("sft", "supervise", r"sft, stage 0, step 1: out of memory with a batch of 4 × \d+ tokens: lower --micro-batch or --batch-size"),
    ("rl", "rollout", r"rl, step 1: out of memory with a batch of 16 × \d+ tokens: lower --batch-size or --G"),
    ("rl", "policy_loss", r"rl, step \d+: out of memory with a batch of (4|8|12|16) × \d+ tokens: lower --batch-size or --G"),
    ("sft", "evaluate.solve", r"evaluation: out of memory with a batch of 4 × \d+ tokens: lower --eval-batch"),
    ("sft", "solve", r"--stage sft: out of memory with a batch of 4 × 512 tokens: lower --batch-size or the size of the model"),
])
def test_out_of_memory_exits_4(full, stage, name, told, options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(f"train.{name}", full)
    go(*options[stage], "--out", tmp_path, expect=4)
    assert re.fullmatch(told + "\n", capsys.readouterr().err)


def test_other_runtime_errors_are_not_taken_for_memory(options, tmp_path, monkeypatch):
    def mistaken(*a, **k):
        torch.zeros(2) @ torch.zeros(3)

    monkeypatch.setattr(train, "supervise", mistaken)
    with pytest.raises(RuntimeError, match="size"):
        train.main([*TINY, "--out", str(tmp_path)])
