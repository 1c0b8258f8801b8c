"""What a micro-batch is assumed to hold: tokens, lengths, tiles, trained tokens."""

from dataclasses import dataclass

from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig

# What is assumed of a sequence in supervised training.
TRAINED_SHARE, SAMPLES_PER_PACK = 0.25, 8


@dataclass(frozen=True, slots=True)
class Load:
    """One sequence: a pack, or a padded sample; a micro-batch is so many of them.

    Attributes:
        tokens: of the sequence.
        squared_tokens: sum of the squares of its samples' lengths.
        num_samples: in it.
        tiles: of its pictures.
        trained_tokens: tokens with a loss.
    """

    tokens: int
    squared_tokens: float
    num_samples: float
    tiles: float
    trained_tokens: float

    def times(self, number: int) -> "Load":
        """So many sequences."""
        return Load(
            self.tokens * number,
            self.squared_tokens * number,
            self.num_samples * number,
            self.tiles * number,
            self.trained_tokens * number,
        )


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """What is not in a config and has to be assumed.

    Attributes:
        tiles_per_pack: left out, as many as give the tokens that are not trained, at most data.max_pack_tiles.
        trained_share: of a sequence's tokens that have a loss; left out, TRAINED_SHARE.
        samples_per_pack: samples of equal length that a pack is made of; left out, SAMPLES_PER_PACK.
    """

    tiles_per_pack: float | None = None
    trained_share: float | None = None
    samples_per_pack: float | None = None


def check_tiles(tiles_per_pack: float | None) -> None:
    """Refuse a number of tiles that cannot be.

    Raises:
        InputError: it is below 0.
    """
    if tiles_per_pack is not None and tiles_per_pack < 0:
        raise InputError(f"--tiles-per-pack {tiles_per_pack:g} is below 0")


def assumed_load(config: RunConfig, options: LoadOptions) -> Load:
    """A full sequence of a run.

    Raises:
        InputError: a share or number is out of its range.
    """
    trained_share = TRAINED_SHARE if options.trained_share is None else options.trained_share
    samples_per_pack = SAMPLES_PER_PACK if options.samples_per_pack is None else options.samples_per_pack
    if not 0 < trained_share <= 1:
        raise InputError(f"--trained-share {trained_share} is not above 0 and at most 1")
    if samples_per_pack < 1:
        raise InputError(f"--samples-per-pack {samples_per_pack} is below 1")
    check_tiles(options.tiles_per_pack)
    tokens = config.data.max_sequence_tokens
    num_samples = samples_per_pack if config.data.packed else 1
    tiles = options.tiles_per_pack
    if tiles is None:
        tiles = (1 - trained_share) * tokens // config.model.vision.patches_per_tile
        if config.data.max_pack_tiles is not None:
            tiles = min(tiles, config.data.max_pack_tiles)
    return Load(tokens, tokens**2 / num_samples, num_samples, tiles, trained_share * tokens)
