#!/usr/bin/env bash
# What all jobs share: where things are, one launcher a node, signals, requeue. See docs/cluster.md.
#
#   source "$SLURM_SUBMIT_DIR/slurm/common.sh"
#   launch COMMAND RECIPE "$@"      COMMAND: train or rl; "$@": overrides, first of all --recipe NAME for another recipe
set -euo pipefail

REQUEUE_CODE=75 # megatron_mm/config/errors.py
MAX_RESTARTS=100
ROOT=$SLURM_SUBMIT_DIR

fail() {
    echo "slurm: $*" >&2
    exit 2
}

launch() {
    local command=$1 recipe=$2
    shift 2
    if [ "${1:-}" = --recipe ]; then
        [ $# -ge 2 ] || fail "--recipe needs a name, such as mini/stage3"
        recipe=$2
        shift 2
    fi
    local num_ranks=${NPROC:-${SLURM_GPUS_ON_NODE:-}}
    [ -n "$num_ranks" ] || fail "how many ranks a node? Ask Slurm for GPUs (--gpus-per-node=8), or give NPROC=2"

    # One launcher a node starts all ranks there: a cluster that binds each task to a core would give them one together.
    local start=(srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpu-bind=none)
    if [ -n "${CONTAINER:-}" ]; then
        start+=(--container-image="$CONTAINER" --container-workdir="$PWD" --container-mounts="$ROOT:$ROOT${MOUNTS:+,$MOUNTS}")
    else
        [ -x "$ROOT/.venv/bin/python" ] || fail "no $ROOT/.venv; run bash tools/setup_env.sh, or give CONTAINER=IMAGE"
        export PATH="$ROOT/.venv/bin:$PATH"
    fi
    # This checkout's code, wherever the job was submitted from and whatever the container has.
    export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"

    run_to_the_end "${start[@]}" python -m megatron_mm.cli "$command" "$recipe" "$@" --nproc "$num_ranks" \
        --nodes "$SLURM_NNODES" --rendezvous "$(rendezvous)"
    finish
}

# The first node's address as Slurm itself uses it, and a port that no other job has, below the ephemeral ones.
rendezvous() {
    local first
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    echo "$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'):$((15000 + SLURM_JOB_ID % 15000))"
}

# run_to_the_end COMMAND...: passes signals on and waits until the command itself has ended; its exit code is CODE.
run_to_the_end() {
    local step code signalled=no
    TERMINATED=no
    "$@" &
    step=$!
    # Before the time limit (--signal=B:USR1@SECONDS).
    trap 'signalled=yes; kill -USR1 $step' USR1
    # By scancel, or by a preemption after which Slurm itself requeues.
    trap 'signalled=yes; TERMINATED=yes; kill -USR1 $step' TERM
    CODE=0
    wait "$step" || CODE=$?
    while [ "$signalled" = yes ]; do # a trap ended the wait, perhaps not the command
        signalled=no code=0
        wait "$step" || code=$?
        [ "$code" -eq 127 ] || CODE=$code # 127: the wait before had it already
    done
    trap '' USR1 TERM # a requeue ends this script too
}

# Requeue a job that saved and wants to go on, and end.
finish() {
    if [ "$CODE" -ne "$REQUEUE_CODE" ] || [ "$TERMINATED" = yes ]; then exit "$CODE"; fi
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "slurm: saved, but not requeued: it has been $MAX_RESTARTS times" >&2
        exit "$CODE"
    fi
    echo "slurm: saved; requeued"
    scontrol requeue "$SLURM_JOB_ID"
}
