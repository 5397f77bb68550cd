"""A profile as text, Markdown, CSV, JSON and pictures. Not here: what is measured (megalodon/profiling)."""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon.profiling.baseline import SCHEMA
from megalodon.profiling.explain import explain as explained
from megalodon.profiling.meter import Row
from megalodon_cli import console, figures

if TYPE_CHECKING:
    from megalodon.profiling.timing import Report
    from megalodon_cli.profile_request import Comparison

BAR = 40
"""Characters of the longest bar."""
RIGHT = {"fp32": 1e-4, "bf16": 2e-2, "fp64": 1e-10}
"""Dtype -> the largest error that rounding explains, with a margin: a larger one is a fault of the op."""
COLUMNS: dict[str, tuple[str, ...]] = {
    "kernels": ("name", "what", "shape", "backend", "time", "step", "flops", "bytes", "kept", "peak", "error"),
    "layers": ("name", "what", "shape", "time", "block", "kept"),
    "prefill": ("shape", "time", "tokens", "flat", "flops", "state", "peak"),
    "decode": ("shape", "time", "tokens", "flat", "bytes", "state", "peak"),
    "train": ("name", "what", "shape", "time", "step", "tokens", "flops", "kept", "peak"),
    "data": ("name", "shape", "time", "tokens"),
}
"""Section -> its columns; one that no row has a value for is left out."""


def show(name: str, report: "Report", *, explain: bool) -> None:
    """Print a report: the machine, a table a section, the speed over depth, and in words what binds each row."""
    for line in heading(name, report):
        console.result(line)
    for title, rows in tables(report):
        console.result(f"\n{title}")
        console.table(rows, right=[n for n, cell in enumerate(rows[1]) if cell[:1].isdigit() or cell == "-"])
    for line in bars(report.rows):
        console.result(line)
    for row in report.rows:
        if row.error is not None and not row.error <= RIGHT[row.dtype]:
            said = f"its error against the reference is {row.error:.1e}, expected at most {RIGHT[row.dtype]:.0e}"
            console.warning(f"{row.name} {row.what} {row.sizes}: {said}; megalodon doctor checks every op")
    for line in _words(report) if explain else ():
        console.result(line)


def heading(name: str, report: "Report") -> list[str]:
    """Return what was measured on what, in two lines."""
    header, constants = report.header, report.constants
    gpu = [f"{key} {header[key]}" for key in ("cuda", "driver_version", "clocks.sm", "clocks.max.sm") if key in header]
    place = header["device"] if gpu else f"cpu {header['device']}, {header['threads']} threads"
    versions = [f"{key} {header[key]}" for key in ("torch", "triton", "python", "megalodon") if header[key]]
    commit = [f"commit {header['commit']}"] if header["commit"] else []
    dtype = report.rows[0].dtype if report.rows else ""
    matmul = console.amount(constants["matmul_tflops"] * 1e12, " ", "G")
    return [
        f"profile {name} on {', '.join([place, *gpu, *versions, *commit])}",
        f"measured here: matrix product {matmul}FLOP/s in {dtype}, copy {constants['copy_gb_per_s']:.1f} GB/s; "
        "shares are of these",
    ]


def tables(report: "Report") -> Iterator[tuple[str, list[list[str]]]]:
    """Yield a title and a table for each section, the header first."""
    rows = report.rows
    memory = "allocated" if report.header["device_type"] == "cuda" else "resident, process"
    for section in dict.fromkeys(row.section for row in rows):
        own = [row for row in rows if row.section == section]
        cells = [_cells(row) for row in own]
        shown = [column for column in COLUMNS[section] if any(cell[column] != "-" for cell in cells)]
        tokens = next((row.error_tokens for row in own if row.error_tokens), None)
        heads = HEADS | {
            "error": f"error, {tokens} tokens",
            "peak": f"peak {memory}",
            "name": NAMES.get(section, "what"),
        }
        yield section, [[heads[column] for column in shown], *([cell[column] for column in shown] for cell in cells)]


NAMES = {"kernels": "op", "layers": "part", "train": "part"}
"""Section -> what its rows are called by."""
HEADS = {
    "what": "pass",
    "shape": "shape",
    "backend": "backend",
    "time": "median ± spread, ms",
    "step": "% of step",
    "block": "% of block",
    "flops": "FLOP/s (% of peak)",
    "bytes": "B/s (% of peak)",
    "tokens": "tokens/s",
    "flat": "x least depth",
    "kept": "kept for backward",
    "state": "state",
}


