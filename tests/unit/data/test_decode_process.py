"""Decoding on a rank's GPU: one process for all workers, on that GPU; without a GPU, by a stand-in for DALI."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.decode import Decoder, decode_with_pillow
from megatron_mm.data.decode_process import DecodeProcess
from megatron_mm.data.loader import Feed, MicroBatches
from tests.datasets import encoded
from tests.tiny import tiny_config

GPU, STEPS = 3, 12
# What decode.py uses of DALI, by Pillow. A pipeline tells who made it and for which GPU.
STAND_IN = {
    "__init__.py": "",
    "types.py": "UINT8 = 'uint8'",
    "fn.py": """
class decoders:
    image = staticmethod(lambda encoded, device: device)
def external_source(name, dtype):
    return name
""",
    "pipeline.py": """
import os
from io import BytesIO
import numpy as np
from PIL import Image

class Decoded(list):
    on_gpu = True
    def as_cpu(self):
        return self

class Pipeline:
    def __init__(self, batch_size, num_threads, device_id, prefetch_queue_depth):
        with open(os.environ["DALI_STAND_IN"], "a") as log:
            log.write(f"{os.getpid()} {os.getppid()} {device_id}\\n")
    def __enter__(self): return self
    def __exit__(self, *_): pass
    def set_outputs(self, device): assert device == "mixed", device
    def build(self): pass
    def feed_input(self, name, arrays): self.arrays = arrays
    def run(self):
        try:
            return (Decoded(np.asarray(Image.open(BytesIO(a.tobytes())).convert("RGB")) for a in self.arrays),)
        except OSError as error:
            raise RuntimeError(error)
""",
}


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts the stand-in where processes find it; a line a pipeline: process, its parent, GPU."""
    package = tmp_path / "site" / "nvidia" / "dali"
    package.mkdir(parents=True)
    for name, content in STAND_IN.items():
        (package / name).write_text(content, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("DALI_STAND_IN", str(tmp_path / "log"))
    return tmp_path / "log"


def _pipelines(log: Path) -> list[tuple[int, int, int]]:
    return [tuple(map(int, line.split())) for line in log.read_text(encoding="utf-8").splitlines()]  # pyright: ignore


def _config(path: Path, decoder: str) -> RunConfig:
    values = {"data__path": path, "data__blend": "{}", "data__packed": "true", "data__max_sequence_tokens": 192}
    values |= {"model__language__vocab_size": 384, "train__steps": STEPS, "train__global_batch": 4}
    return tiny_config(**values, train__micro_batch=1, data__num_workers=2, data__decoder=decoder)


def _steps(path: Path, tokenizer: ChatTokenizer, decoder: str) -> Iterator[bytes]:
    config = _config(path, decoder)
    for batches in Feed(MicroBatches(config, tokenizer, 0, 1, gpu=GPU), 0, config):
        yield b"".join(batch.tiles.numpy().tobytes() for batch in batches if batch.tiles is not None)


def test_all_workers_of_a_rank_share_one_process_on_its_gpu(log: Path, digits: Path, tokenizer: ChatTokenizer) -> None:
    """It is killed once: nothing is lost."""
    expected, found = list(_steps(digits, tokenizer, "pillow")), []
    for step in _steps(digits, tokenizer, "dali"):
        found.append(step)
        if len(found) == 2:
            os.kill(_pipelines(log)[0][0], signal.SIGKILL)
    assert found == expected
    assert len(set(expected)) > 1
    made = _pipelines(log)
    # One before and one after: no worker has a pipeline of its own, and neither has the training process.
    assert len({process for process, *_ in made}) == 2
    assert {parent for _, parent, _ in made} == {os.getpid()}
    assert {gpu for *_, gpu in made} == {GPU}
    for process, *_ in made:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.fixture
def decode(log: Path) -> Iterator[Decoder]:
    """A worker's."""
    process = DecodeProcess(GPU, 1)
    yield process.connect(0)
    process.close()


def test_what_cannot_be_decoded_is_named_and_the_next_is_decoded(decode: Decoder) -> None:
    with pytest.raises(InputError, match="a picture of some sample cannot be decoded by DALI"):
        decode([b"no picture"], "some sample")
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    files = [encoded(Image.fromarray(pixels)), encoded(Image.fromarray(pixels[:20, :, 0]))]
    for ours, theirs in zip(decode(files, "another"), decode_with_pillow(files, "another"), strict=True):
        assert ours.tobytes() == theirs.tobytes()
    assert decode([], "without pictures") == []


def test_without_dali_a_run_ends(digits: Path, tokenizer: ChatTokenizer) -> None:
    with pytest.raises(InputError, match=r"data\.decoder=dali needs NVIDIA DALI"):
        next(_steps(digits, tokenizer, "dali"))


def test_a_fault_of_the_process_is_told_as_it_is(log: Path, tmp_path: Path) -> None:
    """It is not taken for a process that was killed, which would be started again and again."""
    file = tmp_path / "site" / "nvidia" / "dali" / "pipeline.py"
    file.write_text(
        STAND_IN["pipeline.py"].replace("def build(self): pass", "def build(self): raise MemoryError('no room')"),
        encoding="utf-8",
    )
    process = DecodeProcess(GPU, 1)
    with pytest.raises(RuntimeError, match=r"(?s)decodes for this rank failed.*MemoryError: no room"):
        process.connect(0)([encoded(Image.new("RGB", (4, 4)))], "a sample")
    process.close()
