"""Conversations as JSON: LLaVA's and ShareGPT's, OpenAI's messages, and both files of Vision-R1-cold.

    {"conversations": [{"from": "human", "value": "<image>\\nWhat is this?"}, {"from": "gpt", "value": "A cat."}],
     "image": "cats/1.jpg"}
    {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                  {"role": "assistant", "content": "<think>It has whiskers.</think>A cat."}], "images": ["cats/1.jpg"]}

Either name of a list, and of a turn's fields, goes with either. `system`, or a first turn of the system, is the
system's text. A part of a turn may name its picture, as OpenAI's, Anthropic's and Qwen's do. Reasoning may be in a
field of its own (`reasoning_content`, `reasoning`, `thinking`), and a turn may say that it is not to be trained
(`"loss": false`, `"train": false`, `"weight": 0`). texts.py says where pictures stand and what else is reasoning,
media.py which other names of fields are understood, and what is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_mm.config.prepare import SourceConfig
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.sources.base import PictureSource, Task
from megatron_mm.data.sources.faults import Fault, Found
from megatron_mm.data.sources.json_files import json_tasks
from megatron_mm.data.sources.media import is_empty, named_pictures, refuse_other_media, refuse_tools
from megatron_mm.data.sources.picture_names import picture_sources
from megatron_mm.data.sources.texts import Segments, place_pictures, plain_answer, required_text, response_of

TURNS = ("conversations", "messages")
REASONING = ("reasoning_content", "reasoning", "thinking")
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_PICTURE_PARTS = ("image", "image_url", "input_image")
# What says whether a turn is trained (ms-swift, axolotl, OpenAI).
_TRAINED, _MASKED = ("loss", "train", "trainable", "weight"), ("mask", "masked")


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
    """The pictures that a record or the parts of its turns name.

    Raises:
        Fault: it is no object, names them in a way that is not understood, or has media that cannot be learned.
    """
    record = as_object(record)
    pictures = picture_sources(_named(record), root)
    refuse_other_media(record, has_pictures=bool(pictures))
    return pictures


def num_named(record: dict[str, Any]) -> int:
    """Return how many pictures a record names, beside its turns or in parts of them.

    Raises:
        Fault: see `pictures_of`.
    """
    return len(_named(record))


def _named(record: dict[str, Any]) -> list[Any]:
    beside = named_pictures(record)
    beside = beside if isinstance(beside, list) else [] if beside is None else [beside]
    in_parts = [_picture_of(part) for turn in _turns(record) for part in _parts(turn) if _is_picture(part)]
    named = [picture for picture in in_parts if not is_empty(picture)]
    if named and len(named) < len(in_parts):
        raise Fault(f"{len(named)} of {len(in_parts)} image parts name their picture")
    if named and beside and named != beside:
        raise Fault("pictures are named both in parts of turns and beside the turns, and differ")
    return named or beside


def conversation_of(record: Any, num_pictures: int) -> StoredContent:
    """The texts of a record, with its pictures placed.

    Raises:
        Fault: it is not a conversation, or the pictures do not fit into it.
    """
    record = as_object(record)
    refuse_tools(record)
    turns = _turns(record)
    if not turns:
        raise Fault("no turns")
    said = [_turn(turn, number) for number, turn in enumerate(turns, 1)]
    system = record.get("system")
    if system is not None:
        required_text(system, "system text")
    if said[0].role == "system":
        if system:
            raise Fault("system texts both beside the turns and in the first of them")
        system = _text(said.pop(0).segments, "system turn")
    first = len(turns) - len(said) + 1
    for number, turn in enumerate(said):
        expected = ("user", "assistant")[number % 2]
        if turn.role != expected:
            raise Fault(f"turn {first + number} is the {turn.role}'s, not the {expected}'s")
    if not said:
        raise Fault("no turns")
    if said[-1].role != "assistant":
        raise Fault("the last turn is not the assistant's")
    asked, answered = said[0::2], said[1::2]
    if any(turn.reasoning for turn in asked):
        raise Fault("reasoning in a turn of the user")
    if (reasoning := reasoning_of(record, "the record")) is not None:
        if len(answered) > 1 or answered[0].reasoning:
            raise Fault(f"reasoning beside {len(said)} turns: it is not said of which it is; put it into the turn")
        answered = [replace(answered[0], reasoning=reasoning)]
    if not any(turn.trained for turn in answered):
        raise Fault("no turn is to be trained")
    questions = place_pictures([turn.segments for turn in asked], num_pictures)
    return StoredContent(
        tuple(
            StoredTurn(question, *_response(turn), turn.trained)
            for question, turn in zip(questions, answered, strict=True)
        ),
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


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn as it is written.

    Attributes:
        segments: texts, and None where a picture stands.
        reasoning: given beside its text.
        trained: whether it is to be.
    """

    role: str
    segments: Segments
    reasoning: str | None
    trained: bool


