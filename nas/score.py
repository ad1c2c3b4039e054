"""`nas score`: fit the candidates of every layer, score them, write the table.

    1. forward: the parent over the fitting and the calibration text, keeping the streams that enter each layer
    2. backward, from the last layer to the first, each layer once:
       fit its candidates                                      -> library/layer_NNN.safetensors
       score them in one pass, move the gradients on           -> scores/one_pass_NNN.json
       put those of the guard set in its place, exactly        -> scores/exact_NNN.json
    3. the map from one-pass to nats, and the table            -> scores.csv, score.json

Every file is written whole, by a thread of its own, so a run that was cut off goes on where it stopped, layer by layer.
Under torchrun the sequences are shared out; rank 0 writes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from blocks.candidates import FitConfig, fit_layer
from blocks.engines import ENGINES, unsupported
from blocks.errors import ConfigError
from blocks.files import clear_leftovers, save_json
from blocks.layer import Weights
from blocks.library import BlockLibrary, LayerLibrary
from blocks.parent import Parent
from blocks.ranks import ALONE, Ranks
from blocks.spec import Architecture, LayerSpec
from blocks.sweep import StreamCheckpoints
from distill.block_local import LocalConfig, distill_layer
from distill.metrics import peak_memory
from nas.config import ESTIMATORS
from nas.data import load_pack, prepare_data, to_tokens
from nas.engine import Arrangement, make_sweep
from nas.engine_config import EngineConfig
from nas.exact import ExactScores, run_reference
from nas.guard import guard_set
from nas.plan import EXACT_STREAMS, ScorePlan, plan_score
from nas.progress import Reporter
from nas.rounds import choices, rounds, settled
from nas.run import Run
from nas.score_files import ScoreFiles
from nas.scoring import one_pass_scores, output_gradients
from nas.table import ScoreRow, save_table
from nas.tabulate import Tabulator
from search_spaces import SearchSpace, load_space

FITTING, EXACT = "Fitting and scoring", "Exact scores"


class Save(Protocol):
    """Calls a function that saves, in a thread of its own."""

    def __call__(self, function: Callable[..., None], *arguments: Any) -> None: ...


@dataclass(frozen=True)
class Todo:
    """Layers of a round to be fitted, to be scored in one pass, and with exact scores to be taken."""

    number: int
    unfitted: list[int]
    unscored: list[int]
    unguarded: list[int]

    @property
    def layers(self) -> set[int]:
        return {*self.unfitted, *self.unscored, *self.unguarded}


@dataclass
class Forward:
    """What the way back needs of the way forward."""

    fitting: StreamCheckpoints | None = None
    scoring: StreamCheckpoints | None = None
    gradients: Tensor | None = None
    exact: ExactScores | None = None


@dataclass
class Scoring:
    """One run of `nas score`: the engine, the candidates of each layer, and where things go."""

    run: Run
    parent: Parent
    space: SearchSpace
    device: torch.device
    reporter: Reporter
    engine: EngineConfig = field(default_factory=EngineConfig)
    ranks: Ranks = ALONE

    def __post_init__(self) -> None:
        self.config = self.run.config.score
        shape = self.parent.shape
        self.layers = shape.layers
        self.candidates = [self.space.layer_candidates(shape, index) for index in self.layers]
        self.changed = [[spec for spec in specs if spec != shape.parent_layer] for specs in self.candidates]
        self.library = BlockLibrary(self.run.path("library"))
        self.files = ScoreFiles(self.run.path("scores"))
        if self.config.method == "one-pass":
            self.guarded = guard_set(shape, self.candidates, self.config.exact_share, self.config.seed)
        else:
            self.guarded = self.changed
        self.table = Tabulator(self.run, self.parent.shape, self.candidates, self.files)
        self.spent: dict[str, float] = {}

    @contextmanager
    def clock(self, what: str) -> Iterator[None]:
        """Adds up the seconds spent on one kind of work."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - started

    # ---- before

    def prepare(self) -> None:
        """Packs the text (rank 0; the others wait for it)."""
        if self.ranks.main:
            parent = self.parent
            with self.reporter.bar("Reading and packing text", 1) as (bar, task):
                advance = lambda done, total: bar.update(task, completed=done, total=total)  # noqa: E731
                prepare_data(
                    self.run.config.data, parent.tokenizer(), parent.shape.vocab_size, self.run.path("data"), advance
                )
        self.ranks.wait()

    def plan(self) -> ScorePlan:
        """What it takes, printed before anything is done; also decides where everything lies."""
        tokens = {part: self.pack(part).size for part in ("fit", "calibration")}
        length = self.pack("fit").shape[1]
        plan = plan_score(
            self.run.config,
            self.parent,
            self.space,
            self.device,
            self.engine,
            self.ranks,
            tokens,
            length,
            self.run.directory,
        )
        self.arrange(plan.arrangement, plan.keeps_library)
        return plan

    def arrange(self, how: Arrangement, keeps_library: bool) -> None:
        """Sets up the engine as rank 0 would have it."""
        self.how, self.keeps_library = self.ranks.agree((how, keeps_library))
        dtype = getattr(torch, self.config.compute_dtype)
        self.sweep = make_sweep(self.parent, self.device, dtype, self.how, self.ranks, self.run.directory)

    def pack(self, part: str) -> np.ndarray:
        return load_pack(self.run.path("data") / f"{part}.npy")

    def tokens(self, part: str, most: int | None = None, rows: slice = slice(None)) -> Tensor:
        """This rank's share of a part's first `most` tokens, or of some of its sequences [N, S]."""
        everything = to_tokens(self.pack(part)[rows], most, torch.device("cpu"))
        return everything[self.ranks.share(len(everything))].to(self.device)

    # ---- the sweep

    def rounds(self) -> list[slice]:
        """Which calibration sequences are scored together; more than one with `auto_tokens`."""
        sequences = len(self.pack("calibration"))
        if not self.config.auto_tokens or self.config.method == "exact":
            return [slice(0, sequences)]
        if not self.keeps_library:
            raise ConfigError("--auto-tokens scores in rounds and needs the library on disk; add --library keep")
        return rounds(sequences)

    def score(self) -> list[ScoreRow]:
        """All rounds, or as many as it takes; returns the table."""
        before: list[list[str]] | None = None
        for number, part in enumerate(self.rounds()):
            self.score_round(number, part)
            rows = self.ranks.agree(self.table.rows(number + 1) if self.ranks.main else [])
            if self.config.auto_tokens:
                now = choices(rows, self.parent.shape)
                if before is not None and settled(rows, before, now):
                    self.reporter.say(f"  {part.stop} sequences are enough: the chosen architectures stay the same")
                    break
                before = now
        return rows

    def score_round(self, number: int, part: slice) -> None:
        """Fits and scores what is missing, layer by layer from the last to the first."""
        todo: Todo = self.ranks.agree(self._missing(number))
        if not todo.layers:
            return
        exact = sum(len(self.guarded[index]) for index in todo.unguarded)
        steps = {FITTING: len(self.layers) - min(todo.layers), EXACT: exact}
        with self._saver() as save, self.reporter.tasks(steps) as advance:
            forward = self._forward(todo, part, save, lambda: advance(EXACT))
            for index, weights in self.sweep.layers(reversed(range(min(todo.layers), len(self.layers)))):
                self._visit(index, weights, todo, forward, save)
                advance(FITTING)
            if forward.exact is not None:
                with self.clock("exact"):
                    forward.exact.flush()

    def _missing(self, number: int) -> Todo:
        unscored = [i for i in self.layers if not self.files.has("one_pass", i, number)]
        unguarded = [i for i in self.layers if self.guarded[i] and not self.files.has("exact", i)]
        if self.config.method == "exact":
            unscored = []
        if number > 0:
            unguarded = []
        if self.keeps_library:
            unfitted = [i for i in self.layers if not self.library.has(i)]
        else:
            unfitted = sorted({*unscored, *unguarded})
        return Todo(number, unfitted, unscored, unguarded)

    def _forward(self, todo: Todo, part: slice, save: Save, advance: Callable[[], None]) -> Forward:
        """Runs the parent over the texts that are needed."""
        forward = Forward()
        with self.clock("parent"):
            if todo.unguarded:
                forward.exact = self._exact_scores(todo.unguarded, save, advance)
            if todo.unfitted:
                forward.fitting = self._streams("fit", upto=max(todo.unfitted))
            if todo.unscored:
                forward.scoring = self._streams("calibration", part)
        if forward.scoring is not None:
            with self.clock("vocabulary"):
                forward.gradients = self._gradients(forward.scoring, part)
        return forward

    def _visit(self, index: int, weights: Weights, todo: Todo, forward: Forward, save: Save) -> None:
        """One layer on the way back: builds or reads its candidates, scores them, moves the gradients on."""
        with self.clock("fit"):
            library = self._library(index, weights, forward.fitting if index in todo.unfitted else None, save)
        if forward.scoring is not None and forward.gradients is not None and index >= min(todo.unscored):
            specs = self.changed[index] if index in todo.unscored else []
            with self.clock("one_pass"):
                stream = forward.scoring.take(index)
                found = one_pass_scores(self.sweep, library, specs, stream, forward.gradients, self._estimators)
            if specs:
                gathered = {name: self.ranks.gather(values).cpu() for name, values in found.items()}
                save(self.files.save, "one_pass", index, todo.number, specs, gathered)
        if forward.exact is not None and index in todo.unguarded:
            wide = {name: tensor.float() for name, tensor in weights.items()}
            with self.clock("exact"):
                forward.exact.add(index, library.at(wide), self.guarded[index])

    def _streams(self, part: str, rows: slice = slice(None), upto: int | None = None) -> StreamCheckpoints:
        return StreamCheckpoints(self.sweep, self.tokens(part, rows=rows), self.how.every, upto=upto)

    def _gradients(self, streams: StreamCheckpoints, rows: slice) -> Tensor:
        first = rows.start + self.ranks.share(rows.stop - rows.start).start
        return output_gradients(
            self.sweep, streams.take(len(self.layers)), self.config.label_samples, self.config.seed, first
        )

    def _library(self, index: int, weights: Weights, streams: StreamCheckpoints | None, save: Save) -> LayerLibrary:
        """The candidates of one layer: built now, or read."""
        if streams is not None:
            library = self.build(index, weights, streams.take(index))
            if library.place is not None and self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # the saver reads what is still on its way to host memory
            if self.keeps_library:
                save(self.library.save, index, library)
            return library
        if self.keeps_library and self.library.has(index):
            return self.library.open(index, weights)
        return LayerLibrary(weights)  # nothing of it is scored: gradients only pass through

    def build(self, index: int, weights: Weights, stream: Tensor) -> LayerLibrary:
        """Builds every candidate of a layer from the stream [N, S, D] of the fitting text that enters it."""
        config = FitConfig(self.config.fit, self.config.pseudo_tokens)
        library = fit_layer(self.sweep, weights, stream, self.changed[index], config)
        if self.config.bld_tokens:
            local = LocalConfig(self.config.bld_tokens, self.config.bld_learning_rate, self.config.seed)
            distill_layer(self.sweep, library, stream, self.changed[index], local)
        return library

    def rebuild(self, needed: Sequence[Collection[LayerSpec]]) -> None:
        """Builds candidates that are not on disk, a collection for each layer, as they were when they were scored."""
        lacking = {
            index: wanted
            for index, specs in enumerate(needed)
            if (wanted := [s for s in specs if s in self.changed[index] and not self.library.has(index, s)])
        }
        if not lacking:
            return
        how = self.run.read("score.json", "score")["plan"]["arrangement"]
        self.arrange(Arrangement(**how), keeps_library=False)
        stream = self.sweep.embed(self.tokens("fit"))
        with self.reporter.task("Building candidates again", max(lacking) + 1) as advance:
            for index, weights in self.sweep.layers(range(max(lacking) + 1)):
                if index in lacking:
                    library = self.build(index, weights, stream)
                    for spec in lacking[index]:
                        self.library.save(index, library, spec)
                stream = self.sweep.forward(weights, stream)
                advance()

    def _exact_scores(self, unguarded: Sequence[int], save: Save, advance: Callable[[], None]) -> ExactScores:
        tokens = self.tokens("calibration", self.config.exact_tokens)
        sweep = self.sweep.at(torch.float32)
        done: dict[int, dict[LayerSpec, Tensor]] = {index: {} for index in unguarded}

        def on_score(layer: int, spec: LayerSpec, kl: Tensor) -> None:
            done[layer][spec] = self.ranks.gather(kl)
            advance()
            if len(done[layer]) == len(self.guarded[layer]):
                kl = torch.stack([done[layer][spec] for spec in self.guarded[layer]])
                save(self.files.save, "exact", layer, 0, self.guarded[layer], {"kl": kl.cpu()})

        return ExactScores(sweep, run_reference(sweep, tokens, self.how.every), EXACT_STREAMS, on_score)

    @property
    def _estimators(self) -> tuple[str, ...]:
        return tuple(name for name in ESTIMATORS if name != "fisher" or self.config.estimator == "fisher")

    # ---- files

    @contextmanager
    def _saver(self) -> Iterator[Save]:
        """Saves in the order given, in a thread of its own; the sweep goes on, at most two files ahead."""
        with ThreadPoolExecutor(1) as writer:
            waiting: list[Future[None]] = []

            def save(function: Callable[..., None], *arguments: Any) -> None:
                if not self.ranks.main:
                    return
                while len(waiting) >= 2:
                    waiting.pop(0).result()
                waiting.append(writer.submit(function, *arguments))

            yield save
            for future in waiting:
                future.result()


