"""vLLM in this process, fed with the ids and pictures of chat/render.py.

Needs what vLLM 0.26 (GPU) and 0.32 (CPU) share. R-4B runs as vLLM's own RForConditionalGeneration.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from megatron_mm.chat.render import Prompt
from megatron_mm.config.errors import InputError
from megatron_mm.generation.colocation import keep_process_groups, kept_apart
from megatron_mm.generation.weights import Part, find_parts, load_weights, uncovered
from megatron_mm.parallel.platform.bf16 import mend_products

# Read by vLLM when it is imported or its engine is made.
_VLLM_ENVIRONMENT = {
    # The engine lives in this process, so that RL can reach its weights.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # Responses are drawn with seeds, which it does not take, and it need not be installed.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
# Only where the engine computes in the host's memory: with log-probabilities asked for, vLLM compiles one small
# function, which takes 15 s at the first answer, and a C++ compiler.
_HOST_ENVIRONMENT = {"TORCH_COMPILE_DISABLE": "1"}

# Of a prompt; as many as prepared samples have unless they are asked to have more.
MAX_PICTURES = 64
# vLLM's tags of what can be given back.
_WEIGHTS, _CACHE = "weights", "kv_cache"
# Share of a GPU that has to be free for vLLM to start; what it takes is cache_bytes and its weights.
_LEAST_FREE = 0.05


@dataclass(frozen=True, slots=True)
class Completion:
    """What was generated for a prompt.

    Attributes:
        ids: the tokens sampled, the end of turn included where it was reached.
        logprobs: log-probability of each, in nats: under the model, or with `colocation` under the distribution that it
            was drawn from, after temperature, bans and top-p.
        text: of the ids, control tokens included, end of turn not.
        finished: false where the limit of tokens cut it off.
    """

    ids: list[int]
    logprobs: list[float]
    text: str
    finished: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the responses to a prompt are drawn.

    Attributes:
        max_tokens: longest response.
        temperature: 0 is greedy.
        top_p: share of the probability that is drawn from.
        count: responses.
        seed: of these responses alone; left out, the engine's.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    count: int = 1
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Colocation:
    """How an engine shares a trainer's processes.

    Attributes:
        ranks: each so many ranks of the job, in order, are one tensor-parallel engine; they are asked the same at the
            same time.
        max_tokens: of a prompt and its response; left out, the model's.
        cache_bytes: for keys and values, on each rank.
    """

    ranks: int
    max_tokens: int | None = None
    cache_bytes: int = 2**30


def engine_arguments(
    directory: Path,
    dtype: str,
    *,
    max_sequences: int = 64,
    seed: int = 0,
    has_own_memory: bool = False,
    colocation: Colocation | None = None,
) -> dict[str, Any]:
    """Return exactly what vLLM's `LLM` is given; arguments as those of `Engine`.

    Every key is a field of vLLM's `EngineArgs` in 0.26 and 0.32, so that
    `EngineArgs(**engine_arguments(...)).create_engine_config()` can judge them on a machine without a GPU.
    """
    arguments: dict[str, Any] = {
        "model": str(directory),
        # vLLM's default, said so that it stays.
        "trust_remote_code": False,
        "dtype": dtype,
        "max_num_seqs": max_sequences,
        "seed": seed,
        "enforce_eager": not has_own_memory,
        "limit_mm_per_prompt": {"image": MAX_PICTURES},
        "skip_mm_profiling": True,
    }
    if has_own_memory:
        # A decoding step is thousands of small kernels, and launching them one by one takes longer than they do.
        # Graphs of decoding alone need no compiled model, so nothing is compiled (mode 0).
        arguments["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    if colocation is not None:
        arguments |= {
            "distributed_executor_backend": "external_launcher",
            "tensor_parallel_size": colocation.ranks,
            "load_format": "dummy",
            # With a seed of its own, a prompt that is read in several pieces has its generator set back; vLLM 0.32's
            # CPU worker ends with "CPU Generator does not use offset" there.
            "enable_chunked_prefill": has_own_memory,
            "max_model_len": colocation.max_tokens,
            # What the policy is: temperature and bans are part of it.
            "logprobs_mode": "processed_logprobs",
            # Not a share of what the trainer has left.
            "kv_cache_memory_bytes": colocation.cache_bytes,
            "gpu_memory_utilization": _LEAST_FREE,
            "enable_sleep_mode": has_own_memory,
        }
    return arguments


class Engine:
    """A model directory, ready to generate.

    Args:
        directory: made by `megatron-mm export`; without weights where `colocation` is given.
        dtype: "float32" or "bfloat16".
        max_sequences: responses generated side by side.
        seed: of sampling.
        has_own_memory: whether it computes on a device whose memory is another one than the host's (parallel/platform);
            then it decodes with CUDA graphs, and with `colocation` can give its memory back in between.
        colocation: of an engine that shares ranks and memory with a trainer, and waits for `load`. Left out, this
            process is an engine of its own.

    Raises:
        InputError: the directory holds no model.
    """

    def __init__(
        self,
        directory: Path,
        dtype: str,
        max_sequences: int = 64,
        seed: int = 0,
        *,
        has_own_memory: bool = False,
        colocation: Colocation | None = None,
    ) -> None:
        if not (directory / "config.json").is_file():
            raise InputError(f"no model in {directory} (config.json is missing); make it with `megatron-mm export`")
        for name, value in (_VLLM_ENVIRONMENT | ({} if has_own_memory else _HOST_ENVIRONMENT)).items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        # Tells, while it is imported, that there is no Triton.
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
        from vllm import LLM, ModelRegistry
        from vllm.model_executor.models.rvl import RForConditionalGeneration

        logging.getLogger("vllm").setLevel(logging.ERROR)
        # By class: by name vLLM inspects it in a subprocess first, which takes seconds.
        ModelRegistry.register_model("RForConditionalGeneration", RForConditionalGeneration)
        mend_products()
        arguments = engine_arguments(
            directory,
            dtype,
            max_sequences=max_sequences,
            seed=seed,
            has_own_memory=has_own_memory,
            colocation=colocation,
        )
        with kept_apart(has_own_memory=has_own_memory):
            self._llm = LLM(**arguments)
        if colocation is not None:
            keep_process_groups(self._llm)
        # What was given back, by vLLM's tags.
        self._asleep = set[str]()
        self._has_weights = colocation is None
        if colocation is not None:
            self.rest(keeps_weights=False)
        self._image = self._llm.llm_engine.model_config.hf_config.image_token_index

    def generate(
        self,
        prompts: Sequence[Prompt],
        pictures: Sequence[Sequence[Image.Image]],
        *,
        max_tokens: int,
        temperature: float = 0.0,
    ) -> list[Completion]:
        """Generate one response for each prompt, see `sample`."""
        sampling = Sampling(max_tokens, temperature)
        return [one for (one,) in self.sample(prompts, pictures, [sampling] * len(prompts))]

    def sample(
        self, prompts: Sequence[Prompt], pictures: Sequence[Sequence[Image.Image]], samplings: Sequence[Sampling]
    ) -> list[list[Completion]]:
        """Draw responses to each prompt.

        Args:
            prompts: rendered prompts.
            pictures: the pictures of each.
            samplings: how the responses to each are drawn.

        Raises:
            RuntimeError: the engine has no weights; or vLLM expanded a prompt to other ids than ours: its processor and
                ours disagree.
        """
        if not self._has_weights:
            raise RuntimeError("the engine's weights were given back, or never came: load some first")
        self._wake(_WEIGHTS, _CACHE)
        requests: list[Any] = []
        for prompt, images in zip(prompts, pictures, strict=True):
            request: dict[str, Any] = {"prompt_token_ids": prompt.collapsed_ids.tolist()}
            if images:
                request["multi_modal_data"] = {"image": list(images)}
            requests.append(request)
        outputs = self._llm.generate(requests, [self._parameters(one) for one in samplings], use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            if not np.array_equal(output.prompt_token_ids or [], prompt.ids):
                raise RuntimeError(
                    f"vLLM made {len(output.prompt_token_ids or [])} prompt tokens where we have {len(prompt.ids)}; "
                    "the directory's processor does not tile pictures as chat/images.py does"
                )
        return [[_completion(one) for one in output.outputs] for output in outputs]

    def load(self, tensors: Iterable[tuple[str, Tensor]], parts: Mapping[str, Sequence[Part]]) -> None:
        """Take whole tensors by their Hugging Face names in place of the weights.

        Memory that was given back is taken again for weights alone: the cache's waits until there is a prompt.

        Args:
            tensors: all of the model's.
            parts: see `parts`.
        """
        self._wake(_WEIGHTS)
        load_weights(parts, tensors)
        self._has_weights = True
        # What the old weights made of prompts and pictures. The worker forgets some of it by itself, and the scheduler,
        # which is not told, would wait for it.
        engine = self._llm.llm_engine
        engine.reset_mm_cache()
        engine.reset_encoder_cache()
        assert engine.reset_prefix_cache(), "a prompt is under way"

    def rest(self, *, keeps_weights: bool) -> None:
        """Give back the GPU's memory until it is needed again; on a CPU there is nothing to give back.

        Args:
            keeps_weights: move them to the host's memory, and do not wait for others.
        """
        if self._asleep != {_WEIGHTS, _CACHE}:
            # vLLM 0.26 takes an engine of which a part sleeps for one that sleeps already.
            self._wake(_WEIGHTS, _CACHE)
            self._llm.sleep(level=1 if keeps_weights else 2)
            self._asleep = {_WEIGHTS, _CACHE}
        self._has_weights = self._has_weights and keeps_weights

    def _wake(self, *tags: str) -> None:
        asleep = [tag for tag in tags if tag in self._asleep]
        if asleep:
            # vLLM takes memory from the GPU, and knows nothing of what torch keeps for the trainer's next tensors.
            torch.cuda.empty_cache()
            self._llm.wake_up(asleep)
            self._asleep -= set(asleep)

    def parts(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Part]]:
        """What this rank's worker holds of each of the tensors with these names and shapes.

        Raises:
            RuntimeError: it holds parameters that none of them is for, or has no place for one.
        """
        executor: Any = self._llm.llm_engine.model_executor
        model = executor.driver_worker.worker.get_model()
        parts = find_parts(model, shapes)
        left = uncovered(model, chain.from_iterable(parts.values()))
        if left:
            raise RuntimeError(f"nothing is sent for these parameters of vLLM's model: {left}")
        return parts

    def _parameters(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=sampling.count,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=0,
            # Lists of numbers instead of a dict of objects for each token, in the thread that the engine steps in.
            flat_logprobs=True,
            # A control token where none belongs is a fault of the response, and tags may be control tokens.
            skip_special_tokens=False,
            # An image token in a response would be taken for a picture; nothing trains the model not to sample it.
            logit_bias={self._image: -100.0},
        )


def _completion(output: Any) -> Completion:
    ids, flat = list(output.token_ids), output.logprobs
    # The sampled token is the first of each position.
    assert [flat.token_ids[start] for start in flat.start_indices] == ids
    logprobs = [flat.logprobs[start] for start in flat.start_indices]
    return Completion(ids, logprobs, output.text, output.finish_reason == "stop")
