"""What `convert` reads, recognised by content: one form for all of them, a configuration and tensors read one by one.

    with open_source(Path("runs/x/model")) as source:
        source.config, source.tensors.forms, source.tensors.read("embed.weight"), source.info, source.beside

Model directories (ours, and those that transformers saved), checkpoints of the released implementation, adapters with
their base. A step of a run needs the recipe beside it, which this part does not know: `step_tensors` gives its tensors.
Not here: which directory a user means (megalodon_cli), what is written (conversion.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megalodon.checkpoint.adapter_files import WEIGHTS as ADAPTER_WEIGHTS
from megalodon.checkpoint.adapter_files import is_adapter, load_adapted, read_adapter_info
from megalodon.checkpoint.store import Saved, check_files, read_json
from megalodon.checkpoint.tensor_files import Form, read_all_boxes
from megalodon.checkpoint.tensors import FORMAT, read_config, read_quantisation
from megalodon.checkpoint.weight_files import Tensors, of_boxes, open_weights, tensors_in_memory, weight_paths
from megalodon.data.chat import MARKERS_FILE, TEMPLATE_FILE
from megalodon.data.tokenizer import BYTES_FILE, SENTENCEPIECE_FILE
from megalodon.errors import CheckpointError, InputError, one_line
from megalodon.interop.official_files import ABOUT, is_released, open_released
from megalodon.model.adapters import merged
from megalodon.model.attention import rotary_frequencies
from megalodon.model.megalodon import Megalodon, ModelConfig
from megalodon.model.quantised import Quantisation, quantised_matrices, stored_as
from megalodon.model.weights import Misfits, is_buffer, misfits

BESIDE = (SENTENCEPIECE_FILE, BYTES_FILE, TEMPLATE_FILE, MARKERS_FILE)
"""Files that go with the weights: tokenizer and chat template."""
ADAPTER, OFFICIAL, NATIVE, TRANSFORMERS = (
    "adapter with its base",
    "checkpoint of the released implementation",
    "model directory",
    "model directory saved by transformers",
)
STEP = "step of a run"
_OWN = {"format", "files", "weights_sha256", "base", "converted"}
"""Entries of megalodon.json that belong to the directory they stand in."""
_HEADER_TENSORS = 4096
"""Tensors a file may hold where the model is not known yet: bounds the header that is read."""


class Source(NamedTuple):
    """A model that is to be converted."""

    kind: str
    path: Path
    config: ModelConfig
    tensors: Tensors
    """As they are stored: some may be missing, unexpected or misshapen."""
    info: Mapping[str, Any]
    """What megalodon.json of the result records too: where the weights come from, tokenizer, scores."""
    beside: Mapping[str, Path]
    """Files of the tokenizer and the chat template, by the name they are to have."""
    quantisation: Quantisation | None = None
    adapted: Megalodon | None = None
    """Of an adapter: its base with the adapter beside it, not yet merged."""


def recognise(directory: Path) -> str:
    """Say what a directory holds. Raises: CheckpointError if it is nothing that can be converted."""
    if not directory.is_dir():
        kind = "is a file" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {kind}; expected a directory with a model, an adapter or a checkpoint")
    if is_adapter(directory):
        return ADAPTER
    if is_released(directory):
        return OFFICIAL
    if not (directory / "config.json").is_file():
        pickles = sorted(path.name for path in directory.iterdir() if path.suffix in (".pth", ".pt", ".bin"))
        also = f"; {pickles[0]} alone is not enough: {ABOUT} says how it was written" if pickles else ""
        raise CheckpointError(f"{directory} holds no config.json, so it is no model and no checkpoint{also}")
    given = read_json(directory / "config.json").get("model_type")
    if given == "llama":
        raise InputError(f"{directory} is a Llama, which transformers reads as it is; there is nothing to convert")
    if given != "megalodon":
        raise CheckpointError(f"{directory / 'config.json'} has model_type {given!r}; expected 'megalodon'")
    return NATIVE if (directory / "megalodon.json").is_file() else TRANSFORMERS


@contextmanager
def open_source(directory: Path, base: Path | None = None, *, verify: bool = True) -> Iterator[Source]:
    """Open a model directory, an adapter or a checkpoint of the released implementation.

    Args:
        base:   of an adapter, if it is not where it was.
        verify: compare hashes that are on record; False for a look at the headers.
    Raises:
        CheckpointError: what is wrong with which file.   EnvironmentFault: an adapter, and peft is missing.
    """
    kind = recognise(directory)
    with ExitStack() as stack:
        if kind == ADAPTER:
            yield _adapter(directory, base)
        elif kind == OFFICIAL:
            yield _released(directory, stack, verify)
        else:
            yield _model(directory, kind, verify)


def _adapter(directory: Path, base: Path | None) -> Source:
    info = read_adapter_info(directory)
    adapted = load_adapted(directory, base).eval()
    tensors = {name: tensor.detach() for name, tensor in merged(adapted).state_dict().items()}
    merged_from = {"base": info["base"]["weights_sha256"], "adapter": info["files"][ADAPTER_WEIGHTS]["sha256"]}
    kept = {**_kept(info), "merged_from": merged_from}
    whole = tensors_in_memory(tensors)
    return Source(ADAPTER, directory, adapted.config, whole, kept, _beside(directory), adapted=adapted)


def _released(directory: Path, stack: ExitStack, verify: bool) -> Source:
    info = _info(directory, verify)
    found = open_released(directory, stack)
    return Source(OFFICIAL, directory, found.config, found.tensors, _kept(info), _beside(directory))


def _model(directory: Path, kind: str, verify: bool) -> Source:
    info = _info(directory, verify)
    if kind == NATIVE and info.get("format") != FORMAT:
        raise CheckpointError(
            f"{directory / 'megalodon.json'} has format {info.get('format')!r}; expected {FORMAT!r}: "
            "the model was written by another version of megalodon"
        )
    config = read_config(directory)
    tensors = open_weights(directory, max(_HEADER_TENSORS, 64 * config.num_layers))
    files = info.get("files")
    listed = files if isinstance(files, dict) else {}
    if kind == NATIVE and (unlisted := [p.name for p in weight_paths(directory) if p.name not in listed]):
        raise CheckpointError(f"{directory / 'megalodon.json'} does not list {unlisted[0]}")
    found = read_quantisation(directory)
    return Source(kind, directory, config, tensors, _kept(info), _beside(directory), found)


def _info(directory: Path, verify: bool) -> dict[str, Any]:
    """megalodon.json, its files verified; empty if there is none."""
    if not (directory / "megalodon.json").exists():
        return {}
    info = read_json(directory / "megalodon.json")
    if verify:
        check_files(directory, info.get("files"))
    return info


def _kept(info: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in info.items() if key not in _OWN}


def _beside(directory: Path) -> dict[str, Path]:
    """Tokenizer and template. Raises: CheckpointError: one is a link: its file would come along under another name."""
    found = {name: directory / name for name in BESIDE if (directory / name).is_file()}
    for path in found.values():
        if path.resolve().parent != directory.resolve():
            raise CheckpointError(f"{path} leads out of {directory}; expected the file itself")
    return found


def step_tensors(saved: Saved) -> Tensors:
    """Return the weights of a verified step of a run, written by any number of ranks; averaged ones if there are any.

    Raises: CheckpointError: it holds those of adapters alone.
    """
    listed = {name: Form(tuple(e["shape"]), e["dtype"]) for name, e in saved.manifest["tensors"].items()}
    if any(".lora_" in name for name in listed):
        raise CheckpointError(f"{saved.path} holds adapters alone; expected a finished run: RUN/adapter with --merge")
    whole = of_boxes(read_all_boxes(saved.path / "tensors", len(listed)), listed)
    places = {name.removeprefix("model."): name for name in listed if name.startswith("model.")}
    places |= {name.removeprefix("ema."): name for name in listed if name.startswith("ema.")}
    return Tensors({name: listed[place] for name, place in places.items()}, lambda name: whole.read(places[name]))


def fit_of(source: Source) -> Misfits:
    """Compare what is stored with what a model of this configuration needs; a tied matrix may stand there once."""
    expected = state_dict_of(source.config)
    if source.quantisation is not None:
        names = quantised_matrices(source.config)
        held = {name: tuple(expected[name].shape) for name in names}
        expected = {name: tensor for name, tensor in expected.items() if name not in held}
        expected.pop("output.output.weight", None)
        for name, shape in held.items():
            for part, (size, dtype) in stored_as(name, shape, source.quantisation).items():
                expected[part] = torch.empty(size, dtype=getattr(torch, dtype), device="meta")
    found = {name: (form.shape, form.torch_dtype) for name, form in source.tensors.forms.items()}
    fit = misfits(expected, found)
    tied = {"output.output.weight"} if source.config.share_emb else set()
    return fit._replace(missing=[name for name in fit.missing if name not in tied])


def state_dict_of(config: ModelConfig) -> dict[str, Tensor]:
    """Names, shapes and dtypes of a model's state dict, on the meta device."""
    with torch.device("meta"):
        return dict(Megalodon(config).state_dict())


