"""What fitting and scoring cost: the tables of docs/benchmarks.md on `nas score`.

    python benchmarks/scoring.py cpu                     the peer's own space and text on one CPU thread
    python benchmarks/scoring.py gpu                     against one forward + backward pass; against exact scores; estimators
    python benchmarks/scoring.py large --out large.json  a Llama-3.1-8B shape, resident and streamed
    python benchmarks/scoring.py huge                    two layers of a Llama-3.1-405B shape, streamed
    python benchmarks/scoring.py growth                  cost against layers and candidates
    python benchmarks/scoring.py extrapolate             what a whole 405B parent costs, by arithmetic
    python benchmarks/scoring.py bld                     block-local distillation against the closed-form fit
    python benchmarks/scoring.py order                   how FFN channels are chosen

Each prints its table last. `gpu`, `large` and `huge` want a GPU; `large` writes 16 GB of random weights, `huge` 21 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blocks.candidates import FitConfig, fit_layer
from blocks.fit import Statistics, contribution, greedy_order
from blocks.layer import Weights, attention_context, ffn_activation, layer_forward, project
from blocks.library import LayerLibrary
from blocks.parent import Parent, open_parent
from blocks.shape import ModelShape
from blocks.spec import LayerSpec
from blocks.sweep import StreamCheckpoints, Sweep
from distill.block_local import LocalConfig, distill_layer
from distill.metrics import peak_memory
from nas.config import RunConfig, ScoreConfig
from nas.engine import make_sweep
from nas.engine_config import EngineConfig
from nas.guard import rank_correlation
from nas.plan import ScorePlan, count, count_flops
from nas.probe import Probe
from nas.progress import Reporter
from nas.run import Run
from nas.score import Scoring
from nas.scoring import CandidateOutputs
from search_spaces import SearchSpace

PEER = SearchSpace("peer", kv_heads="parent", ffn_widths=(1024, 512), keep_first_attention=False)
DEFAULT = SearchSpace("default", ffn_ratios=(0.8125, 0.6875, 0.5, 0.3125, 0.1875))


@dataclass
class OnArrays(Scoring):
    """`nas score` on token arrays instead of packed text."""

    arrays: dict[str, np.ndarray] | None = None

    def pack(self, part: str) -> np.ndarray:
        assert self.arrays is not None
        return self.arrays[part]


@dataclass
class Measured:
    """One run: seconds in all and by part, the plan it was given, and the per-sequence scores."""

    scoring: OnArrays
    plan: ScorePlan
    seconds: float
    cpu_seconds: float
    peak_gb: float

    def values(self, kind: str, name: str) -> dict[tuple[int, str], float]:
        loaded = self.scoring.files.load(kind, self.scoring.layers)
        return {key: float(np.mean(values[name])) for key, values in loaded.items()}

    def line(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "seconds": round(self.seconds, 2),
            "planned_seconds": round(plan.seconds, 2),
            "by_part": {name: round(seconds, 2) for name, seconds in self.scoring.spent.items()},
            "peak_gb": round(self.peak_gb, 2),
            "planned_gb": round(plan.memory.device / 1e9, 2),
            "elsewhere_gb": round(plan.memory.elsewhere / 1e9, 2),
            "read_gb": round(self.scoring.sweep.bytes_read / 1e9, 2),
            "planned_read_gb": round(plan.bytes_read / 1e9, 2),
            "tflop": round(plan.flops.total / 1e12, 1),
            "arrangement": str(plan.arrangement),
        }


def run(
    parent: Parent,
    space: SearchSpace,
    score: ScoreConfig,
    arrays: dict[str, np.ndarray],
    device: torch.device,
    engine: EngineConfig | None = None,
) -> Measured:
    """Plans, then fits and scores in a temporary directory, which stays."""
    engine = engine or EngineConfig()
    directory = Path(tempfile.mkdtemp(prefix="scoring-"))
    config = RunConfig("benchmark", space.name, space.target, score=score)
    scoring = OnArrays(Run(directory, config, ""), parent, space, device, Reporter(quiet=True), engine, arrays=arrays)
    scoring.prepare = lambda: None  # type: ignore[method-assign]
    if device.type == "cuda":
        torch.cuda.empty_cache()
    plan = scoring.plan()
    for line in plan.lines():
        print(line, flush=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    started, cpu = time.perf_counter(), time.process_time()
    scoring.score()
    measured = Measured(
        scoring, plan, time.perf_counter() - started, time.process_time() - cpu, peak_memory(device) / 1e9
    )
    print(json.dumps(measured.line()), flush=True)
    return measured


def texts(parent: Parent, sequences: int, length: int) -> dict[str, np.ndarray]:
    """Real text for fitting and for scoring: different documents of Python's documentation."""
    from nas.documents import load_documents

    tokenizer, wanted = parent.tokenizer(), sequences * length
    parts: dict[str, list[int]] = {"fit": [], "calibration": []}
    documents = list(load_documents("python-docs", "text"))
    for index in np.random.default_rng(0).permutation(len(documents)):
        part = min(parts, key=lambda name: len(parts[name]))
        if len(parts[part]) < wanted:
            parts[part] += tokenizer(documents[index])["input_ids"] + [tokenizer.eos_token_id]
    return {name: np.array(ids[:wanted]).reshape(sequences, length) for name, ids in parts.items()}


