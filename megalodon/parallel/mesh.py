"""The ranks of a run and the groups they form.

    mesh = Mesh(Layout(dp_shard=2, cp=2), "cpu")       # after torch.distributed.init_process_group, on every rank

World = dp_replicate x dp_shard x cp x tp, tp counted fastest, then cp. Not here: what goes over the groups.
"""

from datetime import timedelta
from functools import cached_property

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from megalodon.parallel.layout import Layout


class Mesh:
    """Views of the same ranks, for data, storage and sums; a rank's coordinate in each direction.

    Args:
        layout:   of as many ranks as there are.
        device:   cpu or cuda.
        patience: what a rank waits for another by way of the host; None = what PyTorch waits, 30 minutes.
    """

    def __init__(self, layout: Layout, device: str, patience: timedelta | None = None) -> None:
        if layout.world_size != dist.get_world_size():
            raise ValueError(f"{layout} is of {layout.world_size} ranks; there are {dist.get_world_size()}")
        self.layout, self.rank = layout, dist.get_rank()
        rest, self.tp_rank = divmod(self.rank, layout.tp)
        self.data_rank, self.cp_rank = divmod(rest, layout.cp)
        self.device, self._patience = device, patience

    def _view(self, *axes: tuple[str, int]) -> DeviceMesh:
        names, sizes = zip(*axes, strict=True)
        return init_device_mesh(self.device, sizes, mesh_dim_names=names)

    @cached_property
    def storage(self) -> DeviceMesh:
        """dp_replicate, fsdp, tp: how the weights of blocks lie. A shard is one of dp_shard x cp."""
        shape = self.layout
        return self._view(("dp_replicate", shape.dp_replicate), ("fsdp", shape.shards), ("tp", shape.tp))

    @cached_property
    def copy(self) -> DeviceMesh:
        """dp_replicate, copy: all ranks that hold one copy of the model between them."""
        shape = self.layout
        return self._view(("dp_replicate", shape.dp_replicate), ("copy", shape.shards * shape.tp))

    @cached_property
    def pieces(self) -> dist.ProcessGroup:
        """The ranks that read the pieces of one sequence, in their order."""
        shape = self.layout
        return self._view(("dp", shape.data_ranks), ("cp", shape.cp), ("tp", shape.tp)).get_group("cp")

    @cached_property
    def features(self) -> dist.ProcessGroup:
        """The ranks that hold the features of one layer between them, in their order."""
        return self.storage.get_group("tp")

    @cached_property
    def alike(self) -> dist.ProcessGroup:
        """The ranks that hold the same features, of every copy and piece: over these islands are summed."""
        shape = self.layout
        return self._view(("alike", shape.data_ranks * shape.cp), ("tp", shape.tp)).get_group("alike")

    @cached_property
    def talk(self) -> dist.ProcessGroup:
        """All ranks, by way of the host: for numbers and words that steer a run."""
        world: dist.ProcessGroup = dist.group.WORLD  # type: ignore[assignment]
        return world if self.device == "cpu" else dist.new_group(backend="gloo", timeout=self._patience)

    @cached_property
    def aside(self) -> dist.ProcessGroup:
        """All ranks once more, by way of the host: for one other thread of each."""
        backend = None if self.device == "cpu" else "gloo"  # None: that of all ranks
        group: dist.ProcessGroup = dist.new_group(backend=backend, timeout=self._patience)
        return group
