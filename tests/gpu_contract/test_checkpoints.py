"""A checkpoint of either backend loads into the other's modules, every value equal to the bit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.checkpoint import paths, store
from megatron_mm.config.schema import RunConfig
from megatron_mm.convert.importing import ImportOptions, import_model
from megatron_mm.models.vlm import VisionLanguageModel, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform.cpu import CpuPlatform
from megatron_mm.train.assemble import Trainee, build_trainee
from megatron_mm.train.loop import train
from tests.conversion import save_with_transformers
from tests.gpu_contract.gpu_stand_in import TransformerEnginePlatform, seen_gpu
from tests.ranks import run_alone, run_on_ranks
from tests.tiny import digits_config

pytestmark = pytest.mark.gpu_contract

LOCAL, GPU = CpuPlatform(), TransformerEnginePlatform()
PROGRESS = {"said": "by the test"}
DELAYED = {"precision": "bf16", "fp8__recipe": "delayed", "fp8__amax_history": 16}


@contextmanager
def _ranks(config: RunConfig) -> Iterator[ProcessGroupCollection]:
    with state.process_group(LOCAL), state.model_parallel(config.parallel, seed=0) as groups:
        yield groups


def _built(config: RunConfig, platform: CpuPlatform, groups: ProcessGroupCollection) -> list[VisionLanguageModel]:
    """The model with weights that no checkpoint has."""
    with seen_gpu():
        chunks = build_model(config, platform, groups, image_token=5)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(torch.nan)
    return chunks


def _tensors(chunks: list[VisionLanguageModel]) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for chunk in chunks for name, parameter in chunk.named_parameters()}


def _unequal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    assert len(one) > 50
    return [name for name in one if not torch.equal(one[name], other[name])]


def _initial(config: RunConfig, run_dir: Path) -> list[str]:
    """Weights that differ between both backends' modules after `init_from`."""
    with _ranks(config) as groups:
        models = [_built(config, platform, groups) for platform in (LOCAL, GPU)]
        for chunks in models:
            store.load_weights(run_dir, chunks)
        return _unequal(*map(_tensors, models))


