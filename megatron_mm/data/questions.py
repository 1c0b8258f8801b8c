"""Samples as questions that can be asked: one question with one answer, which is known."""

from dataclasses import dataclass

from megatron_mm.chat.render import Conversation, Question
from megatron_mm.config.errors import InputError
from megatron_mm.data.decode import decode_with_pillow
from megatron_mm.data.shards import PreparedData


@dataclass(frozen=True, slots=True)
class Asked:
    """A question of the data set, its reference answer, and where it lies.

    Attributes:
        system: the sample's own system text, if it has one.
    """

    name: str
    question: Question
    reference: str
    system: str | None = None

    @property
    def text(self) -> str:
        """Of the question, without the pictures."""
        return "".join(part for part in self.question.parts if isinstance(part, str)).strip()


def ask(data: PreparedData, row: int) -> Asked:
    """The question of a row.

    Raises:
        InputError: the sample is damaged, or not one question with one answer.
    """
    stored = data.read(row)
    content = stored.content.content(decode_with_pillow(stored.pictures, stored.name))
    if not isinstance(content, Conversation) or len(content.turns) != 1:
        raise InputError(
            f"sample {stored.name} is not one question with one answer, which can be checked; name other parts of the "
            "data in data.blend"
        )
    ((question, response),) = content.turns
    return Asked(stored.name, question, response.answer, content.system)
