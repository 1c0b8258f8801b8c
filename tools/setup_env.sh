#!/usr/bin/env bash
# Makes .venv beside this checkout's files with everything that this machine can run. Quick when nothing is to do.
#
#   bash tools/setup_env.sh                   PYTHON=python3.11 chooses the interpreter (3.11 or newer)
#   bash tools/setup_env.sh --gpu-contract    the packages of a GPU machine, for tests that need no GPU; makes the link
#                                             .gpu-contract. PYTHON312=python3.12 chooses the interpreter, and
#                                             TE_WHEELS=DIR names ready wheels of Transformer Engine
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# What vLLM 0.26 and Transformer Engine 2.11 are built for.
GPU_TORCH="torch==2.11.0"

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

# requirements EXTRA...: those of setup.py, one a line.
requirements() {
    "$PYTHON312" - "$@" <<'PYTHON'
import runpy, sys, types

def setup(*, install_requires, extras_require, **_):
    print(*install_requires, *(line for extra in sys.argv[1:] for line in extras_require[extra]), sep="\n")

sys.modules["setuptools"] = types.SimpleNamespace(setup=setup, find_packages=lambda **_: [])
sys.argv[0] = "setup.py"
runpy.run_path("setup.py")
PYTHON
}

# transformer_engine: its extension for torch is compiled here unless TE_WHEELS has it. The headers of CUDA are those of
# pip's packages, which the extension's own build does not find by itself.
transformer_engine() {
    local site version
    version=$(sed -n 's/^transformer-engine\[pytorch\]==//p' "$1")
    if [ -n "${TE_WHEELS:-}" ]; then
        # One call: the three share a package folder.
        install "Transformer Engine from $TE_WHEELS" --no-deps "$TE_WHEELS"/transformer_engine*.whl
        return
    fi
    install "what Transformer Engine is compiled with" "nvidia-cuda-nvcc==13.0.*" "nvidia-cuda-crt==13.0.*" pybind11 ninja
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "setup: compiling Transformer Engine's extension, about 20 minutes on two cores (TE_WHEELS=DIR spares them)"
    CUDA_HOME="$site/nvidia/cu13" CPATH="$site/nvidia/cudnn/include:$site/nvidia/nccl/include" \
        NVTE_PYTORCH_FORCE_BUILD=TRUE MAX_JOBS="$(nproc)" PATH="$VENV/bin:$PATH" \
        install "Transformer Engine" --no-build-isolation "transformer-engine[pytorch]==$version"
}

# libcuda_stub: vLLM's libraries are linked against the driver's, of which a machine without a GPU has none. Every
# function of this one answers 100, CUDA_ERROR_NO_DEVICE.
libcuda_stub() {
    local site
    site=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$VENV/stub"
    find "$site/vllm" -name '*.so' -exec nm -D --undefined-only {} + | sed -nE 's/^ +U (cu[A-Z]\w*)$/\1/p' | sort -u |
        sed 's/.*/int &(void) { return 100; }/' |
        gcc -x c -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$VENV/stub/libcuda.so.1" - 2>>"$LOG" ||
        fail "cannot make a stand-in for the driver's library: $(tail -n 1 "$LOG")"
}

# gpu_contract: checkouts with the same requirements share an environment.
gpu_contract() {
    local wanted cache
    PYTHON312=${PYTHON312:-python3.12}
    if ! "$PYTHON312" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
        PYTHON312=$(find ~/.pyenv/versions/3.12*/bin -name python3.12 2>/dev/null | tail -n 1)
        [ -n "$PYTHON312" ] || fail "vLLM and Transformer Engine are tested with Python 3.12, of which there is none" \
            "here: install it (pyenv install 3.12), or name it with PYTHON312=PATH"
    fi
    command -v gcc nm >/dev/null || fail "gcc and nm are missing; on Debian install gcc and binutils"
    wanted=$(requirements gpu mini test)
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/megatron_mm
    VENV=$cache/gpu-contract-$({
        echo "$wanted $GPU_TORCH"
        declare -f gpu_contract transformer_engine libcuda_stub
        "$PYTHON312" -VV
    } | sha256sum | cut -c-16)
    LOG=$VENV/setup.log
    mkdir -p "$cache"
    exec 9>"$VENV.lock"
    flock 9
    if [ ! -f "$VENV/setup.stamp" ]; then
        echo "setup: making $VENV; downloads about 4 GB, takes 9 GB and several minutes"
        rm -rf "$VENV"
        "$PYTHON312" -m venv "$VENV" || fail "cannot make $VENV"
        echo "$wanted" >"$VENV/requirements.txt"
        install "torch with CUDA 13" "$GPU_TORCH" setuptools wheel
        transformer_engine "$VENV/requirements.txt"
        install "vLLM, DALI and what they need" -r "$VENV/requirements.txt"
        libcuda_stub
        touch "$VENV/setup.stamp"
        echo "setup: done; directories of other requirements beside it may be deleted"
    fi
    ln -sfn "$VENV" .gpu-contract
}

if [ "${1:-}" = --gpu-contract ]; then
    gpu_contract
    exit
fi

PYTHON=${PYTHON:-python3}
VENV=.venv
LOG=$VENV/setup.log
STAMP=$VENV/setup.stamp

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
    install "torch" "$GPU_TORCH" setuptools wheel ninja
    install "the package with Transformer Engine, vLLM and DALI" --no-build-isolation -e ".[gpu,mini,dev]"
fi
# torchvision's compiled part may not fit this torch; see megatron_mm/torchvision_guard.py.
SITE=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo 'import megatron_mm.torchvision_guard as guard; guard.install_hook()' >"$SITE/megatron_mm_torchvision_guard.pth"
"$VENV/bin/python" -c 'import torchvision, megatron.core, vllm.model_executor.models.rvl' >>"$LOG" 2>&1 ||
    fail "the packages do not import together: $(tail -n 1 "$LOG") (all of it in $LOG)"
echo "$WANTED" >"$STAMP"
echo "setup: done ($KIND)"
