"""The `megatron-mm` command: reads arguments, calls the package, maps errors to exit codes.

Exit codes: 0 done, 2 bad input, 75 asked to end, saved and to be started again, others failure.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mm.config.errors import BAD_INPUT_CODE, REQUEUE_CODE, InputError
from megatron_mm.config.load import load_config, to_yaml
from megatron_mm.config.schema import RunConfig
from megatron_mm.planning.load import SAMPLES_PER_PACK, TRAINED_SHARE, LoadOptions
from megatron_mm.planning.report import PlanOptions, plan
from megatron_mm.planning.rl_report import plan_rl
from megatron_mm.planning.rollout import RolloutOptions

DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    options.arguments = arguments
    # argparse takes no more overrides once it has seen an option.
    if rest and (not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    # Megatron-Core says once a module and rank that Transformer Engine and Apex are missing; `doctor` says it once.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    # It loads checkpoints by a call that torch 2.13 is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="megatron")
    if "RANK" in os.environ:
        from megatron_mm.parallel.failure import run_rank

        return run_rank(lambda: options.run(options))
    try:
        return options.run(options)
    except InputError as error:
        print(f"megatron-mm: {error}", file=sys.stderr)
        return BAD_INPUT_CODE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-mm", description="Train, export and evaluate auto-thinking models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="print a recipe's resolved config")
    _add_config_arguments(show)
    show.set_defaults(run=_show)

    for command, what in (("train", "run a training stage"), ("rl", "run reinforcement learning")):
        run = commands.add_parser(command, help=what)
        _add_config_arguments(run)
        run.add_argument("--nproc", type=int, help="start this many ranks here; leave out under torchrun")
        run.add_argument(
            "--nodes", type=int, default=1, help="launchers that srun starts, one a node (docs/cluster.md)"
        )
        run.add_argument("--rendezvous", metavar="HOST:PORT", help="of the first node; with --nodes")
        run.set_defaults(run=_run, command=command)

    _add_plan(commands)
    _add_data(commands)
    _add_import(commands)
    export = commands.add_parser("export", help="checkpoint -> Hugging Face directory")
    export.add_argument("run_dir", type=Path, help="run directory whose newest checkpoint is exported, or a checkpoint")
    export.add_argument("directory", type=Path, help="where to write it; must not exist yet")
    export.add_argument("--format", choices=("r4b", "llava_onevision"), default="r4b", help="default %(default)s")
    export.add_argument("--dtype", choices=DTYPES, help="convert to it; left out, the checkpoint's is kept")
    export.add_argument("--shard-size", type=float, default=1.0, help="largest file in GiB (default %(default)s)")
    export.set_defaults(run=_export)

    verify = commands.add_parser("verify", help="compare two sets of weights to the bit; exit code 1 if they differ")
    verify.add_argument("one", type=Path, help="Hugging Face directory, run directory or checkpoint")
    verify.add_argument("other", type=Path, help="the same")
    verify.add_argument("--subset", action="store_true", help="the second may hold more")
    verify.set_defaults(run=_verify)

    evaluate = commands.add_parser("evaluate", help="ask a Hugging Face directory held-out questions through vLLM")
    evaluate.add_argument("model", type=Path, help="directory made by `megatron-mm export`")
    evaluate.add_argument("data", help="prepared data set with a held-out split: directory or URL")
    evaluate.add_argument("report", type=Path, help="JSON file to write")
    evaluate.add_argument("--questions", type=int, default=200, help="questions of each kind (default %(default)s)")
    evaluate.add_argument("--max-tokens", type=int, default=48, help="longest response (default %(default)s)")
    evaluate.add_argument("--dtype", choices=DTYPES, help="left out, bfloat16 on a GPU and float32 on a CPU")
    evaluate.set_defaults(run=_evaluate)

    doctor = commands.add_parser("doctor", help="what this machine can run, and how to get what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="memory, operations, traffic and time of a run, and layouts that fit")
    _add_config_arguments(plan)
    plan.add_argument("--gpus", type=int, required=True, help="how many")
    plan.add_argument("--gpu", required=True, help="which: a100, h100, h200")
    plan.add_argument("--utilisation", type=float, default=0.4, help="share of the peak reached (default %(default)s)")
    plan.add_argument("--memory-share", type=float, default=0.9, help="that tensors may take (default %(default)s)")
    plan.add_argument("--tiles-per-pack", type=float, help="left out, what is not trained is all images")
    learning = plan.add_argument_group("supervised training")
    learning.add_argument("--trained-share", type=float, help=f"of tokens (default {TRAINED_SHARE})")
    learning.add_argument("--samples-per-pack", type=float, help=f"of equal length (default {SAMPLES_PER_PACK})")
    drawing = plan.add_argument_group("reinforcement learning")
    drawing.add_argument("--prompt-tokens", type=float, help="mean, with image features (default: a small image)")
    drawing.add_argument("--response-tokens", type=float, help="mean (default: a quarter of the longest)")
    drawing.add_argument("--draw-rate", type=float, help="tokens/s of a GPU (default: by its memory's bandwidth)")
    drawing.add_argument("--host-memory", type=float, help="GiB of a node (default: a DGX machine's)")
    plan.set_defaults(run=_plan)


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="prepare and look at data sets").add_subparsers(required=True, metavar="DO")
    prepare = data.add_parser("prepare", help="sources, named in a YAML file -> a prepared data set")
    prepare.add_argument("sources", type=Path, help="YAML file, see docs/data.md")
    prepare.add_argument("directory", type=Path, help="where to write; a call that was ended goes on")
    prepare.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that differ from the file's")
    prepare.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default %(default)s)")
    prepare.set_defaults(run=_data_prepare)

    inspect = data.add_parser("inspect", help="samples as the model sees them, and a summary")
    _add_config_arguments(inspect)
    inspect.add_argument("--samples", type=int, default=3, help="how many to show (default %(default)s)")
    inspect.add_argument("--part", help="only of parts that match this pattern, such as 'ocr/*'")
    inspect.add_argument("--split", choices=("train", "heldout"), default="train")
    inspect.add_argument("--html", type=Path, help="write a page with pictures and tiles as well")
    inspect.set_defaults(run=_data_inspect)

    digits = data.add_parser("digits", help="the miniature one: handwritten digits and questions about them")
    digits.add_argument("directory", type=Path, help="where to write it; must not exist yet")
    digits.add_argument("--train", type=int, default=12000, help="training pictures (default %(default)s)")
    digits.add_argument("--heldout", type=int, default=400, help="held-out pictures (default %(default)s)")
    digits.add_argument("--seed", type=int, default=0)
    digits.set_defaults(run=_data_digits)


def _add_import(commands: Any) -> None:
    parser = commands.add_parser("import", help="Hugging Face weights -> a checkpoint that every layout loads")
    parser.add_argument("run_dir", type=Path, help="where to write it; must not exist yet")
    overrides = "model.* differing from the weights' config; parallel.tensor, the parts that a tensor is stored in"
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help=overrides)
    parser.add_argument("--model", type=Path, help="directory of an R-4B, LlavaOnevision or LlavaNext")
    parser.add_argument("--vision", type=Path, help="directory of a SigLIP or SigLIP2; with --language")
    parser.add_argument("--language", type=Path, help="directory of a Qwen3 or Qwen3-MoE; with --vision")
    parser.add_argument("--recipe", help="recipe whose model the weights are for")
    parser.add_argument("--config", action="append", default=[], type=Path, help="YAML laid over the recipe")
    parser.add_argument("--dtype", choices=DTYPES, help="convert to it; left out, the weights' is kept")
    parser.add_argument("--seed", type=int, default=0, help="of the projector drawn with --vision and --language")
    parser.add_argument("--ignore-field", action="append", default=[], help="field of config.json that does not matter")
    parser.add_argument("--nproc", type=int, help="share the work out over this many processes")
    parser.set_defaults(run=_import)


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe name such as mini/stage1, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config overrides")
    parser.add_argument("--config", action="append", default=[], type=Path, help="YAML merged over the recipe")


def _config(options: argparse.Namespace) -> RunConfig:
    return load_config(options.recipe, options.config, options.overrides)


def _show(options: argparse.Namespace) -> int:
    print(to_yaml(_config(options)), end="")
    return 0


def _run(options: argparse.Namespace) -> int:
    config = _config(options)
    wanted = "train" if config.rl is None else "rl"
    if options.command != wanted:
        raise InputError(f"recipe {config.recipe} is for `megatron-mm {wanted}`, not `megatron-mm {options.command}`")
    if options.nproc is not None and options.nproc < 1:
        raise InputError(f"--nproc {options.nproc}: give the number of ranks, 1 or more")
    if options.nproc is None:
        from megatron_mm.train.loop import Outcome, train

        if config.rl is None:
            outcome = train(config)
        else:
            from megatron_mm.rl.job import reinforce

            outcome = reinforce(config)
        return REQUEUE_CODE if outcome is Outcome.STOPPED else 0
    from megatron_mm.files import in_use
    from megatron_mm.parallel.cores import shared_cores, usable_cores
    from megatron_mm.parallel.launch import find_nodes, run_ranks
    from megatron_mm.train.check import check_inputs
    from megatron_mm.train.starts import judge_end, record_start

    nodes = find_nodes(options.nodes, options.rendezvous)
    check_inputs(config, options.nproc * nodes.num_nodes)
    if (warning := shared_cores(options.nproc, usable_cores())) is not None:
        print(f"megatron-mm: {warning}", file=sys.stderr, flush=True)
    files = [argument for file in options.config for argument in ("--config", str(file))]
    arguments = [options.command, options.recipe, *options.overrides, *files]
    if nodes.node == 0:
        with in_use(config.run_dir):
            record_start(config.run_dir)
    return judge_end(config.run_dir, run_ranks(arguments, options.nproc, nodes, config.run_dir / "logs"))


def _plan(options: argparse.Namespace) -> int:
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


def _data_prepare(options: argparse.Namespace) -> int:
    from megatron_mm.config.load import load_prepare
    from megatron_mm.data.prepare import prepare

    prepare(load_prepare(options.sources, options.overrides), options.directory, options.workers)
    return 0


def _data_inspect(options: argparse.Namespace) -> int:
    from megatron_mm.data.inspect import inspect_data

    inspect_data(_config(options), options.samples, options.part, options.html, options.split)
    return 0


def _data_digits(options: argparse.Namespace) -> int:
    from megatron_mm.data.digits import prepare_digits

    prepare_digits(options.directory, options.train, options.heldout, options.seed)
    return 0


def _import(options: argparse.Namespace) -> int:
    _without_gpus()
    from megatron_mm.convert.importing import ImportOptions, import_model, plan_import
    from megatron_mm.parallel.launch import run_ranks
    from megatron_mm.weights.stream import dtype_name

    directories = {"whole": options.model, "vision": options.vision, "language": options.language}
    given = {kind: directory for kind, directory in directories.items() if directory is not None}
    if given.keys() not in ({"whole"}, {"vision", "language"}):
        raise InputError("give --model, or --vision and --language")
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
    if os.environ.get("RANK", "0") == "0":
        print(f"wrote {options.run_dir} in {dtype_name(plan.source.dtype)}", *plan.source.notes, sep="\n  ")
    return 0


def _export(options: argparse.Namespace) -> int:
    _without_gpus()
    from megatron_mm.convert.exporting import export_run
    from megatron_mm.weights.export import Format

    shard_bytes = int(options.shard_size * 2**30)
    if shard_bytes < 1:
        raise InputError(f"--shard-size {options.shard_size} is not a size in GiB")
    export_run(options.run_dir, options.directory, Format(options.format), _dtype(options.dtype), shard_bytes)
    return 0


def _verify(options: argparse.Namespace) -> int:
    _without_gpus()
    from megatron_mm.convert.verify import verify

    report = verify(options.one, options.other, subset=options.subset)
    for note in report.notes:
        print(f"not compared: {note}")
    for difference in report.differences:
        print(f"DIFFERENT: {difference}")
    verdict = f"{len(report.differences)} differences" if report.differences else "equal to the bit"
    print(f"{verdict}; compared {report.num_tensors:,} tensors of {report.num_values:,} values")
    return int(bool(report.differences))


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


def _evaluate(options: argparse.Namespace) -> int:
    from megatron_mm.evaluate.heldout import evaluate_heldout

    evaluate_heldout(options.model, options.data, options.report, options.questions, options.max_tokens, options.dtype)
    return 0


def _doctor(options: argparse.Namespace) -> int:
    del options
    from megatron_mm.doctor import examine

    return examine()


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.exit(exit_code)
