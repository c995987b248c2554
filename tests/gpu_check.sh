#!/usr/bin/env bash
# On a machine with a Hopper GPU: builds the package and checks that it is right. Ends in a short table, and writes
# correct-DEVICE-DATE.json. Logs and results go to the folder given. At most 9 minutes.
#
#   tests/gpu_check.sh OUT [STEP...]     steps: build errors tests scale concurrency memcheck initcheck
#                                        synccheck racecheck mlp_memcheck mlp_synccheck
#                                        train train_moe step; all of them by default
#
# Steps are independent: one that fails is reported, the others still run. All but the profile of a step run side by
# side, which is itself a check: eight processes on one GPU, with about 60 GB of its memory.
set -uo pipefail
cd "$(dirname "$0")/.."
mkdir -p "${1:?usage: tests/gpu_check.sh OUT [STEP...]}"
out=$(realpath "$1")
shift
wanted=" ${*:-build errors tests scale concurrency memcheck initcheck synccheck racecheck mlp_memcheck mlp_synccheck train train_moe step} "
export PYTHONUNBUFFERED=1 XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=$PWD TF_CPP_MIN_LOG_LEVEL=2

trap 'trap - TERM INT; kill 0' TERM INT # a script that is stopped leaves nothing running

step() { # name, seconds allowed, command...
  local name=$1 limit=$2 start=$SECONDS code
  shift 2
  [[ $wanted == *" $name "* ]] || return 0
  timeout --foreground -k 5 "$limit" "$@" >"$out/$name.log" 2>&1
  code=$?
  echo "$name $code $((SECONDS - start))" >"$out/$name.status"
}

# Not from the network: what the build needs must be installed.
step build 240 python3 -m pip install -q --no-build-isolation --no-deps --no-index -e .

sanitizer() { # [mlp_]tool, seconds allowed, options...
  local name=$1 tool=${1#mlp_} limit=$2
  shift 2
  [[ $wanted == *" $name "* ]] || return 0
  # XLA's compiler sometimes crashes under a tool within seconds, which then prints no summary and
  # ends with 139 or 0; what the tool finds is 9. What ran out of time (124, 137) is not tried again.
  for _ in 1 2 3; do
    step "$name" "$limit" compute-sanitizer --tool "$tool" --error-exitcode 9 "$@"
    grep -qE " (9|124|137) " "$out/$name.status" || grep -q "SUMMARY: " "$out/$name.log" && break
  done
}
# Names of the option that limits the tool to our kernels differ between versions.
only=()
if [[ $wanted == *check* ]] && compute-sanitizer --help 2>&1 | grep -q -- --kernel-name; then
  only=(--kernel-name kns=gemm_ --kernel-name kns=quantize_ --kernel-name kns=activation_
    --kernel-name kns=gather_ --kernel-name kns=sum_rows)
elif [[ $wanted == *check* ]] && compute-sanitizer --help 2>&1 | grep -q -- --kernel-regex; then
  only=(--kernel-regex kns=gemm_ --kernel-regex kns=quantize_ --kernel-regex kns=activation_
    --kernel-regex kns=gather_ --kernel-regex kns=sum_rows)
fi
few=(python3 tests/gpu_sanitize.py --few)

train=(python3 examples/train_lm.py --size medium --learning-rate 1.5e-4 --evaluations 16)
train() { # the two models, one after the other
  step train 300 "${train[@]}" --steps "${DENSE_STEPS:-1500}" --out "$out/train"
  step train_moe 300 "${train[@]}" --moe --steps "${MOE_STEPS:-1000}" --out "$out/train_moe"
}

train &
step errors 120 python3 benchmarks/gpu_errors.py "$out/errors.json" --dump "$out/products.npz" &
step tests 330 python3 -m pytest -m gpu tests/test_gpu.py -n "${TEST_PROCESSES:-5}" --maxfail=40 --tb=short &
step scale 330 python3 -m pytest -m gpu tests/test_gpu_scale.py --tb=short --durations=5 &
step concurrency 330 python3 -m pytest -m gpu tests/test_gpu_concurrency.py --tb=short --durations=5 &
sanitizer memcheck 200 "${only[@]}" python3 tests/gpu_sanitize.py &
sanitizer synccheck 200 "${only[@]}" python3 tests/gpu_sanitize.py &
sanitizer racecheck 280 "${only[@]}" "${few[@]}" &
for tool in memcheck synccheck; do # XLA's compiler crashes under racecheck
  # Autotuning would time other kernels under the tool, and ended XLA's compiler there.
  XLA_FLAGS=--xla_gpu_autotune_level=0 sanitizer "mlp_$tool" 200 "${only[@]}" python3 tests/gpu_sanitize.py --operations &
done
sanitizer initcheck 280 "${few[@]}" & # every kernel: others write what ours read
wait

step step 100 python3 benchmarks/step_profile.py "$out/step.json"

python3 tests/gpu_report.py "$out"
