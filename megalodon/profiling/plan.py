"""The plan before the run: memory, traffic and time of a recipe on any number of devices, predicted on a laptop.

    plan = plan_run(Setup(model_config, train, optim, parallel, seq_len=…, ranks=256, device=device_spec("h100")))
    plan.peak, plan.step_seconds, plan.limit
    edits(plan)                          # which key of the recipe moves the limit, with what each would give

Parameters, moments and traffic follow from shapes. Activations do not follow from anything short, so one block and two
are run in shape only (shapes_only.py), forward and back, and every layer more adds their difference. Each number says
whether it was measured, derived or assumed.
Not here: what training itself measures before step 1 (training/memory.py), how a plan is shown (the command).
"""

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from megalodon.errors import InputError, RecipeError
from megalodon.model.architectures import LanguageModelConfig, build_model
from megalodon.model.megalodon import ModelConfig
from megalodon.parallel.fsdp import island_names
from megalodon.parallel.layout import Layout, ParallelConfig, check_layout, resolve_layout
from megalodon.parallel.tensor import limits_of, split_axis
from megalodon.profiling.devices import DeviceSpec
from megalodon.profiling.exchange import Exchange, Sizes, exchanges
from megalodon.profiling.shapes_only import LiveBytes, laid_out, shapes_only
from megalodon.training.activations import kept_by_part, pass_loss
from megalodon.training.execution import Recompute, recompute
from megalodon.training.memory import checkpoint_bytes, first_that_fits, logits_bytes, state_bytes
from megalodon.training.optim import OptimConfig
from megalodon.training.plan import MICRO_TOKENS, TrainConfig
from megalodon_kernels.dispatch import Backend, Card

Source = Literal["measured", "derived", "assumed"]
Limit = Literal["memory", "compute", "communication"]
DOCUMENT_TOKENS = 1024.0
"""Mean length of a document where no token store tells it; assumed."""


@dataclass(frozen=True)
class Setup:
    """Everything a plan depends on."""

    model: LanguageModelConfig
    train: TrainConfig
    optim: OptimConfig
    parallel: ParallelConfig
    seq_len: int
    ranks: int
    device: DeviceSpec
    isolate: Literal["doc", "none"] = "none"
    document_tokens: float | None = None
    """Mean length of a document, where it is known."""
    epoch_tokens: int | None = None
    """Tokens of all training windows, where they are known."""


class Part(NamedTuple):
    """A part of the memory of one device."""

    name: str
    bytes: int
    source: Source
    how: str


