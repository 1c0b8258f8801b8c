"""What every parallel layout does to one model and one set of samples: losses, gradients, weights after some steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.render import Conversation, Question, Rendering, Response, Sample, render_sample
from megatron_mm.chat.tokenizer import IMAGE, PAD, ChatTokenizer
from megatron_mm.config.layout import check_layout
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.loader import Batch, Form, collate
from megatron_mm.models.vlm import build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import Platform, get_platform
from megatron_mm.train.assemble import Trainee, build_trainee
from megatron_mm.train.step import CrossEntropy, forward_backward, train_step
from megatron_mm.weights.stream import from_hf, parameters_by_name, to_hf
from megatron_mm.weights.tables import model_table
from tests.tiny import random_picture, tiny_config

STEPS = 3
# Samples belong to them in turn.
NUM_PARTS = 3
# fp32 with sums in other orders.
LOSS_TOLERANCE, GRADIENT_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4, 1e-4
# The gradient of a key's bias is zero: it adds the same to all scores of a query, which softmax does not see. What is
# computed is rounding, which Adam's first steps blow up to the learning rate; so it is held against 0, not compared.
KEY_BIAS = "k_proj.bias"
# (width, height) of the pictures of each of a step's eight samples: none to three, of all shapes; with two samples a
# micro-batch, one of the four has no picture at all.
SAMPLES = (
    ((32, 32),),
    (),
    ((100, 31), (30, 50)),
    ((33, 140),),
    ((64, 64), (20, 20), (90, 40)),
    ((50, 50),),
    (),
    (),
)


@dataclass(frozen=True)
class Outcome:
    """What a layout did.

    Attributes:
        losses: of each step, before its update.
        parts: sum of the loss and trained tokens of each part of the data, of each step.
        grads: after the first step's backward, of the mean loss, by Hugging Face name.
        weights: after all steps, by Hugging Face name.
        num_trained: trained parameters of each module over the whole model.
    """

    losses: list[float]
    parts: list[list[list[float]]]
    grads: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    num_trained: dict[str, int]


def layout(**overrides: object) -> RunConfig:
    """Eight samples a step in micro-batches of two, packed; overrides are given as a__b=value."""
    base = {
        "model__language__vocab_size": 384,
        "train__global_batch": 8,
        "train__micro_batch": 2,
        "train__trained": "[vision, projector, language, embeddings]",
        "data__packed": "true",
        "optim__weight_decay": 0.1,
    }
    return tiny_config(**{**base, **overrides})


Overrides = dict[str, object]
TP2: Overrides = {"parallel__tensor": 2}
SP: Overrides = {**TP2, "parallel__sequence": "true"}
PP2: Overrides = {"parallel__pipeline": 2}
CP2: Overrides = {"parallel__context": 2}
PLAIN: Overrides = {"optim__distributed": "false"}

# Name -> (ranks, overrides). What is compared with the single process of the same packing.
LAYOUTS: dict[str, tuple[int, Overrides]] = {
    "unpacked": (1, {"data__packed": "false"}),
    "recompute selective": (1, {"train__recompute": "selective"}),
    "recompute full": (1, {"train__recompute": "full"}),
    "TP 2": (2, TP2),
    "TP 2, unpacked": (2, {**TP2, "data__packed": "false"}),
    "TP 2 + SP": (2, SP),
    "TP 2 + SP, recompute full": (2, {**SP, "train__recompute": "full"}),
    "TP 2, vision data-parallel": (2, {**TP2, "model__vision__parallel": "data"}),
    "TP 2 + SP, vision data-parallel": (2, {**SP, "model__vision__parallel": "data"}),
    "PP 2": (2, PP2),
    "PP 2, unpacked": (2, {**PP2, "data__packed": "false"}),
    "PP 2 interleaved": (2, {**PP2, "parallel__virtual_pipeline": 2}),
    "PP 2 uneven": (2, {**PP2, "parallel__pipeline_layers": "[1, 3]"}),
    "PP 2, first stage ViT alone": (2, {**PP2, "parallel__pipeline_layers": "[0, 4]"}),
    "DP 2": (2, PLAIN),
    "DP 2, distributed optimizer": (2, {}),
    "DP 2, unpacked": (2, {"data__packed": "false"}),
    "CP 2": (2, CP2),
    "CP 2, unpacked": (2, {**CP2, "data__packed": "false"}),
    "CP 2, recompute selective": (2, {**CP2, "train__recompute": "selective"}),
    "TP 2 x PP 2": (4, {**TP2, **PP2}),
    "TP 2 x PP 2, vision data-parallel": (4, {**TP2, **PP2, "model__vision__parallel": "data"}),
    "TP 2 + SP x PP 2 interleaved": (4, {**SP, **PP2, "parallel__virtual_pipeline": 2}),
    "CP 2 x TP 2": (4, {**CP2, **TP2}),
    "CP 2 x TP 2 + SP": (4, {**CP2, **SP}),
    "CP 2 x TP 2 + SP, vision data-parallel": (4, {**CP2, **SP, "model__vision__parallel": "data"}),
    "TP 2 + SP, vision data-parallel x DP 2": (4, {**SP, "model__vision__parallel": "data"}),
    "PP 2 x CP 2": (4, {**PP2, **CP2}),
}


EXPERTS: Overrides = {
    "model__language__experts": "{num_experts: 8, experts_per_token: 2, ffn_hidden_size: 64}",
    "model__language__tied_embeddings": "false",
}
EP2: Overrides = {**EXPERTS, "parallel__expert": 2}
# The same of a model with experts.
EXPERT_LAYOUTS: dict[str, tuple[int, Overrides]] = {
    "experts, recompute full": (1, {**EXPERTS, "train__recompute": "full"}),
    "experts, DP 2": (2, EXPERTS),
    "experts, EP 2": (2, EP2),
    "experts, EP 2, unpacked": (2, {**EP2, "data__packed": "false"}),
    "experts, TP 2 + SP": (2, {**EXPERTS, **SP}),
    "experts, TP 2 + SP, EP 2": (2, {**EP2, **SP}),
    "experts, CP 2, EP 2": (2, {**EP2, **CP2}),
    "experts, PP 2": (2, {**EXPERTS, **PP2}),
    "experts, PP 2, EP 2": (4, {**EP2, **PP2}),
    "experts, TP 2 + SP, DP 2, EP 4": (4, {**EXPERTS, **SP, "parallel__expert": 4}),
}


def samples_of_step(config: RunConfig, tokenizer: ChatTokenizer, step: int) -> list[Sample]:
    """Eight questions about random pictures, short and long answers in both modes."""
    rules = TileRules.of_model(config.model)
    random = np.random.default_rng(step)
    samples = []
    for number, shapes in enumerate(SAMPLES):
        pictures: tuple[Image.Image, ...] = tuple(random_picture(shape, random) for shape in shapes)
        digits = "".join(map(str, random.integers(0, 10, 3 + 7 * number)))
        response = Response(digits[:3], digits if number % 2 else None)
        asked = Conversation.of(Question.about(f"Say {digits[:4]}.", pictures), response)
        samples.append(render_sample(asked, Rendering.PRETRAIN, tokenizer, rules))
    return samples


def micro_batches(config: RunConfig, samples: list[Sample], tokenizer: ChatTokenizer) -> list[Batch]:
    """This rank's micro-batches of a step's samples."""
    size, patches = config.train.micro_batch, config.model.vision.patches_per_tile
    parts = [number % NUM_PARTS for number in range(len(samples))]
    micro = [slice(start, start + size) for start in range(0, len(samples), size)]
    mine = micro[state.data_rank() :: state.data_ranks()]
    pad, form = tokenizer.control(PAD), Form.of_run(config)
    return [collate(samples[rows], pad, patches, form, parts[rows]) for rows in mine]


def outcomes(
    platform_name: str,
    configs: list[RunConfig],
    tensors: dict[str, torch.Tensor],
    tokenizer_directory: Path,
    samples_of: Callable[[RunConfig, ChatTokenizer, int], list[Sample]] = samples_of_step,
) -> list[Outcome]:
    """What each config's layout does to the samples of each step. Runs on every rank."""
    platform, tokenizer = get_platform(platform_name), ChatTokenizer(tokenizer_directory)
    found = []
    with state.process_group(platform):
        for config, trainee in trainees(platform, configs, tokenizer, tensors):
            grads, losses, parts = {}, [], []
            for step in range(STEPS):
                batches = micro_batches(config, samples_of(config, tokenizer, step), tokenizer)
                if step == 0:
                    forward_backward(trainee, batches, platform.device(), CrossEntropy(NUM_PARTS))
                    grads = gradients(config, trainee)
                result = train_step(trainee, batches, platform.device(), CrossEntropy(NUM_PARTS))
                losses.append(result.loss)
                parts.append(result.sums.tolist())
            found.append(Outcome(losses, parts, grads, weights(config, trainee), trainee.num_trained))
    return found


