"""The CPU platform: gloo, and what Megatron-Core 0.16.1 needs to run where there is no CUDA.

Megatron-Core assumes CUDA in a few dozen places. `CpuPlatform.prepare` answers them with plain function patches, each
with its reason; a TorchFunctionMode would tax every torch call and hide which places matter. A place we do not know
fails loudly ("Torch not compiled with CUDA enabled"), since `torch.cuda.is_available()` keeps saying no.
"""

import functools
import logging
import os
import platform as host
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mm.parallel.platform.bf16 import mend_products
from megatron_mm.parallel.platform.rotary import rotate

CPU = torch.device("cpu")


class CpuPlatform:
    """One process a rank, gloo between them."""

    name = "cpu"
    distributed_backend = "gloo"
    layer_backend = "local"
    words_at_a_time = 2**16
    has_own_memory = False
    # Correct over gloo as well, but its threads would take the cores that the backward pass computes on.
    overlaps_collectives = False

    def prepare(self, local_rank: int) -> None:
        del local_rank
        # More threads than cores, or spinning ones, slow a step by an order of magnitude; torchrun sets this as well.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        mend_products()
        _adapt_megatron()

    def device(self) -> torch.device:
        return CPU

    def transformer_settings(self) -> dict[str, bool]:
        return {
            "use_cpu_initialization": True,
            # These fusions are CUDA kernels or torch.compile'd functions that want a C++ compiler.
            "bias_dropout_fusion": False,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
            "persist_layer_norm": False,
            # gloo's isend still reads the storage that this would free: silently wrong numbers.
            "deallocate_pipeline_outputs": False,
        }

    def language_settings(self) -> dict[str, bool]:
        return {
            "apply_rope_fusion": False,
            "bias_activation_fusion": False,
            # Whosever module the layers name (models/specs.py): the local backend has its own.
            "use_te_activation_func": True,
        }

    def fp8_fault(self, recipe: str) -> str | None:
        # Megatron-Core would go on in bf16 without a word.
        return f"fp8.recipe={recipe} needs Transformer Engine and a GPU; this is a CPU: set fp8.recipe=none"

    def synchronize(self) -> None:
        pass  # operations end before they return

    def peak_memory_bytes(self) -> dict[str, int]:
        # Linux' own high-water mark of the process: getrusage's starts with that of the parent.
        return {"resident": _proc_bytes("self/status", "VmHWM")}

    def memory_bytes(self) -> int:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return machine // _ranks_here()

    def free_bytes(self) -> int:
        return _proc_bytes("meminfo", "MemAvailable") // _ranks_here()

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def peak_tflops(self) -> float | None:
        return None

    def describe(self) -> str:
        return f"cpu: {host.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s) a rank"


