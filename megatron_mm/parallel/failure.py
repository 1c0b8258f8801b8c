"""What ended a rank: how a rank tells it, and how the launcher reads it.

A rank leaves its last words in the file that TORCHELASTIC_ERROR_FILE names, in torch's format, so that torchrun
understands them as well as our own launcher.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_mm.config.errors import BAD_INPUT_CODE, InputError
from megatron_mm.processes import end_with_parent

# How long a rank that lost its peers waits to be ended, since it is not the one to blame.
CONSEQUENCE_SECONDS = 10.0
FAILURE_CODE = 1

# How gloo, NCCL and their store name a peer that is gone. A collective that failed for another reason is reported
# later for it, but it is reported.
_LOST_PEER = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LastWords:
    """What a rank said before it ended.

    Attributes:
        message: one line for bad input, else the traceback.
        is_bad_input: the user can mend it.
        seconds: when it was said, since the epoch.
    """

    message: str
    is_bad_input: bool
    seconds: float


def run_rank(work: Callable[[], int]) -> int:
    """Do a rank's work and return its exit code; what it fails for is told to the launcher.

    Whoever started it must live: a rank whose launcher was killed would hold its GPU and the run's directory.
    An error that only says that other ranks have gone is told after `CONSEQUENCE_SECONDS`, by when the launcher has
    usually ended this rank for the error of another one.
    """
    end_with_parent(os.getppid())
    try:
        return work()
    except InputError as error:
        tell(str(error), is_bad_input=True)
        return BAD_INPUT_CODE
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # noqa: BLE001 (whatever it is: torch's CheckpointException is no Exception)
        words = traceback.format_exc()
        if _is_consequence(error):
            # The training loop's handlers would have it go on; the launcher's SIGTERM shall end it now. SIGUSR1 asks
            # for a checkpoint that cannot be saved any more, and must not hide the failure.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            time.sleep(CONSEQUENCE_SECONDS)
        tell(words, is_bad_input=False)
        return FAILURE_CODE


def read_last_words(file: Path) -> LastWords | None:
    """What a rank left in its error file; None as long as it left nothing."""
    if not file.is_file():
        return None
    said = json.loads(file.read_text(encoding="utf-8"))["message"]
    extra = said["extraInfo"]
    return LastWords(extra["py_callstack"] or said["message"], extra["is_bad_input"], extra["seconds"])


def tell(words: str, *, is_bad_input: bool) -> None:
    """Leave last words for the launcher; print them where there is none."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        print(f"megatron-mm: {words}", file=sys.stderr, flush=True)
        return
    seconds = time.time()
    extra = {
        "py_callstack": "" if is_bad_input else words,
        "timestamp": str(int(seconds)),
        "seconds": seconds,
        "is_bad_input": is_bad_input,
    }
    report = {"message": {"message": words.strip().splitlines()[-1], "extraInfo": extra}}
    if is_bad_input:
        report["message"]["message"] = words
    # It appears whole: the launcher looks for it all the time.
    aside = f"{error_file}.partial"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(report, file)
    os.replace(aside, error_file)


def _is_consequence(error: BaseException) -> bool:
    """Whether an error says no more than that a peer is gone."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None
    )
