"""Where time and memory go, measured: `profile` runs the sections that were asked for and returns their rows.

    report = profile(Request(what=("kernels",), model_config=…, device=torch.device("cpu")))

Here is the section `kernels`; the sections that need a model stand in model_timing.py. Whatever would not fit into the
memory is refused before anything is measured. Not here: files and options (the command), what is compared with an older
measurement (baseline.py), what a plan predicts (megalodon/training).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megalodon.data.loader import Loader
from megalodon.errors import InputError, OutOfMemory
from megalodon.model.megalodon import Megalodon, ModelConfig
from megalodon.profiling import model_timing
from megalodon.profiling.meter import Meter, Row, dtype_name, milliseconds
from megalodon.profiling.numbers import Shapes
from megalodon.training.memory import available_memory, is_out_of_memory
from megalodon.training.optim import OptimConfig
from megalodon.training.plan import TrainConfig
from megalodon_kernels import use_backend
from megalodon_kernels.costs import COSTS, Cost, Sizes
from megalodon_kernels.measuring import Errors, errors, machine, prepare

WHAT = ("kernels", "layers", "prefill", "decode", "train", "data")
OPS = {name: cost.sizes for name, cost in COSTS.items()}
"""Every op with the names of its sizes."""
LENGTHS = (2048,)
"""Tokens, where none are asked for."""
BESIDE = 8
"""Memory of an op under measurement over what its forward pass moves: gradients, what is kept, scratch."""


@dataclass(frozen=True)
class Request:
    """What is measured, and on what."""

    model_config: ModelConfig
    train: TrainConfig
    device: torch.device
    what: tuple[str, ...] = ("kernels",)
    dtype: torch.dtype = torch.float32
    """Of activations; parameters stay float32 in training."""
    backend: Any = "auto"
    optim: OptimConfig = field(default_factory=OptimConfig)
    model: Callable[[], Megalodon] | None = None
    """Makes the model of prefill and decode; None: one of `model_config` with random weights."""
    loader: Loader | None = None
    """What `data` reads."""
    window: int = 2048
    """Tokens of a training window, where no lengths are asked for."""
    lengths: tuple[int, ...] | None = None
    shapes: Shapes | None = None
    """For kernels, instead of the model's."""
    new_tokens: tuple[int, ...] = (128,)
    depths: tuple[int, ...] = (0, 4 << 10, 64 << 10, 1 << 20)
    repeats: int = 5
    traced: Path | None = None
    report: Callable[[str], None] = lambda text: None


