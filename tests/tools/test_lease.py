"""What is looked at on a rented GPU, on a CPU: lease.py with the small model, in a process of its
own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import graph
from minatp.bench import lease
from minatp.run.errors import guarded

ROOT = Path(__file__).parents[2]

# What each part that needs no GPU writes
FIGURES = {
    "same": ["same 0", "same 1", "same 2"],
    "sft": [
        "SFT stage 0",
        "SFT stage 0, no update",
        "SFT stage 5",
        "SFT stage 5, no update",
        "peak GiB",
        "SFT last stage without graphs",
    ],
    "rl": [
        "rollouts, full length",
        "reading thoughts",
        "RL gradients",
        "rollouts, ragged",
        "rollouts, ragged, nobody leaves",
        "rollouts without graphs",
    ],
    "profile": ["profile sft, ms", "profile rollouts, ms"],
}


def run_python(*argv):
    """What `python argv` prints, in a process of its own, where it must succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("MINATP_KERNELS", None)
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- the lease -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leased(tmp_path_factory):
    """(lease.json, its folder) of every part but `verify`, on a CPU."""
    out = tmp_path_factory.mktemp("lease")
    parts = ["same", "memory", "sft", "rl", "profile"]
    run_python("-m", "minatp.bench.lease", "tiny", "cpu", out, *parts, "--rounds", 1)
    return json.loads((out / "lease.json").read_text()), out


def test_every_part_of_a_lease_writes_its_figures(leased):
    figures, _ = leased
    expected = [name for names in FIGURES.values() for name in names]
    assert list(figures) == ["on", *expected]  # and so nothing FAILED
    for name in FIGURES["sft"] + FIGURES["rl"]:
        if name != "peak GiB":
            assert 0 < figures[name]["least"] <= figures[name]["ms"]


def test_a_lease_compares_gradients_with_and_without_graphs(leased):
    figures, _ = leased
    for name in FIGURES["same"]:  # on a CPU both are the same code
        compared = figures[name]
        assert compared["losses"] == compared["without graphs"]
        assert compared["norms differ by"][0] == 0
        assert compared["least cosine"] == pytest.approx(1)
        assert compared["keys"]


def test_a_lease_profiles(leased):
    figures, out = leased
    for name in ("sft", "rollouts"):
        assert "aten::mm" in (out / f"profile_{name}.txt").read_text()
        total, *longest = figures[f"profile {name}, ms"].values()
        assert total > sum(longest) - 0.1 > 0  # each is rounded


def test_a_part_that_fails_is_named_and_the_others_run(tmp_path, monkeypatch):
    def fails(lease):
        raise ValueError("no such luck")

    def works(lease):
        lease.report("works", 1)

    monkeypatch.setattr(graph, "record", graph.record)  # which a lease replaces
    monkeypatch.setitem(lease.PARTS, "same", fails)
    monkeypatch.setitem(lease.PARTS, "memory", works)
    assert lease.main(["tiny", "cpu", str(tmp_path), "same", "memory"]) == 0
    figures = json.loads((tmp_path / "lease.json").read_text())
    assert figures["FAILED same"] == "ValueError: no such luck"
    assert figures["works"] == 1


def test_a_gradient_that_only_one_way_has_is_reported():
    losses = {"enc": 2.0}
    ones, opposite = torch.ones(3), -torch.ones(3)
    both = losses, {"a": 1.0, "b": 2.0}, {"a": ones, "b": opposite}
    a_alone = losses, {"a": 1.0}, {"a": ones}
    for with_graphs, plain in ((both, a_alone), (a_alone, both)):
        compared = lease.compare_gradients(with_graphs, plain)
        assert not compared["keys"]
        assert compared["norms differ by"] == (0, "a")
        assert compared["least cosine"] == pytest.approx(1)
    assert lease.compare_gradients(both, both)["keys"]


def test_a_lease_without_a_round_is_refused(tmp_path, capsys):
    assert guarded(lease.main, ["tiny", "cpu", str(tmp_path), "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "command line: --rounds must be positive, not 0\n"


def test_a_part_that_does_not_exist_is_named(tmp_path, capsys):
    assert guarded(lease.main, ["tiny", "cpu", str(tmp_path), "speed"]) == 2
    assert "there is no 'speed'; there are verify; same;" in capsys.readouterr().err


def test_the_script_of_a_lease_is_one_that_bash_can_read():
    script = ROOT / "minatp" / "bench" / "lease.sh"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    for path in ("tests/kernels/test_graph.py", "tests/kernels/test_kernels.py"):
        assert path in text and (ROOT / path).exists()
