"""What `nas score` and `nas search` are told: frozen dataclasses, defaults here and nowhere else.

What the device changes (small on a CPU, large on a GPU) overrides these, a recipe (YAML) overrides that, and a flag
overrides the recipe.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from blocks.errors import ConfigError
from distill.config import DistillConfig
from nas.costs import Scenario
from nas.data import DataConfig
from nas.engine_config import EngineConfig
from nas.limits import Range

T = TypeVar("T")
ESTIMATORS = ("tok", "seq", "fisher")
METHODS = ("one-pass", "exact", "both")
LIBRARIES = ("auto", "keep", "rebuild")
COMPUTE = ("float32", "bfloat16")
SAMPLERS = ("swap", "tpe", "nsga2", "random")
QUANTIZERS = ("nearest", "gptq")
LIMITS = ("budget_gb", "budget", "max_params", "max_kv_gb", "min_throughput", "max_latency_ms")


@dataclass(frozen=True)
class ScoreConfig:
    """How candidates are built and scored."""

    method: str = "one-pass"
    """"one-pass" (with a guard set scored exactly), "exact" (every candidate), or "both" (every candidate, compared)."""
    estimator: str = "tok"
    """Of the one-pass scores: "tok" (per token), "seq" (per sequence) or "fisher" (diagonal, the published one)."""
    auto_tokens: bool = False
    """Score a quarter of the calibration text, then half, then all, and stop when the chosen architectures stay the same,
    or as good to 1 %. Needs the library on disk."""
    compute_dtype: str = "float32"
    """Of fits and one-pass scores: "float32" or "bfloat16"; statistics are fp32 on a GPU and fp64 on a CPU, exact scores fp32."""
    library: str = "auto"
    """"keep" the fitted candidates on disk; "rebuild" those that a child needs when it is assembled; "auto": by size."""
    bld_tokens: int = 0
    """Tokens of block-local distillation that refine each fitted candidate; 0 leaves the closed-form fit."""
    bld_learning_rate: float = 1e-3
    """Peak learning rate of block-local distillation (Adam)."""
    fit: str = "fitted"
    """"fitted" in closed form, or "cut": the published initialisation, for comparison."""
    pseudo_tokens: float = 100.0
    """Weight of the cut matrix in each ridge fit, in tokens of typical channel energy."""
    label_samples: int = 4
    """Labels drawn per token for one-pass scores."""
    exact_tokens: int = 8192
    """Calibration tokens for exact scores."""
    exact_share: float = 0.05
    """Share of the candidates that are drawn at random into the guard set, beside skips and the first and last layer."""
    seed: int = 0
    """Of label sampling, the guard set, bootstrap intervals and block-local distillation."""

    def __post_init__(self) -> None:
        require("method", self.method, self.method in METHODS, f"one of {', '.join(METHODS)}")
        require("estimator", self.estimator, self.estimator in ESTIMATORS, f"one of {', '.join(ESTIMATORS)}")
        require("library", self.library, self.library in LIBRARIES, f"one of {', '.join(LIBRARIES)}")
        require("compute_dtype", self.compute_dtype, self.compute_dtype in COMPUTE, f"one of {', '.join(COMPUTE)}")
        require("bld_tokens", self.bld_tokens, self.bld_tokens >= 0, "0 or more")
        require("bld_learning_rate", self.bld_learning_rate, self.bld_learning_rate > 0, "above 0")
        require("fit", self.fit, self.fit in ("fitted", "cut"), "fitted or cut")
        require("pseudo_tokens", self.pseudo_tokens, 0 < self.pseudo_tokens < math.inf, "a number above 0")
        require("exact_share", self.exact_share, 0 <= self.exact_share <= 1, "between 0 and 1")
        for name in ("label_samples", "exact_tokens"):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        require("seed", self.seed, self.seed >= 0, "0 or more")


@dataclass(frozen=True)
class SearchConfig:
    """What the child must meet and how it is looked for. A limit is a number or a range: 80, "60:80", "60:", ":80"."""

    budget_gb: float | str | None = None
    """Weights + KV cache + reserve, in GB (1e9 bytes)."""
    budget: float | str | None = None
    """Instead of GB: the share of the parent's attention and FFN weights and KV cache to keep."""
    max_params: float | str | None = None
    """Parameters, embeddings and head counted."""
    max_kv_gb: float | str | None = None
    """KV cache of the scenario, in GB."""
    min_throughput: float | str | None = None
    """Generated tokens a second of a whole batch: batch x output / (time to first token + output x time per token)."""
    max_latency_ms: float | str | None = None
    """Milliseconds of a whole request; or "TTFT,TPOT": to the first token, and per output token (either may be empty)."""
    clock: str | None = None
    """Where times come from: a profile of `nas bench`, or a datasheet (A100, H100, H200, B200, L40S, RTX4090)."""
    sweep: str | None = None
    """"0.9:0.5:0.05": a whole family of children at these shares instead of one budget."""
    precisions: str = "bf16"
    """Number formats that matrices may have, such as "bf16,fp8,nvfp4" (blocks/formats.py); each subblock gets its own."""
    precision_tokens: int = 8192
    """Calibration tokens for the scores of precisions."""
    quantizer: str = "nearest"
    """How what has a precision is rounded, in scores, trials and the child: to "nearest", or by "gptq" on the fitting text."""
    verify: int = 8
    """How many near-optima of the additive problem are assembled, refitted and measured by true KL."""
    distance: int = 3
    """In how many layers those differ from one another, at least."""
    path_steps: int = 10
    """Steps of the path from the parent to the budget, each scored around the child that the last one left; 0 is no path."""
    path_tokens: int = 16_384
    """Calibration tokens for scores around a child."""
    trials: int = 48
    """True KLs in all: near-optima, path, baselines, and then what the sampler proposes."""
    sampler: str = "swap"
    """"swap" (ours), or Optuna's "tpe", "nsga2" or "random", for comparison."""
    prune: bool = True
    """Whether a proposal that is surely worse than the best child is given up half-way."""
    finalists: int = 4
    """Diverse children that are healed a little before the last choice; 1 takes the best true KL without."""
    heal_tokens: int = 1_000_000
    """Tokens that each of the last two finalists is healed on; with four, all four are healed on half of them first."""
    refit: bool = True
    """Whether assembled children get the closed-form refit sweep."""
    refit_pseudo_tokens: float = 1000.0
    """Weight of the present matrices in the refit sweep, in tokens of typical channel energy."""
    verify_tokens: int = 32_768
    """Calibration tokens for the true KL of assembled children."""
    storage: str | None = None
    """An Optuna storage URL that many workers share; the run's study.journal if None."""
    seed: int = 0
    """Of proposals, random baselines and the labels of the path."""

    def __post_init__(self) -> None:
        if self.budget_gb is not None and self.budget is not None:
            raise ConfigError(
                "give one budget: --budget-gb 80 (weights + KV cache in GB), or --budget 0.6 (share of the parent's)"
            )
        if all(getattr(self, name) is None for name in ("sweep", *LIMITS)):
            raise ConfigError(
                "give a limit: --budget-gb 80 (weights + KV cache in GB), --budget 0.6 (share of the parent's), --max-params, --max-kv-gb, "
                "--min-throughput or --max-latency-ms"
            )
        _ = self.ranges
        if (shares := self._range("budget")) is not None:
            require(
                "budget",
                self.budget,
                all(end is None or end <= 1 for end in (shares.low, shares.high)),
                "a share between 0 and 1",
            )
        if self.sweep is not None:
            require(
                "sweep",
                self.sweep,
                self.budget is None and self.budget_gb is None,
                "given without --budget and --budget-gb",
            )
            _ = self.shares
        require("precisions", self.precisions, bool(self.precisions.strip(" ,")), "formats, such as bf16,fp8,nvfp4")
        require("quantizer", self.quantizer, self.quantizer in QUANTIZERS, " or ".join(QUANTIZERS))
        if self.quantizer != "nearest":
            require("quantizer", self.quantizer, self.refit, "nearest without the refit sweep")
            rounds = any(name.strip() not in ("", "bf16") for name in self.precisions.split(","))
            require("quantizer", self.quantizer, rounds, "nearest without --precisions")
        require("sampler", self.sampler, self.sampler in SAMPLERS, f"one of {', '.join(SAMPLERS)}")
        require(
            "refit_pseudo_tokens", self.refit_pseudo_tokens, 0 < self.refit_pseudo_tokens < math.inf, "a number above 0"
        )
        for name in (
            "verify",
            "verify_tokens",
            "distance",
            "path_tokens",
            "trials",
            "finalists",
            "heal_tokens",
            "precision_tokens",
        ):
            require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("path_steps", "seed"):
            require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        require("seed", self.seed, self.seed < 2**32, "below 2^32, as Optuna's samplers take it")

    def _range(self, name: str) -> Range | None:
        value = getattr(self, name)
        if value is None or (name == "max_latency_ms" and "," in str(value)):
            return None
        return Range.parse(value, flag(name), least=name == "min_throughput")

    @property
    def ranges(self) -> dict[str, Range]:
        """What is asked for, by the name of its limit (nas/limits.py), in GB, parameters, shares, tokens/s and ms."""
        names = {"budget_gb": "memory", "budget": "share", "max_params": "parameters", "max_kv_gb": "kv"}
        names |= {"min_throughput": "throughput", "max_latency_ms": "request"}
        found = {limit: wanted for name, limit in names.items() if (wanted := self._range(name)) is not None}
        if self.max_latency_ms is not None and "," in str(self.max_latency_ms):
            texts = str(self.max_latency_ms).split(",")
            if len(texts) != 2 or not any(text.strip() for text in texts):
                raise ConfigError(
                    f"--max-latency-ms {self.max_latency_ms}: write TTFT,TPOT, such as 400,15, or 400, or ,15"
                )
            parts = zip(("ttft", "tpot"), texts, strict=True)
            found |= {limit: Range.parse(text, flag("max_latency_ms")) for limit, text in parts if text.strip()}
        return found

    def ranges_at(self, budget: float | None) -> dict[str, Range]:
        """`ranges`, with a share of the parent as the memory budget where one is given (a member of a `sweep`)."""
        return self.ranges if budget is None else {"share": Range.parse(budget, "--sweep"), **self.ranges}

    @property
    def shares(self) -> list[float]:
        """The budgets of `sweep`, as shares, from the first to the last."""
        try:
            first, last, step = (float(text) for text in str(self.sweep).split(":"))
        except ValueError:
            raise ConfigError(
                f"--sweep {self.sweep}: write FROM:TO:STEP in shares of the parent, such as 0.9:0.5:0.05"
            ) from None
        require(
            "sweep",
            self.sweep,
            0 < last <= first <= 1 and step > 0,
            "FROM:TO:STEP with 1 >= FROM >= TO > 0 and STEP > 0",
        )
        return [round(first - index * step, 9) for index in range(int((first - last) / step + 1e-6) + 1)]


