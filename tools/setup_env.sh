#!/usr/bin/env bash
# Makes .venv beside this checkout's files with everything that this machine can run. Quick when nothing is to do.
#
#   bash tools/setup_env.sh                   PYTHON=python3.11 chooses the interpreter (3.11 or newer)
#   bash tools/setup_env.sh --gpu-contract    the packages of a GPU machine, for tests that need no GPU; makes the link
#                                             .gpu-contract. PYTHON312=python3.12 chooses the interpreter
#
# Transformer Engine's binding to torch is compiled, unless pip finds a wheel of it: PIP_FIND_LINKS=DIR names its folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

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

# site_packages: the directory of VENV's packages.
site_packages() {
    "$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
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

# build_wheel_is_there: whether pip is pointed at a wheel of Transformer Engine's binding to torch, built elsewhere for
# this Python.
build_wheel_is_there() {
    local folder tag
    tag=cp$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("py_version_nodot"))')
    for folder in ${PIP_FIND_LINKS:-}; do
        if compgen -G "$folder/transformer_engine_torch-2.11.0-$tag-*.whl" >/dev/null; then return 0; fi
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
    local site header cores by_memory
    site=$(site_packages)
    export CUDA_HOME="${CUDA_HOME:-$site/nvidia/cu13}"
    export CPATH="$site/nvidia/cu13/include:$site/nvidia/cudnn/include:$site/nvidia/nccl/include${CPATH:+:$CPATH}"
    for header in cuda_runtime.h cudnn.h nccl.h cublasLt.h cusparse.h cusolverDn.h nvrtc.h; do
        echo "#include <$header>" | "${CXX:-g++}" -E -x c++ -I"$CUDA_HOME/include" -o /dev/null - >>"$LOG" 2>&1 ||
            fail "no $header in $CUDA_HOME/include or torch's packages ($site/nvidia): name its directory in CPATH"
    done
    # A compiler of one file took 1.7 GiB; torch's build reads MAX_JOBS.
    cores=$(nproc)
    by_memory=$(awk '/^MemAvailable/ { print int($2 / 3 / 1024 / 1024) }' /proc/meminfo)
    if [ "$by_memory" -lt "$cores" ]; then cores=$by_memory; fi
    if [ "$cores" -lt 1 ]; then cores=1; fi
    export MAX_JOBS="${MAX_JOBS:-$cores}"
    echo "setup: compiling Transformer Engine with MAX_JOBS=$MAX_JOBS takes a while, about 20 minutes with 2"
}

# install_for_gpus WHAT PIP_ARGUMENTS...: torch first, which Transformer Engine's binding is compiled against, and whose
# packages have CUDA's headers. nvcc is asked for its version; cuda-toolkit's is that of torch's own packages.
install_for_gpus() {
    install "torch with CUDA's libraries (3 GB)" "torch==2.11.0" "cuda-toolkit[nvcc,nvvm,crt]==13.0.2" \
        setuptools wheel packaging pybind11 ninja
    build_wheel_is_there || prepare_build
    install "$@"
}

# libcuda_stub: vLLM's libraries are linked against the driver's, of which a machine without a GPU has none. Every
# function of this one answers 100, CUDA_ERROR_NO_DEVICE.
libcuda_stub() {
    mkdir -p "$VENV/stub"
    find "$(site_packages)/vllm" -name '*.so' -exec nm -D --undefined-only {} + | sed -nE 's/^ +U (cu[A-Z]\w*)$/\1/p' | sort -u |
        sed 's/.*/int &(void) { return 100; }/' |
        gcc -x c -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$VENV/stub/libcuda.so.1" - 2>>"$LOG" ||
        fail "cannot make a stand-in for the driver's library: $(tail -n 1 "$LOG")"
}

# gpu_contract: checkouts with the same requirements share an environment.
gpu_contract() {
    local wanted cache
    PYTHON312=${PYTHON312:-python3.12}
    if ! "$PYTHON312" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
        PYTHON312=$(find ~/.pyenv/versions/3.12*/bin -name python3.12 2>/dev/null | tail -n 1 || true)
        [ -n "$PYTHON312" ] || fail "vLLM and Transformer Engine are tested with Python 3.12, of which there is none" \
            "here: install it (pyenv install 3.12), or name it with PYTHON312=PATH"
    fi
    PYTHON=$PYTHON312
    build_wheel_is_there || check_build_needs
    if ! command -v gcc >/dev/null || ! command -v nm >/dev/null; then
        fail "gcc or nm is missing; on Debian install gcc and binutils"
    fi
    wanted=$(requirements gpu mini test)
    cache=${XDG_CACHE_HOME:-$HOME/.cache}/megatron_mm
    VENV=$cache/gpu-contract-$({
        echo "$wanted"
        declare -f gpu_contract install_for_gpus prepare_build libcuda_stub
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
        install_for_gpus "vLLM, Transformer Engine and DALI" --no-build-isolation -r "$VENV/requirements.txt"
        libcuda_stub
        touch "$VENV/setup.stamp"
        echo "setup: done; directories next to it, of other requirements, may be deleted"
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

if [ "$KIND" = gpu ] && ! build_wheel_is_there; then check_build_needs; fi
# Until all is done: what is left of an installation that was cut off is not to be taken for a whole one.
rm -f "$STAMP"
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
    install_for_gpus "the package with Transformer Engine, vLLM and DALI" --no-build-isolation -e ".[gpu,mini,dev]"
fi
# torchvision's compiled part may not fit this torch; see megatron_mm/torchvision_guard.py.
echo 'import megatron_mm.torchvision_guard as guard; guard.install_hook()' \
    >"$(site_packages)/megatron_mm_torchvision_guard.pth"
IMPORTS="torchvision, megatron.core, vllm.model_executor.models.rvl"
if [ "$KIND" = gpu ]; then IMPORTS="torch, transformer_engine.pytorch, $IMPORTS"; fi
"$VENV/bin/python" -c "import $IMPORTS" >>"$LOG" 2>&1 ||
    fail "the packages do not import together: $(tail -n 1 "$LOG") (all of it in $LOG)"
echo "$WANTED" >"$STAMP"
echo "setup: done ($KIND)"
