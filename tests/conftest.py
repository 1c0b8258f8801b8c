"""What several tests share: a tokenizer and a small prepared data set, made once a session."""

from pathlib import Path

import pytest

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.data.digits import prepare_digits
from megatron_mm.data.shards import TOKENIZER


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of 60 training and 20 held-out pictures."""
    directory = tmp_path_factory.mktemp("data") / "digits"
    prepare_digits(directory, num_train=60, num_heldout=20, seed=0)
    return directory


@pytest.fixture(scope="session")
def tokenizer(digits: Path) -> ChatTokenizer:
    """The data set's tokenizer."""
    return ChatTokenizer(digits / TOKENIZER)
