"""From files as people have them to a packed run, by the commands of docs/data.md."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images

from megatron_mm.chat.tokenizer import ChatTokenizer
from tests.datasets import encoded


def _sources(folder: Path, tokenizer: ChatTokenizer) -> Path:
    """LLaVA JSON, parquet as geometry3k's, and texts, of real photographs."""
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]  # pyright: ignore
    (folder / "images").mkdir()
    records = []
    for number in range(16):
        photo = photos[number % 2].resize((30 + 7 * number, 40))
        photo.save(folder / "images" / f"{number}.jpg")
        asked = {"from": "human", "value": "<image>\nWhat is it?"}
        records.append({"image": f"{number}.jpg", "conversations": [asked, {"from": "gpt", "value": f"{number}."}]})
    (folder / "llava.json").write_text(json.dumps(records), encoding="utf-8")
    rows = {
        "images": [[{"bytes": encoded(photos[1].resize((50, 20 + row)), "JPEG"), "path": None}] for row in range(8)],
        "problem": ["<image>How long?"] * 8,
        "answer": [f"<think>Measure {row}.</think><answer> {row} </answer>" for row in range(8)],
    }
    pq.write_table(pa.table(rows), folder / "geometry.parquet")
    (folder / "texts.jsonl").write_text("".join(f'{{"text": "Text {n}"}}\n' for n in range(12)), encoding="utf-8")
    tree = {
        "tokenizer": str(tokenizer.directory),
        "sources": [
            {"name": "llava", "format": "chat", "path": str(folder / "llava.json"), "pictures": str(folder / "images")},
            {"name": "math/geometry", "format": "parquet", "path": str(folder / "geometry.parquet")},
            {"name": "texts", "format": "text", "path": str(folder / "texts.jsonl")},
        ],
    }
    file = folder / "sources.yaml"
    file.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return file


def _megatron_mm(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "megatron_mm.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_sources_become_a_packed_run(tmp_path: Path, tokenizer: ChatTokenizer) -> None:
    data, page = tmp_path / "data", tmp_path / "page.html"
    said = _megatron_mm("data", "prepare", str(_sources(tmp_path, tokenizer)), str(data), "--workers", "2")
    assert "math/geometry: 8 records, 8 written (8 thinking; 0 held out), 0 rejected" in said
    run = ["mini/stage3", f"data.path={data}", "data.blend={}", "data.packed=true", "data.max_sequence_tokens=256"]
    run += [f"run_dir={tmp_path / 'run'}", "init_from=null", "train.steps=4", "train.global_batch=4", "precision=fp32"]
    run += ["train.micro_batch=1", "train.log_every=1", "optim.warmup_steps=0", "checkpoint.save_every=100"]
    looked = _megatron_mm("data", "inspect", *run, "--part", "math/*", "--samples", "1", "--html", str(page))
    assert "⟦\nMeasure 0.\n</think>\n\n0<|im_end|>⟧" in looked
    assert "[picture 1: 50 x 20, " in looked
    for part in ("llava/non_thinking", "math/geometry/thinking", "texts/document"):
        assert part in looked
        assert part in page.read_text(encoding="utf-8")
    _megatron_mm("train", *run, "--nproc", "2")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["trained_tokens"] > 20 and line["broken_samples"] == 0 for line in lines)
