"""Two ranks under torchrun compute what a single process does.

The losses, weights, chains and files are the same, for SFT and RL, and two ranks can resume a run
that a single process began. This file is also the program of each rank: see `worker`.
"""

import json
import os
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from minatp.run.errors import guarded

ROOT = Path(__file__).parents[2]

SMALL = (
    "--n-layer 1 --n-embd 32 --n-inner 48 --decoder-layers 1 --K 2 --labelled 160 --answers 40 "
    "--val-size 6 --test-size 12 --batch-size 8 --log-every 1 --device cpu"
).split()
SFT = [*SMALL, *"--epochs 0.1 --answers-share 0.25 --votes 2 --micro-batch 3".split()]
DISTILL = [*SMALL, *"--epochs 0.1 --answers-share 0.75 --micro-batch 1 --distill 2".split()]
CODI = [*SMALL, *"--epochs 0.2 --answers-share 0.25 --method codi-sim-cot".split()]
RL = [
    *SMALL,
    *"--stage rl --batch-size 4 --G 4 --updates 4 --val-every 4 --save-every 2".split(),
    *"--anchor 0.5 --kl 0.01 --placebo".split(),
]


RL_OF_LATENTS = [
    *SMALL,
    *"--stage rl --batch-size 4 --G 4 --updates 4 --val-every 4 --estimator score".split(),
    *"--placebo-latents --latent-weight 0.1 --anchor 0.5 --distill 1".split(),
]


# ---- runs of one process and of two --------------------------------------------------------------


def reward_by_hash(cfg, chain, answer):
    """In place of chain_reward: rewards that differ within a group, as a trained model's do."""
    reward = zlib.crc32(chain.text.encode()) % 3 / 2
    return reward, {"acc": reward, "coh": reward / 2, "fmt": 1 - reward}


def strings(argv):
    return [str(a) for a in argv]


def run_alone(*argv):
    """Run train.py in this process."""
    assert guarded(train.main, strings(argv)) == 0


