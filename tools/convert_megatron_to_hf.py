"""Megatron-Core checkpoint -> Hugging Face directory for vLLM and transformers (`megatron-mm export`)."""

import sys

from megatron_mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
