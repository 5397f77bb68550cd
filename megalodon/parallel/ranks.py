"""The ranks of a run as training sees them: one process alone, and what several must answer too (several.py).

    ranks = ALONE
    ranks.wrap(model, bf16=False)
    hidden, state = model.hidden(**ranks.piece(model, tokens, starts))       # of its windows, or its piece of them

Every rank calls the same methods in the same order; what steers a run (stop, save, roll back) is agreed on first.
Nothing here imports PyTorch's distributed engine, which takes half a second to load.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from torch import Tensor, nn

from megalodon.model.architectures import LanguageModel, ModelState
from megalodon.parallel.layout import ONE, Layout

if TYPE_CHECKING:
    from megalodon.parallel.talk import Talk

T = TypeVar("T")


class Piece(NamedTuple):
    """Where a rank's part of a tensor lies in the whole."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    """Of the whole tensor."""


class Ranks:
    """One process, which is all ranks there are: what it has is the whole, what it says is agreed."""

    alone = True
    layout: Layout = ONE
    rank = 0
    """The number of this process."""
    data_rank = 0
    """Which share of the windows of a step this rank reads, of `layout.data_ranks`."""
    writers: "Talk | None" = None
    """All of them once more, for the thread that saves; None for one process."""
    stream = 0
    """Which stream of random numbers is this rank's: another for each share of windows and piece of a sequence."""

    @property
    def main(self) -> bool:
        """Whether this is the rank that speaks, and writes all but the parts of a checkpoint."""
        return self.rank == 0

    @property
    def reader(self) -> int:
        """Which share of whole windows is this rank's where nothing is learnt, of `readers`: pieces are not needed."""
        return self.rank // self.layout.tp

    @property
    def readers(self) -> int:
        """Ranks, or groups of those that hold a layer between them."""
        return self.layout.world_size // self.layout.tp

    # The model

    def wrap(self, model: LanguageModel, *, bf16: bool) -> None:
        """Leave this rank's parts of a model in it, in place. The model is called by `hidden` from then on.

        Of one that was built on the meta device nothing is ever whole; its parts have memory then and no values.
        """

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What the optimizer updates, by name: the parameters, of sharded ones this rank's part in the same memory."""
        return dict(model.named_parameters())

    def gradients(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Sum gradients over ranks as far as FSDP has not; give every parameter its part, and return them by name."""
        return {name: p.grad for name, p in parameters.items() if p.grad is not None}

    def at_rest(self, model: nn.Module) -> None:
        """Let the model hold its own parts alone: after a pass without gradients its outer unit is still gathered."""

    def copies(self, name: str) -> int:
        """How many ranks hold the same part of a parameter."""
        return 1

    # A step

    def piece(self, model: LanguageModel, tokens: Tensor, starts: Tensor | None) -> dict[str, Any]:
        """What `model.hidden` is called with to read this rank's piece of some windows, (B, T / cp).

        Args:
            tokens: (B, T), on any device. starts: (B, T) on the CPU, or None.
        """
        return {"tokens": tokens.to(model.device), "starts": starts}

    def scored(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the piece (B, L, D) and targets of the windows (B, T): those this rank takes the loss of.

        Returns: (M, D), (M,): with tp every rank of a group takes a part of the tokens that all have.
        """
        return hidden.flatten(0, 1), targets.flatten()

    def last_pass(self, model: nn.Module, last: bool) -> None:
        """Say whether the coming backward pass is the last of the step: only then gradients travel."""

    # Agreement

    def total(self, *counts: int) -> list[int]:
        """Sums over the shares of windows; the ranks of one share have the same counts."""
        return list(counts)

    def sums(self, values: Sequence[float]) -> list[float]:
        """Sums over all ranks, in float64; the values themselves for one process."""
        return list(values)

    def most(self, number: int) -> int:
        """The largest of the numbers of all ranks."""
        return number

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on some rank."""
        return [total > 0 for total in self.sums([float(flag) for flag in flags])]

    def from_main(self, value: Callable[[], T]) -> T:
        """What the main rank says; nobody else is asked. What it raises is raised everywhere."""
        return value()

    def all_have(self, error: Exception) -> bool:
        """Whether every rank is known to have met this error here, so that all can go on together: from `from_main`."""
        return True

    def first(self, word: str | None) -> str | None:
        """What the first rank says that does not say None, on every rank."""
        return word

    def check_alike(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Check that what several ranks hold of the parameters is the same on all of them, bit by bit.

        Raises: CheckFailed, on every rank, with the ranks and parameters that differ.
        """

    def check_shared(self, directory: Path) -> None:
        """Check that all ranks see one directory, into which each writes its parts of checkpoints.

        Raises: EnvironmentFault, on every rank, with one that does not see what the main rank puts there.
        """

    # Whole tensors

    def writes(self, name: str) -> bool:
        """Whether this rank saves its part of a parameter, or of anything that lies as it does, and not one like it."""
        return True

    def place(self, name: str, part: Tensor) -> Piece:
        """Where this rank's part of a parameter, or of anything that lies as it does, belongs in the whole."""
        return Piece((0,) * part.dim(), tuple(part.shape))

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole of a parameter, or of anything that lies as it does, on every rank: one after another."""
        return part.detach()

    @contextmanager
    def whole_features(self, state: ModelState | None) -> Iterator[ModelState | None]:
        """Let the islands have all features while the context lasts, on every rank, and yield a state that has them.

        Keys and values in it stay this rank's.
        """
        yield state


ALONE = Ranks()
