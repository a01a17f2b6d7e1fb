"""Compile every kernel without a GPU, and print what it needs.

    python -m kernels.compile_report [--sm 80,90,100] [--batches 20] [--out FILE]

What is compiled is what minatp launches at the size of llama-1b. Nothing here imports minatp, so
this starts the command that knows: minatp/bench/compile_report.py.
"""

import subprocess
import sys


def main(argv):
    return subprocess.call([sys.executable, "-m", "minatp.bench.compile_report", *argv])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
