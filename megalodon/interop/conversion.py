"""One model from one form into another, tensor by tensor, and the proof that it is still the same one.

    native   config.json, model.safetensors or shards with an index, tokenizer files, chat template, megalodon.json
    hf       the same with what transformers needs to load it (huggingface.py)
    ref      the layout of the released implementation (official_files.py)

What is written lies aside until it is proven: every tensor is read back and compared with what was to be written, and
then the logits of both sides. Not here: what can be read (sources.py), how two sides are compared (parity.py).
"""

import importlib.util
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError

from megalodon.checkpoint.store import check_space, describe_file, staged, write_json
from megalodon.checkpoint.tensor_files import Form
from megalodon.checkpoint.tensors import finish_directory, load_model, read_config
from megalodon.checkpoint.weight_files import Tensors, open_weights, write_weights
from megalodon.data.chat import ChatFormat
from megalodon.data.tokenizer import SENTENCEPIECE_FILE, Tokenizer, load_tokenizer
from megalodon.errors import CheckFailed, CheckpointError, EnvironmentFault, InputError
from megalodon.interop import huggingface
from megalodon.interop.official_files import WEIGHTS as PTH
from megalodon.interop.official_files import open_released, write_released
from megalodon.interop.parity import (
    EQUAL,
    Outcome,
    Parity,
    compare,
    compare_logits,
    is_small,
    outcome_of,
    parity_tokens,
)
from megalodon.interop.quantise import plain, quantised, require_torchao
from megalodon.interop.sources import Source, completed, fit_of
from megalodon.model.megalodon import Megalodon, ModelConfig
from megalodon.model.quantised import Quantisation

To = Literal["native", "hf", "ref"]
Dtype = Literal["keep", "fp32", "bf16"]
TRANSFORMERS_DIFFERENCE = {torch.float32: 2e-5, torch.bfloat16: 0.1}
"""How far logits of transformers may lie from ours, for logits up to 10: other order of sums; bf16 in every product."""
REORDERED_DIFFERENCE = 1e-4
"""The same of float32 sums in another order: a base with its adapter beside it, maps that are quantised."""
_NAMED = 10
"""Logits up to which those differences hold as they are; they grow with larger ones."""


class Options(NamedTuple):
    """How a model is written."""

    to: To = "native"
    dtype: Dtype = "keep"
    shard_bytes: int | None = 2 * 10**9
    """Of the largest file of weights."""
    quantisation: Quantisation | None = None
    verify: bool = True


class Conversion(NamedTuple):
    """What was written."""

    parity: Parity | None
    """None if it was not asked for."""
    num_bytes: int
    """Of the files of weights."""
    remarks: list[str]
    """What else is worth knowing, a line each."""


Report = Callable[[str], None]


def check_options(source: Source, options: Options) -> None:
    """Refuse what cannot be done, before anything is read. Raises: InputError, EnvironmentFault."""
    if source.quantisation is not None:
        raise InputError(
            f"{source.path} is quantised and cannot be exported again; expected the model it was made from"
        )
    if options.quantisation is None:
        return
    if options.to != "native":
        raise InputError(f"--quantize writes native model directories; --to {options.to} cannot hold one")
    if options.dtype != "keep":
        raise InputError(f"--quantize and --dtype {options.dtype} exclude each other; what is not quantised is float32")
    require_torchao()


def convert(source: Source, target: Path, options: Options, report: Report = lambda text: None) -> Conversion:
    """Write a model in another form; the directory takes its name when all of it is there and proven.

    Args:
        target: does not exist, or is an empty directory.
        report: called with a line of progress.
    Raises:
        CheckpointError: tensors that are missing, unexpected, misshapen or not finite; a tokenizer that does not fit.
        CheckFailed: what was written is not the model; nothing is left of it.
        EnvironmentFault: too little disk space, a missing extra, or a file could not be written.
    """
    check_options(source, options)
    tokenizer = _tokenizer(source)
    tensors = cast_to(source.config, completed(source), options.dtype)
    written = tensors if options.quantisation is None else quantised(source.config, tensors, options.quantisation)
    dtype = torch.bfloat16 if any(f.dtype == "bfloat16" for f in written.forms.values()) else torch.float32
    size = sum(form.num_bytes for form in written.forms.values())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        check_space(target.parent, size)
        with staged(target) as aside:
            for name, path in source.beside.items():
                shutil.copyfile(path, aside / name)
            files, remarks = _write(aside, target.name, source, written, tokenizer, dtype, options, report)
            about = {**source.info, "converted": {"from": source.kind, "to": options.to, "dtype": options.dtype}}
            if tokenizer is not None:
                about["tokenizer_sha256"] = tokenizer.sha256
            finish_directory(aside, files, about)
            found = None
            if options.verify:
                found, more = _verify(aside, source, written, dtype, options, report)
                remarks += more
            about["converted"]["parity"] = "not checked" if found is None else found.row()
            finish_directory(aside, files, about)
    except (OSError, SafetensorError) as error:
        raise EnvironmentFault(f"{target} could not be written: {error}") from error
    return Conversion(found, sum(file["bytes"] for file in files.values()), remarks)


