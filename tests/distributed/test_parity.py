"""Our model against transformers' classes, and every layout against a single process, in fp32."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import StepBatches
from tests.parity import against_transformers, layout_configs, one_step
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, reference_models, tiny_config

# fp32 against transformers: rounding of differently ordered sums, measured at 4e-6 on logits of about 3.
LOGITS_TOLERANCE = 1e-4
# Sums over ranks round differently; measured at 5e-7.
LOSS_TOLERANCE = 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_transformers_at_tp_1_and_tp_2(tied: bool) -> None:
    configs = [tiny_config(parallel__tensor=size, model__language__tied_embeddings=tied) for size in (1, 2)]
    for rank_results in run_on_ranks(against_transformers, 2, "cpu", configs):
        for differences in rank_results:
            assert differences["weights"] == 0.0
            assert differences["vision"] < LOGITS_TOLERANCE
            assert differences["logits"] < LOGITS_TOLERANCE


def test_every_layout_gives_the_loss_of_a_single_process(digits: Path) -> None:
    layouts = layout_configs(digits)
    single = layouts.pop("single")
    tensors = r4b_tensors(single, *reference_models(single))
    (reference,) = run_on_ranks(one_step, 1, "cpu", [single], tensors)[0]
    assert np.isfinite(reference).all()
    # The update must matter, or the comparison after it compares nothing.
    assert abs(reference[0] - reference[2]) > 100 * LOSS_TOLERANCE
    for rank_results in run_on_ranks(one_step, 2, "cpu", list(layouts.values()), tensors):
        for name, result in zip(layouts, rank_results, strict=True):
            before, grad_norm, after = np.abs(np.array(result) - np.array(reference))
            assert before < LOSS_TOLERANCE, f"{name}: loss {result[0]} against {reference[0]}"
            assert grad_norm < 1e-4 * reference[1], f"{name}: gradient norm {result[1]} against {reference[1]}"
            assert after < LOSS_TOLERANCE, f"{name}: loss after the update {result[2]} against {reference[2]}"


def test_a_pipeline_stage_with_nothing_to_train_changes_nothing(digits: Path) -> None:
    configs = []
    for name in ("single", "PP 2"):
        config = layout_configs(digits)[name]
        train = config.train.model_copy(update={"trained": ("vision", "projector")})
        configs.append(config.model_copy(update={"train": train}))
    single, pipeline = configs
    tensors = r4b_tensors(single, *reference_models(single))
    ((reference,),) = run_on_ranks(one_step, 1, "cpu", [single], tensors)
    assert abs(reference[0] - reference[2]) > 100 * LOSS_TOLERANCE
    for (result,) in run_on_ranks(one_step, 2, "cpu", [pipeline], tensors):
        assert np.abs(np.array(result) - np.array(reference)).max() < LOSS_TOLERANCE


def _one_step_of_transformers(config: RunConfig, tokenizer: ChatTokenizer) -> tuple[float, float, float]:
    """The step of tests.parity.one_step on text, by Qwen3ForCausalLM and torch's AdamW."""
    _, qwen = reference_models(config)
    # In fp32 the whole global batch fits one process; micro-batches only share it out.
    batches = StepBatches(config, tokenizer, 0, 1)[0]
    num_tokens = sum(batch.trained.sum() for batch in batches)

    def loss() -> torch.Tensor:
        total = torch.zeros(())
        for batch in batches:
            losses = F.cross_entropy(qwen(batch.ids).logits.transpose(1, 2), batch.labels, reduction="none")
            total = total + (losses * batch.trained).sum()
        return total / num_tokens

    optim = config.optim
    matrices = [parameter for parameter in qwen.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in qwen.parameters() if parameter.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        betas=(optim.beta1, optim.beta2),
        # The first step of the schedule: no warm-up, one step of the cosine done.
        lr=optim.min_lr + (optim.lr - optim.min_lr) * (1 + math.cos(math.pi / config.train.steps)) / 2,
    )
    before = loss()
    before.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(qwen.parameters(), optim.clip_grad)
    optimizer.step()
    with torch.no_grad():
        return before.item(), grad_norm.item(), loss().item()


def test_a_step_equals_transformers_and_torchs_adamw(digits: Path, tokenizer: ChatTokenizer) -> None:
    config = tiny_config(
        data__path=digits,
        data__blend="{digits/easy/thinking: 1, digits/hard/thinking: 1, digits/hard/non_thinking: 2}",
        model__language__vocab_size=384,
        train__global_batch=6,
        train__micro_batch=2,
        optim__weight_decay=0.1,
    )
    assert config.data.text_only
    assert config.train.trained == ("language",)
    tensors = r4b_tensors(config, *reference_models(config))
    ((ours,),) = run_on_ranks(one_step, 1, "cpu", [config], tensors)
    theirs = _one_step_of_transformers(config, tokenizer)
    assert abs(theirs[0] - theirs[2]) > 100 * LOSS_TOLERANCE
    before, grad_norm, after = np.abs(np.array(ours) - np.array(theirs))
    assert before < LOSS_TOLERANCE
    assert grad_norm < 1e-4 * theirs[1]
    assert after < LOSS_TOLERANCE
