"""Two processes under torchrun compute what one does: the same losses, weights, chains and files, for SFT and RL; resume works."""
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
from minatp import config

ROOT = Path(__file__).parents[1]
SMALL = ("--n-layer 1 --n-embd 32 --n-inner 48 --labelled 160 --answers 40 --val-size 6 --test-size 12 --batch-size 8 --K 2 "
         "--decoder-layers 1 --log-every 1 --device cpu").split()
SFT = [*SMALL, "--epochs", "0.1", "--answers-share", "0.25", "--votes", "2", "--micro-batch", "3"]
RL = [*SMALL, "--stage", "rl", "--batch-size", "4", "--G", "4", "--updates", "4", "--val-every", "4", "--save-every", "2",
      "--anchor", "0.5", "--kl", "0.01", "--placebo"]


def judge(cfg, chains, golds):
    """Rewards that differ within a group, which those of an untrained model do not."""
    R = torch.tensor([zlib.crc32(c.text.encode()) % 3 / 2 for c in chains]).view(len(golds), cfg.G)
    return R, {"acc": R.mean()}


def alone(*argv):
    assert guarded(train.main, [str(a) for a in argv]) == 0


def worker(runs):
    """What each of the two processes does: train.py for every [port, code, argv] of runs."""
    train.judge = judge
    for port, code, argv in runs:
        os.environ["MASTER_PORT"] = port
        assert guarded(train.main, argv) == code, argv


def together(*runs):
    """Run every (code, argv) with train.py in two processes; returns (stdout, stderr) of each."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in runs]
    jobs = json.dumps([[str(s.getsockname()[1]), code, [str(a) for a in argv]] for s, (code, argv) in zip(sockets, runs)])
    for s in sockets:
        s.close()
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([sys.executable, __file__, jobs], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                env={**shared, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(2)]
    told = [p.communicate(timeout=300) for p in running]
    assert [p.returncode for p in running] == [0, 0], told
    return told


def same(one, two):
    """Two runs' folders: losses, validations and summary, then the weights."""
    drop = ("seconds", "tokens_per_second", "test_seconds")
    records = [[{k: v for k, v in json.loads(line).items() if k not in drop} for line in (d / "metrics.jsonl").read_text().splitlines()]
               for d in (one, two)]
    assert len(records[0]) == len(records[1]) > 3
    for a, b in zip(*records):
        assert a.keys() == b.keys() and a["step"] == b["step"]
        assert a.get("validation", {}).get("accuracy") == b.get("validation", {}).get("accuracy")
        for k in a.keys() - {"validation"}:
            # later steps drift by what rounding does to AdamW, and the KL is nothing but what AdamW did;
            # sigma and clamped are averaged by chains there, by thoughts here
            rel = 1e-2 if k in ("sigma", "clamped") else 1e-6 if a["step"] == 1 else 1e-3 if k == "kl" else 1e-5
            assert a[k] == pytest.approx(b[k], rel=rel, abs=1e-6), (a["step"], k)
    summaries = [json.loads((d / "summary.json").read_text()) for d in (one, two)]
    assert all(summaries[0][k] == summaries[1][k] for k in ("accuracy", "tokens", "n_problems", "training_problems"))
    for file in ("model.safetensors", "minatp/heads.safetensors", "minatp/decoder.safetensors"):
        a, b = load_file(one / "final" / file), load_file(two / "final" / file)
        for k in a:
            torch.testing.assert_close(b[k], a[k], rtol=1e-4, atol=1e-5, msg=lambda m: f"{file} {k}: {m}")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, what each process printed): one.sft, two.sft, one.rl, two.rl, and cut.rl: begun alone and resumed by two."""
    root = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "judge", judge)
        alone(*SFT, "--out", root / "one.sft")
        rl = [*RL, "--init", root / "one.sft"]
        alone(*rl, "--out", root / "one.rl")
        seen = []

        def interrupted(*a):
            seen.append(0)
            if len(seen) > 3:
                raise KeyboardInterrupt
            return judge(*a)

        patch.setattr(train, "judge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train.main([str(a) for a in (*rl, "--out", root / "cut.rl")])
    told = together((0, [*SFT, "--out", root / "two.sft"]), (0, [*rl, "--out", root / "two.rl"]),
                    (0, ["--stage", "rl", "--out", root / "cut.rl", "--resume"]),
                    (2, [*SMALL, "--batch-size", 9, "--out", root / "never"]))
    return root, told


def test_sft_is_the_same_in_two_processes(runs):
    root, _ = runs
    same(root / "one.sft", root / "two.sft")
    votes = [json.loads((root / d / "summary.json").read_text())["sampled"] for d in ("one.sft", "two.sft")]
    assert votes[0] == votes[1]


@pytest.mark.parametrize("other", ["two.rl", "cut.rl"])
def test_rl_is_the_same_in_two_processes_and_resumes_in_them(runs, other):
    root, _ = runs
    same(root / "one.rl", root / other)
    records = [json.loads(line) for line in (root / other / "metrics.jsonl").read_text().splitlines()]
    assert all(r["signal"] > 0 for r in records if "signal" in r)  # or there was nothing to learn


def test_rank_0_alone_speaks_and_a_batch_that_cannot_be_shared_is_refused(runs):
    root, ((first, first_err), (second, second_err)) = runs
    assert "stage 3" in first and not second
    for err in (first_err, second_err):
        assert err == "command line: --batch-size 9 must be a multiple of the 2 processes\n"
    assert not (root / "never").exists()


if __name__ == "__main__":
    worker(json.loads(sys.argv[1]))
