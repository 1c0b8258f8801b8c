#!/usr/bin/env bash
# Bi-mode policy optimization; --recipe names another kind of reinforcement learning, such as vision_r1/ptst.
#
#   sbatch slurm/bpo.sh run_dir=DIR data.path=DIR init_from=DIR     from the root of the checkout; see docs/cluster.md
#SBATCH --job-name=bpo
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@1800
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm/logs/%x-%j.log
source "${SLURM_SUBMIT_DIR:?start it by sbatch}/slurm/common.sh" || exit 2
launch rl r4b/bpo "$@"
