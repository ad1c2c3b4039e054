"""How fast healing is and what limits it; how much memory it takes.

    python benchmarks/healing.py speed                             # a GPU: SmolLM2-135M's shape, half its layers' weights
    python benchmarks/healing.py speed --parent smollm2 --plain    # another parent; transformers' forward beside it
    python benchmarks/healing.py memory                            # two shapes, predicted and measured

`speed` prints tokens/s and peak memory for each size of micro-batch, and for the fastest where a step's time goes: kernels by
group, and whether the GPU waits for the CPU. `memory` prints model FLOP utilisation, too. Both take --small for a check on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

import distill.loss
import distill.models
import distill.operations
from blocks.checkpoint import expected_tensors, load_child, read_architecture, write_child
from blocks.parent import Parent, open_parent
from blocks.shape import ModelShape
from blocks.spec import Architecture
from distill.config import DistillConfig
from distill.memory import healing_memory, step_flops
from distill.progress import Progress
from distill.trainer import heal
from nas.config import ON_GPU
from nas.measure import load_parent_model

SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
SMALL = SMOLLM2 | {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WARM_UP, TIMED, PROFILED = 3, 6, 2
GROUPS = (
    ("attention", r"flash|fmha|attention|sdpa"),
    ("loss", r"^_kl|softmax"),
    ("optimizer", r"adam|multi_tensor|foreach|muon"),
    ("norm", r"norm|rsqrt"),
    ("rotary and gate", r"^_rotate|^_gated|silu"),
    ("matrix products", r"gemm|cutlass|nvjet|cublas|xmma|aten::(mm|addmm|bmm)|splitk|::linear"),
    ("embedding", r"embedding|indexselect|index_|sort|radix|scatter"),
    ("casts and copies", r"copy|memcpy|catarray|aten::(to|cat)"),
    ("sums", r"reduce|aten::sum"),
    ("other elementwise", r"elementwise|aten::|memset"),
)
BACKENDS = {
    "default": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    speed = commands.add_parser("speed")
    speed.add_argument("--micro-batch", type=int, nargs="+", default=[8, 16, 32])
    speed.add_argument("--chunk-tokens", type=int, nargs="+", default=[4096])
    speed.add_argument("--attention", nargs="+", choices=BACKENDS, default=["default"])
    speed.add_argument("--plain", action="store_true", help="also with transformers' forward and no fused kernel")
    speed.add_argument("--set", default="", help="key=value,... of the distill configuration")
    memory = commands.add_parser("memory")
    for command in (speed, memory):
        command.add_argument("--parent", default="random", help="as for nas; random: SmolLM2-135M's shape")
        command.add_argument("--small", action="store_true", help="tiny models: a check of this script")
        command.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    run = {"speed": run_speed, "memory": run_memory}[chosen.command]
    with tempfile.TemporaryDirectory() as directory:
        result = run(chosen, Path(directory))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1))


def base_config(small: bool) -> DistillConfig:
    if small:
        return DistillConfig(sequence_length=32, batch_sequences=8, micro_batch=4, eval_tokens=256, chunk_tokens=64)
    return DistillConfig(**ON_GPU["distill"])


def configured(base: DistillConfig, text: str) -> DistillConfig:
    """`base` with the settings of "key=value,key=value"; tuples are written 0.9/0.95."""
    types, values = get_type_hints(DistillConfig), {}
    for setting in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = setting.partition("=")
        if key not in {field.name for field in fields(DistillConfig)} or not value:
            raise SystemExit(f"cannot read {setting!r}: write key=value, with a key of the distill section")
        kind = types[key]
        values[key] = kind(value) if kind in (int, float, str) else tuple(map(float, value.split("/")))
    return replace(base, **values)


def open_or_make(name: str, small: bool, directory: Path) -> Parent:
    if small or name == "random":
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**(SMALL if small else SMOLLM2))).save_pretrained(directory / "parent")
        name = str(directory / "parent")
    return open_parent(name)


def half_size(parent: Parent, teacher: nn.Module, path: Path) -> Path:
    """A child of half the weights: every FFN of half its width, every second attention gone; the leading rows are kept."""
    shape: ModelShape = parent.shape
    width = shape.intermediate_size // 2
    kinds = (f"attention:kv{shape.num_key_value_heads}+ffn:{width}", f"attention:skip+ffn:{width}")
    architecture = Architecture.from_list([kinds[layer % 2] for layer in range(shape.num_hidden_layers)])
    tensors = teacher.state_dict()
    cut = {
        name: tensors[name][tuple(map(slice, size))].cpu()
        for name, size in expected_tensors(shape, architecture).items()
    }
    write_child(path, parent.path, architecture, cut, "float32")
    return path


# Speed


@dataclass(frozen=True)
class Setting:
    """One way to run."""

    config: DistillConfig
    attention: str = "default"
    plain: bool = False

    def __str__(self) -> str:
        way = "transformers" if self.plain else "fused"
        return f"micro_batch {self.config.micro_batch}, chunk {self.config.chunk_tokens}, {self.attention}, {way}"


class Enough(Exception):
    """Ends a run that has been measured."""


def run_speed(chosen: argparse.Namespace, directory: Path) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    parent = open_or_make(chosen.parent, chosen.small, directory)
    teacher = load_parent_model(parent, device)
    child = half_size(parent, teacher, directory / "child")
    config = replace(base_config(chosen.small), tokens=10**9, eval_tokens=1, eval_every=0, checkpoint_every=0)
    config = configured(config, chosen.set)
    sizes = [2, 4, 8] if chosen.small else chosen.micro_batch
    configs = [
        replace(config, micro_batch=size, chunk_tokens=64 if chosen.small else chunk)
        for size in sizes
        for chunk in chosen.chunk_tokens
    ]
    settings = [Setting(each, attention) for each in configs for attention in chosen.attention]
    if chosen.plain:
        settings += [Setting(replace(configs[0], micro_batch=size), plain=True) for size in sizes[:2]]
    print(f"{name}, torch {torch.__version__}, {config.batch_sequences} x {config.sequence_length} tokens a step\n")
    print(f"{'':60s} {'tokens/s':>10s} {'ms/step':>9s} {'peak GB':>8s}")
    rows = []
    for setting in settings:
        rows.append({"setting": str(setting)} | measure(setting, teacher, child, directory))
        row = rows[-1]
        print(f"{setting!s:60s} {row['tokens_per_s']:10,.0f} {row['ms']:9.1f} {row['peak_gb']:8.2f}", flush=True)
    fused = [index for index, setting in enumerate(settings) if not setting.plain]
    best = max(fused, key=lambda index: rows[index]["tokens_per_s"])
    profiled = settings[best : best + 1] + [setting for setting in settings if setting.plain][:1]
    profiles = {str(setting): profile(setting, teacher, child, directory) for setting in profiled}
    for title, found in profiles.items():
        print_profile(title, found, next(row["ms"] for row in rows if row["setting"] == title))
    return {"device": name, "torch": torch.__version__, "rows": rows, "profiles": profiles}


def measure(setting: Setting, teacher: nn.Module, child: Path, directory: Path) -> dict[str, float]:
    """Tokens/s of the median step after the first ones, and the peak memory of all."""
    times: list[float] = []
    memory = 0.0

    def on_step(progress: Progress) -> None:
        nonlocal memory
        times.append(time.perf_counter())
        if progress.step == WARM_UP + TIMED:
            memory = peak_gb()
            raise Enough

    run_some(setting, teacher, child, directory, on_step)
    seconds = median(np.diff(times[WARM_UP:]).tolist())
    return {"tokens_per_s": setting.config.step_tokens / seconds, "ms": 1000 * seconds, "peak_gb": memory}


def run_some(
    setting: Setting, teacher: nn.Module, child: Path, directory: Path, on_step: Callable[[Progress], None]
) -> None:
    """Heals a fresh child until `on_step` has had enough."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    vocabulary = teacher.config.vocab_size  # type: ignore[union-attr]
    pack = np.random.default_rng(0).integers(vocabulary, size=(512, setting.config.sequence_length), dtype=np.uint32)
    backend = BACKENDS[setting.attention]
    choice = nullcontext() if backend is None else sdpa_kernel([backend, SDPBackend.MATH])
    with transformers_way() if setting.plain else nullcontext(), choice:
        try:
            heal(
                setting.config,
                teacher,
                load_child(child),
                pack,
                pack,
                directory / "heal",
                on_step=on_step,
                resume=False,
            )
        except Enough:
            return


