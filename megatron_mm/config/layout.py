"""Which parallel layouts a model and a batch admit; asked before any process group is made."""

from megatron_mm.config.errors import InputError
from megatron_mm.config.schema import RunConfig


def layout_faults(config: RunConfig, num_ranks: int) -> list[str]:
    """Every reason why `config` cannot run on `num_ranks` ranks, one sentence each, empty if it can."""
    parallel, vision, language = config.parallel, config.model.vision, config.model.language
    faults = []
    split_by_tensor = {
        "model.vision.num_heads": vision.num_heads,
        "model.vision.ffn_hidden_size": vision.ffn_hidden_size,
        "model.language.num_heads": language.num_heads,
        "model.language.num_kv_heads": language.num_kv_heads,
        "model.language.hidden_size": language.hidden_size,
        "model.language.ffn_hidden_size": language.ffn_hidden_size,
        "model.language.vocab_size": language.vocab_size,
    }
    for field, size in split_by_tensor.items():
        if size % parallel.tensor:
            faults.append(f"parallel.tensor={parallel.tensor} does not divide {field}={size}")
    if language.num_layers % parallel.pipeline:
        faults.append(
            f"parallel.pipeline={parallel.pipeline} does not divide model.language.num_layers={language.num_layers}"
        )
    if parallel.sequence and parallel.tensor == 1:
        faults.append("parallel.sequence=true needs parallel.tensor of 2 or more")
    if num_ranks % parallel.model_ranks:
        faults.append(
            f"{num_ranks} ranks cannot be shared out over parallel.tensor={parallel.tensor} x "
            f"parallel.pipeline={parallel.pipeline}; start a multiple of {parallel.model_ranks} ranks"
        )
    else:
        per_pass = config.train.micro_batch * (num_ranks // parallel.model_ranks)
        if config.train.global_batch % per_pass:
            faults.append(
                f"train.global_batch={config.train.global_batch} is not a multiple of train.micro_batch="
                f"{config.train.micro_batch} x {num_ranks // parallel.model_ranks} data-parallel ranks"
            )
    return faults


def check_layout(config: RunConfig, num_ranks: int) -> None:
    """Raise `InputError` naming every reason why `config` cannot run on `num_ranks` ranks."""
    faults = layout_faults(config, num_ranks)
    if faults:
        raise InputError("\n".join([f"recipe {config.recipe} cannot run on {num_ranks} ranks:", *faults]))
