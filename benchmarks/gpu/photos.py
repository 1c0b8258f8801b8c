"""A prepared data set of real images and real text, made of what is on a machine without a network.

The images are cut-outs of the two photographs that ship inside scikit-learn, of every shape, enlarged or reduced; the
text is this repository's documentation. The subsets are

    caption/non_thinking    a photo and a passage
    sum/non_thinking        a photo and a sum, whose answer can be checked
    text/non_thinking       a passage
"""

import re
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.gpu.setting import Sizes
from benchmarks.run import ROOT
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.prepare import PrepareConfig, SourceConfig
from megatron_mm.data.digits import build_tokenizer
from megatron_mm.data.prepare import NamedTask, run_tasks
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.sources.base import ListedTask, RawSample

JPEG_QUALITY = 90


def prepare_photos(directory: Path, sizes: Sizes) -> None:
    """Write the data set, unless it is there."""
    if directory.exists():
        return
    from sklearn.datasets import load_sample_images

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # pyright: ignore
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
    words = _words(pages)
    random = np.random.default_rng(0)
    samples = {
        "caption": [_with_photo(_passage(words, sizes, random), photographs, sizes, random) for _ in _times(sizes)],
        "sum": [_with_photo(_sum(random), photographs, sizes, random) for _ in _times(sizes)],
        "text": [RawSample("text", StoredContent((_passage(words, sizes, random),))) for _ in _times(sizes)],
    }
    tokenizer = directory.with_name("tokenizer")
    build_tokenizer(pages, sizes.vocabulary).save_pretrained(tokenizer)
    # The documentation speaks of <image> without having one.
    sources = tuple(SourceConfig(name=name, format="chat", path=directory, marks_are_text=True) for name in samples)
    config = PrepareConfig(tokenizer=tokenizer, sources=sources)
    tasks = [NamedTask(source.name, source, ListedTask(samples[source.name]), 1.0) for source in sources]
    run_tasks(config, ChatTokenizer(tokenizer), tasks, directory, "photos", 0, lambda _: None)


def _times(sizes: Sizes) -> range:
    return range(sizes.num_photos)


def _words(pages: list[str]) -> list[str]:
    """Return the words of the pages in order, without tables, code and titles."""
    lines = [line for page in pages for line in page.splitlines()]
    return " ".join(line for line in lines if not re.match(r"[|`# ]", line)).split()


def _passage(words: list[str], sizes: Sizes, random: np.random.Generator) -> StoredTurn:
    """A passage of any length, short ones more often, that answers the words before it."""
    shortest, longest = sizes.answer_words
    length = round(float(np.exp(random.uniform(np.log(shortest), np.log(longest)))))
    start = int(random.integers(8, len(words) - length))
    return StoredTurn([" ".join(words[start - 8 : start])], " ".join(words[start : start + length]))


def _sum(random: np.random.Generator) -> StoredTurn:
    first, second = random.integers(10, 100, 2).tolist()
    return StoredTurn([f"What is {first} + {second}?"], str(first + second))


def _with_photo(
    turn: StoredTurn, photographs: list[Image.Image], sizes: Sizes, random: np.random.Generator
) -> RawSample:
    """A turn about a cut-out of one of the photographs."""
    photograph = photographs[random.integers(len(photographs))]
    shortest, longest = np.log(sizes.photo_sides)
    width, height = np.exp(random.uniform(shortest, longest, 2)).astype(int).tolist()
    # The largest cut-out of this shape, or down to half of it.
    scale = min(photograph.width / width, photograph.height / height) * random.uniform(0.5, 1)
    left = random.uniform(0, photograph.width - scale * width)
    top = random.uniform(0, photograph.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    content = BytesIO()
    photograph.resize((width, height), Image.Resampling.BICUBIC, box).save(content, "JPEG", quality=JPEG_QUALITY)
    question = StoredContent((StoredTurn([0, "\n", *turn.question], turn.answer),))
    return RawSample("photo", question, (content.getvalue(),))
