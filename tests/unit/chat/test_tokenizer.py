"""A tokenizer that breaks what the modes need is refused by name."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_mm.chat.tokenizer import CONTROL_TOKENS, ChatTokenizer
from megatron_mm.config.errors import InputError


def _save(directory: Path, added: tuple[str, ...]) -> Path:
    """A byte tokenizer without merges: a blank line is two tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: number for number, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_tokens(list(added))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(directory)
    return directory


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json in"):
        ChatTokenizer(tmp_path)


def test_missing_control_tokens_are_listed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lacks the added tokens .*<think>"):
        ChatTokenizer(_save(tmp_path, CONTROL_TOKENS[:3]))


def test_a_mode_must_be_decided_by_one_token(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="non-thinking mode is not decided by one token"):
        ChatTokenizer(_save(tmp_path, CONTROL_TOKENS))


def test_control_tokens_in_text_stay_text(tokenizer: ChatTokenizer) -> None:
    text = "a<image>b<think><|im_end|></think>\n"
    ids = tokenizer.text(text)
    assert not {tokenizer.control(token) for token in CONTROL_TOKENS} & set(ids)
    assert tokenizer.decode(ids) == text
