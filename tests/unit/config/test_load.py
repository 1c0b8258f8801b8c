"""Recipes resolve; every fault is named at once, with the nearest valid name."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mm.config.errors import InputError
from megatron_mm.config.load import describe_recipe, load_config, recipe_names, to_yaml


@pytest.mark.parametrize("recipe", [name for name in recipe_names() if not name.endswith("/base")])
def test_every_shipped_recipe_resolves_and_its_yaml_reads_back(recipe: str, tmp_path: Path) -> None:
    config = load_config(recipe)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(file)) == config


def test_unknown_keys_and_bad_values_are_all_named_at_once() -> None:
    overrides = ["train.stpes=3", "optim.beta1=1.5", "model.vision.hiden_size=8", "optim.schedule=linear", "foo=1"]
    with pytest.raises(InputError) as caught:
        load_config("mini/stage1", overrides=overrides)
    message = str(caught.value)
    assert "has 5 fault(s)" in message
    for part in (
        "train.stpes: unknown key; the nearest valid one is train.steps",
        "model.vision.hiden_size: unknown key; the nearest valid one is model.vision.hidden_size",
        "optim.beta1: input should be less than 1 (seen: 1.5)",
        "optim.schedule: input should be 'cosine', 'constant' or 'wsd' (seen: 'linear')",
        "foo: unknown key",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.min_lr=1", "optim.min_lr=1.0 is above optim.lr=0.003"),
        ("optim.warmup_steps=60", "optim.warmup_steps=60 leaves none of train.steps=60"),
        ("data.max_sequence_tokens=4096", "is above model.language.max_positions=512"),
        ("model.tile_grids=[[0, 4]]", "rows and columns are 1 or more"),
        ("model.vision.drop_last_layers=2", "drop_last_layers=2 leaves none of num_layers=2"),
        ("model.vision.patch_size=33", "image_size=32 is smaller than patch_size=33"),
        ("data.blend={digits/easy/thinking: 0}", "remove the part instead"),
        ("train.trained=[]", "train.trained"),
        ("no_equals_sign", "is not of the form a.b=value"),
        ("model.vision.preset=siglip2-so400m-patch14-383", "did you mean 'siglip2-so400m-patch14-384'?"),
    ],
)
def test_values_out_of_range_are_refused_with_the_fix(override: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config("mini/stage1", overrides=[override])
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=5", "the stages of rl.stages have 40 steps, train.steps=5; give rl.stages.0.steps=5 as well"),
        ("rl.stages.0.group_size=1", None),
        ("rl.stages.1.group_size=1", "rl.stages: input should be a valid tuple"),
        ("rl.stages.0.max_response_tokens=256", "rl.stages.0.max_response_tokens=256 leaves no room for a prompt"),
        ("rl.stages=[{steps: 40, max_response_tokens: 64}]", "has 1 fault(s):\n  rl.stages.0.group_size: missing"),
        ("rl.stages.0.stesp=40", "rl.stages.0.stesp: unknown key; the nearest valid one is rl.stages.0.steps"),
        ("rl.stages=[]", "rl.stages: tuple should have at least 1 item"),
        ("rl.rollout.ranks=3", "rl.rollout.ranks=3 does not divide model.language.num_heads=4, which vLLM cuts"),
        ("rl.rollout.ranks=2", None),
        ("rl.objective.kl_coef=.inf", "rl.objective.kl_coef: input should be a finite number"),
        ("rl.objective.kl_coef=nan", "rl.objective.kl_coef: input should be a finite number"),
    ],
)
def test_what_reinforcement_learning_takes(override: str, expected: str | None) -> None:
    if expected is None:
        load_config("mini/bpo", overrides=[override])
        return
    with pytest.raises(InputError) as caught:
        load_config("mini/bpo", overrides=[override])
    assert expected in str(caught.value)


def test_one_of_a_list_is_changed_by_its_number() -> None:
    before, after = (load_config("mini/ptst", overrides=given).rl for given in ([], ["rl.stages.1.group_size=4"]))
    assert before is not None
    assert after is not None
    assert after.stages[0] == before.stages[0]
    assert after.stages[1] == before.stages[1].model_copy(update={"group_size": 4})


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'mini/stage1'"):
        load_config("mini/stge1")


def test_order_is_base_then_recipe_then_file_then_override(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("train: {steps: 70}\noptim: {lr: 0.5}\n", encoding="utf-8")
    config = load_config("mini/stage1", [file], ["optim.lr=1e-2"])
    assert (config.train.global_batch, config.parallel.tensor) == (64, 2)  # base, recipe
    assert (config.train.steps, config.optim.lr) == (70, 0.01)  # file, override


def test_a_blend_is_replaced_not_merged() -> None:
    config = load_config("mini/stage1", overrides=["data.blend={digits/hard/thinking: 1}"])
    assert config.data.blend == {"digits/hard/thinking": 1.0}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("telemetry.wandb=off", "off"),
        ("telemetry.wandb=online", "online"),
        ("data.blend=null", {}),
        ("data.blend=~", {}),
        ("data.blend={}", {}),
        ("optim.modules=null", {}),
        ("init_from=null", None),
        ("init_from=~", None),
        ("train.validate_every=null", None),
        ("optim.overlap=null", None),
        ("parallel.sequence=on", True),
        ("optim.distributed=off", False),
        ("checkpoint.verify=no", False),
        ("telemetry.tensorboard=false", False),
        ("optim.lr=1e-2", 0.01),
        ("optim.lr=1.E-2", 0.01),
        ("seed=010", 10),
        ("seed=1e3", 1000),
        ("run_dir=2024", Path("2024")),
        ("run_dir=010", Path("010")),
        ("run_dir=2024-01-01", Path("2024-01-01")),
        ("run_dir=1e3", Path("1e3")),
        ("run_dir=no", Path("no")),
        ("run_dir='null'", Path("null")),
        ("run_dir=~/x", Path.home() / "x"),
        ("data.path=~/x", str(Path.home() / "x")),
        ("data.path=s3://bucket/~/x", "s3://bucket/~/x"),
        ("telemetry.wandb_project=2024", "2024"),
    ],
)
def test_a_value_is_what_its_writer_meant(override: str, expected: object, tmp_path: Path) -> None:
    config = load_config("mini/stage1", overrides=[override])
    found: Any = config
    for part in override.partition("=")[0].split("."):
        found = getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(file)) == config


def test_what_is_written_is_read_alike_by_older_rules(tmp_path: Path) -> None:
    config = load_config("mini/stage1", overrides=["run_dir=2024-01-01", "telemetry.wandb_project='1e3'"])
    tree = yaml.safe_load(to_yaml(config))  # YAML 1.1
    assert (tree["run_dir"], tree["telemetry"]) == ("2024-01-01", config.telemetry.model_dump())


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("train.stpes", "train.steps"),
        ("lr", "optim.lr"),
        ("steps", "train.steps or rl.stages.0.steps"),
        ("optim.learning_rate", "optim.lr"),
        ("train.batch_size", "train.global_batch"),
        ("train.lr", "optim.lr"),
        ("optim.micro_batch", "train.micro_batch"),
        ("rl.group_size", "rl.stages.0.group_size"),
        ("hidden_size", "model.vision.hidden_size or model.language.hidden_size"),
        ("model.languages.hidden_size", "model.language"),
        ("parallel.tensors", "parallel.tensor"),
        ("tensor", "parallel.tensor"),
        ("tensor_parallel", "parallel.tensor"),
        ("blend", "data.blend"),
        ("foo", None),
        ("train.xyzzy", None),
        ("x", None),
        ("model.vision.qqqq", None),
    ],
)
def test_a_name_is_likened_to_those_of_all_sections_or_to_none(name: str, nearest: str | None) -> None:
    with pytest.raises(InputError) as caught:
        load_config("mini/stage1", overrides=[f"{name}=1"])
    (line,) = (line for line in str(caught.value).splitlines() if f"{name}: " in line or ": unknown key" in line)
    if nearest is None:
        assert "no setting is called like it" in line
    else:
        assert f"the nearest valid one is {nearest}" in line


def test_every_recipe_is_described() -> None:
    for name in recipe_names():
        assert 10 < len(describe_recipe(name)) < 200
        assert not describe_recipe(name).endswith(".")


def test_a_stage_that_does_not_fill_its_steps_is_told_how() -> None:
    def fault(recipe: str, steps: int) -> str:
        with pytest.raises(InputError) as caught:
            load_config(recipe, overrides=[f"train.steps={steps}"])
        return str(caught.value)

    assert fault("mini/bpo", 4).endswith("give rl.stages.0.steps=4 as well")
    assert fault("mini/ptst", 39).endswith("give rl.stages.1.steps=19 as well")
    # Fewer than the first of two stages has.
    override = fault("mini/ptst", 5).split("such as '")[1].rstrip("'\n")
    assert load_config("mini/ptst", overrides=["train.steps=5", override]).train.steps == 5


def test_reading_a_config_does_not_import_torch() -> None:
    code = "import sys, megatron_mm.config.load as l; l.load_config('mini/stage1'); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
