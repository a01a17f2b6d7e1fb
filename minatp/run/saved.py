"""Files and folders that are written whole or not at all, and where a run keeps its models."""
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from safetensors import SafetensorError

from .errors import NotWritten, UserError


def replace_file(path, text):
    """Write a whole file or nothing: a crash leaves the old one or the new one. A link stays a link. Raises NotWritten."""
    tmp = Path(os.path.realpath(path) + ".tmp")
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe, /dev/stdout
            Path(path).write_text(text, encoding="utf-8")
            return
        with tmp.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        tmp.replace(os.path.realpath(path))
    except OSError as e:
        tmp.unlink(missing_ok=True)
        raise NotWritten(path, e, len(text.encode()))


def write_folder(path, write, needed):
    """Make the folder `path` all at once: write(tmp) fills a temporary one, which gets manifest.json (the SHA-256 of every file), is
    fsynced and renamed. An older folder of that name is replaced only then.

    Raises NotWritten where that fails, which tells the `needed` bytes; what was there before is still there.
    """
    path = Path(path)
    tmp, old = path.with_name(path.name + ".tmp"), path.with_name(path.name + ".old")
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        tmp.mkdir(parents=True)
        write(tmp)
        hashes = {str(file.relative_to(tmp)): sha256(file) for file in sorted(tmp.rglob("*")) if file.is_file()}
        (tmp / "manifest.json").write_text(json.dumps({"sha256": hashes}, indent=2) + "\n")
        for file in [*tmp.rglob("*"), tmp]:
            fsync(file)
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        tmp.rename(path)
        for parent in (path.parent, path.parent.parent):  # the names, too, must outlive a power cut
            fsync(parent)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(tmp, ignore_errors=True)
        raise NotWritten(path, e, needed)
    shutil.rmtree(old, ignore_errors=True)


def fsync(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def sha256(path):
    h = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def fault(folder):
    """What is wrong with a folder that write_folder made, in words; None where it is whole."""
    try:
        hashes = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["sha256"]
        changed = [name for name, h in hashes.items() if sha256(folder / name) != h]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        return f"its manifest or a file of it cannot be read: {e}"
    return f"{changed[0]} is not what was written" if changed else None


def checkpoints(out):
    """Folders of a run's checkpoints, oldest first."""
    return sorted((Path(out) / "checkpoints").glob("[0-9]" * 8))


def newest_checkpoint(out):
    """Folder of a run's newest whole checkpoint; of each broken one there is a warning on stderr. Raises UserError where none is."""
    found = checkpoints(out)
    for folder in reversed(found):
        wrong = fault(folder)
        if not wrong:
            return folder
        sys.stderr.write(f"warning: {folder}: is broken ({wrong}); the one before it is used\n")
    if found:
        raise UserError(f"{out}/checkpoints:0: no checkpoint is whole; start anew in another --out")
    raise UserError(f"{out}/checkpoints:0: holds no checkpoint to resume from; start without --resume")


def locate(directory):
    """Where the model of a directory lies: in a run's folder its final/, or its newest checkpoint. Raises UserError."""
    directory = Path(directory)
    if (directory / "final").is_dir():
        return directory / "final"
    if checkpoints(directory):
        return newest_checkpoint(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}:0: is not a directory; give a Hugging Face directory or the folder of a run, which --stage sft makes")
    if (directory / "metrics.jsonl").exists():
        raise UserError(f"{directory}:0: is a run that has saved nothing yet; wait for its first checkpoint, or start it again")
    return directory
