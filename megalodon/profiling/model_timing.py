"""The sections of `profile` that need a model: layers, train, prefill, decode; and data.

What is timed is what training and generation call: a block, a step with its optimizer, `Session.feed`, `Session.step`.
A session at a depth is not read there: its state is made up, and says that so many tokens were read.
Not here: ops by themselves (timing.py).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from megalodon.errors import InputError
from megalodon.inference.session import PIECE, Session
from megalodon.model.loss import loss_sums
from megalodon.model.megalodon import Megalodon, ModelConfig
from megalodon.model.state import LayerState, State
from megalodon.profiling.meter import REST, Meter, Row, dtype_name, milliseconds
from megalodon.training.execution import compile_model, recompute
from megalodon.training.metrics import peak_memory
from megalodon.training.optim import build_optimizer
from megalodon.training.plan import MICRO_TOKENS
from megalodon_kernels import Statistics
from megalodon_kernels.costs import Work
from megalodon_kernels.measuring import Passes, Spread, floats, interleaved, kept_bytes, passes_of, timed

if TYPE_CHECKING:
    from megalodon.profiling.timing import Request

FEW_IDS = 64
"""Rows of the embedding where only a block is looked at."""


def needs(what: str, request: "Request") -> Iterator[tuple[str, float]]:
    """Yield what a section holds at once, in words and in bytes; estimated, for float32 activations."""
    config = request.model_config
    parameters = config.num_parameters()
    block = parameters / config.num_layers
    lengths = request.lengths or (request.window,)
    for length in lengths if what in ("kernels", "layers") else ():
        yield f"a block at {length:,} tokens", 8 * block + length * _kept_per_token(config)
    for length in lengths if what == "train" else ():
        tokens = pass_rows(request, length) * length
        kept = config.num_layers * tokens * _kept_per_token(config)
        yield f"a step of {tokens:,} tokens", 16 * parameters + kept + 8 * min(tokens, 2048) * config.num_outputs
    if what in ("prefill", "decode"):
        size = request.dtype.itemsize
        open_chunk = size * config.num_layers * config.chunk_size * (config.z_dim + config.value_dim)
        # it is made on the CPU in float32, whatever it is converted to
        weights = parameters * (max(4, size) if request.device.type == "cpu" else size)
        yield "the model and its state", weights + open_chunk + PIECE * _kept_per_token(config)


def _kept_per_token(config: ModelConfig) -> float:
    """Bytes that a block keeps of a token in training, about: float32, a dozen widths of the stream, values, FFN."""
    c = config
    return 4 * (14 * c.model_dim + 8 * c.z_dim + 6 * c.value_dim + (5 if c.swiglu else 3) * c.ffn_hidden_dim)


def pass_rows(request: "Request", length: int) -> int:
    """Return the rows of a training pass: as many tokens as a pass of this recipe has on this device."""
    return max(1, min(MICRO_TOKENS[request.device.type], request.train.batch_tokens) // length)


class Parts(NamedTuple):
    """A block at a shape: itself and each of its innermost modules, with the arguments it is called with."""

    block: nn.Module
    parts: dict[str, tuple[nn.Module, tuple[Any, ...]]]


def _parts(request: "Request", rows: int, length: int) -> Parts:
    """Call a block once, of a model with random weights, and keep what every part of it was given."""
    changes = {"num_layers": 1, "vocab_size": FEW_IDS, "output_size": -1, "share_emb": True}
    config = ModelConfig(**(request.model_config.model_dump() | changes))
    model = _to_device(Megalodon(config, backend=request.backend), request).train()
    block, parts = model.layers[0], {}
    hooks = []
    for name, module in block.named_modules():
        if not name or not any(True for _ in module.children()):

            def keep(module: nn.Module, args: tuple[Any, ...], name: str = name or "block") -> None:
                parts[name] = module, tuple(_leaf(x) for x in args)

            hooks.append(module.register_forward_pre_hook(keep))
    with _arithmetic(request), torch.no_grad():
        model.hidden(torch.zeros(rows, length, dtype=torch.int64, device=request.device))
    for hook in hooks:
        hook.remove()
    return Parts(block, parts)


def _leaf(x: Any) -> Any:
    return x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x


def _to_device(model: Megalodon, request: "Request") -> Megalodon:
    """Training keeps parameters in float32 and computes in bfloat16 by autocast; float64 is float64 throughout."""
    return (model.double() if request.dtype == torch.float64 else model).to(request.device)


def _arithmetic(request: "Request") -> AbstractContextManager[object]:
    return torch.autocast(request.device.type, torch.bfloat16, enabled=request.dtype == torch.bfloat16)


def _passes(module: nn.Module, args: tuple[Any, ...], request: "Request") -> Passes:
    def forward() -> Any:
        with _arithmetic(request):
            return module(*args)

    leaves = [*module.parameters(), *(x for x in floats(args) if x.requires_grad)]
    return passes_of(forward, leaves, [leaves, args], request.backend)


def _loss(request: "Request", tokens: int) -> Passes:
    """The loss of some tokens: the output matrix, the softmax, and the gradients of both."""
    config, device = request.model_config, request.device
    wide = torch.promote_types(request.dtype, torch.float32)
    hidden = torch.randn(1, tokens, config.model_dim, dtype=wide, device=device, requires_grad=True)
    # As large as a new model's: the softmax of logits in the tens is full of denormal numbers, which cost a CPU much.
    weight = torch.randn(config.num_outputs, config.model_dim, dtype=wide, device=device) / config.model_dim**0.5
    weight.requires_grad_()
    targets = torch.zeros(1, tokens, dtype=torch.int64, device=device)

    def forward() -> Tensor:
        with _arithmetic(request):
            return loss_sums(hidden, weight, targets, request.train.loss_chunk).objective

    return passes_of(forward, [hidden, weight], [hidden, weight], request.backend)


def step_seconds(request: "Request", meter: Meter, length: int) -> float:
    """Return the time of a training step's forward and backward pass over one row: the blocks and the loss."""
    module, args = _parts(request, 1, length).parts["block"]
    block, loss = _passes(module, args, request), _loss(request, length)
    meter.report(f"a block and the loss at L {length}, for the share of a step")
    seconds = [timed(call, meter.device, meter.repeats).median for call in _calls(block) + _calls(loss)]
    return request.model_config.num_layers * sum(seconds[:2]) + sum(seconds[2:])


