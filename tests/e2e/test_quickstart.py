"""The quickstart in its tiny form, run as a user would, and what its checkpoints say about freezing."""

import json
import os
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from megatron_mm.checkpoint.paths import find
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from tests.ranks import run_on_ranks

ROOT = Path(__file__).parents[2]
STAGES = ("language", "stage1", "stage2", "stage3", "anneal")
# Parameters of a checkpoint by the module that freezing names.
PREFIXES = {"vision": ("vision.",), "projector": ("projector.", "fusion."), "language": ("language.",)}
TRAINED = {
    "stage1": {"projector"},
    "stage2": {"vision", "projector"},
    "stage3": {"vision", "projector", "language"},
    "anneal": {"vision", "projector", "language"},
}


@pytest.fixture(scope="module")
def run() -> Path:
    """The run directory of `examples/quickstart.sh --tiny --force`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    command = ["bash", "examples/quickstart.sh", "--tiny", "--force"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "Held-out questions, answered by vLLM" in result.stdout
    return ROOT / "runs" / "quickstart-tiny"


def _weights(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Model tensors of each stage's last checkpoint."""
    found = {}
    with state.process_group(get_platform("cpu")):
        for stage in STAGES:
            tensors = dist_checkpointing.load_plain_tensors(str(find(run / stage)))
            found[stage] = {name: value for name, value in tensors.items() if not name.startswith("optimizer.")}
    return found


def test_each_stage_changes_what_it_trains_and_nothing_else_by_a_bit(run: Path) -> None:
    (weights,) = run_on_ranks(_weights, 1, run)
    for before, after in pairwise(STAGES):
        assert weights[before].keys() == weights[after].keys()
        for module, prefixes in PREFIXES.items():
            names = [name for name in weights[after] if name.startswith(prefixes)]
            assert len(names) > 5
            changed = [name for name in names if not torch.equal(weights[before][name], weights[after][name])]
            if module in TRAINED[after]:
                # All but parameters too small a step moves in bf16; half is far from none.
                assert len(changed) > len(names) / 2, f"{after} left {module} as it was"
            else:
                assert not changed, f"{after} changed frozen {module}: {changed}"


def test_the_export_holds_the_last_checkpoint(run: Path) -> None:
    (weights,) = run_on_ranks(_weights, 1, run)
    exported = load_file(run / "model" / "model.safetensors")
    assert torch.equal(exported["model.image_newline"], weights["anneal"]["fusion.image_newline"])
    embedding = weights["anneal"]["language.embedding.word_embeddings.weight"]
    assert torch.equal(exported["model.language_model.embed_tokens.weight"], embedding)


def test_every_source_was_asked_in_every_mode(run: Path) -> None:
    scores = json.loads((run / "report.json").read_text(encoding="utf-8"))
    asked = {(score["source"], score["mode"]): score["num_questions"] for score in scores}
    sources, modes = ("digits/caption", "digits/easy", "digits/hard"), ("thinking", "non_thinking", "auto")
    assert asked == {(source, mode): 10 for source in sources for mode in modes}
    lines = (run / "report.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 10 * len(asked)
    metrics = (run / "stage2" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [3, 6]
