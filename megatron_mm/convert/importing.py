"""Hugging Face directories -> a checkpoint that every layout loads."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_mm.chat.tokenizer import IMAGE, ChatTokenizer
from megatron_mm.checkpoint.whole import write_whole
from megatron_mm.config.errors import InputError
from megatron_mm.config.layout import tensor_faults
from megatron_mm.config.load import load_model, model_to_yaml
from megatron_mm.config.schema import ModelConfig, ParallelConfig
from megatron_mm.convert.checkpoint_weights import RUN_CONFIG, skeleton_of
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.files import appearing_whole, partial_of, refuse_existing
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights.files import same_bits
from megatron_mm.weights.hf_config import CONFIG, FoundModel, check_bridged, read_parts, read_whole
from megatron_mm.weights.mapping import Rule
from megatron_mm.weights.names import Kind
from megatron_mm.weights.sizes import numel
from megatron_mm.weights.source import Source, open_source
from megatron_mm.weights.stream import shard_of
from megatron_mm.weights.tables import model_table


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """What `megatron-mm import` was asked for.

    Attributes:
        run_dir: directory to write; must not exist yet.
        directories: one whole model, or ViT and language model.
        recipe, files, overrides: see config.load.load_model.
        dtype: to convert to; None keeps the weights'.
        seed: of a projector that is drawn.
        ignored_fields: of config.json, which the user says do not matter.
    """

    run_dir: Path
    directories: Mapping[Kind, Path]
    recipe: str | None = None
    files: Sequence[Path] = ()
    overrides: Sequence[str] = ()
    dtype: torch.dtype | None = None
    seed: int = 0
    ignored_fields: Collection[str] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class ImportPlan:
    """An import that has been found to be possible."""

    model: ModelConfig
    parallel: ParallelConfig
    source: Source
    tokenizer: ChatTokenizer


def plan_import(options: ImportOptions) -> ImportPlan:
    """Look at everything that an import needs, before anything is written; tensors are not read.

    Raises:
        InputError: the directory to write exists; a config, tensor or tokenizer is missing or does not fit.
    """
    refuse_existing(options.run_dir)
    found = _found(options)
    tree = found.model.model_dump(mode="json", exclude_unset=True)
    model, parallel = load_model(tree, options.recipe, options.files, options.overrides)
    faults = tensor_faults(model, parallel)
    if faults:
        raise InputError("\n".join(["the model cannot be cut for that layout:", *faults]))
    check_bridged(found.model, model, fresh_projector="whole" not in options.directories)
    untie = found.model.language.tied_embeddings and not model.language.tied_embeddings
    source = open_source(options.directories, model, untie=untie, dtype=options.dtype, seed=options.seed)
    directory = options.directories.get("language", options.directories.get("whole"))
    assert directory is not None
    tokenizer = ChatTokenizer(directory, add_image=True)
    _check_tokenizer(tokenizer, found, model, directory)
    return ImportPlan(model, parallel, source, tokenizer)


def import_model(options: ImportOptions) -> ImportPlan:
    """Write a checkpoint that every layout loads, with its config and tokenizer; each rank its share.

    The directory takes its name when all of it is written and has been read back.

    Raises:
        InputError: as `plan_import`.
    """
    platform = get_platform("cpu")
    with state.process_group(platform):
        plan = plan_import(options)
        with _written_together(options.run_dir) as partial:
            if state.writes():
                (partial / RUN_CONFIG).write_text(model_to_yaml(plan.model), encoding="utf-8")
                plan.tokenizer.save(partial / TOKENIZER)
            rules = _share(model_table(plan.model), dist.get_rank(), dist.get_world_size())
            parameters = (
                (rule.megatron, shard_of(rule, plan.source.tensors, rank=0, ranks=1), rule.axis) for rule in rules
            )
            with skeleton_of(plan.model, plan.source.dtype) as skeleton:
                write_whole(partial, skeleton, parameters, plan.parallel.tensor, same_bits)
    return plan


@contextmanager
def _written_together(directory: Path) -> Iterator[Path]:
    """`appearing_whole` for all ranks: one makes and names the directory."""
    dist.barrier()  # every rank has found it absent
    with ExitStack() as stack:
        if state.writes():
            stack.enter_context(appearing_whole(directory))
        dist.barrier()
        yield partial_of(directory)
        dist.barrier()
    dist.barrier()


def _found(options: ImportOptions) -> FoundModel:
    directories = options.directories
    if "whole" in directories:
        return read_whole(directories["whole"], options.ignored_fields)
    return read_parts(directories["vision"], directories["language"], options.ignored_fields)


def _check_tokenizer(tokenizer: ChatTokenizer, found: FoundModel, model: ModelConfig, directory: Path) -> None:
    image = tokenizer.control(IMAGE)
    if found.image_token is not None and found.image_token != image:
        raise InputError(
            f"{directory / CONFIG} says that pictures stand at token {found.image_token}, and its tokenizer that "
            f"{IMAGE} is {image}; mend the one that is wrong"
        )
    if len(tokenizer) > model.language.vocab_size:
        raise InputError(
            f"the tokenizer of {directory} has {len(tokenizer)} tokens with {IMAGE}, and the embedding "
            f"{model.language.vocab_size} rows; resize the embedding first (transformers' resize_token_embeddings)"
        )


def _share(table: Sequence[Rule], rank: int, ranks: int) -> list[Rule]:
    """The rules of one of `ranks` workers, so that all have about as many bytes."""
    sizes = [0] * ranks
    mine = []
    for rule in sorted(table, key=lambda rule: -_size(rule)):
        worker = sizes.index(min(sizes))
        sizes[worker] += _size(rule)
        if worker == rank:
            mine.append(rule)
    return mine


def _size(rule: Rule) -> int:
    return numel(rule.shard_shape(1))
