"""Rows of text read on from the empty state, in pieces of constant memory; the hidden values of every token.

    reader = Reader(model, rows=4)
    for start, hidden in reader.read(tokens): ...        tokens (4, L), hidden (4, l, D)
    reader.read(more)                                    goes on from there

It uses what every language model has (`hidden`, `empty_state`), so baselines are read in the same way.
Not here: reading to write (megalodon/inference/session.py).
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from megalodon.inference.norm_window import KEPT, NormStats, is_due, refreshed
from megalodon.inference.session import PIECE
from megalodon.model.architectures import LanguageModel, ModelState, as_megalodon
from megalodon.model.loss import token_losses

_CALL = 2
"""Chunks of a pass under `window`, as the released code feeds them."""


class Reader:
    """Rows that are read side by side, all to the same place.

    Args:
        model:      in evaluation mode; read under `torch.inference_mode()`.
        rows:       texts side by side; 1 under the norm policy `window`.
        norm_stats: `cumulative`, or `window` (megalodon/inference/norm_window.py).
        piece:      tokens of one pass, at least 1.
        bf16:       matrix products in bfloat16.
    Raises:
        InputError: `window` for a baseline, which has no such statistics.
    """

    def __init__(
        self,
        model: LanguageModel,
        rows: int = 1,
        norm_stats: NormStats = "cumulative",
        piece: int = PIECE,
        *,
        bf16: bool = False,
    ) -> None:
        self.model, self.rows, self.piece, self.bf16 = model, rows, piece, bf16
        self.position: int = 0
        self.state: ModelState = model.empty_state(rows)
        self.window = norm_stats == "window"
        self._chunk = (
            as_megalodon(model, "--norm-stats window").config.chunk_size if self.window else model.config.chunk_size
        )
        self._recent: list[int] = []
        """Ids of the last chunks, under `window`."""

    def read(self, tokens: Tensor, starts: Tensor | None = None) -> Iterator[tuple[int, Tensor]]:
        """Read on; yields where a piece begins in `tokens` and its hidden values.

        Args:
            tokens: (rows, L) int64, on the CPU.
            starts: (rows, L) bool, on the CPU: documents that begin; None under `window`.
        """
        start = 0
        while start < tokens.shape[1]:
            end = min(tokens.shape[1], start + self._room())
            part, flags = tokens[:, start:end], None if starts is None else starts[:, start:end]
            if self.window:
                self._renew()
                self._recent += part[0].tolist()
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                flags = flags if flags is not None and bool(flags.any()) else None
                hidden, self.state = self.model.hidden(part.to(self.model.device), self.state, flags)
            self.position += end - start
            yield start, hidden
            start = end

    def last(self, tokens: Tensor) -> Tensor:
        """Read on, at least one token; returns the hidden values of the last one alone: (rows, 1, D)."""
        hidden = tokens.new_empty(0)
        for _, piece in self.read(tokens):
            hidden = piece[:, -1:]
        return hidden

    def branch(self, rows: int = 1) -> "Reader":
        """A reader of as many rows that all go on from here, where this one of one row stays; 1 under `window`."""
        twin = copy.copy(self)
        twin.rows, twin._recent = rows, list(self._recent)
        if rows > 1:
            twin.state = self.state.rows([0] * rows)
        return twin

    def losses(self, hidden: Tensor, targets: Tensor, num_classes: int) -> Tensor:
        """Nats of every target: (rows, l, D) and (rows, l) -> (rows, l); see `token_losses`."""
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
            targets = targets.to(self.model.device)
            return token_losses(hidden, self.model.output_weight, targets, num_classes=num_classes)

    @property
    def span(self) -> int:
        """Tokens of a full pass: such that passes meet the grid of chunks, if reading began on it."""
        C = self._chunk
        if self.window:
            return min(self.piece, _CALL * C)
        return self.piece if self.piece < C else self.piece // C * C

    def _room(self) -> int:
        """Tokens of the next pass: to the next multiple of a full one, and no further than the statistics reach."""
        room = self.span - self.position % self.span
        return min(room, _CALL * self._chunk - self.position % (_CALL * self._chunk)) if self.window else room

    def _renew(self) -> None:
        C, model = self._chunk, as_megalodon(self.model, "--norm-stats window")
        if is_due(self.position, C):
            chunks = [tuple(self._recent[n : n + C]) for n in range(0, len(self._recent), C)]
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16):
                self.state = refreshed(model, self.state, chunks, self.piece)
        if self.position % C == 0:
            self._recent = self._recent[-KEPT * C :]
