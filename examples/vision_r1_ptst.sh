#!/usr/bin/env bash
# Progressive thinking suppression training of Vision-R1 (arXiv 2503.06749), from its cold start.
#
#   bash examples/vision_r1_ptst.sh data.path=DIR init_from=RUN     on all GPUs of this machine; many: slurm/bpo.sh
#   bash examples/vision_r1_ptst.sh --mini                          in miniature, without a GPU; writes runs/mini/ptst
folder=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=examples/help.sh
source "$folder/help.sh"
exec bash "$folder/reinforce.sh" vision_r1/ptst mini/ptst runs/quickstart/cold_start "$@"