def _cells(row: Row) -> dict[str, str]:
    spread = 50 * (row.ms_high - row.ms_low) / row.ms if row.ms > 0 else 0.0
    return {
        "name": row.name,
        "what": row.what,
        "shape": row.sizes,
        "backend": row.backend,
        "time": f"{_digits(row.ms)} ± {spread:.0f}%",
        "step": _share(row.step_share),
        "block": _share(row.step_share),
        "flops": _rate(None if row.tflops is None else 1e12 * row.tflops, row.matmul_share),
        "bytes": _rate(None if row.gb_per_s is None else 1e9 * row.gb_per_s, row.copy_share),
        "tokens": "-" if row.tokens_per_s is None else f"{row.tokens_per_s:,.0f}",
        "flat": "-" if row.flatness is None else f"{row.flatness:.3f}",
        "kept": _size(row.kept_bytes),
        "peak": _size(row.peak_bytes),
        "state": _size(row.state_bytes),
        "error": "-" if row.error is None else f"{row.error:.1e}",
    }


def _digits(value: float) -> str:
    """Three digits, no exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.6f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _rate(value: float | None, share: float | None) -> str:
    return "-" if value is None or share is None else f"{console.amount(value, ' ', 'G')} ({100 * share:.0f}%)"


def _size(value: int | None) -> str:
    return "-" if value is None else f"{console.amount(value, ' ', 'G')}B"


def _words(report: "Report") -> Iterator[str]:
    said = [text for row in report.rows if (text := explained(row, report.constants))]
    yield from ("\nwhat binds each row", *(f"  {text}" for text in said)) if said else ()


def speeds(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Return tokens/s over depth: `decode, 128 tokens` -> (depth, tokens/s); only where there are two depths."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.section in ("prefill", "decode") and row.tokens_per_s is not None:
            label = f"{row.section}, {row.shape['tokens']:,} tokens"
            found.setdefault(label, []).append((row.shape["depth"], row.tokens_per_s))
    return {label: points for label, points in found.items() if len(points) > 1}


def bars(rows: Sequence[Row]) -> Iterator[str]:
    """Yield tokens/s over depth as bars of text."""
    for label, points in speeds(rows).items():
        most = max(speed for _, speed in points)
        width = max(len(f"{depth:,}") for depth, _ in points)
        yield f"\n{label}: tokens/s over depth"
        for depth, speed in points:
            yield f"  {depth:>{width},} │{'█' * round(BAR * speed / most)} {speed:,.0f}"


def show_changes(found: "Comparison") -> list[dict[str, Any]]:
    """Print every row that the baseline has too, and how many have no counterpart; return the rows for JSON."""
    path, limit = found.baseline.path, found.baseline.limit
    if found.alone:
        console.note(f"{found.alone} rows are not compared: either {path} or this has no such row")
    if not found.changes:
        return []
    rows = [[c.key, _digits(c.before_ms), _digits(c.after_ms), f"{100 * c.slowdown:+.1f}"] for c in found.changes]
    console.result(f"\nagainst {path}, at most {limit:.0%} slower")
    console.table([["row", "before, ms", "now, ms", "%"], *rows], right=(1, 2, 3))
    return [{**c._asdict(), "slowdown": round(c.slowdown, 4)} for c in found.changes]


def write_files(
    name: str, report: "Report", document: Mapping[str, Any], out: Path | None, plot: Path | None
) -> Iterator[Path]:
    """Write the files that are asked for; yield each that is there."""
    if out:
        _write(out, name, report, document)
        yield out
    if plot and _draw(name, report.rows, plot):
        yield plot


def _write(path: Path, name: str, report: "Report", document: Mapping[str, Any]) -> None:
    """Write a report as JSON (which --baseline reads), Markdown or CSV, by the ending of the file."""
    if path.suffix == ".json":
        text = json.dumps({"schema": SCHEMA, "ok": True, "result": document, "warnings": []}, indent=1) + "\n"
    elif path.suffix == ".md":
        text = "\n".join(_markdown(name, report)) + "\n"
    else:
        text = _csv(report)
    path.write_text(text, encoding="utf-8")


def _markdown(name: str, report: "Report") -> Iterator[str]:
    yield from ("  \n".join(heading(name, report)), "")
    for title, rows in tables(report):
        yield from (f"### {title}", "")
        for number, row in enumerate(rows):
            yield f"| {' | '.join(row)} |"
            if number == 0:
                yield f"|{' --- |' * len(row)}"
        yield ""
    yield from (f"- {text}" for row in report.rows if (text := explained(row, report.constants)))


def _csv(report: "Report") -> str:
    text = io.StringIO()
    names = [field.name for field in fields(Row)]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row.document(), "shape": row.sizes} for row in report.rows)
    return text.getvalue()


def _draw(name: str, rows: Sequence[Row], path: Path) -> bool:
    """Draw tokens/s over depth; without two depths of anything there is nothing to draw, and a warning says so."""
    found = speeds(rows)
    if found:
        figures.plot_speeds(name, found, path)
    else:
        console.warning(
            f"--plot {path}: nothing to draw; --what prefill or decode with two depths gives speed over depth"
        )
    return bool(found)
