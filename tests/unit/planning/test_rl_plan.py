"""The plan of reinforcement learning: what is drawn, memory and time by hand, what is refused, every recipe."""

from dataclasses import replace

import pytest

from megatron_mm.cli import main
from megatron_mm.config.errors import InputError
from megatron_mm.config.load import load_config, recipe_names
from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.gpus import GPUS
from megatron_mm.planning.propose import Machine
from megatron_mm.planning.rl_memory import PHASES, PROCESS_BYTES, forward_config, trainer_memory, update_config
from megatron_mm.planning.rl_propose import RLCandidate, assess_rl, rl_faults, rl_overrides, rl_proposals
from megatron_mm.planning.rl_steptime import (
    HOST_EFFICIENCY,
    MEMORY_EFFICIENCY,
    STEP_SECONDS,
    SUM_SECONDS,
    SYNC_PASSES,
)
from megatron_mm.planning.rollout import RolloutOptions, memory_loads, rollouts_of_run, sequence_load, side_by_side
from megatron_mm.planning.steptime import step_time

GIB = 2.0**30
H100 = Machine(GPUS["h100"], 32, 0.9, 0.4)
# Prompts of 512 tokens, responses of 1,024.
OPTIONS = RolloutOptions(prompt_tokens=512, response_tokens=1024)
PARAMETERS = 4_818_682_400


def _config(*more: str, recipe: str = "r4b/bpo") -> RunConfig:
    return load_config(recipe, overrides=more)


def _assess(*more: str, options: RolloutOptions = OPTIONS, machine: Machine = H100) -> RLCandidate:
    return assess_rl(_config(*more), machine, options)


def test_what_a_step_draws() -> None:
    (rollouts,) = rollouts_of_run(_config(), OPTIONS)
    assert rollouts.num_responses == 512 * 8 * 2
    assert rollouts.drawn_tokens == 512 * 8 * 2 * 1024
    (assumed,) = rollouts_of_run(_config(), RolloutOptions())
    # A quarter of 8,192; two tiles of 27 x 27 patches and a question.
    assert (assumed.response_tokens, assumed.prompt_tokens) == (2048, 2 * 729 + 128)
    (_, second) = rollouts_of_run(_config(recipe="vision_r1/ptst"), replace(OPTIONS, response_tokens=5000))
    assert (second.num_responses, second.response_tokens) == (512 * 8, 5000)
    (first, _) = rollouts_of_run(_config(recipe="vision_r1/ptst"), replace(OPTIONS, response_tokens=5000))
    assert (first.num_responses, first.response_tokens) == (512 * 16, 4096)
    # A response ends where the sequence does.
    (cut,) = rollouts_of_run(_config(), RolloutOptions(prompt_tokens=12_384))
    assert cut.longest_response == 4000


def test_packs_are_made_of_prompts_and_responses() -> None:
    config = _config()
    (rollouts,) = rollouts_of_run(config, replace(OPTIONS, prompt_tokens=1024))
    load = sequence_load(config, rollouts, 1024, None)
    assert (load.tokens, load.num_samples, load.trained_tokens) == (16384, 8, 8192)
    assert load.tiles == 8  # one of each prompt, which is no tile of 729 patches but for 295 tokens
    assert load.squared_tokens == 16384 * 2048
    assert sequence_load(config, rollouts, 1024, 3).tiles == 3
    # 8,192 responses of 2,048 tokens are 1,024 packs, 256 an update, 8 on each of 32 ranks.
    assert update_config(config, 32, rollouts).train.global_batch == 256
    assert update_config(config, 96, rollouts).train.global_batch == 288


def test_packs_of_the_longest_responses_are_mostly_trained() -> None:
    config = _config()
    (rollouts,) = rollouts_of_run(config, RolloutOptions())
    load = sequence_load(config, rollouts, rollouts.longest_response, None)
    assert 0.8 < load.trained_tokens / load.tokens < 0.95


