"""Whether two sets of weights are one model: the logits of some tokens, and the first layer where they part.

Both models are walked through side by side with one layer of one of them in memory at a time, so a model of any size
can be compared; hidden values pass from layer to layer in pieces, as in streaming. Not here: what is compared with what
(conversion.py).
"""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from megalodon.checkpoint.weight_files import Tensors
from megalodon.model.attention import Place
from megalodon.model.megalodon import Megalodon, ModelConfig

CHUNKS, MORE = 3, 5
"""Tokens that are compared: so many chunks and a few more."""
SMALL = 2**28
"""Bytes of float32 parameters up to which a model is run as a whole; beyond, layer by layer and in pieces of text."""
MOST = 2**16
"""Tokens that are compared at most, however large the chunks are."""
PIECE = 1024
"""Tokens of a piece."""
_LOGIT_BYTES = 2**27
"""Logits of one model that are in memory at a time."""


class Parity(NamedTuple):
    """What a comparison found."""

    tokens: int
    """That were run; 0 where every tensor was compared instead."""
    largest: float
    """Largest difference of a logit."""
    agreement: float
    """Share of the tokens where the largest logit is the same one."""
    first_layer: str | None
    """The first part whose output differs; None if none does."""
    scale: float
    """Largest logit of the first model, without its sign."""

    def row(self) -> dict[str, Any]:
        """As it stands in megalodon.json."""
        return {
            "tokens": self.tokens,
            "largest_logit_difference": self.largest,
            "top1_agreement": self.agreement,
            "first_layer_that_differs": self.first_layer,
        }


EQUAL = Parity(0, 0.0, 1.0, None, 0.0)
"""What equal tensors of one configuration come to, without running them."""


class Outcome(NamedTuple):
    """What a model computes of some tokens, before the last product: logits of all of them may be too many."""

    hidden: Tensor
    """(L, D)."""
    matrix: Tensor
    """(num_outputs, D)."""

    def logits(self, place: slice) -> Tensor:
        """(tokens, num_outputs) of some tokens."""
        return linear(self.hidden[place], self.matrix)


def parity_tokens(config: ModelConfig, seed: int = 0) -> Tensor:
    """Return the ids (1, 3 chunks + 5) that models are compared on; fewer where these are more than MOST."""
    length = min(CHUNKS * config.chunk_size + MORE, MOST)
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))


def is_small(config: ModelConfig) -> bool:
    """Whether a model may be held in memory and run as a whole."""
    return 4 * config.num_parameters() <= SMALL and config.chunk_size <= MOST // 4


class Walk:
    """A model of which one part is in memory at a time.

    Args:
        tensors: its state dict, in any float dtype; everything is computed in float32.
    """

    def __init__(self, config: ModelConfig, tensors: Tensors) -> None:
        self.config, self._tensors = config, tensors
        with torch.device("meta"):
            self._model = Megalodon(config).eval()
        self._model.rope.freqs = self._read("rope.freqs")
        self.piece = PIECE if not is_small(config) else 1 << 62

    def parts(self) -> list[str]:
        """Names of its parts, in their order, up to the last norm."""
        return ["embed", *(f"layers.{i}" for i in range(self.config.num_layers)), "output.final_norm"]

    def apply(self, part: str, x: Tensor) -> Tensor:
        """Ids (1, L) or hidden values (1, L, D) -> hidden values (1, L, D) behind one part."""
        if part == "embed":
            rows = self._read("embed.weight")[x[0]][None]
            return rows * math.sqrt(self.config.model_dim) if self.config.scale_emb else rows
        module, pieces, state, start = self._loaded(part), [], None, 0
        while start < x.shape[1]:
            piece = x[:, start : start + self._room(start)]
            if part == "output.final_norm":
                y, state = module(piece, state)
            else:
                y, state = module(piece, self._place(start, piece.shape[1]), state)
            pieces.append(y)
            start += piece.shape[1]
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else pieces[0]

    def output_matrix(self) -> Tensor:
        """(num_outputs, D) float32."""
        return self._read("output.output.weight")

    def _room(self, start: int) -> int:
        """Tokens of the next piece: it ends at a boundary of chunks, if it is a part of one."""
        C = self.config.chunk_size
        if self.piece < C:
            return min(self.piece, C - start % C)
        return self.piece // C * C

    def _place(self, start: int, length: int) -> Place:
        position = torch.arange(start, start + length)[None]
        turn = torch.view_as_real(self._model.rope(position, self.config.chunk_size)[:, :, 0])
        before = torch.tensor([start]) if start else None
        end = start + length
        return Place(before, torch.tensor([end]), None, end % self.config.chunk_size, turn)

    def _loaded(self, part: str) -> nn.Module:
        """A part with its weights, apart from the model, which stays empty."""
        module = self._model.get_submodule(part)
        twin = copy.deepcopy(module)
        values = {name: self._read(f"{part}.{name}") for name in module.state_dict()}
        twin.load_state_dict(values, assign=True)
        return twin

    def _read(self, name: str) -> Tensor:
        tensor = self._tensors.read(name)
        return tensor.float() if tensor.is_floating_point() else tensor


@torch.no_grad()
def compare(
    config: ModelConfig,
    first: Tensors,
    second: Tensors,
    tokens: Tensor,
    report: Callable[[str], None] = lambda text: None,
) -> tuple[Parity, Outcome, Outcome]:
    """Compare two state dicts of one configuration.

    Args:
        tokens: (1, L) ids.
        report: called with the name of each part that was compared.
    Returns:
        what was found, and what each of them computed.
    """
    walks = Walk(config, first), Walk(config, second)
    hidden = [tokens, tokens]
    differs: str | None = None
    for part in walks[0].parts():
        hidden = [walk.apply(part, x) for walk, x in zip(walks, hidden, strict=True)]
        if differs is None and not torch.equal(*hidden):
            differs = part
        report(part)
    one, other = (Outcome(x[0], walk.output_matrix()) for walk, x in zip(walks, hidden, strict=True))
    largest, same, scale = compare_logits(one, other.logits)
    if largest and differs is None:
        differs = "output.output"
    return Parity(tokens.shape[1], largest, same, differs, scale), one, other


@torch.no_grad()
def outcome_of(model: Megalodon, tokens: Tensor) -> Outcome:
    """What a model that is in memory as a whole computes of ids (1, L)."""
    return Outcome(model.hidden(tokens)[0][0], model.output_weight)


@torch.no_grad()
def compare_logits(one: Outcome, other: Callable[[slice], Tensor]) -> tuple[float, float, float]:
    """Return the largest difference, the share of tokens with the same first choice, and the largest logit.

    Args:
        other: gives the logits (tokens, num_outputs) of some tokens.
    """
    largest = scale = 0.0
    same, length = 0, len(one.hidden)
    count = max(1, _LOGIT_BYTES // (4 * len(one.matrix)))
    for start in range(0, length, count):
        place = slice(start, start + count)
        logits, others = one.logits(place), other(place)
        # A NaN is a difference: comparisons with it are false, and max passes it on.
        largest = float(torch.maximum((logits - others).abs().max(), torch.tensor(largest)))
        scale = max(scale, float(logits.abs().max()))
        same += int((logits.argmax(-1) == others.argmax(-1)).sum())
    return largest, same / length, scale
