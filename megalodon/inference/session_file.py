"""The file of a session, `NAME.mega`: all that a model remembers and how it came about, in one safetensors file.

    header       "megalodon": JSON with the format, the checksum of the whole file, the sha256 of weights, tokenizer and
                 chat template, chunk size, norm policy, dtypes
    pos, cema_h, norm_count, norm_mean, norm_var     every layer, then the output norm, at chunk boundaries (rows)
    recent       under `window` the ids of the last 8 chunks before each boundary, one after the other
    place, tail_length, tail, next_logits            the places: where the session stands, then those of its last turns
                 and of its named branches: the row of each boundary, the ids since, the logits of the next token
    open_…       with keys and values: these of the open chunk, and the state where the session stands, as they are
    transcript   UTF-8 JSON: messages, files read by name, hash and token count; names of the branches

Its size depends on the model alone, apart from the transcript and the ids of open chunks. Without keys and values the
state of a boundary is rounded to float32; less than a chunk is read again to continue. Written aside, renamed, for
its owner's eyes only. Not here: what is in a transcript (conversation.py).
"""

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from megalodon.checkpoint.store import sync_directory
from megalodon.checkpoint.tensor_files import read_boxes
from megalodon.errors import CheckpointError, EnvironmentFault, InputError
from megalodon.inference.norm_window import KEPT, NormStats, check_norm_stats
from megalodon.inference.session import Owner, Past, Snapshot
from megalodon.model.megalodon import Megalodon
from megalodon.model.state import LayerState, State

FORMAT = "megalodon/session/1"
KEPT_TURNS = 4
"""Turns whose beginnings stand in the file."""
_KEY, _NO_CHECKSUM = "megalodon", "0" * 64
_BEGIN = f'{{"__metadata__":{{"{_KEY}":'.encode()
"""What the header of a session begins with, behind its length."""
_TENSORS = 1 << 12
"""More than a session has, so that other files are told apart by what they say, not by their size."""

Entry = Mapping[str, Any]
"""Of a transcript, as JSON: {"role", "content"}, or {"read": {"name", "sha256", "tokens"}}."""


class Mark(NamedTuple):
    """A place in a session that has a history: the beginning of a turn, a named branch."""

    snapshot: Snapshot
    transcript: tuple[Entry, ...]


class Contents(NamedTuple):
    """What a session file holds."""

    here: Mark
    """Where the session stands."""
    turns: tuple[Mark, ...]
    """The beginnings of the last turns, the oldest first; the transcript of each begins that of `here`."""
    branches: dict[str, Mark]
    """By name, without that of `here`."""
    current: str
    """Name of the branch of `here`."""
    system: str | None
    """System text of the conversation."""
    norm_stats: NormStats
    state: State | None
    """Where the session stands, if its keys and values are kept; else it is formed from the open chunk's ids."""


class History(NamedTuple):
    """What a session file tells of itself, whatever model it belongs to."""

    transcript: tuple[Entry, ...]
    system: str | None
    """Of a conversation, also if nothing was said yet."""
    norm_stats: NormStats
    owner: Owner


# ------------------------------------------------------------------------------------------------ saving


def save_session(path: Path, contents: Contents, model: Megalodon, owner: Owner) -> None:
    """Write a session file; one that stands there already gives way when the new one is whole.

    Args:
        contents: of its turns the last 4 are written.
        model:    that the session runs.
        owner:    whose hashes it gets.
    Raises:
        InputError: nothing was read, or reading began inside a chunk and has not reached the next one, or something
            that is no session has this name.
        EnvironmentFault: the file could not be written; what stood there is untouched.
    """
    check_target(path)
    C = model.config.chunk_size
    turns = contents.turns[-KEPT_TURNS:]
    places = [mark.snapshot for mark in (contents.here, *turns, *contents.branches.values())]
    if not any(place.position for place in places):
        raise InputError(f"{path}: the session has read nothing; there is nothing to save")
    if any(place.past.position % C or (place.logits is None and place.position) for place in places):
        raise InputError(f"{path}: this session began inside a chunk of {C} tokens; read on to the next one, then save")
    tensors = {**_places(places, model), **_transcript(contents, turns)}
    if contents.state:
        tensors |= _open_chunk(contents.state)
    about = {"format": FORMAT, "checksum": _NO_CHECKSUM, **owner._asdict(), "chunk_size": C}
    kept = {name: str(tensors[name].dtype).removeprefix("torch.") for name in ("cema_h", "open_k") if name in tensors}
    about |= {"norm_stats": contents.norm_stats, "dtypes": kept}
    _write(path, save({name: x.cpu().contiguous() for name, x in tensors.items()}, {_KEY: json.dumps(about)}))


