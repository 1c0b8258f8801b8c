"""WebDataset: members that become samples, energon's layout, our own shards, and archives that are cut off."""

import json
import re
import tarfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mm.config.errors import InputError
from megatron_mm.data.records import StoredContent, StoredTurn
from megatron_mm.data.shards import EncodedPicture, ShardWriter
from megatron_mm.data.sources.base import FileRange, RawSample, Reject
from megatron_mm.data.sources.energon import expand_braces
from megatron_mm.data.sources.texts import stray_mark
from tests.unit.data.sources import read_all, reasons, samples

CHAT = {"conversations": [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "a"}]}
BLOCK = tarfile.BLOCKSIZE


def _write(path: Path, *members: tuple[str, Any], kind: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, kind) as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name, content in members:
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))
    return path


def _pictures(sample: RawSample) -> list[bytes]:
    ranges = [picture for picture in sample.pictures if isinstance(picture, FileRange)]
    assert len(ranges) == len(sample.pictures)
    return [part.path.read_bytes()[part.offset : part.offset + part.num_bytes] for part in ranges]


def test_members_become_samples(tmp_path: Path) -> None:
    path = _write(
        tmp_path / "a/0.tar",
        ("./x.d/1.jpg", b"one"),
        ("x.d/2.JSON", {"text": "two", "image": "elsewhere.png"}),
        ("x.d/2.png", b"two"),
        ("x.d/1.txt", b" caption\n"),
        ("3.json", {**CHAT, "image": "/elsewhere.png"}),
        ("3.10.jpg", b"ten"),
        ("3.2.webp", b"second"),
        ("4.jpg", b"four"),
        ("4.json", {"caption": "in json", "text": None}),
        ("4.detail.json", b"no data"),
        ("README", b"no data"),
        (".hidden.jpg", b"no data"),
        ("l" * 150 + ".txt", b"long"),
        ("l" * 150 + ".gif", b"long"),
    )
    found = samples(read_all("webdataset", tmp_path, question="What?"))
    keys = ("x.d/1", "x.d/2", "3", "4", "l" * 150)
    assert [sample.origin for sample in found] == [f"{path} sample {key}" for key in keys]
    assert [_pictures(sample) for sample in found] == [[b"one"], [b"two"], [b"second", b"ten"], [b"four"], [b"long"]]
    turns = [sample.content.turns[0] for sample in found]
    assert turns[2] == StoredTurn([0, " or ", 1, "?"], "a")
    captions = ["caption", "two", "in json", "long"]
    assert turns[:2] + turns[3:] == [StoredTurn([0, "\nWhat?"], caption) for caption in captions]


def test_our_own_shards(tmp_path: Path) -> None:
    contents = [
        StoredContent((StoredTurn(["a", *range(11)], "b", "c"),), "S"),
        StoredContent(document=["a", 0]),
        StoredContent(document=["text alone"]),
    ]
    pictures = [[b"%d" % number for number in range(count)] for count in (11, 1, 0)]
    with ShardWriter(tmp_path / "own.tar") as writer:
        for content, held in zip(contents, pictures, strict=True):
            writer.add(content, [EncodedPicture(picture, "jpg", 1, 1) for picture in held], "origin")
    found = samples(read_all("webdataset", tmp_path / "own.tar"))
    assert [sample.content for sample in found] == contents
    assert [_pictures(sample) for sample in found] == pictures


BAD: list[tuple[tuple[tuple[str, Any], ...], str]] = [
    ((("jpg", b""),), "missing member: txt or json"),
    ((("txt", b"x"),), "missing member: a picture to the caption"),
    ((("jpg", b""), ("txt", b" ")), "empty caption"),
    ((("jpg", b""), ("txt", b"\xff")), "text is not UTF-8 at byte 0"),
    (
        (("jpg", b""), ("json", {"title": "x"})),
        "json has none of conversations, messages, caption, text, turns, document",
    ),
    ((("jpg", b""), ("json", [1])), "the record is list, not an object"),
    ((("jpg", b""), ("json", {"caption": 1})), "caption is int, not text"),
    ((("jpg", b""), ("json", CHAT)), "2 <image> marks for 1 pictures"),
    ((("jpg", b""), ("JPG", b"")), "two members BASE.JPG"),
    ((("json", {"document": ["x", 0]}),), "missing member: json places pictures [0], and 0 are there"),
    (
        (("json", {"document": ["x", True]}),),
        "json is no stored sample: texts or numbers of pictures are of other types",
    ),
    (
        (("json", {"turns": [], "system": None}),),
        "json is no stored sample: texts or numbers of pictures are of other types",
    ),
    ((("json", {"turns": 3}),), "json is no stored sample: TypeError(\"'int' object is not iterable\")"),
]


