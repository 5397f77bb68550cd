"""A small model over bytes and texts to evaluate it on."""

import random
from pathlib import Path

import torch
from factories import tiny_model

from megalodon.data.tokenizer import ByteTokenizer
from megalodon.evaluation.corpus import Tokens
from megalodon.model.megalodon import Megalodon

TOKENIZER = ByteTokenizer(reserve=2)
TOKENS = Tokens(TOKENIZER, bos=True, eos=True)
NUM_CLASSES = TOKENIZER.vocab_size


def byte_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> Megalodon:
    """Rows beyond the tokenizer's ids pad its output."""
    return tiny_model(dtype, seed, vocab_size=NUM_CLASSES + 5).eval()


def text(words: int, seed: int = 0) -> str:
    """Words of a few letters, not all of them ASCII, between single and double spaces and newlines."""
    draw = random.Random(seed)
    return "".join(
        "".join(draw.choices("abcdeé", k=draw.randint(1, 6))) + draw.choice([" ", " ", "  ", "\n"])
        for _ in range(words)
    )


def write(path: Path, *texts: str) -> Path:
    """A folder of files, one a text."""
    path.mkdir()
    for number, own in enumerate(texts):
        (path / f"{number:02d}.txt").write_text(own, encoding="utf-8")
    return path