def cast_to(config: ModelConfig, tensors: Tensors, dtype: Dtype) -> Tensors:
    """The same tensors in the dtypes they are written in.

    Matrices and their biases in float32 or bfloat16; what never leaves float32 in a model does not here either: norms,
    CEMA, scales of queries and keys.

    Args:
        dtype: of the matrices; keep = as they are stored, float16 widened.
    Raises:
        InputError: float64 weights, which keep would have to round.
    """
    with torch.device("meta"):
        held = {name: tensor.dtype for name, tensor in Megalodon(config).to(torch.bfloat16).state_dict().items()}
    if dtype == "keep" and (wide := [name for name, form in tensors.forms.items() if form.dtype == "float64"]):
        raise InputError(f"{wide[0]} is float64, which no format here holds; choose --dtype fp32, which rounds it")

    def form_of(name: str, form: Form) -> Form:
        if not held[name].is_floating_point:
            return Form(form.shape, "int64")
        kept = dtype == "bf16" or (dtype == "keep" and form.dtype == "bfloat16")
        return Form(form.shape, "bfloat16" if held[name] == torch.bfloat16 and kept else "float32")

    forms = {name: form_of(name, form) for name, form in tensors.forms.items()}
    return Tensors(forms, lambda name: tensors.read(name).to(forms[name].torch_dtype))


def _tokenizer(source: Source) -> Tokenizer | None:
    """The tokenizer beside the weights. Raises: CheckpointError: it has more ids than the model rows, or is another."""
    names = source.beside.keys()
    path = next((source.beside[name] for name in names if name.endswith((".model", "tokenizer.json"))), None)
    if path is None:
        return None
    tokenizer = load_tokenizer(path)
    chat = ChatFormat.load(source.path, tokenizer, bos=True) if "chat.json" in names else None
    ids, rows = tokenizer.vocab_size + (chat.new_rows if chat else 0), source.config.vocab_size
    if ids > rows:
        raise CheckpointError(
            f"{source.path}: the tokenizer has {ids:,} ids, the model {rows:,} rows; one is another's"
        )
    expected = source.info.get("tokenizer_sha256", tokenizer.sha256)
    if tokenizer.sha256 != expected:
        raise CheckpointError(
            f"{source.path}: the tokenizer is {tokenizer.sha256[:8]}, the model was trained with {str(expected)[:8]}"
        )
    return tokenizer


