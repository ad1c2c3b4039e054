"""`nas eval`: parent and children side by side, on texts, multiple-choice questions and prompts.

A model is loaded only if something of it is missing in eval.json, and the parent is held beside it only while texts are compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from blocks.errors import ConfigError, UnsupportedModelError
from blocks.parent import open_parent
from nas.accuracy import summarise
from nas.choice_files import Question, load_questions, questions_digest
from nas.data import load_pack
from nas.eval_store import PARENT, EvalStore, Measure, Subject, fingerprint, key_of
from nas.harness import harness_version, names_of, run_harness
from nas.language_model import LanguageModel, load_language_model
from nas.multiple_choice import score_choices
from nas.progress import Reporter
from nas.run import Run, digest
from nas.texts import Text, compare_on_text, dtype_named, read_text

HELD_OUT = "held-out"
NO_TEXT = "none"
OF_A_RUN = ("child", "healed")
PROMPTS = ("The with statement in Python", "The capital of France is", "Once upon a time, there was")
TEXT_TOKENS = {"cpu": 4096, "cuda": 65_536}
BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}


@dataclass(frozen=True)
class EvalConfig:
    """What is measured. Raises ConfigError for values that cannot work."""

    model: tuple[str, ...] = ()
    """Names of the run (child, healed), directories, or NAME=DIRECTORY; all that the run has if none."""
    data: tuple[str, ...] = ()
    """Texts: sources as for `nas score`, "held-out" for the run's own (alone if none is given), "none" for no text."""
    text_column: str = "text"
    """The column of .jsonl, .parquet and `datasets` that holds the text."""
    text_tokens: int | None = None
    """Most tokens of each text; 4,096 on a CPU and 65,536 on a GPU if None."""
    sequence_length: int = 512
    """Tokens per sequence of texts other than the run's own."""
    tasks: tuple[str, ...] = ()
    """Multiple-choice questions: see nas/choice_files.py."""
    harness: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, run by it."""
    limit: int | None = None
    """Most questions of a task."""
    seed: int = 0
    """Of the sample that `limit` draws, and of the order of documents."""
    prompt: tuple[str, ...] = PROMPTS
    """Prompts that each model continues."""
    sample_tokens: int = 48
    """Tokens of each continuation; 0 for none."""
    dtype: str = "float32"
    """Of weights and matrix products: float32 or bfloat16. Softmax and sums are fp32 or better."""
    batch_tokens: int | None = None
    """Tokens, padding counted, of one forward pass; 2,048 on a CPU and 32,768 on a GPU if None."""

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"--dtype is {self.dtype!r}; write float32 or bfloat16")
        for name, least in (("limit", 1), ("text_tokens", 1), ("batch_tokens", 1), ("sample_tokens", 0), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be {least} or more")
        if self.sequence_length < 2:
            raise ConfigError(f"--sequence-length is {self.sequence_length}; it must be at least 2")


# What is measured


def find_subjects(config: EvalConfig, parent: str, run: Run | None) -> list[Subject]:
    """The parent and the models beside it. Raises ConfigError or CheckpointError for one that is not there."""
    named: dict[str, Path] = {PARENT: _directory(parent)}
    given = config.model
    if not given and run is not None:
        given = tuple(name for name in OF_A_RUN if run.has(f"{name}/config.json"))
    for words in given:
        name, equals, where = words.partition("=")
        if not equals:
            own = run is not None and run.has(f"{words}/config.json")
            name, where = (words, str(run.path(words))) if own and run is not None else (_last(words), words)
        if words == PARENT:
            continue
        if name in named:
            raise ConfigError(f"--model {words}: two models are named {name}; write NAME={where}")
        try:
            named[name] = _directory(where)
        except ConfigError as error:
            raise ConfigError(f"--model {words}: {error}") from error
    return [Subject(name, str(path), fingerprint(path)) for name, path in named.items()]


def _last(path: str) -> str:
    return Path(path).name or path


def _directory(name: str) -> Path:
    """A directory as it is; else what `open_parent` makes of a GGUF file, a hub id or an embedded name."""
    path = Path(name).expanduser()
    return path if path.is_dir() else open_parent(name).path


def find_texts(config: EvalConfig, run: Run | None, tokenizer: Callable[[], Any], device: torch.device) -> list[Text]:
    """The texts. Raises DataError or ConfigError for one that is not there."""
    most = config.text_tokens or TEXT_TOKENS.get(device.type, TEXT_TOKENS["cuda"])
    sources = config.data or ((HELD_OUT,) if run is not None else ())
    if NO_TEXT in sources:
        if set(sources) != {NO_TEXT}:
            raise ConfigError(f"--data {NO_TEXT} beside other texts; leave it or them out")
        return []
    texts = []
    for source in dict.fromkeys(sources):
        if source == HELD_OUT:
            if run is None:
                raise ConfigError(f"--data {HELD_OUT} is a run's own text; give --run, or another text")
            texts.append(Text(HELD_OUT, load_pack(run.path("data") / "heldout.npy"), most))
            continue
        texts.append(read_text(source, config.text_column, tokenizer(), config.sequence_length, most, config.seed))
    return texts


@dataclass(frozen=True)
class Plan:
    """All that is to be measured, read and checked."""

    config: EvalConfig
    subjects: list[Subject]
    texts: dict[str, Text]
    questions: dict[str, list[Question]]
    measures: list[Measure]

    def missing(self, content: dict[str, Any]) -> list[tuple[Subject, list[Measure]]]:
        """What eval.json does not have, by model."""
        known = content["results"].keys()
        pairs = [(s, [m for m in self.measures if key_of(s.fingerprint, m.id) not in known]) for s in self.subjects]
        return [(subject, measures) for subject, measures in pairs if measures]

    def to_json(self, content: dict[str, Any]) -> dict[str, Any]:
        """For --dry-run."""
        missing = self.missing(content)
        return {
            "models": {subject.name: subject.path for subject in self.subjects},
            "measures": [
                f"{m.kind} {m.name}: {', '.join(f'{k} {v}' for k, v in m.about.items())}" for m in self.measures
            ],
            "to_measure": {subject.name: [m.name for m in measures] for subject, measures in missing},
        }


def make_plan(config: EvalConfig, parent: str, run: Run | None, device: torch.device) -> Plan:
    """Finds models, texts, questions and prompts. Raises NasError for what is not there, before anything is loaded."""
    harness = names_of(config.harness)
    version = harness_version() if harness else ""
    subjects = find_subjects(config, parent, run)
    of_parent = subjects[0]

    def tokenizer() -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(of_parent.path, trust_remote_code=False)

    texts = find_texts(config, run, tokenizer, device)
    questions = load_questions(config.tasks, config.limit, config.seed)
    measures = []
    for text in texts:
        about = {"tokens": min(text.tokens or text.pack.size, text.pack.size), "sequence_length": text.pack.shape[1]}
        identity = digest("text", text.digest, of_parent.fingerprint, config.dtype)
        measures.append(Measure("text", text.name, identity, about))
    for name, own in questions.items():
        identity = digest("choices", name, questions_digest(own), config.dtype)
        measures.append(Measure("choices", name, identity, {"questions": len(own)}))
    for name in harness:
        about = {"limit": config.limit, "version": version}
        measures.append(Measure("harness", name, digest("harness", name, about, config.dtype), about))
    if config.sample_tokens and config.prompt:
        identity = digest("samples", config.prompt, config.sample_tokens, config.dtype)
        measures.append(Measure("samples", "samples", identity, {"tokens": config.sample_tokens}))
    if not measures:
        raise ConfigError("nothing to measure: give --data, --tasks, --harness or a --sample-tokens above 0")
    return Plan(config, subjects, {text.name: text for text in texts}, questions, measures)


# Measuring


class _Models:
    """The parent, held from its first use to the last, and one other model at a time."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device

    def load(self, subject: Subject) -> LanguageModel:
        if subject.fingerprint == self.plan.subjects[0].fingerprint:
            return self.parent
        return self._load(subject)

    @cached_property
    def parent(self) -> LanguageModel:
        return self._load(self.plan.subjects[0])

    def _load(self, subject: Subject) -> LanguageModel:
        dtype, beside = dtype_named(self.plan.config.dtype), Path(self.plan.subjects[0].path)
        return load_language_model(Path(subject.path), self.device, dtype, beside)

    def drop_parent(self) -> None:
        self.__dict__.pop("parent", None)


