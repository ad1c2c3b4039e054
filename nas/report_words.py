"""How the report says numbers: KL with its standard error, sizes, times and rates, and which of them are estimates."""

from __future__ import annotations

from typing import Any

KL_LABEL = "true KL to the parent (nats/token)"


def estimate(report: dict[str, Any]) -> str:
    """ ", estimate" where the clock is a datasheet's: for every printed time or rate."""
    return ", estimate" if (report.get("clock") or {}).get("estimate") else ""


def kl_text(kl: float | None, error: float | None = None) -> str:
    if kl is None:
        return "–"
    return f"{kl:.4f}" if error is None else f"{kl:.4f} ± {error:.4f}"


def size_text(size: float | None) -> str:
    """Bytes in the unit that gives a readable number."""
    if size is None:
        return "–"
    unit, factor = byte_unit(size)
    return f"{size / factor:.4g} {unit}"


def byte_unit(largest: float) -> tuple[str, float]:
    """The unit for sizes up to `largest` bytes, decimal as budgets are."""
    return next(
        ((name, size) for name, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)) if largest >= size / 20), ("B", 1.0)
    )


def rate_text(report: dict[str, Any], rate: float | None) -> str:
    return "–" if rate is None else f"{rate:,.0f} tokens/s{_in_brackets(report)}"


def time_text(report: dict[str, Any], milliseconds: float | None) -> str:
    return "–" if milliseconds is None else f"{milliseconds:,.4g} ms{_in_brackets(report)}"


def _in_brackets(report: dict[str, Any]) -> str:
    return " (estimate)" if estimate(report) else ""


def about_point(report: dict[str, Any], point: dict[str, Any]) -> str:
    """The tooltip of a measured child."""
    what = f"{point['name']} (the child)" if point["child"] else point["name"]
    state = "given up at KL " if point["state"] == "pruned" else "true KL "
    lines = [what, f"{state}{kl_text(point['kl'], point['kl_se'])}"]
    if point["predicted_kl"] is not None:
        lines.append(f"predicted {kl_text(point['predicted_kl'])}")
    if point["gb"] is not None:
        lines.append(f"{point['gb']:.6g} GB")
    if point["tokens_per_s"] is not None:
        lines.append(rate_text(report, point["tokens_per_s"]))
    return "\n".join(lines)


def spearman(pairs: list[tuple[float, float]]) -> float | None:
    """Rank correlation; None for fewer than three pairs or where one side is all alike."""
    if len(pairs) < 3:
        return None
    first, second = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    mean = (len(pairs) - 1) / 2
    spread = [sum((rank - mean) ** 2 for rank in ranks) for ranks in (first, second)]
    if 0.0 in spread:
        return None
    shared: float = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    return float(shared / (spread[0] * spread[1]) ** 0.5)


def _ranks(values: list[float]) -> list[float]:
    """From 0; equal values share the mean of their ranks."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2 for value in values
    ]