def test_a_rank_holds_what_the_phases_say() -> None:
    memory = _assess().memory
    weights, held = 2.0 * PARAMETERS, {phase: memory.held(phase) for phase in PHASES}
    assert [held[phase]["weights"] for phase in PHASES] == [weights] * 3
    assert [held[phase]["gradients"] for phase in PHASES] == [0, 2 * weights, 2 * weights]
    # fp32 weights and two moments, over 32 ranks.
    assert [held[phase]["optimizer"] for phase in PHASES] == [0, 6 * weights / 32, 6 * weights / 32]
    assert [held[phase]["reference"] for phase in PHASES] == [0, weights, 0]
    assert [held[phase]["engine"] for phase in PHASES] == [weights, 0, 0]
    assert [held[phase]["graphs"] for phase in PHASES] == [2 * GIB] * 3
    assert held["scoring"]["language"] == 0 < held["updating"]["language"]
    # The cache takes what is left.
    assert memory.total("drawing") == pytest.approx(H100.usable_bytes)
    stays = _assess("rl.rollout.offload=false").memory
    assert [stays.held(phase)["reference"] for phase in PHASES] == [weights] * 3
    assert memory.cache - stays.cache == pytest.approx(weights * (2 + 6 / 32 + 1))
    given = _assess("rl.rollout.cache_gib=20").memory
    assert given.cache == 20 * GIB
    halved = _assess("rl.rollout.cache_gib=20", "rl.rollout.ranks=2").memory
    assert halved.engine == given.engine / 2
    assert _assess("rl.objective.kl=none").memory.reference == 0


def test_long_responses_take_more_memory_than_short_ones_in_an_update() -> None:
    short, long = (
        _assess(
            f"rl.stages.0.max_response_tokens={tokens}",
            "train.recompute=none",
            options=RolloutOptions(prompt_tokens=512),
        ).memory
        for tokens in (512, 8192)
    )
    assert 0 < short.trainer.output < long.trainer.output


def test_the_worst_stage_counts() -> None:
    both = assess_rl(_config(recipe="vision_r1/ptst"), H100, RolloutOptions())
    assert len(both.times) == 2
    assert both.run_seconds == sum(100 * time.seconds for time in both.times)
    stages = [
        "{steps: 100, max_response_tokens: 4096, group_size: 16}",
        "{steps: 100, max_response_tokens: 8192, group_size: 8}",
    ]

    def total(*which: str) -> float:
        given = [f"rl.stages=[{', '.join(which)}]", f"train.steps={100 * len(which)}", "train.recompute=none"]
        return assess_rl(_config(*given, recipe="vision_r1/ptst"), H100, RolloutOptions()).memory.trainer.total

    alone = [total(stage) for stage in stages]
    assert max(alone) > min(alone)
    assert total(*stages) == total(*reversed(stages)) == max(alone)


def test_a_host_holds_what_its_ranks_put_there() -> None:
    weights = 2.0 * PARAMETERS
    host = _assess().host
    assert host == {
        "optimizer": pytest.approx(8 * 6 * weights / 32),
        "reference": 8 * weights,
        "engine": 2 * 8 * weights,
        "checkpoint": pytest.approx(8 * 6 * weights / 32 + weights),
        "processes": 8 * PROCESS_BYTES,
    }
    stays = _assess("rl.rollout.offload=false", "checkpoint.asynchronous=false").host
    assert (stays["optimizer"], stays["reference"], stays["checkpoint"]) == (0, 0, 0)
    few = assess_rl(_config(), replace(H100, num_gpus=4), OPTIONS).host
    assert few["reference"] == 4 * weights


def test_responses_side_by_side() -> None:
    config = _config()
    (rollouts,) = rollouts_of_run(config, OPTIONS)
    # 36 layers of 8 heads of 128 in bf16, keys and values: 147,456 bytes a token; 512 / 8 + 1,024 tokens a response.
    held = 147_456 * 1088.0
    assert side_by_side(config, 32, rollouts, 100 * held) == pytest.approx(100)
    assert side_by_side(config, 32, rollouts, 1000 * held) == 256  # rl.rollout.max_sequences, and an engine's share
    assert side_by_side(config, 64, rollouts, 1000 * held) == 128  # 8,192 responses over 64 engines
    assert side_by_side(config, 32, rollouts, 0.5 * held) == 1
    assert side_by_side(_config("rl.rollout.ranks=2"), 32, rollouts, 100 * held) == pytest.approx(200)


def test_time_of_drawing() -> None:
    (given,) = _assess(options=replace(OPTIONS, draw_rate=4000)).times
    assert given.drawing == 512 * 8 * 2 * 1024 / 32 / 4000
    bandwidth = 3350e9 * MEMORY_EFFICIENCY
    # 256 responses of an engine, 128 at a time: twice the mean length in steps, and the longest one's tail.
    (time,) = _assess(f"rl.rollout.cache_gib={128 * 147_456 * 1088 / GIB}").times
    assert time.side_by_side == pytest.approx(128, rel=1e-6)
    steps = 2 * 1024 + 8192 - 1024
    read = 2 * (3_633_511_936 + 151_936 * 2560)
    keys = 256 * (512 * 1024 + 1024**2) * 147_456
    assert time.drawing == pytest.approx(steps * (STEP_SECONDS + read / bandwidth) + keys / bandwidth)
    (pairs,) = _assess(f"rl.rollout.cache_gib={64 * 147_456 * 1088 / GIB}", "rl.rollout.ranks=2").times
    steps += 2 * 1024  # 512 responses, 128 at a time
    sums = steps * 2 * 36 * SUM_SECONDS
    assert pairs.drawing == pytest.approx(steps * (STEP_SECONDS + read / 2 / bandwidth) + keys / bandwidth + sums)


