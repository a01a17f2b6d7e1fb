"""A run's folder: who owns it, and what is written into it as the run goes."""
import hashlib
import json
import os
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

import torch

from . import distributed
from .errors import NotWritten, UserError
from .options import write_config
from .saved import checkpoints, replace_file


@contextmanager
def claim_folder(cfg):
    """Inside, the folder of a run is there and no other process writes into it; one that was made here and stays empty is removed again. A dry
    run needs none. Raises UserError, in every process, where it cannot be had, or holds a run that is not to be gone on with."""
    folder, lock, made, wrong = Path(cfg.out), None, False, None
    try:
        if distributed.rank() == 0 and not cfg.dry_run:
            try:
                made = not os.path.exists(folder)
                lock = take(folder)
                if not cfg.resume and ((folder / "summary.json").exists() or checkpoints(folder)):
                    raise UserError(f"{folder}:0: holds a run already; add --resume to go on with it, or choose another --out")
            except UserError as e:
                wrong = e
        if wrong := distributed.broadcast(wrong):
            raise wrong
        yield
    finally:
        if made and lock is not None:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        if lock is not None:
            os.close(lock)


def take(folder):
    """Make a run's folder and take its lock: the descriptor that holds it, None where there are no locks. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY) if fcntl else None
    except OSError as e:
        raise UserError(f"{folder}:0: cannot be written ({e.strerror}); choose another --out")
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(f"{folder}:0: another process is writing into this folder; wait for it or end it, or choose another --out")
    except OSError:  # a file system without locks
        pass
    return lock


class Log:
    """config.json, metrics.jsonl (one record a line, flushed) and summary.json.

    Rank 0's alone writes. Its methods raise NotWritten where the disk is full."""
    def __init__(self, cfg, state):
        """state: the step and the seconds that a resumed run has behind it; records of later steps, lost with the crash, are
        removed. The folder is there (`own`). Raises UserError where it cannot be written, or a record cannot be read."""
        self.out, self.before, self.began = Path(cfg.out), state["seconds"], time.perf_counter()
        self.path = self.out / "metrics.jsonl"
        if distributed.rank():
            self.file, self.validated = None, distributed.broadcast(None)
            return
        try:
            self.sink = sink(cfg, self.out, state)
            self.path.open("a").close()
        except OSError as e:
            raise UserError(f"{self.out}:0: cannot be written ({e.strerror}); choose another --out")
        write_config(cfg, self.out / "config.json")
        old = [(line, r) for line, r in self.records() if r["step"] <= state["step"]]
        replace_file(self.path, "".join(line for line, _ in old))
        self.file = self.path.open("a")
        self.validated = distributed.broadcast(max((r["step"] for _, r in old if "validation" in r), default=0))  # the step of the last one

    def records(self):
        """(line, record) of metrics.jsonl; the last line may be half a line, where a crash cut it, and is left out then."""
        for i, line in enumerate(self.path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True), 1):
            if line.endswith("\n"):
                try:
                    record = json.loads(line)
                    record["step"] + 0
                except (ValueError, LookupError, TypeError, RecursionError):
                    raise UserError(f"{self.path}:{i}: is not a record with a step; remove that line")
                yield line, record

    def write(self, record):
        if self.file is None:
            return
        line = json.dumps(record) + "\n"
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as e:
            raise NotWritten(self.path, e, len(line))
        if self.sink:
            self.sink(scalars(record), record["step"])

    def seconds(self):
        """Of the run so far, the time before a resume included."""
        return self.before + time.perf_counter() - self.began

    def summary(self, cfg, tests, seconds, device, **more):
        """summary.json: the first test set's measurement at the top, all of them under "tests"."""
        record = {"stage": cfg.stage, "method": cfg.method, "seed": cfg.seed, **next(iter(tests.values())), "tests": tests,
                  "seconds": seconds, "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", **more}
        if self.file:
            replace_file(self.out / "summary.json", json.dumps(record, indent=2) + "\n")


def sink(cfg, out, state):
    """write(scalars, step) of --sink; None where there is none. Raises UserError where its package is not installed."""
    try:
        if cfg.sink == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(out / "tensorboard", purge_step=state["step"] + 1)

            def write(values, step):
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                writer.flush()
            return write
        if cfg.sink == "wandb":
            import wandb
            # a resumed run goes on under the id of its folder
            wandb.init(project="minatp", name=out.name, id=hashlib.sha1(str(out.resolve()).encode()).hexdigest()[:16], dir=out,
                       config=asdict(cfg), resume="allow")
            return lambda values, step: wandb.log(values, step=step)
    except ImportError as e:
        raise UserError(f"command line: --sink {cfg.sink} needs the package {cfg.sink} ({e}); pip install {cfg.sink}, or leave --sink away")


def scalars(record, prefix=""):
    """The numbers of a record, nested ones as "validation/accuracy", lists as "…/0"."""
    out = {}
    for name, value in record.items():
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            out |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            out[f"{prefix}{name}"] = value
    return out
