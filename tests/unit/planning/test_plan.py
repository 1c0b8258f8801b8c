"""The plan: what it counts, what it refuses, what it proposes, and its page."""

import dataclasses
from pathlib import Path

import pytest

from megatron_mm.cli import main
from megatron_mm.config.flops import training_flops
from megatron_mm.config.layout import layout_faults
from megatron_mm.config.load import load_config
from megatron_mm.config.schema import RunConfig
from megatron_mm.models.attention import SHORT_SEQUENCE
from megatron_mm.planning import activations
from megatron_mm.planning.gpus import GPUS, find_gpu
from megatron_mm.planning.load import Load, LoadOptions, assumed_load
from megatron_mm.planning.memory import stage_memory
from megatron_mm.planning.parameters import model_parameters
from megatron_mm.planning.propose import Machine, overrides, proposals
from megatron_mm.planning.steptime import step_time
from megatron_mm.planning.traffic import traffic
from tests.plan_page import PAGE, renewed

LOAD = Load(16384, 16384**2 / 8, 8, 16, 4096)
H100 = find_gpu("h100")


def _config(*more: str) -> RunConfig:
    settings = ["run_dir=x", "train={steps: 10, global_batch: 64, micro_batch: 1}", "optim={lr: 1}", "data.packed=true"]
    return load_config("r4b/base", overrides=[*settings, *more])


def test_r4b_has_the_parameters_that_its_paper_lists() -> None:
    # arXiv 2508.21113v2, appendix B.1: 4.82 B.
    assert sum(model_parameters(_config().model).values()) == pytest.approx(4.8187e9, rel=1e-5)


def test_a_full_pack_is_pictures_and_trained_text() -> None:
    config = _config()
    load = assumed_load(config, LoadOptions())
    patches = config.model.vision.patches_per_tile
    assert load.trained_tokens + load.tiles * patches <= load.tokens < load.trained_tokens + (load.tiles + 1) * patches
    assert assumed_load(_config("data.max_pack_tiles=9"), LoadOptions()).tiles == 9
    assert assumed_load(config, LoadOptions(tiles_per_pack=3)).tiles == 3
    assert load.squared_tokens == load.tokens**2 / 8


def test_lengths_up_to_which_scores_are_held_are_the_models() -> None:
    held = {dtype.itemsize: tokens for dtype, tokens in SHORT_SEQUENCE.items()}
    assert held == activations.SHORT_SEQUENCE


def test_operations_of_a_step() -> None:
    config = _config()
    model, width = config.model, 2560
    once = training_flops(model, config.train.trained).of(16384, 16384**2 / 8, 16, 0)
    output = 3 * 2 * width * 151936 * 4096
    time = step_time(config, 8, H100, LOAD, 0.5)
    assert time.model_flops == pytest.approx(64 * (once + output))
    # Logits of 4,096 tokens are made in blocks, and once more for the backward pass.
    blocks = 64 * output / 3
    assert time.recomputed_flops == pytest.approx(blocks)
    assert time.compute_seconds == pytest.approx((time.model_flops + blocks) / 8 / (989e12 * 0.5))
    full = step_time(_config("train.recompute=full"), 8, H100, LOAD, 0.5)
    # A forward pass more of three, but for the projector and the output layer.
    layers = training_flops(model, ()).of(16384, 16384**2 / 8, 16, 0)
    projector = 2 * 729 * 16 * (1152 + 2560) * 2560
    patches = 2 * 729 * 16 * 3 * 14**2 * 1152
    assert full.recomputed_flops == pytest.approx(64 * (layers - projector - patches) + blocks)
    selective = step_time(_config("train.recompute=selective"), 8, H100, LOAD, 0.5).recomputed_flops
    assert blocks < selective < blocks + 64 * layers / 4
    # Each of two context-parallel ranks encodes all tiles.
    tiles = training_flops(model, config.train.trained).of(0, 0, 16, 0)
    context = step_time(_config("parallel.context=2"), 8, H100, LOAD, 0.5)
    assert context.recomputed_flops == pytest.approx(64 * tiles + blocks)
    # Few tokens' logits are made whole, once.
    few = step_time(config, 8, H100, Load(16384, 16384**2 / 8, 8, 16, 256), 0.5)
    assert few.recomputed_flops == pytest.approx(0, abs=1e-9 * few.model_flops)