class Report(NamedTuple):
    """What was measured."""

    header: dict[str, Any]
    constants: dict[str, float]
    rows: list[Row]

    def document(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {"header": self.header, "constants": self.constants, "rows": [row.document() for row in self.rows]}


def profile(request: Request) -> Report:
    """Measure the sections that are asked for, in their order.

    Raises:
        InputError: sizes that do not go together.   KernelError: the backend cannot run an op as asked.
        OutOfMemory: a shape that does not fit; estimated before anything is allocated.
    """
    memory = available_memory(request.device)
    shapes = list(_shapes(request)) if "kernels" in request.what else []
    for name, sizes in shapes:
        need = BESIDE * COSTS[name].forward(sizes, request.dtype.itemsize).bytes
        _refuse(f"kernels: {name} at {_said(name, sizes)}", need, memory, request.device)
    for what in request.what:
        for text, need in model_timing.needs(what, request):
            _refuse(f"{what}: {text}", need, memory, request.device)
    meter = Meter(request.device, request.dtype, request.repeats, request.report, request.traced is not None)
    header = machine(request.device)
    # what asks for auto inside, such as the loss, gets the backend that was named
    with _memory_named(request.device), use_backend(request.backend):
        request.report("rates of this machine")
        constants = meter.constants()
        rows: list[Row] = []
        for what in request.what:
            rows += (
                _kernels(request, meter, shapes) if what == "kernels" else model_timing.SECTIONS[what](request, meter)
            )
    if request.traced:
        meter.write_trace(request.traced)
    return Report(header, constants, rows)


def model_sizes(config: ModelConfig, length: int, batch: int = 1) -> Sizes:
    """Return the sizes of a model's ops."""
    c = config
    return Sizes(
        B=batch, L=length, D=c.model_dim, H=c.num_heads, Z=c.z_dim, V=c.value_dim, F=c.ffn_hidden_dim, N=c.cema_ndim,
        G=c.norm_num_groups, C=c.chunk_size, vocab_size=c.num_outputs,
    )  # fmt: skip


def _shapes(request: Request) -> Iterator[tuple[str, Sizes]]:
    """Every op with every shape it is measured at."""
    if request.shapes is None:
        for number, length in enumerate(request.lengths or LENGTHS):
            # a step of decoding does not depend on the length
            names = [name for name, cost in COSTS.items() if not (cost.prepared and number)]
            yield from ((name, model_sizes(request.model_config, length)) for name in names)
        return
    asked = [
        (name, shape | {"L": length})
        for name, given in request.shapes.items()
        for shape in given
        for length in ((shape["L"],) if "L" in shape else request.lengths or LENGTHS)
    ]
    for n, (name, shape) in enumerate(asked):
        if (name, shape) not in asked[:n]:
            try:
                yield name, replace(model_sizes(request.model_config, shape["L"]), **shape)
            except ValueError as error:
                raise InputError(f"--shapes: {name}: {error}") from None


def _kernels(request: Request, meter: Meter, shapes: Sequence[tuple[str, Sizes]]) -> list[Row]:
    """Every op forward and backward at every shape, with its error in the same row."""
    config = request.model_config
    rows: list[Row] = []
    # a backend that cannot run what is asked is found before anything is timed
    for name, sizes in shapes:
        _errors(name, COSTS[name], replace(sizes, B=1, L=min(sizes.L, 8)), request)
    lengths = {sizes.L for _, sizes in shapes if sizes == model_sizes(config, sizes.L)}
    steps = {length: model_timing.step_seconds(request, meter, length) for length in sorted(lengths)}
    for name, sizes in shapes:
        step = steps.get(sizes.L) if sizes == model_sizes(config, sizes.L) else None
        rows += _kernel(name, COSTS[name], sizes, step, request, meter)
    return rows


def _kernel(name: str, cost: Cost, sizes: Sizes, step: float | None, request: Request, meter: Meter) -> Iterator[Row]:
    text = _said(name, sizes)
    found = _errors(name, cost, sizes, request)
    passes = prepare(cost, sizes, request.dtype, request.device, request.backend)
    calls = cost.calls * request.model_config.num_layers or 1
    for what, call, work, error in (
        ("forward", passes.forward, cost.forward, found.forward),
        ("backward", passes.backward, cost.backward, found.backward),
    ):
        if call is None or work is None:
            continue
        if request.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(request.device)
        spread = meter.time(f"{name} {what} {text}", call)
        peak = torch.cuda.max_memory_allocated(request.device) if request.device.type == "cuda" else None
        yield Row(
            "kernels", name, what, sizes.named(cost.sizes), dtype_name(request.dtype), passes.backend,
            **milliseconds(spread),
            **meter.roofline(work(sizes, request.dtype.itemsize), spread),
            step_share=spread.median * calls / step if step and cost.backward else None,
            kept_bytes=passes.kept_bytes if what == "forward" else None,
            peak_bytes=peak,
            error=error,
            error_tokens=found.tokens,
        )  # fmt: skip


def _errors(name: str, cost: Cost, sizes: Sizes, request: Request) -> Errors:
    try:
        return errors(cost, sizes, request.dtype, request.device, request.backend)
    except ValueError as error:
        raise InputError(f"{name} at {_said(name, sizes)}: {error}") from None


def _said(name: str, sizes: Sizes) -> str:
    return " ".join(f"{size} {value}" for size, value in sizes.named(COSTS[name].sizes).items())


def _refuse(what: str, need: float, available: int | None, device: torch.device) -> None:
    if available is not None and need > available:
        raise OutOfMemory(
            f"{what} needs about {need / 2**30:,.1f} GiB (estimated); {device} has {available / 2**30:,.1f} GiB free",
            "a smaller -p, --shapes or model",
        )


@contextmanager
def _memory_named(device: torch.device) -> Iterator[None]:
    """Raises: OutOfMemory for what PyTorch and Python raise where the estimate was too small."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = (str(error).splitlines() or [""])[0] or "Python found none"
        raise OutOfMemory(f"out of memory on {device}: {said}", "a smaller -p, --shapes or model") from error
