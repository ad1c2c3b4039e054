"""Text in, token packs out: nothing leaks between the parts, and user mistakes are one line."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from blocks.errors import ConfigError, DataError
from nas.data import MINIMUM_SEQUENCES, PARTS, DataConfig, load_documents, load_pack, prepare_data, split_documents

EOS = 257
SMALL = DataConfig(sequence_length=16, fit_tokens=512, calibration_tokens=256, heldout_tokens=256)
TOKENIZER = byte_tokenizer()


def corpus(directory: Path, documents: int = 60, characters: int = 50) -> str:
    """One .txt per document, each made of its own letter sequence."""
    directory.mkdir(exist_ok=True)
    for i in range(documents):
        (directory / f"{i:03d}.txt").write_text(f"document {i:03d} " * (characters // 13 + 1))
    return str(directory)


def documents_in(pack: np.ndarray) -> set[bytes]:
    """Which of `corpus`'s documents occur in a pack, wholly or in part."""
    text = TOKENIZER.decode(pack.reshape(-1))
    return {number.encode() for number in text.replace("<eos>", " ").split() if number.isdigit() and len(number) == 3}


# ---- loading


def test_python_docs_need_nothing_and_do_not_quote_each_other() -> None:
    documents = load_documents("python-docs")
    assert len(documents) > 30 and documents == load_documents("python-docs")
    paragraphs = [{p.strip() for p in text.split("\n\n") if len(p.strip()) >= 150} for text in documents]
    assert sum(map(len, paragraphs)) == len(set().union(*paragraphs))


def test_reads_files_and_directories_in_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "c.jsonl").write_text('{"text": "row 1"}\n\n{"text": "row 2"}\n{"text": null}\n')
    (tmp_path / "d.md").write_text("markdown")
    (tmp_path / "e.rst").write_text(" \n")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "image.png").write_bytes(b"\xff")
    Dataset.from_dict({"text": ["parquet"], "n": [1]}).to_parquet(tmp_path / "f.parquet")
    assert load_documents(str(tmp_path)) == ["row 1", "row 2", "text", "markdown", "parquet"]
    assert load_documents(str(tmp_path / "f.parquet")) == ["parquet"]


def test_reads_what_datasets_saved(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"body": ["one", "two"]})
    rows.save_to_disk(tmp_path / "rows")
    DatasetDict(train=rows).save_to_disk(tmp_path / "splits")
    DatasetDict(test=rows).save_to_disk(tmp_path / "test_only")
    assert load_documents(str(tmp_path / "rows"), "body") == ["one", "two"]
    assert load_documents(str(tmp_path / "splits"), "body") == ["one", "two"]
    with pytest.raises(DataError, match=r"no train split.*test"):
        load_documents(str(tmp_path / "test_only"), "body")


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("org/text", ("org/text", None, "train")),
        ("org/text:test", ("org/text", None, "test")),
        ("org/text:en:train[:1%]", ("org/text", "en", "train[:1%]")),
        ("org/text:en:", ("org/text", "en", "train")),
    ],
)
def test_dataset_ids(source: str, asked: tuple[object, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, config: str | None, split: str, streaming: bool) -> Dataset:
        assert (name, config, split) == asked and not streaming
        return Dataset.from_dict({"text": ["row"]})

    monkeypatch.setattr("datasets.load_dataset", load)
    assert load_documents(source) == ["row"]


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_one_long_text_is_cut_between_paragraphs(tmp_path: Path, separator: str) -> None:
    paragraphs = [f"paragraph {i} ".ljust(900, ".") for i in range(40)]
    (tmp_path / "long.txt").write_text(separator.join(paragraphs))
    documents = load_documents(str(tmp_path / "long.txt"))
    assert [p for text in documents for p in text.split(separator)] == paragraphs
    assert all(4000 <= len(text) < 5500 for text in documents)
    assert load_documents(str(tmp_path)) == documents
    (tmp_path / "other.txt").write_text("short")
    assert len(load_documents(str(tmp_path))) == 2


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.jsonl", b'{"body": "x", "id": 1}', "no column 'text'; set text_column to one of body, id"),
        ("rows.jsonl", b'{"text": 3}', "holds int, not text"),
        ("rows.jsonl", b'{"text": "a"}\n{', "line 2: not JSON"),
        ("rows.jsonl", b"[1]", "not a JSON object"),
        ("rows.parquet", b"PAR1", "parquet"),
        ("latin.txt", b"\xe9t\xe9", "not UTF-8"),
        ("empty.txt", b" \n", "no text"),
        ("table.csv", b"a,b", "cannot read"),
    ],
)
def test_unreadable_files_are_one_line(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as refused:
        load_documents(str(tmp_path / name))
    assert "\n" not in str(refused.value)


def test_missing_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise FileNotFoundError("Dataset 'no-such' doesn't exist")

    monkeypatch.setattr("datasets.load_dataset", missing)
    for source in ("nowhere.txt", "./nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(DataError, match="no such file or directory"):
            load_documents(source)
    with pytest.raises(DataError, match="doesn't exist"):
        load_documents("no-such")
    with pytest.raises(DataError, match=r"holds no \.txt"):
        load_documents(str(tmp_path))
    Dataset.from_dict({"body": ["x"]}).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(DataError, match="one of body"):
        load_documents(str(tmp_path))


# ---- splitting


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(1, 2000), min_size=3, max_size=80))
def test_each_document_goes_to_exactly_one_part(lengths: list[int]) -> None:
    parts = split_documents(lengths, SMALL)
    assert sorted(index for part in parts.values() for index in part) == list(range(len(lengths)))
    assert all(parts[name] for name in ("fit", "calibration", "heldout"))


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 16), min_size=60, max_size=200))
def test_parts_reach_their_targets_when_documents_are_short(lengths: list[int]) -> None:
    parts = split_documents(lengths, SMALL)
    for name, target in SMALL.targets(sum(lengths)).items():
        tokens = sum(lengths[index] for index in parts[name])
        assert tokens <= target * 9 / 8 + 16
        assert tokens >= target or not parts["rest"]


