"""What `megalodon evaluate` is asked to look at: models of checkpoints, and the text to score them on.

Not here: what is measured (evaluation_request.py), which directory CKPT means (checkpoints.py).
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megalodon.errors import EnvironmentFault, InputError
from megalodon_cli import console, run_files

if TYPE_CHECKING:
    import torch

    from megalodon.evaluation.corpus import Corpus, Tokens
    from megalodon.inference.session import Writer

EVALS = "evals"
"""Folder of a run that holds its evaluations."""


class Subject(NamedTuple):
    """A model that is evaluated."""

    name: str
    """Short, and no other model's."""
    directory: Path
    run: Path | None
    """The run it came from, if it stands in one."""
    writer: "Writer"
    tokens: "Tokens"
    seq_len: int | None
    """Tokens of a window in its training."""

    def about(self) -> dict[str, Any]:
        """What a report says of it."""
        owner = self.writer.owner
        return {
            "name": self.name,
            "path": str(self.directory),
            "weights_sha256": owner.weights if owner else None,
            "tokenizer_sha256": self.writer.tokenizer.sha256,
            "parameters": self.writer.model.num_parameters(),
            "seq_len": self.seq_len,
            "bos": self.tokens.bos,
            "eos": self.tokens.eos,
        }

    @property
    def store(self) -> Path | None:
        """The token store that its run was trained on; None for a model in no run."""
        values = run_files.recipe_values(self.run) if self.run else {}
        return Path(str(values.get("data.dir") or f"data/{values.get('name')}")) if values else None


def run_of(directory: Path) -> Path | None:
    """The run that a model directory stands in."""
    return directory.parent if (directory.parent / "run.json").is_file() else None


def load(directories: Sequence[Path], device: "torch.device") -> list[Subject]:
    """Load models onto a device. Raises: InputError for one given twice; CheckpointError, DataError."""
    from megalodon.checkpoint.adapter_files import is_adapter
    from megalodon.checkpoint.tensors import read_model_info
    from megalodon.evaluation.corpus import Tokens
    from megalodon.inference.session import load_writer

    real = [directory.resolve() for directory in directories]
    if twice := next((d for d, path in zip(directories, real, strict=True) if real.count(path) > 1), None):
        raise InputError(f"{twice} is given twice; expected different models")
    names = [(directory.parent if run_of(directory) else directory).resolve().name for directory in directories]
    found = []
    for directory, name in zip(directories, names, strict=True):
        writer, run = load_writer(directory), run_of(directory)
        writer.model.to(device)
        info = {} if is_adapter(directory) else read_model_info(directory)
        seq_len, eos = info.get("seq_len"), info.get("eos")
        if eos is None:  # written before it was recorded; the run beside it knows
            eos = run_files.recipe_values(run).get("data.eos", True) if run else True
        tokens = Tokens(writer.tokenizer, writer.bos, bool(eos))
        own = name if names.count(name) == 1 else str(directory)
        found.append(Subject(own, directory, run, writer, tokens, seq_len if isinstance(seq_len, int) else None))
    return found


def text_of(data: Path, *, concatenate: bool) -> "Corpus":
    """The text of --data. Raises: DataError."""
    from megalodon.evaluation.corpus import Concatenated, files

    found = files(data)
    return Concatenated(found) if concatenate else found


def validation(subjects: Sequence[Subject], *, concatenate: bool) -> "Corpus":
    """The validation part of the run of the first model. Raises: InputError if there is none."""
    from megalodon.data.prepare import VALID, open_prepared
    from megalodon.evaluation.corpus import Concatenated, StoreCorpus

    first, store = subjects[0], subjects[0].store
    if store is None:
        raise InputError(f"{first.directory} is in no run, so it has no validation part; expected --data FILE|DIR")
    if first.run and run_files.recipe_values(first.run).get("kind", "pretrain") != "pretrain":
        raise InputError(f"{first.run} was tuned on examples, which are not scored here; expected --data FILE|DIR")
    if not (store / VALID / "manifest.json").is_file():
        raise InputError(
            f"{first.run} was validated on {store / VALID}, which is not there; expected --data FILE|DIR, or the "
            "folder that it was trained in as working directory"
        )
    prepared = open_prepared(store)
    if not prepared.valid.num_documents:
        raise InputError(f"{store} holds no validation text; expected --data FILE|DIR")
    for subject in subjects[1:]:
        if subject.store is None or subject.store.resolve() != store.resolve():
            console.note(
                f"the text is the validation part of {first.name}; {subject.name} was trained on other data, in which "
                "it may stand: --data gives both a text that neither has seen"
            )
    found = StoreCorpus(prepared.valid, prepared.tokenizer)
    return Concatenated(found) if concatenate else found


def destination(directory: Path, output_path: Path | None) -> Path | None:
    """Where results go: --output-path, else RUN/evals, else nowhere.

    Raises: InputError for a file in the way; EnvironmentFault for a folder that may not be written to.
    """
    run = run_of(directory)
    folder = output_path or (run / EVALS if run else None)
    if folder is not None:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise InputError(f"{there} is a file; expected a folder for the results")
        if not os.access(there, os.W_OK | os.X_OK):
            raise EnvironmentFault(f"{there} may not be written to; expected another --output-path for the results")
    return folder
