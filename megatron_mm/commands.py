"""What each command of `megatron-mm` does with its arguments: cheap checks, a first line, the work, a last line.

Packages that take seconds to import are imported after the checks.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mm import early
from megatron_mm.config.errors import REQUEUE_CODE, InputError
from megatron_mm.config.load import describe_recipe, load_config, load_prepare, recipe_names, to_yaml
from megatron_mm.config.schema import RunConfig
from megatron_mm.files import refuse_existing, refuse_unwritable_file
from megatron_mm.parallel.nodes import find_nodes
from megatron_mm.planning.load import LoadOptions
from megatron_mm.planning.report import PlanOptions, plan
from megatron_mm.planning.rl_report import plan_rl
from megatron_mm.planning.rollout import RolloutOptions


def run_show(options: argparse.Namespace) -> int:
    """Print a recipe's resolved config, or without a recipe the names of all."""
    if options.recipe is not None:
        print(to_yaml(_config(options)), end="")
        return 0
    names = [name for name in recipe_names() if not name.endswith("/base")]  # no run is only a base
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {describe_recipe(name)}")
    return 0


def run_training(options: argparse.Namespace) -> int:
    """Be a rank of a run, or start ranks here and wait for them."""
    config = _config(options)
    wanted = "train" if config.rl is None else "rl"
    if options.command != wanted:
        raise InputError(f"recipe {config.recipe} is for `megatron-mm {wanted}`, not `megatron-mm {options.command}`")
    if options.nproc is None:
        return _run_rank(config)
    nodes = find_nodes(options.nodes, options.rendezvous)
    num_ranks = options.nproc * nodes.num_nodes
    early.check_run(config, num_ranks)
    if nodes.node == 0:
        _say(f"{config.recipe}: starting {num_ranks} ranks, which takes about half a minute")
    from megatron_mm.files import in_use
    from megatron_mm.parallel.cores import shared_cores, usable_cores
    from megatron_mm.parallel.launch import run_ranks
    from megatron_mm.train.check import check_inputs
    from megatron_mm.train.starts import judge_end, record_start

    check_inputs(config, num_ranks)
    if (warning := shared_cores(options.nproc, usable_cores())) is not None:
        print(f"megatron-mm: {warning}", file=sys.stderr, flush=True)
    files = [argument for file in options.config for argument in ("--config", str(file))]
    arguments = [options.command, options.recipe, *options.overrides, *files]
    if nodes.node == 0:
        with in_use(config.run_dir):
            record_start(config.run_dir)
    return judge_end(config.run_dir, run_ranks(arguments, options.nproc, nodes, config.run_dir / "logs"))


def _run_rank(config: RunConfig) -> int:
    early.check_run(config, int(os.environ.get("WORLD_SIZE", "1")))
    from megatron_mm.train.loop import Outcome, train

    if config.rl is None:
        outcome = train(config)
    else:
        from megatron_mm.rl.job import reinforce

        outcome = reinforce(config)
    return REQUEUE_CODE if outcome is Outcome.STOPPED else 0


def run_plan(options: argparse.Namespace) -> int:
    """Print what a run would need, and layouts that fit."""
    config = _config(options)
    supervised = {"--trained-share": options.trained_share, "--samples-per-pack": options.samples_per_pack}
    drawing = {
        "--prompt-tokens": options.prompt_tokens,
        "--response-tokens": options.response_tokens,
        "--draw-rate": options.draw_rate,
        "--host-memory": options.host_memory,
    }
    foreign = supervised if config.rl is not None else drawing
    given = [name for name, value in foreign.items() if value is not None]
    if given:
        kind = "reinforcement learning" if config.rl is not None else "supervised training"
        raise InputError(f"{', '.join(given)} means nothing for recipe {config.recipe}, which is {kind}; leave it out")
    request = PlanOptions(options.gpu, options.gpus, options.memory_share, options.utilisation)
    if config.rl is not None:
        rollout = RolloutOptions(
            prompt_tokens=options.prompt_tokens,
            response_tokens=options.response_tokens,
            draw_rate=options.draw_rate,
            host_memory_gib=options.host_memory,
            tiles_per_pack=options.tiles_per_pack,
        )
        found = plan_rl(config, request, rollout)
    else:
        found = plan(
            config, request, LoadOptions(options.tiles_per_pack, options.trained_share, options.samples_per_pack)
        )
    print(found.text, end="", flush=True)
    if found.refusal is not None:
        raise InputError(found.refusal)
    return 0


def prepare_data(options: argparse.Namespace) -> int:
    """Turn sources into a prepared data set."""
    config = load_prepare(options.sources, options.overrides)
    early.check_preparation(config, options.directory)
    _say("data prepare: starting, which takes about ten seconds")
    from megatron_mm.data.prepare import prepare

    prepare(config, options.directory, options.workers)
    look = f"data inspect RECIPE data.path={_quoted(options.directory)} data.blend={{}} --html page.html"
    _say(f"done: {options.directory}; next: megatron-mm {look}")
    return 0


def inspect_data(options: argparse.Namespace) -> int:
    """Show samples as the model sees them, and a summary."""
    config = _config(options)
    early.check_data(config, options.split)
    if options.html is not None:
        refuse_unwritable_file(options.html, "page")
    _say("data inspect: starting, which takes about ten seconds")
    from megatron_mm.data.inspect import inspect_data

    inspect_data(config, options.samples, options.part, options.html, options.split)
    if options.html is not None:
        _say(f"done: {options.html}, which any browser shows")
    return 0


