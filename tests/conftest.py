import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read at import of triton: test_kernels.py runs the kernels without a GPU
sys.path.insert(0, str(Path(__file__).parents[1]))  # train.py and sample.py stand at the top