def test_time_of_the_other_phases() -> None:
    config = _config()
    (time,) = assess_rl(config, H100, OPTIONS).times
    (rollouts,) = rollouts_of_run(config, OPTIONS)
    update, load = update_config(config, 32, rollouts), sequence_load(config, rollouts, 1024, None)
    seconds = [step_time(one, 32, H100.gpu, load, 0.4).seconds for one in (update, forward_config(update))]
    assert time.updating == 4 * seconds[0]
    assert time.scoring == 4 * 2 * seconds[1]  # policy and reference
    (alone,) = _assess("rl.objective.kl=none").times
    assert alone.scoring == 4 * seconds[1]
    weights = 2 * PARAMETERS
    # The optimizer's share there and back, the reference once an update.
    assert time.offloading == pytest.approx((2 * 6 * weights / 32 + 4 * weights) / (64e9 * HOST_EFFICIENCY))
    assert time.syncing == pytest.approx(SYNC_PASSES * weights / (3350e9 * MEMORY_EFFICIENCY))
    (stays,) = _assess("rl.rollout.offload=false").times
    assert stays.offloading == 0
    (gathered,) = _assess("parallel.tensor=2").times
    assert gathered.syncing == pytest.approx(time.syncing + weights / 2 / (450e9 * 0.8))
    assert time.seconds == time.drawing + time.offloading + time.scoring + time.updating + time.syncing


def test_a_forward_pass_is_a_third_of_a_step_and_sends_half_of_what_tensor_parallelism_does() -> None:
    config = _config("parallel.tensor=2", "train.recompute=none")
    (rollouts,) = rollouts_of_run(config, OPTIONS)
    update = update_config(config, 32, rollouts)
    load = sequence_load(config, rollouts, 1024, 4)
    learns, scores = (step_time(one, 32, H100.gpu, load, 0.4) for one in (update, forward_config(update)))
    assert scores.recomputed_flops == pytest.approx(0, abs=1e-6 * scores.model_flops)
    assert 2.9 < learns.model_flops / scores.model_flops < 3.0  # nothing learns before the patches
    sent = [{flow.kind: flow.step_bytes for flow in time.flows} for time in (learns, scores)]
    assert set(sent[0]) == {"tensor", "data"}
    assert set(sent[1]) == {"tensor"}
    assert sent[0]["tensor"] / sent[1]["tensor"] == pytest.approx(2, rel=0.05)


# Bases are no runs.
RUNS = [name for name in recipe_names() if not name.endswith("/base")]
RECIPES = [name for name in RUNS if load_config(name).rl is not None]


def test_all_recipes_of_reinforcement_learning_are_known() -> None:
    assert set(RECIPES) >= {"r4b/bpo", "r4b/grpo", "vision_r1/ptst", "vision_r1/long", "vision_r1/zero", "mini/bpo"}


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_every_recipe_fits_as_it_is(recipe: str, gpu: str) -> None:
    config, machine = load_config(recipe), replace(H100, gpu=GPUS[gpu])
    assert rl_faults(config, 32) == []
    candidate = assess_rl(config, machine, RolloutOptions())
    assert candidate.fits(machine, GPUS[gpu].host_memory_gib * GIB)
    assert config.rl is not None
    assert len(candidate.times) == len(config.rl.stages)
    assert all(time.seconds > 0 and time.side_by_side >= 1 for time in candidate.times)


def test_proposals_can_be_given_fit_and_come_fastest_first() -> None:
    config = _config()
    found = rl_proposals(config, H100, OPTIONS, 2048 * GIB, 4)
    assert len(found) == 4
    for candidate in found:
        again = _config(*rl_overrides(candidate.config, config).split())
        assert again == candidate.config
        assert candidate.fits(H100, 2048 * GIB)
        assert assess_rl(again, H100, OPTIONS).run_seconds == candidate.run_seconds
    seconds = [candidate.run_seconds for candidate in found]
    assert seconds == sorted(seconds)
    assert rl_proposals(config, replace(H100, gpu=replace(GPUS["h100"], memory_gib=1)), OPTIONS, 2048 * GIB, 4) == []


