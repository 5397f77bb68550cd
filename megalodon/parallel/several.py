"""Several ranks that hold a model between them and train it together; see `Ranks`, which is one process alone.

    ranks = SeveralRanks(Mesh(layout, "cpu"))       # on every rank, after init_process_group

Not here: how a model is sharded (fsdp.py), split (tensor.py), or reads a piece (chunk.py); who starts the processes.
"""

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement

from megalodon.errors import CheckFailed, EnvironmentFault
from megalodon.model.architectures import LanguageModel, ModelState
from megalodon.model.megalodon import Megalodon
from megalodon.model.state import State
from megalodon.model.weights import allocate
from megalodon.parallel.chunk import ChunkPrefix
from megalodon.parallel.collectives import all_gather
from megalodon.parallel.fsdp import shard_model, sum_islands, units
from megalodon.parallel.mesh import Mesh
from megalodon.parallel.ranks import Piece, Ranks
from megalodon.parallel.talk import Talk
from megalodon.parallel.tensor import split_layers
from megalodon_kernels import Statistics

T = TypeVar("T")


class _Sharded(NamedTuple):
    """How FSDP laid out a parameter."""

    mesh: DeviceMesh
    placements: Sequence[Placement]
    shape: torch.Size
    """Of what its ranks hold between them."""


