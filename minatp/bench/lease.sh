#!/bin/bash
# One call of at most 600 s on a rented GPU: bash minatp/bench/lease.sh
#
# The figures go to the folder $OUT, ./out/lease by default. The tests need pytest-xdist and
# pytest-timeout. Triton keeps what it compiles in .tcache: bring that folder along to save the time.
cd "$(dirname "$0")/../.." || exit 2
export OUT=${OUT:-$PWD/out/lease}
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$PWD/.tcache TORCH_CPP_LOG_LEVEL=ERROR
mkdir -p "$OUT"
start=$SECONDS

# Run some parts of lease.py in a process of their own, so that a lost CUDA context loses no others
lease() { # lease SECONDS NAME PART …
    local limit=$1 name=$2
    shift 2
    timeout "$limit" python3 -m minatp.bench.lease llama-1b cuda "$OUT/$name" "$@"
    echo "$name: exit code $?"
}

# The machine
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.used --format=csv
python3 -c 'import torch, triton, transformers as t; print(torch.__version__, triton.__version__, t.__version__)'
command -v gcc

# 1. Is it right? Eight workers test and compile beside each other and beside `verify`, because
#    nothing is timed yet
run_tests() {
    TRITON_INTERPRET=0 timeout 170 python3 -m pytest -q -n 8 --timeout 120 -rfE \
        -p no:cacheprovider tests/kernels/test_graph.py tests/kernels/test_kernels.py
    echo "pytest: exit code $?"
}
run_tests > "$OUT/pytest.txt" 2>&1 &
tests=$!
lease 120 truth verify same memory
wait $tests
tail -25 "$OUT/pytest.txt"

# 2. How fast is it? The largest question first
lease 110 sft sft
lease 100 rl rl
lease 70 profile profile

# 3. The other sides, in what time is left
used=$((SECONDS - start))
if [ $((580 - used)) -gt 60 ]; then
    timeout $((575 - used)) python3 -m minatp.bench --preset llama-1b --sides tuned \
        --works "SFT, last stage; rollouts" --rounds 3 --out "$OUT/peers.json"
    echo "peers: exit code $?"
fi
echo "$((SECONDS - start)) seconds in all"