def _ranks_here() -> int:
    """Return the number of ranks that share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _proc_bytes(file: str, field: str) -> int:
    """Return a field of /proc/`file` that Linux gives in KiB, in bytes."""
    for line in Path("/proc", file).read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/{file} has no {field}")


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2) with Apex' and Transformer Engine's state layout.

    An int `step` per parameter group, `exp_avg` and `exp_avg_sq` per parameter. With torch's AdamW in its place,
    Megatron-Core 0.16's distributed optimizer resumes from a checkpoint with a wrong step count; with this layout it
    takes the branches that it takes on a GPU.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ):
        if not adam_w_mode:
            raise ValueError("adam_w_mode=False: only decoupled weight decay is built")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        assert closure is None
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(params, group, step)

    def _update(self, params: list[torch.Tensor], group: dict[str, Any], step: int) -> None:
        for param in params:
            if not self.state[param]:
                self.state[param]["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
                self.state[param]["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
        (beta1, beta2), lr = group["betas"], group["lr"]
        # torch's own kernel: a tenth of the passes over memory that single operations would make. It reads the step
        # from a tensor a parameter, of which all are the same here.
        torch._fused_adamw_(
            params,
            [param.grad for param in params if param.grad is not None],
            [self.state[param]["exp_avg"] for param in params],
            [self.state[param]["exp_avg_sq"] for param in params],
            [],
            [torch.tensor(float(step))] * len(params),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _adapt_megatron() -> None:
    # First the imports: Megatron-Core decorates with torch.compile while it is imported, and dynamo then builds tables
    # of torch's own functions, which must be the unpatched ones.
    from megatron.core import optimizer
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import random

    if optimizer.Adam is FusedAdam:
        return
    _send_tensors_to_cpu()
    _answer_for_torch_cuda()
    _answer_tensor_type()
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        setattr(param_and_grad_buffer, name, _unless_alone(getattr(param_and_grad_buffer, name)))
    _let_experts_run()
    _multiply_frozen_weights_once()
    _rotate_in_two_passes()
    _skip_regions_of_one_rank()
    # Imported there by name, so patching torch.cuda alone does not reach it.
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)  # noqa: ARG005
    # One generator serves as CPU's and CUDA's, so the warning that they changed together is always given.
    logging.getLogger("megatron.core.tensor_parallel.random").setLevel(logging.ERROR)
    optimizer.Adam = distrib_optimizer.Adam = FusedAdam
    _scale_gradients_on_cpu()
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True


def _scale_gradients_on_cpu() -> None:
    """Where Transformer Engine is installed, Megatron-Core measures and scales gradients with its CUDA kernels.

    Elsewhere it does so tensor by tensor, and scales into copies.
    """
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    def norm(chunk_size: int, overflow: Any, lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple[Any, None]:
        del chunk_size, overflow, per_tensor
        return torch.stack(torch._foreach_norm(lists[0])).norm().float()[None], None

    def scale(chunk_size: int, overflow: Any, lists: list[list[torch.Tensor]], factor: float) -> None:
        del chunk_size, overflow
        source, target = lists
        # Clipping scales tensors into themselves, of which nothing is copied; the optimizer copies with the factor 1.
        torch._foreach_copy_(target, source)
        if factor != 1:
            torch._foreach_mul_(target, factor)

    modules: tuple[Any, ...] = (clip_grads, optimizer)
    clip_grads.l2_norm_impl = norm
    for module in modules:
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = scale


def _skip_regions_of_one_rank() -> None:
    """Skip the autograd functions around a tensor-parallel region of one rank, which return their input."""
    from megatron.core.tensor_parallel import mappings

    for name in ("_CopyToModelParallelRegion", "_ReduceFromModelParallelRegion"):
        region = getattr(mappings, name)
        region.apply = staticmethod(
            lambda tensor, group, apply=region.apply: tensor if group.size() == 1 else apply(tensor, group)
        )


def _let_experts_run() -> None:
    """The router calls a kernel of Transformer Engine if its name is there; the dispatcher copies on a side stream."""
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # pyright: ignore[reportAttributeAccessIssue]

    def numbers_as_lists(self: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if point == self.cuda_dtoh_point:  # all_to_all wants the numbers of tokens on the host
            for name in ("input_splits", "output_splits"):
                value = getattr(self, name)
                if isinstance(value, torch.Tensor):
                    setattr(self, name, value.tolist())
        return tokens_per_expert

    dispatcher: Any = MoEAlltoAllTokenDispatcher
    dispatcher.cuda_dtoh_stream = object()  # there already, so none is made
    dispatcher._maybe_dtoh_and_synchronize = numbers_as_lists


def _multiply_frozen_weights_once() -> None:
    """Where the gradient is a transposed view, torch's matmul would copy the frozen matrix for every position."""
    from megatron.core.tensor_parallel.layers import LinearWithFrozenWeight

    linear: Any = LinearWithFrozenWeight
    backward = linear.backward
    linear.backward = staticmethod(lambda ctx, gradient: backward(ctx, gradient.contiguous()))


def _rotate_in_two_passes() -> None:
    """Its unfused rotary embedding copies queries and keys seven times; what only other models use is asserted away."""
    from megatron.core.models.common.embeddings import rope_utils

    def rotate_all(
        t: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> torch.Tensor:
        assert not rotary_interleaved
        assert not multi_latent_attention
        assert mscale == 1.0
        assert freqs.shape[-1] == t.shape[-1]
        return rotate(t, freqs)

    rope_utils._apply_rotary_pos_emb_bshd = rotate_all


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective from a buffer into itself, left out where the group is one rank: gloo would copy it twice."""

    @functools.wraps(collective)
    def wrapper(output: torch.Tensor, part: torch.Tensor, *, group: Any, **kwargs: Any) -> Any:
        if group.size() == 1 and output.data_ptr() == part.data_ptr():
            return None
        return collective(output, part, group=group, **kwargs)

    return wrapper


def _send_tensors_to_cpu() -> None:
    """`device="cuda"` literals: schedules, optimizer, clip_grads, utils, exchange_utils; pinned memory: rope_utils."""

    def on_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(make)
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs["device"] = CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            return make(*args, **kwargs)

        return wrapper

    with torch.device(CPU):
        # torch lists the functions that `with torch.device(...)` acts on at its first use: before they become ours.
        torch.empty(0)
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))
    # Tied embeddings across pipeline stages, and the distributed optimizer's scratch tensors.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # noqa: ARG005


def _answer_for_torch_cuda() -> None:
    """Buffers, mappings, point-to-point, rotary embedding and optimizer ask for the current device and its RNG."""
    cuda = torch.cuda
    cuda.current_device = lambda: CPU  # pyright: ignore[reportAttributeAccessIssue]
    # One function object a name: dynamo keeps tables by id and refuses duplicates.
    for owner, name in ((cuda, "synchronize"), (cuda, "set_device"), (cuda, "empty_cache")):
        setattr(owner, name, lambda *args, **kwargs: None)  # noqa: ARG005
    for name in ("range_push", "range_pop"):
        setattr(cuda.nvtx, name, lambda *args, **kwargs: None)  # noqa: ARG005
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # pyright: ignore[reportAttributeAccessIssue]
    state = lambda *args, **kwargs: torch.get_rng_state()  # noqa: ARG005, E731
    cuda.get_rng_state = cuda.random.get_rng_state = state


def _answer_tensor_type() -> None:
    """The optimizer sorts parameters and gradients by `tensor.type()` being a "torch.cuda.*Tensor"."""
    plain_type = torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_
