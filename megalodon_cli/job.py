"""What `pretrain` and `finetune` pass on between its parts: what was asked, what a run works on, how it ended.

Not here: making these (training_job.py, finetune_job.py), where a run goes (run_start.py), what is shown
(training_screen.py).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from megalodon.data.chat import ChatFormat
    from megalodon.data.examples import PreparedExamples
    from megalodon.data.loader import Batch, Samples
    from megalodon.data.prepare import Prepared
    from megalodon.model.architectures import LanguageModel, LanguageModelConfig
    from megalodon.recipe import FinetuneConfig, Resolved, RunConfig
    from megalodon.training.loop import Row
    from megalodon.training.plan import Plan
    from megalodon_cli.base_models import Base


class Asked(NamedTuple):
    """What the command line says of a run besides its recipe."""

    device: str = "auto"
    resume: str = "auto"
    """auto, never, or a step directory."""
    out_dir: Path | None = None
    allow: Sequence[str] = ()
    """Frozen keys that may differ."""
    no_prepare: bool = False
    ranks: int = 1
    """Processes that train together."""


@dataclass(frozen=True)
class Tuning:
    """What finetuning has besides: the model it began with, and how conversations are written."""

    base: "Base"
    chat: "ChatFormat"
    inherited: Sequence[str]
    """What was taken from the base, in lines."""
    example: Sequence[tuple[str, bool]]
    """The first example as text, in runs, each with whether it is trained on."""


@dataclass(frozen=True)
class Job:
    """Everything a run needs, checked; nothing of the run is written yet."""

    config: "RunConfig | FinetuneConfig"
    resolved: "Resolved"
    directory: Path
    prepared: "Prepared | PreparedExamples"
    loader: "Samples"
    model_config: "LanguageModelConfig"
    plan: "Plan"
    frozen: Mapping[str, Any]
    asked: Asked
    bos: bool
    """Whether a text begins with BOS."""
    num_classes: int
    """Ids that can be predicted."""
    validation: "Callable[[], Iterator[Batch]]"
    """Always the same batches of held-out tokens."""
    build: "Callable[[LanguageModel], None] | None" = None
    """See `Run.build`."""
    weights: "Mapping[str, Tensor] | None" = None
    """What a new run begins with, if it is known already."""
    tuning: Tuning | None = None


class Ending(NamedTuple):
    """How a run went: all rows of its metrics, its scores, its training time in seconds, the commands to try next."""

    rows: "list[Row]"
    scores: Mapping[str, Any]
    seconds: float
    following: Sequence[str]