def test_every_reason(tmp_path: Path) -> None:
    members = [(f"{number}.{name}", content) for number, (held, _) in enumerate(BAD) for name, content in held]
    found = reasons(read_all("webdataset", _write(tmp_path / "a.tar", *members)))
    assert found == [reason.replace("BASE", str(number)) for number, (_, reason) in enumerate(BAD)]


def test_links_are_not_followed(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tar", ("1.txt", b"x"))
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("1.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    assert reasons(read_all("webdataset", path)) == ["member 1.jpg is a link or another special file"]


def _archive(path: Path, num_samples: int = 4) -> bytes:
    """Samples of two members of one block each: four blocks a sample."""
    members = [(f"{n}.{name}", b"x" * 400) for n in range(num_samples) for name in ("jpg", "txt")]
    return _write(path, *members).read_bytes()


@pytest.mark.parametrize(
    ("num_bytes", "num_samples", "rejects"),
    [
        # Inside of a member, at the start of one's bytes, and inside of its padding.
        (10 * BLOCK - 300, 2, {"sample 2": f"archive ends before byte {9 * BLOCK + 400}"}),
        (11 * BLOCK, 2, {"sample 2": f"archive ends before byte {11 * BLOCK + 400}"}),
        (12 * BLOCK - 50, 3, {"": "archive has no end: it was cut off"}),
        # Between samples, between members of one, inside of a header.
        (12 * BLOCK, 3, {"": "archive has no end: it was cut off"}),
        (10 * BLOCK, 2, {"sample 2": "missing member: txt or json", "": "archive has no end: it was cut off"}),
        (12 * BLOCK + 100, 3, {"": "archive has no end: it was cut off"}),
        (16 * BLOCK, 4, {"": "archive has no end: it was cut off"}),
        (17 * BLOCK, 4, {}),
    ],
)
def test_archives_cut_off(tmp_path: Path, num_bytes: int, num_samples: int, rejects: dict[str, str]) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(_archive(path)[:num_bytes])
    found = read_all("webdataset", path)
    assert len([record for record in found if isinstance(record, RawSample)]) == num_samples
    expected = {f"{path} {place}".strip(): reason for place, reason in rejects.items()}
    assert {record.origin: record.reason for record in found if isinstance(record, Reject)} == expected


def test_a_damaged_header_ends_the_archive_aloud(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    content = bytearray(_archive(path))
    content[8 * BLOCK : 9 * BLOCK] = b"?" * BLOCK
    path.write_bytes(content)
    *rest, last = read_all("webdataset", path)
    assert len(samples(rest)) == 2
    assert reasons([last]) == [f"archive is damaged or cut off at byte {8 * BLOCK}: what follows is not read"]


def test_an_archive_of_nothing_but_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(_write(path, ("README", b"x" * 2000)).read_bytes()[: 2 * BLOCK])
    (reject,) = read_all("webdataset", path)
    assert reject == Reject(str(path), "archive has no end: it was cut off")


def test_what_is_no_plain_tar_file(tmp_path: Path) -> None:
    (tmp_path / "text.tar").write_bytes(b"no archive" * 100)
    (tmp_path / "empty.tar").touch()
    _write(tmp_path / "packed.tar", ("1.txt", b"x"), kind="w:gz")
    for name in ("text", "empty", "packed"):
        with pytest.raises(InputError, match=rf"{name}\.tar is no tar file, or a compressed one .*unpack it"):
            read_all("webdataset", tmp_path / f"{name}.tar")
    packed = _write(tmp_path / "x/a.tar.gz", ("1.txt", b"x"), kind="w:gz")
    for path in (packed, packed.parent):
        with pytest.raises(InputError, match=r"a\.tar\.gz is compressed, and is not read in parts; unpack it"):
            read_all("webdataset", path)


def _energon(root: Path, dataset: Any, split: Any = None, members: Any = None) -> Path:
    members = members or [("jpg", b"p"), ("json", [{"value": "<image>Q"}, {"value": ["<answer>A</answer>", "B"]}])]
    for name in ("s/0.tar", "s/1.tar", "s/2.tar"):
        _write(root / name, *((f"{key}.{end}", content) for key in "ab" for end, content in members))
    meta = root / ".nv-meta"
    meta.mkdir(exist_ok=True)
    parts = {"train": ["s/{0..1}.tar"], "val": [], "test": ["s/2.tar"]}
    (meta / ".info.json").write_text(json.dumps({"shard_counts": {f"s/{number}.tar": 2 for number in range(4)}}))
    (meta / "split.yaml").write_text(yaml.safe_dump(split or {"split_parts": parts, "exclude": ["s/1.tar/b"]}))
    (meta / "dataset.yaml").write_text(yaml.safe_dump(dataset))
    return root


VQA = {
    "__module__": "megatron.energon",
    "__class__": "VQAWebdataset",
    "field_map": {"image": "png,jpg", "context": "json[9][value],json[0][value]", "answers": "json[1][value]"},
}
CAPTIONS = {
    "sample_type": {"__module__": "megatron.energon", "__class__": "CaptioningSample"},
    "field_map": {"image": "img.png;jpg", "caption": "txt"},
}


def test_energon_splits_and_fields(tmp_path: Path) -> None:
    root = _energon(tmp_path, VQA)
    train = samples(read_all("webdataset", root))
    places = ["0.tar sample a", "0.tar sample b", "1.tar sample a"]
    assert [sample.origin for sample in train] == [f"{root}/s/{place}" for place in places]
    assert [sample.content.turns for sample in train] == [(StoredTurn([0, "Q"], "A"),)] * 3
    assert [_pictures(sample) for sample in train] == [[b"p"]] * 3
    assert len(samples(read_all("webdataset", root, split="heldout"))) == 2


def test_energon_captions(tmp_path: Path) -> None:
    root = _energon(tmp_path, CAPTIONS, members=[("jpg", b"no"), ("img.png", b"yes"), ("txt", b"C")])
    found = samples(read_all("webdataset", root, question="What?"))
    assert [sample.content.turns for sample in found] == [(StoredTurn([0, "\nWhat?"], "C"),)] * 3
    assert _pictures(found[0]) == [b"yes"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"answers": "txt"}, "missing member: txt for field answers"),
        ({"answers": "json[7][value]"}, "missing member: json[7][value] for field answers"),
        ({"answers": "json"}, "field answers (json) is dict, not text"),
        ({"context": "jpg"}, "field context (jpg) is a whole file, not text"),
        ({"image": "json"}, "field image (json) is list, not a picture"),
    ],
)
def test_energon_reasons(tmp_path: Path, fields: dict[str, str], reason: str) -> None:
    root = _energon(tmp_path, {**VQA, "field_map": {**VQA["field_map"], **fields}})
    assert reasons(read_all("webdataset", root)) == [reason] * 3


