"""A batch whose placeholders and features differ in number is refused with both counts."""

import dataclasses
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

from megatron_mm.chat.images import pixel_values
from megatron_mm.chat.tokenizer import IMAGE, ChatTokenizer
from megatron_mm.cli import main
from megatron_mm.config.errors import InputError
from megatron_mm.data import loader
from megatron_mm.data.loader import MicroBatches
from megatron_mm.data.shards import TOKENIZER
from megatron_mm.models.vlm import Pictures, build_model
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from tests.ranks import run_alone, run_on_ranks
from tests.tiny import tiny_config


def _messages(digits: Path) -> list[str]:
    """What the model says to a batch with a feature too few, and to one whose placeholder became text."""
    config = tiny_config(
        data__path=digits,
        data__blend="{digits/easy/thinking: 1}",
        model__language__vocab_size=384,
    )
    platform, tokenizer = get_platform("cpu"), ChatTokenizer(digits / TOKENIZER)
    image = tokenizer.control(IMAGE)
    messages = []
    with state.process_group(platform), state.model_parallel(config.parallel, 0) as groups:
        (model,) = build_model(config, platform, groups, image)
        batch = MicroBatches(config, tokenizer, 0, 1)[0]
        assert batch.tiles is not None
        text = batch.ids.clone()
        text[0, int((text[0] == image).nonzero()[0])] = 0
        for broken in (dataclasses.replace(batch, order=batch.order[:-1]), dataclasses.replace(batch, ids=text)):
            try:
                model(broken.ids, Pictures(pixel_values(batch.tiles), broken.order), labels=broken.labels)
            except InputError as error:
                messages.append(str(error))
    return messages


def test_both_counts_are_named(digits: Path) -> None:
    (messages,) = run_on_ranks(_messages, 1, digits)
    too_few, too_many = messages
    assert "36 image tokens but 35 image features" in too_few
    assert "35 image tokens but 36 image features" in too_many


def _train_with_a_feature_too_few(digits: Path, run_dir: Path) -> tuple[int, str]:
    """Exit code and message of the command when pictures lose a feature on their way."""
    whole = loader.feature_order
    loader.feature_order = lambda grid: whole(grid)[:-1]
    overrides = ["data.blend={digits/easy/thinking: 1}", "train.steps=1", "train.global_batch=2", "train.micro_batch=2"]
    overrides += ["optim.warmup_steps=0", "init_from=null", f"data.path={digits}", f"run_dir={run_dir}"]
    overrides += ["data.num_workers=0"]  # a worker may not share the planted fault
    with redirect_stderr(StringIO()) as stderr:
        code = main(["train", "mini/stage3", *overrides])
    return code, stderr.getvalue()


def test_the_command_ends_with_the_counts_and_code_2(digits: Path, tmp_path: Path) -> None:
    code, message = run_alone(_train_with_a_feature_too_few, digits, tmp_path)
    assert code == 2
    assert "megatron-mm: the batch holds 72 image tokens but 70 image features" in message
    assert "Traceback" not in message
