"""Children in programs that are not ours: the same tokens and log-probabilities as in transformers with our code.

    python benchmarks/engine_children.py OUT                                    the children, each with its reference.json
    VENV/bin/python benchmarks/clients.py transformers OUT/smollm2-*            any transformers from 4.57 on
    VENV/bin/python benchmarks/clients.py mlx OUT/smollm2-mild                  stock mlx-lm
    VENV/bin/python benchmarks/clients.py llamacpp OUT/*.gguf                   stock llama.cpp, from llama-cpp-python

Imports nothing of this package, so that it runs where only the client is installed (docs/clients.md says how). A row for each child and
each way of running it: greedy tokens equal before the first that is not, and the largest difference, of log-probability in nats
on a fixed text where nothing else is said. Exits with 1 if a row misses: a token differs, or more than 2e-3. reference.json
is looked for in the child, or beside a GGUF file in the directory of its name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

TOLERANCE = 2e-3
LEFT = 5  # padding tokens


class Row(NamedTuple):
    """One child run in one way.

    Attributes:
        way: what was run.
        tokens: greedy tokens that are equal before the first difference; None if none were generated.
        error: the largest difference; None if none was taken.
    """

    way: str
    tokens: int | None = None
    error: float | None = None

    def holds(self, of: int) -> bool:
        return self.tokens in (None, of) and (self.error is None or self.error <= TOLERANCE)


def same(found: list[int], wanted: list[int]) -> int:
    """How many tokens are equal before the first difference."""
    pairs = list(zip(found, wanted, strict=False))
    return next((index for index, (one, other) in enumerate(pairs) if one != other), len(pairs))


def largest(found: Any, wanted: Any) -> float:
    return max(abs(float(one) - float(other)) for one, other in zip(found, wanted, strict=True))


class Transformers:
    """A child as transformers loads it, by the code in its directory."""

    def __init__(self, child: Path, reference: dict[str, Any]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch, self.child, self.reference = torch, child, reference
        self.model: Any = AutoModelForCausalLM.from_pretrained(child, trust_remote_code=True, dtype=torch.float32)
        self.model.generation_config.eos_token_id = None
        self.text = torch.tensor([reference["text"]])

    def rows(self) -> Iterator[Row]:
        prompt = self.reference["prompt"]
        static = {"cache_implementation": "static", "disable_compile": True}
        with self.torch.no_grad():
            yield Row(
                "no cache", self.greedy(use_cache=False), self.error(self.model(self.text, use_cache=False).logits)
            )
            yield Row("dynamic cache", self.greedy(), self.error(self.in_pieces()))
            yield Row("static cache", self.greedy(**static))
            yield Row("static cache again", self.greedy(**static))
            yield Row("static cache, prompt in chunks", self.greedy(prefill_chunk_size=4, **static))
            yield Row("left padding", self.greedy(padded=True))
            yield Row("left padding, static cache", self.greedy(padded=True, **static))
            beams = [self.generated([prompt], num_beams=3, use_cache=cached)[0] for cached in (True, False)]
            yield Row("3 beams", same(*beams))
            yield Row("hidden states", error=self.hidden_states())
            self.model.set_attn_implementation("eager")
            yield Row("eager attention", error=self.error(self.model(self.text).logits))
            self.model.set_attn_implementation("sdpa")
        plain, checkpointed = self.gradient(False), self.gradient(True)
        yield Row("checkpointed gradient, relative", error=float((plain - checkpointed).norm() / plain.norm()))
        yield Row("tokenizer, there and back", error=self.tokenizer())

    def generated(self, ids: list[list[int]], mask: Any = None, **settings: Any) -> list[list[int]]:
        start, count = self.torch.tensor(ids), len(self.reference["tokens"])
        mask = self.torch.ones_like(start) if mask is None else mask
        output = self.model.generate(
            start, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0, **settings
        )
        return output[:, start.shape[1] :].tolist()

    def greedy(self, padded: bool = False, **settings: Any) -> int:
        """Greedy tokens from the prompt that are right; padded: as the shorter of two in a batch."""
        prompt, wanted = self.reference["prompt"], self.reference["tokens"]
        if not padded:
            return same(self.generated([prompt], **settings)[0], wanted)
        batch = [[0] * LEFT + prompt, self.reference["text"][: LEFT + len(prompt)]]
        mask = self.torch.ones((2, LEFT + len(prompt)), dtype=self.torch.long)
        mask[0, :LEFT] = 0
        return same(self.generated(batch, mask, **settings)[0], wanted)

    def error(self, logits: Any) -> float:
        chosen = logits[0, :-1].log_softmax(-1).gather(1, self.text[0, 1:, None])[:, 0]
        return largest(chosen, self.reference["log_probs"])

    def in_pieces(self) -> Any:
        """Logits of the text, read in three pieces through a cache."""
        half, logits, cache = self.text.shape[1] // 2, [], None
        for piece in (self.text[:, :half], self.text[:, half : half + 1], self.text[:, half + 1 :]):
            step = self.model(piece, past_key_values=cache, use_cache=True)
            logits.append(step.logits)
            cache = step.past_key_values
        return self.torch.cat(logits, 1)

    def hidden_states(self) -> float:
        """The error of the head on the last of them; infinite if there is not one a layer and the embedding."""
        states = self.model(self.text, output_hidden_states=True).hidden_states
        wanted = len(self.reference["layers"]) + 1
        return self.error(self.model.lm_head(states[-1])) if len(states) == wanted else float("inf")

    def gradient(self, checkpointing: bool) -> Any:
        """Of the loss on the text, by all parameters in a row."""
        self.model.train()
        if checkpointing:
            self.model.gradient_checkpointing_enable()
        self.model.zero_grad()
        self.model(self.text, labels=self.text).loss.backward()
        self.model.gradient_checkpointing_disable()
        return self.torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])

    def tokenizer(self) -> float:
        """0 if the text's tokens decode and encode to themselves."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.child, trust_remote_code=True)
        except ValueError as error:  # a class that this transformers does not know
            print(error, file=sys.stderr)
            return float("inf")
        again = tokenizer(tokenizer.decode(self.reference["text"]), add_special_tokens=False)["input_ids"]
        return 0.0 if list(again) == self.reference["text"] else float("inf")


