"""`python -m minatp.ablate …`; see minatp/tools/ablate.py."""

from minatp.run.errors import run_command
from minatp.tools.ablate import main

if __name__ == "__main__":
    run_command(main)
