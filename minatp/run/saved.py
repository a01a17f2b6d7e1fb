"""Files and folders that are written completely or not at all, and where a run keeps its models.

A crash, a power cut or a full disk leaves the old file or the new one, never half of one:

    1. write everything under a temporary name
    2. fsync it, so that the disk holds it
    3. rename it, which the file system does in one step

A folder that replaces another takes two renames, with the older one under NAME.old in between. If a
crash comes just there, `restore_replaced` puts it back when the run is started again.

What a checkpoint holds is in checkpoint.py, what a saved model holds in huggingface.py.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import NotWritten, UserError

CHECKPOINT = "[0-9]" * 8  # the names of checkpoints, as a pattern: steps, in eight digits

# Error numbers of a file system that syncs no folders
NO_FSYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM)

# ---- files and folders, all or nothing -----------------------------------------------------------


def replace_file(path, text):
    """Write a text file. If that fails, the old one is intact. Raises NotWritten.

    If `path` is a link, the file that it points to is replaced.
    """
    target = os.path.realpath(path)
    tmp = Path(target + ".tmp")
    try:
        # Nothing can be renamed onto a pipe or /dev/stdout
        if os.path.exists(path) and not os.path.isfile(path):
            Path(path).write_text(text, encoding="utf-8")
            return

        # Write, fsync and rename, as at the head of this file
        with tmp.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(target)
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise NotWritten(path, e, len(text.encode())) from e


def write_folder(path, write, needed):
    """Make the folder `path`, which may replace an older one, in one step.

    write: a function that is given a temporary folder to fill.
    needed: the bytes that it writes, for the message if it fails.

    A manifest.json with the SHA-256 of every file is added, so that `fault` can later tell whether
    the folder is intact. Raises NotWritten; the older folder is then still there.
    """
    path = Path(path)
    tmp = path.with_name(path.name + ".tmp")
    old = path.with_name(path.name + ".old")
    try:
        # Fill the temporary folder, and wait until the disk holds it
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        write(tmp)
        write_manifest(tmp)
        for file in [*tmp.rglob("*"), tmp]:
            fsync(file)

        # Put it in the place of the older folder
        shutil.rmtree(old, ignore_errors=True)
        # a folder cannot be renamed onto one that is not empty
        if path.exists():
            path.rename(old)
        tmp.rename(path)

        # The new names must survive a power cut too
        fsync(path.parent)
        fsync(path.parent.parent)
    except (OSError, SafetensorError) as e:
        # safetensors reports a failed write in an exception of its own
        shutil.rmtree(tmp, ignore_errors=True)
        restore(path)
        raise NotWritten(path, e, needed) from e
    shutil.rmtree(old, ignore_errors=True)


def restore_replaced(out):
    """Give the folders of a run their names back that a crash has left as NAME.old.

    No other process may be writing into the run's folder.
    """
    out = Path(out)
    for old in [*out.glob("final.old"), *out.glob(f"checkpoints/{CHECKPOINT}.old")]:
        restore(old.with_suffix(""))


def restore(path):
    """Rename the folder NAME.old to `path`, NAME, if there is nothing and the old one is whole."""
    # A checkpoint that is to be removed is called NAME.old too. It may be half gone
    old = path.with_name(path.name + ".old")
    if old.is_dir() and not path.exists() and not fault(old):
        with suppress(OSError):  # it stays what it was
            old.rename(path)


def write_manifest(folder):
    """Write manifest.json: {"sha256": {file: hash}} of all files in the folder."""
    # List the files before manifest.json is one of them
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    hashes = {file.relative_to(folder).as_posix(): sha256(file) for file in files}
    (folder / "manifest.json").write_text(json.dumps({"sha256": hashes}, indent=2) + "\n")


def fault(folder):
    """Say what is wrong with a folder that write_folder has made; None if it is intact."""
    # The manifest itself may be damaged: whatever it holds is a fault to report, not an error
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        changed = [name for name, h in manifest["sha256"].items() if sha256(folder / name) != h]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        return f"its manifest or one of its files cannot be read: {e}"
    if changed:
        return f"{changed[0]} has changed since it was written"
    return None


def fsync(path):
    """Wait until the disk holds a file, or the names in a folder.

    Where folders cannot be opened or synced (Windows, some network disks) nothing is done for them.
    """
    # Windows syncs no file that is open for reading alone
    is_folder = path.is_dir()
    try:
        fd = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(fd)
    except OSError as e:
        if not is_folder or e.errno not in NO_FSYNC:
            raise
    finally:
        os.close(fd)


def sha256(path):
    """The SHA-256 of a file, read in pieces of 1 MiB."""
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


# ---- where a run keeps its models ----------------------------------------------------------------


def checkpoints(out):
    """The folders of a run's checkpoints, oldest first."""
    return sorted((Path(out) / "checkpoints").glob(CHECKPOINT))


def newest_checkpoint(out):
    """The folder of a run's newest intact checkpoint. Raises UserError if there is none.

    Prints a warning on stderr for each broken one.
    """
    folders = checkpoints(out)
    if not folders:
        raise UserError(
            f"{out}/checkpoints:0: holds no checkpoint to resume from; start without --resume"
        )

    # A broken one costs only the steps since the one before it
    for folder in reversed(folders):
        damage = fault(folder)
        if not damage:
            return folder
        sys.stderr.write(f"warning: {folder}: is broken ({damage}); trying the one before it\n")
    raise UserError(f"{out}/checkpoints:0: no checkpoint is intact; start again in another --out")


def locate(directory):
    """The directory of the model: a run's final/, else its newest checkpoint.

    A directory that is not a run's is returned unchanged. Raises UserError.
    """
    directory = Path(directory)

    # A run that has ended, or one that has saved a checkpoint
    if (directory / "final").is_dir():
        return directory / "final"
    if checkpoints(directory):
        return newest_checkpoint(directory)

    # Otherwise a Hugging Face directory, or a mistake
    if not directory.is_dir():
        raise UserError(
            f"{directory}:0: is not a directory; give a Hugging Face directory, or the folder of a "
            "run (--stage sft makes one)"
        )
    if (directory / "metrics.jsonl").exists():
        raise UserError(
            f"{directory}:0: is a run that has saved nothing yet; wait for its first checkpoint, "
            "or start it again"
        )
    return directory