@pytest.mark.parametrize(
    "changes",
    [
        ("model.language.num_heads=9", "model.language.num_kv_heads=3", "model.language.head_dim=128"),
        ("precision=fp32", "rl.rollout.offload=false"),
    ],
)
def test_proposals_are_configs_that_can_be(changes: tuple[str, ...]) -> None:
    config = _config(*changes)
    found = rl_proposals(config, H100, OPTIONS, 2048 * GIB, 100)
    assert found
    for candidate in found:
        _config(*changes, *rl_overrides(candidate.config, config).split())


def test_scores_have_a_worst_sequence_of_their_own() -> None:
    """Long responses fill an update with logits, short ones a forward pass with images."""
    config = _config("train.recompute=none", "parallel.tensor=4")
    loads = memory_loads(config, RolloutOptions(prompt_tokens=3000, response_tokens=64))
    alone = [trainer_memory(config, 32, [load], "te") for load in loads]
    _, update, score = trainer_memory(config, 32, loads, "te")
    *_, of_worst_update = max(alone, key=lambda found: found[1].total)
    assert of_worst_update.total < 0.97 * score.total
    assert update.total == max(update.total for _, update, _ in alone)
    assert score.total == max(score.total for *_, score in alone)


def test_more_cache_draws_no_slower() -> None:
    seconds = [_assess(f"rl.rollout.cache_gib={gib}").times[0].drawing for gib in (5, 10, 20, 40)]
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > seconds[-1]


def _plan(capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str, str]:
    code = main(["plan", "r4b/bpo", "--gpus", "8", "--gpu", "h100", *more])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_prints_memory_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _plan(capsys, "--draw-rate", "3000")
    assert (code, err) == (0, "")
    assert "drawing   scoring  updating" in out
    assert "at 3,000 tokens/s a GPU" in out
    assert "side by side in an engine" in out
    assert "an assumption, not a measurement" not in out


def test_the_command_says_what_does_not_fit_and_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _plan(capsys, "rl.rollout.cache_gib=60")
    assert code == 2
    assert "DOES NOT FIT" in out
    assert "does not fit h100 while drawing: a rank of pipeline stage 0 needs" in err
    assert "more than the 71.6 that it may take; the largest component is engine's keys and values, 60.0 GiB" in err
    settings = err.split("the fastest settings that fit: ")[1].split()
    code, out, err = _plan(capsys, *settings)
    assert (code, err) == (0, "")


def test_the_command_says_that_a_host_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = _plan(capsys, "--host-memory", "150")
    assert code == 2
    assert "does not fit the host: a node needs" in err
    assert "more than the 150.0 that it has (--host-memory)" in err
    assert "rl.rollout.offload=true" not in err.split("the fastest settings that fit: ")[1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ("--prompt-tokens", "20000"),
            "--prompt-tokens 20000 leaves no room for a response in data.max_sequence_tokens",
        ),
        (("--response-tokens", "9000"), "--response-tokens 9000 is above max_response_tokens=8192 of every stage"),
        (("--response-tokens", "0"), "--response-tokens 0 is below 1"),
        (("--draw-rate", "0"), "--draw-rate 0 is not above 0"),
        (("--tiles-per-pack", "-5"), "--tiles-per-pack -5 is below 0"),
        (("--host-memory", "-1"), "--host-memory -1 is not above 0"),
        (
            ("--trained-share", "0.5"),
            "--trained-share means nothing for recipe r4b/bpo, which is reinforcement learning",
        ),
        (("rl.rollout.ranks=16",), "rl.rollout.ranks=16 does not divide the 8 ranks of a machine"),
        (("rl.rollout.cache_gib=2",), "rl.rollout.cache_gib=2.0 holds no sequence of data.max_sequence_tokens=16384"),
        (("model.language={preset: qwen3-30b-a3b}",), "the model has experts"),
        (("fp8.recipe=tensorwise",), "fp8.recipe=tensorwise keeps copies of the weights in 8 bits"),
    ],
)
def test_what_cannot_be_is_named(capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str) -> None:
    code, _, err = _plan(capsys, *more)
    assert code == 2
    assert message in err


def test_options_of_drawing_mean_nothing_for_supervised_training(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["plan", "r4b/stage3", "--gpus", "8", "--gpu", "h200", "--draw-rate", "5"])
    assert code == 2
    assert "--draw-rate means nothing for recipe r4b/stage3, which is supervised training" in capsys.readouterr().err


def test_lengths_are_checked_before_anything_is_planned() -> None:
    with pytest.raises(InputError, match="--prompt-tokens 0 is below 1"):
        rollouts_of_run(_config(), RolloutOptions(prompt_tokens=0))
