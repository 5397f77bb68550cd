"""The options of `megalodon profile` -> what is measured. Not here: measuring (megalodon/profiling), printing."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megalodon.errors import CheckFailed, DataError, InputError, RecipeError
from megalodon.profiling import numbers
from megalodon_cli import checkpoints, console, figures, recipe_files

if TYPE_CHECKING:
    import torch

    from megalodon.data.loader import Loader
    from megalodon.profiling.baseline import Change
    from megalodon.profiling.meter import Row
    from megalodon.profiling.timing import Request
    from megalodon.recipe import RunConfig

BACKENDS = ("auto", "triton", "portable", "reference")
REPORTS = (".json", ".md", ".csv")
"""Endings of the file that the rows are written to."""


def read(
    given: str | None,
    what: str,
    lengths: str | None,
    new_tokens: str,
    depths: str,
    shapes: str | None,
    repeats: int,
    backend: str,
    device: str,
    dtype: str,
    trace: Path | None,
    report: Callable[[str], None],
) -> tuple["Request", str]:
    """Return the request, and what it measures in a word. Raises: InputError, RecipeError, DataError."""
    from megalodon.profiling.timing import OPS, WHAT, Request
    from megalodon.training.host import keep_freed_memory
    from megalodon.training.optim import OptimConfig
    from megalodon.training.plan import TrainConfig, device_named

    sections = tuple(dict.fromkeys(_known("--what", word, WHAT) for word in what.split(",")))
    _known("--backend", backend, BACKENDS)
    if shapes is not None and "kernels" not in sections:
        raise InputError(f"--shapes: only kernels take shapes; --what is {what}")
    read_lengths = None if lengths is None else numbers.counts(lengths, "-p/--lengths")
    read_new, read_depths = numbers.counts(new_tokens, "-n/--new-tokens"), numbers.counts(depths, "-d/--depths", 0)
    read_shapes = None if shapes is None else numbers.shapes(shapes, OPS)
    place = device_named(device)
    target = _target(given, place.type, backend)
    config = target.recipe
    train = config.train if config else TrainConfig(max_steps=1)
    if place.type == "cpu":
        keep_freed_memory()
        if backend in ("auto", "portable"):
            console.note("on a CPU the portable path is timed; Triton's kernels run on a GPU alone")
    request = Request(
        model_config=target.model_config,
        train=train,
        device=place,
        what=sections,
        dtype=_dtype(dtype, train.precision, place.type),
        backend=backend,
        model=target.model,
        loader=_loader(config, target.name) if "data" in sections else None,
        lengths=read_lengths,
        shapes=read_shapes,
        new_tokens=read_new,
        depths=read_depths,
        repeats=repeats,
        traced=trace,
        report=report,
        optim=config.optim if config else OptimConfig(),
        window=config.data.seq_len if config else target.model_config.chunk_size,
    )
    return request, target.name


def _known(option: str, word: str, known: Sequence[str]) -> str:
    if word not in known:
        near = difflib.get_close_matches(word, known, 1)
        meant = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(known)}"
        raise InputError(f"{option}: unknown `{word}`; {meant}")
    return word


class Target(NamedTuple):
    """The model that is measured."""

    name: str
    model_config: Any
    recipe: "RunConfig | None"
    """None for a checkpoint."""
    model: Callable[[], Any] | None
    """Makes the model of a checkpoint; None: random weights."""


def _target(given: str | None, device: str, backend: str) -> Target:
    """Tell a recipe, which comes first, from a checkpoint. Raises: InputError if it is neither."""
    if given is None:
        given = "200m" if device == "cuda" else "quickstart"
        console.note(f"no CKPT or RECIPE given: the model of the recipe {given}")
    if given.endswith((".yaml", ".yml")) or given in recipe_files.names():
        config = recipe_files.load([given]).pretraining()
        if config.model.arch != "megalodon":
            raise RecipeError(
                f"{given}: model.arch {config.model.arch} is not available in profile; expected megalodon"
            )
        return Target(config.name, config.model_config_for(config.padded_vocab_size()), config, None)
    try:
        directory = checkpoints.model_directory(given)
    except InputError as error:
        near = difflib.get_close_matches(given, recipe_files.names(), 1)
        raise InputError(f"{error}; nor a recipe{f': did you mean {near[0]}?' if near else ''}") from None
    from megalodon.checkpoint.tensors import load_model
    from megalodon.model.megalodon import Megalodon
    from megalodon.model.quantised import refuse_quantised

    weights = load_model(directory)
    refuse_quantised(weights, directory, "profiled")

    def made() -> Megalodon:
        model = Megalodon(weights.config, backend=backend)  # type: ignore[arg-type]
        model.load_state_dict(weights.state_dict())
        return model

    return Target(str(directory), weights.config, None, made)


def _dtype(given: str, precision: str, device: str) -> "torch.dtype":
    """The dtype of activations; auto is what the recipe trains in."""
    from megalodon.profiling.meter import DTYPES

    if given == "auto":
        bf16 = precision.startswith("bf16") or (precision == "auto" and device == "cuda")
        return DTYPES["bf16" if bf16 else "fp32"]
    if given not in DTYPES:
        raise InputError(f"--dtype {given}: expected auto, {', '.join(DTYPES)}")
    return DTYPES[given]


def _loader(config: "RunConfig | None", name: str) -> "Loader":
    """The loader that training would use. Raises: InputError for a checkpoint, DataError without a store."""
    from megalodon.data.loader import Loader
    from megalodon.data.prepare import open_prepared

    if config is None:
        raise InputError(f"--what data: {name} is a checkpoint; expected a recipe, which names its data")
    store = config.data.dir or Path("data") / config.name
    if not (store / "manifest.json").exists():
        raise DataError(f"--what data: {store} holds no token store", f"megalodon pretrain {name} --dry-run makes it")
    data = config.data
    return Loader(open_prepared(store).train, data.seq_len, data.isolate, config.train.seed, data.weights())


def check_files(*, baseline: Path | None, out: Path | None, trace: Path | None, plot: Path | None) -> None:
    """Refuse files that cannot be written, or would replace one another, before anything is measured.

    Raises: InputError; EnvironmentFault for a picture without the extra.
    """
    for path, kinds in ((out, REPORTS), (trace, (".json",))):
        if path is not None and path.suffix not in kinds:
            raise InputError(f"{path}: expected a name ending in {' or '.join(kinds)}")
        if path is not None and not path.parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.parent}")
    if plot is not None:
        figures.check(plot)
    places: dict[Path, str] = {}
    for option, path in (("--baseline", baseline), ("-o/--out", out), ("--trace", trace), ("--plot", plot)):
        if path is None:
            continue
        other = places.setdefault(path.resolve(), option)
        if other != option:
            raise InputError(f"{option} {path} would replace the file of {other}; expected two files")
        if option != "--baseline":
            _check_writable(path)


def _check_writable(path: Path) -> None:
    try:
        there = path.exists()
        if path.is_symlink() and not there:
            raise InputError(f"{path}: is a link to nothing; expected a file or no file")
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {(error.strerror or str(error)).lower()}") from None


@dataclass(frozen=True)
class Baseline:
    """An older measurement, and how much slower the new one may be."""

    path: Path
    milliseconds: dict[str, float]
    limit: float

    def compare(self, rows: "Sequence[Row]") -> "Comparison":
        """Return the rows that both have."""
        from megalodon.profiling.baseline import Change, milliseconds

        before, after = self.milliseconds, milliseconds(rows)
        changes = [Change(key, before[key], ms) for key, ms in after.items() if key in before]
        return Comparison(self, changes, len(before.keys() ^ after.keys()))


class Comparison(NamedTuple):
    """What changed since the baseline."""

    baseline: Baseline
    changes: "list[Change]"
    alone: int
    """Rows that only one of the two has."""

    def check(self) -> None:
        """Raises: InputError if no row is in both, CheckFailed with the rows that are slower than they may be."""
        if not self.changes:
            example = next(iter(self.baseline.milliseconds))
            raise InputError(
                f"the baseline {self.baseline.path} has no row in common with this; measure the same, such as {example}"
            )
        over = sorted((c for c in self.changes if c.slowdown > self.baseline.limit), key=lambda c: -c.slowdown)
        if over:
            said = "; ".join(f"{c.key}: {c.before_ms:.3g} -> {c.after_ms:.3g} ms ({c.slowdown:+.0%})" for c in over)
            count = f"{len(over)} of {len(self.changes)} rows are more than {self.baseline.limit:.0%} slower than"
            raise CheckFailed(f"{count} {self.baseline.path}: {said}")


def baseline(path: Path | None, fail_over: str | None, device: "torch.device") -> Baseline | None:
    """Read the older measurement, before anything is measured. Raises: InputError if it cannot be compared with."""
    if path is None:
        if fail_over is not None:
            raise InputError("--fail-over needs --baseline F.json, the measurement to compare with")
        return None
    from megalodon.profiling.baseline import load

    limit = numbers.share("10%" if fail_over is None else fail_over, "--fail-over")
    return Baseline(path, load(path, device), limit)