@pytest.mark.parametrize("split", ["document", "sequence"])
def test_packs_are_disjoint_and_described(tmp_path: Path, split: str) -> None:
    config = replace(SMALL, source=corpus(tmp_path / "text", 80), split=split)
    calls: list[tuple[int, int]] = []
    data = prepare_data(config, TOKENIZER, 272, tmp_path / "data", lambda done, of: calls.append((done, of)))
    packs = {name: data.pack(name) for name in PARTS}
    assert calls[-1] == (80, 80)
    for name, pack in packs.items():
        assert pack.dtype == np.uint16 and pack.shape[1] == 16
        assert data.parts[name]["tokens"] == pack.size and data.parts[name]["sequences"] == len(pack)
    assert [len(packs[name]) for name in ("fit", "calibration", "heldout")] == [32, 16, 16]
    written = json.loads((tmp_path / "data" / "split.json").read_text())
    assert written["config"] == asdict(config) and written["parts"] == data.parts
    if split == "document":
        seen = {name: documents_in(pack) for name, pack in packs.items()}
        assert seen["fit"] <= seen["train"]
        assert not seen["heldout"] & seen["calibration"] and not seen["train"] & (seen["heldout"] | seen["calibration"])
        hashes = [set(data.parts[name]["hashes"]) for name in ("fit", "calibration", "heldout")]
        assert len(set.union(*hashes)) == sum(map(len, hashes))
        assert sum(data.parts[name]["documents"] for name in ("train", "calibration", "heldout")) == 80
    else:
        everything = np.concatenate([packs[name] for name in ("train", "calibration", "heldout")])
        assert len(everything) == sum(len(text) + 1 for text in load_documents(config.source)) // 16


def test_documents_are_joined_by_the_end_token(tmp_path: Path) -> None:
    config = replace(SMALL, source=corpus(tmp_path / "text"))
    data = prepare_data(config, TOKENIZER, 272, tmp_path / "data")
    text = TOKENIZER.decode(data.pack("fit").reshape(-1))
    first, second = text.split("<eos>")[:2]
    assert first in load_documents(config.source) and second in load_documents(config.source)


def test_duplicates_are_removed_before_the_split(tmp_path: Path) -> None:
    source = corpus(tmp_path / "text", 40)
    alone = prepare_data(replace(SMALL, source=source), TOKENIZER, 272, tmp_path / "alone")
    for file in sorted(Path(source).iterdir()):
        file.with_name(f"copy-{file.name}").write_text(file.read_text() + "\n")
    doubled = prepare_data(replace(SMALL, source=source), TOKENIZER, 272, tmp_path / "doubled")
    count = lambda data: sum(data.parts[name]["documents"] for name in ("train", "calibration", "heldout"))  # noqa: E731
    assert count(alone) == count(doubled) == 40


