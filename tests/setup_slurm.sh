#!/usr/bin/env bash
# Installs what the tests of slurm/ need: Debian's slurm-wlm and munge. Quick when they are there.
# Where they cannot be installed it says so and leaves it to those tests to fail.
set -euo pipefail
PATH="$PATH:/usr/sbin:/sbin"

if command -v slurmctld slurmd munged >/dev/null; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "setup: no Slurm here, and it takes root and apt to install slurm-wlm and munge: tests of slurm/ will fail" >&2
    exit 0
fi
echo "setup: installing slurm-wlm and munge"
LOG=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
if ! { apt-get update && apt-get install -y --no-install-recommends slurm-wlm munge; } >"$LOG" 2>&1; then
    echo "setup: cannot install slurm-wlm and munge: $(grep -E '^E:' "$LOG" | head -n 1) (all of it in $LOG)" >&2
    exit 0
fi
rm "$LOG"
