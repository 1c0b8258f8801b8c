"""Trainer's state that leaves the device for an engine comes back as it was, in the order that a device needs."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megatron_mm.rl import offload
from megatron_mm.rl.offload import HostCopy, Offload

POISON = 0xFF  # NaN in fp32


class _Device:
    """A platform whose device has its own memory, on a CPU: copies happen when it is waited for, not before."""

    has_own_memory = True

    def __init__(self) -> None:
        self.begun: list[tuple[Tensor, Tensor]] = []
        self.num_bytes = self.num_buffers = 0
        begun = self.begun

        class Buffer(Tensor):
            @classmethod
            def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func is Tensor.copy_:
                    assert kwargs == {"non_blocking": True}
                    begun.append(args)
                    return args[0]
                return super().__torch_function__(func, types, args, kwargs)

        self._make = Buffer

    def host_buffer(self, num_bytes: int) -> Tensor:
        self.num_buffers += 1
        return torch.full((num_bytes,), POISON, dtype=torch.uint8).as_subclass(self._make)

    def synchronize(self) -> None:
        for target, source in self.begun:
            for one in (target, source):
                assert one.untyped_storage().nbytes(), "memory was given back while it was copied"
            target.as_subclass(Tensor).copy_(source.as_subclass(Tensor))
            self.num_bytes += target.numel()
        self.begun.clear()


class _Chunk:
    """Stands for Megatron-Core's DDP."""

    def __init__(self, fill_fresh_memory: Callable[[], None]):
        self.calls: list[str] = []
        self._fill = fill_fresh_memory

    def offload_grad_buffers(self, *, synchronize: bool, empty_cache: bool) -> None:
        assert not synchronize
        assert not empty_cache
        self.calls.append("freed")

    def restore_grad_buffers(self, *, synchronize: bool) -> None:
        assert not synchronize
        self.calls.append("there")
        self._fill()  # memory that is taken anew holds anything until something is copied to it


def _trainee() -> tuple[Any, list[Tensor]]:
    """A trainee with fp32 weights besides the model's, one fp32 weight of the model itself, and moments of both."""
    model = nn.Linear(3, 5, dtype=torch.bfloat16)
    shared = nn.Parameter(torch.randn(7))
    masters = [nn.Parameter(parameter.detach().float()) for parameter in model.parameters()]
    view = nn.Parameter(shared.detach().view(7))
    optimizer = torch.optim.Adam([{"params": masters}, {"params": [view]}], lr=0.1)
    for one in (*masters, view):
        one.grad = torch.randn_like(one)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    chunk = SimpleNamespace(parameters=lambda: iter([*model.parameters(), shared]))
    moved = [one.data for one in masters] + moments

    def fill() -> None:
        for tensor in moved:
            if tensor.untyped_storage().nbytes():
                tensor.fill_(torch.nan)

    parts = [SimpleNamespace(is_stub_optimizer=True), SimpleNamespace(optimizer=optimizer)]
    trainee = SimpleNamespace(
        chunks=[chunk], ddp=[_Chunk(fill)], optimizer=SimpleNamespace(chained_optimizers=parts), shared=shared
    )
    return trainee, moved


def test_state_comes_back_as_it_was_time_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "_BUFFER_BYTES", 50)  # smaller than a tensor, and no multiple of an element
    device, (trainee, moved) = _Device(), _trainee()
    before, num_bytes = [one.clone() for one in moved], sum(one.nbytes for one in moved)
    room = Offload(trainee, device, is_on=True)  # pyright: ignore[reportArgumentType]
    for turn in (1, 2):
        with room.away():
            assert {one.untyped_storage().nbytes() for one in moved} == {0}
            assert trainee.shared.untyped_storage().nbytes()  # the model's own
            assert trainee.ddp[0].calls[-1] == "freed"
        assert all(map(torch.equal, moved, before))
        assert trainee.ddp[0].calls == ["freed", "there"] * turn
        # Once there and once back, besides the scalar steps; buffers are made once.
        assert 0 <= device.num_bytes - 2 * turn * num_bytes <= 2 * turn * 4 * len(moved)
        assert device.num_buffers == -(-device.num_bytes // (2 * turn) // 50)
        for tensor, kept in zip(moved, before, strict=True):
            tensor.add_(1)
            kept.copy_(tensor)


def test_nothing_moves_where_nothing_is_to_or_memory_is_the_same() -> None:
    device, (trainee, moved) = _Device(), _trainee()
    with Offload(trainee, device, is_on=False).away():  # pyright: ignore[reportArgumentType]
        assert trainee.ddp[0].calls == []
    device.has_own_memory = False
    with Offload(trainee, device, is_on=True).away():  # pyright: ignore[reportArgumentType]
        assert all(one.untyped_storage().nbytes() for one in moved)
        assert trainee.ddp[0].calls == ["freed"]
    assert device.num_buffers == device.num_bytes == 0


def test_moving_is_timed_and_what_is_between_is_not() -> None:
    device, (trainee, _) = _Device(), _trainee()
    said: list[str] = []

    class Timed:
        def __enter__(self) -> None:
            said.append("begun")

        def __exit__(self, *_: object) -> None:
            said.append("done")

    with Offload(trainee, device, is_on=True).away(Timed):  # pyright: ignore[reportArgumentType]
        said.append("between")
    assert said == ["begun", "done", "between", "begun", "done"]


def test_what_the_host_keeps_is_written_over() -> None:
    device = _Device()
    host = HostCopy(device)  # pyright: ignore[reportArgumentType]
    for value in (1, 2):
        host.write([torch.full((5,), value, dtype=torch.uint8), torch.full((3,), 10 * value, dtype=torch.uint8)])
        device.synchronize()
    found = [torch.zeros(5, dtype=torch.uint8), torch.zeros(3, dtype=torch.uint8)]
    host.read(found)
    device.synchronize()
    assert [one.tolist() for one in found] == [[2] * 5, [20] * 3]