def run_eval(
    plan: Plan, store: EvalStore, device: torch.device, reporter: Reporter, search: str | None
) -> dict[str, Any]:
    """Measures what eval.json does not have yet and returns its content.

    Args:
        search: key of the run's search, which its children are of.
    """
    content = store.begin(plan.subjects, plan.measures, search)
    missing = plan.missing(content)
    if not missing:
        reporter.say(f"All of this is measured already: {store.path}")
    models = _Models(plan, device)
    later = {
        subject.name: any(m.kind == "text" for _, ms in missing[i:] for m in ms)
        for i, (subject, _) in enumerate(missing)
    }
    for subject, measures in missing:
        if not later[subject.name]:
            models.drop_parent()
        model = models.load(subject)
        for measure in measures:
            result = _measure(plan, subject, measure, model, models, reporter)
            content = store.add(subject, model.parameters, {measure.id: result})
        del model
    return content


def _measure(
    plan: Plan, subject: Subject, measure: Measure, model: LanguageModel, models: _Models, reporter: Reporter
) -> dict[str, Any]:
    config = plan.config
    batch_tokens = config.batch_tokens or BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
    where = f"{subject.name}: {measure.name}"
    if measure.kind == "text":
        return _on_text(plan.texts[measure.name], where, model, models, config.dtype, batch_tokens, reporter)
    if measure.kind == "choices":
        questions = plan.questions[measure.name]
        with reporter.bar(f"{where} (tokens)", 1) as (bar, task):
            scores = score_choices(
                model, questions, batch_tokens, lambda done, total: bar.update(task, completed=done, total=total)
            )
        return summarise(questions, scores)
    if measure.kind == "harness":
        reporter.say(f"{where} by lm-evaluation-harness ...")
        return {"tasks": run_harness(model, measure.name, config.limit, max(1, batch_tokens // 512))}
    samples = []
    with reporter.task(f"{where}", len(config.prompt)) as advance:
        for prompt in config.prompt:
            samples.append({"prompt": prompt, "text": model.continue_text(prompt, config.sample_tokens)})
            advance()
    return {"samples": samples}


def _on_text(
    text: Text, where: str, model: LanguageModel, models: _Models, dtype: str, batch_tokens: int, reporter: Reporter
) -> dict[str, Any]:
    """The comparison, or {"note": why there is none}: one odd model must not take the table from the others."""
    try:
        with reporter.bar(f"{where} (sequences)", 1) as (bar, task):
            return compare_on_text(
                models.parent.model,
                model.model,
                text,
                compute_dtype=dtype,
                batch_tokens=batch_tokens,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except (ConfigError, UnsupportedModelError) as error:
        reporter.say(f"{where}: {error}")
        return {"note": str(error)}
