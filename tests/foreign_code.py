"""Code that a model's directory brings along, and that leaves a mark where it is run."""

import json
from pathlib import Path

CODE = "import pathlib\npathlib.Path({marker!r}).write_text('ran')\nfrom transformers import *\n"


def plant(directory: Path, marker: Path) -> None:
    """Name code of the directory's own wherever transformers looks for a name, and write it there."""
    (directory / "own.py").write_text(CODE.format(marker=str(marker)), encoding="utf-8")
    named = {"AutoConfig": "own.PreTrainedConfig", "AutoModel": "own.PreTrainedModel", "AutoProcessor": "own.Processor"}
    for name in ("config.json", "tokenizer_config.json", "processor_config.json"):
        path = directory / name
        if path.is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            content["auto_map"] = {**named, "AutoTokenizer": ["own.PreTrainedTokenizer", "own.PreTrainedTokenizerFast"]}
            path.write_text(json.dumps(content), encoding="utf-8")
