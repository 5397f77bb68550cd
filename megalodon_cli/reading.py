"""--gpus N of `generate` and `evaluate`: ranks that only help rank 0 to read long texts.

    if joining.is_helper():
        return reading.help_with(directories, device)
    with reading.shared(models, device) as piece: ...     # piece: tokens of a pass that all ranks share, or None

Not here: the passes themselves (megalodon/parallel/spread.py), how ranks are started (launch.py).
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from megalodon_cli import joining

if TYPE_CHECKING:
    from megalodon.model.architectures import LanguageModel
    from megalodon.model.megalodon import Megalodon

PATIENCE = timedelta(days=30)
"""What helpers wait for the next long text: as long as a conversation lasts."""


def help_with(directories: Sequence[Path], device: str) -> None:
    """Load the models that rank 0 loads and read pieces for it until it ends."""
    from megalodon.inference.session import load_writer
    from megalodon.parallel.spread import follow
    from megalodon.training.plan import device_named

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, which may only break off an answer
    with joining.joined(device, PATIENCE) as team:
        place = device_named(team.device(device))
        models = _shareable([load_writer(directory).model.to(place) for directory in directories])
        if models:  # else rank 0 reads alone and says nothing
            follow(models, joining.everybody())


@contextmanager
def shared(models: "Sequence[LanguageModel]", device: str) -> Iterator[int | None]:
    """Let the helpers take part in every long pass of these models; yields how long one should be, None alone."""
    from megalodon.inference.session import PIECE
    from megalodon.parallel.spread import leading

    with joining.joined(device, PATIENCE) as team:
        able = _shareable(models)
        if team.world is None or not able:
            yield None
            return
        chunks = team.size * max(model.config.chunk_size for model in able)
        with leading(able, joining.everybody()):
            yield max(chunks, PIECE // chunks * chunks)


def _shareable(models: "Sequence[LanguageModel]") -> "list[Megalodon]":
    """Those whose text can be cut: of the baseline every token sees all before it."""
    from megalodon.model.megalodon import Megalodon

    return [model for model in models if isinstance(model, Megalodon)]
