"""`python -m minatp.probe …`; see minatp/tools/probe.py."""

from minatp.run.errors import run_command
from minatp.tools.probe import main

if __name__ == "__main__":
    run_command(main)
