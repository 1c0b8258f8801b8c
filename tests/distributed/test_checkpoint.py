"""A run that was cut off goes on bit by bit as if it had not been; its weights load exactly into every layout."""

import shutil
from pathlib import Path

import torch

from megatron_mm.chat.tokenizer import IMAGE
from megatron_mm.checkpoint import paths
from megatron_mm.checkpoint.store import FORMAT, load_weights
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.shards import PreparedData
from megatron_mm.models.vision import fitted_positions
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.train.loop import train
from megatron_mm.weights.stream import to_hf
from megatron_mm.weights.tables import model_table
from tests.checkpoints import assert_same, content, seal
from tests.layouts import EXPERT_LAYOUTS, LAYOUTS, layout
from tests.ranks import run_on_ranks
from tests.tiny import digits_config, tiny_config


def _config(digits: Path, run_dir: Path) -> RunConfig:
    return digits_config(digits, run_dir, checkpoint__save_every=2, precision="bf16")


def _exported(configs: list[RunConfig], run_dir: Path | None) -> list[dict[str, torch.Tensor] | str]:
    """What each layout streams out after loading the run's weights, or what it says instead. Runs on every rank.

    Without a run, of the weights that it starts with.
    """
    platform = get_platform("cpu")
    found = []
    with state.process_group(platform):
        for config in configs:
            assert config.data.path is not None
            image = PreparedData(config.data.path).tokenizer().control(IMAGE)
            with state.model_parallel(config.parallel, config.seed) as groups:
                chunks = build_model(config, platform, groups, image)
                try:
                    if run_dir is not None:
                        load_weights(run_dir, chunks)
                    found.append(dict(to_hf(chunks, model_table(config.model))))
                except InputError as error:
                    found.append(str(error))
    return found


def _cut_off_after_two_steps(whole: RunConfig, cut: RunConfig) -> None:
    """The run directory of `cut` as if its run had ended after the second of `whole`'s four steps."""
    shutil.copytree(whole.run_dir, cut.run_dir)
    shutil.rmtree(paths.step_directory(cut.run_dir, 4))
    paths.pointer(cut.run_dir).write_text(paths.step_directory(cut.run_dir, 2).name, encoding="utf-8")


def test_resume_is_bitwise_and_weights_reshard_exactly(digits: Path, tmp_path: Path) -> None:
    whole, cut = _config(digits, tmp_path / "whole"), _config(digits, tmp_path / "cut")
    run_on_ranks(train, 2, whole)
    _cut_off_after_two_steps(whole, cut)
    run_on_ranks(train, 2, cut)
    expected = content(whole.run_dir)
    assert_same(expected, content(cut.run_dir))

    layouts = {
        name: layout(**overrides, data__path=digits, precision="bf16")
        for name, (ranks, overrides) in LAYOUTS.items()
        if ranks == 2
    }
    deeper = tiny_config(model__language__vocab_size=384, model__vision__num_layers=3, data__path=digits)
    narrower = tiny_config(model__language__vocab_size=384, model__vision__num_layers=1, data__path=digits)
    configs = [*layouts.values(), *(model.model_copy(update={"precision": "bf16"}) for model in (deeper, narrower))]
    for *exported, lacking, left_over in run_on_ranks(_exported, 2, configs, whole.run_dir):
        for name, tensors in zip(layouts, exported, strict=True):
            assert isinstance(tensors, dict), tensors
            assert tensors.keys() == exported[0].keys()
            assert not [key for key in tensors if not torch.equal(tensors[key], exported[0][key])], name
        vision = expected["vision.position_embedding.weight"]
        key = "model.vision_tower.vision_model.embeddings.position_embedding.weight"
        assert torch.equal(exported[0][key], vision)
        # Another model is refused by name, whether it is larger or smaller than the checkpoint's.
        for message, num_layers in ((str(lacking), 3), (str(left_over), 1)):
            assert "is of another model" in message
            bias = "vision.encoder.layers.self_attention.linear_qkv.bias"
            assert f"{bias} is [2, 192] in it and [{num_layers}, 192] in the model" in message


