"""Output that cannot be written: signs that a terminal lacks, a closed pipe, a full disk."""

import errno
import io
from types import SimpleNamespace

import pytest

from minatp.run import errors, saved, terminal
from minatp.run.errors import NotWritten, guarded
from minatp.run.terminal import print0, stop_request
from minatp.tools import page


def test_a_terminal_that_cannot_show_a_sign_shows_another(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr("sys.stdout", stdout)
    assert guarded(lambda argv: print("σ 1")) == 0
    assert stdout.buffer.getvalue() == b"? 1\n"


@pytest.mark.parametrize(
    "error, code", [(BrokenPipeError(), 141), (OSError(errno.ENOSPC, "full"), 74)]
)
def test_only_training_goes_on_if_stdout_is_closed(error, code, monkeypatch, capsys):
    """Its files hold everything; any other program ends."""
    n_silenced = 0

    def fail(text):
        raise error

    def count_silenced():
        nonlocal n_silenced
        n_silenced += 1

    monkeypatch.setattr("sys.stdout", SimpleNamespace(write=fail))
    for module in (errors, terminal):
        monkeypatch.setattr(module, "silence_stdout", count_silenced)

    with stop_request:  # as in a training run
        print0("a line")
    assert n_silenced == 1

    assert guarded(lambda argv: print0("a line")) == code
    assert n_silenced == 2
    n_line = capsys.readouterr().err.count("\n")
    assert n_line == (1 if code == 74 else 0)


def test_a_page_that_the_disk_has_no_room_for_leaves_the_old_one(tmp_path, monkeypatch):
    def disk_is_full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "p.html").write_text("old")
    monkeypatch.setattr(saved.os, "fsync", disk_is_full)
    with pytest.raises(NotWritten):
        page.write(tmp_path / "p.html", [], [])
    assert (tmp_path / "p.html").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_page_that_is_a_link_stays_a_link(tmp_path):
    (tmp_path / "p.html").write_text("old")
    (tmp_path / "link").symlink_to("p.html")
    page.write(tmp_path / "link", [], [])
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "p.html").read_text() != "old"
