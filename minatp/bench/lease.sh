#!/bin/bash
# One call of at most 600 s on a rented GPU: bash minatp/bench/lease.sh
#
# The figures go to the folder $OUT, ./out/lease by default, and lease.tgz there holds all of them.
# It needs torch, triton, transformers and pytest. Triton keeps what it compiles in .tcache: bring
# that folder along to save the time.
cd "$(dirname "$0")/../.." || exit 2
export OUT=${OUT:-$PWD/out/lease}
export PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=$PWD/.tcache TORCH_CPP_LOG_LEVEL=ERROR

# Compiled kernels everywhere: Triton's interpreter is slow, and 3.6's fails with NumPy 2.5
export TRITON_INTERPRET=0
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
#    nothing is timed yet. Each takes every eighth test: no plugin of pytest is needed for that. Only
#    the limit of one test is pytest-timeout's; without it a test that hangs costs its worker's others
TESTS="tests/kernels/test_graph.py tests/kernels/test_kernels.py"
N_WORKER=8
TEST_LIMIT=
python3 -c 'import pytest_timeout' 2> /dev/null && TEST_LIMIT="--timeout 120"

run_tests() { # run_tests WORKER
    awk -v worker="$1" -v n="$N_WORKER" 'NR % n == worker' "$OUT/tests.txt" |
        xargs -d '\n' timeout 160 python3 -m pytest -q -rfE $TEST_LIMIT -p no:cacheprovider
    echo "worker $1: exit code $?"
}
run_all_tests() {
    python3 -m pytest -q --collect-only -p no:cacheprovider $TESTS | grep :: > "$OUT/tests.txt"
    for worker in $(seq 0 $((N_WORKER - 1))); do
        run_tests "$worker" > "$OUT/pytest_$worker.txt" 2>&1 &
    done
    wait
}
run_all_tests &
tests=$!
lease 120 truth loss verify same memory
wait $tests
tail -qn 12 "$OUT"/pytest_*.txt

# 2. How fast is it? The largest question first, and then where the time goes
lease 110 sft sft
lease 100 rl rl
lease 70 profile profile

# 3. The kernels one by one
timeout 60 python3 -m kernels.bench --rounds 10 --peers eager,SDPA --out "$OUT/kernels.md"
echo "kernels: exit code $?"

# 4. The tuned peer, in what time is left
used=$((SECONDS - start))
if [ $((580 - used)) -gt 60 ]; then
    timeout $((575 - used)) python3 -m minatp.bench --preset llama-1b --sides tuned \
        --works "SFT, last stage; rollouts" --rounds 3 --out "$OUT/peers.json"
    echo "peers: exit code $?"
fi

# All of it in one file, to be brought back
tar czf "$OUT/lease.tgz" --exclude=lease.tgz -C "$OUT" .
echo "$((SECONDS - start)) seconds in all; figures in $OUT/lease.tgz"
