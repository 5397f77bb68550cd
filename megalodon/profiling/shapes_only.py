"""Running a model in shape only: no values, no memory, and yet everything that asks for sizes is answered.

    with shapes_only(card), LiveBytes() as live:
        model = laid_out(config)             # parameters without values
        …                                    # a pass forward and back, as on that GPU; None: as on a CPU
    live.peak()

PyTorch's FakeTensorMode knows shape and dtype of every result without computing it, but has no answer where code asks
for a number on the host: how long a document is, how many rows it takes. Such numbers come from integers that follow
from positions and document starts alone, so integers stay real here, and floats do not.
Not here: what is kept for the pass back (training/activations.py).
"""

import contextlib
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from megalodon.model.architectures import LanguageModel, LanguageModelConfig, build_model
from megalodon.model.layers import Float32Module
from megalodon_kernels.dispatch import Backend, Card, assume


@contextlib.contextmanager
def shapes_only(card: Card | None) -> Iterator[None]:
    """Inside, new tensors of floats have no values; ops run as they would on such a GPU, or on a CPU.

    Shapes of a GPU are taken on the device type cpu, which every build of torch knows.
    """
    with contextlib.nullcontext() if card is None else assume(card), _ShapesOnly():
        yield


def laid_out(config: LanguageModelConfig, backend: Backend = "auto", *, half_blocks: bool = False) -> LanguageModel:
    """Return the model of a configuration without values, ready to train; call it inside `shapes_only`.

    half_blocks: the matrices of blocks are bfloat16, as `model.bfloat16()` leaves them; the rest is float32.
    """
    with torch.device("meta"):
        model = build_model(config, backend=backend)
    made: dict[int, nn.Parameter] = {}  # a tied matrix stays one
    inside = {module for block in model.layers for module in block.modules()} if half_blocks else set()
    for module in model.modules():
        half = module in inside and not isinstance(module, Float32Module)
        for name, parameter in module.named_parameters(recurse=False):
            dtype = torch.bfloat16 if half else parameter.dtype
            known = made.setdefault(id(parameter), nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
            setattr(module, name, known)
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    return model.train()


class _ShapesOnly(TorchDispatchMode):
    """Operations on real integers run; all others become fake."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if any(isinstance(x, FakeTensor) for x in given):
            if func._schema.name.endswith("_") and isinstance(args[0], FakeTensor):
                return args[0]  # a change of values alone
            if func in _INDEXING:
                args = (args[0], _numbered(args[1]), *args[2:])
            return func(*args, **kwargs)  # a fake tensor takes the others along
        dtype = kwargs.get("dtype")
        if not given:
            with self._fake:
                made = func(*args, **kwargs)
            return made if _wide(made) else func(*args, **kwargs)
        if any(map(_wide, given)) or (dtype is not None and dtype.is_floating_point):
            with self._fake:
                return func(*args, **kwargs)
        return func(*args, **kwargs)


_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default}


def _numbered(index: Any) -> list[Tensor | None]:
    """The same index with masks, whose count a fake tensor would not know, as the places that they select."""
    masks = [x is not None and x.dtype == torch.bool and not isinstance(x, FakeTensor) for x in index]
    return [y for x, mask in zip(index, masks, strict=True) for y in (x.nonzero().unbind(1) if mask else (x,))]


def _wide(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Of all tensors in some values, and of those that a tensor sharded over ranks stands for; none of meta."""
    for x in tree_leaves(values):
        if is_traceable_wrapper_subclass(x):
            yield from _storages([getattr(x, name) for name in x.__tensor_flatten__()[0]])
        elif isinstance(x, Tensor) and x.device.type != "meta":
            yield x.untyped_storage()


class LiveBytes(TorchDispatchMode):
    """Notes when the storage of a result comes and goes, of tensors with values and without; not on the meta device.

    What was there before counts for nothing, and neither does a view of it.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._events: list[tuple[int, int]] = []
        """(storage, bytes) in their order; negative bytes where it goes."""
        self._known: dict[int, int] = {}
        """Address of a live storage -> its number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(out):
            if storage._cdata not in given:
                self._note(storage)
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._known or not size:
            return
        number = self._known[address] = len(self._events)
        self._events.append((number, size))
        weakref.finalize(storage, self._gone(address, number, size)).atexit = False

    def _gone(self, address: int, number: int, size: int) -> Callable[[], None]:
        def gone() -> None:
            self._known.pop(address, None)
            self._events.append((number, -size))

        return gone

    def peak(self, without: Collection[Tensor] = ()) -> int:
        """Return the most bytes that lived at once, not counting some tensors that live still."""
        left_out = {self._known.get(tensor.untyped_storage()._cdata) for tensor in without}
        most = now = 0
        for number, size in self._events:
            now += 0 if number in left_out else size
            most = max(most, now)
        return most
