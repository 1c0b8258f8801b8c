#!/usr/bin/env bash
# Sets the environment up and runs the checks and tests that need no GPU.
#
#   bash tests/run.sh                 style, types, layers, and all tests but the slow ones
#   bash tests/run.sh --slow          the slow tests only; writes benchmarks/results/slow_set.txt
#   bash tests/run.sh --gpu-contract  what the GPU path asks of a GPU machine's packages, held against the real ones,
#                                     without a GPU and in an environment of its own
#   bash tests/run.sh --gpu           tests/gpu, on a machine with a GPU; everything else runs with its GPUs hidden
#   bash tests/run.sh PYTEST_ARGS     tests only, passed on to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# Ranks share two cores: threads of their own would fight, and spinning ones would starve each other.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false

# Of GPUs only tests/gpu may know: Megatron-Core cannot run on the CPU beside a live CUDA, and platform=cpu refuses to.
if [ "${1:-}" != --gpu ]; then export CUDA_VISIBLE_DEVICES=; fi

if [ "${1:-}" = --gpu-contract ]; then
    shift
    bash tools/setup_env.sh --gpu-contract
    # No package of another environment, and a stand-in for the driver's library, which vLLM's are linked against.
    export PYTHONPATH="$PWD" LD_LIBRARY_PATH="$PWD/.gpu-contract/stub"
    exec .gpu-contract/bin/python -m pytest -m gpu_contract -n 2 --dist loadfile --durations=10 tests/gpu_contract "$@"
fi

bash tools/setup_env.sh
bash tests/setup_slurm.sh
export PATH="$PWD/.venv/bin:$PATH"

if [ "${1:-}" = --gpu ]; then
    shift
    exec python -m pytest -m gpu tests/gpu "$@"
fi

if [ "${1:-}" = --slow ]; then
    shift
    python -m pytest -m "slow and not gpu and not gpu_contract" --durations=0 "$@" |
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
python -m pytest -m "not slow and not gpu and not gpu_contract" -n 2 --dist loadfile --durations=25
