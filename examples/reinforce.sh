# What the examples of reinforcement learning share: on this machine's GPUs, or in miniature on two cores.
#
#   source examples/reinforce.sh
#   reinforce RECIPE MINI_RECIPE MINI_START "$@"      "$@": overrides, and first of all --mini
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

reinforce() {
    local recipe=$1 mini=$2 start=$3
    shift 3
    bash tools/setup_env.sh
    export PATH="$PWD/.venv/bin:$PATH"
    if [ "${1:-}" = --mini ]; then
        shift
        [ -d "$start" ] || bash examples/quickstart.sh
        [ -d "$start" ] || megatron-mm train "mini/$(basename "$start")" data.path=runs/quickstart/data \
            init_from=runs/quickstart/stage3 run_dir="$start" --nproc 2
        megatron-mm rl "$mini" data.path=runs/quickstart/data init_from="$start" run_dir="runs/$mini" "$@" --nproc 2
    else
        # One replica of trainer and engine on each of eight GPUs of 80 GB; the recipe has no layout of its own.
        megatron-mm rl "$recipe" train.recompute=full rl.rollout.offload=true "$@" --nproc "$(nvidia-smi -L | wc -l)"
    fi
}