def _turns(record: dict[str, Any]) -> list[Any]:
    turns = one_of(record, TURNS)
    if turns is not None and not isinstance(turns, list):
        raise Fault(f"turns are {type(turns).__name__}, not a list")
    return turns or []


def _turn(turn: Any, number: int) -> _Turn:
    if not isinstance(turn, dict):
        raise Fault(f"turn {number} is {type(turn).__name__}, not an object")
    given = required_text(one_of(turn, ("from", "role")), f"role in turn {number}")
    role = _ROLES.get(given.strip().lower())
    if role is None:
        raise Fault(f"unknown role {given!r} in turn {number}")
    refuse_tools(turn)
    content = one_of(turn, ("value", "content"))
    if isinstance(content, list):
        segments: Segments = [segment for part in content for segment in _segments(part, number)]
    else:
        read = plain_answer if role == "assistant" else required_text
        segments = [read(content, f"text in turn {number}")]
    return _Turn(role, segments, reasoning_of(turn, f"turn {number}"), _is_trained(turn, number))


def reasoning_of(fields: dict[str, Any], name: str) -> str | None:
    """The reasoning that stands in a field of its own; None where there is none.

    Args:
        fields: of a record or turn.
        name: of it, for messages.

    Raises:
        Fault: several fields have some, or it is no text.
    """
    found = [field for field in REASONING if not is_empty(fields.get(field))]
    if len(found) > 1 and len({str(fields[field]) for field in found}) > 1:
        raise Fault(f"{name} has both {' and '.join(found)}")
    return required_text(fields[found[0]], f"{found[0]} of {name}").strip() if found else None


def _is_trained(turn: dict[str, Any], number: int) -> bool:
    marks = {field: turn[field] for field in (*_TRAINED, *_MASKED) if turn.get(field) is not None}
    for field, value in marks.items():
        if value not in (0, 1):  # False and True are these
            raise Fault(f"turn {number} has {field}={value!r}; known are true and false, 1 and 0")
    verdicts = {bool(value) == (field in _TRAINED) for field, value in marks.items()}
    if len(verdicts) > 1:
        raise Fault(f"turn {number} contradicts itself on whether it is trained: {marks}")
    return verdicts != {False}


def _response(turn: _Turn) -> tuple[str, str | None]:
    answer, reasoning = response_of(_text(turn.segments, "assistant's turn"))
    if turn.reasoning and reasoning is not None and reasoning != turn.reasoning:
        raise Fault("reasoning both in a turn's text and beside it")
    return answer, turn.reasoning or reasoning


def _parts(turn: Any) -> list[dict[str, Any]]:
    """Parts of a turn that are objects."""
    content = one_of(turn, ("value", "content")) if isinstance(turn, dict) else None
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _is_picture(part: dict[str, Any]) -> bool:
    return part.get("type", "image" if "image" in part else None) in _PICTURE_PARTS


def _picture_of(part: dict[str, Any]) -> Any:
    """What an image part says of its picture; None where it says nothing."""
    value = one_of(part, ("image", "image_url", "path", "url", "source"))
    if isinstance(value, dict) and "url" in value:
        return value["url"]
    if isinstance(value, dict) and value.get("type") == "base64":
        return f"data:{value.get('media_type')};base64,{value.get('data')}"
    return value


def _segments(part: Any, number: int) -> Segments:
    if isinstance(part, str):
        return [part]
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(part, dict) and _is_picture(part):
        # The line break that chat/template.py writes behind an image part when the model is served.
        return [None, "\n"]
    if kind in _TEXT_PARTS or (isinstance(part, dict) and kind is None and "text" in part):
        return [required_text(part.get("text"), f"text in a part of turn {number}")]
    raise Fault(f"turn {number} has a part of type {kind!r}; known are text and image")


def _text(segments: Segments, name: str) -> str:
    texts = [segment for segment in segments if segment is not None]
    if len(texts) < len(segments):
        raise Fault(f"a picture in the {name}")
    return "".join(texts)
