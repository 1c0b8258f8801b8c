"""Bounds that another program sets, refused before anything is started."""

import pytest

from megatron_mm.config.errors import InputError
from megatron_mm.config.load import load_config

STAGE = "rl.stages=[{{steps: 40, max_response_tokens: 3, group_size: 1, temperature: {}}}]"


# vLLM takes no more than 2, and draws at 0.01 where less is asked for.
@pytest.mark.parametrize("temperature", ["3.0", "2.01", "-1", "0", "0.001", ".inf", ".nan"])
def test_a_temperature_that_vllm_does_not_draw_at(temperature: str) -> None:
    with pytest.raises(InputError, match=r"rl\.stages\.0\.temperature"):
        load_config("mini/bpo", overrides=["run_dir=unused", "data.path=unused", STAGE.format(temperature)])


@pytest.mark.parametrize("temperature", ["2", "0.01", "1.0"])
def test_a_temperature_that_it_does(temperature: str) -> None:
    config = load_config("mini/bpo", overrides=["run_dir=unused", "data.path=unused", STAGE.format(temperature)])
    assert config.rl is not None
    assert config.rl.stages[0].temperature == float(temperature)