@contextmanager
def transformers_way() -> Iterator[None]:
    """Healing as it would be without distill/decoder.py and distill/kernels.py."""
    saved = distill.models.prepare, distill.loss.kernels_for
    distill.models.prepare, distill.loss.kernels_for = (lambda model: False), (lambda tensor: None)
    try:
        yield
    finally:
        distill.models.prepare, distill.loss.kernels_for = saved


def profile(setting: Setting, teacher: nn.Module, child: Path, directory: Path) -> dict[str, Any]:
    """Where the time of a step goes, by kernel and by group."""
    on_gpu = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * on_gpu]
    profiler = torch.profiler.profile(activities=activities)

    def on_step(progress: Progress) -> None:
        if progress.step == WARM_UP:
            profiler.start()
        elif progress.step == WARM_UP + PROFILED:
            profiler.stop()
            raise Enough

    run_some(setting, teacher, child, directory, on_step)
    return summarise(profiler, on_gpu)


def summarise(profiler: Any, on_gpu: bool) -> dict[str, Any]:
    """Milliseconds and launches a step by group; the longest kernels; how long the CPU waited for the GPU."""
    milliseconds: dict[str, float] = defaultdict(float)
    launches: dict[str, float] = defaultdict(float)
    kernels, waiting = [], 0.0
    for event in profiler.key_averages():
        name = event.key
        if re.match(r"cuda(Stream|Device|Event)Synchronize", name):
            waiting += event.self_cpu_time_total / 1000 / PROFILED
        is_kernel = event.device_type != torch.autograd.DeviceType.CPU if on_gpu else name.startswith("aten::")
        if not is_kernel or getattr(event, "is_user_annotation", False):
            continue
        spent = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000 / PROFILED
        group = next((group for group, pattern in GROUPS if re.search(pattern, name.lower())), "other")
        milliseconds[group] += spent
        launches[group] += event.count / PROFILED
        kernels.append({"name": name, "group": group, "ms": spent, "count": event.count / PROFILED})
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {
        "groups": {group: {"ms": milliseconds[group], "count": launches[group]} for group in milliseconds},
        "kernels": kernels[:25],
        "waiting_ms": waiting,
    }