def test_experts_reshard_exactly_and_start_alike_in_every_layout(digits: Path, tmp_path: Path) -> None:
    layouts = [layout(**EXPERT_LAYOUTS[name][1], data__path=digits) for name in ("experts, EP 2", "experts, DP 2")]
    layouts += [
        layout(**EXPERT_LAYOUTS[name][1], data__path=digits) for name in ("experts, TP 2 + SP", "experts, PP 2")
    ]
    # From the seed: not from a checkpoint.
    for fresh in run_on_ranks(_exported, 2, layouts[:2], None):
        assert all(torch.equal(fresh[0][name], tensor) for name, tensor in fresh[1].items() if ".experts." in name)
        experts = [tensor for name, tensor in fresh[0].items() if name.endswith("down_proj.weight")]
        assert len({tensor.sum().item() for tensor in experts}) == len(experts) == 4 * 8
    update = {"data": _config(digits, tmp_path).data, "run_dir": tmp_path / "run"}
    trained = layouts[0].model_copy(update=update)
    run_on_ranks(train, 2, trained)
    for exported in run_on_ranks(_exported, 2, layouts, trained.run_dir):
        for tensors in exported:
            assert isinstance(tensors, dict), tensors
            assert tensors.keys() == exported[0].keys()
            assert not [name for name, tensor in tensors.items() if not torch.equal(tensor, exported[0][name])]


def test_a_position_table_of_another_tile_size_is_interpolated(digits: Path, tmp_path: Path) -> None:
    config = _config(digits, tmp_path / "run")
    # Saved by ranks that each hold the whole ViT.
    vision = config.model.vision.model_copy(update={"parallel": "data"})
    update = {
        "model": config.model.model_copy(update={"vision": vision}),
        "parallel": config.parallel.model_copy(update={"tensor": 2}),
    }
    run_on_ranks(train, 2, config.model_copy(update=update))
    larger = tiny_config(
        model__language__vocab_size=384, model__vision__image_size=48, data__path=digits, precision="bf16"
    )
    ((tensors,),) = run_on_ranks(_exported, 1, [larger], config.run_dir)
    trained = content(config.run_dir)
    key = "model.vision_tower.vision_model.embeddings.position_embedding.weight"
    assert tensors[key].shape == (36, 64)
    assert torch.equal(tensors[key], fitted_positions(trained["vision.position_embedding.weight"], 36, "the run"))


def _train_and_tell(config: RunConfig) -> str:
    """What training says when it refuses. Runs on every rank."""
    try:
        train(config)
    except InputError as error:
        return str(error)
    return ""


def test_a_plain_optimizer_resumes_its_own_checkpoints_only(digits: Path, tmp_path: Path) -> None:
    whole, cut = _config(digits, tmp_path / "whole"), _config(digits, tmp_path / "cut")
    plain = {"optim": whole.optim.model_copy(update={"distributed": False})}
    whole, cut = whole.model_copy(update=plain), cut.model_copy(update=plain)
    run_on_ranks(train, 2, whole)
    _cut_off_after_two_steps(whole, cut)
    run_on_ranks(train, 2, cut)
    expected = content(whole.run_dir)
    assert_same(expected, content(cut.run_dir))
    longer = whole.train.model_copy(update={"steps": whole.train.steps + 1})
    other = whole.model_copy(update={"optim": whole.optim.model_copy(update={"distributed": True}), "train": longer})
    for message in run_on_ranks(_train_and_tell, 2, other):
        assert "holds the state of a plain optimizer; resume with optim.distributed=false" in message


def test_a_checkpoint_of_another_format_starts_runs_but_is_not_resumed(digits: Path, tmp_path: Path) -> None:
    config = _config(digits, tmp_path / "run")
    run_on_ranks(train, 1, config)
    checkpoint = paths.newest(config.run_dir)
    assert checkpoint is not None
    common = torch.load(checkpoint / "common.pt")
    assert common.pop("format") == FORMAT
    for stored, said in (({}, "none (imported, or older)"), ({"format": FORMAT + 1}, FORMAT + 1)):
        torch.save({**common, **stored}, checkpoint / "common.pt")
        seal(checkpoint, config.train.steps)
        (message,) = run_on_ranks(_train_and_tell, 1, config)
        assert f"{checkpoint} cannot be resumed: its format is {said}, not {FORMAT}" in message
        assert f"init_from={checkpoint}" in message
    run_on_ranks(train, 1, config.model_copy(update={"run_dir": tmp_path / "other", "init_from": checkpoint}))
