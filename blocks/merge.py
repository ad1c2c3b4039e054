"""Fewer KV heads: merging the heads of a group so that queries lose the least.

Mean pooling (GQA, arXiv 2305.13245) is the published cut. The fitted merge uses what rotary embeddings leave free.
Keys: RoPE rotates each pair of key channels as one complex number, so per group and frequency the keys kappa_g may
share one complex signal sigma with kappa_g ~ c_g sigma; the factor conj(c_g) moves into the queries exactly. The best
sigma is the first principal component of the keys weighted by query energy. Values: no rotation, so the shared value
is the leading head_dim-dimensional subspace of all values of the group, weighted by what o_proj reads of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blocks.fit import sum_dtype
from blocks.layer import O_PROJ, LayerMath, Weights, queries_keys_values
from blocks.ranks import Ranks

Q, K, V = (f"self_attn.{name}_proj" for name in "qkv")


def mean_pool(w: Weights, kv_heads: int, math: LayerMath) -> dict[str, Tensor]:
    """The tensors that change when each group of KV heads is replaced by its mean."""
    merged: dict[str, Tensor] = {}
    for name in (K, V):
        for part in ("weight", "bias"):
            if (tensor := w.get(f"{name}.{part}")) is not None:
                grouped = tensor.unflatten(0, (kv_heads, -1, math.head_dim))
                merged[f"{name}.{part}"] = grouped.mean(1).flatten(0, 1)
    return merged


class MergeStatistics:
    """Second moments of keys, values and queries of one attention over the fitting text.

    For K KV heads of dimension E: `keys` [E/2, K, K] complex Hermitian (per rotary frequency, across heads), `queries`
    [K, E/2] energy of the queries that read each head, `values` [K*E, K*E].
    """

    def __init__(self, kv_heads: int, head_dim: int, device: torch.device | str) -> None:
        half, real = head_dim // 2, sum_dtype(device)
        self.keys = torch.zeros(half, kv_heads, kv_heads, dtype=real.to_complex(), device=device)
        self.queries = torch.zeros(kv_heads, half, dtype=real, device=device)
        self.values = torch.zeros(kv_heads * head_dim, kv_heads * head_dim, dtype=real, device=device)

    def add(self, w: Weights, h: Tensor, math: LayerMath) -> None:
        """Adds a batch of layer inputs h [B, S, D]."""
        q, k, v = (x.to(self.values.dtype) for x in queries_keys_values(w, h, math))
        keys, queries = to_complex(k), to_complex(q)
        self.keys += torch.einsum("bgsf,bksf->fgk", keys, keys.conj())
        grouped = queries.abs().pow(2).unflatten(1, (k.shape[1], -1))
        self.queries += grouped.sum((0, 2, 3))
        flat = v.transpose(1, 2).flatten(2).flatten(0, 1)
        self.values.addmm_(flat.T, flat)

    def reduce(self, ranks: Ranks) -> MergeStatistics:
        """Adds up the ranks' sums. Call once, after the last batch."""
        for sums in (torch.view_as_real(self.keys), self.queries, self.values):
            ranks.sum_(sums)
        return self


def to_complex(x: Tensor) -> Tensor:
    """Rotary pairs (i, i + E/2) of the last dimension E as complex numbers [..., E/2]."""
    return torch.complex(*x.chunk(2, dim=-1))


def _rotary_rows(tensor: Tensor, head_dim: int) -> Tensor:
    """Rows of a projection [heads*E, ...] as complex rows [heads, E/2, ...]."""
    real, imaginary = tensor.unflatten(0, (-1, head_dim)).float().chunk(2, dim=1)
    return torch.complex(real.contiguous(), imaginary.contiguous())


def _real_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.cat((rows.real, rows.imag), dim=1).flatten(0, 1).to(dtype)


def merge_heads(w: Weights, kv_heads: int, math: LayerMath, statistics: MergeStatistics) -> dict[str, Tensor]:
    """The tensors (q, k, v, o) that change when the parent's KV heads are merged into `kv_heads` groups.

    A layer that normalises queries and keys per head (Qwen3) is mean-pooled: its norm forbids moving factors across.
    """
    if "self_attn.q_norm.weight" in w:
        return mean_pool(w, kv_heads, math)
    return {**_merge_keys(w, kv_heads, math, statistics), **_merge_values(w, kv_heads, math, statistics)}


