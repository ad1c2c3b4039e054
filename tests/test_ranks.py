"""Several processes do what one does: shares, sums and values of sequences, and `nas score` as a whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from app import World, nas, succeed
from hypothesis import given
from hypothesis import strategies as st

from blocks.ranks import ALONE, Ranks
from nas.table import load_table


def run_ranks(count: int, *arguments: object) -> list[str]:
    """What each of `count` processes of one_rank.py prints."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    script = Path(__file__).with_name("one_rank.py")
    shared = {**os.environ, "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared["PYTHONPATH"] = str(script.parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        done = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()  # nothing, if it has ended
    for process, (_, err) in zip(processes, done, strict=True):
        assert process.returncode == 0, err
    return [out for out, _ in done]


@given(count=st.integers(1, 9), sequences=st.integers(0, 100))
def test_shares_are_even_and_cover_every_sequence_once(count: int, sequences: int) -> None:
    shares = [Ranks(rank, count).share(sequences) for rank in range(count)]
    assert [n for share in shares for n in range(share.start, share.stop)] == list(range(sequences))
    sizes = [share.stop - share.start for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_one_process_alone_needs_no_group() -> None:
    values = torch.randn(2, 3)
    assert ALONE.main and ALONE.gather(values) is values and ALONE.sum_(values) is values and ALONE.agree("x") == "x"
    ALONE.wait()


@pytest.mark.parametrize(("count", "tolerance"), [(2, 1e-6), (3, 1e-4)])
def test_ranks_score_as_one_process_does(world: World, tmp_path: Path, count: int, tolerance: float) -> None:
    """Two share evenly. Three do not: batches of another shape round activations in another way, and now and then a
    matrix of the library, kept in bf16, with them."""
    one, several = tmp_path / "one", tmp_path / "several"
    succeed(*world.score_words(one))
    prints = run_ranks(count, 10, *world.score_words(several))
    numbers = [[*range(10 * rank, 10 * rank + 10)] for rank in range(2)]
    for text in prints:
        made = json.loads(text.splitlines()[0])
        assert made == {"gathered": numbers, "sum": 190.0, "agreed": 0}
    assert "scored exactly" in prints[0]
    assert all(len(text.splitlines()) == 1 for text in prints[1:])  # rank 0 speaks for all
    for own, other in zip(load_table(one / "scores.csv"), load_table(several / "scores.csv"), strict=True):
        for row, expected in zip(other, own, strict=True):
            assert (row.spec, row.source) == (expected.spec, expected.source)
            for name in ("score", "one_pass", "one_pass_seq", "exact"):
                found, wanted = getattr(row, name), getattr(expected, name)
                assert found == wanted or abs(found - wanted) <= tolerance, (row.spec, name)


@pytest.mark.parametrize("words", [("search", "--budget", "0.6"), ("bench",)])
def test_what_one_process_does_refuses_several(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = nas(*words, "--run", tmp_path)
    assert result.code == 2 and f"nas {words[0]} runs in one process" in result.err.splitlines()[-1]