@dataclass(frozen=True)
class RunConfig:
    """The settings that a run directory belongs to, kept in its config.yaml."""

    parent: str = "smollm2"
    """A Hugging Face directory, a hub id, a GGUF file, or an embedded name."""
    space: str = "default"
    """A recipe of search_spaces/ by name, or a YAML file."""
    target: str = "vllm"
    """The engine that must serve the child."""
    data: DataConfig = field(default_factory=DataConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)


ON_CPU: dict[str, dict[str, Any]] = {
    "data": {"fit_tokens": 8192, "calibration_tokens": 4096, "heldout_tokens": 8192, "train_tokens": 2_000_000},
    # Little text asks for a stronger hold on the parent's own matrices (benchmarks/priors.py).
    "score": {"exact_tokens": 512, "pseudo_tokens": 3000.0},
    "search": {
        "verify": 2,
        "verify_tokens": 4096,
        "precision_tokens": 1024,
        "refit_pseudo_tokens": 10_000.0,
        "path_steps": 0,
        "path_tokens": 2048,
        "trials": 6,
        "finalists": 1,
    },
    "distill": {
        "tokens": 32_768,
        "batch_sequences": 4,
        "sequence_length": 512,
        "micro_batch": 2,
        "eval_tokens": 2048,
        "eval_every": 8,
    },
}
ON_GPU: dict[str, dict[str, Any]] = {
    "score": {"compute_dtype": "bfloat16"},
    "distill": {
        "tokens": 10_000_000,
        "batch_sequences": 32,
        "sequence_length": 1024,
        "micro_batch": 32,
        "optimizer": "muon",
        "learning_rate": 1e-3,
        "compute_dtype": "bfloat16",
        "chunk_tokens": 4096,
    },
}