def test_gradients_are_sent_while_the_last_micro_batch_computes() -> None:
    parameters = sum(model_parameters(_config().model).values())
    time, apart = (
        step_time(_config(), 8, H100, LOAD, 0.5),
        step_time(_config("optim.overlap=false"), 8, H100, LOAD, 0.5),
    )
    # fp32 gradients over NVLink at 80% of 450 GB/s; weights are gathered when the update is done.
    gradients = 4 * parameters * 7 / 8 / (0.8 * 450e9)
    assert time.hidden_seconds == pytest.approx(gradients)
    assert (time.traffic_seconds, apart.hidden_seconds) == (apart.traffic_seconds, 0)
    assert apart.seconds - time.seconds == pytest.approx(gradients)
    # Behind a slow network no more is hidden than the backward pass of a micro-batch takes, about two thirds of it.
    slow = dataclasses.replace(H100, nvlink_gbytes=1)
    hidden = step_time(_config(), 8, slow, LOAD, 0.5)
    assert hidden.hidden_seconds == pytest.approx(hidden.compute_seconds / 8 * 2 / 3, rel=0.02)
    plain = step_time(_config("optim.distributed=false"), 8, H100, LOAD, 0.5)
    assert plain.hidden_seconds == pytest.approx(plain.traffic_seconds)


def test_interleaving_shrinks_the_bubble() -> None:
    pipeline = step_time(_config("parallel.pipeline=4"), 8, H100, LOAD, 0.4)
    interleaved = step_time(_config("parallel.pipeline=4", "parallel.virtual_pipeline=3"), 8, H100, LOAD, 0.4)
    # (p - 1) / (v m + p - 1) of the time (Narayanan et al., arXiv 2104.04473, section 2.2), with m = 32.
    assert pipeline.bubble_share == pytest.approx(3 / 35)
    assert interleaved.bubble_share == pytest.approx(3 / 99)


def test_traffic_of_single_kinds() -> None:
    stream = 2 * 2560 * 16384

    def flows(num_ranks: int, *more: str) -> dict[str, tuple[str, float]]:
        return {flow.kind: (flow.link, flow.step_bytes) for flow in traffic(_config(*more), num_ranks, LOAD)}

    parameters = sum(model_parameters(_config().model).values())
    assert flows(1) == {}
    assert flows(8) == {"data": ("nvlink", pytest.approx(6 * parameters * 7 / 8))}
    assert flows(16)["data"] == ("network", pytest.approx(6 * parameters * 15 / 16))
    assert flows(8, "optim.distributed=false")["data"][1] == pytest.approx(8 * parameters * 7 / 8)
    # 64 micro-batches, both ways; the middle stages send both.
    assert flows(8, "parallel.pipeline=8")["pipeline"] == ("nvlink", pytest.approx(64 * 2 * stream))
    assert flows(16, "parallel.pipeline=8", "train.global_batch=128")["pipeline"][0] == "network"
    tensor = flows(2, "parallel.tensor=2")["tensor"]
    language = 64 * 36 * 8 * stream / 2
    assert tensor[0] == "nvlink"
    assert language < tensor[1] < 1.4 * language
    # 36 layers, keys and values of half the tokens, once forward and twice backward.
    context = flows(2, "parallel.context=2")["context"]
    assert context == ("nvlink", pytest.approx(64 * 36 * 3 * 2 * 2 * 1024 * 8192))


def _stage(stage: int, *more: str):
    return stage_memory(_config("parallel.pipeline=4", *more), 8, LOAD, "te", stage)


def test_a_stage_keeps_as_many_micro_batches_as_stages_are_behind_it() -> None:
    split = "parallel.pipeline_layers=[9, 9, 9, 9]"
    kept = [_stage(stage, split).language for stage in range(4)]
    assert [size / kept[3] for size in kept] == pytest.approx([4, 3, 2, 1])
    assert _stage(0, split).vision > 0
    assert _stage(1, split).vision == 0
    # Two micro-batches a rank fill no pipeline of four.
    short = [_stage(stage, split, "train.global_batch=4").language for stage in range(4)]
    assert [size / kept[3] for size in short] == pytest.approx([2, 2, 2, 1])


def test_interleaving_keeps_more() -> None:
    split = "parallel.pipeline_layers=[9, 9, 9, 9]"
    chunks = ("parallel.virtual_pipeline=3", "parallel.pipeline_layers=[3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3]")
    # Megatron-Core's warm-up of the first stage: 2 * 3 + 2 * 4 chunks, and the one that follows, of a third each.
    assert _stage(0, *chunks).language / _stage(3, split).language == pytest.approx(15 / 3)


