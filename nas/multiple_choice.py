"""Multiple choice by log-likelihood: which choice does the model find most likely after the prompt?

A choice's score is the sum of the log-probabilities of its own tokens. `acc` takes the highest score, `acc_norm` the highest score
per character of the choice. Tokens, boundary, truncation and norm are those of lm-evaluation-harness, so the figures can be compared.

Choices are scored in batches of inputs of about one length, whatever question they belong to. What a model reads of a choice does not
hold its last token, so choices of one token ("yes", "no", "A") of one question are one input, run once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from blocks.errors import DataError
from nas.choice_files import Question
from nas.language_model import LanguageModel

ENCODED_AT_ONCE = 1024


@dataclass(frozen=True)
class Reading:
    """One input and what is asked of it.

    Attributes:
        tokens: what the model reads.
        asked: for each choice that needs it, (number of the choice, its tokens; the last of them follows the whole input).
    """

    tokens: tuple[int, ...]
    asked: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)


def encode_pairs(model: LanguageModel, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """Token ids of (prompt, continuation) pairs, as lm-evaluation-harness cuts them.

    Blanks that end the prompt belong to the continuation. Both are tokenised as one text, the prompt alone again, and what the
    whole has beyond the prompt's length is the continuation. A tokenizer that begins every text with a special token does so
    here, unless the text has it already; an empty prompt is the token that begins a text.
    """
    moved = [(prompt.rstrip(), prompt[len(prompt.rstrip()) :] + continuation) for prompt, continuation in pairs]
    ids = _encode(model, [text for prompt, continuation in moved if prompt for text in (prompt, prompt + continuation)])
    alone = _encode(model, [continuation for prompt, continuation in moved if not prompt], special=False)
    encoded = []
    for prompt, continuation in moved:
        if prompt:
            encoded.append((ids[prompt], ids[prompt + continuation][len(ids[prompt]) :]))
        else:
            encoded.append(([model.prefix_token], alone[continuation]))
    return encoded


def _encode(model: LanguageModel, texts: list[str], special: bool = True) -> dict[str, list[int]]:
    """Token ids of each text, with the tokenizer's own special tokens unless they are there or not wanted."""
    known = list(dict.fromkeys(texts))  # a prompt comes once a choice
    begins = model.tokenizer.bos_token
    ids: dict[str, list[int]] = {}
    for adds in (True, False):
        part = [text for text in known if adds == (special and not (begins and text.startswith(begins)))]
        for start in range(0, len(part), ENCODED_AT_ONCE):
            batch = part[start : start + ENCODED_AT_ONCE]
            encoded = model.tokenizer(batch, add_special_tokens=adds, return_attention_mask=False, verbose=False)
            ids |= dict(zip(batch, encoded["input_ids"], strict=True))
    return ids


def readings(model: LanguageModel, questions: Sequence[Question]) -> list[Reading]:
    """The inputs of all choices of all questions, each once. Choices are numbered through; the longest input is first.

    An input beyond the model's length loses its beginning. Raises DataError for a choice that adds no token to its prompt.
    """
    pairs = [(q.prompt, q.delimiter + choice) for q in questions for choice in q.choices]
    inputs: dict[tuple[int, ...], Reading] = {}
    for number, (prompt, continuation) in enumerate(encode_pairs(model, pairs)):
        if not continuation:
            raise DataError(f"the choice {pairs[number][1]!r} adds no token to its prompt; give another delimiter")
        tokens = tuple([*prompt, *continuation][-(model.max_length + 1) :][:-1])
        asked = tuple(continuation[-len(tokens) :])
        inputs.setdefault(tokens, Reading(tokens)).asked.append((number, asked))
    return sorted(inputs.values(), key=lambda reading: -len(reading.tokens))


def score_choices(
    model: LanguageModel,
    questions: Sequence[Question],
    batch_tokens: int = 4096,
    progress: Callable[[int, int], None] | None = None,
) -> list[np.ndarray]:
    """The log-likelihood (nats) of every choice of every question: an fp64 array a question.

    Args:
        batch_tokens: tokens, padding counted, that one forward pass reads.
        progress: called with the tokens read so far, and all of them, after each batch.
    """
    inputs = readings(model, questions)
    total, done = sum(len(reading.tokens) for reading in inputs), 0
    scores = np.zeros(sum(len(question.choices) for question in questions))
    while inputs:
        size = max(1, batch_tokens // len(inputs[0].tokens))
        batch, inputs = inputs[:size], inputs[size:]
        for number, score in _score_batch(model, batch):
            scores[number] = score
        done += sum(len(reading.tokens) for reading in batch)
        if progress is not None:
            progress(done, total)
    ends = np.cumsum([len(question.choices) for question in questions])
    return np.split(scores, ends[:-1])


def _score_batch(model: LanguageModel, batch: Sequence[Reading]) -> list[tuple[int, float]]:
    """(number of the choice, its log-likelihood) of all choices that the batch has."""
    tokens = torch.zeros(len(batch), len(batch[0].tokens), dtype=torch.long)
    rows: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    owners: list[int] = []
    numbers: list[int] = []
    for row, reading in enumerate(batch):
        length = len(reading.tokens)
        tokens[row, :length] = torch.tensor(reading.tokens)
        for number, asked in reading.asked:
            rows += [row] * len(asked)
            positions += range(length - len(asked), length)
            labels += asked
            owners += [len(numbers)] * len(asked)
            numbers.append(number)
    place = [torch.tensor(values, device=model.device) for values in (rows, positions, labels)]
    found = model.log_probs(tokens.to(model.device), *place).double().cpu().numpy()
    return list(zip(numbers, np.bincount(owners, weights=found, minlength=len(numbers)).tolist(), strict=True))
