#!/usr/bin/env bash
# Run everything that needs a GPU, in at most eight minutes: the kernel tests on the device (bitwise
# masks and CUDA graphs included), the tests of ragged masks, the kernel benchmarks, and then as many
# of the other benchmarks as time allows. The machine needs PyTorch for its GPU (2.11 with Triton 3.6
# or later); other missing packages are installed.
#
#   benchmarks/run_gpu.sh [FOLDER]      results are written to FOLDER (default: gpu-results)
set -uo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu-results}
mkdir -p "$folder"
export PYTHONPATH="$PWD:$PWD/kernels"

python -c 'import einops, hypothesis, jaxtyping, pytest, PIL, safetensors, tqdm, tyro, yaml' \
    2>/dev/null || python -m pip install --quiet \
    einops hypothesis jaxtyping pytest pillow safetensors tqdm tyro pyyaml
python - <<'PYTHON' | tee "$folder/environment.txt"
import sys, torch, triton
assert torch.cuda.is_available(), "PyTorch sees no GPU here"
print("python", sys.version.split()[0], "torch", torch.__version__, "triton", triton.__version__)
print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory >> 30, "GiB")
PYTHON
[ "${PIPESTATUS[0]}" -eq 0 ] || exit 1

# Tests with the interpreter and ahead-of-time compilation need no GPU; they are left out here.
timeout 190 python -m pytest tests/kernels tests/nn/test_ragged.py -q -p no:cacheprovider \
    --continue-on-collection-errors --ignore=tests/kernels/test_static.py \
    -k "not in_the_interpreter and not static_figures" 2>&1 | tee "$folder/tests.txt"
tests=${PIPESTATUS[0]}

kernels="kernel or depthwise or blockwise or regressor"
measure() { # SECONDS NAME EXPRESSION
    timeout --signal=INT --kill-after=15 "$1" python -m pytest benchmarks -q -p no:cacheprovider \
        --seconds 0.1 --save -k "$3" 2>&1 | tee "$folder/$2.txt"
    return "${PIPESTATUS[0]}"
}
measure 150 benchmarks "$kernels"
benchmarks=$?
measure 80 more-benchmarks "not ($kernels)" || echo "the other benchmarks timed out or failed"
cp benchmarks/results/*"$(date -u +%Y-%m-%d)"* "$folder" 2>/dev/null
echo "tests: exit code $tests, benchmarks: exit code $benchmarks; results in $folder"
[ "$tests" -eq 0 ] && [ "$benchmarks" -eq 0 ]