def check_target(path: Path) -> None:
    """Raises: InputError if something stands there that is no session of ours: saving would destroy it."""
    try:
        if not path.exists():
            return
        ours = False
        if path.is_file():
            with path.open("rb") as file:
                begin = file.read(8 + len(_BEGIN))
            ours = not begin or begin[8:] == _BEGIN
    except OSError:
        return  # what cannot be reached is told by the writing
    if not ours:
        raise InputError(f"{path} is there and is no session; expected another name, such as {path.stem}.mega")


def _places(places: Sequence[Snapshot], model: Megalodon) -> dict[str, Tensor]:
    """Snapshots as tensors; those of one chunk share the row of its boundary."""
    rows: dict[int, int] = {}
    pasts: list[Past] = []
    for place in places:
        if id(place.past.state) not in rows:
            rows[id(place.past.state)] = len(pasts)
            pasts.append(place.past)
    wide = torch.promote_types(model.output_weight.dtype, torch.float32)
    states = [_stacked(past.state) for past in pasts]
    found = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    found = {name: x.to(wide) if x.is_floating_point() else x for name, x in found.items()}
    unread = torch.zeros(model.config.num_outputs, dtype=wide, device=model.device)
    return found | {
        "pos": torch.tensor([past.position for past in pasts]),
        "recent": _ids(token for past in pasts for chunk in past.recent for token in chunk),
        "place": torch.tensor([rows[id(place.past.state)] for place in places]),
        "tail_length": torch.tensor([len(place.tail) for place in places]),
        "tail": _ids(token for place in places for token in place.tail),
        "next_logits": torch.stack([unread if place.logits is None else place.logits for place in places]),
    }


def _stacked(state: State) -> dict[str, Tensor]:
    """The averages of all layers, and the statistics of all layers and the output norm behind them."""
    norms = [*(layer.norm for layer in state.layers), state.norm]
    return {
        "cema_h": torch.stack([layer.cema[0] for layer in state.layers]),
        "norm_count": torch.stack([norm.count[0] for norm in norms]),
        "norm_mean": torch.stack([norm.mean[0] for norm in norms]),
        "norm_var": torch.stack([norm.var[0] for norm in norms]),
    }


def _open_chunk(state: State) -> dict[str, Tensor]:
    kept = {"k": torch.cat([x.k for x in state.layers]), "v": torch.cat([x.v for x in state.layers])}
    return {f"open_{name}": tensor for name, tensor in {**kept, **_stacked(state)}.items()}


def _ids(tokens: Iterable[int]) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int32)


def _transcript(contents: Contents, turns: Sequence[Mark]) -> dict[str, Tensor]:
    """All transcripts: those of the turns are beginnings of the whole, so are most of what branches hold."""
    entries = contents.here.transcript
    branches: dict[str, dict[str, object]] = {}
    for name, mark in contents.branches.items():
        pairs = enumerate(zip(entries, mark.transcript, strict=False))
        shared = next((n for n, (ours, its) in pairs if ours != its), min(len(entries), len(mark.transcript)))
        branches[name] = {"shared": shared, "more": mark.transcript[shared:]}
    said: dict[str, object] = {
        "entries": entries,
        "turns": [len(mark.transcript) for mark in turns],
        "branches": branches,
    }
    said |= {"current": contents.current, "system": contents.system}
    # Names of files that are no text in the encoding of this process keep their bytes.
    text = json.dumps(said, ensure_ascii=False).encode("utf-8", "surrogateescape")
    return {"transcript": torch.frombuffer(bytearray(text), dtype=torch.uint8)}