def trainees(
    platform: Platform, configs: list[RunConfig], tokenizer: ChatTokenizer, tensors: dict[str, torch.Tensor]
) -> Iterator[tuple[RunConfig, Trainee]]:
    """The model with given weights in each config's layout, one after the other in one process group."""
    for config in configs:
        check_layout(config, dist.get_world_size())
        with state.model_parallel(config.parallel, config.seed) as groups:
            chunks = build_model(config, platform, groups, tokenizer.control(IMAGE))
            from_hf(chunks, model_table(config.model), tensors)
            yield config, build_trainee(config, chunks, groups, overlap=platform.overlaps_collectives)


def gradients(config: RunConfig, trainee: Trainee) -> dict[str, torch.Tensor]:
    """Whole gradients by Hugging Face name, on rank 0."""
    for ddp in trainee.ddp:
        wrapper: Any = ddp  # whose `buffers` pyright takes for those of torch's Module
        buffers = [*wrapper.buffers, *wrapper.expert_parallel_buffers] if config.optim.distributed else []
        for buffer in buffers:
            for bucket in buffer.buckets:
                # Each data-parallel rank has the sum of its own share.
                whole = bucket.grad_data
                share = whole.view(dist.get_world_size(buffer.data_parallel_group), -1)
                mine = share[dist.get_rank(buffer.data_parallel_group)].clone()
                dist.all_gather_into_tensor(whole, mine, group=buffer.data_parallel_group)
    named = parameters_by_name(trainee.chunks)
    parameters: dict[str, Any] = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    held = {name: parameter.data for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.data = parameter.main_grad
    copied = weights(config, trainee)
    for name, parameter in parameters.items():
        parameter.data = held[name]
    return {name: tensor for name, tensor in copied.items() if module_of(name) in config.train.trained}


def module_of(hf_name: str) -> str:
    """The module of the config that a Hugging Face tensor belongs to."""
    if "embed_tokens" in hf_name or "lm_head" in hf_name:
        return "embeddings"
    if "language_model" in hf_name:
        return "language"
    return "vision" if "vision_tower" in hf_name else "projector"


def weights(config: RunConfig, trainee: Trainee) -> dict[str, torch.Tensor]:
    """Whole weights by Hugging Face name, on rank 0."""
    table = model_table(config.model)
    tensors = {name: tensor.to("cpu", copy=True) for name, tensor in to_hf(trainee.chunks, table)}
    return tensors if dist.get_rank() == 0 else {}


def largest_relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest norm of a difference, relative to the reference's norm, and the tensor's name; key biases left out."""
    assert ours.keys() == theirs.keys()
    relative = {
        name: float((ours[name] - tensor).norm() / tensor.norm())
        for name, tensor in theirs.items()
        if KEY_BIAS not in name
    }
    worst = max(relative, key=lambda name: relative[name])
    return relative[worst], worst


def assert_equal_gradients(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Every parameter's gradient equals the reference's to within rounding."""
    difference, name = largest_relative(ours, theirs)
    assert difference < GRADIENT_TOLERANCE, f"gradient of {name}: off by {difference:.2g} of its norm"
    norm = sum(float(tensor.square().sum()) for tensor in theirs.values()) ** 0.5
    for name, tensor in ours.items():
        assert KEY_BIAS not in name or tensor.norm() < 1e-6 * norm, f"gradient of {name} is {tensor.norm():.2g}, not 0"


def assert_equal_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Every parameter after some updates equals the reference's to within rounding."""
    difference, name = largest_relative(ours, theirs)
    assert difference < WEIGHT_TOLERANCE, f"{name} after {STEPS} steps: off by {difference:.2g} of its norm"
