"""Whatever we call of Megatron-Core, Transformer Engine, vLLM and DALI is there, and takes what we give it.

pyright reads our calls against the installed packages. What it cannot see, since it is reached through objects whose
type nobody states, is listed here.
"""

import dataclasses
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_sample_images

from megatron_mm.data.decode import DaliDecoder, decode_with_pillow
from tests.datasets import encoded
from tests.gpu_contract.vllm_stand_in import gpu_platform
from tests.ranks import run_alone

pytestmark = pytest.mark.gpu_contract

CHECKOUT = Path(__file__).parents[2]

# Path of a callable -> numbers of positional arguments, and names of others, that we or Megatron-Core give it.
CALLS: dict[str, tuple[int, tuple[str, ...]]] = {
    "vllm:LLM.generate": (3, ("use_tqdm",)),
    "vllm:LLM.sleep": (1, ("level",)),
    "vllm:LLM.wake_up": (2, ()),
    "vllm.v1.engine.llm_engine:LLMEngine.reset_mm_cache": (1, ()),
    "vllm.v1.engine.llm_engine:LLMEngine.reset_encoder_cache": (1, ()),
    "vllm.v1.engine.llm_engine:LLMEngine.reset_prefix_cache": (1, ()),
    "vllm.v1.worker.gpu_worker:Worker.get_model": (1, ()),
    "vllm:ModelRegistry.register_model": (2, ()),
    "vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed.make_group_name": (1, ()),
    "transformer_engine.pytorch:is_fp8_available": (0, ("return_reason",)),
    "transformer_engine.pytorch:is_fp8_block_scaling_available": (0, ("return_reason",)),
    "transformer_engine.pytorch:is_mxfp8_available": (0, ("return_reason",)),
    "megatron.core.extensions.transformer_engine:TEDotProductAttention.forward": (
        4,
        ("attention_mask", "attn_mask_type", "attention_bias", "packed_seq_params"),
    ),
    "megatron.core.distributed:DistributedDataParallel.offload_grad_buffers": (1, ("synchronize", "empty_cache")),
    "megatron.core.distributed:DistributedDataParallel.restore_grad_buffers": (1, ("synchronize",)),
    "megatron.core.distributed:DistributedDataParallel.zero_grad_buffer": (1, ()),
    "megatron.core.optimizer:MegatronOptimizer.offload_to_cpu": (1, ()),
    "megatron.core.optimizer:MegatronOptimizer.restore_from_cpu": (1, ()),
    "megatron.core.optimizer:MegatronOptimizer.prepare_grads": (1, ()),
    "megatron.core.optimizer:MegatronOptimizer.get_grad_norm": (1, ()),
    "megatron.core.optimizer:MegatronOptimizer.step_with_ready_grads": (1, ()),
}
# Records, and the fields of them that we read or set.
FIELDS: dict[str, tuple[str, ...]] = {
    "megatron.core.packed_seq_params:PackedSeqParams": (
        "qkv_format",
        "cu_seqlens_q",
        "cu_seqlens_kv",
        "max_seqlen_q",
        "max_seqlen_kv",
    ),
    "vllm.outputs:RequestOutput": ("prompt_token_ids", "outputs"),
    "vllm.outputs:CompletionOutput": ("token_ids", "logprobs", "text", "finish_reason"),
    "vllm:SamplingParams": (
        "n",
        "temperature",
        "top_p",
        "max_tokens",
        "seed",
        "logprobs",
        "flat_logprobs",
        "skip_special_tokens",
        "logit_bias",
    ),
}


@pytest.fixture(scope="module")
def faults() -> list[str]:
    """Of both tables."""
    return run_alone(_faults)


def _faults() -> list[str]:
    with gpu_platform():
        calls = [
            fault for path, (positional, names) in CALLS.items() if (fault := _call_fault(path, positional, names))
        ]
        fields = [
            f"{path} has no {name}" for path, names in FIELDS.items() for name in names if name not in _fields(path)
        ]
        # The fields of a pack, which Megatron-Core hands on to Transformer Engine by name.
        given = set(inspect.signature(_resolved("transformer_engine.pytorch:DotProductAttention.forward")).parameters)
        packs = {name for name in _fields("megatron.core.packed_seq_params:PackedSeqParams") if "seq" in name}
        return [*calls, *fields, *(f"Transformer Engine takes no {name}" for name in sorted(packs - given))]


def _resolved(path: str) -> Any:
    module, _, qualified = path.partition(":")
    found: Any = importlib.import_module(module)
    for name in qualified.split("."):
        found = getattr(found, name)
    return found


def _call_fault(path: str, positional: int, names: tuple[str, ...]) -> str:
    try:
        inspect.signature(_resolved(path)).bind(*[None] * positional, **dict.fromkeys(names))
    except (AttributeError, TypeError) as error:
        return f"{path}: {error}"
    return ""


def _fields(path: str) -> set[str]:
    record = _resolved(path)
    if dataclasses.is_dataclass(record):
        return {field.name for field in dataclasses.fields(record)}
    # vLLM's are structs of msgspec where they are no classes with a constructor.
    names = getattr(record, "__struct_fields__", None)
    return set(inspect.signature(record).parameters if names is None else names)


def test_calls_and_fields_are_there(faults: list[str]) -> None:
    assert faults == []


def test_pyright_finds_our_calls_right(tmp_path: Path) -> None:
    settings = {
        "include": [os.path.relpath(CHECKOUT / "megatron_mm", tmp_path)],
        "extraPaths": [str(CHECKOUT)],
        "pythonVersion": "3.12",
        "typeCheckingMode": "standard",
        "reportMissingTypeStubs": False,
        "reportPrivateImportUsage": False,
        "reportMissingImports": "error",
    }
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--project", str(tmp_path), "--pythonpath", sys.executable]
    done = subprocess.run([*command, "--outputjson"], capture_output=True, text=True, timeout=600)
    said = json.loads(done.stdout)
    assert said["summary"]["filesAnalyzed"] > 100
    errors = [
        f"{entry['file']}:{entry['range']['start']['line'] + 1}: {entry['message']}"
        for entry in said["generalDiagnostics"]
        if entry["severity"] == "error"
    ]
    assert errors == []


def test_dali_decodes_on_the_processor() -> None:
    files = [encoded(photo, form) for photo in _photos() for form in ("PNG", "JPEG")]
    ours, theirs = DaliDecoder(gpu=None)(files, "a sample"), decode_with_pillow(files, "a sample")
    assert len(ours) == len(theirs) == len(files)
    for one, other in zip(ours, theirs, strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def _photos() -> list[Any]:
    from PIL import Image

    images: Any = load_sample_images()
    return [Image.fromarray(photo) for photo in images.images]