def _write(path: Path, raw: bytes) -> None:
    """Put the checksum in and write the file aside, readable by its owner alone, then give it its name."""
    aside = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    at = 8 + raw[8 : 8 + int.from_bytes(raw[:8], "little")].index(_NO_CHECKSUM.encode())
    digest, view = hashlib.sha256(raw).hexdigest().encode(), memoryview(raw)
    try:
        with open(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            for part in (view[:at], digest, view[at + len(digest) :]):
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_directory(path.parent)
    except OSError as error:
        raise EnvironmentFault(f"{path} could not be written: {(error.strerror or str(error)).lower()}") from error
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ loading


def load_session(path: Path, model: Megalodon, owner: Owner) -> Contents:
    """Read a session file, for this model only.

    Raises:
        CheckpointError: there is none, it is damaged or of another version, or belongs to another model, tokenizer or
            template; the message says which.
    """
    about, tensors = _read(path)
    check_owner(path, _owner(path, about), owner)
    try:
        return _Reader(path, tensors, model, about).contents()
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a session of ours: {error!r}") from error


def load_history(path: Path) -> History:
    """Read what a session file tells of itself, whatever model it belongs to. Raises: CheckpointError."""
    about, tensors = _read(path)
    try:
        said = json.loads(bytes(tensors["transcript"].tolist()).decode("utf-8", "surrogateescape"))
        entries, system = _entries(said["entries"]), said["system"]
        if not (system is None or type(system) is str):
            raise ValueError(f"system is {system!r}")
        return History(entries, system, check_norm_stats(about["norm_stats"]), _owner(path, about))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a session of ours: {error!r}") from error


def check_owner(path: Path, its: Owner, ours: Owner) -> None:
    """Raises: CheckpointError if a session belongs to another model, tokenizer or template."""
    hint = "--rebuild reads its transcript again with this model"
    if its.weights != ours.weights:
        name = f" ({its.name})" if its.name else ""
        raise CheckpointError(f"{path} belongs to weights {its.weights[:8]}{name}, this is {ours.weights[:8]}; {hint}")
    for what in ("tokenizer", "template"):
        one, other = getattr(its, what), getattr(ours, what)
        if one != other:
            one, other = (f"{what} {sha[:8]}" if sha else f"no {what}" for sha in (one, other))
            raise CheckpointError(f"{path} belongs to {one}, this model has {other}; {hint}")


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file whose checksum is right."""
    read_boxes(path, _TENSORS)  # before anything of its size is held
    try:
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = raw[8 : 8 + length]
        told = json.loads(header).get("__metadata__", {}).get(_KEY)
        if told is None:
            raise CheckpointError(f"{path} is no session; expected a file that --save-state or /save wrote")
        about = json.loads(told)
        if (form := about["format"]) != FORMAT:
            raise CheckpointError(f"{path} has format {str(form)[:60]!r}; this version of megalodon reads {FORMAT!r}")
        checksum = str(about["checksum"]).encode()
        if not re.fullmatch(rb"[0-9a-f]{64}", checksum) or header.count(checksum) != 1:
            raise CheckpointError(f"{path} has no checksum; it was changed after it was written")
        at, view, found = 8 + header.index(checksum), memoryview(raw), hashlib.sha256()
        for part in (view[:at], _NO_CHECKSUM.encode(), view[at + 64 :]):
            found.update(part)
        if found.hexdigest().encode() != checksum:
            raise CheckpointError(
                f"{path} was changed after it was written: its checksum is {found.hexdigest()[:8]}, "
                f"{checksum[:8].decode()} was recorded; save the session again"
            )
        return about, load(raw)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a session of ours: {error!r}") from error


def _owner(path: Path, about: Mapping[str, Any]) -> Owner:
    try:
        owner = Owner(**{name: about[name] for name in Owner._fields})
    except KeyError as error:
        raise CheckpointError(f"{path} does not say whose session it is: {error} is missing") from None
    if not all(
        isinstance(value, str) or (value is None and name == "template") for name, value in owner._asdict().items()
    ):
        raise CheckpointError(f"{path} does not say whose session it is: {owner}")
    return owner


def _entries(value: Any) -> tuple[Entry, ...]:
    """The entries of a transcript. Raises: ValueError, TypeError, KeyError."""
    for entry in value:
        kinds: dict[str, type] = {"name": str, "sha256": str, "tokens": int}
        if "role" in entry:
            kinds = {"role": str, "content": str}
        told = entry if "role" in entry else entry["read"]
        if not all(type(told[name]) is kind for name, kind in kinds.items()):
            raise ValueError(f"a transcript holds {str(entry)[:60]}")
    return tuple(value)


def _next(ids: Iterator[int], count: int) -> tuple[int, ...]:
    """The next ids. Raises: ValueError if there are not so many."""
    found = tuple(islice(ids, count))
    if len(found) < count:
        raise ValueError(f"{count} ids were to come, {len(found)} came")
    return found


class _Reader:
    """The tensors of one file, each checked against what this model has."""

    def __init__(self, path: Path, tensors: Mapping[str, Tensor], model: Megalodon, about: Mapping[str, Any]) -> None:
        self.path, self.tensors, self.model, self.about = path, tensors, model, about

    def contents(self) -> Contents:
        config, about = self.model.config, self.about
        if about["chunk_size"] != config.chunk_size:
            raise ValueError(f"chunk_size {about['chunk_size']}, the model has {config.chunk_size}")
        norm_stats = check_norm_stats(about["norm_stats"])
        places = self._snapshots(norm_stats)
        said = json.loads(bytes(self.take("transcript", torch.uint8, None).tolist()).decode("utf-8", "surrogateescape"))
        entries, lengths, branches = _entries(said["entries"]), said["turns"], said["branches"]
        if len(places) != 1 + len(lengths) + len(branches) or not all(0 <= n <= len(entries) for n in lengths):
            raise ValueError(f"{len(places)} places for {len(lengths)} turns and {len(branches)} branches")
        turns = (Mark(place, entries[:n]) for place, n in zip(places[1:], lengths, strict=False))
        marks = {
            name: Mark(place, entries[: told["shared"]] + _entries(told["more"]))
            for place, (name, told) in zip(places[1 + len(lengths) :], branches.items(), strict=True)
        }
        state = self._open_state(places[0]) if "open_k" in self.tensors else None
        current, system = said["current"], said["system"]
        if type(current) is not str or not (system is None or type(system) is str):
            raise ValueError(f"current is {current!r}, system {system!r}")
        return Contents(Mark(places[0], entries), tuple(turns), marks, current, system, norm_stats, state)

    def take(self, name: str, dtype: torch.dtype, *shape: int | None) -> Tensor:
        """A tensor of this dtype and shape; None stands for any size. Raises: KeyError, ValueError."""
        found = self.tensors[name]
        fits = len(found.shape) == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
        if found.dtype != dtype or not fits:
            raise ValueError(f"{name} is {found.dtype} {tuple(found.shape)}")
        return found

    def numbers(self, name: str, low: int, high: int, dtype: torch.dtype = torch.int64) -> list[int]:
        """A tensor of whole numbers, each in low … high - 1."""
        found = self.take(name, dtype, None)
        if len(found) and not (low <= int(found.min()) and int(found.max()) < high):
            raise ValueError(f"{name} holds numbers from {int(found.min())} to {int(found.max())}")
        return list(map(int, found.tolist()))

    def _snapshots(self, norm_stats: NormStats) -> list[Snapshot]:
        config, limit = self.model.config, 1 << 62
        C, wide = config.chunk_size, torch.promote_types(self.model.output_weight.dtype, torch.float32)
        positions = self.numbers("pos", 0, limit)
        recent = iter(self.numbers("recent", 0, config.vocab_size, torch.int32))
        pasts = []
        for row, position in enumerate(positions):
            if position % C:
                raise ValueError(f"a boundary at {position}")
            count = min(KEPT, position // C) if norm_stats == "window" else 0
            chunks = tuple(_next(recent, C) for _ in range(count))
            pasts.append(Past(self._state("", wide, row, len(positions), position, None), position, chunks))
        lengths, tail = self.numbers("tail_length", 0, C), iter(self.numbers("tail", 0, config.vocab_size, torch.int32))
        rows = self.numbers("place", 0, len(pasts))
        logits = self.take("next_logits", wide, len(rows), config.num_outputs).to(self.model.device)
        found = []
        for row, length, its in zip(rows, lengths, logits, strict=True):
            ids = _next(tail, length)
            found.append(Snapshot(pasts[row], ids, its if pasts[row].position + length else None))
        if next(tail, None) is not None or next(recent, None) is not None or not found:
            raise ValueError("ids that belong to no place")
        return found

    def _open_state(self, here: Snapshot) -> State:
        held, dtype = (
            (len(self.model.layers), len(here.tail), self.model.config.num_heads),
            self.model.output_weight.dtype,
        )
        k, v = (self.take(f"open_{name}", dtype, *held, None).to(self.model.device) for name in "kv")
        wide = self.model.empty_state(1).layers[0].cema.dtype
        return self._state("open_", wide, None, 1, here.position, (k, v))

    def _state(
        self,
        prefix: str,
        dtype: torch.dtype,
        row: int | None,
        rows: int,
        position: int,
        kv: tuple[Tensor, Tensor] | None,
    ) -> State:
        """A state of one row, in the dtypes of the model; `row` None: the tensors have no rows."""
        empty, c = self.model.empty_state(1), self.model.config
        lead, norms = () if row is None else (rows,), len(self.model.layers) + 1
        norm_dtype = dtype if kv is None else empty.norm.mean.dtype

        def own(name: str, of: torch.dtype, *shape: int) -> Tensor:
            found = self.take(prefix + name, of, *lead, *shape)
            return (found if row is None else found[row]).to(self.model.device)

        h = own("cema_h", dtype, len(self.model.layers), *empty.layers[0].cema.shape[1:]).to(empty.layers[0].cema.dtype)
        count = own("norm_count", torch.int64, norms)
        mean, var = (
            own(x, norm_dtype, norms, c.norm_num_groups).to(empty.norm.mean.dtype) for x in ("norm_mean", "norm_var")
        )
        statistics = [type(empty.norm)(count[i : i + 1], mean[i : i + 1], var[i : i + 1]) for i in range(norms)]
        layers = []
        for i, nothing in enumerate(empty.layers):
            k, v = (nothing.k, nothing.v) if kv is None else (kv[0][i : i + 1], kv[1][i : i + 1])
            if k.shape[-1] != nothing.k.shape[-1] or v.shape[-1] != nothing.v.shape[-1]:
                raise ValueError(f"keys and values are {tuple(k.shape)} and {tuple(v.shape)}")
            layers.append(LayerState(k, v, statistics[i], h[i : i + 1]))
        return State(torch.tensor([position], device=self.model.device), tuple(layers), statistics[-1])