def _write(
    aside: Path,
    title: str,
    source: Source,
    written: Tensors,
    tokenizer: Tokenizer | None,
    dtype: torch.dtype,
    options: Options,
    report: Report,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Write configuration and weights; returns the files of weights and what is worth knowing."""
    config = source.config
    remarks = [] if tokenizer else [f"{source.path} holds no tokenizer of ours, so the result has none"]
    if options.to == "ref":
        ids = tokenizer.vocab_size if tokenizer is not None and (aside / SENTENCEPIECE_FILE).exists() else None
        remarks += [f"the released code: {text}" for text in write_released(aside, config, written, dtype, ids)]
        return {PTH: describe_file(aside / PTH)}, remarks
    fields: dict[str, Any] = {"model_type": "megalodon", **config.model_dump(mode="json")}
    if options.quantisation is not None:
        fields["quantisation"] = options.quantisation.model_dump(mode="json")
    write_json(aside / "config.json", fields)
    files = write_weights(aside, written, options.shard_bytes, report)
    if options.to == "hf":
        huggingface.write_export(aside, config, dtype=dtype, title=title, about=source.info)
    return files, remarks


def _verify(
    aside: Path, source: Source, written: Tensors, dtype: torch.dtype, options: Options, report: Report
) -> tuple[Parity, list[str]]:
    """Prove that what lies aside is the model. Raises: CheckFailed."""
    config, remarks = source.config, list[str]()
    with ExitStack() as stack:
        if options.to == "ref":
            released = open_released(aside, stack)
            back, found = released.tensors, released.config
        else:
            back, found = open_weights(aside, 2 * len(written.forms)), read_config(aside)
        if found != config:
            raise CheckFailed(f"parity: the configuration came back as another one: {found!r}")
        differ = [name for name in {**written.forms, **back.forms} if not _same(written, back, name)]
        if differ:
            raise CheckFailed(
                f"parity: {len(differ)} tensors came back with other values: {', '.join(sorted(differ)[:5])}"
            )
        report(f"read back: {len(written.forms):,} tensors, equal bit by bit")
        original = completed(source)
        lossless = options.quantisation is None and all(
            written.forms[name].torch_dtype.itemsize >= form.torch_dtype.itemsize
            for name, form in original.forms.items()
        )
        tokens = parity_tokens(config)
        if lossless and not is_small(config):
            # Equal tensors of one configuration are one function; to compute it twice would prove nothing more.
            return EQUAL, ["not loaded by transformers: too large here"] if options.to == "hf" else []
        after = back if options.quantisation is None else plain(config, back, options.quantisation)
        parity, before, outcome = compare(config, original, after, tokens, lambda part: report(f"compared {part}"))
        if lossless and parity.largest != 0:
            raise CheckFailed(
                f"parity: logits differ by {parity.largest:.3g}, from {parity.first_layer} on; expected equal ones"
            )
        if is_small(config):
            scale = max(1.0, parity.scale / _NAMED)
            if source.adapted is not None:
                adapted = outcome_of(source.adapted, tokens)
                remarks.append(_within("base and adapter", before, adapted.logits, REORDERED_DIFFERENCE * scale))
            if options.to != "ref":
                allowed = 0.0 if options.quantisation is None else REORDERED_DIFFERENCE * scale
                loaded = outcome_of(load_model(aside).eval(), tokens)
                _within("our loader", outcome, loaded.logits, allowed)
            if options.to == "hf":
                remarks.append(_check_transformers(aside, tokens, outcome, TRANSFORMERS_DIFFERENCE[dtype] * scale))
    return parity, remarks


def _same(written: Tensors, back: Tensors, name: str) -> bool:
    form = written.forms.get(name)
    return form is not None and back.forms.get(name) == form and torch.equal(back.read(name), written.read(name))


def _check_transformers(aside: Path, tokens: torch.Tensor, outcome: Outcome, allowed: float) -> str:
    """Compare what transformers computes. Raises: CheckFailed."""
    if importlib.util.find_spec("transformers") is None:
        return "not checked through transformers, which is not installed (the extra [hf])"
    theirs = huggingface.check_with_transformers(aside, tokens)[0].float()
    return _within("AutoModelForCausalLM", outcome, lambda place: theirs[place], allowed)


def _within(name: str, outcome: Outcome, other: Callable[[slice], torch.Tensor], allowed: float) -> str:
    """Say how far other logits lie from those of the tensors that were written. Raises: CheckFailed: too far."""
    difference, same, _ = compare_logits(outcome, other)
    said = f"{name}: largest logit difference {difference:.3g}, top-1 agreement {same:.2%} (allowed {allowed:.3g})"
    if not difference <= allowed:
        raise CheckFailed(f"parity: {said}")
    return said


def describe(source: Source) -> dict[str, Any]:
    """What `--inspect` shows: kind, configuration, every tensor, totals, and what does not fit."""
    forms, fit = source.tensors.forms, fit_of(source)
    values: dict[str, int] = {}
    for form in forms.values():
        values[form.dtype] = values.get(form.dtype, 0) + form.num_values
    quantisation = source.quantisation
    return {
        "path": str(source.path),
        "kind": source.kind,
        "config": source.config.model_dump(mode="json"),
        "quantisation": None if quantisation is None else quantisation.model_dump(mode="json"),
        "beside": sorted(source.beside),
        "tensors": [{"name": n, "shape": list(form.shape), "dtype": form.dtype} for n, form in forms.items()],
        "num_tensors": len(forms),
        "bytes": sum(form.num_bytes for form in forms.values()),
        "values": values,
        "parameters": source.config.num_parameters(),
        "missing": fit.missing,
        "unexpected": fit.unexpected,
        "mismatched": fit.mismatched,
    }
