"""Fields of a config.json, read by type and range; whatever cannot be followed is noted with its name and value."""

import math
from collections.abc import Collection, Mapping
from typing import Any

# Longest value that is shown in a message.
_SHOWN_CHARACTERS = 200
_ROPE_SECTIONS = ("rope_parameters", "rope_scaling")
# Beside type and theta. mrope_section says which positions of a picture's rows and columns go where; this family counts
# positions in one dimension, and then it changes nothing.
_ROPE_WITHOUT_EFFECT = ("mrope_section", "mrope_interleaved")


class Section:
    """One section of a config.json.

    Args:
        name: what stands before its fields in messages, for example "text_config.".
        given: its fields.
        defaults: what transformers takes for fields that are absent.
        faults: where a line is added for each field that cannot be followed.
    """

    def __init__(self, name: str, given: Mapping[str, Any], defaults: Mapping[str, Any], faults: list[str]):
        self.name, self.given, self.defaults, self.faults = name, given, defaults, faults

    def fault(self, field: str, why: str) -> None:
        """Note that a field cannot be followed."""
        self.faults.append(f"  {self.name}{field}={_shown(self.value(field))}: {why}")

    def check(
        self,
        fixed: Mapping[str, tuple[Any, ...]],
        read: Collection[str],
        irrelevant: Collection[str],
        ignored: Collection[str],
    ) -> None:
        """Note every field with a value that we do not follow, and every unknown one.

        Args:
            fixed: the values that a field may have.
            read: fields that are read otherwise.
            irrelevant: fields that do not change the model.
            ignored: fields that the user says do not.
        """
        for field, value in self.given.items():
            if field in ignored:
                continue
            if field in fixed:
                if value not in fixed[field]:
                    self.fault(field, f"only {' or '.join(map(repr, fixed[field]))} is supported")
            elif field not in read and field not in irrelevant:
                self.fault(field, "unknown; where it does not change the model, pass --ignore-field " + field)

    def value(self, field: str) -> Any:
        """Return what is given, or else the default; None where there is neither."""
        return self.given.get(field, self.defaults.get(field))

    def integer(self, field: str, most: int = 2**31 - 1, least: int = 1) -> int:
        """Return a whole number from `least` to `most`; anything else is noted, and `least` returned."""
        found = self.value(field)
        if not isinstance(found, int) or isinstance(found, bool):
            self.fault(field, "not a whole number")
        elif not least <= found <= most:
            self.fault(field, f"not between {least} and {most}")
        else:
            return found
        return least

    def number(self, field: str) -> float:
        """Return a finite number above 0; anything else is noted, and 1 returned."""
        found = self.value(field)
        if not is_positive_number(found):
            self.fault(field, "not a number above 0")
            return 1.0
        return float(found)

    def truth(self, field: str) -> bool:
        """Return true or false; anything else is noted, and false returned."""
        found = self.value(field)
        if not isinstance(found, bool):
            self.fault(field, "neither true nor false")
        return found is True

    def divides(self, field: str, other: str) -> None:
        """Note where one whole number does not divide another."""
        if self.integer(other) % self.integer(field):
            self.fault(field, f"does not divide {other}={self.integer(other)}")

    def section(self, field: str) -> Mapping[str, Any]:
        """Return the fields of a section in this one; anything else is noted, and no fields returned."""
        found = self.given.get(field)
        if not isinstance(found, dict):
            self.faults.append(f"  {self.name}{field}={_shown(found)}: not an object with fields of its own")
            return {}
        return found


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def is_positive_number(value: Any) -> bool:
    """Return whether a value is a finite number above 0, and not true."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def rope_theta(section: Section, ignored: Collection[str]) -> float:
    """Return the base of rotary position embeddings; whatever is no plain RoPE is noted.

    transformers has written the base as `rope_theta` beside or inside `rope_parameters`, and the kind as `rope_type`
    or `type` in `rope_parameters` or `rope_scaling`, and reads them all: a kind other than "default" under any name is
    another model, and of two bases it takes the inner one.
    """
    bases = {"rope_theta": section.given["rope_theta"]} if section.given.get("rope_theta") is not None else {}
    for name in _ROPE_SECTIONS:
        inner = section.given.get(name)
        if inner is None or name in ignored:
            continue
        if not isinstance(inner, dict):
            section.fault(name, "not an object with fields of its own")
            continue
        kinds = [inner[key] for key in ("rope_type", "type") if inner.get(key) is not None]
        if any(kind != "default" for kind in kinds):
            section.fault(name, "only rope_type default is supported")
        elif inner.get("partial_rotary_factor", 1) != 1:
            section.fault(name, "only partial_rotary_factor 1 is supported")
        known = ("rope_type", "type", "rope_theta", "partial_rotary_factor", *_ROPE_WITHOUT_EFFECT)
        unknown = [key for key in inner if key not in known and key not in ignored]
        if unknown and all(kind == "default" for kind in kinds):
            section.fault(name, f"{', '.join(unknown)} without effect on rope_type default, or unknown; remove it")
        if inner.get("rope_theta") is not None:
            bases[f"{name}.rope_theta"] = inner["rope_theta"]
    return _one_base(section, bases)


def _one_base(section: Section, bases: Mapping[str, Any]) -> float:
    wrong = [name for name, base in bases.items() if not is_positive_number(base)]
    for name in wrong:
        section.faults.append(f"  {section.name}{name}={bases[name]!r}: not a number above 0")
    if not wrong and len(set(bases.values())) > 1:
        given = " and ".join(f"{section.name}{name}={base!r}" for name, base in bases.items())
        section.faults.append(f"  {given} differ; transformers computes with the inner one; remove the wrong one")
    if wrong or not bases:
        return float(section.defaults["rope_parameters"]["rope_theta"])
    return float(next(iter(bases.values())))
