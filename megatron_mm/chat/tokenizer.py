"""A Hugging Face tokenizer, checked for what the modes need, that never turns a user's text into a control token.

A chat template hands over a string, so a served tag can stay text only by another spelling: `broken_tags` puts a
zero-width space behind its first character. What users and the system wrote is spelled so wherever it is rendered, and
the exported template does the same: training, rollout, evaluation and serving have the same ids. What the model is to
write itself (responses, documents) keeps its characters; `ChatTokenizer.text` tokenises it in pieces that end inside
each tag.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from transformers import AddedToken, PreTrainedTokenizerFast, Qwen2Tokenizer

from megatron_mm.chat import modes
from megatron_mm.config.errors import InputError
from megatron_mm.config.json_files import read_json_object

IMAGE = "<image>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|endoftext|>"
ZERO_WIDTH_SPACE = "\u200b"
# What a tokenizer is read from, the first of them at least.
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
CONTROL_TOKENS = (IMAGE, TURN_START, TURN_END, PAD, modes.THINK, modes.END_THINK)


class ChatTokenizer:
    """Ids of control tokens and of plain text.

    Attributes:
        tags: texts of all added tokens, longest first.

    Args:
        directory: of a Qwen3-style tokenizer.
        add_image: add the image token where there is none, as in a language model's.

    Raises:
        InputError: the directory holds no tokenizer, or a damaged one; it lacks a control token, or cuts the text after
            `<think>` so that the mode would not be decided by one token.
    """

    def __init__(self, directory: Path, *, add_image: bool = False):
        self.directory = directory
        hf = _open(directory)
        self.hf = hf
        if add_image:
            hf.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
        added = self.hf.get_added_vocab()
        missing = [token for token in CONTROL_TOKENS if token not in added]
        if missing:
            raise InputError(f"the tokenizer in {directory} lacks the added tokens {missing}; add them to it")
        self._control_ids = {token: added[token] for token in CONTROL_TOKENS}
        # Any added token, also those we do not use: "<tool_call>" in a user's text is text as well.
        self.tags = longest_first(added)
        self._control_pattern = re.compile("|".join(map(re.escape, self.tags)))
        self._check_mode_tokens()

    def __len__(self) -> int:
        return len(self.hf)

    def save(self, directory: Path) -> None:
        """Write the tokenizer, whose directory may then be opened as one."""
        self.hf.save_pretrained(directory)

    def control(self, token: str) -> int:
        """Id of a control token."""
        return self._control_ids[token]

    def text(self, text: str) -> list[int]:
        """Ids of plain text; what looks like a control token is broken up and stays text."""
        pieces, start = [], 0
        for match in self._control_pattern.finditer(text):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
        pieces.append(text[start:])
        return [token for piece in pieces for token in self.hf.encode(piece, add_special_tokens=False)]

    def broken_tags(self, text: str) -> str:
        """Return a text with a zero-width space behind the first character of every tag, which then is none."""
        for tag in self.tags:
            text = text.replace(tag, broken(tag))
        return text

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens included."""
        return self.hf.backend_tokenizer.decode(ids, skip_special_tokens=False)

    def _check_mode_tokens(self) -> None:
        for name, text in (("thinking", modes.THOUGHT_START), ("non-thinking", modes.EMPTY_THOUGHT)):
            ids = self.text(text)
            if len(ids) != 1:
                raise InputError(
                    f"the tokenizer in {self.directory} cuts {text!r} into {len(ids)} tokens, so that the {name} mode "
                    "is not decided by one token after <think>; use a tokenizer that has it as one token"
                )


def longest_first(tags: Iterable[str]) -> list[str]:
    """Return tags in an order in which none is met inside another before that one was."""
    return sorted(tags, key=lambda tag: (-len(tag), tag))


def broken(tag: str) -> str:
    """Return the spelling of a tag that no tokenizer takes for a control token."""
    return tag[0] + ZERO_WIDTH_SPACE + tag[1:]


def _open(directory: Path) -> PreTrainedTokenizerFast:
    """Open a tokenizer from its own files, by a class of transformers.

    AutoTokenizer reads the model's config.json first, and asks on the terminal whether to run the code that it names.

    Raises:
        InputError: there is none, or it is damaged.
    """
    settings = {}
    for name in _FILES:
        try:
            settings[name] = read_json_object(directory / name)
        except FileNotFoundError:
            continue
    if "tokenizer.json" not in settings:
        raise InputError(f"no tokenizer.json in {directory}; give the directory of a Qwen3-style tokenizer")
    # Only the class that Qwen3 names: it writes that name again, which older readers know.
    named = str(settings.get("tokenizer_config.json", {}).get("tokenizer_class"))
    kind = Qwen2Tokenizer if named.removesuffix("Fast") == "Qwen2Tokenizer" else PreTrainedTokenizerFast
    try:
        hf = kind.from_pretrained(directory)
    except Exception as error:  # noqa: BLE001 (tokenizers raises no narrower one for a file that it cannot use)
        reason = f"{type(error).__name__}: {error}"
        raise InputError(
            f"the tokenizer in {directory} ({', '.join(settings)}) cannot be read: {reason}; copy it again"
        ) from None
    # Written again, it would offer the code to whoever opens what we save.
    hf.init_kwargs.pop("auto_map", None)
    return hf