def flag(name: str) -> str:
    """A setting as the option that sets it."""
    return f"--{name.replace('_', '-')}"


def require(name: str, value: object, valid: bool, wanted: str) -> None:
    if not valid:
        raise ConfigError(f"{name} is {value!r}; it must be {wanted}")


SECTIONS: dict[str, type] = {
    "run": RunConfig,
    "data": DataConfig,
    "score": ScoreConfig,
    "search": SearchConfig,
    "scenario": Scenario,
    "distill": DistillConfig,
    "engine": EngineConfig,
}


STAGES = "stages"


def load_recipe(path: Path | None) -> dict[str, dict[str, Any]]:
    """Reads a recipe: sections run, data, score, search, scenario, distill, engine, each with keys of its dataclass.

    Raises ConfigError for a file that is not there or not YAML, and for an unknown section or key, with the nearest one.
    """
    if path is None:
        return {}
    try:
        recipe = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"--recipe {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    sections = _mapping(path, "the recipe", recipe, list(SECTIONS))
    for name, section in sections.items():
        nested = SECTIONS if name == "run" else ()  # its data and score are sections of their own
        known = [f.name for f in fields(SECTIONS[name]) if f.name not in nested]
        _mapping(path, name, section, [*known, STAGES] if name == "distill" else known)
        for number, stage in enumerate(_stages(path, section) if name == "distill" else [], start=1):
            _mapping(path, f"distill.stages[{number}]", stage, known)
    return sections


