"""Figures of the campaigns and measurements -> docs/reliability.json and the generated tables of docs/reliability.md.

A measurement writes {"name": …, "figures": [{"figure", "value", "limit", "ok"}, …], …}; further keys (seed, seconds,
faults) are kept. Not here: what is measured (the other files of this folder and its neighbours).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def figure(name: str, value: Any, limit: str | None = None, ok: bool | None = None) -> dict[str, Any]:
    """One measured value; without a limit it only informs."""
    return {"figure": name, "value": value, "limit": limit, "ok": ok}


def write_figures(path: Path, name: str, figures: Sequence[Mapping[str, Any]], **about: Any) -> None:
    """Write what one measurement found."""
    path.write_text(json.dumps({"name": name, **about, "figures": list(figures)}, indent=1, ensure_ascii=False) + "\n")
