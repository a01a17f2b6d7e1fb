"""What an earlier version of this project has saved can still be used.

fixtures/run_cf08be8 is a run by commit cf08be8, stopped after 15 of its 24 steps, in the middle of
a curriculum stage and between two log lines. Its facts.json is `facts` of the same run, by the same
commit, without the stop.
"""

import json
import shutil
from pathlib import Path

import pytest

import sample
from minatp.run.errors import guarded
from minatp.run.saved import checkpoints

from runs import TINY_RL, facts, go

OLD_RUN = Path(__file__).parents[1] / "fixtures" / "run_cf08be8"
N_DONE, N_STEP = 15, 24
RELATIVE = 1e-4  # another processor may add numbers in another order

# The sizes of the model are not given: they come with --init
NEW_SFT = (
    "--K 2 --labelled 60 --answers 20 --val-size 4 --test-size 6 --batch-size 4 --epochs .2 "
    "--log-every 4 --device cpu"
).split()


@pytest.fixture
def old_run(tmp_path):
    """A copy of the run, as it was when it had stopped."""
    copy = tmp_path / "old"
    shutil.copytree(OLD_RUN, copy, ignore=shutil.ignore_patterns("facts.json"))
    return copy


def test_it_is_resumed(old_run):
    assert [folder.name for folder in checkpoints(old_run)] == [f"{N_DONE:08}"]
    before = (old_run / "metrics.jsonl").read_text()
    go("--resume", "--out", old_run)
    assert (old_run / "metrics.jsonl").read_text().startswith(before)

    reached = facts(old_run)
    expected = json.loads((OLD_RUN / "facts.json").read_text())
    # What its version did not record
    expected["summary"] |= {"dtype": "float32", "data": reached["state"]["data"]}
    assert reached["metrics"][-1]["step"] == N_STEP
    assert {f"{folder}/{name}" for folder, name in reached["files"]} == expected["files"].keys()
    for part in ("state", "summary", "metrics"):
        assert_close(reached[part], expected[part], part)


@pytest.mark.parametrize("command", [NEW_SFT, TINY_RL], ids=["sft", "rl"])
def test_a_new_run_starts_from_it(command, old_run, tmp_path):
    go(*command, "--init", old_run, "--out", tmp_path / "new")
    assert (tmp_path / "new" / "summary.json").exists()


def test_sample_shows_its_thoughts(old_run, capsys):
    argv = ["--run", str(old_run), "--problems", "2", "--json", "--device", "cpu"]
    assert guarded(sample.main, argv) == 0
    chains = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(chains) == 2
    assert all(len(chain["thoughts"]) == chain["latents"] > 0 for chain in chains)


def assert_close(reached, expected, place):
    """The same structure and, apart from rounding, the same numbers. Both are from `facts`."""
    if isinstance(expected, dict):
        assert reached.keys() == expected.keys(), place
        for name in expected:
            assert_close(reached[name], expected[name], f"{place}.{name}")
    elif isinstance(expected, list):
        assert len(reached) == len(expected), place
        for i, (a, b) in enumerate(zip(reached, expected, strict=True)):
            assert_close(a, b, f"{place}.{i}")
    elif is_float(expected):
        assert is_float(reached), place
        close = pytest.approx(float.fromhex(expected), rel=RELATIVE, abs=1e-7)
        assert float.fromhex(reached) == close, place
    else:
        assert reached == expected, place


def is_float(value):
    """Whether a value of `facts` is a float, which is written in hexadecimal."""
    return isinstance(value, str) and value.lstrip("-").startswith("0x")