def _stages(path: Path, section: dict[str, Any]) -> list[Any]:
    stages = section.get(STAGES, [])
    if not isinstance(stages, list) or (STAGES in section and not stages):
        raise ConfigError(
            f"{path}: distill.stages must be a list of stages, each a mapping such as {{loss: kl, tokens: 10000000}}"
        )
    return stages


def _mapping(path: Path, where: str, value: Any, known: list[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: {where} must be a mapping with keys {', '.join(known)}")
    for key in value:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"{path}: {where}: unknown key {key!r}{hint}; known: {', '.join(known)}")
    return value


def build(
    kind: type[T],
    recipe: dict[str, dict[str, Any]],
    flags: dict[str, Any],
    device: str,
    own: dict[str, Any] | None = None,
) -> T:
    """A config of `kind` out of defaults, those of the device ("cpu" or another), `own` ones, its recipe section, and given flags."""
    section = next(name for name, known in SECTIONS.items() if known is kind)
    by_device = (ON_CPU if device == "cpu" else ON_GPU).get(section, {}) | (own or {})
    given = {name: value for name, value in flags.items() if value is not None}
    values = by_device | {name: value for name, value in recipe.get(section, {}).items() if name != STAGES} | given
    types = get_type_hints(kind)
    for name, value in values.items():
        if not _is_of(value, types[name]):
            raise ConfigError(f"{section}.{name} is {value!r}; it must be {_in_words(types[name])}")
    return kind(**values)


def _is_of(value: Any, wanted: Any) -> bool:
    if get_origin(wanted) is tuple:
        return isinstance(value, (tuple, list)) and all(
            _is_of(item, kind) for item, kind in zip(value, get_args(wanted), strict=False)
        )
    if get_args(wanted):  # X | None
        return any(_is_of(value, kind) for kind in get_args(wanted))
    if wanted in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if wanted is float else wanted)


def _in_words(wanted: Any) -> str:
    if get_origin(wanted) is tuple:
        return "a list of " + " and ".join(map(_in_words, get_args(wanted)))
    if get_args(wanted):
        return " or ".join(_in_words(kind) for kind in get_args(wanted) if kind is not type(None))
    # 6e-4 is text to YAML.
    words = {int: "a whole number", float: "a number (with a dot: 6.0e-4)", str: "text", bool: "true or false"}
    return words.get(wanted, wanted.__name__)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON and YAML values."""
    assert is_dataclass(config) and not isinstance(config, type)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
