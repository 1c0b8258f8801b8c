"""A Hugging Face tokenizer, checked for what the modes need, that never turns a user's text into a control token."""

import re
from pathlib import Path

from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast

from megatron_mm.chat import modes
from megatron_mm.config.errors import InputError

IMAGE = "<image>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PAD = "<|endoftext|>"
CONTROL_TOKENS = (IMAGE, TURN_START, TURN_END, PAD, modes.THINK, modes.END_THINK)


class ChatTokenizer:
    """Ids of control tokens and of plain text.

    Args:
        directory: of a Qwen3-style tokenizer.
        add_image: add the image token where there is none, as in a language model's.

    Raises:
        InputError: the directory holds no tokenizer, lacks a control token, or cuts the text after `<think>` so that
            the mode would not be decided by one token.
    """

    def __init__(self, directory: Path, *, add_image: bool = False):
        if not (directory / "tokenizer.json").is_file():
            raise InputError(f"no tokenizer.json in {directory}; give the directory of a Qwen3-style tokenizer")
        self.directory = directory
        hf = AutoTokenizer.from_pretrained(directory)
        assert isinstance(hf, PreTrainedTokenizerFast)
        self.hf = hf
        if add_image:
            hf.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
        added = self.hf.get_added_vocab()
        missing = [token for token in CONTROL_TOKENS if token not in added]
        if missing:
            raise InputError(f"the tokenizer in {directory} lacks the added tokens {missing}; add them to it")
        self._control_ids = {token: added[token] for token in CONTROL_TOKENS}
        # Any added token, also those we do not use: "<tool_call>" in a user's text is text as well.
        self._control_pattern = re.compile("|".join(re.escape(token) for token in sorted(added, key=len, reverse=True)))
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
