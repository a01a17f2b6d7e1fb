"""A run's folder: which process owns it, and what is recorded in it during training.

    config.json      the options (options.py)
    metrics.jsonl    a record a line: averages of the training steps, and validations
    summary.json     the tests, at the end

saved.py and checkpoint.py write the models beside them.
"""

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
from .options import of_run, write_config
from .saved import checkpoints, replace_file, restore_replaced

# ---- who owns it ---------------------------------------------------------------------------------


@contextmanager
def claim_folder(cfg):
    """Inside, the run's folder exists and no other process writes into it. A dry run needs none.

    A folder that is made here and stays empty is removed at the end. Raises UserError, on every
    rank, if the folder cannot be used or holds another run.
    """
    folder = Path(cfg.out)
    lock, was_made, refusal = None, False, None
    try:
        # Rank 0 alone takes the folder. Its refusal is kept, to be raised on every rank
        if distributed.RANK == 0 and not cfg.dry_run:
            try:
                lock, was_made = lock_folder(folder)
                restore_replaced(folder)
                check_unused(cfg, folder)
            except UserError as e:
                refusal = e

        # What rank 0 refuses, all ranks refuse, or they would wait for it
        refusal = distributed.broadcast(refusal)
        if refusal:
            raise refusal
        yield
    finally:
        # Remove an empty folder while it is still locked, so that no other run can be using it
        if was_made:
            remove_if_empty(folder)
        if lock is not None:
            os.close(lock)


