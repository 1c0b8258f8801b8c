"""vLLM in this process, fed with the ids and pictures of chat/render.py.

Needs what vLLM 0.26 (GPU) and 0.32 (CPU) share. R-4B runs as vLLM's own RForConditionalGeneration.
"""

import logging
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from megatron_mm.chat.render import Prompt
from megatron_mm.config.errors import InputError
from megatron_mm.generation.colocation import keep_process_groups, kept_apart
from megatron_mm.generation.weights import Part, find_parts, load_weights, uncovered

# Read by vLLM when it is imported or its engine is made.
_VLLM_ENVIRONMENT = {
    # The engine lives in this process, so that RL can reach its weights.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # With log-probabilities asked for, vLLM compiles one small function: 15 s at the first answer, and a C++ compiler.
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class Completion:
    """What was generated for a prompt.

    Attributes:
        ids: the tokens sampled, the end of turn included where it was reached.
        logprobs: log-probability of each under the model, in nats, before temperature and bans.
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


class Engine:
    """A model directory, ready to generate.

    Args:
        directory: made by `megatron-mm export`; without weights where `ranks` is given.
        dtype: "float32" or "bfloat16".
        max_sequences: responses generated side by side.
        seed: of sampling.
        ranks: each so many ranks of the job, in order, are one tensor-parallel engine, which waits for `load`. The
            ranks of an engine are asked the same at the same time. Left out, this process is an engine of its own.

    Raises:
        InputError: the directory holds no model.
    """

    def __init__(
        self, directory: Path, dtype: str, max_sequences: int = 64, seed: int = 0, ranks: int | None = None
    ) -> None:
        if not (directory / "config.json").is_file():
            raise InputError(f"no model in {directory} (config.json is missing); make it with `megatron-mm export`")
        for name, value in _VLLM_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
        from vllm import LLM, ModelRegistry
        from vllm.model_executor.models.rvl import RForConditionalGeneration

        logging.getLogger("vllm").setLevel(logging.ERROR)
        # By class: by name vLLM inspects it in a subprocess first, which takes seconds.
        ModelRegistry.register_model("RForConditionalGeneration", RForConditionalGeneration)
        colocated: dict[str, Any] = {}
        if ranks is not None:
            colocated = {
                "distributed_executor_backend": "external_launcher",
                "tensor_parallel_size": ranks,
                "load_format": "dummy",
                # With a seed of its own, a prompt that is read in several pieces has its generator set back; vLLM
                # 0.32's CPU worker ends with "CPU Generator does not use offset" there.
                "enable_chunked_prefill": False,
            }
        with kept_apart():
            self._llm = LLM(
                str(directory),
                dtype=dtype,  # pyright: ignore[reportArgumentType]
                max_num_seqs=max_sequences,
                seed=seed,
                enforce_eager=True,
                limit_mm_per_prompt={"image": 8},
                skip_mm_profiling=True,
                **colocated,
            )
        if ranks is not None:
            keep_process_groups(self._llm)
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
            RuntimeError: vLLM expanded a prompt to other ids than ours: its processor and ours disagree.
        """
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

    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take whole tensors by their Hugging Face names in place of the weights; an engine's ranks do it together."""
        load_weights(self._worker, tensors)
        # What the old weights made of prompts and pictures. The worker forgets some of it by itself, and the scheduler,
        # which is not told, would wait for it.
        engine = self._llm.llm_engine
        engine.reset_mm_cache()
        engine.reset_encoder_cache()
        assert engine.reset_prefix_cache(), "a prompt is under way"

    def parts(self, shapes: Mapping[str, tuple[int, ...]]) -> list[Part]:
        """What this rank's worker holds of the tensors with these names and shapes.

        Raises:
            RuntimeError: it holds parameters that none of them is for, or has no place for one.
        """
        model = self._worker.get_model()
        parts = find_parts(model, shapes)
        left = uncovered(model, parts)
        if left:
            raise RuntimeError(f"nothing is sent for these parameters of vLLM's model: {left}")
        return parts

    @property
    def _worker(self) -> Any:
        executor: Any = self._llm.llm_engine.model_executor
        return executor.driver_worker.worker

    def _parameters(self, sampling: Sampling) -> Any:
        from vllm import SamplingParams

        return SamplingParams(
            n=sampling.count,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed,
            logprobs=0,
            # An image token in a response would be taken for a picture; nothing trains the model not to sample it.
            logit_bias={self._image: -100.0},
        )


def _completion(output: Any) -> Completion:
    ids = list(output.token_ids)
    logprobs = [step[token].logprob for step, token in zip(output.logprobs, ids, strict=True)]
    return Completion(ids, logprobs, output.text, output.finish_reason == "stop")