def _merge_keys(w: Weights, kv_heads: int, math: LayerMath, statistics: MergeStatistics) -> dict[str, Tensor]:
    parent_heads, half = statistics.queries.shape
    group = parent_heads // kv_heads
    weight = statistics.queries.clamp_min(1e-12).sqrt()  # [K, E/2]
    weight = weight / weight.mean()
    into_shared = torch.empty(parent_heads, half, dtype=statistics.keys.dtype, device=weight.device)
    into_queries = torch.empty_like(into_shared)
    for start in range(0, parent_heads, group):
        heads = slice(start, start + group)
        scale = weight[heads].T  # [E/2, group]
        covariance = statistics.keys[:, heads, heads] * scale[:, :, None] * scale[:, None, :]
        component = torch.linalg.eigh(covariance).eigenvectors[:, :, -1]  # [E/2, group]
        # eigh leaves the phase open; fixed here so that a run and its resumed twin agree to the bit
        strongest = component.gather(1, component.abs().argmax(1, keepdim=True))
        component = component * (strongest.conj() / strongest.abs())
        into_shared[heads] = (component.conj() * scale).T
        into_queries[heads] = (component / scale).T.conj()
    per_head = into_queries.repeat_interleave(_rows(w, Q) // math.head_dim // parent_heads, dim=0)
    changed: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        if (keys := w.get(f"{K}.{part}")) is None:
            continue
        trailing = (1,) * (keys.dim() - 1)
        rows = _rotary_rows(keys, math.head_dim) * into_shared.reshape(parent_heads, half, *trailing)
        changed[f"{K}.{part}"] = _real_rows(rows.unflatten(0, (kv_heads, group)).sum(1), keys.dtype)
        queries = _rotary_rows(w[f"{Q}.{part}"], math.head_dim) * per_head.reshape(-1, half, *trailing)
        changed[f"{Q}.{part}"] = _real_rows(queries, keys.dtype)
    return changed


def _merge_values(w: Weights, kv_heads: int, math: LayerMath, statistics: MergeStatistics) -> dict[str, Tensor]:
    head_dim, parent_heads = math.head_dim, _rows(w, V) // math.head_dim
    group, size = parent_heads // kv_heads, parent_heads // kv_heads * head_dim
    output = w[O_PROJ].to(statistics.values.dtype).unflatten(1, (parent_heads, -1, head_dim))  # [D, K, H/K, E]
    shared_output = torch.empty_like(output)
    changed: dict[str, Tensor] = {}
    parts: dict[str, list[Tensor]] = {"weight": [], "bias": []}
    for start in range(0, parent_heads, group):
        read = torch.einsum("dghe,dghf->gef", output[:, start : start + group], output[:, start : start + group])
        metric = torch.block_diag(*read)
        root, inverse_root = _roots(metric)
        channels = slice(start * head_dim, start * head_dim + size)
        covariance = root @ statistics.values[channels, channels] @ root
        # Values that span fewer directions than a head has leave the last ones to rounding: choose them, always the same.
        unused = torch.linspace(1.0, 2.0, size).to(covariance) * covariance.diagonal().mean() * 1e-6
        directions = torch.linalg.eigh((covariance + covariance.T) / 2 + unused.diag()).eigenvectors[:, -head_dim:]
        directions = directions * directions.sum(0).sign().where(directions.sum(0) != 0, 1.0)
        reduce, restore = directions.T @ root, (inverse_root @ directions).unflatten(0, (group, head_dim))
        for part, pieces in parts.items():
            if (values := w.get(f"{V}.{part}")) is not None:
                pieces.append((reduce @ values[channels].to(reduce.dtype)).to(values.dtype))
        shared_output[:, start : start + group] = torch.einsum(
            "dghe,gef->dghf", output[:, start : start + group], restore
        )
    for part, pieces in parts.items():
        if pieces:
            changed[f"{V}.{part}"] = torch.cat(pieces)
    changed[O_PROJ] = shared_output.flatten(1).to(w[O_PROJ].dtype)
    return changed


def _rows(w: Weights, name: str) -> int:
    return w[f"{name}.weight"].shape[0]


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive semidefinite matrix and its regularised inverse."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(values.max().clamp_min(1e-30) * 1e-6).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T
