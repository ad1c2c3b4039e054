"""Configuration of a Nemotron-style child: a Llama whose layers differ. Depends on transformers alone.

This file travels inside every child checkpoint, in the form that NVIDIA publishes (`model_type: nemotron-nas`).
`block_configs` holds one entry per layer; what it leaves out (window attention, sinks, sparsity) is refused, never
silently ignored.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import LlamaConfig

FORMAT = 2  # of `marquetry_format`; a larger one was written by a newer version
WIDTH_MULTIPLE = 256
ATTENTION_KEYS = {
    "n_heads_in_group",  # query heads per KV head
    "no_op",
    "num_sink_tokens",
    "replace_with_linear",
    "sparsify",
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
    "window_length",
}
FFN_KEYS = {"ffn_mult", "no_op", "replace_with_linear", "sparsify"}
# Features of the published format that no released child uses. This code has no implementation of them.
UNIMPLEMENTED = {
    "num_sink_tokens",
    "sparsify",
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
    "window_length",
    "parallel_blocks",
}


class Entry(dict[str, Any]):
    """A mapping of config.json whose keys are attributes too: vLLM, SGLang and TensorRT-LLM read `block.attention.no_op`."""

    def __init__(self, content: dict[str, Any]) -> None:
        super().__init__({key: Entry(value) if isinstance(value, dict) else value for key, value in content.items()})

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __reduce__(self) -> tuple[Any, ...]:
        return Entry, (dict(self),)


def block_config(n_heads_in_group: int | str | None, ffn_mult: float | str | None) -> dict[str, dict[str, Any]]:
    """One entry of `block_configs`. A number keeps the subblock, "linear" replaces it by a matrix, None removes it."""
    attention: dict[str, Any] = dict.fromkeys(sorted(ATTENTION_KEYS))
    attention |= {"unshifted_sink": False, "use_prefill_window_in_sink_attention": False}
    attention["n_heads_in_group"] = None if n_heads_in_group == "linear" else n_heads_in_group
    ffn: dict[str, Any] = dict.fromkeys(sorted(FFN_KEYS))
    ffn["ffn_mult"] = None if ffn_mult == "linear" else ffn_mult
    for part, value in ((attention, n_heads_in_group), (ffn, ffn_mult)):
        part["no_op"] = value is None
        part["replace_with_linear"] = value == "linear"
    return {"attention": attention, "ffn": ffn}


def ffn_width(ffn_mult: float, hidden_size: int) -> int:
    """Channels of an FFN, rounded up to a multiple of 256 as all serving engines do."""
    raw = int(2 * ffn_mult * hidden_size / 3)
    return -(-raw // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


class DeciLMConfig(LlamaConfig):
    """A `LlamaConfig` with `block_configs`.

    Args:
        block_configs: one {"attention": {...}, "ffn": {...}} per layer; by default every layer is the same full one.
        qk_norm: whether queries and keys are RMS-normalised per head before rotation (Qwen3). Not part of the
            published format: only this code knows it.
        kwargs: as for `LlamaConfig`. `num_key_value_heads` and `intermediate_size`, null in published files, become
            the largest that any layer uses.

    Raises:
        ValueError: if `block_configs` does not describe a model that this code implements.
    """

    model_type = "nemotron-nas"
    # Normalising each head needs no communication beyond the gradient of the shared weight.
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        **LlamaConfig.base_model_tp_plan,
        "layers.*.self_attn.q_norm": "replicated_with_grad_allreduce",
        "layers.*.self_attn.k_norm": "replicated_with_grad_allreduce",
    }

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, qk_norm: bool = False, **kwargs: Any) -> None:
        if (version := kwargs.get("marquetry_format", FORMAT)) > FORMAT:
            raise ValueError(
                f"written by a newer version of marquetry (format {version}, this one reads {FORMAT}); "
                "upgrade with `pip install -U marquetry`"
            )
        num_key_value_heads = kwargs.pop("num_key_value_heads", None)
        intermediate_size = kwargs.pop("intermediate_size", None)
        super().__init__(**kwargs)
        if block_configs is None:
            group = self.num_attention_heads // (num_key_value_heads or self.num_attention_heads)
            full = block_config(group, 3 * (intermediate_size or self.intermediate_size) / (2 * self.hidden_size))
            block_configs = [full] * self.num_hidden_layers
        self.block_configs = block_configs
        self.qk_norm = qk_norm
        self.check_block_configs()
        self.block_configs = [Entry(block) for block in block_configs]
        layers = range(self.num_hidden_layers)
        # The largest in use, but never 0: engines divide by these two even where no layer uses them.
        self.num_key_value_heads = max(map(self.kv_heads, layers)) or num_key_value_heads or self.num_attention_heads
        self.intermediate_size = max(map(self.width, layers)) or intermediate_size or WIDTH_MULTIPLE

    def attention_kind(self, layer: int) -> str:
        """ "kv", "linear" or "skip"."""
        return _kind(self.block_configs[layer]["attention"], "kv")

    def ffn_kind(self, layer: int) -> str:
        """ "width", "linear" or "skip"."""
        return _kind(self.block_configs[layer]["ffn"], "width")

    def kv_heads(self, layer: int) -> int:
        """KV heads of one layer; 0 if it has no attention."""
        if self.attention_kind(layer) != "kv":
            return 0
        return self.num_attention_heads // self.block_configs[layer]["attention"]["n_heads_in_group"]

    def width(self, layer: int) -> int:
        """FFN channels of one layer; 0 if its FFN is a matrix or absent."""
        if self.ffn_kind(layer) != "width":
            return 0
        return ffn_width(self.block_configs[layer]["ffn"]["ffn_mult"], self.hidden_size)

    def check_block_configs(self) -> None:
        """Raises ValueError, naming the layer and the key, for anything this code does not implement."""
        if len(self.block_configs) != self.num_hidden_layers:
            raise ValueError(
                f"block_configs has {len(self.block_configs)} entries for num_hidden_layers = {self.num_hidden_layers}"
            )
        for layer, block in enumerate(self.block_configs):
            where = f"block_configs[{layer}]"
            _check_keys(block, where, {"attention", "ffn", "parallel_blocks"})
            _check_keys(block.get("attention"), f"{where}.attention", ATTENTION_KEYS)
            _check_keys(block.get("ffn"), f"{where}.ffn", FFN_KEYS)
            self._check_sizes(layer, where)

    def _check_sizes(self, layer: int, where: str) -> None:
        block, heads = self.block_configs[layer], self.num_attention_heads
        group, mult = block["attention"].get("n_heads_in_group"), block["ffn"].get("ffn_mult")
        if self.attention_kind(layer) == "kv" and not (isinstance(group, int) and group > 0 and heads % group == 0):
            raise ValueError(f"{where}.attention.n_heads_in_group = {group!r} does not divide {heads} attention heads")
        if self.ffn_kind(layer) == "width" and not (isinstance(mult, (int, float)) and self.width(layer) > 0):
            raise ValueError(f"{where}.ffn.ffn_mult = {mult!r} is not a positive number")

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds: the older spellings stand beside the newer ones, as serving engines read either."""
        output: dict[str, Any] = super().to_diff_dict()
        if rope := output.get("rope_parameters"):
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            output["rope_theta"] = rope["rope_theta"]
            output["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
        if output.get("dtype") is not None:
            output["torch_dtype"] = output["dtype"]
        return output


def _kind(part: dict[str, Any], full: str) -> str:
    if part.get("no_op"):
        return "skip"
    return "linear" if part.get("replace_with_linear") else full


def _check_keys(part: Any, where: str, known: set[str]) -> None:
    if not isinstance(part, dict):
        raise ValueError(f"{where} is not a mapping")
    if unknown := sorted(part.keys() - known):
        raise ValueError(f"{where} has unknown keys: {', '.join(unknown)}")
    if used := sorted(key for key in part.keys() & UNIMPLEMENTED if part[key]):
        raise ValueError(f"{where} uses {', '.join(used)}, which this model code does not implement")


# Saving such a model copies this file beside the weights and writes `auto_map`.
DeciLMConfig.register_for_auto_class()
