#!/usr/bin/env bash
# Run everything that needs a GPU: see run_gpu.py. The machine needs no network. What it lacks beside
# PyTorch and Triton comes from a folder `packages` (made elsewhere by `pip install --target packages
# jaxtyping tyro beartype ...`) or `wheels` (wheels of pure Python, which are only unpacked).
#
#   benchmarks/run_gpu.sh FOLDER [--part PART] [--minutes 8] [--jobs 8] [--stand-in]   until it says "left: nothing"
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v python3 || command -v python)
if [ -d wheels ] && [ ! -d packages ]; then
    mkdir packages
    for wheel in wheels/*.whl; do "$python" -m zipfile -e "$wheel" packages; done
fi
# At the end, so that packages of the machine come first.
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}:$PWD/packages"
exec "$python" -m benchmarks.run_gpu "$@"
