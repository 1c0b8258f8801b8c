#!/usr/bin/env bash
# The whole recipe in miniature, on real handwritten digits and without a GPU: data, a tiny Qwen3 from text, the three
# stages of pretraining and bi-mode annealing on two ranks, export, and vLLM answering held-out questions. Ends with a
# table.
#
#   bash examples/quickstart.sh           learns the task in about 25 minutes; writes runs/quickstart
#   bash examples/quickstart.sh --tiny    a few steps of everything; writes runs/quickstart-tiny
#
# --force deletes what an earlier call has written there, which it would otherwise not touch.
set -euo pipefail
# shellcheck source=examples/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

RUN=runs/quickstart
PICTURES=(--train 12000 --heldout 400)
QUESTIONS=200
OVERRIDES=()
FORCE=no
for argument in "$@"; do
    case $argument in
        --tiny)
            RUN=runs/quickstart-tiny
            PICTURES=(--train 500 --heldout 20)
            QUESTIONS=10
            OVERRIDES=(train.steps=6 optim.warmup_steps=2 train.log_every=3 train.global_batch=16 train.micro_batch=8)
            ;;
        --force) FORCE=yes ;;
        *)
            echo "quickstart: unknown argument $argument; --help lists what there is" >&2
            exit 2
            ;;
    esac
done
if [ -e "$RUN" ] && [ "$FORCE" = no ]; then
    echo "quickstart: $RUN is there, from an earlier call; --force deletes it and begins anew" >&2
    exit 2
fi
bash tools/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH"

# Two ranks, or one where torch sees one GPU.
RANKS=2
if [ "$(python -c 'import torch; print(torch.cuda.device_count())')" = 1 ]; then
    RANKS=1
    OVERRIDES+=(parallel.tensor=1)
fi

# stage NAME MORE_OVERRIDES...: trains, starting from the stage before
stage() {
    local name=$1
    shift
    megatron-mm train "mini/$name" run_dir="$RUN/$name" data.path="$RUN/data" "$@" "${OVERRIDES[@]}" --nproc "$RANKS"
}

rm -rf "$RUN"
megatron-mm data digits "$RUN/data" "${PICTURES[@]}"
stage language
stage stage1 init_from="$RUN/language"
stage stage2 init_from="$RUN/stage1"
stage stage3 init_from="$RUN/stage2"
stage anneal init_from="$RUN/stage3"
megatron-mm export "$RUN/anneal" "$RUN/model"
megatron-mm evaluate "$RUN/model" "$RUN/data" "$RUN/report.json" --questions "$QUESTIONS"
