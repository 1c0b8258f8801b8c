"""The GPU platform: NCCL and Transformer Engine."""

import importlib.util
from typing import Any

import torch

from megatron_mm.config.errors import InputError
from megatron_mm.parallel.platform.gpus import DENSE_BF16_TFLOPS


class CudaPlatform:
    """One GPU a rank."""

    name = "cuda"
    distributed_backend = "nccl"
    layer_backend = "te"
    words_at_a_time = 2**23
    has_own_memory = True
    overlaps_collectives = True

    def prepare(self, local_rank: int) -> None:
        if importlib.util.find_spec("transformer_engine") is None:
            raise InputError("platform=cuda needs Transformer Engine; install the package's [gpu] extra")
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"this rank is number {local_rank} of its machine, but torch sees {torch.cuda.device_count()} GPUs; "
                "start one rank for each (--nproc)"
            )
        torch.cuda.set_device(local_rank)

    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def transformer_settings(self) -> dict[str, bool]:
        return {
            "use_cpu_initialization": False,
            "bias_dropout_fusion": True,
            "masked_softmax_fusion": True,
            # Needs a kernel of NVIDIA's apex; used where someone has built it, never required.
            "gradient_accumulation_fusion": importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
            "deallocate_pipeline_outputs": True,
        }

    def language_settings(self) -> dict[str, bool]:
        return {
            # Transformer Engine's kernel for one sequence: each token has its own angle (models/rotary.py), so packs
            # and the parts of context-parallel ranks are right. Its sines and cosines are fp32; Megatron-Core's, like
            # vLLM's, are rounded to bf16.
            "apply_rope_fusion": True,
            # SwiGLU without biases, of experts weighted by their probabilities: one pass over memory instead of three,
            # and only its input is kept for the backward pass.
            "bias_activation_fusion": True,
        }

    def fp8_fault(self, recipe: str) -> str | None:
        if importlib.util.find_spec("transformer_engine") is None:
            return f"fp8.recipe={recipe} needs Transformer Engine; install the package's [gpu] extra"
        # Importable only where Transformer Engine is installed.
        from transformer_engine import pytorch as te  # pyright: ignore[reportMissingImports]

        asks = {"blockwise": te.is_fp8_block_scaling_available, "mxfp8": te.is_mxfp8_available}
        answer: Any = asks.get(recipe, te.is_fp8_available)(return_reason=True)
        available, reason = answer
        return None if available else f"fp8.recipe={recipe} cannot run on {torch.cuda.get_device_name()}: {reason}"

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def peak_memory_bytes(self) -> dict[str, int]:
        return {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}

    def memory_bytes(self) -> int:
        return torch.cuda.mem_get_info()[1]

    def free_bytes(self) -> int:
        # What torch keeps for its next tensors is free too.
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def host_buffer(self, num_bytes: int) -> torch.Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def peak_tflops(self) -> float | None:
        return DENSE_BF16_TFLOPS.get(torch.cuda.get_device_name())

    def describe(self) -> str:
        return f"cuda: {torch.cuda.get_device_name()}"