def run_transformers(child: Path, reference: dict[str, Any]) -> Iterator[Row]:
    return Transformers(child, reference).rows()


def run_mlx(child: Path, reference: dict[str, Any]) -> Iterator[Row]:
    """Stock mlx-lm, which has a model class of its own for these children."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    mx.set_default_device(mx.cpu)
    model, tokenizer = load(str(child), tokenizer_config={"trust_remote_code": True})
    prompt, wanted, text = reference["prompt"], reference["tokens"], reference["text"]
    log_probs = nn.log_softmax(model(mx.array([text]))[0].astype(mx.float32), axis=-1)
    chosen = [log_probs[index, token].item() for index, token in enumerate(text[1:])]
    steps = generate_step(mx.array(prompt), model, max_tokens=len(wanted))
    tokens = [int(token) for token, _ in steps]
    yield Row("mlx-lm", same(tokens, wanted), largest(chosen, reference["log_probs"]))
    again = tokenizer.encode(tokenizer.decode(text), add_special_tokens=False)
    yield Row("tokenizer, there and back", error=0.0 if list(again) == text else float("inf"))


def run_llamacpp(file: Path, reference: dict[str, Any]) -> Iterator[Row]:
    """Stock llama.cpp with an fp32 cache, through the Python binding."""
    import numpy as np
    from llama_cpp import Llama

    prompt, wanted, text = reference["prompt"], reference["tokens"], reference["text"]
    settings = {"n_ctx": 512, "n_threads": 2, "type_k": 0, "type_v": 0, "flash_attn": False, "verbose": False}
    model = Llama(str(file), logits_all=True, **settings)
    model.eval(text)
    logits = np.array(model.scores[: len(text)], dtype=np.float64)
    log_probs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    chosen = log_probs[np.arange(len(text) - 1), text[1:]]
    model.reset()
    model.eval(prompt)
    tokens: list[int] = []
    for _ in wanted:
        tokens.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(tokens[-1:])
    yield Row("llama.cpp", same(tokens, wanted), largest(chosen, reference["log_probs"]))
    again = model.tokenize(model.detokenize(text), add_bos=False, special=False)
    yield Row("tokenizer, there and back", error=0.0 if list(again) == text else float("inf"))


CLIENTS: dict[str, Callable[[Path, dict[str, Any]], Iterator[Row]]] = {
    "transformers": run_transformers,
    "mlx": run_mlx,
    "llamacpp": run_llamacpp,
}


def read_reference(child: Path) -> dict[str, Any]:
    directory = child if child.is_dir() else child.with_suffix("")
    reference: dict[str, Any] = json.loads((directory / "reference.json").read_text())
    return reference


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("children", type=Path, nargs="+")
    chosen = parser.parse_args(arguments)
    missed = 0
    print(f"{'child':<26}{'way':<34}{'tokens':>8}{'difference':>12}")
    for child in chosen.children:
        reference = read_reference(child)
        of = len(reference["tokens"])
        for row in CLIENTS[chosen.client](child, reference):
            tokens = "" if row.tokens is None else f"{row.tokens}/{of}"
            error = "" if row.error is None else f"{row.error:.1e}"
            verdict = "" if row.holds(of) else "  missed"
            missed += not row.holds(of)
            print(f"{child.stem:<26}{row.way:<34}{tokens:>8}{error:>12}{verdict}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
