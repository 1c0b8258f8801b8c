"""Sources, named in a YAML file -> a prepared data set (`megatron-mm data prepare`)."""

import sys

from megatron_mm.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "prepare", *sys.argv[1:]]))
