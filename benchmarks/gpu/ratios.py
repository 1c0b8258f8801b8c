"""Figures that compare two measurements of one run."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.figure import Figure

# tokens/s of a training step, and of decoding.
STEP, DECODING = "tokens/s of a step", "tokens/s of decoding"
# Wanted.
LEAST_FP8, LEAST_GRAPHS = 1.2, 2.0
_BF16, _EAGER, _GRAPHS = "step-bf16", "rollout-eager", "rollout-graphs"
_FP8 = ("step-tensorwise", "step-blockwise", "step-delayed", "step-mxfp8")


def ratios(measured: Mapping[str, Sequence[Figure]]) -> tuple[list[Figure], list[str]]:
    """Compare what was measured in one run.

    Args:
        measured: the figures of each measurement that was asked for; of one that failed perhaps none.

    Returns:
        The ratios, each after the figures that it is made of; and the names of measurements whose failure leaves one
        out.
    """
    figures, missing = list[Figure](), list[str]()
    asked = [name for name in _FP8 if name in measured]
    if _BF16 in measured and asked:
        bf16 = _value(measured[_BF16], STEP)
        fp8 = {name: speed for name in asked if (speed := _value(measured[name], STEP)) is not None}
        if bf16 is not None and fp8:
            figures += _fp8_over_bf16(bf16, fp8)
        missing += ([_BF16] if bf16 is None else []) + ([] if fp8 else asked)
    if _EAGER in measured and _GRAPHS in measured:
        speeds = {side: _beginning(measured[side], DECODING) for side in (_EAGER, _GRAPHS)}
        for name in [name for name in speeds[_EAGER] if name in speeds[_GRAPHS]]:
            figures += _graphs_over_eager(name, speeds[_EAGER][name], speeds[_GRAPHS][name])
        missing += [side for side, found in speeds.items() if not found]
    return figures, missing


def _fp8_over_bf16(bf16: float, fp8: Mapping[str, float]) -> Iterator[Figure]:
    yield Figure(f"{STEP}, bf16", bf16, "tokens/s")
    for name, speed in fp8.items():
        recipe = name.removeprefix("step-")
        yield Figure(f"{STEP}, {recipe}", speed, "tokens/s")
        yield Figure(f"{STEP}, {recipe} over bf16", speed / bf16, "ratio")
    yield Figure(f"{STEP}, best FP8 recipe over bf16", max(fp8.values()) / bf16, "ratio", LEAST_FP8, "at least")


def _graphs_over_eager(name: str, eager: float, graphs: float) -> Iterator[Figure]:
    yield Figure(f"{name}, eager", eager, "tokens/s")
    yield Figure(f"{name}, with CUDA graphs", graphs, "tokens/s")
    yield Figure(f"{name}, with CUDA graphs over eager", graphs / eager, "ratio", LEAST_GRAPHS, "at least")


def _beginning(figures: Sequence[Figure], beginning: str) -> dict[str, float]:
    return {figure.name: figure.value for figure in figures if figure.name.startswith(beginning)}


def _value(figures: Sequence[Figure], name: str) -> float | None:
    return next((figure.value for figure in figures if figure.name == name), None)