class SeveralRanks(Ranks):
    """See above.

    Args:
        mesh: of the ranks.
    """

    alone = False

    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.layout = mesh, mesh.layout
        self.rank, self.data_rank = mesh.rank, mesh.data_rank
        self.stream = mesh.data_rank * mesh.layout.cp + mesh.cp_rank
        self._islands: dict[str, nn.Parameter] = {}
        self._split: dict[str, int] = {}
        self._sharded: dict[str, _Sharded] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._talk, self.writers = Talk(mesh.talk), Talk(mesh.aside)

    # The model

    def wrap(self, model: LanguageModel, *, bf16: bool) -> None:
        self._shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        if self.layout.tp > 1:
            self._split = split_layers(cast(Megalodon, model), self.mesh)
        islands = shard_model(model, self.mesh, bf16=bf16)
        if isinstance(model, Megalodon) and model.embed.weight.is_meta:
            allocate(model, torch.device(self.mesh.device))
        self._islands = {name: model.get_parameter(name) for name in islands}
        for name, p in model.named_parameters():
            if isinstance(p, DTensor):
                self._sharded[name] = _Sharded(p.device_mesh, p.placements, p.shape)

    def parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        found = {}
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                part = cast(DTensor, parameter.detach()).to_local()
                found[name] = nn.Parameter(part, requires_grad=parameter.requires_grad)
            else:
                found[name] = parameter
        return found

    def gradients(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        sum_islands(self._islands, self._split, self.mesh)
        for name, parameter in model.named_parameters():
            if isinstance(parameter, DTensor):
                grad = parameter.grad
                parameters[name].grad = grad.to_local() if isinstance(grad, DTensor) else None
        return {name: p.grad for name, p in parameters.items() if p.grad is not None}

    def at_rest(self, model: nn.Module) -> None:
        for unit in units(model):
            unit.reshard()

    def copies(self, name: str) -> int:
        shape = self.layout
        if name not in self._islands:
            return shape.dp_replicate
        return shape.world_size // (shape.tp if name in self._split else 1)

    # A step

    def piece(self, model: LanguageModel, tokens: Tensor, starts: Tensor | None) -> dict[str, Any]:
        if self.layout.cp == 1:
            return {"tokens": tokens.to(model.device), "starts": starts}
        assert isinstance(model, Megalodon)
        length = tokens.shape[1] // self.layout.cp
        prefix = ChunkPrefix(self.mesh.pieces, starts, len(tokens), length, model.config.chunk_size)
        return {"tokens": self._piece(tokens).to(model.device), "starts": prefix.starts, "prefix": prefix}

    def scored(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        hidden, targets = hidden.flatten(0, 1), self._piece(targets).flatten()
        if self.layout.tp > 1:
            low, high = (len(targets) * n // self.layout.tp for n in (self.mesh.tp_rank, self.mesh.tp_rank + 1))
            hidden, targets = hidden[low:high], targets[low:high]
        return hidden, targets

    def _piece(self, x: Tensor) -> Tensor:
        """(B, T) -> (B, T / cp)."""
        return x.chunk(self.layout.cp, 1)[self.mesh.cp_rank]

    def last_pass(self, model: nn.Module, last: bool) -> None:
        for unit in units(model):
            unit.set_requires_gradient_sync(last)

    # Agreement

    def total(self, *counts: int) -> list[int]:
        mine = self.mesh.cp_rank == 0 and self.mesh.tp_rank == 0
        sums = torch.tensor(counts if mine else [0] * len(counts))
        dist.all_reduce(sums, group=self.mesh.talk)
        found: list[int] = sums.tolist()
        return found

    def sums(self, values: Sequence[float]) -> list[float]:
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums, group=self.mesh.talk)
        found: list[float] = sums.tolist()
        return found

    def most(self, number: int) -> int:
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.mesh.talk)
        return int(largest)

    def from_main(self, value: Callable[[], T]) -> T:
        return self._talk.from_main(value)

    def all_have(self, error: Exception) -> bool:
        return error is self._talk.common

    def first(self, word: str | None) -> str | None:
        if not self.any(word is not None)[0]:
            return word
        said: str = next(one for one in self._talk.gathered(word) if one is not None)
        return said

    def check_alike(self, parameters: Mapping[str, nn.Parameter]) -> None:
        shape, mine = self.layout, {}
        for name, part in parameters.items():
            if self.copies(name) > 1:
                # Who holds the same part: all ranks, those with the same features, or the same place in another copy.
                same = -1 if name in self._islands else self.rank % (shape.shards * shape.tp)
                holders = self.mesh.tp_rank if name in self._islands and name in self._split else same
                value = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                mine[name] = holders, hashlib.sha256(value).hexdigest()
        found: dict[tuple[str, int], str] = {}
        differ: dict[str, list[int]] = {}
        for rank, one in enumerate(self._talk.gathered(mine)):
            for name, (holders, digest) in one.items():
                if found.setdefault((name, holders), digest) != digest:
                    differ.setdefault(name, []).append(rank)
        if differ:
            name, ranks = next(iter(differ.items()))
            more = f" and {len(differ) - 1} more" if len(differ) > 1 else ""
            raise CheckFailed(
                f"{name}{more} of rank {', '.join(map(str, ranks[:8]))} is no longer what the other ranks hold",
                "a device or a link is faulty; the same command continues from the newest checkpoint",
            )

    def check_shared(self, directory: Path) -> None:
        def put() -> Path:
            sign = directory / f".shared-{secrets.token_hex(4)}"
            sign.touch()
            return sign

        sign = self.from_main(put)
        missing = self.first(None if sign.exists() else f"rank {self.rank} does not see {directory} as rank 0 does")
        self.from_main(sign.unlink)
        if missing:
            raise EnvironmentFault(
                f"{missing}; expected a directory that all ranks share, such as one of a network disk"
            )

    # Whole tensors

    def writes(self, name: str) -> bool:
        shape = self.layout
        if name in self._sharded:
            return self.rank < shape.shards * shape.tp
        return self.rank < (shape.tp if name in self._split else 1)

    def place(self, name: str, part: Tensor) -> Piece:
        whole = self._shapes.get(name, tuple(part.shape))
        offsets = [0] * len(whole)
        if name in self._split:
            axis = self._split[name]
            offsets[axis] = whole[axis] // self.layout.tp * self.mesh.tp_rank
        if name in self._sharded:
            spec = self._sharded[name]
            rank, ranks = spec.mesh.get_local_rank(spec.mesh.ndim - 1), spec.mesh.size(spec.mesh.ndim - 1)
            rows = spec.shape[0]
            offsets[0] += min(rows, -(-rows // ranks) * rank)  # as torch.chunk cuts
        return Piece(tuple(offsets), whole)

    def whole(self, name: str, part: Tensor) -> Tensor:
        part = part.detach()
        if name in self._sharded:
            spec = self._sharded[name]
            stride = torch.empty(spec.shape, device="meta").stride()
            sharded = DTensor.from_local(part, spec.mesh, spec.placements, shape=spec.shape, stride=stride)
            part = sharded.full_tensor()
        if name in self._split:
            part = torch.cat(all_gather(part, self.mesh.features).unbind(0), self._split[name])
        return part

    @contextmanager
    def whole_features(self, state: ModelState | None) -> Iterator[ModelState | None]:
        if self.layout.tp == 1:
            yield state
            return
        group = self.mesh.features

        def whole(x: Tensor) -> Tensor:
            return torch.cat(all_gather(x, group).unbind(0), 1)

        def statistics(x: Statistics) -> Statistics:
            return x._replace(mean=whole(x.mean), var=whole(x.var))

        if isinstance(state, State):
            layers = [x._replace(norm=statistics(x.norm), cema=whole(x.cema)) for x in state.layers]
            state = state._replace(layers=tuple(layers), norm=statistics(state.norm))
        parts = {name: island.data for name, island in self._islands.items() if name in self._split}
        for name in parts:
            self._islands[name].data = self.whole(name, self._islands[name])
        try:
            yield state
        finally:
            for name, part in parts.items():
                self._islands[name].data = part
