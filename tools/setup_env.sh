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

# build_wheel_is_there: whether pip is pointed at a wheel of Transformer Engine's binding to torch, built elsewhere.
build_wheel_is_there() {
    local folder
    for folder in ${PIP_FIND_LINKS:-}; do
        if compgen -G "$folder/transformer_engine_torch-2.11.0-*.whl" >/dev/null; then return 0; fi
    done
    return 1
}

# check_build_needs: Transformer Engine's binding to torch comes as source. Says what its compilation needs and pip
# cannot bring, before anything is downloaded.
check_build_needs() {
    local missing=() headers release
    command -v "${CXX:-g++}" >/dev/null || missing+=("a C++ compiler, ${CXX:-g++}: on Debian install g++")
    headers=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    [ -f "$headers/Python.h" ] || missing+=("$headers/Python.h: on Debian install python3-dev")
    if [ -n "${CUDA_HOME:-}" ]; then
        # Transformer Engine looks there and nowhere else.
        if [ ! -x "$CUDA_HOME/bin/nvcc" ] || [ ! -f "$CUDA_HOME/include/cuda_runtime.h" ]; then
            missing+=("CUDA_HOME=$CUDA_HOME is no CUDA toolkit (bin/nvcc, include/cuda_runtime.h): unset it, for pip's")
        else
            release=$("$CUDA_HOME/bin/nvcc" -V | sed -n 's/.*release \([0-9.]*\).*/\1/p')
            [ "${release%%.*}" = 13 ] ||
                missing+=("CUDA_HOME=$CUDA_HOME has CUDA $release, and torch 2.11 has 13: unset it, for pip's")
        fi
    fi
    [ "${#missing[@]}" = 0 ] || fail "Transformer Engine is compiled here, which lacks$(printf '\n  %s' "${missing[@]}")"
}

# prepare_build: after torch, whose packages have CUDA's headers. A toolkit may have a part of them only.
prepare_build() {
    local header cores by_memory
    SITE=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    export CUDA_HOME="${CUDA_HOME:-$SITE/nvidia/cu13}"
    export CPATH="$SITE/nvidia/cu13/include:$SITE/nvidia/cudnn/include:$SITE/nvidia/nccl/include${CPATH:+:$CPATH}"
    for header in cuda_runtime.h cudnn.h nccl.h cublasLt.h cusparse.h cusolverDn.h nvrtc.h; do
        echo "#include <$header>" | "${CXX:-g++}" -E -x c++ -I"$CUDA_HOME/include" - >>"$LOG" 2>&1 ||
            fail "no $header in $CUDA_HOME/include or torch's packages ($SITE/nvidia): name its directory in CPATH"
    done
    # A compiler of one file took 1.7 GiB; torch's build reads MAX_JOBS.
    cores=$(nproc)
    by_memory=$(awk '/^MemAvailable/ { print int($2 / 3 / 1024 / 1024) }' /proc/meminfo)
    if [ "$by_memory" -lt "$cores" ]; then cores=$by_memory; fi
    if [ "$cores" -lt 1 ]; then cores=1; fi
    export MAX_JOBS="${MAX_JOBS:-$cores}"
    echo "setup: compiling Transformer Engine with MAX_JOBS=$MAX_JOBS takes a while, about 20 minutes with 2"
}

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    fail "$PYTHON is not Python 3.11 or newer; name one with PYTHON=..."
if nvidia-smi --list-gpus >/dev/null 2>&1; then KIND=gpu; else KIND=cpu; fi

WANTED=$(cat setup.py tools/setup_env.sh <("$PYTHON" -VV) <(echo "$KIND $PWD") | sha256sum | cut -d' ' -f1)
if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$WANTED" ]; then exit 0; fi

if [ "$KIND" = gpu ] && ! build_wheel_is_there; then check_build_needs; fi
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
    # Transformer Engine's extension is compiled against the torch that is installed, and asks nvcc for its version.
    # cuda-toolkit's is that of torch 2.11's own packages.
    install "torch with CUDA's libraries (3 GB)" "torch==2.11.0" "cuda-toolkit[nvcc,nvvm,crt]==13.0.2" \
        setuptools wheel packaging ninja
    build_wheel_is_there || prepare_build
    install "the package with Transformer Engine, vLLM and DALI" --no-build-isolation -e ".[gpu,mini,dev]"
fi
# torchvision's compiled part may not fit this torch; see megatron_mm/torchvision_guard.py.
SITE=$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo 'import megatron_mm.torchvision_guard as guard; guard.install_hook()' >"$SITE/megatron_mm_torchvision_guard.pth"
IMPORTS="torchvision, megatron.core, vllm.model_executor.models.rvl"
if [ "$KIND" = gpu ]; then IMPORTS="torch, transformer_engine.pytorch, $IMPORTS"; fi
"$VENV/bin/python" -c "import $IMPORTS" >>"$LOG" 2>&1 ||
    fail "the packages do not import together: $(tail -n 1 "$LOG") (all of it in $LOG)"
echo "$WANTED" >"$STAMP"
echo "setup: done ($KIND)"
