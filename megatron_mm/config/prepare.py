"""What `megatron-mm data prepare` reads: which sources become one prepared data set, and its limits."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from megatron_mm.config.schema import Section

SOURCE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")

Split = Literal["train", "heldout"]


class SourceConfig(Section):
    """One source and how to read it (docs/data.md describes each format)."""

    name: str = Field(description="what a blend calls it, such as ocr or grounding/refcoco")
    format: Literal["chat", "parquet", "webdataset", "folder", "interleaved", "text"]
    path: Path = Field(description="file, or directory of files")
    pictures: Path | None = Field(default=None, description="where pictures named in records lie; the file's directory")
    split: Split = "train"
    heldout: float = Field(
        default=0.0, ge=0, lt=1, description="share of the records, chosen by content, that is held out"
    )
    question: str = Field(
        default="Describe the image.", description="asked about pictures that come with a caption only"
    )
    marks_are_text: bool = Field(
        default=False, description="keep an <image>, <video> or <audio> that stands for nothing as plain text"
    )
    fetch_urls: bool = Field(default=False, description="fetch pictures whose name is an http(s) URL")

    @model_validator(mode="after")
    def _name_can_be_blended(self) -> "SourceConfig":
        if not SOURCE_NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r} is not words of letters, digits, '.', '_', '-', joined by '/'")
        return self


class PrepareConfig(Section):
    """One prepared data set."""

    tokenizer: Path = Field(description="directory of a Qwen3-style tokenizer; <image> is added where it lacks it")
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    samples_per_shard: int = Field(default=2048, gt=0, description="records that one tar file takes")
    duplicates: Literal["keep", "drop"] = Field(
        default="keep", description="what becomes of records whose text and pictures are exactly those of another"
    )
    max_rejected: float = Field(
        default=0.01, ge=0, le=1, description="share of a source's records that may be bad before nothing is written"
    )
    max_picture_pixels: int = Field(default=80_000_000, gt=0, description="a larger picture is taken for a bomb")
    max_picture_bytes: int = Field(default=50_000_000, gt=0, description="of one encoded picture")
    max_pictures: int = Field(default=64, gt=0, description="of one record")
    max_text_characters: int = Field(default=1_000_000, gt=0, description="of one record")

    @model_validator(mode="after")
    def _names_differ(self) -> "PrepareConfig":
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"several sources are called {', '.join(twice)}; give each a name of its own")
        return self
