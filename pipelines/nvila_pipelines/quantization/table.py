"""The table of a quantization report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvila_pipelines.report.formats import MISSING, size

HEAD = ("part", "scheme", "how", "size", "answers", "loss, points", "layer error", "first token", "tokens/s", "")


def report_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return one row a part, and one for the whole model, of what `QuantizationReport.to_dict` gives."""
    rows: list[tuple[str, ...]] = []
    for part in report["parts"]:
        errors = [layer["error"] for layer in part["layers"]]
        rounded = [layer["rounded"] for layer in part["layers"]]
        rows.append(
            (
                part["part"],
                part["scheme"],
                part["method"],
                _change(size(part["bytes_before"]), size(part["bytes_after"])),
                *_measured(part["before"], part["after"], part["loss"]),
                f"{_mean(errors):.4f} (rounded {_mean(rounded):.4f})" if errors else MISSING,
                *_speeds(part["speed_before"], part["speed_after"]),
                "" if part["kept"] else "left wide",
            )
        )
    sizes = report["sizes"]
    rows.append(
        (
            "whole",
            "",
            "",
            _change(size(sizes["wide"]["total"]), size(sizes["quantized"]["total"])),
            *_measured(report["before"], report["after"], report["loss"]),
            "",
            *_speeds(report["speed_before"], report["speed_after"]),
            "",
        )
    )
    return rows


def aligned(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return lines of columns as wide as their widest cell; a column without any text is left out."""
    used = [index for index in range(len(head)) if any(row[index] for row in rows)]
    table = [[row[index] for index in used] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(used))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _measured(before: Any, after: Any, loss: Any) -> tuple[str, str]:
    if not before or not after or not loss:
        return MISSING, MISSING
    percent = _change(f"{100 * before['answers']:.1f}%", f"{100 * after['answers']:.1f}%")
    note = "" if loss["of"] == "answers" else " of tokens"
    return percent, f"{loss['points']:.2f}{note} ({loss['low']:.2f} to {loss['high']:.2f})"


def _speeds(before: Any, after: Any) -> tuple[str, str]:
    if not before or not after:
        return MISSING, MISSING
    return (
        _change(f"{before['ttft_ms']:.1f}", f"{after['ttft_ms']:.1f} ms"),
        _change(f"{before['decode_tokens_per_s']:.1f}", f"{after['decode_tokens_per_s']:.1f}"),
    )


def _change(before: str, after: str) -> str:
    return f"{before} -> {after}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