def test_seed_decides_and_repeats(tmp_path: Path) -> None:
    config = replace(SMALL, source=corpus(tmp_path / "text", 100))
    one, same = (prepare_data(config, TOKENIZER, 272, tmp_path / name).parts for name in ("one", "same"))
    other = prepare_data(replace(config, seed=1), TOKENIZER, 272, tmp_path / "other").parts
    assert one == same and one["heldout"]["sha256"] != other["heldout"]["sha256"]


def test_no_more_is_tokenised_than_train_needs(tmp_path: Path) -> None:
    config = replace(SMALL, source=corpus(tmp_path / "text", 400), train_tokens=1024)
    calls: list[int] = []
    data = prepare_data(config, TOKENIZER, 272, tmp_path / "data", lambda done, _: calls.append(done))
    assert calls[-1] < 100 and data.pack("train").size == 1024


def test_large_vocabularies_need_uint32(tmp_path: Path) -> None:
    data = prepare_data(replace(SMALL, source=corpus(tmp_path / "text")), TOKENIZER, 128_256, tmp_path / "data")
    assert data.pack("train").dtype == np.uint32


# ---- running again


def test_same_config_reuses_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, source=corpus(tmp_path / "text"))
    first = prepare_data(config, TOKENIZER, 272, tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr("nas.data.load_documents", lambda *_: pytest.fail("read again"))
        assert prepare_data(config, TOKENIZER, 272, tmp_path / "data") == first
    changed = replace(config, seed=7)
    with pytest.raises(DataError, match="seed was 0 and is now 7"):
        prepare_data(changed, TOKENIZER, 272, tmp_path / "data")
    with pytest.raises(DataError, match="vocab_size was 272"):
        prepare_data(config, TOKENIZER, 300, tmp_path / "data")
    assert prepare_data(changed, TOKENIZER, 272, tmp_path / "data", overwrite=True).parts != first.parts


def test_interrupted_writing_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SMALL, source=corpus(tmp_path / "text"))
    with monkeypatch.context() as patch:
        patch.setattr("nas.data.save_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_data(config, TOKENIZER, 272, tmp_path / "data")
    assert not (tmp_path / "data" / "split.json").exists()
    prepare_data(config, TOKENIZER, 272, tmp_path / "data")
    (tmp_path / "data" / "fit.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"fit\.npy"):
        prepare_data(config, TOKENIZER, 272, tmp_path / "data")


def test_load_pack_refuses_other_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "float.npy", np.ones((2, 2)))
    for name in ("float.npy", "nothing.npy"):
        with pytest.raises(DataError, match=name):
            load_pack(tmp_path / name)


# ---- too little, or wrong


@pytest.mark.parametrize(
    ("documents", "characters", "says"),
    [(2, 5000, "2 different documents"), (20, 14, r"sequences of 16 for .* needed")],
)
def test_too_little_text(tmp_path: Path, documents: int, characters: int, says: str) -> None:
    config = replace(SMALL, source=corpus(tmp_path / "text", documents, characters))
    with pytest.raises(DataError, match=says) as refused:
        prepare_data(config, TOKENIZER, 272, tmp_path / "data")
    assert str(config.needed_tokens) in str(refused.value) and "tokens" in str(refused.value)
    assert not (tmp_path / "data").exists()


def test_needed_tokens_is_enough(tmp_path: Path) -> None:
    config = replace(SMALL, source=corpus(tmp_path / "text", SMALL.needed_tokens // 39 + 1, 30))
    split = prepare_data(config, TOKENIZER, 272, tmp_path / "data")
    assert all(len(split.pack(part)) >= MINIMUM_SEQUENCES for part in PARTS)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    config = replace(SMALL, source=corpus(tmp_path / "text"))
    with pytest.raises(DataError, match="vocabulary ends at 100"):
        prepare_data(config, TOKENIZER, 100, tmp_path / "data")
    endless = byte_tokenizer()
    endless.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        prepare_data(config, endless, 272, tmp_path / "data")


@pytest.mark.parametrize(
    "change",
    [{"split": "row"}, {"sequence_length": 1}, {"heldout_tokens": 100}, {"train_tokens": 5}, {"heldout_share": 0.9}],
)
def test_config_is_validated(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(SMALL, **change)