def test_frozen_modules_have_neither_gradients_nor_optimizer() -> None:
    memory = stage_memory(_config("train.trained=[projector]"), 8, LOAD, "te", 0)
    projector = model_parameters(_config().model)["projector"]
    assert memory.gradients == 4 * projector
    assert memory.optimizer == 12 * projector / 8


def test_proposals_run_fit_and_come_fastest_first() -> None:
    machine, config = Machine(find_gpu("a100"), 16, 0.9, 0.4), _config()
    found = proposals(config, machine, LOAD, 5)
    assert len(found) == 5
    for candidate in found:
        again = _config(*overrides(candidate.config, config).split())
        assert again == candidate.config
        assert not layout_faults(again, 16)
        assert candidate.memory.total <= machine.usable_bytes
    seconds = [candidate.time.seconds for candidate in found]
    assert seconds == sorted(seconds)
    tiny = dataclasses.replace(GPUS["a100"], memory_gib=1)
    assert proposals(config, dataclasses.replace(machine, gpu=tiny), LOAD, 5) == []


def test_a_proposal_undoes_what_the_recipe_says() -> None:
    given = _config("parallel.tensor=2", "train.recompute=full", "parallel.pipeline_layers=[18, 18]")
    one = _config()
    assert overrides(one, given) == (
        "parallel.tensor=1 parallel.pipeline_layers=null train.recompute=none train.micro_batch=1"
    )
    assert overrides(given, one).split()[1] == "parallel.pipeline_layers=[18,18]"
    settings = ["parallel.tensor=2", "train.recompute=full", "parallel.pipeline_layers=[18, 18]"]
    assert _config(*settings, *overrides(one, given).split()) == one


def _plan(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    settings = ["run_dir=x", "train={steps: 10, global_batch: 64, micro_batch: 1}", "optim={lr: 1}", "data.packed=true"]
    code = main(["plan", "r4b/base", *settings, *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_says_what_does_not_fit_and_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _plan(capsys, "--gpus", "8", "--gpu", "h100")
    assert code == 2
    assert "DOES NOT FIT" in out
    assert "does not fit h100: a rank of pipeline stage 0 needs" in err
    assert "the largest part is activations of the language model" in err
    layout = err.split("the fastest layout that fits: ")[1].split()
    code, out, err = _plan(capsys, "--gpus", "8", "--gpu", "h100", *layout)
    assert (code, err) == (0, "")
    assert "that it may take: fits" in out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--gpus", "8", "--gpu", "v100"), "--gpu v100 is not known; choose one of a100, h100, h200"),
        (("--gpus", "8", "--gpu", "h100", "--utilisation", "40"), "--utilisation 40.0 is not above 0 and at most 1"),
        (("--gpus", "8", "--gpu", "h100", "--trained-share", "0"), "--trained-share 0.0 is not above 0 and at most 1"),
        (("--gpus", "0", "--gpu", "h100"), "--gpus 0 is below 1"),
        (("--gpus", "2000000", "--gpu", "h100"), "--gpus 2000000 is above 1,000,000"),
        (
            ("--gpus", "8", "--gpu", "h100", "parallel.tensor=3"),
            "parallel.tensor=3 does not divide model.language.num_heads=32",
        ),
    ],
)
def test_wrong_options_are_named(capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str) -> None:
    code, out, err = _plan(capsys, *more)
    assert (code, out) == (2, "")
    assert message in err


def test_a_name_in_capitals_is_the_same_gpu() -> None:
    assert find_gpu("H100") is GPUS["h100"]


def test_a_number_of_gpus_that_nothing_fits_is_told_the_next_lower_that_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, err = _plan(capsys, "--gpus", "9", "--gpu", "h200", "train.global_batch=16")
    assert (code, out) == (2, "")
    layout = err.split("with 8 GPUs, the fastest layout that fits: ")[1].split()
    code, _, err = _plan(capsys, "--gpus", "8", "--gpu", "h200", "train.global_batch=16", *layout)
    assert (code, err) == (0, "")


def test_the_page_shows_what_the_command_prints() -> None:
    text = Path(PAGE).read_text(encoding="utf-8")
    assert renewed(text) == text, "docs/plan.md is out of date: python -m tests.plan_page"
