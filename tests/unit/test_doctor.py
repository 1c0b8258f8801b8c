"""The doctor: packages that crash, fail or hang when they are imported are lines of its report."""

from pathlib import Path

import pytest

from megatron_mm.doctor import Probe


@pytest.mark.parametrize(
    ("content", "seconds", "expected"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 60, "its import is ended by SIGSEGV"),
        ("raise OSError('libcudnn.so.9: no such file')", 60, "does not import: OSError: libcudnn.so.9: no such file"),
        ("import time; time.sleep(1000)", 1, "its import did not end within 1 s"),
        ("print('chatter')", 60, "None, imports"),
    ],
    ids=["crash", "failure", "hang", "whole"],
)
def test_an_import_that_goes_wrong_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, seconds: float, expected: str
) -> None:
    """Of a stand-in for Transformer Engine, which is not installed here, and an empty torch."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "pytorch.py").write_text(content, encoding="utf-8")
    (tmp_path / "torch.py").touch()
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    (finding,) = Probe("transformer_engine", seconds).findings()
    assert finding.what == "transformer_engine"
    assert finding.found == expected
    assert bool(finding.fix) == (expected != "None, imports")
