#!/usr/bin/env bash
# Makes .venv beside this checkout's files with everything that this machine can run. Quick when nothing is to do.
#
#   bash tools/setup_env.sh         PYTHON=python3.11 chooses the interpreter (3.11 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV=.venv
LOG=$VENV/setup.log
STAMP=$VENV/setup.stamp

fail() {
    echo "setup: $*" >&2
    exit 1
}

# install WHAT PIP_ARGUMENTS...: one line says what could not be installed and why.
install() {
    local what=$1
    shift
    echo "setup: installing $what"
    "$VENV/bin/python" -m pip install "$@" >>"$LOG" 2>&1 ||
        fail "cannot install $what: $(grep -E '^ERROR' "$LOG" | head -n 1) (all of it in $LOG)"
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$PYTHON is not Python 3.11 or newer; name one with PYTHON=..."
if nvidia-smi --list-gpus >/dev/null 2>&1; then KIND=gpu; else KIND=cpu; fi

WANTED=$(cat setup.py tools/setup_env.sh <("$PYTHON" -VV) <(echo "$KIND $PWD") | sha256sum | cut -d' ' -f1)
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ]; then exit 0; fi

"$PYTHON" -m venv "$VENV" || fail "cannot make $VENV; on Debian install python3-venv"
: >"$LOG"
if [ "$KIND" = cpu ]; then
    # First, and by its local version: otherwise a dependency brings the build with several GB of CUDA.
    install "torch's CPU build (where pip does not find it, point PIP_EXTRA_INDEX_URL at PyTorch's CPU index)" \
        "torch==2.13.0+cpu"
    install "the package with vLLM's CPU build (about 3 GB)" -e ".[cpu,mini,dev]"
    # Unused here. The first two are linked against CUDA, and their failing imports would take transformers down with
    # them; Triton has no CPU backend, and fills the end of every process that imported it with names of what it leaks.
    "$VENV/bin/python" -m pip uninstall -q -y torchaudio torchcodec triton >>"$LOG" 2>&1
else
    # Transformer Engine's extension is compiled against the torch that is installed.
    install "torch" "torch==2.11.0" setuptools wheel ninja
    install "the package with Transformer Engine, vLLM and DALI" --no-build-isolation -e ".[gpu,mini,dev]"
fi
# torchvision's compiled part may not fit this torch; see megatron_mm/torchvision_guard.py.
SITE=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo 'import megatron_mm.torchvision_guard as guard; guard.install_hook()' >"$SITE/megatron_mm_torchvision_guard.pth"
"$VENV/bin/python" -c 'import torchvision, megatron.core, vllm.model_executor.models.rvl' >>"$LOG" 2>&1 ||
    fail "the packages do not import together: $(tail -n 1 "$LOG") (all of it in $LOG)"
echo "$WANTED" >"$STAMP"
echo "setup: done ($KIND)"