def _calls(passes: Passes) -> list[Callable[[], Any]]:
    return [call for call in (passes.forward, passes.backward) if call is not None]


def _layers(request: "Request", meter: Meter) -> Iterator[Row]:
    """A block, and every part of it by itself, forward and backward."""
    for length in request.lengths or (request.window,):
        found = _parts(request, 1, length).parts
        whole = 0.0
        for name in ["block", *(name for name in found if name != "block")]:
            passes = _passes(*found[name], request)
            times = [
                (what, meter.time(f"{name} {what} L {length}", call))
                for what, call in zip(("forward", "backward"), _calls(passes), strict=True)
            ]
            whole = whole or sum(spread.median for _, spread in times)
            for what, spread in times:
                yield Row(
                    "layers", name, what, {"B": 1, "L": length}, dtype_name(request.dtype), request.backend,
                    **milliseconds(spread),
                    step_share=spread.median / whole,
                    kept_bytes=passes.kept_bytes if what == "forward" else None,
                )  # fmt: skip


class _Step:
    """A training step on random tokens."""

    def __init__(self, request: "Request", rows: int, length: int) -> None:
        self.request = request
        self.model = _to_device(
            Megalodon(request.model_config, seed=request.train.seed, backend=request.backend), request
        )
        self.model.train()
        self.optimizer = build_optimizer(dict(self.model.named_parameters()), request.optim)
        ids = torch.Generator().manual_seed(0)
        tokens = torch.randint(request.model_config.vocab_size, (rows, length), generator=ids)
        self.tokens = tokens.to(request.device)

    def loss(self) -> Tensor:
        with _arithmetic(self.request):
            hidden, _ = self.model.hidden(self.tokens)
            targets = self.tokens.roll(-1, 1)
            return loss_sums(hidden, self.model.output_weight, targets, self.request.train.loss_chunk).objective

    def update(self) -> None:
        self.optimizer.step()

    def __call__(self) -> None:
        (self.loss() / self.tokens.numel()).backward()
        self.update()
        self.optimizer.zero_grad(set_to_none=True)


