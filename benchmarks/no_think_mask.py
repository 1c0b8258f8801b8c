"""What masking the empty thought is for: does a language model that thinks still think after joint training?

R-4B masks `<think>\\n\\n</think>` before plain answers in joint pretraining, which "preserves Qwen3's specialized
reasoning capabilities" (arXiv 2508.21113v2, appendix B.2). Here, in miniature and for every seed:

1. mini/language learns to think about chains of sums in text; mini/stage1 and mini/stage2 align the pictures with it.
2. Joint training follows on pictures with plain answers only: no texts, no thoughts. In one arm the prefix is masked
   (data.rendering=pretrain), in the other it is trained (data.rendering=anneal, which trains all of it but `<think>`,
   and that stands before every response of both arms).
3. vLLM answers chains in text that are not in the training data, before joint training and after it: with the thought
   forced (`<think>\\n`), and in auto mode (`<think>`), where the model decides. And, with plain answers, easy questions
   about held-out pictures: joint training has to be of some use.

Joint training is done at two learning rates; the low one was chosen after the high one had failed. The low one stands
for the paper's, 4e-5 for a released model: it is 1/30 of the rate that our language model was made with. The high one
is that of mini/stage3, whose own data has thoughts in it; a mask cannot help where the rate itself wipes out what no
sample asks for.

What is done is kept in runs/no_think_mask; the same command goes on from there.
"""

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.figure import Figure
from benchmarks.run import ROOT
from megatron_mm.chat import modes
from megatron_mm.chat.images import TileRules
from megatron_mm.chat.modes import Mode
from megatron_mm.chat.render import Question, render_prompt
from megatron_mm.chat.tokenizer import ChatTokenizer
from megatron_mm.data.digits import caption_of, hard_turns
from megatron_mm.data.shards import PreparedData
from megatron_mm.evaluate.heldout import heldout_questions
from megatron_mm.generation.engine import Engine
from megatron_mm.grading.answers import exact_match
from tests.ranks import run_alone

RUNS = ROOT / "runs" / "no_think_mask"
DATA = RUNS / "data"
SEEDS = (0, 1, 2)
NUM_CHAINS = 400
MAX_RESPONSE_TOKENS = 64
TEXT_CHAINS = "digits-text/hard/thinking"
NUM_PICTURES = 200
RENDERINGS = {"masked": "pretrain", "unmasked": "anneal"}
RATES = {"low rate": 1e-4, "high rate": 1e-3}
# Plain answers about pictures.
VISUAL = "{digits/caption/non_thinking: 1, digits/easy/non_thinking: 1}"
JOINT = "{digits/caption/non_thinking: 1, digits/easy/non_thinking: 1, digits/hard/non_thinking: 1}"
STAGE3 = ("train.steps=200", f"data.blend={JOINT}")


@dataclass(frozen=True, slots=True)
class Answers:
    """How a model answered chains in text.

    Attributes:
        forced: share right where the thought was forced.
        auto: share right where the model decided.
        think_rate: share that began a thought where the model decided, with `\\n` and not `\\n\\n`.
        pictures: share of plain answers right, to easy questions about pictures.
    """

    forced: float
    auto: float
    think_rate: float
    pictures: float


def measure() -> list[Figure]:
    """Train and ask whatever is not there yet: about half an hour on two free cores."""
    if not DATA.exists():
        _command("data", "digits", str(DATA))
    figures, found = [], []
    for seed in SEEDS:
        answers = _answers_of(seed)
        found.append(answers)
        figures += [figure for arm, of_arm in answers.items() for figure in _figures(f"seed {seed}, {arm}", of_arm)]
    for arm in found[0]:
        figures += _figures(f"mean, {arm}", _mean([answers[arm] for answers in found]))
    return [*figures, *_losses(found)]


def _figures(name: str, answers: Answers) -> list[Figure]:
    return [
        Figure(f"{name}: right, forced thought", answers.forced, "share"),
        Figure(f"{name}: right, auto mode", answers.auto, "share"),
        Figure(f"{name}: thinks in auto mode", answers.think_rate, "share"),
        Figure(f"{name}: right about pictures", answers.pictures, "share"),
    ]


def _losses(found: list[dict[str, Answers]]) -> list[Figure]:
    """What joint training took away, on average over the seeds, against what the paper says."""
    mean = {arm: _mean([answers[arm] for answers in found]) for arm in found[0]}
    before, figures = mean["before"], []
    for rate in RATES:
        # At the low rate the mask is to keep all but two points in both modes, and training the prefix to cost more.
        bar = 0.02 if rate == "low rate" else None
        for arm in RENDERINGS:
            after = mean[f"{rate}, {arm}"]
            forced, auto = round(before.forced - after.forced, 4), round(before.auto - after.auto, 4)
            is_masked = arm == "masked"
            figures += [
                Figure(f"{rate}, {arm}: lost, forced thought", forced, "share", bar if is_masked else None),
                Figure(f"{rate}, {arm}: lost, auto mode", auto, "share", bar, "at most" if is_masked else "at least"),
            ]
    return figures