def require_served(parent: Parent, target: str) -> None:
    """Raises ConfigError if the target engine could serve no child of this parent."""
    rope = (parent.config.rope_parameters or {}).get("rope_type") or "default"
    if because := unsupported(ENGINES[target], parent.shape, parent.shape.parent_architecture, rope):
        raise ConfigError(
            f"--target {target} does not serve children of {parent.family.model_type}: {'; '.join(because)}; "
            "use --target transformers"
        )


def run_score(
    run: Run,
    parent: Parent,
    device: torch.device,
    reporter: Reporter,
    engine: EngineConfig | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Does what is missing of `nas score` in a run directory and returns its summary (score.json)."""
    space = load_space(run.config.space, run.config.target)
    require_served(parent, space.target)
    scoring = Scoring(run, parent, space, device, reporter, engine or EngineConfig(), ranks)
    if ranks.main:
        for directory in (run.directory, scoring.library.directory, run.path("scores")):
            clear_leftovers(directory)
    scoring.prepare()
    if ranks.agree(is_done(scoring)):
        reporter.say(f"Scores are there already: {run.path('scores.csv')}")
        return run.read("score.json", "score")
    plan = scoring.plan()
    for line in plan.lines():
        reporter.say(line)
    started = time.perf_counter()
    rows = scoring.score()
    if ranks.main:
        summary = scoring.table.summary() | {
            "device": str(device),
            "seconds": round(time.perf_counter() - started, 1),
            "seconds_by_part": {what: round(seconds, 2) for what, seconds in scoring.spent.items()},
            "bytes_read": scoring.sweep.bytes_read,
            "peak_memory_gb": round(peak_memory(device) / 1e9, 3),
            "plan": plan.to_json(),
        }
        save_table(run.path("scores.csv"), rows)
        save_json(run.path("score.json"), summary)
    ranks.wait()
    return run.read("score.json", "score")


def build_again(
    run: Run,
    parent: Parent,
    device: torch.device,
    reporter: Reporter,
    architectures: Collection[Architecture],
) -> None:
    """Builds the candidates that these architectures need and the library on disk lacks, by the settings that they were scored with."""
    space = load_space(run.config.space, run.config.target)
    scoring = Scoring(run, parent, space, device, reporter)
    scoring.rebuild([{architecture[index] for architecture in architectures} for index in scoring.layers])


def is_done(scoring: Scoring) -> bool:
    run = scoring.run
    if not (run.has("score.json") and run.has("scores.csv")):
        return False
    kept = run.read("score.json", "score").get("plan", {}).get("keeps_library", True)
    return not kept or all(scoring.library.has(index) for index in scoring.layers)
