#!/usr/bin/env bash
# Sets the environment up and runs the checks and tests that need no GPU.
#
#   bash tests/run.sh                 style, types, layers, and all tests but the slow ones
#   bash tests/run.sh --slow          the slow tests only; writes benchmarks/results/slow_set.txt
#   bash tests/run.sh --gpu           tests/gpu, on a machine with a GPU; everything else runs with its GPUs hidden
#   bash tests/run.sh PYTEST_ARGS     tests only, passed on to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash tools/setup_env.sh
bash tests/setup_slurm.sh
export PATH="$PWD/.venv/bin:$PATH"
# Ranks share two cores: threads of their own would fight, and spinning ones would starve each other.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false

if [ "${1:-}" = --gpu ]; then
    shift
    exec python -m pytest -m gpu tests/gpu "$@"
fi
# The other tests are about the CPU, which Megatron-Core cannot run on beside a live CUDA: platform=cpu refuses to.
export CUDA_VISIBLE_DEVICES=

if [ "${1:-}" = --slow ]; then
    shift
    python -m pytest -m "slow and not gpu" --durations=0 "$@" |
        tee >(grep -E ' (call|setup) +tests/|(passed|failed).* in ' >benchmarks/results/slow_set.txt)
    exit
fi
if [ $# -gt 0 ]; then exec python -m pytest "$@"; fi

ruff check .
ruff format --check .
codespell
lint-imports
pyright
# Half of the time one test waits for processes to start: two go side by side.
python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile --durations=25