def lock_folder(folder):
    """Make a folder and lock it. Raises UserError.

    Returns (the descriptor that holds the lock, whether the folder is new). The system releases the
    lock when the process ends, however it ends. Windows has no such locks; there it is None.
    """
    lock = None
    is_new = not os.path.exists(folder)  # Path.exists raises for too long a name

    # The folder itself is locked, so no lock file is ever left behind
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if fcntl:
            lock = os.open(folder, os.O_RDONLY)
    except OSError as e:
        if is_new:
            remove_if_empty(folder)
        raise not_writable(folder, e) from None

    # Do not wait for the lock: its owner may train for days
    if fcntl:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise UserError(
                f"{folder}:0: another process is writing into this folder; wait for it, end it, or "
                "choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
    return lock, is_new


def remove_if_empty(folder):
    with suppress(OSError):  # it is not empty, or is not there
        folder.rmdir()


def check_unused(cfg, folder):
    """Raise UserError if a new run would overwrite an earlier one, or what is not a run's."""
    if cfg.resume:
        return

    # A run replaces its final/ as a whole, and takes what is in its checkpoints/ for its own
    place = folder.resolve()
    reserved = [parent for parent in (place, *place.parents) if parent.name == "final"]
    reserved += [place] if place.name == "checkpoints" else []
    for parent in reserved:
        if (parent.parent / "metrics.jsonl").exists():
            raise UserError(f"{folder}:0: lies in the run {parent.parent}; choose another --out")

    # A log alone does not count: that run ended before its first checkpoint
    if (folder / "summary.json").exists() or checkpoints(folder):
        raise UserError(
            f"{folder}:0: already holds a run; add --resume to continue it, or choose another --out"
        )

    # What else a run would replace. (It makes an empty log before its config.json)
    config, log = folder / "config.json", folder / "metrics.jsonl"
    foreign = None
    if (folder / "final").exists():
        foreign = "a model in final/"
    elif config.exists():
        try:
            of_run(config)
        except UserError:
            foreign = "a config.json that is not a run's"
    elif log.exists() and log.stat().st_size:
        foreign = "a metrics.jsonl without the config.json of its run"
    if foreign:
        raise UserError(f"{folder}:0: already holds {foreign}; choose another --out")


def not_writable(folder, e):
    """The UserError for an OSError."""
    return UserError(f"{folder}:0: cannot be written ({e.strerror}); choose another --out")


# ---- what is written into it ---------------------------------------------------------------------


class Log:
    """config.json, metrics.jsonl (flushed after every record) and summary.json.

    Only rank 0 writes. Methods raise NotWritten if the disk is full.
    """

    def __init__(self, cfg, state):
        """state: the "step" and "seconds" of the checkpoint that the run resumes from, or zeros.

        Records of later steps are removed: they will be computed again. The folder has to exist
        (`claim_folder`). Raises UserError if it cannot be written, or a record cannot be read.
        """
        # Where it writes, and the clock
        self.out = Path(cfg.out)
        self.path = self.out / "metrics.jsonl"
        self.seconds_before = state["seconds"]
        self.start = time.perf_counter()

        # What `open` sets, on rank 0
        self.file = None  # metrics.jsonl, open for writing; None on other ranks
        self.folder = None  # os.stat of the folder
        self.send = None  # of --sink
        self.validated = 0  # the step of the last validation

        # Every rank must know which validations are done, or some would wait for others
        if distributed.RANK == 0:
            self.open(cfg, state)
        self.validated = distributed.broadcast(self.validated)

    def open(self, cfg, state):
        """Write config.json, and open metrics.jsonl without the records of later steps."""
        # Find out whether the folder can be written, and create metrics.jsonl if it is missing
        try:
            self.send = open_sink(cfg, self.out, state)
            self.path.open("a").close()
        except OSError as e:
            raise not_writable(self.out, e) from None
        write_config(cfg, self.out / "config.json")

        # A resumed run takes the steps after its checkpoint again, and records them again
        kept = []
        for line, record in self.records():
            if record["step"] <= state["step"]:
                kept.append(line)
                if "validation" in record:
                    self.validated = max(self.validated, record["step"])
        replace_file(self.path, "".join(kept))
        self.file = self.path.open("a")
        self.folder = os.stat(self.out)

    def records(self):
        """Yield (line, record) of metrics.jsonl, without a line that a crash has cut short.

        Raises UserError if a line is not a record.
        """
        text = self.path.read_text(encoding="utf-8", errors="replace")
        for i, line in enumerate(text.splitlines(keepends=True), 1):
            # cut short by a kill: what it recorded will be computed again
            if not line.endswith("\n"):
                continue
            try:
                record = json.loads(line)
                record["step"] + 0  # must be a number
            except (ValueError, LookupError, TypeError, RecursionError):
                raise UserError(
                    f"{self.path}:{i}: is not a record with a step; remove that line"
                ) from None
            yield line, record

    def write(self, record):
        """Add a record to metrics.jsonl, and send its numbers to --sink."""
        if self.file is None:
            return
        line = json.dumps(record) + "\n"

        # Flush, so that a run that is killed loses no record but the one being written
        try:
            self.file.write(line)
            self.file.flush()
        except OSError as e:
            raise NotWritten(self.path, e, len(line)) from e
        if self.send:
            self.send(scalars(record), record["step"])

    def check_in_place(self):
        """Raise UserError if the folder was moved or removed: another may have its name.

        As NotWritten, on rank 0 alone; torchrun then ends the others.
        """
        if self.file is None:
            return
        with suppress(OSError):
            if os.path.samestat(self.folder, os.stat(self.out)):
                return
        raise UserError(
            f"{self.out}:0: has been moved or removed while the run was writing into it; continue "
            "with --resume and --out, the folder where it is now"
        )

    def close(self):
        """Close metrics.jsonl, at the end of the run."""
        if self.file is not None:
            self.file.close()
            self.file = None

    def seconds(self):
        """Seconds of the run so far, including those before it was resumed."""
        return self.seconds_before + time.perf_counter() - self.start

    def summary(self, cfg, tests, seconds, device, **more):
        """Write summary.json: the options that matter, the tests, the time and the device.

        tests: {name: measurement}. The first also stands at the top level of the file.
        """
        if self.file is None:
            return

        # Seconds mean little without the device that they were measured on
        device_name = "cpu"
        if device.type == "cuda":
            device_name = torch.cuda.get_device_name(device)
        first_test = next(iter(tests.values()))
        record = {
            "stage": cfg.stage,
            "method": cfg.method,
            "seed": cfg.seed,
            **first_test,
            "tests": tests,
            "seconds": seconds,
            "device": device_name,
            "dtype": cfg.dtype,
            **more,
        }
        replace_file(self.out / "summary.json", json.dumps(record, indent=2) + "\n")


# ---- sink ----------------------------------------------------------------------------------------


def open_sink(cfg, out, state):
    """The function send(scalars, step) of --sink; None without --sink.

    state: that of the checkpoint that the run resumes from.
    Raises UserError if the package is not installed.
    """
    # Imported only on request: neither package is among the requirements
    try:
        if cfg.sink == "tensorboard":
            return tensorboard_sink(out, state["step"])
        if cfg.sink == "wandb":
            return wandb_sink(cfg, out)
    except ImportError as e:
        raise UserError(
            f"command line: --sink {cfg.sink} needs the package {cfg.sink} ({e}); pip install "
            f"{cfg.sink}, or drop --sink"
        ) from None
    return None


def tensorboard_sink(out, step):
    """send(scalars, step) to TensorBoard. What it has from steps after `step` is removed."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(out / "tensorboard", purge_step=step + 1)

    def send(values, step):
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return send


def wandb_sink(cfg, out):
    """send(scalars, step) to Weights & Biases."""
    import wandb

    # The id follows from the folder, so a resumed run continues its own curves
    run_id = hashlib.sha1(str(out.resolve()).encode()).hexdigest()[:16]
    wandb.init(
        project="minatp", name=out.name, id=run_id, dir=out, config=asdict(cfg), resume="allow"
    )

    # Curves are over our step. wandb's own only grows: after a resume it would drop a record of the
    # step at which the run was stopped
    wandb.define_metric("step")
    wandb.define_metric("*", step_metric="step")

    def send(values, step):
        wandb.log({**values, "step": step})

    return send


def scalars(record, prefix=""):
    """The numbers of a record, {name: number}. Nested names are joined: "validation/accuracy"."""
    out = {}
    for name, value in record.items():
        # an interval [low, high] becomes "accuracy_ci95/0" and "accuracy_ci95/1"
        if isinstance(value, list):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            out |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            out[f"{prefix}{name}"] = value
    return out
