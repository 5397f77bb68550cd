"""Reading long text over several ranks: each holds the whole model and reads a piece of what one of them is to read.

    with leading([model], group): ...        # on rank 0: every pass that is long enough is shared
    follow([model], group)                   # on the others: take part until rank 0 leaves

What rank 0 does with the model (a session, an evaluation) stays as it is; its long passes are cut into as many pieces
as there are ranks, and short ones, such as tokens that are written one by one, it takes alone. Not here: training.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megalodon.model.megalodon import Megalodon
from megalodon.model.state import LayerState, State
from megalodon.parallel.chunk import ChunkPrefix
from megalodon.parallel.collectives import all_gather
from megalodon_kernels import Statistics


@contextmanager
def leading(models: Sequence[Megalodon], group: dist.ProcessGroup) -> Iterator[None]:
    """Share long passes of these models with the other ranks while the context lasts; called on rank 0 of the group."""
    ranks = dist.get_world_size(group)
    own = [model.hidden for model in models]
    broken = False  # within a pass: the others wait for the rest of it, and would not hear a goodbye

    def shared(number: int) -> Any:
        model = models[number]

        def hidden(tokens: Tensor, state: State | None = None, starts: Tensor | None = None) -> tuple[Tensor, State]:
            nonlocal broken
            if tokens.dim() != 2 or tokens.shape[1] < ranks * model.config.chunk_size or tokens.shape[1] % ranks:
                return own[number](tokens, state, starts)
            told = number, tokens.cpu(), None if state is None else state.map(Tensor.cpu), starts, _precision(model)
            with _uninterrupted():
                broken = True
                dist.broadcast_object_list([told], src=0, group=group)
                found = _piece(model, own[number], tokens, state, starts, group)
                broken = False
                return found

        return hidden

    for number, model in enumerate(models):
        model.hidden = shared(number)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for model in models:
            del model.hidden
        if not broken:  # else they are told by the end of this process
            dist.broadcast_object_list([None], src=0, group=group)


def follow(models: Sequence[Megalodon], group: dist.ProcessGroup) -> None:
    """Take part in the passes of rank 0 until it leaves `leading`; the models are the same, in the same order."""
    with torch.inference_mode():
        while True:
            told: list[Any] = [None]
            dist.broadcast_object_list(told, src=0, group=group)
            if told[0] is None:
                return
            number, tokens, state, starts, precision = told[0]
            model = models[number].eval()
            here = None if state is None else state.map(lambda x: x.to(model.device))  # noqa: B023  # called at once
            with torch.autocast(model.device.type, precision, enabled=precision is not None):
                _piece(model, model.hidden, tokens.to(model.device), here, starts, group)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C comes after a pass: broken off in it, rank 0 would leave the others waiting for the rest."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if here else None
    try:
        yield
    finally:
        if before is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _precision(model: Megalodon) -> torch.dtype | None:
    kind = model.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _piece(
    model: Megalodon, hidden: Any, tokens: Tensor, state: State | None, starts: Tensor | None, group: dist.ProcessGroup
) -> tuple[Tensor, State]:
    """Read this rank's piece; the hidden values of all pieces, and the state behind the last, on every rank."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    length = tokens.shape[1] // ranks
    position = None if state is None else state.position.cpu()
    before = ChunkPrefix(group, starts, len(tokens), length, model.config.chunk_size, position)
    piece, after = hidden(tokens[:, rank * length : (rank + 1) * length], state, before.starts, before)
    whole = torch.cat(all_gather(piece, group).unbind(0), dim=1)
    return whole, _from_last(after, before.open_lengths()[-1], group)


def _from_last(state: State, open_length: int, group: dist.ProcessGroup) -> State:
    """The state of the last rank, whose open chunk has this many places, on every rank."""
    rank, last = dist.get_rank(group), dist.get_world_size(group) - 1

    def received(x: Tensor, length: int | None = None) -> Tensor:
        shape = x.shape if length is None else (len(x), length, *x.shape[2:])
        y = x.contiguous() if rank == last else x.new_empty(shape)
        dist.broadcast(y, group_src=last, group=group)
        return y

    def statistics(x: Statistics) -> Statistics:
        return Statistics(received(x.count), received(x.mean), received(x.var))

    layers = []
    for layer in state.layers:
        k, v = received(layer.k, open_length), received(layer.v, open_length)
        layers.append(LayerState(k, v, statistics(layer.norm), received(layer.cema)))
    return State(received(state.position), tuple(layers), statistics(state.norm))
