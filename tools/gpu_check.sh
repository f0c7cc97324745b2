#!/usr/bin/env bash
# On a machine with a GPU: build, test, measure, in under 10 minutes. Uses the environment's torch (2.11 or newer,
# with CUDA) as it is and changes nothing in it: PYTHON chooses the interpreter.
#     tools/gpu_check.sh [folder for the logs and results]
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu_check}
mkdir -p "$out"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MPLBACKEND=Agg
step() { echo "== $1 ($SECONDS s)"; }

capability=$($python -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')

step "build, for this GPU alone"
TORCH_CUDA_ARCH_LIST=$capability MLPEXT_CUDA=1 $python setup.py -q build_ext --inplace >"$out/build.log" 2>&1 ||
    { tail -n 40 "$out/build.log"; exit 1; }
$python -c 'import mlpext; assert mlpext._C.has_cuda()'

failed=0
step "tests"
timeout 300 $python -m pytest -q -m cuda --maxfail=20 -p no:cacheprovider -n "${WORKERS:-6}" tests/cuda \
    tests/ops/test_opinfo.py tests/training 2>&1 | tee "$out/test.log" | tail -n 30 || failed=1

step "benchmarks"
left=$((570 - SECONDS))
timeout "$left" $python benchmarks/gpu.py ${AUTOTUNE:+--autotune} 2>&1 | tee "$out/bench.log" || failed=1
cp benchmarks/results/cuda-* "$out" 2>/dev/null || true
step "done"
exit $failed
