"""Formulas and equations of chemistry: `\\ce{H2O}` is H_2O, `SO4 2-` is SO_4^{2-}, but Co is not CO."""

import re
from collections import Counter

_ARROW = re.compile(
    r"<->|<=>|<-->|-->|->|\\(?:long)?rightarrow|\\rightleftharpoons|\\leftrightarrow|\\xrightarrow\s*\{[^{}]*\}|\\to(?![a-z])|⇌"
)
_REVERSIBLE = re.compile(r"<|\\rightleftharpoons|\\leftrightarrow")
_MARKS = re.compile(r"\\(?:ce|mathrm|text|rm)\s*\{|\\left|\\right|\\[,;!: ]|[{}_$]|\s")
_DOT = re.compile(r"\\cdot(?:\s|(?=\d))|[·•⋅∙*]")
_STATE = r"(?:\((?:s|l|g|aq)\))?"
_GROUP = r"(?:[A-Z][a-z]?\d*|[(\[]|[)\]]\d*)"
# Up to a charge, written behind a caret or not.
_SPECIES = re.compile(rf"(?P<body>{_GROUP}+(?:·\d*{_GROUP}+)*)(?P<charge>\^?\d*[+-])?(?P<state>{_STATE})")
_ISOTOPE = re.compile(
    r"(?:\^(?P<mass>\d+)(?:_(?P<number>\d+))?|_(?P<below>\d+)\^(?P<above>\d+))(?P<symbol>[A-Z][a-z]?)"
)
_SHELLS = re.compile(r"(?:\[[A-Z][a-z]\])?(?:\d[spdf]\^?\{?\d{1,2}\}?\s*)+")
_ROMAN = {"I": 1, "II": 2, "III": 3, "IV": 4, "V": 5, "VI": 6, "VII": 7, "VIII": 8}
_STATE_OF_OXIDATION = re.compile(r"(?P<sign>[+-])(?P<number>[IV]+|\d)|(?P<digit>\d)(?P<behind>[+-])")
_ELEMENTS = frozenset(
    re.findall(
        "[A-Z][a-z]?",
        "HHeLiBeBCNOFNeNaMgAlSiPSClArKCaScTiVCrMnFeCoNiCuZnGaGeAsSeBrKrRbSrYZrNbMoTcRuRhPdAgCdInSnSbTeIXeCsBaLaCePrNdPmSm"
        "EuGdTbDyHoErTmYbLuHfTaWReOsIrPtAuHgTlPbBiPoAtRnFrRaAcThPaUNpPuAmCmBkCfEsFmMdNoLr",
    )
)


def equal_chemistry(answer: str, reference: str) -> bool | None:
    """Whether two formulas, ions, equations of reaction, isotopes or shells are the same; None where these are none.

    They are compared as they are written, up to the marks of LaTeX and the order of what reacts: CH2O is not C6H12O6,
    and an equation with other coefficients is another one.
    """
    if _ARROW.search(reference):
        right = _reaction(reference)
        return None if right is None else _reaction(answer) == right
    for read in (_shells, _isotope):
        if (right := read(reference)) is not None:
            return read(answer) == right
    if (oxidation := _state_of_oxidation(reference)) is not None and _state_of_oxidation(answer) is not None:
        return _state_of_oxidation(answer) == oxidation
    right, given = _species(reference), _species(answer)
    if right is None or (given is None and not _is_chemical(right)):
        return None
    if given is None:
        return False
    if _same_species(given, right):
        return True
    return False if _is_chemical(right) or _is_chemical(given) else None


# Body, charge (with its caret), state.
_Species = tuple[str, str, str]


def _plain(text: str) -> str:
    text = re.sub(r"\^\s*\{\s*([^{}]*?)\s*\}", r"^\1", _DOT.sub("·", text))
    # The space before a charge keeps it apart from the digits of the formula.
    text = re.sub(r"(?<=\d)\s+(?=\d*[+-]\Z)", "^", text.strip())
    return _MARKS.sub("", text)


def _species(text: str) -> _Species | None:
    match = _SPECIES.fullmatch(_plain(text))
    if match is None or not set(re.findall(r"[A-Z][a-z]?", match["body"])) <= _ELEMENTS:
        return None
    charge = match["charge"] or ""
    return match["body"], re.sub(r"\^1(?=[+-])", "^", charge), match["state"]


def _same_species(one: _Species, other: _Species) -> bool:
    """Whether both are the same; `Fe3+` has lost the caret that says which digit is the charge."""
    if "^" in one[1] and "^" in other[1]:
        return one == other
    flat = ["".join(part).replace("^", "") for part in (one, other)]
    return flat[0] == flat[1]


def _is_chemical(species: _Species) -> bool:
    """Whether it is no product of variables: it has digits and several elements, a charge or a state."""
    body, charge, state = species
    return bool(charge or state or "·" in body or re.search(r"[A-Za-z)]\d", body))


def _reaction(text: str) -> tuple[bool, Counter[tuple[str, str]], Counter[tuple[str, str]]] | None:
    """Return whether it goes both ways, and what stands on each side how many times."""
    arrow = _ARROW.search(text)
    if arrow is None:
        return None
    sides = [_side(part) for part in (text[: arrow.start()], text[arrow.end() :])]
    if sides[0] is None or sides[1] is None:
        return None
    return _REVERSIBLE.search(arrow[0]) is not None, sides[0], sides[1]


def _side(text: str) -> Counter[tuple[str, str]] | None:
    found: Counter[tuple[str, str]] = Counter()
    for part in re.split(r"(?<!\^)(?<!\{)\s\+\s|(?<=[A-Za-z\d)}])\+(?=\s*\d*[A-Z\\])", text.replace("\n", " ")):
        match = re.fullmatch(r"(\d*)(.+)", re.sub(r"\A\\(?:ce|mathrm)\{", "", part.strip()), re.DOTALL)
        species = _species(match[2]) if match else None
        if match is None or species is None:
            return None
        found[(match[1] or "1", "".join(species).replace("^", ""))] += 1
    return found


def _shells(text: str) -> str | None:
    text = re.sub(r"\\(?:mathrm|text|rm)\s*|\$", "", text).strip()
    return re.sub(r"[\^{}\s]", "", text) if _SHELLS.fullmatch(text) else None


def _isotope(text: str) -> tuple[str, str, str] | None:
    text = re.sub(r"\{\}", "", text)
    match = _ISOTOPE.fullmatch(re.sub(r"\\(?:ce|mathrm|text)\s*|[{}\s]", "", text))
    return match and (match["mass"] or match["above"], match["number"] or match["below"] or "", match["symbol"])


def _state_of_oxidation(text: str) -> int | None:
    match = _STATE_OF_OXIDATION.fullmatch(text.strip())
    if match is None:
        return None
    number = match["number"] or match["digit"]
    value = _ROMAN.get(number) or (int(number) if number.isdecimal() else None)
    sign = -1 if (match["sign"] or match["behind"]) == "-" else 1
    return None if value is None else sign * value
