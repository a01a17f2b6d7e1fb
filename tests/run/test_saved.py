"""Folders that appear all at once: what a crash leaves, and systems that sync no folders."""

import errno
import os
import stat
from pathlib import Path

import pytest

from minatp.run import folder, options, saved
from minatp.run.errors import NotWritten, UserError
from minatp.run.folder import claim_folder
from minatp.run.saved import checkpoints, fault, restore_replaced, write_folder


def writes(text):
    """A function that fills a folder with one file of this text."""

    def write(folder):
        (folder / "file").write_text(text)

    return write


def save(path, text="old"):
    write_folder(path, writes(text), needed=3)


# ---- a crash between the two renames -------------------------------------------------------------


@pytest.mark.parametrize("name", ["final", "checkpoints/00000012"])
def test_a_crash_between_the_renames_loses_nothing(name, tmp_path, monkeypatch):
    path = tmp_path / name
    save(path)

    # Killed after the older folder has made room, before the new one takes its place
    rename = Path.rename

    def die_before_the_second(a, b):
        if b == path:
            raise KeyboardInterrupt
        return rename(a, b)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die_before_the_second)
        with pytest.raises(KeyboardInterrupt):
            save(path, "new")
    assert not path.exists()

    cfg = options.parse(["--out", str(tmp_path)], "")
    cfg.resume = True
    with claim_folder(cfg):
        assert (path / "file").read_text() == "old"
        assert fault(path) is None


def test_a_failure_between_the_renames_is_undone_at_once(tmp_path, monkeypatch):
    path = tmp_path / "final"
    save(path)
    rename = Path.rename

    def fail_for_the_new_one(a, b):
        if a.suffix == ".tmp":
            raise OSError(errno.EIO, "Input/output error")
        return rename(a, b)

    monkeypatch.setattr(Path, "rename", fail_for_the_new_one)
    with pytest.raises(NotWritten):
        save(path, "new")
    assert (path / "file").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_remains_of_a_removed_checkpoint_are_not_restored(tmp_path):
    save(tmp_path / "checkpoints" / "00000012")
    (tmp_path / "checkpoints" / "00000012").rename(tmp_path / "checkpoints" / "00000012.old")
    (tmp_path / "checkpoints" / "00000012.old" / "file").unlink()
    restore_replaced(tmp_path)
    assert checkpoints(tmp_path) == []


def test_an_older_folder_never_takes_the_place_of_a_new_one(tmp_path):
    save(tmp_path / "final.old", "old")
    save(tmp_path / "final", "new")
    restore_replaced(tmp_path)
    assert (tmp_path / "final" / "file").read_text() == "new"


# ---- systems that sync no folders ----------------------------------------------------------------


def test_folders_that_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows, which also syncs only what is open for writing."""
    real_open, real_fsync = os.open, os.fsync
    writable, synced = set(), []

    def open_like_windows(path, flags, *rest, **more):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        fd = real_open(path, flags, *rest, **more)
        writable.discard(fd)
        if flags & (os.O_RDWR | os.O_WRONLY):
            writable.add(fd)
        return fd

    def fsync_like_windows(fd):
        if fd not in writable:
            raise OSError(errno.EBADF, "Bad file descriptor")
        synced.append(fd)
        real_fsync(fd)

    monkeypatch.setattr(saved.os, "open", open_like_windows)
    monkeypatch.setattr(saved.os, "fsync", fsync_like_windows)
    save(tmp_path / "final")
    save(tmp_path / "final", "new")
    assert (tmp_path / "final" / "file").read_text() == "new"
    assert len(synced) == 4  # the file and its manifest, twice


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_folders_that_cannot_be_synced(number, tmp_path, monkeypatch):
    fail_for_folders(monkeypatch, number)
    save(tmp_path / "final")
    assert fault(tmp_path / "final") is None


def test_a_disk_that_fails_to_sync_a_folder_is_an_error(tmp_path, monkeypatch):
    fail_for_folders(monkeypatch, errno.EIO)
    with pytest.raises(NotWritten):
        save(tmp_path / "final")


def fail_for_folders(monkeypatch, number):
    """Make fsync fail for folders, with an error number."""
    fsync = os.fsync

    def fail(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(fd)

    monkeypatch.setattr(saved.os, "fsync", fail)


# ---- folders that were made for nothing ----------------------------------------------------------


@pytest.mark.parametrize("made_by_user", [False, True])
def test_a_folder_that_cannot_be_locked_is_removed_if_it_was_made_here(
    made_by_user, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    if made_by_user:
        out.mkdir()

    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(folder.os, "open", fail)
    with pytest.raises(UserError, match="Too many open files"):
        with claim_folder(options.parse(["--out", str(out)], "")):
            pass
    assert out.exists() == made_by_user


def test_without_locks_an_empty_folder_is_removed_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "fcntl", None)
    with claim_folder(options.parse(["--out", str(tmp_path / "out")], "")):
        assert (tmp_path / "out").is_dir()
    assert not (tmp_path / "out").exists()
