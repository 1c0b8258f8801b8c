"""What vLLM is asked for, by what the machine is. vLLM's own judgement of it is in tests/gpu_contract."""

from pathlib import Path

from megatron_mm.generation.engine import Colocation, engine_arguments


def test_only_a_device_with_its_own_memory_decodes_with_graphs_and_sleeps() -> None:
    colocation = Colocation(2, max_tokens=512, cache_bytes=2**28)
    host, device = (
        engine_arguments(Path("model"), "bfloat16", has_own_memory=own, colocation=colocation) for own in (False, True)
    )
    assert host["enforce_eager"]
    assert "compilation_config" not in host
    assert not device["enforce_eager"]
    assert device["compilation_config"] == {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
    for name in ("enable_sleep_mode", "enable_chunked_prefill"):
        assert (host[name], device[name]) == (False, True), name


def test_an_engine_of_its_own_takes_nothing_of_a_trainer() -> None:
    alone = engine_arguments(Path("model"), "float32", max_sequences=8, seed=3)
    shared = engine_arguments(
        Path("model"), "float32", max_sequences=8, seed=3, colocation=Colocation(2, max_tokens=512, cache_bytes=2**28)
    )
    assert alone.items() <= shared.items()
    assert (alone["model"], alone["dtype"], alone["max_num_seqs"], alone["seed"]) == ("model", "float32", 8, 3)
    added = {name: shared[name] for name in shared.keys() - alone.keys()}
    assert (added["tensor_parallel_size"], added["max_model_len"], added["kv_cache_memory_bytes"]) == (2, 512, 2**28)
    assert (added["load_format"], added["logprobs_mode"]) == ("dummy", "processed_logprobs")