def random_tokens(shape: ModelShape, sequences: int, length: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    size = (sequences, length)
    return {part: generator.integers(0, shape.vocab_size, size) for part in ("fit", "calibration")}


def forward_backward(parent: Parent, tokens: np.ndarray, device: torch.device, dtype: torch.dtype, micro: int) -> float:
    """Seconds of one plain forward + backward pass (cross-entropy, weight gradients too) of the parent by transformers,
    median of five."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parent.path, dtype=dtype).to(device)
    batches = torch.from_numpy(tokens.astype("int64")).to(device).split(micro)

    def once() -> None:
        for batch in batches:
            model(batch, labels=batch).loss.backward()

    return median_seconds(once, device, 5)


def median_seconds(work: Callable[[], object], device: torch.device, times: int) -> float:
    seconds = []
    for _ in range(times + 1):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[1:]))


# ---- the tables


def cpu(chosen: argparse.Namespace) -> dict[str, Any]:
    """One thread, 4 x 256 tokens, attention keep or skip x FFN 1536, 1024, 512 or skip: 210 candidates."""
    torch.set_num_threads(1)
    parent, device = open_parent(chosen.parent), torch.device("cpu")
    arrays = texts(parent, 4, 256)
    score = ScoreConfig(method="both", label_samples=2, exact_tokens=1024, pseudo_tokens=3000.0)
    found = run(parent, PEER, score, arrays, device)
    spent = found.scoring.spent
    both = spent["parent"] + spent["vocabulary"] + spent["fit"] + spent["one_pass"]
    candidates = found.plan.counts.candidates
    return found.line() | {
        "candidates": candidates,
        "fit_and_one_pass_seconds": round(both, 1),
        "exact_seconds_per_candidate": round(spent["exact"] / candidates, 2),
        "cpu_seconds": round(found.cpu_seconds, 1),
        "spearman": spearman(found, "tok"),
    }


def spearman(found: Measured, estimator: str, within: Sequence[str] = ()) -> float | None:
    """Rank correlation of one-pass with exact scores over the candidates whose attention is one of `within` (or all)."""
    estimates, truths = found.values("one_pass", estimator), found.values("exact", "kl")
    keys = [key for key in truths if not within or key[1].split("+")[0] in within]
    return rank_correlation([(LayerSpec.parse(k[1]), estimates[k], truths[k]) for k in keys])["spearman"]


def gpu(chosen: argparse.Namespace) -> dict[str, Any]:
    """64 x 512 tokens, the same space and linear candidates, bf16 compute, fp32 statistics; documents no fit saw."""
    parent, device = open_parent(chosen.parent), torch.device("cuda")
    arrays = texts(parent, 64, 512)
    space = replace(PEER, target="transformers", attention_linear=True, ffn_linear=True)
    plain = {
        str(dtype).removeprefix("torch."): forward_backward(parent, arrays["calibration"], device, dtype, 16)
        for dtype in (torch.bfloat16, torch.float32)
    }
    print(json.dumps({"forward_backward": plain}), flush=True)
    settings = [("bfloat16", 1, "tok"), ("bfloat16", 2, "tok"), ("bfloat16", 2, "fisher"), ("bfloat16", 8, "tok")]
    rows, runs = [], []
    for dtype, samples, estimator in [settings[0], *settings, ("float32", 2, "tok")]:  # the first once more: warm
        score = ScoreConfig(compute_dtype=dtype, label_samples=samples, estimator=estimator)
        found = run(parent, space, score, arrays, device)
        guard = found.scoring.spent["exact"]
        rows.append(
            {"dtype": dtype, "samples": samples, "estimator": estimator, "seconds": round(found.seconds, 2)}
            | {"without_guard": round(found.seconds - guard, 2)}
            | {"times_plain": round((found.seconds - guard) / plain["bfloat16"], 1)}
            | {"times_plain_with_guard": round(found.seconds / plain["bfloat16"], 1)}
        )
        runs.append(found)
    score = ScoreConfig(method="both", compute_dtype="bfloat16", exact_tokens=32768)
    exact = run(parent, space, score, arrays, device)
    truth = exact.values("exact", "kl")
    for row, found in zip(rows, runs, strict=True):
        for name in ("tok", "seq") if row["estimator"] == "tok" else ("fisher",):
            estimate = found.values("one_pass", name)
            row[name] = {"all": round(correlation(estimate, truth), 4)}
            for kind in sorted({key[1].split("+")[0] for key in truth}):
                own = {key: kl for key, kl in truth.items() if key[1].startswith(kind)}
                row[name][kind.removeprefix("attention:")] = round(correlation(estimate, own), 4)
    return {
        "device": torch.cuda.get_device_name(),
        "forward_backward": plain,
        "exact_of_all": exact.line(),
        "candidates": len(truth),
        "rows": rows[1:],
    }


def correlation(estimate: dict[Any, float], truth: dict[Any, float]) -> float:
    from scipy.stats import spearmanr

    return float(spearmanr([estimate[key] for key in truth], list(truth.values())).statistic)


def write_random_llama(directory: Path, **sizes: Any) -> Path:
    """A Llama of random bf16 weights on disk, a shard a layer, written layer by layer."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    config = LlamaConfig(**sizes, dtype="bfloat16", tie_word_embeddings=False)
    directory.mkdir(parents=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    hidden, wide, kv = config.hidden_size, config.intermediate_size, config.num_key_value_heads * config.head_dim
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, device=device) * columns**-0.5).to(torch.bfloat16).cpu()

    one = torch.ones(hidden, dtype=torch.bfloat16)
    shards: list[Callable[[], dict[str, Tensor]]] = [
        lambda: {"model.embed_tokens.weight": matrix(config.vocab_size, hidden) * hidden**0.5},
        lambda: {"lm_head.weight": matrix(config.vocab_size, hidden), "model.norm.weight": one},
    ]

    def layer(index: int) -> dict[str, Tensor]:
        sizes = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        own = {f"model.layers.{index}.{name}.weight": matrix(*size) for name, size in sizes.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        return own | {f"model.layers.{index}.{name}.weight": one.clone() for name in norms}

    shards += [lambda index=index: layer(index) for index in range(config.num_hidden_layers)]
    weight_map = {}
    for number, make in enumerate(shards):
        tensors, name = make(), f"model-{number:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def matmul_rate(device: torch.device) -> float:
    """bf16 FLOP/s of a large product of random matrices: the ceiling that utilisation is a share of."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_seconds(lambda: a @ b, device, 20)


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
LLAMA_405B = LLAMA_8B | {"hidden_size": 16384, "intermediate_size": 53248, "num_attention_heads": 128}


def large(chosen: argparse.Namespace) -> dict[str, Any]:
    """A Llama-3.1-8B shape, the full default space, 64 x 2048 tokens to fit on and 64 x 2048 to score."""
    device = torch.device("cuda")
    directory = Path(chosen.directory or tempfile.mkdtemp()) / "llama-8b"
    started = time.perf_counter()
    if not directory.exists():
        write_random_llama(directory, num_hidden_layers=chosen.layers or 32, **LLAMA_8B)
    print(f"wrote {directory} in {time.perf_counter() - started:.0f} s", flush=True)
    parent = open_parent(str(directory))
    arrays = random_tokens(parent.shape, chosen.sequences or 64, 2048)
    score = ScoreConfig(compute_dtype="bfloat16", library="rebuild")
    rate = matmul_rate(device)
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "bf16_tflops": round(rate / 1e12)}
    for name, engine in (
        ("resident", EngineConfig("resident")),
        ("streamed", EngineConfig("streamed", "host")),
    ):
        found = run(parent, DEFAULT, score, arrays, device, engine)
        tokens = sum(array.size for array in arrays.values())
        result[name] = found.line() | {
            "tokens_per_second": round(tokens / found.seconds),
            "utilisation": round(found.plan.flops.total / found.seconds / rate, 3),
        }
        if chosen.out:
            chosen.out.write_text(json.dumps(result, indent=1))
        del found
        torch.cuda.empty_cache()
    return result


def huge(chosen: argparse.Namespace) -> dict[str, Any]:
    """Two layers of a Llama-3.1-405B shape, streamed, within 80 GB."""
    device = torch.device("cuda")
    directory = Path(chosen.directory or tempfile.mkdtemp()) / "llama-405b"
    if not directory.exists():
        write_random_llama(directory, num_hidden_layers=2, **LLAMA_405B)
    parent = open_parent(str(directory))
    arrays = random_tokens(parent.shape, chosen.sequences or 32, 2048)
    score = ScoreConfig(compute_dtype="bfloat16", library="rebuild")
    found = run(parent, DEFAULT, score, arrays, device, EngineConfig("streamed", "host"))
    return found.line() | {"tokens": arrays["fit"].size, "device": torch.cuda.get_device_name()}


def growth(chosen: argparse.Namespace) -> dict[str, Any]:
    """Seconds of fitting and one-pass scoring for 8, 16 and 32 layers (1, 2 and 4 on a CPU), 5, 20 and 62 candidates a layer,
    and more tokens."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    sizes = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 8192}
    # The same attentions and the same widest cut everywhere, so that only the number of candidates differs.
    some = tuple(range(1024, 4097, 1024))
    spaces = {
        5: SearchSpace("5", ffn_widths=(4864,), ffn_skip=False, keep_first_attention=False),
        20: SearchSpace("20", ffn_widths=(*some, 4864), keep_first_attention=False),
        60: SearchSpace("60", ffn_widths=tuple(range(256, 4865, 256)), keep_first_attention=False),
    }
    rows = []
    on_gpu = device.type == "cuda"
    sequences, depths = chosen.sequences or (64 if on_gpu else 4), (8, 16, 32) if on_gpu else (1, 2, 4)
    for layers, candidates, more in [
        *((n, c, 1) for n in depths for c in (5, 20, 60)),
        (depths[0], 20, 2),
        (depths[0], 20, 4),
    ]:
        with tempfile.TemporaryDirectory() as directory:
            path = write_random_llama(Path(directory) / "p", num_hidden_layers=layers, intermediate_size=5120, **sizes)
            parent = open_parent(str(path))
            arrays = random_tokens(parent.shape, sequences * more, 512)
            score = ScoreConfig(compute_dtype="bfloat16" if on_gpu else "float32", exact_share=0.0, exact_tokens=512)
            if not rows and on_gpu:  # what is slow the first time only
                run(parent, spaces[candidates], score, arrays, device)
            found = run(parent, spaces[candidates], score, arrays, device)
            spent = found.scoring.spent
            rows.append(
                {
                    "layers": layers,
                    "candidates": len(found.scoring.changed[-1]),
                    "tokens": sequences * more * 512,
                    "seconds": round(sum(spent.values()) - spent["exact"], 3),
                    "by_part": {name: round(seconds, 3) for name, seconds in spent.items()},
                }
            )
            shutil.rmtree(found.scoring.run.directory)
    return {"device": torch.cuda.get_device_name() if on_gpu else "cpu, one thread", "rows": rows}


def extrapolate(chosen: argparse.Namespace) -> dict[str, Any]:
    """What scoring all 126 layers of a 405B parent takes on one 80 GB device, from counts and three measured rates."""
    sizes = {name: size for name, size in LLAMA_405B.items() if name != "max_position_embeddings"}
    shape = ModelShape(num_hidden_layers=126, **sizes)
    config = RunConfig(score=ScoreConfig(exact_tokens=4096))
    counts = count(config, shape, DEFAULT, {"fit": 65_536, "calibration": 32_768}, 2048)
    flops = count_flops(config, shape, DEFAULT, counts, every=1)
    layer, head = shape.layer_parameters(shape.parent_layer), shape.vocab_size * shape.hidden_size
    read = 2 * (layer * (4 * counts.layers + counts.suffix_reads) + head * (1 + counts.suffix_sweeps))
    hours = {
        "solves": counts.layers * chosen.solve_seconds / 3600,
        "products": (flops.total - flops.solve) / (chosen.tflops * 1e12) / 3600,
        "reading, if nothing were computed": read / (chosen.read_gbps * 1e9) / 3600,
    }
    return {
        "rates": {"solve_seconds": chosen.solve_seconds, "tflops": chosen.tflops, "read_gbps": chosen.read_gbps},
        "counts": asdict(counts),
        "flops": asdict(flops),
        "read_tb": round(read / 1e12, 2),
        "streams_tb": round(2 * shape.hidden_size * (shape.num_hidden_layers + 1) * (65_536 + 32_768) / 1e12, 2),
        "hours": {name: round(value, 2) for name, value in hours.items()},
    }


LAYERS = (9, 21)


def streams(sweep: Sweep, arrays: dict[str, np.ndarray], layer: int) -> dict[str, Tensor]:
    """The stream entering a layer, of the fitting text and of the other one."""
    return {
        part: StreamCheckpoints(sweep, torch.from_numpy(tokens.astype("int64")).to(sweep.device), upto=layer)[layer]
        for part, tokens in arrays.items()
    }


@torch.no_grad()
def errors(sweep: Sweep, library: LayerLibrary, specs: Sequence[LayerSpec], stream: Tensor) -> np.ndarray:
    """||what a candidate adds - what the parent's layer adds||^2 / ||the latter||^2 of each candidate."""
    math, found = sweep.math(stream.shape[1]), np.zeros(len(specs))
    wanted = layer_forward(library.parent, stream, math) - stream
    for row, added in CandidateOutputs(library, specs)(stream, math):
        found[row] = float((added - wanted).pow(2).sum() / wanted.pow(2).sum())
    return found


def bld(chosen: argparse.Namespace) -> dict[str, Any]:
    """Layers 9 and 21, default space: error after block-local distillation over error of the closed-form fit."""
    parent, device = open_parent(chosen.parent), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sweep = make_sweep(parent, device)
    arrays = texts(parent, chosen.sequences or 16, 512)
    rows = []
    for layer in LAYERS:
        weights, entering = sweep.layer(layer), streams(sweep, arrays, layer)
        specs = DEFAULT.layer_candidates(parent.shape, layer)[1:]
        fitted = fit_layer(sweep, weights, entering["fit"], specs, FitConfig(pseudo_tokens=3000.0))
        before = {part: errors(sweep, fitted, specs, stream) for part, stream in entering.items()}
        for tokens in (32_768, 131_072):
            library = replace(fitted, entries=dict(fitted.entries))
            started = time.perf_counter()
            distill_layer(sweep, library, entering["fit"], specs, LocalConfig(tokens, 1e-3, 0))
            seconds = time.perf_counter() - started
            ratio = {part: errors(sweep, library, specs, entering[part]) / before[part] for part in entering}
            heldout = dict(zip(map(str, specs), ratio["calibration"].round(3).tolist(), strict=True))
            rows.append(
                {"layer": layer, "tokens": tokens, "seconds": round(seconds, 1), "candidates": len(specs)}
                | {"fitting_text": round(float(ratio["fit"].mean()), 3)}
                | {"other_text": round(float(ratio["calibration"].mean()), 3), "by_candidate": heldout}
            )
            print(json.dumps(rows[-1]), flush=True)
    return {"fit_tokens": arrays["fit"].size, "rows": rows}


def order(chosen: argparse.Namespace) -> dict[str, Any]:
    """Error of narrower FFNs, fitted on 8,192 tokens, by the order in which their channels are chosen."""
    parent = open_parent(chosen.parent)
    sweep = make_sweep(parent, torch.device("cpu"))
    arrays, widths = texts(parent, 16, 512), [256, 512, 768, 1024, 1280]
    rows = []
    for layer in (3, 15, 26):
        weights = sweep.layer(layer)
        output = weights["mlp.down_proj.weight"].T
        sums = {part: ffn_statistics(sweep, weights, stream) for part, stream in streams(sweep, arrays, layer).items()}
        gram, cross = sums["fit"].gram, sums["fit"].cross
        orders = {
            "contribution": lambda g=gram, w=output: contribution(g, w).argsort(descending=True),
            "greedy, 5 blocks": lambda g=gram, c=cross: greedy_order(g, c, widths[-1], 5, 1 << 30),
            "greedy, 48 blocks": lambda g=gram, c=cross: greedy_order(g, c, widths[-1], 48, 1 << 30),
            "greedy, 96 blocks": lambda g=gram, c=cross: greedy_order(g, c, widths[-1], 96, 1 << 30),
            "greedy, growing blocks": lambda g=gram, c=cross: greedy_order(g, c, widths[-1]),
        }
        for name, make in orders.items():
            channels = make()
            fits = dict(sums["fit"].solve_prefixes(output, channels, widths, 3000.0))
            for part, own in sums.items():
                rows.append({"layer": layer, "order": name, "text": part})
                rows[-1] |= {str(w): round(relative_error(own, output, channels[:w], fits[w]), 4) for w in widths}
                print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


@torch.no_grad()
def ffn_statistics(sweep: Sweep, weights: Weights, stream: Tensor) -> Statistics:
    """From the activations of the parent's FFN to its output."""
    statistics = Statistics(weights["mlp.down_proj.weight"].shape[1], stream.shape[2], sweep.device)
    math = sweep.math(stream.shape[1])
    for _, (h,) in sweep.read(stream):
        middle = h + project(weights, "self_attn.o_proj", attention_context(weights, h, math))
        activation = ffn_activation(weights, middle, math)
        statistics.add(activation, project(weights, "mlp.down_proj", activation))
    return statistics.reduce()


def relative_error(statistics: Statistics, output: Tensor, channels: Tensor, fitted: Tensor) -> float:
    """||A_S W - A W0||^2 / ||A W0||^2 out of the sums alone."""
    gram, cross, w = statistics.gram, statistics.cross[channels], fitted.to(statistics.gram)
    total = float((output * (gram @ output.to(gram))).sum())
    own = gram[channels][:, channels]
    return (total - 2 * float((w * cross).sum()) + float((w * (own @ w)).sum())) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"cpu": cpu, "gpu": gpu, "large": large, "huge": huge, "growth": growth, "bld": bld, "order": order} | {
        "extrapolate": extrapolate
    }
    parser.add_argument("table", choices=tables)
    parser.add_argument("--parent", default="smollm2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--directory", help="where `large` and `huge` keep their random parents")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--solve-seconds", type=float, default=58.0, help="`extrapolate`: solves of one layer")
    parser.add_argument("--tflops", type=float, default=250.0, help="`extrapolate`: of everything else")
    parser.add_argument("--read-gbps", type=float, default=3.0, help="`extrapolate`: of the disk")
    parser.add_argument("--no-probe", action="store_true", help="do not time a layer first: no ETA to compare with")
    chosen = parser.parse_args()
    if chosen.no_probe:
        Probe.seconds = lambda self: {}  # type: ignore[method-assign]
    result = tables[chosen.table](chosen)
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
