"""How far our model is from transformers', vLLM's, and itself in other layouts, in fp32 with random weights."""

import tempfile
from pathlib import Path

from benchmarks.figure import Figure
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.data.digits import prepare_digits
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.weights.export import write_directory
from tests.answers import largest_differences, our_logprobs, sample_with_vllm
from tests.parity import against_transformers, layout_configs, one_step
from tests.ranks import run_alone, run_on_ranks
from tests.tiny import r4b_tensors, reference_models, tiny_config


def measure() -> list[Figure]:
    """The comparisons of tests/distributed/test_parity.py and tests/contract/test_vllm.py."""
    with tempfile.TemporaryDirectory() as folder:
        digits = Path(folder) / "digits"
        prepare_digits(digits, num_train=60, num_heldout=20, seed=0)
        return [*_transformers(), *_layouts(digits), *_vllm(digits, Path(folder) / "model")]


def _transformers() -> list[Figure]:
    sizes = (1, 2)
    configs = [tiny_config(parallel__tensor=size) for size in sizes]
    figures = []
    for size, found in zip(sizes, run_on_ranks(against_transformers, 2, "cpu", configs)[0], strict=True):
        for what in ("vision", "logits"):
            name = {"vision": "SiglipVisionModel, features", "logits": "Qwen3ForCausalLM, logits"}[what]
            figures.append(Figure(f"transformers' {name}, TP {size}", found[what], "max abs difference", 1e-4))
    return figures


def _layouts(digits: Path) -> list[Figure]:
    layouts = layout_configs(digits)
    single = layouts.pop("single")
    tensors = r4b_tensors(single, *reference_models(single))
    (reference,) = run_on_ranks(one_step, 1, "cpu", [single], tensors)[0]
    results = run_on_ranks(one_step, 2, "cpu", list(layouts.values()), tensors)[0]
    return [
        Figure(f"loss of a step, {name} against one process", abs(result[0] - reference[0]), "nats", 1e-5)
        for name, result in zip(layouts, results, strict=True)
    ]


def _vllm(digits: Path, directory: Path) -> list[Figure]:
    config = tiny_config(model__language__vocab_size=384)
    tensors = r4b_tensors(config, *reference_models(config))
    write_directory(directory, config.model, ChatTokenizer(digits / TOKENIZER), tensors.items())
    completions = run_alone(sample_with_vllm, directory)
    answers = [completion.ids for completion in completions]
    ((ours,),) = run_on_ranks(our_logprobs, 1, config, directory, [tensors], answers)
    difference = max(largest_differences(completions, ours))
    return [
        Figure("vLLM's log-probabilities of its own answers", difference, "max abs difference, nats", 1e-4),
        Figure("tokens compared with vLLM", sum(map(len, answers)), "tokens"),
    ]
