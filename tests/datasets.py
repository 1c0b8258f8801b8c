"""Small prepared data sets of given samples, and indices of samples that exist in them alone."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.flops import training_flops
from megatron_mm.config.prepare import PrepareConfig, SourceConfig
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.index import INDEX, ROWS, Index, write_index
from megatron_mm.data.plan import Plan, PlanSettings
from megatron_mm.data.prepare import Manifest, NamedTask, run_tasks
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.sources.base import ListedTask, RawSample, Reject


def encoded(picture: Image.Image, form: str = "PNG", **options: object) -> bytes:
    """A picture's file."""
    content = BytesIO()
    picture.save(content, format=form, **options)  # pyright: ignore[reportArgumentType]
    return content.getvalue()


def turn(question: str, answer: str, reasoning: str | None = None, num_pictures: int = 0) -> StoredContent:
    """One question, its pictures in front."""
    pictures = [part for number in range(num_pictures) for part in (number, "\n")]
    return StoredContent((StoredTurn([*pictures, question], answer, reasoning),))


def write_dataset(
    directory: Path,
    tokenizer: ChatTokenizer,
    sources: Mapping[str, Sequence[RawSample | Reject]],
    *,
    marks_are_text: bool = False,
    **settings: Any,
) -> Manifest:
    """Prepare samples, one task a source."""
    listed = [SourceConfig(name=name, format="chat", path=directory, marks_are_text=marks_are_text) for name in sources]
    values = {"tokenizer": tokenizer.directory, "sources": listed, **settings}
    config = PrepareConfig.model_validate(values)
    tasks = [
        NamedTask(source.name.replace("/", "-"), source, ListedTask(sources[source.name]), 1.0) for source in listed
    ]
    return run_tasks(config, tokenizer, tasks, directory, "test", 0, lambda _: None)


def synthetic_index(directory: Path, parts: Mapping[str, Sequence[int]], num_pictures: int = 0) -> Index:
    """An index whose parts hold samples of the given text tokens, each with pictures of 40 x 30 pixels."""
    rows = [
        {
            "split": "train",
            "part": part,
            "shard": f"{part.replace('/', '-')}.tar",
            "offset": number,
            "text_bytes": 1,
            "text_tokens": tokens,
            "cold_start_tokens": -1,
            "picture_bytes": [1] * num_pictures,
            "picture_width": [40] * num_pictures,
            "picture_height": [30] * num_pictures,
            "digest": f"{part[:4]:4}{number:12d}".encode(),
        }
        for part, lengths in parts.items()
        for number, tokens in enumerate(lengths)
    ]
    directory.mkdir(parents=True, exist_ok=True)
    write_index(directory / INDEX, pa.Table.from_pylist(rows, ROWS), "none")
    return Index(directory / INDEX)


def plan_for(index: Index, config: RunConfig) -> Plan:
    """The plan of a config over an index."""
    return Plan(index, "train", PlanSettings.of_run(config), training_flops(config.model, config.train.trained))


def stage_like_lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Lengths from short to `longest`, short ones more often."""
    random = np.random.default_rng(seed)
    return np.exp(random.uniform(np.log(4), np.log(longest), count)).astype(int).tolist()
