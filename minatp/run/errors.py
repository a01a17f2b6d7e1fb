"""How a program ends: one line on stderr, and an exit code for every kind of failure.

      0                 all is well
      2   UserError     a mistake in the command line, a file or a folder
      3   NotFinite     a loss, gradient or reward is NaN or infinite
      4   OutOfMemory   something does not fit into memory
     74   NotWritten    a file could not be written
     75   Stopped       a training run was stopped on request and can be resumed
    130                 Ctrl-C anywhere else
    141                 the program that read our stdout has ended, as in `… | head`

74 and 75 are those of sysexits.h, 130 and 141 those of a shell. Any other exception is a bug: it
shows its traceback and exits with 1.
"""

import errno
import os
import shutil
import sys
from pathlib import Path

# Error numbers of a disk that is full, for everybody, for this user, or for one file
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# The shell's exit code for a process that a signal has ended is 128 + its number
INTERRUPTED = 128 + 2  # as if SIGINT had ended the process
BROKEN_PIPE = 128 + 13  # as if SIGPIPE had


class Ended(Exception):
    """The end of a program, `place: what happened and what to do`. code: the exit code."""

    code = 1


class UserError(Ended):
    """A mistake of the user, `path:line: what is wrong and what to do`. Exit code 2."""

    code = 2


class NotFinite(Ended):
    """A loss, gradient or reward is not finite. Exit code 3.

    No parameter has changed because of it.
    """

    code = 3


class OutOfMemory(Ended):
    """A computation does not fit into memory. Exit code 4."""

    code = 4


class NotWritten(Ended):
    """A file could not be written, usually because the disk is full. Exit code 74, EX_IOERR.

    The file or folder that it would have replaced is intact.
    full: whether the disk is full. why: the reason that the system gives.
    """

    code = 74

    def __init__(self, path, error, needed):
        """error: the exception that was caught. needed: bytes that were to be written."""
        # The system's reason; an error of safetensors has only its message
        self.why = getattr(error, "strerror", None) or error
        number = getattr(error, "errno", None)
        self.full = number is None or number in DISK_FULL  # safetensors' errors carry no number

        # The path itself may not exist yet: look for free space in the nearest folder that does
        existing_parent = next(p for p in Path(path).absolute().parents if p.exists())
        free = shutil.disk_usage(existing_parent).free
        remedy = "free disk space" if self.full else "fix this"
        super().__init__(
            f"{path}:0: cannot be written ({self.why}): {needed:,} bytes are needed and {free:,} "
            f"are free; everything saved before is intact; {remedy}, then start again (a training "
            "run: with --resume)"
        )


class Stopped(Ended):
    """A training run was stopped on request and has saved everything. Exit code 75, EX_TEMPFAIL.

    It can be started again with --resume, by a scheduler for example.
    """

    code = 75


def run_command(main):
    """Run main() as a program: exit with its code."""
    sys.exit(guarded(main))


def guarded(main, argv=None):
    """Run main(argv) -> the exit code of the process. A failure prints one line on stderr."""
    prepare_streams()
    try:
        return main(argv) or 0
    except Ended as e:
        print_error(e)
        return e.code
    except BrokenPipeError:
        # or Python would complain once more when it flushes stdout at exit
        silence_stdout()
        return BROKEN_PIPE
    except OSError as e:
        return end_after_os_error(e)
    except KeyboardInterrupt:
        return INTERRUPTED


def prepare_streams():
    """Make stdout and stderr accept any text, even if they are closed or not UTF-8."""
    # The shell's >&- closes a stream; Python then has None in its place
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")

    # A terminal that is not UTF-8 shows "?" for σ
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def end_after_os_error(e):
    """Report an OSError that no function has turned into an Ended. Returns the exit code."""
    # A file or folder that the user named, which may be too long a name or not be permitted
    if e.filename is not None:
        print_error(
            f"{e.filename}:0: cannot be used ({e.strerror}); check its name and its permissions"
        )
        return UserError.code

    # Without a file name it is stdout, if the disk that it goes to is full, or else a bug
    if e.errno not in DISK_FULL:
        raise e
    silence_stdout()
    print_error("stdout:0: cannot be written; free disk space where it goes, then start again")
    return NotWritten.code


def print_error(message):
    """Print a message on stderr, in one line whatever it holds."""
    sys.stderr.write(" ".join(str(message).split()) + "\n")


def silence_stdout():
    """Discard everything written to stdout from here on, because nobody can read it."""
    # On the descriptor, so that text which Python still buffers is discarded too
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