@pytest.mark.parametrize("tied", ["true", "false"])
def test_an_imported_checkpoint_starts_a_run_on_gpus(
    tied: str, digits: Path, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    config = digits_config(digits, tmp_path / "run", precision="bf16", model__language__tied_embeddings=tied)
    save_with_transformers(tmp_path / "model", config, tokenizer)
    run_alone(import_model, ImportOptions(tmp_path / "imported", {"whole": tmp_path / "model"}))
    assert run_on_ranks(_initial, 1, config, tmp_path / "imported") == [[]]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_goes_on_with_the_other_backend(precision: str, digits: Path, tmp_path: Path) -> None:
    config = digits_config(digits, tmp_path / "run", train__steps=2, precision=precision)
    run_on_ranks(train, 1, config)
    checkpoint = paths.newest(config.run_dir)
    assert checkpoint is not None
    assert run_on_ranks(_initial, 1, config, config.run_dir) == [[]]
    assert run_on_ranks(_there_and_back, 1, config, checkpoint, tmp_path / "back") == [[]]


def _there_and_back(config: RunConfig, checkpoint: Path, back: Path) -> list[str]:
    """What differs after the local backend's checkpoint was resumed by the other's modules, saved, and resumed here."""
    with _ranks(config) as groups:
        found = []
        for platform in (LOCAL, GPU, LOCAL):
            trainee = build_trainee(config, _built(config, platform, groups), groups)
            progress = store.resume(checkpoint, trainee.chunks, trainee.optimizer)
            found.append({**_tensors(trainee.chunks), **_optimizer_tensors(trainee)})
            if platform is GPU:
                store.write(back, 2, store.content_of(2, trainee.chunks, trainee.optimizer, progress))
                checkpoint = store.find(back)
        return _unequal(found[0], found[1]) + _unequal(found[0], found[2])


def _optimizer_tensors(trainee: Trainee) -> dict[str, torch.Tensor]:
    """Master weights and Adam's moments, numbered in the order in which the optimizer holds them."""
    parts = trainee.optimizer.chained_optimizers
    states = [dict(enumerate(part.optimizer.state.values())) for part in parts]
    assert all("exp_avg_sq" in of_one for of_part in states for of_one in of_part.values())
    held = nested_values([trainee.optimizer.state_dict(), states])
    return {
        f"optimizer {number}": value.clone() for number, value in enumerate(held) if isinstance(value, torch.Tensor)
    }


def test_delayed_scaling_goes_on_with_what_it_remembers(digits: Path, tmp_path: Path) -> None:
    config = digits_config(digits, tmp_path / "run", **DELAYED)
    other = digits_config(digits, tmp_path / "run", precision="bf16")
    ((num_modules, resumed, fresh, weights),) = run_on_ranks(_history, 1, config, other)
    assert num_modules > 10
    assert resumed == []
    # Other weights begin with a history of their own, and other recipes have none.
    assert fresh == num_modules
    assert weights == []


def _history(config: RunConfig, other: RunConfig) -> tuple[int, list[str], int, list[str]]:
    """Saves a model that has an FP8 history, and loads it in every way.

    Returns:
        Modules with a history; those that came out otherwise when it was resumed; those that have none after
        `init_from`; weights that the local backend, without FP8, resumed or started with otherwise.
    """
    # Modules ask for the GPU's kind again when they get a history.
    with _ranks(config) as groups, seen_gpu():
        trainee = build_trainee(config, _built(config, GPU, groups), groups)
        # Adam's moments are there from the first update on.
        trainee.optimizer.prepare_grads()
        trainee.optimizer.step_with_ready_grads()
        for parameter in _tensors(trainee.chunks).values():
            parameter.normal_()
        planted = _planted(trainee.chunks)
        store.write(config.run_dir, 1, store.content_of(1, trainee.chunks, trainee.optimizer, PROGRESS))
        checkpoint = store.find(config.run_dir)

        again = build_trainee(config, _built(config, GPU, groups), groups)
        assert store.resume(checkpoint, again.chunks, again.optimizer) == {**PROGRESS, "step": 1}
        found = _histories(again.chunks)
        resumed = [name for name, value in planted.items() if name not in found or not torch.equal(found[name], value)]

        initial = _built(config, GPU, groups)
        store.load_weights(config.run_dir, initial)
        fresh = len(planted) - len(_histories(initial))

        weights = _unequal(_tensors(initial), _tensors(trainee.chunks))
        plain = build_trainee(other, _built(other, LOCAL, groups), groups)
        ways: list[Callable[[], Any]] = [
            lambda: store.load_weights(config.run_dir, plain.chunks),
            lambda: store.resume(checkpoint, plain.chunks, plain.optimizer),
        ]
        for load in ways:
            for parameter in _tensors(plain.chunks).values():
                parameter.fill_(torch.nan)
            load()
            weights += _unequal(_tensors(plain.chunks), _tensors(trainee.chunks))
        return len(planted), resumed, fresh, weights


def _planted(chunks: list[VisionLanguageModel]) -> dict[str, torch.Tensor]:
    """Give every module with an FP8 product a history, as its first steps would; by the module's name."""
    recipe: Any = get_fp8_recipe(chunks[0].language.config)
    torch.manual_seed(1)
    for chunk in chunks:
        for module in chunk.language.modules():
            if hasattr(module, "fp8_meta") and hasattr(module, "weight"):
                of_module: Any = module
                of_module.fp8_meta.update(recipe=recipe, num_gemms=1)
                of_module.init_fp8_meta_tensors(recipe)
                of_module.fp8 = True
                for way in ("scaling_fwd", "scaling_bwd"):
                    of_module.fp8_meta[way].amax_history.uniform_()
                    of_module.fp8_meta[way].scale.uniform_()
    return _histories(chunks)


def _histories(chunks: list[VisionLanguageModel]) -> dict[str, torch.Tensor]:
    return {
        name: torch.cat([values.flatten() for way in ("fwd", "bwd") for values in _values(module.fp8_meta, way)])
        for chunk in chunks
        for name, module in chunk.named_modules()
        if "scaling_fwd" in (getattr(module, "fp8_meta", None) or {})
    }


def _values(fp8_meta: Any, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    return fp8_meta[f"scaling_{way}"].amax_history, fp8_meta[f"scaling_{way}"].scale
