"""A checkpoint's weights by Hugging Face name, read when they are asked for."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from megatron_mm.checkpoint.verify import find_sound
from megatron_mm.checkpoint.whole import WholeParameters
from megatron_mm.config.load import read_model
from megatron_mm.config.schema import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from megatron_mm.models.vlm import VisionLanguageModel, build_skeleton
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform
from megatron_mm.weights.mapping import Readable, Rule
from megatron_mm.weights.tables import model_table

# Of a run directory.
RUN_CONFIG = "config.yaml"


class CheckpointWeights(Mapping[str, Readable]):
    """The weights of a checkpoint by Hugging Face name, in the order of export, read when they are asked for.

    Args:
        path: run directory, or a checkpoint in one.

    Raises:
        InputError: there is none, or it does not fit the config beside it.
    """

    def __init__(self, path: Path):
        checkpoint = find_sound(path)
        self.run_dir = checkpoint.parent.parent
        self.model = read_model(self.run_dir / RUN_CONFIG)
        # The skeleton's dtype does not matter: tensors are read as they are.
        with skeleton_of(self.model, torch.float32) as skeleton:
            self._parameters = WholeParameters(checkpoint, skeleton)
        self.dtype = self._parameters.dtype()
        self._rules = {name: rule for rule in model_table(self.model) for name in rule.hf}
        self._last: tuple[Rule | None, tuple[Tensor, ...]] = (None, ())

    def __getitem__(self, name: str) -> Tensor:
        rule = self._rules[name]
        if self._last[0] is not rule:
            self._last = (rule, rule.join([self._parameters[rule.megatron]]))
        return self._last[1][rule.hf.index(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)


@contextmanager
def skeleton_of(model: ModelConfig, dtype: torch.dtype) -> Iterator[Sequence[VisionLanguageModel]]:
    """The model in one piece on torch's meta device; all ranks call it together."""
    vision = model.vision.model_copy(update={"parallel": "tensor"})
    config = RunConfig(
        recipe="conversion",
        run_dir=Path(),
        precision="fp32" if dtype == torch.float32 else "bf16",
        model=model.model_copy(update={"vision": vision}),
        data=DataConfig(max_sequence_tokens=model.language.max_positions),
        # Nothing is trained; a run's config wants them said.
        train=TrainConfig(steps=1, global_batch=1, micro_batch=1),
        optim=OptimConfig(lr=1),
    )
    with state.model_parallel(config.parallel, seed=0) as groups:
        yield build_skeleton(config, get_platform("cpu"), groups)