def _mean(answers: list[Answers]) -> Answers:
    fields = [asdict(one) for one in answers]
    return Answers(**{name: round(statistics.mean(one[name] for one in fields), 4) for name in fields[0]})


def _answers_of(seed: int) -> dict[str, Answers]:
    """Answers before joint training and after each kind of it."""
    runs = RUNS / f"seed{seed}"
    _train(runs, "language", None, seed, "mini/language")
    _train(runs, "stage1", "language", seed, "mini/stage1", f"data.blend={VISUAL}")
    _train(runs, "stage2", "stage1", seed, "mini/stage2", f"data.blend={VISUAL}")
    answers = {"before": _ask(runs, "stage2")}
    for name, rate in RATES.items():
        for arm, rendering in RENDERINGS.items():
            run = f"{name} {arm}".replace(" ", "-")
            optim = (f"optim.lr={rate}", f"optim.min_lr={rate / 20}")
            _train(runs, run, "stage2", seed, "mini/stage3", f"data.rendering={rendering}", *optim, *STAGE3)
            answers[f"{name}, {arm}"] = _ask(runs, run)
    return answers


def _train(runs: Path, name: str, start: str | None, seed: int, recipe: str, *overrides: str) -> None:
    """Train, unless the run was exported already."""
    run_dir, model = runs / name, runs / f"{name}-model"
    if model.exists():
        return
    given = [f"run_dir={run_dir}", f"data.path={DATA}", f"seed={seed}", *overrides]
    if start is not None:
        given.append(f"init_from={runs / start}")
    _command("train", recipe, *given, "--nproc", "2")
    _command("export", str(run_dir), str(model))


def _ask(runs: Path, name: str) -> Answers:
    """Ask a model, unless its answers are there."""
    file = runs / f"{name}.json"
    if not file.exists():
        # In a process of its own: a vLLM engine does not give back what it took.
        answers = run_alone(ask, runs / f"{name}-model", DATA, NUM_CHAINS)
        file.write_text(json.dumps(asdict(answers), indent=2) + "\n", encoding="utf-8")
    return Answers(**json.loads(file.read_text(encoding="utf-8")))


def ask(model: Path, data: Path, num_chains: int) -> Answers:
    """Let vLLM answer greedily: chains that are not in `data`, and questions about its held-out pictures."""
    chains = new_chains(data, num_chains)
    asked = heldout_questions(PreparedData(str(data)), NUM_PICTURES)["digits/easy"]
    tokenizer, rules = ChatTokenizer(model), TileRules.of_directory(model)
    engine = Engine(model, "bfloat16")
    right, began = {}, {}
    for mode in (Mode.THINKING, Mode.AUTO):
        prompts = [render_prompt(Question.about(text), mode, tokenizer, rules) for text, _ in chains]
        completions = engine.generate(prompts, [()] * len(prompts), max_tokens=MAX_RESPONSE_TOKENS)
        responses = [modes.TRIGGERS[mode] + completion.text for completion in completions]
        answers = [modes.split_response(response)[1] for response in responses]
        pairs = zip(answers, chains, strict=True)
        right[mode] = sum(exact_match(answer, reference) for answer, (_, reference) in pairs) / len(chains)
        began[mode] = sum(map(modes.begins_thought, responses)) / len(chains)
    prompts = [render_prompt(one.question, Mode.NON_THINKING, tokenizer, rules) for one in asked]
    plain = engine.generate(prompts, [one.question.pictures for one in asked], max_tokens=MAX_RESPONSE_TOKENS)
    seen = [exact_match(completion.text, one.reference) for completion, one in zip(plain, asked, strict=True)]
    return Answers(right[Mode.THINKING], right[Mode.AUTO], began[Mode.AUTO], sum(seen) / len(seen))


def new_chains(data: Path, num_chains: int) -> list[tuple[str, str]]:
    """Questions in the form of digits-text/hard that no text of the data set asks, with their answers."""
    prepared = PreparedData(str(data))
    (part,) = (part for part in prepared.index.ranges("train") if part.part == TEXT_CHAINS)
    stored = (prepared.read(row).content for row in range(part.first, part.first + part.count))
    known = {"".join(str(piece) for piece in content.turns[0].question) for content in stored}
    random = np.random.default_rng([1797, 2])
    chains = {}
    while len(chains) < num_chains:
        digits = random.integers(10, size=4).tolist()
        turn = hard_turns(digits, random.permutation(4).tolist())[0]
        text = f"{caption_of(digits)}\n{turn.question}"
        if text not in known:
            chains[text] = turn.answer
    return list(chains.items())


def _command(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "megatron_mm.cli", *arguments], cwd=ROOT, check=True)
