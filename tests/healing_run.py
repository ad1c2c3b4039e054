"""One small healing run; a script for the tests that need processes of their own (kill, signals, ranks).

    python tests/healing_run.py OUT_DIR [--kill WHERE:COUNT] [--term STEP] [--micro-batch N]

`--kill step:5` sends SIGKILL to itself after step 5, `--kill sync:9` at the ninth fsync (in the middle of writing a
checkpoint or the best student), `--kill rename:2` before the second renaming of a checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import distill.checkpoint
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


def kill_at(count: int) -> object:
    """A function that kills this process when called for the `count`-th time."""
    calls = 0

    def tick() -> None:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)

    return tick


def arm(place: str, count: int) -> None:
    """Makes the `count`-th fsync or rename of the checkpoint code the last thing that this process does."""
    tick = kill_at(count)
    if place == "sync":
        original = distill.checkpoint.sync
        distill.checkpoint.sync = lambda path: (original(path), tick())  # type: ignore[assignment, operator]
    else:
        rename = Path.rename
        Path.rename = lambda self, target: (tick(), rename(self, target))[1]  # type: ignore[assignment, operator]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--kill", default="none:0")
    parser.add_argument("--term", type=int, default=-1)
    parser.add_argument("--micro-batch", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    place, count = arguments.kill.split(":")
    if place in ("sync", "rename"):
        arm(place, int(count))

    def on_step(progress: Progress) -> None:
        if place == "step" and progress.step == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        if progress.step == arguments.term:
            os.kill(os.getpid(), signal.SIGTERM)

    config = replace(CONFIG, micro_batch=arguments.micro_batch)
    heal(config, *tiny_pair(), *packs(), arguments.out_dir, on_step=on_step)


if __name__ == "__main__":
    main()