def completed(source: Source) -> Tensors:
    """The whole state dict of a source, under our names and in our order, in the dtypes it is stored in.

    Buffers that a file may lack are filled in; `rope.freqs` stored in half precision is computed anew.

    Returns:
        tensors whose `read` raises CheckpointError for values that are not finite and for a prior with a count.
    Raises:
        CheckpointError: all missing, unexpected and misshapen tensors at once; or a tied output matrix that differs.
    """
    if problems := fit_of(source).lines():
        raise CheckpointError(
            f"{source.path}: {len(problems)} tensors do not fit the model: {one_line(problems)}",
            f"megalodon convert --inspect {source.path} lists them",
        )
    stored, config = source.tensors, source.config
    expected = state_dict_of(config)
    tied = "output.output.weight" if config.share_emb else None
    if tied in stored.forms and not torch.equal(stored.read(str(tied)), stored.read("embed.weight")):
        raise CheckpointError(f"{source.path}: {tied} differs from embed.weight, but share_emb ties them")

    def place(name: str) -> str:
        return "embed.weight" if name == tied else name

    def is_kept(name: str) -> bool:
        return place(name) in stored.forms and not (
            name == "rope.freqs" and stored.forms[name].torch_dtype.itemsize < 4
        )

    def read(name: str) -> Tensor:
        if is_kept(name):
            return _sound(stored.read(place(name)), name, source.path)
        assert is_buffer(name)
        if name == "rope.freqs":
            return rotary_frequencies(config.z_dim // config.num_heads, config.rotary_base)
        return torch.zeros(expected[name].shape, dtype=expected[name].dtype)

    forms = {}
    for name, tensor in expected.items():
        plain = Form(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        forms[name] = stored.forms[place(name)] if is_kept(name) else plain
    return Tensors(forms, read)


def _sound(tensor: Tensor, name: str, where: Path) -> Tensor:
    """The tensor itself. Raises: CheckpointError: a value is not finite, or a prior has a count."""
    if name.endswith("prior_count"):
        if tensor.numel() != 1 or tensor.item() != 0:
            raise CheckpointError(f"{where}: {name} is {tensor.tolist()}; a language model has no prior, expected 0")
        return tensor
    if tensor.numel():
        low, high = (float(bound) for bound in tensor.aminmax())
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            bad = int((~tensor.isfinite()).sum())
            raise CheckpointError(
                f"{where}: {name} has {bad:,} values that are NaN or infinite; expected finite weights"
            )
    return tensor
