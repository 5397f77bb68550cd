"""The Hugging Face Hub: datasets with their commit and their rows as text, tokenizers; the only user of `datasets`.

Not here: files on disk (megalodon/data/reading.py), how rows reach the workers (megalodon/data/tasks.py).
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from megalodon.data.ingest import SourceConfig
from megalodon.data.reading import text_of
from megalodon.data.tokenizer import ON_HUB, SENTENCEPIECE_FILE
from megalodon.errors import DataError, EnvironmentFault


class HubTokenizer(NamedTuple):
    """A tokenizer of the Hub: its file here, and the commit it is of."""

    file: Path
    revision: str


def fetch_tokenizer(path: str, offline: bool = False) -> HubTokenizer:
    """Fetch tokenizer.model of `hf:ORG/NAME[@REVISION]`.

    Raises: EnvironmentFault (no network, or not allowed), DataError (no such model, revision or file).
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    if offline:
        raise EnvironmentFault(f"tokenizer.path {path} needs the network, and --offline forbids it")
    name, _, wanted = path.removeprefix(ON_HUB).partition("@")
    try:
        revision = str(huggingface_hub.HfApi().model_info(name, revision=wanted or None).sha)
        file = huggingface_hub.hf_hub_download(name, SENTENCEPIECE_FILE, revision=revision)
    except RevisionNotFoundError:
        raise DataError(f"tokenizer.path {path}: `{name}` has no revision `{wanted}`") from None
    except RepositoryNotFoundError:
        raise DataError(f"tokenizer.path {path}: no model `{name}` on the Hub (or it is private)") from None
    except EntryNotFoundError:
        raise DataError(f"tokenizer.path {path}: `{name}` has no {SENTENCEPIECE_FILE}; give another model") from None
    except _http_errors() as error:
        reason = " ".join(str(error).split())[:160]
        raise EnvironmentFault(
            f"tokenizer.path {path} cannot be read from the Hub ({reason})",
            hint=f"download its {SENTENCEPIECE_FILE} and give the file",
        ) from None
    return HubTokenizer(Path(file), revision)


def hub_revision(config: SourceConfig, offline: bool = False) -> str:
    """Return the commit a Hub dataset is read at. Raises: EnvironmentFault (no network), DataError (no dataset)."""
    import huggingface_hub
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    _refuse_offline(config, offline)
    try:
        info = huggingface_hub.HfApi().dataset_info(str(config.hf), revision=config.revision)
    except RepositoryNotFoundError:
        raise DataError(
            f"data.sources.{config.name}.hf: no dataset `{config.hf}` on the Hub (or it is private)"
        ) from None
    except RevisionNotFoundError:
        raise DataError(f"data.sources.{config.name}.revision: `{config.hf}` has no `{config.revision}`") from None
    except _hub_errors() as error:
        raise _no_hub(config, error) from None
    return str(info.sha)


def hub_texts(
    config: SourceConfig, revision: str | None = None, offline: bool = False, skip: int = 0
) -> Iterator[tuple[str, str]]:
    """Yield (text, reason) of each row after the first `skip`: its text, or why it has none.

    Raises: EnvironmentFault if the Hub may not be asked or cannot be reached.
    """
    import datasets

    _refuse_offline(config, offline)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        rows = datasets.load_dataset(
            config.hf, config.subset, split=config.split, revision=revision or config.revision, streaming=True
        )
        for values in itertools.islice(iter(rows), skip, None):
            yield text_of(values, config.field)
    except _hub_errors() as error:
        raise _no_hub(config, error) from None


def _http_errors() -> tuple[type[Exception], ...]:
    """What a Hub that cannot be read raises; an HTTP client's own errors are the bases of the Hub's."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, *HfHubHTTPError.__bases__)


def _hub_errors() -> tuple[type[Exception], ...]:
    """The same, and what `datasets` raises."""
    import datasets

    return (*_http_errors(), datasets.exceptions.DatasetsError)


def _refuse_offline(config: SourceConfig, offline: bool) -> None:
    if offline:
        raise EnvironmentFault(
            f"data.sources.{config.name}: hf:{config.hf} needs the network, and --offline forbids it"
        )


def _no_hub(config: SourceConfig, error: Exception) -> EnvironmentFault:
    reason = " ".join(str(error).split())[:160]
    return EnvironmentFault(
        f"data.sources.{config.name}: hf:{config.hf} cannot be read from the Hub ({reason})",
        hint=f"data.sources.{config.name}.path=DIR reads local files instead",
    )
