"""How far our model is from transformers', vLLM's, and itself in other layouts, in fp32 with random weights."""

import tempfile
from pathlib import Path

import torch

from benchmarks.figure import Figure
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.digits import prepare_digits
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.weights.export import write_directory
from tests import onevision
from tests.answers import largest_differences, our_logprobs, sample_with_vllm
from tests.formats import FORMATS, largest_difference, same_answers, say_everywhere
from tests.layouts import (
    EXPERT_LAYOUTS,
    EXPERTS,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    LOSS_TOLERANCE,
    WEIGHT_TOLERANCE,
    Overrides,
    largest_relative,
    layout,
    outcomes,
)
from tests.onevision import onevision_config, our_logits, their_logits
from tests.parity import against_transformers
from tests.precision import losses, precision_config
from tests.ranks import run_alone, run_on_ranks
from tests.tiny import in_order, r4b_tensors, reference_models, tiny_config


def measure() -> list[Figure]:
    """The comparisons of tests/distributed/test_{parity,onevision,layouts}.py and of tests/contract."""
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder) / "digits"
        prepare_digits(digits, num_train=60, num_heldout=20, seed=0)
        tokenizer = ChatTokenizer(digits / TOKENIZER)
        return [
            *_transformers(),
            *_onevision(tokenizer),
            *_layouts(tokenizer),
            _precision(digits),
            *_vllm(tokenizer, Path(folder) / "model"),
            *_formats(digits, Path(folder)),
        ]


def _transformers() -> list[Figure]:
    sizes = (1, 2)
    configs = [tiny_config(parallel__tensor=size) for size in sizes]
    figures = []
    for size, found in zip(sizes, run_on_ranks(against_transformers, 2, "cpu", configs)[0], strict=True):
        for what in ("vision", "logits"):
            name = {"vision": "SiglipVisionModel, features", "logits": "Qwen3ForCausalLM, logits"}[what]
            figures.append(Figure(f"transformers' {name}, TP {size}", found[what], "max abs difference", 1e-4))
    return figures


def _onevision(tokenizer: ChatTokenizer) -> list[Figure]:
    config = onevision_config()
    tensors = r4b_tensors(config, *reference_models(config))
    theirs = their_logits(config, tokenizer)
    ((alone, packed),) = run_on_ranks(our_logits, 1, config, tensors, tokenizer.directory, "")
    name = "transformers' LlavaOnevisionForConditionalGeneration, logits"
    return [
        Figure(f"{name}, each sample alone", onevision.largest_difference(alone, theirs), "max abs difference", 1e-4),
        Figure(f"{name}, all in one pack", onevision.largest_difference(packed, theirs), "max abs difference", 1e-4),
        Figure("samples compared, 0 to 3 pictures each", len(theirs), "samples"),
    ]


def _layouts(tokenizer: ChatTokenizer) -> list[Figure]:
    return [*_matrix(tokenizer, layout(), LAYOUTS), *_matrix(tokenizer, layout(**EXPERTS), EXPERT_LAYOUTS)]


def _matrix(tokenizer: ChatTokenizer, alone: RunConfig, layouts: dict[str, tuple[int, Overrides]]) -> list[Figure]:
    """Each layout against the single process `alone`."""
    tensors = r4b_tensors(alone, *reference_models(alone))
    ((single,),) = run_on_ranks(outcomes, 1, "cpu", [alone], tensors, tokenizer.directory)
    figures = []
    for num_ranks in (1, 2, 4):
        names = [name for name, (ranks, _) in layouts.items() if ranks == num_ranks]
        configs = [layout(**layouts[name][1]) for name in names]
        results = run_on_ranks(outcomes, num_ranks, "cpu", configs, tensors, tokenizer.directory)[0]
        for name, outcome in zip(names, results, strict=True):
            losses = max(abs(ours - theirs) for ours, theirs in zip(outcome.losses, single.losses, strict=True))
            grads, weights = (
                largest_relative(outcome.grads, single.grads),
                largest_relative(outcome.weights, single.weights),
            )
            figures += [
                Figure(f"{name}: losses of three steps against one process", losses, "max abs, nats", LOSS_TOLERANCE),
                Figure(f"{name}: worst parameter's gradient", grads[0], "relative norm", GRADIENT_TOLERANCE),
                Figure(f"{name}: worst parameter after three steps", weights[0], "relative norm", WEIGHT_TOLERANCE),
            ]
    return figures


def _precision(digits: Path) -> Figure:
    configs = [precision_config(digits, precision) for precision in ("fp32", "bf16")]
    fp32, bf16 = run_on_ranks(losses, 2, configs)[0]
    worst = max(abs(ours - theirs) / theirs for ours, theirs in zip(bf16, fp32, strict=True))
    return Figure("bf16 with fp32 masters against fp32, loss over 50 steps", worst, "worst relative difference", 0.02)


def _vllm(tokenizer: ChatTokenizer, directory: Path) -> list[Figure]:
    config = tiny_config(model__language__vocab_size=384)
    tensors = r4b_tensors(config, *reference_models(config))
    write_directory(directory, config.model, tokenizer, in_order(config, tensors), torch.float32)
    completions = run_alone(sample_with_vllm, directory)
    answers = [completion.ids for completion in completions]
    ((ours,),) = run_on_ranks(our_logprobs, 1, config, directory, [tensors], answers)
    difference = max(largest_differences(completions, ours))
    return [
        Figure("vLLM's log-probabilities of its own answers", difference, "max abs difference, nats", 1e-4),
        Figure("tokens compared with vLLM", sum(map(len, answers)), "tokens"),
    ]


def _formats(digits: Path, folder: Path) -> list[Figure]:
    figures = []
    for form in FORMATS:
        by_vllm, by_transformers, by_ourselves = say_everywhere(form, digits, folder / form)
        name = f"trained at TP 2 x PP 2, exported as {form}, greedy"
        for other, said in (("transformers", by_transformers), ("our checkpoint", by_ourselves)):
            same = float(same_answers(by_vllm, said))
            difference = largest_difference(by_vllm, said)
            figures += [
                Figure(f"{name}: {other} answers as vLLM does", same, "1 is yes", 1, "at least"),
                Figure(f"{name}: {other}, log-probabilities of vLLM's", difference, "max abs difference, nats", 1e-4),
            ]
        figures.append(Figure(f"{name}: tokens compared", sum(len(each.ids) for each in by_vllm), "tokens"))
    return figures
