"""What `megalodon tokenize` shows of a token store that is there: its ledger, its tokens, whether it is whole.

Not here: making one (megalodon_cli/commands/tokenize.py).
"""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalodon_cli import console

if TYPE_CHECKING:
    from megalodon.data.prepare import Prepared
    from megalodon.data.tokenizer import Tokenizer

_SHOWN_TOKENS = 64
_ESCAPES = str.maketrans({"\n": "\\n", "\t": "\\t", "\r": "\\r", "|": "\\|"})


def summary(directory: Path, prepared: "Prepared") -> dict[str, Any]:
    """Return what the JSON document of every way to call the command holds."""
    return {
        "directory": str(directory),
        "fingerprint": prepared.train.fingerprint,
        "up_to_date": prepared.up_to_date,
        "vocab_size": prepared.train.vocab_size,
        "tokenizer": {"kind": prepared.tokenizer.kind, "sha256": prepared.tokenizer.sha256},
        "ledger": prepared.ledger._asdict(),
    }


def show_stats(directory: Path) -> None:
    """Print the ledger, the tokens of each source and how long documents are."""
    import numpy as np

    from megalodon.data.prepare import open_prepared

    prepared = open_prepared(directory)
    for line in prepared.ledger.lines():
        console.result(line)
    sources = [
        {
            "part": part,
            "source": name,
            "tokens": own.num_tokens,
            "documents": own.num_documents,
            "bytes": own.text_bytes,
        }
        for part, store in (("train", prepared.train), ("valid", prepared.valid))
        for name, own in ((name, store.source(name)) for name in store.sources)
    ]
    console.result()
    cells = [[value if isinstance(value, str) else f"{value:,}" for value in row.values()] for row in sources]
    console.table([list(sources[0]), *cells], right=(2, 3, 4))
    lengths = np.concatenate([prepared.train.lengths(), prepared.valid.lengths()])
    powers, counts = np.unique(np.floor(np.log2(lengths)).astype(int), return_counts=True)
    histogram = {f"{2**power}": int(count) for power, count in zip(powers.tolist(), counts.tolist(), strict=True)}
    console.result()
    longest = max(histogram.values())
    shown = [
        [f"{int(low):,} to {2 * int(low) - 1:,}", f"{n:,}", "█" * -(-30 * n // longest)] for low, n in histogram.items()
    ]
    console.table([["tokens", "documents", ""], *shown], right=(0, 1))
    console.document("tokenize", {**summary(directory, prepared), "sources": sources, "lengths": histogram})


def show_documents(directory: Path, count: int) -> None:
    """Print the tokens of the first documents, with borders, and marks around those that a loss is taken of."""
    from megalodon.data.prepare import open_prepared

    prepared = open_prepared(directory)
    store, rows = prepared.train, []
    for begin, end in store.documents(count):
        ids = store.tokens(begin, min(end, begin + _SHOWN_TOKENS)).tolist()
        # As data.isolate=doc trains: what begins a document is not to be told from the end of the one before.
        trained = [place > 0 for place in range(len(ids))]
        pieces = [_piece(prepared.tokenizer, token) for token in ids]
        rows.append({"start": begin, "tokens": end - begin, "ids": ids, "pieces": pieces, "trained": trained})
        more = f"| … {end - begin - len(ids):,} more" if end - begin > len(ids) else ""
        console.result(f"document at {begin:,}, {end - begin:,} tokens: {_marked(pieces, trained)}{more}")
    console.info("marked: tokens that a loss is taken of with data.isolate=doc; with none, those that begin one too")
    console.document("tokenize", {"directory": str(directory), "documents": rows})


def _piece(tokenizer: "Tokenizer", token: int) -> str:
    names = {tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}
    return names.get(token) or tokenizer.token_bytes(token).decode("utf-8", "backslashreplace")


def _marked(pieces: Sequence[str], trained: Sequence[bool]) -> str:
    """Join pieces by their borders, with marks around each run of trained ones."""
    runs = itertools.groupby(zip(pieces, trained, strict=True), key=lambda pair: pair[1])
    texts = [(kept, "|".join(piece.translate(_ESCAPES) for piece, _ in run)) for kept, run in runs]
    return "|".join(console.marked(text) if kept else text for kept, text in texts)


def show_check(directory: Path) -> None:
    """Check sizes, hashes, ids and ledger, with a thread for each core. Raises: CheckFailed for what is not right."""
    import os

    from megalodon.data.prepare import verify_prepared

    prepared = verify_prepared(directory, os.cpu_count() or 1)
    tokens = prepared.train.num_tokens + prepared.valid.num_tokens
    console.result(
        f"{directory}: {tokens:,} tokens, sizes, hashes, ids and ledger agree ({prepared.train.fingerprint[:8]})"
    )
    console.document("tokenize", summary(directory, prepared))
