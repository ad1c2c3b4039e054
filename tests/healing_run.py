"""One small healing run; a script for the tests that need processes of their own (kill, ranks).

    python tests/healing_run.py OUT_DIR CASE...

Each case heals in OUT_DIR/CASE, in processes forked here, so that importing torch is paid once; prints the exit codes as
JSON. `step:5` sends SIGKILL to itself after step 5, `sync:9` at the ninth fsync (in the middle of writing a checkpoint or
the best student), `rename:2` before the second renaming of a directory. On two ranks: `ranks:2` (DDP), `sharded:2` (FSDP2, both
models real on rank 0 alone), `muon:2` (the same with Muon), `qad:2` and `qad-sharded:2` (DDP and FSDP2 with a rounded student), `lost:7` (FSDP2, where rank 1 is killed after step 7, and both start
again), `fewer:7` (the same, but one process alone goes on), `asked:12` (FSDP2, where rank 1 is asked to stop after step 12, the last).
"""

from __future__ import annotations

import copy
import json
import os
import signal
import socket
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from transformers import LlamaConfig, LlamaForCausalLM

import blocks.files
from blocks.rounded_model import round_model
from blocks.spec import Architecture
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
RANKS = 2


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


def stored_student(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The student's parameters in a checkpoint directory, read with PyTorch alone."""
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {name: torch.zeros(meta.size) for name, meta in metadata.items() if name.startswith("student.")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


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


MUON = replace(CONFIG, optimizer="muon", micro_batch=1)
QAD = replace(CONFIG, qad=True, micro_batch=1, learning_rate=1e-3)
IN_FORMATS = Architecture.from_list(["attention:kv2@nvfp4a16+ffn:256@fp8", "attention:kv2+ffn:256@int4-g32"])
"""Of `tiny_pair`: without nvfp4 inputs, whose divisor is that of a micro-batch. Its width is not meant."""


def heal_on_rank(out_dir: Path, kind: str, dies_at: int, rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    configs = {"muon": MUON, "qad": QAD, "qad-sharded": QAD}
    config, pair = configs.get(kind, replace(CONFIG, micro_batch=1)), tiny_pair()
    if kind not in ("ranks", "qad"):
        config = replace(config, sharding="full")
        pair = pair if rank == 0 else tuple(LlamaForCausalLM(model.config).to("meta") for model in pair)  # type: ignore[assignment]

    if config.qad:
        round_model(pair[1], IN_FORMATS)

    def tick(progress: Progress) -> None:
        if progress.step == dies_at:  # rank 0 alone is told: it takes the other one down, and is torn along
            number = signal.SIGTERM if kind == "asked" else signal.SIGKILL
            os.kill(int((out_dir / "rank-1.pid").read_text()), number)

    if rank == 1:
        out_dir.mkdir(parents=True, exist_ok=True)
        (out_dir / "rank-1.pid").write_text(str(os.getpid()))
    heal(config, *pair, *packs(), out_dir, on_step=tick)


def start_ranks(out_dir: Path, kind: str, dies_at: int) -> list[int]:
    """Heals on two ranks; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [fork(heal_on_rank, out_dir, kind, dies_at, rank, port) for rank in range(RANKS)]
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in started]


def fork(run: Callable[..., None], *arguments: object) -> int:
    """Starts `run` in a copy of this process, which must not have computed anything yet. Returns its id."""
    process = os.fork()
    if process:
        return process
    try:
        run(*arguments)
        os._exit(0)
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        os._exit(getattr(error, "exit_code", 1))


def main() -> None:
    out_dir, codes = Path(sys.argv[1]), {}
    torch.set_num_threads(1)
    for case in sys.argv[2:]:
        place, count = case.split(":")
        if place in ("ranks", "sharded", "muon", "qad", "qad-sharded"):
            codes[case] = start_ranks(out_dir / case, place, dies_at=-1)
        elif place in ("lost", "fewer", "asked"):
            codes[case] = start_ranks(out_dir / case, place, dies_at=int(count))
            if place == "lost":
                codes[case] += start_ranks(out_dir / case, place, dies_at=-1)
        else:
            process = fork(heal_and_die, out_dir / case, place, int(count))
            codes[case] = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])]
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
