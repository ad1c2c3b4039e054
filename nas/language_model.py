"""Any causal language model as `nas eval` uses it: loaded, and asked for log-probabilities of tokens and for text."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from blocks.checkpoint import load_child
from blocks.child.configuration_decilm import DeciLMConfig
from blocks.errors import CheckpointError, UnsupportedModelError

CHUNK = 512
"""Tokens whose logits are held at once."""
_PROBE = 6


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model on its device, with its tokenizer.

    Attributes:
        model: a transformers causal LM in evaluation mode.
    """

    model: Any
    tokenizer: Any
    device: torch.device

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def max_length(self) -> int:
        """Most tokens of one input."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2048)

    @property
    def prefix_token(self) -> int:
        """What stands in for an empty prompt: the token that begins a text, or the one that ends it."""
        tokens = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, 0)
        return int(next(token for token in tokens if token is not None))

    @cached_property
    def _head_is_plain(self) -> bool:
        """Whether logits are the head of the decoder's states and nothing more (no cap, no scale), by trying."""
        head = self.model.get_output_embeddings()
        if head is None or self.model.base_model is self.model:
            return False
        tokens = torch.arange(_PROBE, device=self.device)[None] % head.weight.shape[0]
        with torch.no_grad():
            whole = self.model(input_ids=tokens, use_cache=False).logits.float()
            parts = head(self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state).float()
        return bool((whole - parts).abs().max() <= 1e-3 * whole.abs().max())

    @torch.no_grad()
    def log_probs(self, tokens_BT: Tensor, rows_N: Tensor, positions_N: Tensor, labels_N: Tensor) -> Tensor:
        """Log-probability of each label as the token after its position: [N], nats; the softmax is fp32 (fp64 for an fp64 model).

        Logits are made `CHUNK` tokens at a time, of these positions alone.

        Args:
            tokens_BT: inputs, padded on the right with anything: attention is causal, so nothing that counts sees it.
            rows_N: which input each label is of.
            positions_N: the position in front of it.
            labels_N: token ids.
        """
        if not self._head_is_plain:
            return self._log_probs_of_whole_rows(tokens_BT, rows_N, positions_N, labels_N)
        hidden_BTD = self.model.base_model(input_ids=tokens_BT, use_cache=False).last_hidden_state
        head, found = self.model.get_output_embeddings(), []
        for chunk in torch.arange(len(labels_N), device=self.device).split(CHUNK):
            logits = head(hidden_BTD[rows_N[chunk], positions_N[chunk]])
            found.append(_at(logits, labels_N[chunk]))
        return torch.cat(found)

    def _log_probs_of_whole_rows(self, tokens_BT: Tensor, rows: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
        """The same by the model's own forward, an input at a time, of the positions asked for alone."""
        result = torch.empty(len(labels), dtype=torch.float64, device=self.device)
        for row in range(len(tokens_BT)):
            own = (rows == row).nonzero()[:, 0]
            places, inverse = positions[own].unique(return_inverse=True)
            logits = self.model(input_ids=tokens_BT[row : row + 1], use_cache=False, logits_to_keep=places).logits[0]
            result[own] = _at(logits[inverse], labels[own]).double()
        return result

    @torch.no_grad()
    def continue_text(self, prompt: str, tokens: int) -> str:
        """The most likely continuation, greedily."""
        encoded = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(self.device)
        pad = self.tokenizer.pad_token_id
        pad = pad if pad is not None else self.prefix_token
        settings = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": pad}
        output = self.model.generate(**encoded, **settings)
        return str(self.tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))


def _at(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return wide.log_softmax(-1).gather(1, labels_N[:, None])[:, 0]


def load_language_model(
    directory: Path, device: torch.device, dtype: torch.dtype = torch.float32, tokenizer_directory: Path | None = None
) -> LanguageModel:
    """Loads a child with this package's code, any other causal LM with that of transformers.

    Args:
        directory: of a Hugging Face model.
        tokenizer_directory: where the tokenizer is if `directory` has none.

    Raises:
        CheckpointError: it is damaged or has no tokenizer.
        UnsupportedModelError: transformers knows no causal LM of its kind.
    """
    try:
        kind = json.loads((directory / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{directory / 'config.json'} cannot be read ({error}); copy or download it again"
        ) from error
    model = load_child(directory, dtype) if kind == DeciLMConfig.model_type else _load_plain(directory, kind, dtype)
    nn.Module.to(model, device)
    return LanguageModel(model.eval().requires_grad_(False), _tokenizer(directory, tokenizer_directory), device)


def _load_plain(directory: Path, kind: str | None, dtype: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # ours says what is going on
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=dtype)
    except ValueError as error:  # "Unrecognized model", "Unrecognized configuration class"
        raise UnsupportedModelError(
            f"transformers knows no causal LM of type {kind} ({directory}): {_first(error)}"
        ) from error
    except Exception as error:  # damaged files raise errors of many kinds
        raise CheckpointError(f"cannot load {directory}: {_first(error)}") from error
    return model


def _tokenizer(directory: Path, other: Path | None) -> Any:
    from transformers import AutoTokenizer

    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
    place = directory if other is None or any((directory / name).is_file() for name in names) else other
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # tokenizers raise bare Exception for a damaged file
        raise CheckpointError(
            f"cannot read a tokenizer from {place}: {_first(error)}; copy its tokenizer files there"
        ) from error


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
