"""Hugging Face weights -> a Megatron-Core checkpoint that every layout loads (`megatron-mm import`)."""

import sys

from megatron_mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["import", *sys.argv[1:]]))
