"""Compares two sets of weights to the bit (`megatron-mm verify`)."""

import sys

from megatron_mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["verify", *sys.argv[1:]]))
