"""Sources -> a prepared data set: in parallel, restartable, and with counts that add up.

Sources are cut into tasks of `samples_per_shard` records. A task becomes one shard, its rows of the index, and its
rejects, each written aside and then renamed, the rows last: a task is done when they are there. The rest is one merge:
duplicates, index, manifest, and the directory takes its name.
"""

import errno
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
from PIL import Image

from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Rendering, render_ids
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.prepare import PrepareConfig, SourceConfig
from megatron_mm.data.index import INDEX, ROWS, duplicates_of, write_index
from megatron_mm.data.progress import PreparationProgress
from megatron_mm.data.records import DOCUMENT, StoredContent
from megatron_mm.data.shards import MANIFEST, REJECTS, TOKENIZER, EncodedPicture, ShardWriter, tokenizer_fingerprint
from megatron_mm.data.sources import tasks_of
from megatron_mm.data.sources.base import RawSample, Reject, Task
from megatron_mm.data.sources.pictures import take_picture
from megatron_mm.data.sources.texts import stray_mark
from megatron_mm.files import partial_of
from megatron_mm.processes import end_with_parent

REQUEST = "request.json"
TASKS = "tasks"
# Settings of the merge: a preparation that was begun goes on with others.
MERGE_SETTINGS = {"max_rejected", "duplicates"}
WORST_REASONS = 3
# Stands for any picture where only the number of placeholders counts.
_BLANK = Image.new("RGB", (1, 1))


