"""The score table: what is saved is read back, and a damaged one is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocks.errors import CheckpointError
from blocks.spec import LayerSpec
from nas.table import COLUMNS, ScoreRow, load_table, save_table

ROW = ScoreRow(0, "attention:kv2", "ffn:768", 0.125, 0.0625, 0.1875, "exact", 0.25, 0.5, 0.125, 1000, 2000, 128)
DIGITS = 1e-5  # six of them are kept


def rows() -> list[ScoreRow]:
    """Two layers with three candidates each, the first the parent's own, the last never scored exactly."""
    every = []
    for layer in (0, 1):
        own = replace(ROW, layer=layer, score=0.0, score_low=None, score_high=None, source="parent")
        every += [
            replace(own, one_pass=None, one_pass_seq=None, exact=None),
            replace(ROW, layer=layer, ffn="ffn:skip"),
            replace(ROW, layer=layer, attention="attention:skip", source="one-pass", exact=None, kv_bytes_per_token=0),
        ]
    return every


def test_round_trip(tmp_path: Path) -> None:
    save_table(tmp_path / "scores.csv", rows())
    assert load_table(tmp_path / "scores.csv") == [rows()[:3], rows()[3:]]
    assert (tmp_path / "scores.csv").read_text().splitlines()[0] == ",".join(COLUMNS)
    assert load_table(tmp_path / "scores.csv")[1][2].spec == LayerSpec.parse("attention:skip+ffn:768")


@given(score=st.floats(0, 1e6), one_pass=st.none() | st.floats(0, 1e6), parameters=st.integers(0, 10**13))
def test_scores_keep_six_digits_and_sizes_all(
    tmp_path_factory: pytest.TempPathFactory, score: float, one_pass: float | None, parameters: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "scores.csv"
    save_table(path, [replace(ROW, score=score, one_pass=one_pass, parameters=parameters)])
    ((row,),) = load_table(path)
    assert row.score == pytest.approx(score, rel=DIGITS)
    assert row.one_pass == (None if one_pass is None else pytest.approx(one_pass, rel=DIGITS))
    assert row.parameters == parameters


def test_there_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"is not there; run `nas score --run {tmp_path}` first"):
        load_table(tmp_path / "scores.csv")


def without_last_characters(text: str) -> str:
    return text[:-20]


def with_one(old: str, new: str) -> object:
    return lambda text: text.replace(old, new, 1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", "lacks rows for some layers"),
        (lambda text: text.splitlines()[0], "lacks rows for some layers"),
        (lambda text: "\n".join(line for line in text.splitlines() if not line.startswith("0,")), "lacks rows"),
        (without_last_characters, "is damaged"),
        (with_one("score,", "sc0re,"), "is damaged .*'score'"),
        (with_one("0,attention:kv2", "zero,attention:kv2"), "is damaged .*zero"),
        (with_one("0,attention:kv2", "-1,attention:kv2"), "is damaged .*layer -1"),
        (with_one("attention:skip", "attention:skid"), "is damaged .*attention:skid"),
        (with_one("ffn:skip,0.125", "ffn:skip,nan"), "is damaged .*nan"),
        (with_one("ffn:skip,0.125", "ffn:skip,"), "is damaged"),
    ],
)
def test_a_damaged_table_is_named(tmp_path: Path, damage: object, said: str) -> None:
    path = tmp_path / "scores.csv"
    save_table(path, rows())
    path.write_text(damage(path.read_text()))  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=said) as caught:
        load_table(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_bytes(b"\xff\xfe\x00layer")
    with pytest.raises(CheckpointError, match=r"scores\.csv is damaged"):
        load_table(tmp_path / "scores.csv")
