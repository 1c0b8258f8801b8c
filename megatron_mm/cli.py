"""The `megatron-mm` command: reads arguments, calls the package, maps errors to exit codes.

Exit codes: 0 done, 2 bad input, others failure.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from megatron_mm.config.errors import BAD_INPUT_CODE, InputError
from megatron_mm.config.load import load_config, to_yaml
from megatron_mm.config.schema import RunConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse takes no more overrides once it has seen an option.
    if rest and (not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    # Megatron-Core says once a module and rank that Transformer Engine and Apex are missing; `doctor` says it once.
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    # It loads checkpoints by a call that torch 2.13 is about to rename.
    warnings.filterwarnings("ignore", category=FutureWarning, module="megatron")
    try:
        return options.run(options)
    except InputError as error:
        from megatron_mm.parallel.launch import report_bad_input

        report_bad_input(str(error))
        return BAD_INPUT_CODE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-mm", description="Train, export and evaluate auto-thinking models.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    show = commands.add_parser("show", help="print a recipe's resolved config")
    _add_config_arguments(show)
    show.set_defaults(run=_show)

    train = commands.add_parser("train", help="run a training stage")
    _add_config_arguments(train)
    train.add_argument("--nproc", type=int, help="start this many ranks here; leave out under torchrun")
    train.set_defaults(run=_train)

    data = commands.add_parser("data", help="prepare a data set").add_subparsers(required=True, metavar="KIND")
    digits = data.add_parser("digits", help="the miniature one: handwritten digits and questions about them")
    digits.add_argument("directory", type=Path, help="where to write it; must not exist yet")
    digits.add_argument("--train", type=int, default=12000, help="training pictures (default %(default)s)")
    digits.add_argument("--heldout", type=int, default=400, help="held-out pictures (default %(default)s)")
    digits.add_argument("--seed", type=int, default=0)
    digits.set_defaults(run=_data_digits)

    export = commands.add_parser("export", help="checkpoint -> Hugging Face directory in R-4B's layout")
    export.add_argument("run_dir", type=Path, help="run directory whose newest checkpoint is exported")
    export.add_argument("directory", type=Path, help="where to write it; must not exist yet")
    export.set_defaults(run=_export)

    evaluate = commands.add_parser("evaluate", help="ask a Hugging Face directory held-out questions through vLLM")
    evaluate.add_argument("model", type=Path, help="directory made by `megatron-mm export`")
    evaluate.add_argument("data", type=Path, help="prepared data set with a held-out split")
    evaluate.add_argument("report", type=Path, help="JSON file to write")
    evaluate.add_argument("--questions", type=int, default=200, help="questions of each kind (default %(default)s)")
    evaluate.add_argument("--max-tokens", type=int, default=48, help="longest response (default %(default)s)")
    evaluate.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    evaluate.set_defaults(run=_evaluate)

    doctor = commands.add_parser("doctor", help="what this machine can run, and how to get what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="recipe name such as mini/stage1, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config overrides")
    parser.add_argument("--config", action="append", default=[], type=Path, help="YAML merged over the recipe")


def _config(options: argparse.Namespace) -> RunConfig:
    return load_config(options.recipe, options.config, options.overrides)


def _show(options: argparse.Namespace) -> int:
    print(to_yaml(_config(options)), end="")
    return 0


def _train(options: argparse.Namespace) -> int:
    config = _config(options)
    if options.nproc is None:
        from megatron_mm.train.loop import train

        train(config)
        return 0
    from megatron_mm.parallel.launch import run_ranks
    from megatron_mm.train.check import check_inputs

    check_inputs(config, options.nproc)
    files = [argument for file in options.config for argument in ("--config", str(file))]
    return run_ranks(["train", options.recipe, *options.overrides, *files], options.nproc)


def _data_digits(options: argparse.Namespace) -> int:
    from megatron_mm.data.digits import prepare_digits

    prepare_digits(options.directory, options.train, options.heldout, options.seed)
    return 0


def _export(options: argparse.Namespace) -> int:
    from megatron_mm.convert import export_run

    export_run(options.run_dir, options.directory)
    return 0


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
