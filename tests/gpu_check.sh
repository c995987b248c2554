#!/usr/bin/env bash
# On a machine with a Hopper GPU: builds the package, runs the GPU tests, the training example and
# compute-sanitizer, and ends in a short table. Logs and results go to the folder given.
#
#   tests/gpu_check.sh OUT [WHEELS]     WHEELS: a folder of wheels, for a machine without a network
#
# Steps are independent: one that fails is reported, the others still run.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:?usage: tests/gpu_check.sh OUT [WHEELS]}")
pip="python3 -m pip install -q --no-warn-script-location"
[ $# -gt 1 ] && pip="$pip --no-index --find-links $(realpath "$2")"
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false
summary=()

step() { # name, seconds allowed, command...
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then result=ok; else result="FAILED ($?)"; fi
  summary+=("$(printf '%-14s %-14s %4d s   %s' "$name" "$result" $((SECONDS - start)) "$(tail -n 1 "$out/$name.log" | cut -c 1-100)")")
}

build() { $pip scikit-build-core nanobind pytest pytest-xdist hypothesis && $pip --no-build-isolation --no-deps -e .; }
export pip; export -f build
step build 240 bash -c build
step errors 60 python3 benchmarks/gpu_errors.py "$out/errors.json"
step tests 300 python3 -m pytest -m gpu tests/test_gpu.py -n 4 --maxfail=40 --tb=short
step sanitizer 120 compute-sanitizer --tool memcheck --error-exitcode 9 \
  python3 -m pytest -m gpu tests/test_gpu.py -k "test_gemm_accumulates or ragged_dot_trains"
step layers 150 python3 benchmarks/layer_bench.py "$out/layers.json"

nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
printf '%s\n' "${summary[@]}"
