"""One measured number and the bar that it has to reach."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured number.

    Attributes:
        bar: what it is held against; None where it only informs.
        side: "at most" or "at least" the bar.
    """

    name: str
    value: float
    unit: str
    bar: float | None = None
    side: Literal["at most", "at least"] = "at most"

    @property
    def holds(self) -> bool:
        """Whether the number reaches its bar."""
        if self.bar is None:
            return True
        return self.value <= self.bar if self.side == "at most" else self.value >= self.bar

    def __str__(self) -> str:
        if self.bar is None:
            return f"      {self.name}: {self.value:.4g} {self.unit}"
        verdict = "ok   " if self.holds else "SHORT"
        return f"{verdict} {self.name}: {self.value:.4g} {self.unit}, {self.side} {self.bar:.4g}"
