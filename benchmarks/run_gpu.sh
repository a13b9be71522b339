#!/usr/bin/env bash
# Everything that needs a GPU, in one go of at most eight minutes: the kernels' tests on the device
# (with bitwise masks and CUDA graphs) and that of samples of unequal lengths; the kernels'
# benchmarks; as many of the others as fit into the rest, whose rows are saved as far as they come.
# For a machine with PyTorch for its GPU (2.11 + Triton 3.6 is enough), and nothing else: the few
# packages that are missing are installed.
#
#   benchmarks/run_gpu.sh [FOLDER]      results go into FOLDER (gpu-results)
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

# The interpreter and the compilers for other GPUs need no device: their place is a CPU.
timeout 190 python -m pytest tests/kernels tests/nn/test_ragged.py -q -p no:cacheprovider \
    --ignore=tests/kernels/test_interpreter.py --ignore=tests/kernels/test_static.py \
    2>&1 | tee "$folder/tests.txt"
tests=${PIPESTATUS[0]}

kernels="kernel or depthwise or blockwise or regressor"
measure() { # SECONDS NAME EXPRESSION
    timeout --signal=INT --kill-after=15 "$1" python -m pytest benchmarks -q -p no:cacheprovider \
        --seconds 0.1 --save -k "$3" 2>&1 | tee "$folder/$2.txt"
    return "${PIPESTATUS[0]}"
}
measure 150 benchmarks "$kernels"
benchmarks=$?
measure 80 more-benchmarks "not ($kernels)" || echo "the other benchmarks were cut off or failed"
cp benchmarks/results/*"$(date -u +%Y-%m-%d)"* "$folder" 2>/dev/null
echo "tests: exit code $tests, benchmarks: exit code $benchmarks; results in $folder"
[ "$tests" -eq 0 ] && [ "$benchmarks" -eq 0 ]
