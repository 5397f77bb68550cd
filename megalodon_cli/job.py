"""What `pretrain` passes on between its parts: what was asked, what a run works on, how it ended.

Not here: making these (training_job.py), where a run goes (run_start.py), what is shown (training_screen.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from megalodon.data.loader import Loader
    from megalodon.data.prepare import Prepared
    from megalodon.model.megalodon import ModelConfig
    from megalodon.recipe import Resolved, RunConfig
    from megalodon.training.loop import Row
    from megalodon.training.plan import Plan


class Asked(NamedTuple):
    """What the command line says of a run besides its recipe."""

    device: str = "auto"
    resume: str = "auto"
    """auto, never, or a step directory."""
    out_dir: Path | None = None
    allow: Sequence[str] = ()
    """Frozen keys that may differ."""
    no_prepare: bool = False


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked; nothing of the run is written yet."""

    config: "RunConfig"
    resolved: "Resolved"
    directory: Path
    prepared: "Prepared"
    loader: "Loader"
    model_config: "ModelConfig"
    plan: "Plan"
    frozen: Mapping[str, Any]
    asked: Asked


class Ending(NamedTuple):
    """How a run went: all rows of its metrics, its scores, its training time in seconds, the commands to try next."""

    rows: "list[Row]"
    scores: Mapping[str, Any]
    seconds: float
    following: Sequence[str]
