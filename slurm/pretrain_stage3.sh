#!/usr/bin/env bash
# Stage 3: everything learns.
#
#   sbatch slurm/pretrain_stage3.sh run_dir=DIR data.path=DIR init_from=DIR     from the root of the checkout; see docs/cluster.md
#SBATCH --job-name=pretrain_stage3
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
source "${SLURM_SUBMIT_DIR:?start it by sbatch}/slurm/common.sh" || exit 2
launch train r4b/stage3 "$@"
