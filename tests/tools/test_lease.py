"""What is looked at on a rented GPU, on a CPU: lease.py with the small model, in a process of its
own.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from kernels import graph
from minatp.bench import lease
from minatp.bench.cases import paper_row
from minatp.data import collate
from minatp.latent import ATP
from minatp.llama import LlamaConfig
from minatp.run.errors import guarded

from runs import run_python

ROOT = Path(__file__).parents[2]

# What each part that needs no GPU writes
FIGURES = {
    "loss": [
        "losses by kernels in float32, over PyTorch's in float32, less 1",
        "losses by kernels in bf16, over PyTorch's in float32, less 1",
        "losses by PyTorch in bf16, over PyTorch's in float32, less 1",
    ],
    "same": ["same 0", "same 1", "same 2", "same 3"],
    "sft": [
        "SFT stage 0",
        "SFT stage 0, no update",
        "SFT stage 0, ms of the host",
        "SFT stage 5",
        "SFT stage 5, no update",
        "SFT stage 5, ms of the host",
        "peak GiB",
        "SFT last stage without graphs",
    ],
    "rl": [
        "rollouts, full length",
        "reading thoughts",
        "RL gradients",
        "rollouts, ragged",
        "rollouts, ragged, rows leave",
        "rollouts without graphs",
    ],
    "profile": ["profile sft, ms", "profile rollouts, ms"],
}


# ---- the lease -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def leased(tmp_path_factory):
    """(lease.json, its folder) of every part but `verify`, on a CPU."""
    out = tmp_path_factory.mktemp("lease")
    parts = ["loss", "same", "memory", "sft", "rl", "profile"]
    run_python("-m", "minatp.bench.lease", "tiny", "cpu", out, *parts, "--rounds", 1)
    return json.loads((out / "lease.json").read_text()), out


def test_every_part_of_a_lease_writes_its_figures(leased):
    figures, _ = leased
    expected = [name for names in FIGURES.values() for name in names]
    assert list(figures) == ["on", *expected]  # and so nothing FAILED
    for name in FIGURES["sft"] + FIGURES["rl"]:
        if name.endswith("ms of the host"):
            assert min(figures[name].values()) > 0
        elif name != "peak GiB":
            assert 0 < figures[name]["least"] <= figures[name]["ms"]


def test_a_lease_compares_losses_with_those_in_float32(leased):
    figures, _ = leased
    for name in FIGURES["loss"]:  # on a CPU all are the same code
        assert set(figures[name]) == {"enc", "kl", "stop", "dec"}
        assert set(figures[name].values()) == {0}


def test_a_lease_compares_gradients_with_and_without_graphs(leased):
    figures, _ = leased
    for name in FIGURES["same"]:  # on a CPU both are the same code
        compared = figures[name]
        assert compared["losses"] == compared["without graphs"]
        assert compared["norms differ by"][0] == 0
        assert compared["least cosine"] == pytest.approx(1)
        assert compared["keys"]


def test_batches_of_one_size_are_run_recorded_and_replayed():
    rows = [paper_row(100) for _ in range(24)]
    model = ATP(LlamaConfig(vocab_size=100, n_layer=1, n_embd=8, n_inner=8), c=2, K=10)
    model.end = 1
    batches = [collate(rows, model.K + 1, model) for rows in lease.ragged_batches(rows)]
    sizes = [(*b.prompt.shape, b.thinking.L, b.thinking.n_candidate) for b in batches]
    assert sizes[0] == sizes[2] == sizes[3] != sizes[1]
    assert all(len(batch.thinking.n_latent.unique()) > 4 for batch in batches)


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
    assert "there is no 'speed'; there are loss; verify;" in capsys.readouterr().err


def test_a_recording_that_fails_ends_the_process(tmp_path, monkeypatch):
    """What it leaves behind cannot be trusted; lease.sh continues with its next process."""

    def fails(lease):
        raise graph.CaptureFailed("ValueError while recording")

    monkeypatch.setattr(graph, "record", graph.record)  # which a lease replaces
    monkeypatch.setitem(lease.PARTS, "same", fails)
    argv = ["tiny", "cpu", str(tmp_path), "same", "memory"]
    assert lease.main(argv) == lease.LOST_CONTEXT
    figures = json.loads((tmp_path / "lease.json").read_text())
    assert figures["FAILED same"] == "CaptureFailed: ValueError while recording"


# ---- the script ----------------------------------------------------------------------------------

TESTS = [f"tests/kernels/test_graph.py::test_{i}[a b]" for i in range(19)]

# Stands in for python3: it notes how it is called
PYTHON = """#!/bin/bash
echo "$TRITON_INTERPRET $@" >> "$OUT/calls.txt"
case "$*" in
    *"import pytest_timeout"*) exit {no_timeouts} ;;
    *--collect-only*) printf '%s\\n' {tests} "19 tests collected" ;;
esac
"""


def run_script(tmp_path, no_timeouts):
    """The calls of python3 that lease.sh makes, (TRITON_INTERPRET, arguments)."""
    quoted = " ".join(f"'{name}'" for name in TESTS)
    programs = {
        "python3": PYTHON.format(no_timeouts=no_timeouts, tests=quoted),
        "nvidia-smi": "#!/bin/bash\n",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    out = tmp_path / "out"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "OUT": str(out)}
    script = ROOT / "minatp" / "bench" / "lease.sh"
    subprocess.run(["bash", str(script)], env=environment, check=True, capture_output=True)
    return [line.split(" ", 1) for line in (out / "calls.txt").read_text().splitlines()]


@pytest.mark.parametrize("no_timeouts", [0, 1])
def test_the_script_of_a_lease_tests_with_eight_workers(tmp_path, no_timeouts):
    calls = run_script(tmp_path, no_timeouts)

    # each test once, and no plugin that may be missing
    workers = [argv for _, argv in calls if "-rfE" in argv]
    assert len(workers) == 8
    shares = [argv.partition("no:cacheprovider ")[2] for argv in workers]
    for name in TESTS:
        assert sum(share.count(name) for share in shares) == 1
    for argv in workers:
        assert ("--timeout 120" in argv) == (no_timeouts == 0)


def test_the_script_of_a_lease_asks_for_truth_before_times_and_for_the_peer_last(tmp_path):
    calls = run_script(tmp_path, no_timeouts=1)
    parts = []
    for _, argv in calls:
        if "minatp.bench.lease" in argv:
            parts.append(argv.split("llama-1b cuda ")[1].split(" ", 1)[1])
    assert parts == ["loss verify same memory", "sft", "rl", "profile"]
    _, last = calls[-1]
    assert last.startswith("-m minatp.bench --preset llama-1b --sides tuned")
    for name in ("SFT, last stage", "rollouts"):
        assert name in last

    # Triton compiles: its interpreter does not run with every NumPy
    assert {interpreted for interpreted, _ in calls} == {"0"}


def test_the_tests_of_a_lease_exist():
    text = (ROOT / "minatp" / "bench" / "lease.sh").read_text()
    for path in ("tests/kernels/test_graph.py", "tests/kernels/test_kernels.py"):
        assert path in text and (ROOT / path).exists()
