"""What a response is worth: the spec of a reward, and the record of what was found."""

import importlib.metadata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Self, cast

from megatron_mm.config.errors import InputError
from megatron_mm.grading.answers import KINDS, Expected, equal, settled
from megatron_mm.grading.formats import FORMATS
from megatron_mm.grading.quantities import Tolerance

if TYPE_CHECKING:  # what grades needs no pydantic
    from megatron_mm.config.schema import RewardConfig

# 1 only if format and answer are right (Vision-R1, arXiv 2503.06749v4, section 3.4).
HFRRF = "hfrrf"
# Format and answer are paid apart (Vision-R1-Zero: 1:1).
WEIGHTED = "weighted"
# Entry points of this group are callables (response, reference, question) -> reward.
PLUGINS = "megatron_mm.rewards"

Plugin = Callable[[str, str, str], float]


class Failure(StrEnum):
    """Why an answer could not be compared; its reward is 0."""

    TIMEOUT = "timeout"
    MEMORY = "memory"
    CRASH = "crash"
    TOO_LONG = "too_long"


@dataclass(frozen=True, slots=True)
class Submission:
    """A whole response, trigger included, with what it answers.

    Attributes:
        question: options of a multiple choice are looked for in it.
        finished: false where a limit cut the response off; such a response keeps no format.
    """

    response: str
    reference: str
    question: str = ""
    finished: bool = True


@dataclass(frozen=True, slots=True)
class Grade:
    """What was found.

    Attributes:
        format_right: None where a plug-in gave the reward; `answer_right` too.
        note: what a failure was.
    """

    reward: float
    format_right: bool | None = None
    answer_right: bool | None = None
    failure: Failure | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSpec:
    """How responses are paid.

    Attributes:
        name: "hfrrf", "weighted", or a plug-in, which does without the other fields.
        format: of formats.FORMATS.
        kind: of answers.KINDS.
        format_weight: of "weighted"; with `accuracy_weight` 1:1, which makes 1 together as EasyR1's r1v reward has it.
        tolerance: for values with units.

    Raises:
        InputError: unknown names, all of them in one message.
    """

    name: str = HFRRF
    format: str = "vision_r1"
    kind: str = "auto"
    format_weight: float = 0.5
    accuracy_weight: float = 0.5
    tolerance: Tolerance = field(default_factory=Tolerance)

    @classmethod
    def of_config(cls, config: "RewardConfig") -> Self:
        """As a run's config has it."""
        return cls(
            name=config.name,
            format=config.format,
            kind=config.kind,
            format_weight=config.format_weight,
            accuracy_weight=config.accuracy_weight,
            tolerance=Tolerance(config.relative_tolerance, config.absolute_tolerance),
        )

    def __post_init__(self) -> None:
        rewards = (HFRRF, WEIGHTED, *plugin_names())
        faults = [
            *_unknown("reward", self.name, rewards, f", or install a plug-in (an entry point of {PLUGINS})"),
            *_unknown("format", self.format, FORMATS),
            *_unknown("kind of answer", self.kind, KINDS),
        ]
        if faults:
            raise InputError("\n".join(faults))

    @property
    def is_plugin(self) -> bool:
        """Whether the reward comes from a plug-in."""
        return self.name not in (HFRRF, WEIGHTED)

    def answer_of(self, submission: Submission) -> tuple[bool, str | None]:
        """Whether the format is right, and the answer to be paid for, if there is one."""
        response = submission.response
        answer = FORMATS[self.format].strict(response) if submission.finished else None
        if answer is not None or self.name == HFRRF:
            return answer is not None, answer
        return False, FORMATS[self.format].loose(response)

    def reward(self, format_right: bool, answer_right: bool) -> float:
        """What a response is paid."""
        if self.name == HFRRF:
            return float(format_right and answer_right)
        return self.format_weight * format_right + self.accuracy_weight * answer_right

    def settled(self, answer: str, submission: Submission) -> bool | None:
        """Whether an answer is right, where that can be said without a worker; else None."""
        return settled(answer, Expected(submission.reference, submission.question, self.tolerance), self.kind)

    def judge(self) -> Plugin:
        """What compares an answer, or pays a whole response where the reward is a plug-in. Runs in a worker.

        Raises:
            InputError: the plug-in cannot be loaded.
        """
        if self.is_plugin:
            return load_plugin(self.name)

        def is_right(answer: str, reference: str, question: str) -> bool:
            return equal(answer, Expected(reference, question, self.tolerance), self.kind)

        return is_right


def plugin_names() -> set[str]:
    """Names of the installed plug-ins."""
    return set(importlib.metadata.entry_points(group=PLUGINS).names)


def load_plugin(name: str) -> Plugin:
    """Import a plug-in.

    Raises:
        InputError: it cannot be imported, or is nothing to call.
    """
    (entry, *_) = importlib.metadata.entry_points(group=PLUGINS, name=name)
    try:
        plugin = entry.load()
    except Exception as error:  # noqa: BLE001 - whatever a plug-in raises while it is imported
        raise InputError(f"reward {name!r} ({entry.value}) cannot be loaded: {error!r}; mend or uninstall it") from None
    if not callable(plugin):
        raise InputError(
            f"reward {name!r} ({entry.value}) is of type {type(plugin).__name__}; "
            "make it a function of (response, reference, question)"
        )
    return cast(Plugin, plugin)


def _unknown(what: str, name: str, names: Iterable[str], otherwise: str = "") -> Iterator[str]:
    if name not in names:
        yield f"there is no {what} {name!r}; use {', '.join(sorted(names))}{otherwise}"