@dataclass(frozen=True, slots=True)
class SourceCounts:
    """What became of a source's records: `records` = `written` + `rejected` + `duplicates_dropped`.

    Attributes:
        train: how many of the written ones are for training, by part (NAME/MODE).
        heldout: how many of them are held out, by part. The two add up to `written`.
    """

    records: int
    written: int
    rejected: int
    duplicates_dropped: int
    train: dict[str, int]
    heldout: dict[str, int]


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a prepared data set was made of.

    Attributes:
        request: fingerprint of settings, tokenizer and source files.
        sources: counts by the source's name.
        duplicates: records equal to an earlier one in text and pictures.
        duplicates_are: "keep" or "drop", what became of them.
    """

    request: str
    sources: dict[str, SourceCounts]
    duplicates: int
    duplicates_are: str

    def to_json(self) -> str:
        """For manifest.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, directory: Path) -> "Manifest":
        """Of a prepared data set.

        Raises:
            InputError: there is none.
        """
        try:
            tree = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            sources = {name: SourceCounts(**counts) for name, counts in tree["sources"].items()}
            return cls(tree["request"], sources, tree["duplicates"], tree["duplicates_are"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{directory / MANIFEST} is not of a data set that this version prepared ({error!r}); prepare it anew, "
                "in another directory"
            ) from None


@dataclass(frozen=True, slots=True)
class NamedTask:
    """A task, the source that it is of, and the name of what it writes.

    Attributes:
        share: of the source's input that the task is; a source's add up to 1.
    """

    name: str
    source: SourceConfig
    task: Task
    share: float


def prepare(config: PrepareConfig, directory: Path, num_workers: int, say: Callable[[str], None] = print) -> Manifest:
    """Write a prepared data set; one that is there already and made of the same is left as it is.

    A run that was ended leaves `DIRECTORY.partial`, from which the same call goes on.

    Args:
        config: sources and limits.
        directory: to write.
        num_workers: processes; 0 works in this one.
        say: takes lines about the progress.

    Raises:
        InputError: the directory, or its unfinished one, is of another request; a source cannot be read; more than
            `max_rejected` of a source's records are bad; the disk is full; a worker was killed.
    """
    request = _request(config)
    if directory.exists():
        manifest = Manifest.read(directory)
        _check_finished(config, directory, manifest, request)
        say(f"{directory} is already prepared")
        return manifest
    tokenizer = ChatTokenizer(config.tokenizer, add_image=True)
    return run_tasks(config, tokenizer, _named_tasks(config), directory, request, num_workers, say)


def _check_finished(config: PrepareConfig, directory: Path, manifest: Manifest, request: str) -> None:
    """Refuse a finished data set that this call would have made otherwise, or would not have made."""
    if manifest.request != request:
        raise InputError(f"{directory} exists already, made of other sources or settings; choose another directory")
    if manifest.duplicates_are != config.duplicates:
        raise InputError(
            f"{directory} exists already, made with duplicates={manifest.duplicates_are}, not {config.duplicates}; "
            "choose another directory"
        )
    for name, counts in manifest.sources.items():
        if counts.rejected > config.max_rejected * counts.records:
            raise InputError(
                f"{directory} exists already, and {counts.rejected} of {counts.records} records of its source {name} "
                f"were rejected, more than max_rejected={config.max_rejected}; raise it, or mend them and choose "
                f"another directory. {directory / REJECTS} says why"
            )


def _named_tasks(config: PrepareConfig) -> Iterator[NamedTask]:
    for place, source in enumerate(config.sources):
        end = 0.0
        for number, task in enumerate(tasks_of(source, config.samples_per_shard)):
            # With its number, since "a/b" and "a-b" are two names.
            name = f"{place:03d}-{source.name.replace('/', '-')}-{number:05d}"
            yield NamedTask(name, source, task, task.end - end)
            end = task.end


def run_tasks(
    config: PrepareConfig,
    tokenizer: ChatTokenizer,
    tasks: Iterable[NamedTask],
    directory: Path,
    request: str,
    num_workers: int,
    say: Callable[[str], None],
) -> Manifest:
    """Turn tasks into a data set; see `prepare`.

    Args:
        config: the limits.
        tokenizer: counts the tokens, and is stored.
        tasks: whose names differ.
        directory: to write; must not exist.
        request: fingerprint of everything that the result depends on.
        num_workers: processes; 0 works in this one.
        say: takes lines about the progress.
    """
    work = partial_of(directory)
    try:
        _begin(work, request, tokenizer)
        with PreparationProgress([source.name for source in config.sources], say) as progress:
            names = sorted(_worked(config, tasks, work, num_workers, progress))
        manifest = _merged(config, work, names, request)
        os.replace(work, directory)
    except OSError as error:
        raise _disk_fault(error, work) from None
    except BrokenProcessPool:
        raise InputError(
            f"a worker was killed, perhaps for want of memory; what is done lies in {work}, and the same command goes "
            "on from there, with fewer --workers if need be"
        ) from None
    for name, counts in manifest.sources.items():
        say(_summary(name, counts))
    return manifest


def _summary(name: str, counts: SourceCounts) -> str:
    """One line on what became of a source."""
    parts = Counter(counts.train) + Counter(counts.heldout)
    modes = ", ".join(f"{count:,} {part.rpartition('/')[2]}" for part, count in sorted(parts.items()))
    dropped = f", {counts.duplicates_dropped:,} duplicates dropped" if counts.duplicates_dropped else ""
    heldout = sum(counts.heldout.values())
    return (
        f"{name}: {counts.records:,} records, {counts.written:,} written ({modes or 'nothing'}; {heldout:,} held out), "
        f"{counts.rejected:,} rejected{dropped}"
    )


def _request(config: PrepareConfig) -> str:
    """Fingerprint of what the shards depend on."""
    hasher = hashlib.blake2b(digest_size=8)
    settings = config.model_dump(mode="json", exclude={*MERGE_SETTINGS, "tokenizer"})
    hasher.update(json.dumps(settings, sort_keys=True).encode())
    hasher.update(tokenizer_fingerprint(config.tokenizer).encode())
    for source in config.sources:
        files = sorted(source.path.rglob("*")) if source.path.is_dir() else [source.path]
        for file in files:
            if file.is_file():
                state = file.stat()
                hasher.update(f"{file} {state.st_size} {state.st_mtime_ns}\n".encode())
    return hasher.hexdigest()


def _begin(work: Path, request: str, tokenizer: ChatTokenizer) -> None:
    asked = work / REQUEST
    if asked.is_file() and json.loads(asked.read_text(encoding="utf-8")) == request:
        return
    if asked.is_file():
        raise InputError(
            f"{work} holds an unfinished preparation of other sources or settings; remove it, or go on with those"
        )
    shutil.rmtree(work, ignore_errors=True)
    (work / TASKS).mkdir(parents=True)
    tokenizer.save(work / TOKENIZER)
    # Last: a directory without it was not begun.
    _replace(asked, json.dumps(request).encode())


def _worked(
    config: PrepareConfig, tasks: Iterable[NamedTask], work: Path, num_workers: int, progress: PreparationProgress
) -> list[str]:
    """Do the tasks whose files are not there yet; the names of all."""
    run = partial(_run_task, config=config, work=work)
    names: list[str] = []

    def missing() -> Iterator[NamedTask]:
        for task in tasks:
            names.append(task.name)
            progress.begin(task.source.name)
            if _rows_file(work, task.name).is_file():
                progress.restore(task.source.name, task.share)
            else:
                yield task

    if num_workers == 0:
        for task in missing():
            progress.advance(task.source.name, task.share, run(task))
        return names
    waiting: dict[Future[int], NamedTask] = {}
    # Not forked: this process may have threads.
    with ProcessPoolExecutor(num_workers, get_context("spawn"), end_with_parent, (os.getpid(),)) as pool:
        try:
            for task in missing():
                waiting[pool.submit(run, task)] = task
                # Tasks may hold their records: only a few are handed out ahead.
                if len(waiting) >= 2 * num_workers:
                    _take_finished(waiting, progress)
            while waiting:
                _take_finished(waiting, progress)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return names


def _take_finished(waiting: dict[Future[int], NamedTask], progress: PreparationProgress) -> None:
    """Wait for the next tasks to finish, and take them out of those waited for."""
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        task = waiting.pop(future)
        progress.advance(task.source.name, task.share, future.result())


def _run_task(task: NamedTask, config: PrepareConfig, work: Path) -> int:
    """Write a task's shard, rejects and rows.

    Returns:
        How many records it read.
    """
    tokenizer = _tokenizer(work / TOKENIZER)
    rows: list[dict[str, object]] = []
    rejects: list[Reject] = []
    shard = work / f"{task.name}.tar"
    partial_shard = shard.with_suffix(".tar.partial")
    with ShardWriter(partial_shard) as writer:
        for record in task.task.records():
            made = record if isinstance(record, Reject) else _made(record, task.source, config, tokenizer)
            if isinstance(made, Reject):
                rejects.append(made)
                continue
            offset, num_bytes = writer.add(made.content, made.pictures, made.origin)
            rows.append({**made.row, "shard": shard.name, "offset": offset, "text_bytes": num_bytes})
    if rows:
        os.replace(partial_shard, shard)
    else:
        partial_shard.unlink()
    lines = [json.dumps({"source": task.source.name, **asdict(reject)}) + "\n" for reject in rejects]
    _replace(_rejects_file(work, task.name), "".join(lines).encode())
    table = pa.Table.from_pylist(rows, ROWS.with_metadata({"source": task.source.name}))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as out:
        out.write_table(table)
    _replace(_rows_file(work, task.name), sink.getvalue().to_pybytes())
    return len(rows) + len(rejects)


@dataclass(frozen=True, slots=True)
class _Made:
    """A record ready to be written, with its row but for its place."""

    origin: str
    content: StoredContent
    pictures: list[EncodedPicture]
    row: dict[str, object]


def _made(raw: RawSample, source: SourceConfig, config: PrepareConfig, tokenizer: ChatTokenizer) -> _Made | Reject:
    content = raw.content
    mark = None if source.format == "text" or source.marks_are_text else stray_mark(content)
    if mark is not None:
        return Reject(
            raw.origin,
            f"{mark} stands for nothing that the sample holds; if it is plain text, set the source's marks_are_text",
        )
    numbers = [part for part in content.parts if isinstance(part, int)]
    if numbers != list(range(len(raw.pictures))):
        return Reject(raw.origin, f"its texts show the pictures {numbers}, but it has {len(raw.pictures)}")
    if len(raw.pictures) > config.max_pictures:
        return Reject(raw.origin, f"{len(raw.pictures)} pictures, more than max_pictures={config.max_pictures}")
    characters = content.num_characters()
    if characters > config.max_text_characters:
        return Reject(
            raw.origin, f"{characters} characters, more than max_text_characters={config.max_text_characters}"
        )
    try:
        pictures = [take_picture(picture, config, fetch_urls=source.fetch_urls) for picture in raw.pictures]
        tokens = _num_tokens(content, len(pictures), tokenizer)
    except InputError as error:
        return Reject(raw.origin, str(error))
    digest = content.digest([picture.content for picture in pictures])
    is_held_out = int.from_bytes(digest[:8], "big") < source.heldout * 2**64
    row = {
        "split": "heldout" if is_held_out else source.split,
        "part": f"{source.name}/{content.mode}",
        "text_tokens": tokens[0],
        "cold_start_tokens": tokens[1],
        "picture_bytes": [len(picture.content) for picture in pictures],
        "picture_width": [picture.width for picture in pictures],
        "picture_height": [picture.height for picture in pictures],
        "digest": digest,
    }
    return _Made(raw.origin, content, pictures, row)


def _num_tokens(content: StoredContent, num_pictures: int, tokenizer: ChatTokenizer) -> tuple[int, int]:
    """Tokens without placeholders, rendered for pretraining and for the cold start; see index.py."""
    rendered = content.content([_BLANK] * num_pictures)
    none = [0] * num_pictures
    ids, _ = render_ids(rendered, none, Rendering.PRETRAIN, tokenizer)
    if content.mode == DOCUMENT:
        return len(ids), len(ids)
    if content.mode != Mode.THINKING or any(turn.reasoning is None for turn in content.turns):
        return len(ids), -1
    cold, _ = render_ids(rendered, none, Rendering.COLD_START, tokenizer)
    return len(ids), len(cold)


def _merged(config: PrepareConfig, work: Path, names: list[str], request: str) -> Manifest:
    """Index, manifest and rejects of all tasks; what they were made of is removed."""
    tables = [pa.ipc.open_file(_rows_file(work, name)).read_all() for name in names]
    rejects = [line for name in names for line in _rejects_file(work, name).read_text(encoding="utf-8").splitlines()]
    (work / REJECTS).write_text("".join(f"{line}\n" for line in rejects), encoding="utf-8")
    rejected = Counter(json.loads(line)["source"] for line in rejects)
    written = Counter()
    named = [(table.schema.metadata[b"source"].decode(), table) for table in tables]
    for source, table in named:
        written[source] += len(table)
    _check_rejected(config, work, rejects, rejected, written)
    rows = pa.concat_tables([table.replace_schema_metadata() for table in tables]) if tables else ROWS.empty_table()
    if not len(rows):
        raise InputError(f"the sources hold no usable record; {work / REJECTS} says why")
    repeated = duplicates_of(rows["digest"])
    source_of = list(itertools.chain.from_iterable([source] * len(table) for source, table in named))
    dropped = Counter()
    if config.duplicates == "drop":
        dropped.update(itertools.compress(source_of, repeated))
        source_of = list(itertools.compress(source_of, ~repeated))
        rows = rows.filter(pa.array(~repeated))
    write_index(work / INDEX, rows, tokenizer_fingerprint(work / TOKENIZER))
    kept = Counter(zip(source_of, rows["split"].to_pylist(), rows["part"].to_pylist(), strict=True))
    counts = {
        source: SourceCounts(
            records=written[source] + rejected[source],
            written=written[source] - dropped[source],
            rejected=rejected[source],
            duplicates_dropped=dropped[source],
            train=_by_part(kept, source, "train"),
            heldout=_by_part(kept, source, "heldout"),
        )
        for source in sorted({*written, *rejected})
    }
    manifest = Manifest(request, counts, int(repeated.sum()), config.duplicates)
    (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    shutil.rmtree(work / TASKS)
    (work / REQUEST).unlink()
    return manifest


def _by_part(kept: Counter[tuple[str, str, str]], source: str, split: str) -> dict[str, int]:
    """Samples of a source in a split, by part; `kept` counts by source, split and part."""
    return {part: count for (name, of, part), count in sorted(kept.items()) if (name, of) == (source, split)}


def _check_rejected(
    config: PrepareConfig, work: Path, rejects: list[str], rejected: Counter[str], written: Counter[str]
) -> None:
    for source, count in rejected.items():
        records = count + written[source]
        if count > config.max_rejected * records:
            mine = (entry for entry in map(json.loads, rejects) if entry["source"] == source)
            first = itertools.islice(mine, WORST_REASONS)
            shown = "".join(f"\n  {entry['origin']}: {entry['reason']}" for entry in first)
            raise InputError(
                f"{count} of {records} records of source {source} are bad, more than max_rejected="
                f"{config.max_rejected}; mend them, or raise it and run again. All are in {work / REJECTS}; the first:"
                f"{shown}"
            )


def _disk_fault(error: OSError, work: Path) -> InputError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return InputError(
            f"no space to write {error.filename or work}: {error.strerror}; make room, and the same command goes on "
            "with the shards that are missing"
        )
    return InputError(f"{error.filename or work} cannot be written: {error.strerror or error}")


def _replace(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".partial")
    aside.write_bytes(content)
    os.replace(aside, path)


def _rows_file(work: Path, name: str) -> Path:
    return work / TASKS / f"{name}.arrow"


def _rejects_file(work: Path, name: str) -> Path:
    return work / TASKS / f"{name}.jsonl"


@lru_cache(maxsize=1)
def _tokenizer(directory: Path) -> ChatTokenizer:
    return ChatTokenizer(directory)
