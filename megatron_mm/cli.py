"""The `megatron-mm` command: reads arguments, calls the package, maps errors to exit codes.

Exit codes: 0 done, 2 bad input, 75 asked to end, saved and to be started again, others failure.
"""

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_mm import __version__, commands
from megatron_mm.config.errors import BAD_INPUT_CODE, InputError
from megatron_mm.config.schema import MAX_SEED
from megatron_mm.planning.gpus import GPUS
from megatron_mm.planning.load import SAMPLES_PER_PACK, TRAINED_SHARE

DTYPES = ("float32", "bfloat16")
# More than any machine, cluster or data set has: what exceeds them is a slip of the keyboard.
MOST_RANKS = 1_000
MOST = 1_000_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code."""
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
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


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return a command's options; `run` is the function that takes them.

    Raises:
        SystemExit: with `BAD_INPUT_CODE`, when there is no such command or option; the message has been printed.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    options.arguments = arguments
    # argparse takes no more overrides once it has seen an option.
    if rest and (not hasattr(options, "overrides") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


class _Parser(argparse.ArgumentParser):
    """Takes options by their whole names only: another option may get a name that begins alike."""

    def __init__(self, **arguments: Any):
        super().__init__(allow_abbrev=False, **arguments)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="megatron-mm", description="Train, export and evaluate auto-thinking models.")
    parser.add_argument("--version", action="version", version=f"megatron_mm {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    show = subparsers.add_parser("show", help="print a recipe's resolved config; without a recipe, the names of all")
    _add_config_arguments(show, recipe_count="?")
    show.set_defaults(run=commands.run_show)

    for command, what in (("train", "run a training stage"), ("rl", "run reinforcement learning")):
        run = subparsers.add_parser(command, help=what)
        _add_config_arguments(run)
        ranks = _whole(1, MOST_RANKS)
        run.add_argument("--nproc", type=ranks, help="start this many ranks here; leave out under torchrun")
        run.add_argument(
            "--nodes", type=int, default=1, help="launchers that srun starts, one a node (docs/cluster.md)"
        )
        run.add_argument("--rendezvous", metavar="HOST:PORT", help="of the first node; with --nodes")
        run.set_defaults(run=commands.run_training, command=command)

    _add_plan(subparsers)
    _add_data(subparsers)
    _add_import(subparsers)
    export = subparsers.add_parser("export", help="checkpoint -> Hugging Face directory")
    export.add_argument("run_dir", type=Path, help="run directory whose newest checkpoint is exported, or a checkpoint")
    export.add_argument("directory", type=Path, help="where to write it; must not exist yet")
    export.add_argument("--format", choices=("r4b", "llava_onevision"), default="r4b", help="default %(default)s")
    export.add_argument("--dtype", choices=DTYPES, help="convert to it; left out, the checkpoint's is kept")
    export.add_argument("--shard-size", type=_finite, default=1.0, help="largest file in GiB (default %(default)s)")
    export.set_defaults(run=commands.export_weights)

    verify = subparsers.add_parser("verify", help="compare two sets of weights to the bit; exit code 1 if they differ")
    verify.add_argument("one", type=Path, help="Hugging Face directory, run directory or checkpoint")
    verify.add_argument("other", type=Path, help="the same")
    verify.add_argument("--subset", action="store_true", help="the second may hold more")
    verify.set_defaults(run=commands.verify_weights)

    evaluate = subparsers.add_parser("evaluate", help="ask a Hugging Face directory held-out questions through vLLM")
    evaluate.add_argument("model", type=Path, help="directory made by `megatron-mm export`")
    evaluate.add_argument("data", help="prepared data set with a held-out split: directory or URL")
    evaluate.add_argument("report", type=Path, help="JSON file to write")
    evaluate.add_argument(
        "--questions", type=_whole(1, MOST), default=200, help="questions of each kind (default %(default)s)"
    )
    evaluate.add_argument(
        "--max-tokens", type=_whole(1, MOST), default=48, help="longest response (default %(default)s)"
    )
    evaluate.add_argument("--dtype", choices=DTYPES, help="left out, bfloat16 on a GPU and float32 on a CPU")
    evaluate.set_defaults(run=commands.evaluate_model)

    doctor = subparsers.add_parser("doctor", help="what this machine can run, and how to get what is missing")
    doctor.set_defaults(run=commands.run_doctor)
    return parser


def _add_plan(subparsers: Any) -> None:
    plan = subparsers.add_parser("plan", help="memory, operations, traffic and time of a run, and layouts that fit")
    _add_config_arguments(plan)
    plan.add_argument("--gpus", type=int, required=True, help="how many")
    plan.add_argument("--gpu", required=True, help=f"which: {', '.join(GPUS)}")
    plan.add_argument(
        "--utilisation", type=_finite, default=0.4, help="share of the peak reached (default %(default)s)"
    )
    plan.add_argument("--memory-share", type=_finite, default=0.9, help="that tensors may take (default %(default)s)")
    plan.add_argument("--tiles-per-pack", type=_finite, help="left out, what is not trained is all images")
    learning = plan.add_argument_group("supervised training")
    learning.add_argument("--trained-share", type=_finite, help=f"of tokens (default {TRAINED_SHARE})")
    learning.add_argument("--samples-per-pack", type=_finite, help=f"of equal length (default {SAMPLES_PER_PACK})")
    drawing = plan.add_argument_group("reinforcement learning")
    drawing.add_argument("--prompt-tokens", type=_finite, help="mean, with image features (default: a small image)")
    drawing.add_argument("--response-tokens", type=_finite, help="mean (default: a quarter of the longest)")
    drawing.add_argument("--draw-rate", type=_finite, help="tokens/s of a GPU (default: by its memory's bandwidth)")
    drawing.add_argument("--host-memory", type=_finite, help="GiB of a node (default: a DGX machine's)")
    plan.set_defaults(run=commands.run_plan)


def _add_data(subparsers: Any) -> None:
    data = subparsers.add_parser("data", help="prepare and look at data sets").add_subparsers(
        required=True, metavar="DO"
    )
    prepare = data.add_parser("prepare", help="sources, named in a YAML file -> a prepared data set")
    prepare.add_argument("sources", type=Path, help="YAML file, see docs/data.md")
    prepare.add_argument("directory", type=Path, help="where to write; a call that was ended goes on")
    prepare.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that differ from the file's")
    prepare.add_argument(
        "--workers",
        type=_whole(0, 10_000),
        default=os.cpu_count(),
        help="processes; 0 works in this one (default %(default)s)",
    )
    prepare.set_defaults(run=commands.prepare_data)

    inspect = data.add_parser("inspect", help="samples as the model sees them, and a summary")
    _add_config_arguments(inspect)
    inspect.add_argument(
        "--samples", type=_whole(0, MOST), help="how many to show (default: one of each part, 3 to 12)"
    )
    inspect.add_argument("--part", help="only of parts that match this pattern, such as 'ocr/*'")
    inspect.add_argument("--split", choices=("train", "heldout"), default="train")
    inspect.add_argument("--html", type=Path, help="write a page with pictures and tiles as well")
    inspect.set_defaults(run=commands.inspect_data)

    digits = data.add_parser("digits", help="the miniature one: handwritten digits and questions about them")
    digits.add_argument("directory", type=Path, help="where to write it; must not exist yet")
    digits.add_argument("--train", type=_whole(1, MOST), default=12000, help="training pictures (default %(default)s)")
    digits.add_argument("--heldout", type=_whole(1, MOST), default=400, help="held-out pictures (default %(default)s)")
    digits.add_argument("--seed", type=_whole(0, MAX_SEED), default=0)
    digits.set_defaults(run=commands.make_digits)


def _add_import(subparsers: Any) -> None:
    parser = subparsers.add_parser("import", help="Hugging Face weights -> a checkpoint that every layout loads")
    parser.add_argument("run_dir", type=Path, help="where to write it; must not exist yet")
    overrides = "model.* differing from the weights' config; parallel.tensor, the parts that a tensor is stored in"
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help=overrides)
    parser.add_argument("--model", type=Path, help="directory of an R-4B, LlavaOnevision or LlavaNext")
    parser.add_argument("--vision", type=Path, help="directory of a SigLIP or SigLIP2; with --language")
    parser.add_argument("--language", type=Path, help="directory of a Qwen3 or Qwen3-MoE; with --vision")
    parser.add_argument("--recipe", help="recipe whose model the weights are for")
    parser.add_argument("--config", action="append", default=[], type=Path, help="YAML laid over the recipe")
    parser.add_argument("--dtype", choices=DTYPES, help="convert to it; left out, the weights' is kept")
    parser.add_argument(
        "--seed", type=_whole(0, MAX_SEED), default=0, help="of the projector drawn with --vision and --language"
    )
    parser.add_argument("--ignore-field", action="append", default=[], help="field of config.json that does not matter")
    parser.add_argument("--nproc", type=_whole(1, MOST_RANKS), help="share the work out over this many processes")
    parser.set_defaults(run=commands.import_weights)


def _add_config_arguments(parser: argparse.ArgumentParser, recipe_count: str | None = None) -> None:
    parser.add_argument("recipe", nargs=recipe_count, help="recipe name such as mini/stage1, or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="config overrides")
    parser.add_argument("--config", action="append", default=[], type=Path, help="YAML merged over the recipe")


def _finite(text: str) -> float:
    """A number whose bounds are looked at by whoever takes it."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return value


def _whole(least: int, most: int) -> Callable[[str], int]:
    """A reader of whole numbers from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not {least} or more and at most {most:,}")
        return value

    return read


if __name__ == "__main__":
    exit_code = main()
    sys.stdout.flush()
    sys.exit(exit_code)
