"""Held-out questions of a prepared data set, asked in every mode through vLLM, greedily."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_mm.chat import modes
from megatron_mm.chat.images import TileRules
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import render_prompt
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.data.questions import Asked, ask
from megatron_mm.data.shards import PreparedData
from megatron_mm.generation.engine import Engine
from megatron_mm.grading.answers import exact_match
from megatron_mm.parallel.platform import get_platform


@dataclass(frozen=True, slots=True)
class Score:
    """How one mode did on one source.

    Attributes:
        accuracy: share of answers equal to the reference.
        mean_tokens: generated tokens a response, the end of turn included.
        think_rate: share of responses that begin to reason.
        unfinished: share cut off by the limit of tokens.
    """

    source: str
    mode: str
    num_questions: int
    accuracy: float
    mean_tokens: float
    think_rate: float
    unfinished: float


def evaluate_heldout(
    model_directory: Path, data: str, report: Path, num_questions: int, max_tokens: int, dtype: str | None
) -> list[Score]:
    """Ask `num_questions` of every source in every mode; print a table and write report and responses.

    Args:
        model_directory: made by `megatron-mm export`.
        data: prepared data set with a held-out split.
        report: JSON file of the scores; the responses go beside it, as .jsonl.
        num_questions: of each source.
        max_tokens: longest response.
        dtype: that vLLM computes in; left out, bfloat16 on a GPU, whose attention kernels take no float32, and float32
            on a CPU.

    Raises:
        InputError: no model, no data, or the report cannot be written.
    """
    rules = TileRules.of_directory(model_directory)
    questions = heldout_questions(PreparedData(data), num_questions)
    tokenizer = ChatTokenizer(model_directory)
    on_device = get_platform("auto").has_own_memory
    engine = Engine(model_directory, chosen_dtype(dtype, has_own_memory=on_device), has_own_memory=on_device)
    scores, lines = [], []
    for source, asked in questions.items():
        pictures = [list(one.question.pictures) for one in asked]
        for mode in Mode:
            prompts = [render_prompt(one.question, mode, tokenizer, rules, one.system) for one in asked]
            completions = engine.generate(prompts, pictures, max_tokens=max_tokens)
            responses = [modes.TRIGGERS[mode] + completion.text for completion in completions]
            answers = [modes.split_response(response)[1] for response in responses]
            right = [exact_match(answer, one.reference) for answer, one in zip(answers, asked, strict=True)]
            count = len(asked)
            scores.append(
                Score(
                    source,
                    str(mode),
                    count,
                    sum(right) / count,
                    sum(len(completion.ids) for completion in completions) / count,
                    sum(map(modes.begins_thought, responses)) / count,
                    sum(not completion.finished for completion in completions) / count,
                )
            )
            for one, response, is_right in zip(asked, responses, right, strict=True):
                line = {"source": source, "mode": str(mode), "picture": one.name, "question": one.text}
                lines.append({**line, "reference": one.reference, "response": response, "right": is_right})
    _write(report, scores, lines)
    _print(scores)
    return scores


def chosen_dtype(asked_for: str | None, *, has_own_memory: bool) -> str:
    """Return what vLLM computes in: what was asked for, or else what its kernels are made for on such a device."""
    return asked_for or ("bfloat16" if has_own_memory else "float32")


def heldout_questions(data: PreparedData, num_questions: int) -> dict[str, list[Asked]]:
    """The first `num_questions` of every source, one a picture.

    Raises:
        InputError: a source has fewer.
    """
    found = {}
    for part in data.index.ranges("heldout"):
        source, mode = part.part.rsplit("/", 1)
        # Both modes of a question share picture and answer: one of them is asked, in every mode.
        if mode != Mode.NON_THINKING:
            continue
        if part.count < num_questions:
            raise InputError(f"{data.path} holds {part.count} held-out questions of {source}, not {num_questions}")
        found[source] = [ask(data, row) for row in range(part.first, part.first + num_questions)]
    return found


def _write(report: Path, scores: list[Score], lines: list[dict[str, object]]) -> None:
    try:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps([asdict(score) for score in scores], indent=2) + "\n", encoding="utf-8")
        with report.with_suffix(".jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise InputError(f"report {report} cannot be written: {error.strerror}") from None


def _print(scores: list[Score]) -> None:
    table = Table(title="Held-out questions, answered by vLLM")
    for name in ("source", "mode", "asked", "accuracy", "tokens", "thinking", "cut off"):
        table.add_column(name, justify="left" if name in ("source", "mode") else "right")
    for score in scores:
        table.add_row(
            score.source,
            score.mode,
            str(score.num_questions),
            f"{score.accuracy:.1%}",
            f"{score.mean_tokens:.1f}",
            f"{score.think_rate:.0%}",
            f"{score.unfinished:.0%}",
        )
    Console().print(table)
