"""Run a program of minatp inside a test."""

from minatp.run.errors import guarded


def run(main, *argv, expect=0):
    """main(argv) as a process would run it; `expect` is its exit code."""
    assert guarded(main, [str(argument) for argument in argv]) == expect
