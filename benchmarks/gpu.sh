#!/bin/sh
# Everything that is measured on one GPU, in less than 8 minutes: core tests, agreement with the official code, steps of every
# method, the loader, sampling with decoding, and a training on the digits.
#
#     benchmarks/gpu.sh                          # on the GPU, writes benchmarks/results/gpu-<its name>.json and .md
#     benchmarks/gpu.sh --device cpu --small     # the same sections, small, on a CPU
#
# It needs PyTorch, NumPy, safetensors, pyarrow, scikit-learn and pytest with hypothesis and pytest-timeout; no Ray, MLflow or
# WebDataset, and no installation: the packages are taken from this checkout. PYTHON names another interpreter.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
root=$(dirname -- "$here")
cd "$root"
export PYTHONPATH="$root:$root/pipelines:$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" benchmarks/gpu_suite.py "$@"
