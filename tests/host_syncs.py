"""Where a training step would make the host wait for a GPU, found on a CPU by marking what would lie on the GPU.

Marked are weights, gradients and the optimizer's state, what is copied to the device, and what is computed from any of
these. Reading a marked tensor's values is a synchronisation: the host waits until the device has computed them.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.config.schema import ObjectiveConfig
from megatron_mm.data.loader import Batch
from megatron_mm.parallel import state
from megatron_mm.parallel.platform import get_platform, to_device
from megatron_mm.rl.experience import RolloutBatch
from megatron_mm.rl.objective import Tokens
from megatron_mm.rl.update import PolicyLoss, score, with_values
from megatron_mm.train.assemble import Trainee
from megatron_mm.train.step import CrossEntropy, train_step
from tests.layouts import (
    CP2,
    EP2,
    NUM_PARTS,
    PP2,
    SP,
    Overrides,
    layout,
    micro_batches,
    samples_of_step,
    trainees,
)
from tests.ranks import run_on_ranks
from tests.tiny import r4b_tensors, reference_models

# Tensor's methods that read values; `item`, `bool`, `int` and `float` come down to an operation of READERS.
METHODS = ("tolist", "numpy", "cpu", "__array__")
# aten's operations whose result, or its shape, the host has to know. Of torch 2.11's and 2.13's CUDA kernels.
READERS = (
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "masked_scatter_backward",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
)
# Whose lines are named.
_FOLDERS = ("/megatron_mm/", "/megatron/core/")
# Patches between a caller and torch.
_STANDS_BETWEEN = "platform/cpu.py"


@dataclass(slots=True)
class Found:
    """What was found, each as "file:line operation" with how often it happened.

    Attributes:
        syncs: the host reads what the device has computed.
        copies: the host waits until its own memory has been copied to the device.
    """

    syncs: Counter[str] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)


class _Marks:
    """Tensors that would lie on the device, by their storage."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}

    def add(self, tensor: Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        # A weak reference keeps another storage from getting its number.
        self._storages[reference.cdata] = reference

    def discard(self, tensor: Tensor) -> None:
        self._storages.pop(tensor.untyped_storage()._cdata, None)

    def __contains__(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._storages


class _Operations(TorchDispatchMode):
    """Marks what is computed from marked tensors, forward and backward, and sees operations that read values."""

    def __init__(self, calls: "_Calls"):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs, marks = kwargs or {}, self._calls.marks
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # Within one call of Python's, such as a gradient's, C++ makes tensors where the call's own are.
        on_device = any(tensor in marks for tensor in tensors) if tensors else self._calls.on_device
        if on_device and not self._calls.is_seen and _reads(func, args, kwargs):
            _note(self._calls.found.syncs, func.overloadpacket.__name__)
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if on_device and isinstance(leaf, Tensor):
                marks.add(leaf)
        return result


class _Calls(TorchFunctionMode):
    """Sees copies between host and device, and reads of values that no operation is made for."""

    def __init__(self) -> None:
        super().__init__()
        self.marks, self.found = _Marks(), Found()
        # Whether tensors that are made from nothing now are the device's, and whether a read is counted already.
        self.on_device, self.is_seen = True, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        marked = any(leaf in self.marks for leaf in tree_leaves((args, kwargs)))
        if name == "to" and not marked and _asks_for_device(args[1:], kwargs):
            return self._to_device(args[0], args[1:], kwargs)
        reads = marked and (name in METHODS or (name == "to" and "cpu" in (*args[1:], kwargs.get("device"))))
        if reads:
            _note(self.found.syncs, name)
        given = kwargs.get("device") is not None
        if given and name in ("tensor", "as_tensor"):
            _note(self.found.copies, name)
        before = self.on_device, self.is_seen
        self.on_device, self.is_seen = marked or given, reads
        try:
            result = func(*args, **kwargs)
        finally:
            self.on_device, self.is_seen = before
        if reads and isinstance(result, Tensor):
            result = result.clone()
            self.marks.discard(result)
        elif given and isinstance(result, Tensor):
            self.marks.add(result)
        return result

    def _to_device(self, tensor: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        # The one caller that locks pages first; without, the copy waits, whatever non_blocking says.
        if sys._getframe(2).f_code is not to_device.__code__:
            _note(self.found.copies, "to")
        copied = tensor.to(*args, **kwargs).clone()  # on a CPU `to` returns the host's own tensor
        self.marks.add(copied)
        return copied


def _asks_for_device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(isinstance(one, torch.device) for one in (*args, kwargs.get("device")))


def _reads(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether an operation of aten's reads values of its tensors."""
    name = func.overloadpacket.__name__
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        is_fill = name != "index" and args[2].numel() == 1 and not (len(args) > 3 and args[3])
        return not is_fill and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1])
    return name in READERS


def _note(counts: Counter[str], operation: str) -> None:
    """Count an operation at the innermost line of ours or Megatron-Core's that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name.startswith("local_multi_tensor"):
            return  # on a GPU one kernel of Transformer Engine's, which reads nothing
        for folder in _FOLDERS:
            if folder in code.co_filename and not code.co_filename.endswith(_STANDS_BETWEEN):
                place = code.co_filename[code.co_filename.rindex(folder) + 1 :]
                counts[f"{place}:{frame.f_lineno} {operation}"] += 1
                return
        frame = frame.f_back
    counts[f"elsewhere {operation}"] += 1


@contextmanager
def host_syncs(trainee: Trainee) -> Iterator[Found]:
    """Within, note where the host would wait for the device that `trainee` learns on."""
    calls = _Calls()
    optimizer = trainee.optimizer
    for chunk in trainee.chunks:
        for tensor in (*chunk.parameters(), *chunk.buffers()):
            calls.marks.add(tensor)
            calls.marks.add(getattr(tensor, "main_grad", tensor))
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            calls.marks.add(parameter)
    for part in optimizer.chained_optimizers:
        for leaf in tree_leaves(list(part.optimizer.state.values())):
            if isinstance(leaf, Tensor):
                calls.marks.add(leaf)
    with calls, _Operations(calls):
        yield calls.found


def _steps(batches: list[Batch], trainee: Trainee) -> Callable[[], object]:
    device = get_platform("cpu").device()
    return lambda: train_step(trainee, batches, device, CrossEntropy(NUM_PARTS))


def _rl_steps(batches: list[Batch], trainee: Trainee) -> Callable[[], object]:
    """Scoring and an update from made-up responses."""
    device, made = get_platform("cpu").device(), []
    for batch in batches:
        number = int(batch.trained.sum())
        ones = torch.ones(number)
        tokens = Tokens(-ones, -ones, -ones, torch.linspace(-1, 1, number), ones / number, torch.arange(number) // 4)
        values = {name: getattr(batch, name) for name in Batch.__slots__}
        made.append(RolloutBatch(**values, tokens=tokens))
    objective = PolicyLoss(ObjectiveConfig(kl_coef=0.1), 100)
    return lambda: train_step(trainee, with_values(made, old=score(trainee, made, device)), device, objective)


CASES: dict[str, tuple[int, Overrides, Callable[[list[Batch], Trainee], Callable[[], object]]]] = {
    "packed": (1, {}, _steps),
    "unpacked": (1, {"data__packed": "false"}, _steps),
    "packed, full recomputation": (1, {"train__recompute": "full"}, _steps),
    "RL update": (1, {}, _rl_steps),
    "TP 2 + SP": (2, SP, _steps),
    "CP 2": (2, CP2, _steps),
    "PP 2": (2, PP2, _steps),
    "DP 2, overlapped": (2, {"optim__overlap": "true"}, _steps),
    "experts, EP 2": (2, EP2, _steps),
}


def found_on_ranks(names: list[str], tokenizer: ChatTokenizer) -> dict[str, Found]:
    """What a step of each case does on the rank that waits most often; a step of four micro-batches with images."""
    found = {}
    for num_ranks in (1, 2):
        mine = [name for name in names if CASES[name][0] == num_ranks]
        of_ranks = run_on_ranks(_trace, num_ranks, mine, tokenizer.directory) if mine else []
        for name, results in zip(mine, zip(*of_ranks, strict=True), strict=True):
            found[name] = max(results, key=lambda one: one.syncs.total())
    return found


def _trace(names: list[str], tokenizer_directory: Path) -> list[Found]:
    """What is found in a second step of each case. Runs on every rank."""
    tokenizer, found = ChatTokenizer(tokenizer_directory), []
    rank_platform = get_platform("cpu")
    with state.process_group(rank_platform):
        for name in names:
            config = layout(**CASES[name][1])
            tensors = r4b_tensors(config, *reference_models(config))
            for _, trainee in trainees(rank_platform, [config], tokenizer, tensors):
                batches = micro_batches(config, samples_of_step(config, tokenizer, 0), tokenizer)
                step = CASES[name][2](batches, trainee)
                step()  # the first one makes caches and the optimizer's state
                with host_syncs(trainee) as result:
                    step()
                found.append(result)
    return found
