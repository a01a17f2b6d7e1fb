"""Fixtures of the tests, and the folders that they import from."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported: no GPU is needed

sys.path.insert(0, str(Path(__file__).parent))  # runs.py, for the tests of all folders
sys.path.insert(0, str(Path(__file__).parents[1]))  # train.py and sample.py


@pytest.fixture
def poison(monkeypatch):
    """Fill memory that is not written with NaN, and split small inputs as if they were large."""
    import torch

    from kernels import attention

    monkeypatch.setattr(attention, "MIN_SPLIT_COLUMNS", 16)
    monkeypatch.setattr(attention, "MAX_TILE_QUERIES", 16)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills torch.empty
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run that has ended."""
    from runs import TINY, go

    out = tmp_path_factory.mktemp("finished") / "run"
    go(*TINY, "--out", out)
    return out


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """A function that asserts that a command line is refused: exit code 2, one line on stderr.

    It runs in tmp_path.
    """
    from minatp.run.errors import guarded

    monkeypatch.chdir(tmp_path)

    def check(main, argv, start, reason):
        capsys.readouterr()
        assert guarded(main, [str(a) for a in argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith(start), err
        assert reason in err, err
        assert err.count("\n") == 1, err

    return check