def print_profile(title: str, found: dict[str, Any], step_ms: float) -> None:
    groups = sorted(found["groups"].items(), key=lambda item: -item[1]["ms"])
    busy, count = (sum(group[key] for _, group in groups) for key in ("ms", "count"))
    print(f"\n{title}: a step of {step_ms:.1f} ms")
    for name, group in groups:
        print(f"  {name:20s} {group['ms']:8.2f} ms {100 * group['ms'] / busy:5.1f} % {group['count']:8.0f} launches")
    print(f"  {'all':20s} {busy:8.2f} ms         {count:8.0f} launches")
    if torch.cuda.is_available():
        verdict = "the GPU limits" if busy > 0.9 * step_ms else "launching limits: the GPU idles"
        print(
            f"  GPU busy {100 * busy / step_ms:.0f} % of an unprofiled step ({verdict}); "
            f"under the profiler the CPU waited {found['waiting_ms']:.1f} ms a step for the GPU"
        )
    print("  longest kernels:")
    for kernel in found["kernels"][:15]:
        print(f"  {kernel['ms']:8.2f} ms {kernel['count']:6.0f} x  [{kernel['group']}] {kernel['name'][:90]}")


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")


# Memory


LLAMA_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "tie_word_embeddings": True,
}
PEAK_FLOPS = {"H200": 989.5e12, "H100": 989.5e12, "A100": 312e12}
MEMORY_SETTINGS: tuple[dict[str, Any], ...] = (
    {"micro_batch": 4},
    {"micro_batch": 16},
    {"micro_batch": 16, "optimizer": "adamw"},
    {"micro_batch": 32, "checkpoint_activations": True},
)


def run_memory(chosen: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Peak memory as docs/memory.md foretells it and as it is, and what share of the GPU's peak FLOP/s a step reaches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), math.nan)
    shapes = {"tiny": SMALL} if chosen.small else {"SmolLM2-135M": SMOLLM2, "Llama-3.2-1B": LLAMA_1B}
    print(f"{name}, torch {torch.__version__}\n")
    print(
        "| parent's shape | setting | predicted GB | measured GB | error | tokens/s | model FLOP utilisation |\n|"
        + "---|" * 7
    )
    rows = []
    for title, shape in shapes.items():
        parent = random_parent(shape, directory / title, chosen.small)
        teacher = load_parent_model(parent, device, torch.float32 if chosen.small else torch.bfloat16)
        child = half_size(parent, teacher, directory / title / "child")
        for settings in MEMORY_SETTINGS:
            base = replace(base_config(chosen.small), tokens=10**9, eval_tokens=1, eval_every=0, checkpoint_every=0)
            config = replace(base, **settings)
            built = read_architecture(child)[1]
            foretold = healing_memory(config, parent.shape, built, teacher_bytes=parent.dtype.itemsize).peak / 1e9
            found = measure(Setting(config), teacher, child, directory)
            used = step_flops(config, parent.shape, built) / (found["ms"] / 1000) / peak
            text = ", ".join(f"{key} {value}" for key, value in settings.items())
            rows.append({"shape": title, "setting": text, "predicted_gb": foretold, "mfu": used} | found)
            print(
                f"| {title} | {text} | {foretold:.2f} | {found['peak_gb']:.2f} | {foretold / found['peak_gb'] - 1:+.1%} "
                f"| {found['tokens_per_s']:,.0f} | {used:.1%} |",
                flush=True,
            )
        del teacher
    return {"device": name, "torch": torch.__version__, "rows": rows}


def random_parent(shape: dict[str, Any], path: Path, small: bool) -> Parent:
    """A parent of random weights in bfloat16, made on the GPU if there is one: it takes seconds there."""
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.float32 if small else torch.bfloat16)
    model.save_pretrained(path / "parent")
    return open_parent(str(path / "parent"))


if __name__ == "__main__":
    main()