@dataclass(frozen=True)
class RunPlan:
    """What a run will need and take."""

    setup: Setup
    layout: Layout
    sizes: Sizes
    bf16: bool
    rows: int
    """Windows of a step and rank."""
    micro_rows: int
    """Windows of a pass."""
    parts: tuple[Part, ...]
    """Of the memory of a device; their sum is the peak."""
    kept: Mapping[str, int]
    """Activations by the part of the model that keeps them; keys of `activations.PARTS`."""
    capacity: int
    """Bytes of a device that a rank may use."""
    exchanges: tuple[Exchange, ...]
    flops: float
    """Floating-point operations of a step and rank, those that are done twice counted twice."""
    compute_seconds: float
    """Of a step."""
    exchange_seconds: float
    """Of a step, beside the computation or not."""
    step_seconds: float
    checkpoint: int
    """Bytes of a checkpoint on disk."""
    steps: int | None
    """Optimizer steps of the run; None if its length in tokens is not known yet."""

    @property
    def peak(self) -> int:
        """Bytes of a device at the fullest moment."""
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether that is less than a device has."""
        return self.peak <= self.capacity

    @property
    def passes(self) -> int:
        """Micro-batches of a step."""
        return self.rows // self.micro_rows

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.setup.train.batch_tokens / self.step_seconds

    @property
    def seconds(self) -> float | None:
        """Of the whole run; None if its length is not known yet."""
        return None if self.steps is None else self.steps * self.step_seconds

    @property
    def limit(self) -> Limit:
        """What keeps the run from being larger or faster."""
        if not self.fits:
            return "memory"
        return "communication" if self.exchange_seconds > self.compute_seconds else "compute"


class Edit(NamedTuple):
    """A change of the recipe or of the command line, and what it would give."""

    change: str
    plan: RunPlan


def plan_run(setup: Setup) -> RunPlan:
    """Predict a run.

    Raises:
        InputError: no devices.   KernelError: a backend asked for by name that the device does not have.
        RecipeError: a layout or a batch that does not divide, with all numbers, or arithmetic that cannot be had.
    """
    if setup.ranks < 1:
        raise InputError(f"a plan of {setup.ranks} devices; expected at least 1")
    if setup.train.precision == "bf16":
        raise RecipeError("train.precision: bf16 is not available; expected auto, bf16-mixed or fp32")
    if setup.train.backend == "reference":
        raise RecipeError("train.backend: reference goes token by token and is not planned; expected auto or portable")
    layout = _layout(setup)
    rows = setup.train.batch_tokens // (setup.seq_len * layout.data_ranks)
    if setup.train.micro_batch != "auto":
        return _plan(setup, layout, rows, setup.train.micro_batch)
    divisors = [n for n in range(rows, 0, -1) if rows % n == 0]
    if setup.device.card is None:
        divisors = [n for n in divisors if n == 1 or n * setup.seq_len // layout.cp <= MICRO_TOKENS["cpu"]]
    # Whatever is computed again, the input of every block is kept: what that rules out is not looked at.
    least = 4 * setup.seq_len // layout.cp * setup.model.model_dim * setup.model.num_layers // layout.tp
    divisors = [n for n in divisors if n == 1 or n * least <= setup.device.memory]
    most = _plan(setup, layout, rows, divisors[0])
    if most.fits or len(divisors) == 1:
        return most
    # Memory grows evenly with the windows of a pass: two plans tell of all, and the chosen one is worked out itself.
    one = _plan(setup, layout, rows, 1)
    slope = (most.peak - one.peak) / (divisors[0] - 1)
    chosen = first_that_fits(divisors[1:], lambda n: one.peak + (n - 1) * slope <= one.capacity) or 1
    plan = one if chosen == 1 else _plan(setup, layout, rows, chosen)
    return plan if plan.fits else one


def _layout(setup: Setup) -> Layout:
    layout = resolve_layout(setup.parallel, setup.ranks)
    check_layout(
        layout,
        seq_len=setup.seq_len,
        batch_tokens=setup.train.batch_tokens,
        micro_batch=None if setup.train.micro_batch == "auto" else setup.train.micro_batch,
        **limits_of(setup.model),
    )
    return layout


def _plan(setup: Setup, layout: Layout, rows: int, micro_rows: int) -> RunPlan:
    train, optim, device, config = setup.train, setup.optim, setup.device, setup.model
    ours = config if isinstance(config, ModelConfig) else None
    sizes, passes, tokens = sizes_of(config), rows // micro_rows, setup.seq_len // layout.cp
    bf16 = train.precision == "bf16-mixed" or (train.precision == "auto" and device.card is not None)
    sharded = layout.shards * layout.tp > 1
    found = _activations(setup, layout, micro_rows, bf16)
    kept = {part: size for part, size in found.kept.items() if part != "loss"}
    logits = logits_bytes(
        min(train.loss_chunk, -(-micro_rows * tokens // layout.tp)), config.num_outputs, config.model_dim, bf16=bf16,
        written_over=device.card is not None,
    )  # fmt: skip
    loss = found.kept.get("loss", 0) + logits
    local = sizes.local_blocks(layout.tp) / layout.shards + sizes.root / (layout.shards * layout.tp)
    local = math.ceil(local) + sizes.local_islands(layout.tp)
    weights, moments, averages = state_bytes(local, optim)
    parts = [
        Part("parameters", weights, "derived", f"4 bytes x {local:,}"),
        Part("gradients", weights, "derived", f"4 bytes x {local:,}"),
        Part("optimizer", moments, "derived", f"8 bytes x {local:,}"),
    ]
    if averages:
        parts.append(Part("averaged weights", averages, "derived", f"4 bytes x {local:,}, optim.ema"))
    if sharded:
        block, width = sizes.local_blocks(layout.tp) // config.num_layers, 2 if bf16 else 4
        size = 2 * width * block + 4 * sizes.root
        how = f"2 blocks in {'bf16' if bf16 else 'fp32'}, embedding and output in fp32"
        parts.append(Part("gathered weights", size, "derived", how))
        held = passes if passes > 1 else 0
        size = 4 * (sizes.local_blocks(layout.tp) + sizes.root) if held else 4 * (2 * block + sizes.root)
        how = f"whole between {passes} passes, fp32" if held else "of 2 blocks and the root on their way, fp32"
        parts.append(Part("gathered gradients", size, "derived", how))
    how = f"{micro_rows} x {tokens:,} tokens, 1 and 2 blocks in shape only, x {config.num_layers}"
    parts.append(Part("activations", sum(kept.values()), "derived", how + _recomputed(train.recompute)))
    parts.append(Part("loss", loss, "derived", f"logits of {train.loss_chunk:,} tokens, gradients behind them"))
    if ours and layout.cp > 1:
        # What a layer hears of the others, its averages and an input of zeros that they are read out with.
        averages = 8 * ours.model_dim * ours.cema_ndim // layout.tp
        packets = layout.cp * micro_rows * (averages + 16 * ours.norm_num_groups)
        zeros = micro_rows * tokens * ours.model_dim // layout.tp * (4 if train.recompute == "none" else 0)
        layers = ours.num_layers if train.recompute == "none" else 1
        parts.append(Part("pieces", layers * (packets + zeros), "derived", f"states of {layout.cp} ranks"))
    beside = max(0, found.peak - sum(kept.values()) - loss)
    parts.append(Part("workspace", beside, "derived", "the fullest moment of the same run in shape only"))
    parts.append(Part("process", device.reserve, "assumed", "libraries, context, allocator"))
    traffic = exchanges(
        ours, sizes, layout, device, passes=passes, rows=micro_rows, tokens=tokens, bf16=bf16,
        recomputed=train.recompute != "none", isolated=setup.isolate == "doc",
    )  # fmt: skip
    flops = config.flops_per_token(setup.seq_len) * train.batch_tokens / setup.ranks
    flops *= 1 + _again(config, train.recompute) / 3
    shared = setup.ranks if device.card is None else 1  # processes of one machine share its cores and its memory
    compute = flops * shared / ((device.bf16 if bf16 else device.fp32) * device.efficiency)
    beside_it, waited = (sum(x.seconds for x in traffic if x.overlaps is overlaps) for overlaps in (True, False))
    return RunPlan(
        setup, layout, sizes, bf16, rows, micro_rows, tuple(parts), kept,
        capacity=device.memory // shared,
        exchanges=tuple(traffic),
        flops=flops,
        compute_seconds=compute,
        exchange_seconds=beside_it + waited,
        step_seconds=max(compute, beside_it) + waited,
        checkpoint=checkpoint_bytes(sizes.total, sizes.total, optim),
        steps=_steps(setup),
    )  # fmt: skip


def _recomputed(what: Recompute) -> str:
    return "" if what == "none" else f"; {'blocks' if what == 'block' else 'attention halves'} are computed again"


def _steps(setup: Setup) -> int | None:
    train = setup.train
    if train.max_steps is not None:
        return train.max_steps
    tokens = train.max_tokens
    if train.max_epochs is not None and setup.epoch_tokens is not None:
        tokens = round(train.max_epochs * setup.epoch_tokens)
    return None if tokens is None else max(1, tokens // train.batch_tokens)


def _again(config: LanguageModelConfig, what: Recompute) -> float:
    """The part of a forward pass that is computed again in the pass back; by parameters."""
    sizes = _by_group(config)
    parts = {"none": 0, "attention": sizes["attention"], "block": sizes["blocks"]}
    return parts[what] / (sizes["blocks"] + sizes["head"])


@functools.lru_cache
def sizes_of(config: LanguageModelConfig) -> Sizes:
    """Count the parameters of a model by how they are laid out over ranks, without building it."""
    with torch.device("meta"):
        model = build_model(config.model_copy(update={"num_layers": 1}))
    wide = {*island_names(model)}
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        block = "layers" in name.split(".")[:-1]
        kind = "islands" if name in wide else "blocks" if block else "root"
        times = config.num_layers if block else 1
        counts[kind] += times * parameter.numel()
        counts[f"{kind} split"] += 0 if split_axis(name) is None else times * parameter.numel()
    return Sizes(counts["blocks"], counts["root"], counts["islands"], counts["blocks split"], counts["islands split"])


@functools.lru_cache
def _by_group(config: LanguageModelConfig) -> dict[str, int]:
    with torch.device("meta"):
        model = build_model(config.model_copy(update={"num_layers": 1}))
    blocks = sum(p.numel() for p in model.layers.parameters())
    half = sum(p.numel() for name, p in model.layers.named_parameters() if ".mega." in name or ".self_attn." in name)
    return {
        "blocks": config.num_layers * blocks,
        "attention": config.num_layers * half,
        "head": model.output_weight.numel(),
    }


class Kept(NamedTuple):
    """What a pass keeps, by part, and the most that lives at once; without parameters and their gradients."""

    kept: Mapping[str, int]
    peak: int


def _activations(setup: Setup, layout: Layout, rows: int, bf16: bool) -> Kept:
    """Of one rank: a window is cut by cp, what tp divides is divided."""
    config, train, tokens = setup.model, setup.train, setup.seq_len // layout.cp
    if layout.tp > 1:
        assert isinstance(config, ModelConfig)
        names = ("num_heads", "z_dim", "value_dim", "ffn_hidden_dim")
        config = config.model_copy(update={name: getattr(config, name) // layout.tp for name in names})
    starts = None
    if setup.isolate == "doc":
        starts = document_starts(rows, tokens, setup.document_tokens or DOCUMENT_TOKENS)
    backend: Any = train.backend
    found = activations(
        config, rows, tokens, starts, bf16=bf16, gathered=layout.shards * layout.tp > 1, recompute=train.recompute,
        backend=backend, card=setup.device.card, loss_chunk=train.loss_chunk,
    )  # fmt: skip
    if layout.tp == 1:
        return found
    # Norms over time, CEMA and the stream are of this rank's features; the inputs of products are gathered whole.
    narrow = {"cema", "block", "embed"}
    kept = {part: size // layout.tp if part in narrow else size for part, size in found.kept.items()}
    return Kept(kept, found.peak - sum(found.kept.values()) + sum(kept.values()))


def document_starts(rows: int, tokens: int, mean: float) -> tuple[tuple[int, ...], ...]:
    """Where documents of this mean length start in each window, their lengths spread as if text ended at random."""
    count = max(1, round(tokens / mean))
    lengths = [-math.log(1 - (i * 0.618034 + 0.5) % 1) for i in range(count)]
    scale, at, starts = tokens / sum(lengths), 0.0, []
    for length in lengths:
        starts.append(int(at))
        at += length * scale
    return (tuple(sorted(set(starts))),) * rows


@functools.lru_cache(maxsize=256)
def activations(
    config: LanguageModelConfig,
    rows: int,
    tokens: int,
    starts: tuple[tuple[int, ...], ...] | None,
    *,
    bf16: bool = False,
    gathered: bool = False,
    recompute: Recompute = "none",
    backend: Backend = "auto",
    card: Card | None = None,
    loss_chunk: int = 2048,
) -> Kept:
    """Run one block and two in shape only, forward and back, and add their difference for each layer more.

    Args:
        starts:   first tokens of documents, for each row; None: documents are not isolated.
        gathered: weights of blocks come in bfloat16 where the arithmetic is, instead of being cast and kept.
        card:     the GPU; None for a CPU.
    """
    how = (starts, bf16, gathered, recompute, backend, card, loss_chunk)
    one, two = (_run(config.model_copy(update={"num_layers": n}), rows, tokens, *how) for n in (1, 2))
    more = config.num_layers - 1
    kept = {part: size + more * (two.kept[part] - size) for part, size in one.kept.items()}
    return Kept(kept, one.peak + more * (two.peak - one.peak))


def _run(
    config: LanguageModelConfig,
    rows: int,
    tokens: int,
    starts: tuple[tuple[int, ...], ...] | None,
    bf16: bool,
    gathered: bool,
    what: Recompute,
    backend: Backend,
    card: Card | None,
    loss_chunk: int,
) -> Kept:
    with shapes_only(card):
        model = laid_out(config, backend, half_blocks=bf16 and gathered)
        recompute(model, what)
        ids, begins = torch.zeros(rows, tokens, dtype=torch.int64), None
        if starts is not None:
            begins = torch.zeros(rows, tokens, dtype=torch.bool)
            for row, places in enumerate(starts):
                begins[row, list(places)] = True
        how: dict[str, Any] = {"bf16": bf16, "loss_chunk": loss_chunk}
        kept = kept_by_part(model, lambda: pass_loss(model, ids, begins, **how))
        with LiveBytes() as live:
            loss = pass_loss(model, ids, begins, **how)
            loss.backward()
        return Kept(kept, live.peak([p.grad for p in model.parameters() if p.grad is not None]))


def edits(plan: RunPlan, most: int = 3) -> list[Edit]:
    """Return the changes that help most against the limit of a plan, best first; fewer if fewer help."""
    found = []
    for change, setup in _candidates(plan):
        try:
            found.append(Edit(change, plan_run(setup)))
        except RecipeError:  # it does not divide
            continue
    if plan.limit == "memory":
        helping = [edit for edit in found if edit.plan.peak < 0.98 * plan.peak]
        helping.sort(key=lambda e: (not e.plan.fits, e.plan.step_seconds if e.plan.fits else e.plan.peak))
    else:
        helping = [edit for edit in found if edit.plan.fits and edit.plan.step_seconds < 0.98 * plan.step_seconds]
        helping.sort(key=lambda edit: edit.plan.step_seconds)
    return helping[:most]


def _candidates(plan: RunPlan) -> Iterator[tuple[str, Setup]]:
    setup, layout = plan.setup, plan.layout

    def changed(section: Literal["train", "parallel"], **values: Any) -> Setup:
        config: Any = getattr(setup, section)
        return replace(setup, **{section: config.model_copy(update=values)})

    memory = plan.limit == "memory"
    for what in ("attention", "block") if memory else ("none",):
        if setup.train.recompute != what:
            yield f"train.recompute={what}", changed("train", recompute=what)
    half = [n for n in range(1, plan.micro_rows) if plan.rows % n == 0]
    double = [n for n in range(plan.micro_rows + 1, plan.rows + 1) if plan.rows % n == 0]
    if memory and half:
        yield f"train.micro_batch={half[-1]}", changed("train", micro_batch=half[-1])
    if plan.limit == "communication" and double:
        yield f"train.micro_batch={double[0]}", changed("train", micro_batch=double[0])
    if memory and setup.train.loss_chunk > 256:
        chunk = setup.train.loss_chunk // 4
        yield f"train.loss_chunk={chunk}", changed("train", loss_chunk=chunk)
    if memory and setup.parallel.dp_replicate > 1:
        yield "parallel.dp_replicate=1", changed("parallel", dp_replicate=1, dp_shard="all")
    if memory and setup.ranks > 1:
        for name in ("cp", "tp"):
            value = 2 * getattr(layout, name)
            yield f"parallel.{name}={value}", changed("parallel", **{name: value, "dp_shard": "all"})
    if plan.limit == "communication":
        for name in ("cp", "tp"):
            if (value := getattr(layout, name)) > 1:
                yield f"parallel.{name}={value // 2}", changed("parallel", **{name: value // 2, "dp_shard": "all"})
        if layout.shards * layout.tp > setup.device.node and layout.dp_replicate == 1:
            copies = layout.world_size // setup.device.node
            yield f"parallel.dp_replicate={copies}", changed("parallel", dp_replicate=copies, dp_shard="all")
    if setup.device.card is not None:
        free = changed("parallel", dp_shard="all")
        yield f"--gpus {2 * setup.ranks}", replace(free, ranks=2 * setup.ranks)