def run_interrupted(patch, *argv):
    """Run train.py with --stage rl in this process until the rewards of its fourth step."""
    judge = train.judge
    n_step = 0

    def interrupted(*args):
        nonlocal n_step
        n_step += 1
        if n_step > 3:
            raise KeyboardInterrupt
        return judge(*args)

    patch.setattr(train, "judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.main(strings(argv))


def run_together(*runs):
    """Run train.py with each (exit code, argv) on two ranks -> [(stdout, stderr) of each rank]."""
    # The ranks of each run meet at a port of its own
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in runs]
    jobs = []
    for s, (code, argv) in zip(sockets, runs):
        jobs.append((str(s.getsockname()[1]), code, strings(argv)))
    for s in sockets:
        s.close()

    # The environment that torchrun makes
    env = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    ranks = []
    for rank in ("0", "1"):
        process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(jobs)],
            cwd=ROOT,
            env={**env, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        ranks.append(process)
    outputs = [process.communicate(timeout=300) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outputs
    return outputs


def worker(jobs):
    """The program of a rank: train.py with each (port, exit code, argv)."""
    train.chain_reward = reward_by_hash
    for port, code, argv in jobs:
        os.environ["MASTER_PORT"] = port
        assert guarded(train.main, argv) == code, argv


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder of the runs, [(stdout, stderr) of each rank]).

    one.* are runs of one process, two.* of two ranks; cut.rl was begun by one process and resumed
    by two ranks.
    """
    root = tmp_path_factory.mktemp("ranks")
    rl = [*RL, "--init", root / "one.sft"]
    rl_of_latents = [*RL_OF_LATENTS, "--init", root / "one.sft"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "chain_reward", reward_by_hash)
        run_alone(*SFT, "--out", root / "one.sft")
        run_alone(*DISTILL, "--out", root / "one.distill")
        run_alone(*CODI, "--out", root / "one.codi")
        run_alone(*rl, "--out", root / "one.rl")
        run_alone(*rl_of_latents, "--out", root / "one.latents")
        run_interrupted(patch, *rl, "--out", root / "cut.rl")
    outputs = run_together(
        (0, [*SFT, "--out", root / "two.sft"]),
        (0, [*DISTILL, "--out", root / "two.distill"]),
        (0, [*CODI, "--out", root / "two.codi"]),
        (0, [*rl, "--out", root / "two.rl"]),
        (0, [*rl_of_latents, "--out", root / "two.latents"]),
        (0, ["--stage", "rl", "--out", root / "cut.rl", "--resume"]),
        (2, [*SMALL, "--batch-size", 9, "--out", root / "never"]),
    )
    return root, outputs


# ---- what must be the same -----------------------------------------------------------------------


def read_records(folder):
    """The records of metrics.jsonl, without times."""
    records = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name in ("seconds", "tokens_per_second", "test_seconds"):
            record.pop(name, None)
        records.append(record)
    return records


def read_summary(folder):
    return json.loads((folder / "summary.json").read_text())


def tolerance(name, step):
    """How much a logged value may differ, relatively."""
    if name in ("sigma", "clamped"):
        return 1e-2  # one process averages them over latents, two ranks average by chains
    if step == 1:
        return 1e-6
    # Rounding grows through AdamW from step to step, and the KL is due to AdamW's steps alone
    return 1e-3 if name == "kl" else 1e-5


def assert_same_records(one, two):
    records_one, records_two = read_records(one), read_records(two)
    assert len(records_one) == len(records_two) > 3
    for a, b in zip(records_one, records_two):
        assert a.keys() == b.keys()
        assert a["step"] == b["step"]
        validation_a = a.pop("validation", {})
        validation_b = b.pop("validation", {})
        assert validation_a.get("accuracy") == validation_b.get("accuracy")
        for name in a:
            expected = pytest.approx(b[name], rel=tolerance(name, a["step"]), abs=1e-6)
            assert a[name] == expected, (a["step"], name)


def assert_same_summaries(one, two):
    for name in ("accuracy", "tokens", "n_problems", "training_problems"):
        assert read_summary(one)[name] == read_summary(two)[name]


def assert_same_weights(one, two):
    for file in ("model", "minatp/heads", "minatp/decoder"):
        a = load_file(one / "final" / f"{file}.safetensors")
        b = load_file(two / "final" / f"{file}.safetensors")
        assert a.keys() == b.keys()
        for name in a:
            label = f"{file} {name}: "
            torch.testing.assert_close(
                b[name], a[name], rtol=1e-4, atol=1e-5, msg=lambda m, label=label: label + m
            )


def assert_same_run(one, two):
    assert_same_records(one, two)
    assert_same_summaries(one, two)
    assert_same_weights(one, two)


# ---- tests ---------------------------------------------------------------------------------------


def test_sft_is_the_same_on_two_ranks(runs):
    root, _ = runs
    assert_same_run(root / "one.sft", root / "two.sft")
    votes_of_one = read_summary(root / "one.sft")["sampled"]
    votes_of_two = read_summary(root / "two.sft")["sampled"]
    assert votes_of_one == votes_of_two


@pytest.mark.parametrize("name", ["distill", "codi"])
def test_distillation_is_the_same_on_two_ranks(runs, name):
    """Also where a rank has answers alone in a micro-batch."""
    root, _ = runs
    assert_same_run(root / f"one.{name}", root / f"two.{name}")
    assert any("distill" in record for record in read_records(root / f"two.{name}"))


def test_the_credit_of_latents_is_the_same_on_two_ranks(runs):
    root, _ = runs
    assert_same_run(root / "one.latents", root / "two.latents")
    signals = [r["signal"] for r in read_records(root / "two.latents") if "signal" in r]
    assert min(signals) > 0


@pytest.mark.parametrize("name", ["two.rl", "cut.rl"])
def test_rl_is_the_same_on_two_ranks_and_can_be_resumed_on_them(runs, name):
    root, _ = runs
    assert_same_run(root / "one.rl", root / name)
    signals = [r["signal"] for r in read_records(root / name) if "signal" in r]
    assert min(signals) > 0  # otherwise there was nothing to learn


def test_only_rank_0_prints(runs):
    _, ((stdout_0, _), (stdout_1, _)) = runs
    assert "stage 3" in stdout_0
    assert not stdout_1


def test_a_batch_that_cannot_be_split_evenly_is_refused(runs):
    root, outputs = runs
    for _, stderr in outputs:
        assert stderr == ("command line: --batch-size 9 must be a multiple of the 2 processes\n")
    assert not (root / "never").exists()


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
