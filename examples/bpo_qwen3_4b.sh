#!/usr/bin/env bash
# Bi-mode policy optimization of R-4B (arXiv 2508.21113), from its annealed model.
#
#   bash examples/bpo_qwen3_4b.sh data.path=DIR init_from=RUN     on all GPUs of this machine; many: slurm/bpo.sh
#   bash examples/bpo_qwen3_4b.sh --mini                          in miniature, without a GPU; writes runs/mini/bpo
folder=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=examples/help.sh
source "$folder/help.sh"
exec bash "$folder/reinforce.sh" r4b/bpo mini/bpo runs/quickstart/anneal "$@"
