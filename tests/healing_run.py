"""One small healing run; a script for the tests that need processes of their own (kill, ranks).

    python tests/healing_run.py OUT_DIR CASE...

Each case heals in OUT_DIR/CASE, in processes forked here, so that importing torch is paid once; prints the exit codes as
JSON. `step:5` sends SIGKILL to itself after step 5, `sync:9` at the ninth fsync (in the middle of writing a checkpoint or
the best student), `rename:2` before the second renaming of a directory, `ranks:2` heals on two ranks.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import blocks.files
from distill.config import DistillConfig
from distill.progress import Progress
from distill.trainer import heal

CONFIG = DistillConfig(
    tokens=12 * 4 * 16,
    sequence_length=16,
    batch_sequences=4,
    micro_batch=2,
    learning_rate=2e-3,
    eval_tokens=128,
    eval_every=4,
    checkpoint_every=3,
    chunk_tokens=16,
    device="cpu",
)


def tiny_pair(tied: bool = True, noise: float = 0.05) -> tuple[LlamaForCausalLM, LlamaForCausalLM]:
    """A random Llama and a noisy copy of it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=97, tie_word_embeddings=tied, initializer_range=0.1)
    teacher = LlamaForCausalLM(config)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += noise * torch.randn_like(parameter)
    return teacher, student


def packs() -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out tokens."""
    generator = np.random.default_rng(0)
    return generator.integers(97, size=(20, 24), dtype=np.uint16), generator.integers(97, size=(8, 16), dtype=np.uint16)


def kill_at(count: int) -> Callable[..., None]:
    """A function that kills this process when called for the `count`-th time."""
    calls = 0

    def tick(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)

    return tick


def heal_and_die(out_dir: Path, place: str, count: int) -> None:
    """Heals until the `count`-th step, fsync or renaming of a directory, the last thing that this process does."""
    tick = kill_at(count)
    sync, rename = blocks.files.sync, Path.rename
    if place == "sync":
        blocks.files.sync = lambda path: (sync(path), tick())[0]
    elif place == "rename":
        Path.rename = lambda self, target: (tick(), rename(self, target))[1]  # type: ignore[method-assign]

    def on_step(progress: Progress) -> None:
        if place == "step" and progress.step == count:
            os.kill(os.getpid(), signal.SIGKILL)

    heal(CONFIG, *tiny_pair(), *packs(), out_dir, on_step=on_step)


def heal_on_rank(out_dir: Path, rank: int, world: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    heal(replace(CONFIG, micro_batch=1), *tiny_pair(), *packs(), out_dir)


def fork(run: Callable[..., None], *arguments: object) -> int:
    """Starts `run` in a copy of this process, which must not have computed anything yet. Returns its id."""
    process = os.fork()
    if process:
        return process
    try:
        run(*arguments)
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def main() -> None:
    out_dir, codes = Path(sys.argv[1]), {}
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        place, count = case.split(":")
        if place == "ranks":
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            started = [fork(heal_on_rank, out_dir / case, rank, int(count), port) for rank in range(int(count))]
        else:
            started = [fork(heal_and_die, out_dir / case, place, int(count))]
        codes[case] = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
