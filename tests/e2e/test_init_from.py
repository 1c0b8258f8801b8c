"""Runs that start from other people's weights: directly, or from the checkpoint that they were imported to."""

import json
from pathlib import Path

import pytest

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.convert.importing import ImportOptions, import_model
from megatron_mm.convert.verify import verify
from megatron_mm.train.check import check_inputs
from megatron_mm.train.loop import train
from megatron_mm.weights.names import Kind
from tests.conversion import save_with_transformers
from tests.layouts import TP2, Overrides
from tests.ranks import run_alone, run_on_ranks
from tests.tiny import reference_models, tiny_config


def _config(digits: Path, **overrides: object) -> RunConfig:
    base: Overrides = {
        **TP2,
        "data__path": digits,
        "data__blend": "{digits/easy/thinking: 1}",
        "model__language__vocab_size": 390,
        "train__trained": "[vision, projector, language, embeddings]",
        "train__log_every": 1,
    }
    return tiny_config(**{**base, **overrides})


def _losses(run_dir: Path) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def _refusal(config: RunConfig) -> str:
    """What a run says that does not start. Runs in a process of its own."""
    try:
        train(config)
    except InputError as error:
        return str(error)
    return ""


def test_a_directory_and_its_checkpoint_start_the_same_run(
    digits: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    directory, imported = tmp_path / "model", tmp_path / "imported"
    save_with_transformers(directory, _config(digits), tokenizer)
    run_alone(import_model, ImportOptions(imported, {"whole": directory}))
    configs = [
        _config(digits, init_from=directory, run_dir=tmp_path / "one"),
        _config(digits, init_from=imported, run_dir=tmp_path / "other"),
    ]
    for config in configs:
        run_on_ranks(train, 2, config)
    assert _losses(tmp_path / "one") == _losses(tmp_path / "other")
    assert len(_losses(tmp_path / "one")) == 4
    assert not run_alone(verify, tmp_path / "one", tmp_path / "other").differences
    # The weights did move, and not from fresh ones.
    assert run_alone(verify, tmp_path / "one", imported).differences
    rounded = _config(digits, parallel__tensor=1, init_from=directory, run_dir=tmp_path / "bf16", precision="bf16")
    message = run_alone(_refusal, rounded)
    assert "is float32 and the model bfloat16; import the weights with --dtype, or set precision to theirs" in message


def test_a_vit_and_a_language_model_become_the_model_of_a_run(
    digits: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    siglip, qwen = reference_models(_config(digits))
    siglip.save_pretrained(tmp_path / "vision")
    qwen.save_pretrained(tmp_path / "language")
    tokenizer.save(tmp_path / "language")
    # A language model's tokenizer has no image token.
    file = tmp_path / "language" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    file.write_text(json.dumps(content), encoding="utf-8")
    run = tmp_path / "run"
    changes = ["model.language.tied_embeddings=false", "model.tile_grids=[[1, 1], [2, 2]]"]
    directories: dict[Kind, Path] = {"vision": tmp_path / "vision", "language": tmp_path / "language"}
    run_alone(import_model, ImportOptions(run, directories, overrides=changes))
    with_image = ChatTokenizer(run / "tokenizer")
    assert len(with_image) == len(tokenizer)
    needed = [
        "run_dir=unused",
        "optim.lr=1",
        "train={steps: 1, global_batch: 1, micro_batch: 1}",
        "optim.warmup_steps=0",
    ]
    config = load_config("mini/base", [run / "config.yaml"], needed)
    assert not config.model.language.tied_embeddings
    assert config.model.tile_grids == ((1, 1), (2, 2))
    report = run_alone(verify, tmp_path / "language", run, subset=True)
    assert not report.differences
    assert report.num_tensors == 46
    # The data's tokenizer has the image token at another place.
    config = _config(digits, parallel__tensor=1, init_from=run)
    with pytest.raises(
        InputError, match=r"was prepared with another tokenizer than init_from=.*: '.*' is token \d+ in"
    ):
        check_inputs(config, 1)