def make_digits(options: argparse.Namespace) -> int:
    """Prepare the miniature data set."""
    refuse_existing(options.directory)
    _say("data digits: starting, which takes about half a minute")
    from megatron_mm.data.digits import prepare_digits

    prepare_digits(options.directory, options.train, options.heldout, options.seed)
    where = _quoted(options.directory)
    _say(
        f"done: {options.directory}, made of {options.train:,} training and {options.heldout:,} held-out pictures; "
        f"next: megatron-mm train mini/language data.path={where} --nproc 2"
    )
    return 0


def import_weights(options: argparse.Namespace) -> int:
    """Turn Hugging Face directories into a checkpoint."""
    _without_gpus()
    directories = {"whole": options.model, "vision": options.vision, "language": options.language}
    given = {kind: directory for kind, directory in directories.items() if directory is not None}
    if given.keys() not in ({"whole"}, {"vision", "language"}):
        raise InputError("give --model, or --vision and --language")
    early.check_import(options.run_dir, given.values())
    is_first = os.environ.get("RANK", "0") == "0"
    if is_first and "RANK" not in os.environ:
        _say(f"import: starting, which takes about 20 seconds; writes {options.run_dir}")
    from megatron_mm.convert.importing import ImportOptions, import_model, plan_import
    from megatron_mm.parallel.launch import run_ranks
    from megatron_mm.weights.stream import dtype_name

    request = ImportOptions(
        run_dir=options.run_dir,
        directories=given,  # pyright: ignore[reportArgumentType]
        recipe=options.recipe,
        files=options.config,
        overrides=options.overrides,
        dtype=_dtype(options.dtype),
        seed=options.seed,
        ignored_fields=options.ignore_field,
    )
    if options.nproc is not None:
        plan_import(request)
        return run_ranks(_without_option(options.arguments, "--nproc"), options.nproc)
    plan = import_model(request)
    if is_first:
        print(f"wrote {options.run_dir} in {dtype_name(plan.source.dtype)}", *plan.source.notes, sep="\n  ")
        where = _quoted(options.run_dir)
        _say(
            f"done: {options.run_dir}; next: megatron-mm train RECIPE --config {where}/config.yaml init_from={where} "
            "data.path=DIR --nproc N"
        )
    return 0


def export_weights(options: argparse.Namespace) -> int:
    """Turn the newest checkpoint of a run into a Hugging Face directory."""
    _without_gpus()
    shard_bytes = int(options.shard_size * 2**30)
    if shard_bytes < 1:
        raise InputError(f"--shard-size {options.shard_size} is not a size in GiB")
    early.check_export(options.run_dir, options.directory)
    _say("export: starting, which takes about 20 seconds")
    from megatron_mm.convert.exporting import export_run
    from megatron_mm.weights.export import Format

    export_run(options.run_dir, options.directory, Format(options.format), _dtype(options.dtype), shard_bytes)
    _say(
        f"done: {options.directory}, in format {options.format}; next: megatron-mm evaluate "
        f"{_quoted(options.directory)} DATA report.json"
    )
    return 0


def verify_weights(options: argparse.Namespace) -> int:
    """Compare two sets of weights to the bit."""
    _without_gpus()
    early.check_weights(options.one)
    early.check_weights(options.other)
    _say("verify: starting, which takes about 20 seconds")
    from megatron_mm.convert.verify import verify

    report = verify(options.one, options.other, subset=options.subset)
    for note in report.notes:
        print(f"not compared: {note}")
    for difference in report.differences:
        print(f"DIFFERENT: {difference}")
    verdict = f"{len(report.differences)} differences" if report.differences else "equal to the bit"
    print(f"{verdict}; compared {report.num_tensors:,} tensors of {report.num_values:,} values")
    return int(bool(report.differences))


def evaluate_model(options: argparse.Namespace) -> int:
    """Ask a model held-out questions in every mode."""
    early.check_evaluation(options.model, options.data, options.report)
    _say("evaluate: starting vLLM, which takes about a minute")
    from megatron_mm.evaluate.heldout import evaluate_heldout

    evaluate_heldout(options.model, options.data, options.report, options.questions, options.max_tokens, options.dtype)
    _say(f"done: {options.report}, and the responses in {options.report.with_suffix('.jsonl')}")
    return 0


def run_doctor(options: argparse.Namespace) -> int:
    """Say what this machine can run."""
    del options
    from megatron_mm.doctor import examine

    return examine()


def _config(options: argparse.Namespace) -> RunConfig:
    return load_config(options.recipe, options.config, options.overrides)


def _say(text: str) -> None:
    """Print a line at once: what follows takes its time."""
    print(text, flush=True)


def _quoted(path: Path) -> str:
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def _without_gpus() -> None:
    """Conversion moves bytes between files; beside a live CUDA, Megatron-Core cannot run on the CPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def _dtype(name: str | None) -> Any:
    import torch

    return None if name is None else getattr(torch, name)


def _without_option(arguments: Sequence[str], name: str) -> list[str]:
    """The arguments without an option and its value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != name and not argument.startswith(f"{name}="):
            kept.append(argument)
        skip = argument == name
    return kept
