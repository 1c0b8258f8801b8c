"""A sample as it is stored: JSON of its texts, and its pictures' encoded bytes.

    {"turns": [{"question": ["What is ", 0, "?"], "answer": "7", "reasoning": null}, ...], "system": null}
    {"document": ["some text", 0, "more text"]}

A number stands for a picture of the sample, counted from 0. `origin`, also in the JSON, says where the record came
from; it is not part of the content, and neither is the source's name.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Content, Conversation, Document, Question, Response
from megatron_mm.data.index import DIGEST_BYTES

StoredParts = list[str | int]
DOCUMENT = "document"


@dataclass(frozen=True, slots=True)
class StoredTurn:
    """A question with numbered pictures, and its response.

    Attributes:
        trained: whether the response is learned; in the JSON only where it is not.
    """

    question: StoredParts
    answer: str
    reasoning: str | None = None
    trained: bool = True


@dataclass(frozen=True, slots=True)
class StoredContent:
    """The texts of a sample: turns of a conversation, or a document."""

    turns: tuple[StoredTurn, ...] = ()
    system: str | None = None
    document: StoredParts | None = None

    @property
    def mode(self) -> str:
        """Thinking where a response has reasoning; "document" where nobody asked."""
        if self.document is not None:
            return DOCUMENT
        is_thinking = any(turn.reasoning is not None for turn in self.turns if turn.trained)
        return Mode.THINKING if is_thinking else Mode.NON_THINKING

    @property
    def parts(self) -> StoredParts:
        """Texts and numbers of pictures, in order, without the responses."""
        if self.document is not None:
            return self.document
        return [part for turn in self.turns for part in turn.question]

    def num_characters(self) -> int:
        """Of all texts."""
        texts = [part for part in self.parts if isinstance(part, str)]
        texts += [text for turn in self.turns for text in (turn.answer, turn.reasoning) if text]
        return sum(map(len, texts)) + len(self.system or "")

    def to_json(self) -> dict[str, Any]:
        """What is stored."""
        if self.document is not None:
            return {"document": self.document}
        turns = [
            {"question": turn.question, "answer": turn.answer, "reasoning": turn.reasoning}
            | ({} if turn.trained else {"trained": False})
            for turn in self.turns
        ]
        return {"turns": turns, "system": self.system}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> "StoredContent":
        """Read what `to_json` made; other keys do not count."""
        if "document" in tree:
            return cls(document=tree["document"])
        return cls(tuple(StoredTurn(**turn) for turn in tree["turns"]), tree["system"])

    def content(self, pictures: Sequence[Image.Image]) -> Content:
        """With the pictures in their places."""

        def placed(parts: StoredParts) -> tuple[str | Image.Image, ...]:
            return tuple(part if isinstance(part, str) else pictures[part] for part in parts)

        if self.document is not None:
            return Document(placed(self.document))
        turns = (
            (Question(placed(turn.question)), Response(turn.answer, turn.reasoning, turn.trained))
            for turn in self.turns
        )
        return Conversation(tuple(turns), self.system)

    def digest(self, pictures: Sequence[bytes]) -> bytes:
        """16 bytes of BLAKE2b over texts and encoded pictures: equal for exact duplicates, and a checksum."""
        hasher = hashlib.blake2b(digest_size=DIGEST_BYTES)
        for part in (json.dumps(self.to_json(), sort_keys=True).encode(), *pictures):
            hasher.update(len(part).to_bytes(8, "little"))
            hasher.update(part)
        return hasher.digest()
