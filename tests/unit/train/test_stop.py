"""Signals are noted; a second one ends the process."""

import signal

import pytest

from megatron_mm.train.stop import SIGNALS, stop_signals
from tests.ranks import run_alone


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_the_old_handlers_come_back(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in SIGNALS]
    with stop_signals() as request:
        assert request.signal_name is None
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGUSR1)  # Slurm may say it again
        assert request.signal_name == "SIGUSR1"
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_slurms_sigterm_behind_the_launchers_sigusr1_is_the_first() -> None:
    with stop_signals() as request:
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert request.signal_name == "SIGTERM"


def _twice() -> None:
    with stop_signals():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)


def test_a_second_one_ends_the_process() -> None:
    with pytest.raises(Exception, match="SIGTERM"):
        run_alone(_twice)