def _train(request: "Request", meter: Meter) -> Iterator[Row]:
    """A whole step at every length, then what its parts take of it."""
    config, dtype, device = request.model_config, dtype_name(request.dtype), request.device
    for length in request.lengths or (request.window,):
        rows = pass_rows(request, length)
        step = _Step(request, rows, length)
        kept = kept_bytes(step.loss, list(step.model.parameters()))
        recompute(step.model, request.train.recompute)
        if text := compile_model(step.model, request.train.compile, device):
            meter.report(text)
        tokens, shape = rows * length, {"B": rows, "L": length}
        spread = meter.time(f"train step of {rows} x {length:,} tokens", step)
        flops = config.flops_per_token(length) * tokens
        seconds = spread.median
        yield Row(
            "train", "step", "step", shape, dtype, request.backend, **milliseconds(spread),
            step_share=1.0, flops=flops, floor_ms=1e3 * flops / meter.matmul, tflops=flops / seconds / 1e12,
            matmul_share=flops / seconds / meter.matmul, tokens_per_s=tokens / seconds, kept_bytes=kept,
            peak_bytes=peak_memory(device),
        )  # fmt: skip
        rest = seconds
        for name, part in _breakdown(request, meter, step, rows, length):
            rest -= part.median
            yield Row(
                "train", name, "forward+backward", shape, dtype, request.backend, **milliseconds(part),
                step_share=part.median / seconds,
            )  # fmt: skip
        # what stands between the modules, what is computed twice, and what the parts gain or lose by running alone
        yield Row(
            "train", REST, "forward+backward", shape, dtype, request.backend, 1e3 * rest, 1e3 * rest, 1e3 * rest,
            step_share=rest / seconds,
        )  # fmt: skip


def _breakdown(request: "Request", meter: Meter, step: _Step, rows: int, length: int) -> Iterator[tuple[str, Spread]]:
    """Every module of a block, alone, times the number of blocks; the loss; the optimizer."""
    layers = request.model_config.num_layers
    for name, (module, args) in _parts(request, rows, length).parts.items():
        if name != "block":
            yield name, _together(name, _passes(module, args, request), layers, meter)
    yield "loss", _together("loss", _loss(request, rows * length), 1, meter)
    (step.loss() / step.tokens.numel()).backward()
    meter.report("the optimizer")
    yield "optimizer", timed(step.update, meter.device, meter.repeats)


def _together(name: str, passes: Passes, times: int, meter: Meter) -> Spread:
    spreads = [meter.time(f"{name}, part of a step", call) for call in _calls(passes)]
    return Spread(*(times * sum(values) for values in zip(*spreads, strict=True)))


def state_at(model: Megalodon, depth: int) -> State:
    """Return a state as it stands after `depth` tokens, with made-up values: only sizes cost time."""
    if depth == 0:
        return model.empty_state(1)
    config, empty = model.config, model.empty_state(1)
    draw = torch.Generator(model.device).manual_seed(0)
    filled = depth % config.chunk_size

    def drawn(x: Tensor, *shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, device=x.device, dtype=torch.float32).to(x.dtype)

    def read(x: Statistics) -> Statistics:
        return Statistics(torch.full_like(x.count, depth), torch.zeros_like(x.mean), torch.ones_like(x.var))

    layers = tuple(
        LayerState(
            k=drawn(layer.k, 1, filled, *layer.k.shape[2:]),
            v=drawn(layer.v, 1, filled, *layer.v.shape[2:]),
            norm=read(layer.norm),
            cema=drawn(layer.cema, *layer.cema.shape),
        )
        for layer in empty.layers
    )
    return State(torch.full_like(empty.position, depth), layers, read(empty.norm))


