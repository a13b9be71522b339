#!/usr/bin/env bash
# Run everything that needs a GPU: see run_gpu.py, and README.md for the packages that it takes. The
# machine needs no network: packages come from a folder `packages` (made elsewhere by `pip install
# --target packages ...`) or from wheels in a folder `wheels`, which are only unpacked.
#
#   benchmarks/run_gpu.sh FOLDER [--part PART] [--minutes 8] [--jobs N] [--stand-in]   until it says "left: nothing"
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=$(command -v python3 || command -v python)
# At the end, so that packages of the machine come first.
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}:$root/packages:$root/wheels/unpacked"
exec "$python" -P -m benchmarks.run_gpu "$@"
