#!/usr/bin/env bash
# Plain GRPO with as many responses, which R-4B compares BPO with (arXiv 2508.21113, Fig. 10).
#
#   bash examples/grpo_qwen3_4b.sh data.path=DIR init_from=RUN     on all GPUs of this machine; many: slurm/bpo.sh
#   bash examples/grpo_qwen3_4b.sh --mini                          in miniature, without a GPU; writes runs/mini/grpo
folder=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=examples/help.sh
source "$folder/help.sh"
exec bash "$folder/reinforce.sh" r4b/grpo mini/grpo runs/quickstart/anneal "$@"
