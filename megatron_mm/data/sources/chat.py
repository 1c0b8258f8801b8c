"""Conversations as JSON: LLaVA's and ShareGPT's, OpenAI's messages, and both files of Vision-R1-cold.

    {"conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}],
     "image": "cats/1.jpg"}
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "<think>It has whiskers.</think>A cat."}], "images": ["cats/1.jpg"]}

Either name of a list, and of a turn's fields, goes with either. `system`, or a first turn of the system, is the
system's text. texts.py says where pictures stand and what is reasoning.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.sources.base import PictureSource, Task
from megatron_mm.data.sources.faults import Fault, Found
from megatron_mm.data.sources.json_files import json_tasks
from megatron_mm.data.sources.picture_names import picture_sources
from megatron_mm.data.sources.texts import Segments, place_pictures, required_text, response_of

TURNS = ("conversations", "messages")
PICTURES = ("image", "images")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def tasks(source: SourceConfig, records_per_task: int) -> Iterator[Task]:
    """Tasks of *.json and *.jsonl files.

    Raises:
        InputError: see `json_tasks`.
    """
    return json_tasks(source, records_per_task, read)


def read(record: Any, root: Path) -> Found:
    """A record with its pictures.

    Raises:
        Fault: see `conversation_of` and `pictures_of`.
    """
    pictures = pictures_of(record, root)
    return conversation_of(record, len(pictures)), pictures


def pictures_of(record: Any, root: Path) -> tuple[PictureSource, ...]:
    """The pictures that a record names.

    Raises:
        Fault: it is no object, or names them in a way that is not understood.
    """
    return picture_sources(one_of(as_object(record), PICTURES), root)


def conversation_of(record: Any, num_pictures: int) -> StoredContent:
    """The texts of a record, with its pictures placed.

    Raises:
        Fault: it is not a conversation, or the pictures do not fit into it.
    """
    record = as_object(record)
    turns = one_of(record, TURNS)
    if turns is None or turns == []:
        raise Fault("no turns")
    if not isinstance(turns, list):
        raise Fault(f"turns are {type(turns).__name__}, not a list")
    said = [_turn(turn, number) for number, turn in enumerate(turns, 1)]
    system = record.get("system")
    if system is not None:
        required_text(system, "system text")
    if said[0][0] == "system":
        if system:
            raise Fault("system texts both beside the turns and in the first of them")
        system = _text(said.pop(0)[1], "system turn")
    first = len(turns) - len(said) + 1
    for number, (role, _) in enumerate(said):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise Fault(f"turn {first + number} is the {role}'s, not the {expected}'s")
    if not said:
        raise Fault("no turns")
    if said[-1][0] != "assistant":
        raise Fault("the last turn is not the assistant's")
    questions = place_pictures([segments for _, segments in said[0::2]], num_pictures)
    answers = [_text(segments, "assistant's turn") for _, segments in said[1::2]]
    return StoredContent(
        tuple(StoredTurn(question, *response_of(answer)) for question, answer in zip(questions, answers, strict=True)),
        # An empty one is how some files say that there is none.
        system or None,
    )


def as_object(record: Any) -> dict[str, Any]:
    """The record itself.

    Raises:
        Fault: it is no JSON object.
    """
    if not isinstance(record, dict):
        raise Fault(f"the record is {type(record).__name__}, not an object")
    return record


def one_of(record: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The value of the one name that has one; None where none has.

    Raises:
        Fault: several have.
    """
    found = [name for name in names if record.get(name) is not None]
    if len(found) > 1:
        raise Fault(f"both {' and '.join(found)}")
    return record[found[0]] if found else None


def _turn(turn: Any, number: int) -> tuple[str, Segments]:
    if not isinstance(turn, dict):
        raise Fault(f"turn {number} is {type(turn).__name__}, not an object")
    role = required_text(one_of(turn, ("from", "role")), f"role in turn {number}")
    if role not in _ROLES:
        raise Fault(f"unknown role {role!r} in turn {number}")
    content = one_of(turn, ("value", "content"))
    if isinstance(content, list):
        return _ROLES[role], [_segment(part, number) for part in content]
    return _ROLES[role], [required_text(content, f"text in turn {number}")]


def _segment(part: Any, number: int) -> str | None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "image":
        return None
    if kind == "text":
        return required_text(part.get("text"), f"text in a part of turn {number}")
    raise Fault(f"turn {number} has a part of type {kind!r}; known are text and image")


def _text(segments: Segments, name: str) -> str:
    texts = [segment for segment in segments if segment is not None]
    if len(texts) < len(segments):
        raise Fault(f"a picture in the {name}")
    return "".join(texts)
