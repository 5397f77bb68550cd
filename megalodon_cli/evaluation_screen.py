"""What `megalodon evaluate` shows and writes. Not here: what the numbers say (megalodon/evaluation/report.py)."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon.errors import EnvironmentFault
from megalodon_cli import console

if TYPE_CHECKING:
    from megalodon_cli.evaluation_request import Evaluation

SCHEMA = "megalodon/evaluate/1"


def show(document: Mapping[str, Any]) -> None:
    """Print an evaluation."""
    from megalodon.evaluation import report

    console.result(report.heading(document))
    for title, rows in report.tables(document):
        console.result(f"\n{title}")
        columns = range(1, len(rows[0]))
        console.table(rows, right=[n for n in columns if all(row[n][:1] in "0123456789+-" for row in rows[1:])])
    for line in report.bars(document):
        console.result(line)
    console.result()
    for line in report.words(document):
        console.result(line)


def write_files(evaluation: "Evaluation", folder: Path | None, plot: Path | None) -> Iterator[Path]:
    """Write the files that are asked for; yield each that is there. Raises: EnvironmentFault."""
    from megalodon.evaluation import report

    document = evaluation.document
    if folder is not None:
        warnings = [{"text": text, "count": count} for text, count in console.settings().warnings.items()]
        whole = {"schema": SCHEMA, "ok": True, "result": document, "warnings": warnings}
        path = _free(folder, str(document["suite"]))
        if evaluation.samples:
            lines = (json.dumps(row, ensure_ascii=False, default=str) for row in evaluation.samples)
            _replace(samples := path.with_name(f"{path.stem}-samples.jsonl"), "".join(f"{line}\n" for line in lines))
            yield samples
        _replace(path.with_suffix(".md"), report.markdown(document))
        _replace(path, json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        yield path
    if plot is not None:
        from megalodon_cli import evaluation_figures

        evaluation_figures.plot_evaluation(document, plot)
        yield plot


def _free(folder: Path, suite: str) -> Path:
    """A name that no evaluation has: suite and moment."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"{folder} could not be made: {(error.strerror or str(error)).lower()}") from error
    name, number = f"{suite}-{time.strftime('%Y%m%dT%H%M%S')}", 1
    while (path := folder / (f"{name}-{number}.json" if number > 1 else f"{name}.json")).exists():
        number += 1
    return path


def _replace(path: Path, text: str) -> None:
    """Write a file in one move: a reader sees all of it or nothing."""
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise EnvironmentFault(f"{path} could not be written: {(error.strerror or str(error)).lower()}") from error
