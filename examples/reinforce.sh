#!/usr/bin/env bash
# What the examples of reinforcement learning share.
#
#   bash examples/reinforce.sh RECIPE MINI_RECIPE MINI_START [OVERRIDES]           on this machine's GPUs
#   bash examples/reinforce.sh RECIPE MINI_RECIPE MINI_START --mini [OVERRIDES]    in miniature, on two cores
set -euo pipefail
# shellcheck source=examples/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
recipe=$1 mini=$2 start=$3
shift 3
bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"
# Those that CUDA_VISIBLE_DEVICES leaves.
GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "${1:-}" = --mini ]; then
    shift
    RANKS=2
    if [ "$GPUS" = 1 ]; then RANKS=1; fi
    [ -d runs/quickstart/model ] || bash examples/quickstart.sh
    if [ "$start" = runs/quickstart/cold_start ]; then
        # A part of its steps: after all of them there is nothing left to learn (benchmarks/ptst.py). Goes on where it
        # was cut off, and does nothing when it is done.
        megatron-mm train mini/cold_start data.path=runs/quickstart/data init_from=runs/quickstart/stage3 \
            run_dir="$start" train.steps=105 optim.warmup_steps=5 --nproc "$RANKS"
    fi
    megatron-mm rl "$mini" data.path=runs/quickstart/data init_from="$start" run_dir="runs/$mini" "$@" --nproc "$RANKS"
else
    if [ "$GPUS" = 0 ]; then
        echo "torch sees no GPU here (megatron-mm doctor says why); --mini runs it in miniature, on two cores" >&2
        exit 2
    fi
    megatron-mm rl "$recipe" "$@" --nproc "$GPUS"
fi
