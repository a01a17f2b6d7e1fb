"""How a program ends: one line on stderr and an exit code for every kind of failure."""
import errno
import os
import shutil
import sys
from pathlib import Path


class Ended(Exception):
    """The end of a program, told in one line on stderr, `place: what happened and what to do`. code: its exit code."""
    code = 1


class UserError(Ended):
    """A mistake of the user, `path:line: what is wrong and what to do`."""
    code = 2


class NotFinite(Ended):
    """A loss, gradient or reward that is not finite; the parameters are as they were before it."""
    code = 3


class OutOfMemory(Ended):
    """What was computed does not fit into memory."""
    code = 4


FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG


class NotWritten(Ended):
    """A file could not be written, most often because the disk is full; what it was to replace is intact. EX_IOERR of sysexits.h."""
    code = 74

    def __init__(self, path, error, needed):
        """error: the exception; needed: bytes that were to be written."""
        there = Path(path).absolute()
        free = shutil.disk_usage(next(p for p in there.parents if p.exists())).free
        self.why, code = getattr(error, "strerror", None) or error, getattr(error, "errno", None)
        self.full = code in (None, *FULL)  # safetensors gives no number
        super().__init__(f"{path}:0: cannot be written ({self.why}): {needed:,} bytes are needed and {free:,} are free; what is already saved "
                         f"is intact: {'make room' if self.full else 'mend that'}, then start again (a run: with --resume)")


class Stopped(Ended):
    """A run that was asked to stop and has saved everything. EX_TEMPFAIL of sysexits.h: start it again, with --resume."""
    code = 75


def silence_stdout():
    """What is told from here on goes nowhere: nobody can read it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def guarded(main, argv=None):
    """main(argv) as a process should end: its exit code, and one line on stderr for an Ended. 130 for Ctrl-C where nothing is lost."""
    sys.stdout, sys.stderr = (s or open(os.devnull, "w") for s in (sys.stdout, sys.stderr))  # None: closed by >&-
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?" for σ
    try:
        return main(argv) or 0
    except Ended as e:
        sys.stderr.write(" ".join(str(e).split()) + "\n")
        return e.code
    except BrokenPipeError:  # … | head
        silence_stdout()
        return 128 + 13  # as if SIGPIPE had ended it
    except OSError as e:  # no permission, or a name too long, where nobody asked first
        if e.filename is None and e.errno in FULL:
            silence_stdout()
            sys.stderr.write("stdout:0: cannot be written; make room where it goes, and start again\n")
            return NotWritten.code
        if e.filename is None:
            raise
        name = " ".join(str(e.filename).split())
        sys.stderr.write(f"{name}:0: cannot be used ({e.strerror}); look at its name and its permissions\n")
        return UserError.code
    except KeyboardInterrupt:
        return 130


def run_command(main):
    """main() as a program: exits with its code."""
    sys.exit(guarded(main))
