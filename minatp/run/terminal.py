"""The terminal: lines for the user, progress of long work, and the signals that end a run."""

import os
import signal
import sys
import time
from contextlib import suppress

from . import distributed
from .errors import Stopped, silence_stdout


class Stop:
    """SIGTERM and Ctrl-C. The first asks the training loop to stop after its step.

    For a second one the system's own handler is back, which ends the process at once, even inside a
    kernel.
    """

    # training: inside `with stop_request`, where a closed stdout does not end the run
    requested = training = False

    def __enter__(self):
        # Elsewhere the handlers that were there before apply: Ctrl-C ends a program at once
        self.requested, self.training = False, True
        self.handlers = {s: signal.signal(s, self.request) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        self.training = False
        for s, handler in self.handlers.items():
            signal.signal(s, handler)

    def request(self, *_):
        # Only take note. The loop looks at it after the step, when it can save
        self.requested = True
        for s in self.handlers:
            signal.signal(s, signal.SIG_DFL)
        with suppress(OSError):  # stdout may be closed
            os.write(1, b"stopping after this step; once more: at once\n")  # print is unsafe here

    def check(self, cfg, requested):
        """Call it where everything is saved. requested: whether any rank was asked to stop.

        Raises Stopped.
        """
        if requested:
            raise Stopped(
                f"{cfg.out}:0: stopped on request, everything is saved; continue with "
                f"--resume --out {cfg.out}"
            )


stop_request = Stop()  # one per process, as signals are


def print0(text):
    """Print one line, on rank 0 alone.

    If stdout is closed, training continues: its files hold everything.
    """
    if distributed.RANK == 0:
        try:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        except OSError:
            # with nothing to save, the program ends (errors.guarded)
            if not stop_request.training:
                raise
            silence_stdout()


def format_duration(seconds):
    """75.2 -> "1:15"; from an hour on "1:02:03"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def progress(what, n):
    """A function to call after each of n parts of long work: a terminal then shows what is left."""
    start, n_done = time.perf_counter(), 0

    def advance():
        nonlocal n_done
        n_done += 1
        if not sys.stderr.isatty():
            return

        # After the last part the line is cleared, for what the program prints next
        text = ""
        if n_done < n:
            per_part = (time.perf_counter() - start) / n_done
            left = format_duration(per_part * (n - n_done))
            text = f"{what}: {n_done} of {n} batches, {left} left"

        # Return to the start of the line, erase it, and write over it. It must not wrap
        with suppress(OSError):
            text = text[: os.get_terminal_size(sys.stderr.fileno()).columns - 1]
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()

    return advance
