"""A row of the index -> a sample ready for training."""

from dataclasses import dataclass

from megatron_mm.chat.images import TileRules
from megatron_mm.chat.render import Rendering, Sample, render_sample
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig
from megatron_mm.data.decode import Decoder
from megatron_mm.data.plan import Sizes
from megatron_mm.data.shards import PreparedData, StoredSample


class BrokenSample(InputError):
    """A sample that was damaged since it was prepared; others may be whole."""


@dataclass(frozen=True, slots=True)
class SampleReader:
    """Reads, decodes and renders samples of a data set as a run wants them.

    Attributes:
        data: the data set.
        sizes: what the plan counted with.
        config: of the run.
        tokenizer: of the data set.
        decode: makes pixels.
    """

    data: PreparedData
    sizes: Sizes
    config: RunConfig
    tokenizer: ChatTokenizer
    decode: Decoder

    def read(self, row: int) -> tuple[StoredSample, Sample]:
        """The sample of a row, as it is stored and as it is trained on.

        Raises:
            BrokenSample: its shard is missing or cut off, it was changed, or a picture cannot be decoded.
            InputError: it has not the length that the index says, as any other may.
        """
        try:
            stored = self.data.read(row)
            pictures = self.decode(stored.pictures, stored.name)
        except InputError as error:
            raise BrokenSample(str(error)) from None
        rendering, rules = Rendering(self.config.data.rendering), TileRules.of_model(self.config.model)
        sample = render_sample(stored.content.content(pictures), rendering, self.tokenizer, rules)
        expected = int(self.sizes.tokens[row]) + 1
        if len(sample.ids) != expected:
            raise InputError(
                f"sample {stored.name} has {len(sample.ids)} tokens, but the index says {expected}: it was made with "
                "another tokenizer or another version of this program; prepare the data again"
            )
        return stored, sample
