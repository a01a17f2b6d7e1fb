"""`python -m minatp.plot …`; see minatp/tools/plot.py."""

from minatp.run.errors import run_command
from minatp.tools.plot import main

if __name__ == "__main__":
    run_command(main)
