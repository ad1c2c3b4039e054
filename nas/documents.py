"""Reads text: files, directories, `datasets` collections, or the Python manual that comes with Python."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blocks.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet")
_DOCUMENT_CHARACTERS = 4000  # of the documents that a single long text is cut into
_SHARED_CHARACTERS = 100  # paragraphs at least this long show that one text quotes another
_BLANK_LINES = re.compile(r"\n\s*\n")


def load_documents(source: str, text_column: str = "text", most_characters: float = math.inf) -> list[str]:
    """Reads the documents of a source, in a fixed order. Blank ones are left out.

    Args:
        source: one of
            - a .txt, .md or .rst file (a long one is cut at blank lines into documents of some 4,000 characters);
            - a .jsonl or .parquet file, one document a row;
            - a directory of such files, searched recursively and in order of path, or one saved by `datasets`;
            - a `datasets` id: `id`, `id:split` or `id:config:split` ("train" unless said; "train[:1%]" works too);
            - "python-docs": the language reference in Python's own standard library, offline.
        text_column: the column of .jsonl, .parquet and `datasets` that holds the text.
        most_characters: a `datasets` id is streamed, and no further than this; everything else is read whole.

    Raises:
        DataError: if there is no such source, no such column, or no text in it.
    """
    documents = [text for text in _read_source(source, text_column, most_characters) if text.strip()]
    if not documents:
        raise DataError(f"{source} holds no text")
    return documents


def _read_source(source: str, column: str, most_characters: float) -> list[str]:
    if source in EMBEDDED:
        return EMBEDDED[source]()
    path = Path(source).expanduser()
    if path.is_file():
        return _cut_if_alone(list(_read_file(path, column)))
    if path.is_dir():
        return _read_directory(path, column)
    if path.suffix in SUFFIXES or source.startswith(("/", ".", "~")):
        raise DataError(f"no such file or directory: {source}")
    return _read_dataset(source, column, most_characters)


def _read_directory(path: Path, column: str) -> list[str]:
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        return _read_saved_dataset(path, column)
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix in SUFFIXES and file.is_file() and not _is_hidden(file.relative_to(path))
    ]
    if not files:
        raise DataError(f"{path} holds no {', '.join(SUFFIXES)} files")
    return _cut_if_alone([text for file in files for text in _read_file(file, column)])


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_file(path: Path, column: str) -> Iterator[str]:
    try:
        if path.suffix == ".jsonl":
            yield from _read_jsonl(path, column)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path, column)
        elif path.suffix in TEXT_SUFFIXES:
            yield path.read_text(encoding="utf-8")
        else:
            raise DataError(f"cannot read {path}: give {', '.join(SUFFIXES)}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _read_jsonl(path: Path, column: str) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from error
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number}: not a JSON object")
            _require_column(column, list(row), f"{path}, line {number}")
            yield _text(row[column], column, f"{path}, line {number}")


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
        _require_column(column, file.schema_arrow.names, str(path))
        for batch in file.iter_batches(columns=[column]):
            yield from (_text(value, column, str(path)) for value in batch.column(0).to_pylist())
    except ArrowException as error:
        raise DataError(f"{path} is not a whole parquet file ({error})") from error


def _read_saved_dataset(path: Path, column: str) -> list[str]:
    import datasets

    try:
        loaded: Any = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {_first_line(error)}") from error
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise DataError(f"{path} has no train split; give the directory of one of {', '.join(loaded)}")
        loaded = loaded["train"]
    return _read_rows(loaded, column, str(path))


def _read_dataset(source: str, column: str, most_characters: float) -> list[str]:
    """Streamed up to `most_characters`, which spares a download of terabytes; whole if there is no end, or for a slice."""
    import datasets

    identity, bracket, rows = source.partition("[")  # of a slice such as train[:1%], which has a colon of its own
    name, _, rest = identity.partition(":")
    config, _, split = rest.rpartition(":")
    streamed = not bracket and most_characters < math.inf
    try:
        loaded = datasets.load_dataset(
            name, config or None, split=(split or "train") + bracket + rows, streaming=streamed
        )
        if streamed:
            return _first_rows(loaded, column, source, most_characters)
    except DataError:
        raise
    except Exception as error:  # builders raise errors of every kind
        raise DataError(
            f"{source} is no path here, and datasets cannot load it ({type(error).__name__}: {_first_line(error)}); "
            "check the spelling (id:config:split) and the network, or give a file"
        ) from error
    return _read_rows(loaded, column, source)


def _first_rows(rows: Any, column: str, where: str, most_characters: float) -> list[str]:
    """The texts of a streamed dataset until they hold `most_characters`."""
    texts: list[str] = []
    characters = 0
    for row in rows:
        _require_column(column, list(row), where)
        texts.append(_text(row[column], column, where))
        characters += len(texts[-1])
        if characters >= most_characters:
            break
    return texts


def _read_rows(rows: Any, column: str, where: str) -> list[str]:
    _require_column(column, list(rows.column_names), where)
    return [_text(value, column, where) for value in rows[column]]


def _require_column(column: str, columns: list[str], where: str) -> None:
    if column not in columns:
        raise DataError(f"{where} has no column {column!r}; set text_column to one of {', '.join(columns)}")


def _text(value: object, column: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds {type(value).__name__}, not text")
    return value


def _cut_if_alone(texts: list[str]) -> list[str]:
    """One long text is cut into documents, since nothing can be held out of a single one."""
    if len(texts) != 1 or len(texts[0]) <= 2 * _DOCUMENT_CHARACTERS:
        return texts
    text = texts[0]
    separator = "\n\n" if _BLANK_LINES.search(text) else "\n"
    documents, paragraphs, characters = [], [], 0
    for paragraph in _BLANK_LINES.split(text) if separator == "\n\n" else text.split("\n"):
        paragraphs.append(paragraph)
        characters += len(paragraph)
        if characters >= _DOCUMENT_CHARACTERS:
            documents.append(separator.join(paragraphs))
            paragraphs, characters = [], 0
    return [*documents, separator.join(paragraphs)]


def _python_docs() -> list[str]:
    """The topics of `help()`, by name. Topics that quote each other are one document, so that no split parts them."""
    from pydoc_data.topics import topics

    groups: list[tuple[list[str], set[str]]] = []  # names of topics, and their long paragraphs
    for name in sorted(topics):
        paragraphs = _long_paragraphs(topics[name])
        quoting = [group for group in groups if group[1] & paragraphs]
        groups = [group for group in groups if not group[1] & paragraphs]
        names = [other for group in quoting for other in group[0]]
        groups.append(([*names, name], paragraphs.union(*(group[1] for group in quoting))))
    return ["\n\n".join(topics[name] for name in sorted(names)) for names, _ in groups]


def _long_paragraphs(text: str) -> set[str]:
    paragraphs = (" ".join(paragraph.split()) for paragraph in _BLANK_LINES.split(text))
    return {paragraph for paragraph in paragraphs if len(paragraph) >= _SHARED_CHARACTERS}


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


EMBEDDED = {"python-docs": _python_docs}
"""Texts that need neither a file nor a network: name -> what reads them."""
