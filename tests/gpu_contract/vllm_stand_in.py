"""vLLM's own model as its GPU worker would build it, on torch's meta device: everything but memory and kernels."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_mm.generation.engine import _VLLM_ENVIRONMENT
from tests.gpu_contract.gpu_stand_in import CAPABILITY, MEMORY_BYTES, NAME, seen_gpu


@contextmanager
def gpu_platform() -> Iterator[None]:
    """Let vLLM take this machine, within, for one with a GPU. It stays so for the rest of the process."""
    os.environ.update(_VLLM_ENVIRONMENT)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    class H200(NonNvmlCudaPlatform):
        """Answers what would be asked of the driver."""

        @classmethod
        def get_device_capability(cls, device_id: int = 0) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
            del device_id
            return DeviceCapability(*CAPABILITY)

        @classmethod
        def get_device_name(cls, device_id: int = 0) -> str:
            del device_id
            return NAME

        @classmethod
        def get_device_total_memory(cls, device_id: int = 0) -> int:
            del device_id
            return MEMORY_BYTES

        @classmethod
        def device_count(cls) -> int:
            return 1

        @classmethod
        def import_kernels(cls) -> None:
            pass

    vllm.platforms._current_platform = H200()
    with seen_gpu():
        yield


def engine_config(arguments: dict[str, Any]) -> Any:
    """What vLLM makes of an engine's arguments."""
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.rvl import RForConditionalGeneration
    from vllm.usage.usage_lib import UsageContext

    ModelRegistry.register_model("RForConditionalGeneration", RForConditionalGeneration)
    return EngineArgs(**arguments).create_engine_config(UsageContext.LLM_CLASS)


def engine_model(config: Any, folder: Path) -> Any:
    """The model of an engine's worker."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        with set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
            return initialize_model(config)