@pytest.mark.parametrize(
    ("dataset", "split", "message"),
    [
        (
            {**VQA, "__class__": "CrudeWebdataset"},
            None,
            "is of class CrudeWebdataset; supported are CaptioningWebdataset",
        ),
        ({**VQA, "field_map": None}, None, "has no field_map; a sample_loader is code"),
        ({**VQA, "field_map": {"image": "jpg"}}, None, "has None for context; give a member"),
        ({**VQA, "field_map": {**VQA["field_map"], "image": "a[b"}}, None, r"has 'a\[b'; give a member"),
        ([], None, "dataset.yaml holds list, not names with values"),
        (VQA, {"split_parts": {"val": ["s/0.tar"]}}, "lists no shards for train, .* it lists val"),
        (VQA, {"split_parts": {"train": "s/0.tar"}}, "has no split_parts with lists of shards"),
        (VQA, {"split_parts": {"train": ["s/3.tar"]}}, r"shard .*s/3\.tar, listed in .* does not exist"),
        (VQA, {"split_parts": {"train": ["s/9.tar"]}}, r"lists s/9\.tar, \.info\.json does not"),
        (VQA, {"split_parts": {"train": ["s/0.tar"]}, "exclude": [1]}, "has an exclude that is no list of names"),
    ],
)
def test_energon_layouts_that_are_refused(tmp_path: Path, dataset: Any, split: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_all("webdataset", _energon(tmp_path, dataset, split))


@pytest.mark.parametrize("name", ["split.yaml", ".info.json", "dataset.yaml"])
def test_energon_files_that_are_missing_or_broken(tmp_path: Path, name: str) -> None:
    file = _energon(tmp_path, VQA) / ".nv-meta" / name
    file.write_text("{")
    with pytest.raises(InputError, match=f"{name} cannot be read"):
        read_all("webdataset", tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="run `energon prepare`"):
        read_all("webdataset", tmp_path)


def test_braces() -> None:
    assert list(expand_braces("s_{08..10}.tar")) == ["s_08.tar", "s_09.tar", "s_10.tar"]
    assert list(expand_braces("{a,b}{1..0}{x}")) == ["a1{x}", "a0{x}", "b1{x}", "b0{x}"]


# Names of members, and how many samples and rejects a person would count.
NAMES = {
    "a version": (["v1.0_000.png", "v1.0_000.txt", "v1.0_001.png", "v1.0_001.txt"], 0, 2),
    "a version among plain names": (["1.png", "1.txt", "v1.0_1.png", "v1.0_1.txt", "v1.0_2.png", "v1.0_2.txt"], 1, 2),
    "one beside its own": (["cat.png", "cat.txt", "cat.big.png", "cat.big.txt"], 0, 2),
    "three": ([f"day.{n}.{end}" for n in (1, 2, 3) for end in ("jpg", "json")], 0, 3),
    "several dots": ([f"a.b.{n}.{end}" for n in (1, 2) for end in ("jpg", "txt")], 0, 2),
    "captions alone": (["a.1.txt", "a.2.txt"], 0, 2),
    "captions and one picture": (["a.1.txt", "a.1.png", "a.2.txt"], 0, 2),
    "a date alone": (["2024.01.05.jpg", "2024.01.05.txt"], 0, 1),
    "upper case": (["A.1.PNG", "A.1.TXT", "A.2.PNG", "A.2.TXT"], 0, 2),
    "in a directory with a dot": (["x.y/1.png", "x.y/1.txt", "x.y/2.png", "x.y/2.txt"], 2, 0),
    "several pictures of one": (["1.img1.png", "1.img2.png", "1.img10.png", "1.txt"], 1, 0),
    "a mask beside the picture": (["1.png", "1.mask.png", "1.txt"], 1, 0),
    "side data": (["1.png", "1.txt", "1.detail.json", "1.meta.txt"], 1, 0),
}


@pytest.mark.parametrize("case", NAMES)
def test_samples_merged_by_dots_are_counted_one_by_one(tmp_path: Path, case: str) -> None:
    names, num_samples, num_rejects = NAMES[case]
    members = [(name, {"caption": "x"} if name.lower().endswith("json") else b"x") for name in names]
    found = read_all("webdataset", _write(tmp_path / "a.tar", *members))
    rejects = [record for record in found if isinstance(record, Reject)]
    assert (len(found) - len(rejects), len(rejects)) == (num_samples, num_rejects), found
    assert len({record.origin for record in found}) == len(found)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("padding", [0, BLOCK, 20 * BLOCK, 2**20 + BLOCK])
@pytest.mark.parametrize("sizes", [(1, 1), (2, 0, 3), (0, 2)])
def test_archives_one_behind_the_other_are_all_read(
    tmp_path: Path, form: int, padding: int, sizes: tuple[int, ...]
) -> None:
    path, joined = tmp_path / "a.tar", b""
    for archive, size in enumerate(sizes):
        with tarfile.open(path, "w", format=form) as tar:
            for number in range(size):
                for suffix in ("png", "txt"):
                    # A name too long for a header of its own in two of the formats.
                    member = tarfile.TarInfo(f"{archive}/{'n' * 90}{number}.{suffix}")
                    member.size = 5
                    tar.addfile(member, BytesIO(f"{archive}x{number}xx".encode()))
        joined += path.read_bytes() + bytes(padding)
    path.write_bytes(joined)
    found = samples(read_all("webdataset", path))
    assert [sample.content.turns[0].answer for sample in found] == [
        f"{archive}x{number}xx" for archive, size in enumerate(sizes) for number in range(size)
    ]
    assert [_pictures(sample) for sample in found] == [[turn.content.turns[0].answer.encode()] for turn in found]


@pytest.mark.parametrize(
    "behind", [b"no archive" * 100, b"x", bytes(700) + b"x" * 2000, bytes(2**20 + 5) + b"x", bytes(BLOCK) + b"x" * 99]
)
def test_what_follows_an_archive_and_is_none_is_a_reject(tmp_path: Path, behind: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(_archive(path) + behind)
    *rest, last = read_all("webdataset", path)
    assert len(samples(rest)) == 4
    assert re.search("is not read|was cut off", reasons([last])[0])


@pytest.mark.parametrize(
    "member",
    ["1.svg", "1.jp2", "1.mp4", "1.wav", "1.exr", "1.dcm", "1.psd", "1.jxl", "1.MOV", "1.a.webm", "1.eps"],
)
def test_members_that_cannot_be_learned_are_rejects(tmp_path: Path, member: str) -> None:
    held = [("1.json", {"conversations": _plain()}), (member, b"x")]
    assert "cannot be learned" in reasons(read_all("webdataset", _write(tmp_path / "a.tar", *held)))[0]


def _plain() -> list[dict[str, str]]:
    return [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "a"}]


@pytest.mark.parametrize(
    "names",
    [
        {"image": "1.png"},
        {"images": ["1.png", "2.png"]},
        {"image_path": "1.png"},
        {"img": "1.png"},
        {"image": ["1.png"]},
        {"picture": {"path": "1.png"}},
        {"video": "1.mp4"},
        {"where": "1.png"},
        {"conversations": [{"from": "human", "value": "<image>q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "1.png"}]}], "conversations": None},
    ],
)
def test_conversations_whose_pictures_are_missing_are_no_text(tmp_path: Path, names: dict[str, Any]) -> None:
    path = _write(tmp_path / "a.tar", ("1.json", {"conversations": _plain(), **names}))
    (record,) = read_all("webdataset", path)
    # The mark alone is seen by what writes the data, which knows whether marks are text.
    assert isinstance(record, Reject) or stray_mark(record.content) is not None
