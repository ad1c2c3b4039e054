"""How fast healing is and what limits it; how far recipes of healing bring one child.

    python benchmarks/healing.py speed                             # a GPU: SmolLM2-135M's shape, half its layers' weights
    python benchmarks/healing.py speed --parent smollm2 --plain    # another parent; transformers' forward beside it
    python benchmarks/healing.py recipes --child runs/half/child --train train.npy --heldout heldout.npy \\
        --recipe "default:" --recipe "muon: optimizer=muon,learning_rate=2e-3" --out recipes.json

`speed` prints tokens/s and peak memory for each size of micro-batch, and for the fastest where a step's time goes: kernels by
group, and whether the GPU waits for the CPU. `recipes` prints the held-out KL of each recipe at 1M, 5M, 9.4M and 18.9M
tokens. Both take --small for a check on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
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
from blocks.checkpoint import expected_tensors, load_child, write_child
from blocks.parent import Parent, open_parent
from blocks.shape import ModelShape
from blocks.spec import Architecture
from distill.config import DistillConfig
from distill.evaluation import evaluate
from distill.progress import HealResult, Progress
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
MARKS = (1_000_000, 5_000_000, 9_400_000, 18_900_000)
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
    recipes = commands.add_parser("recipes")
    recipes.add_argument("--child", type=Path)
    recipes.add_argument("--train", type=Path)
    recipes.add_argument("--heldout", type=Path)
    recipes.add_argument("--general", type=Path, help="a pack of other text, measured at the end")
    recipes.add_argument("--recipe", action="append", required=True, help='"name: key=value,key=value"')
    recipes.add_argument("--tokens", type=int, default=MARKS[-1])
    recipes.add_argument("--work", type=Path, help="keeps the runs there, and goes on with those that are there")
    for command in (speed, recipes):
        command.add_argument("--parent", default="random", help="as for nas; random: SmolLM2-135M's shape")
        command.add_argument("--small", action="store_true", help="tiny models: a check of this script")
        command.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    run = {"speed": run_speed, "recipes": run_recipes}[chosen.command]
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
    pack = np.random.default_rng(0).integers(vocabulary, size=(512, setting.config.sequence_length), dtype=np.uint16)
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


# Recipes


def run_recipes(chosen: argparse.Namespace, directory: Path) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parent = open_or_make(chosen.parent, chosen.small, directory)
    teacher = load_parent_model(parent, device)
    base = replace(base_config(chosen.small), tokens=8192 if chosen.small else chosen.tokens)
    base = replace(base, eval_every=0, checkpoint_every=0, eval_tokens=0)
    marks: Sequence[int] = [base.tokens // 8, base.tokens // 2] if chosen.small else MARKS
    if chosen.small:
        chosen.child = half_size(parent, teacher, directory / "child")
        text = np.random.default_rng(0).integers(200, size=(300, 32), dtype=np.uint16)
        packs = {"train": text[:256], "heldout": text[256:280], "general": text[280:]}
    else:
        names = [name for name in ("train", "heldout", "general") if getattr(chosen, name)]
        packs = {name: np.load(getattr(chosen, name), mmap_mode="r") for name in names}
    parsed = [(name.strip(), configured(base, text)) for name, _, text in (r.partition(":") for r in chosen.recipe)]
    rows = []
    for name, config in parsed:
        out_dir = (chosen.work or directory) / re.sub(r"\W+", "-", name)
        row = {"recipe": name} | run_recipe(config, teacher, chosen.child, packs, out_dir, marks)
        rows.append(row)
        print_recipes(rows)
        if not chosen.work:
            shutil.rmtree(out_dir)
    return {"parent": chosen.parent, "child": str(chosen.child), "tokens": base.tokens, "rows": rows}


def run_recipe(
    config: DistillConfig,
    teacher: nn.Module,
    child: Path,
    packs: dict[str, np.ndarray],
    out_dir: Path,
    marks: Sequence[int],
) -> dict[str, Any]:
    steps = [min(config.steps, round(mark / config.step_tokens)) for mark in marks]
    student = load_child(child)
    result: HealResult = heal(config, teacher, student, packs["train"], packs["heldout"], out_dir, eval_at=steps)
    evaluations = {
        str(step * config.step_tokens): {"kl": e.kl, "kl_se": e.kl_se, "perplexity": e.student_perplexity}
        for step, e in sorted(result.evaluations.items())
    }
    row: dict[str, Any] = {
        "config": config.trajectory(),
        "tokens_per_s": result.tokens_per_s,
        "seconds": result.seconds,
    }
    row["evaluations"] = evaluations
    if "general" in packs:
        other = evaluate(
            teacher,
            student,
            packs["general"],
            sequence_length=config.sequence_length,
            micro_batch=config.micro_batch,
            chunk_tokens=config.chunk_tokens,
            compute_dtype=config.compute_dtype,
        )
        row["general"] = {"kl": other.kl, "kl_se": other.kl_se, "perplexity": other.student_perplexity}
    return row


def print_recipes(rows: list[dict[str, Any]]) -> None:
    """One column for each evaluation of the first recipe; recipes with other steps are read at the nearest one."""
    columns = [int(tokens) for tokens in rows[0]["evaluations"]]
    print("\n" + f"{'held-out KL at tokens':32s}" + "".join(f"{tokens:>16,d}" for tokens in columns) + "   tokens/s")
    for row in rows:
        cells = []
        for tokens in columns:
            nearest = min(row["evaluations"], key=lambda key, tokens=tokens: abs(int(key) - tokens))
            found = row["evaluations"][nearest]
            cells.append(f"{found['kl']:.4f} ± {found['kl_se'] or 0:.4f}")
        print(f"{row['recipe']:32s}" + "".join(f"{cell:>16s}" for cell in cells) + f"{row['tokens_per_s']:11,.0f}")
        if "general" in row:
            print(
                f"{'  other text, best student':32s}{row['general']['kl']:16.4f}, perplexity {row['general']['perplexity']:.2f}"
            )


if __name__ == "__main__":
    main()