def _reader(request: "Request") -> Megalodon:
    model = request.model() if request.model else Megalodon(request.model_config, backend=request.backend)
    return model.to(request.device, request.dtype).eval()


def _prefill(request: "Request", meter: Meter) -> Iterator[Row]:
    """`Session.feed` of a prompt, at every depth."""
    model = _reader(request)
    for length in request.lengths or (request.window,):

        def setup(depth: int, length: int = length) -> Callable[[], Session]:
            session = Session(model, state_at(model, depth))

            def read() -> Session:
                session.feed(islice(cycle(range(model.config.vocab_size)), length))  # a list would grow with the text
                return session

            return read

        matrices = _read_parameters(model.config)
        work = Work(0, 2 * matrices * length)
        yield from _at_depths("prefill", "read", {"tokens": length}, setup, work, length, model, request, meter)


def _decode(request: "Request", meter: Meter) -> Iterator[Row]:
    """`Session.step`, token by token, at every depth; the first step prepares, and is not counted."""
    model = _reader(request)
    for count in request.new_tokens:

        def setup(depth: int, count: int = count) -> Callable[[], Session]:
            session = Session(model, state_at(model, depth))
            session.step(0)

            def write() -> Session:
                for _ in range(count):
                    session.step(1)
                return session

            return write

        matrices = _read_parameters(model.config)
        work = Work(count * matrices * request.dtype.itemsize, count * 2 * matrices)
        yield from _at_depths("decode", "step", {"tokens": count}, setup, work, count, model, request, meter)


def _read_parameters(config: ModelConfig) -> int:
    """Parameters that every token reads: all but the embedding, unless it is the output matrix too."""
    return config.num_parameters() - (0 if config.share_emb else config.vocab_size * config.model_dim)


def _at_depths(
    section: str,
    what: str,
    shape: dict[str, int],
    setup: Callable[[int], Callable[[], Session]],
    work: Work,
    tokens: int,
    model: Megalodon,
    request: "Request",
    meter: Meter,
) -> Iterator[Row]:
    """Time a session at every depth, in turns; flatness is the speed over that at the least depth."""
    depths = sorted(request.depths)
    meter.report(f"{section} {tokens:,} tokens at depths {', '.join(f'{d:,}' for d in depths)}")
    spreads = interleaved([lambda d=d: setup(d) for d in depths], meter.device, meter.repeats)  # type: ignore[misc]
    for depth, spread in zip(depths, spreads, strict=True):
        call = setup(depth)
        meter.trace(f"{section} at depth {depth:,}", call)
        roofline = meter.roofline(work, spread)
        if not work.bytes:
            del roofline["bytes"], roofline["gb_per_s"], roofline["copy_share"]
        yield Row(
            section, "session", what, {"depth": depth} | shape, dtype_name(request.dtype), request.backend,
            **milliseconds(spread), **roofline,
            tokens_per_s=tokens / spread.median,
            flatness=spreads[0].median / spread.median,
            peak_bytes=peak_memory(meter.device),
            state_bytes=call().state.num_bytes(),
        )  # fmt: skip


def _data(request: "Request", meter: Meter) -> Iterator[Row]:
    """The loader: batches of the size of a pass, in the order of training."""
    loader = request.loader
    if loader is None:
        raise InputError("data: no token store was given; expected a recipe whose store exists")
    rows = pass_rows(request, loader.seq_len)
    first = 0

    def read() -> None:
        nonlocal first
        loader.batch(first, rows)
        first += rows

    spread = meter.time(f"batches of {rows} x {loader.seq_len:,} tokens", read)
    yield Row(
        "data", "loader", "read", {"B": rows, "L": loader.seq_len}, dtype_name(request.dtype), request.backend,
        **milliseconds(spread), tokens_per_s=rows * loader.seq_len / spread.median,
    )  # fmt: skip


SECTIONS: dict[str, Callable[["Request", Meter], Iterator[Row]]] = {
    "layers": _layers,
    "prefill": _prefill,
    "decode": _decode,
    "train": _train,
    "data": _data,
}
"""What `profile` calls for each section but `kernels`."""
