"""`python -m minatp.evaluate RUN …`; see minatp/run/evaluate.py."""

from minatp.run.errors import run_command
from minatp.run.evaluate import main

if __name__ == "__main__":
    run_command(main)
