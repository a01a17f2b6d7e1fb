import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read at import of triton: the kernels' tests need no GPU
sys.path.insert(0, str(Path(__file__).parents[1]))  # train.py and sample.py stand at the top


@pytest.fixture
def poison(monkeypatch):
    """Memory that is not written holds NaN; few columns and queries make several splits and turns."""
    import torch

    from kernels import attention
    monkeypatch.setattr(attention, "COLUMNS", 16)
    monkeypatch.setattr(attention, "QUERIES", 16)
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills torch.empty
    assert torch.empty(3).isnan().all()
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a run."""
    from runs import TINY, go
    out = tmp_path_factory.mktemp("finished") / "run"
    go(*TINY, "--out", out)
    return out


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """refused(main, argv, start, reason): what stderr must hold."""
    from minatp import config
    monkeypatch.chdir(tmp_path)

    def check(main, argv, start, reason):
        capsys.readouterr()
        assert guarded(main, [str(a) for a in argv]) == 2
        err = capsys.readouterr().err
        assert err.startswith(start) and reason in err and err.count("\n") == 1, err

    return check
