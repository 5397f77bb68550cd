"""Decoding: tokens a second after a context of growing depth, ours against Llama, greedy, one sequence, float32.

Ours reads a token by `Session.step`; Llama by its forward pass with a DynamicCache of random keys and values. A state
of great depth is a real one whose position and counts are moved on: its size does not depend on depth. Not here:
reading the context.
"""

from collections.abc import Callable
from typing import Any

import torch

import hugging_face
from megalodon.inference.session import Session
from megalodon.model.megalodon import Megalodon
from megalodon.model.state import State
from sizes import SIZES, Size
from timing import Contest, Ratio, Side

DEPTHS = (0, 1024, 4096, 16_384, 32_768)
TARGETS = {0: 3.0, 32_768: 80.0}
DEEP = 1_000_000
NEAR, FEW = 8192, 8
"""Llama copies its cache for every token: from the first depth on a turn of it writes so few tokens."""


def entries(smoke: bool) -> dict[str, Callable[[], Contest]]:
    """Key -> what builds its contest."""
    small, large = (SIZES["tiny"],) * 2 if smoke else (SIZES["8M"], SIZES["50M"])
    scale = 32 if smoke else 1
    found: dict[str, Callable[[], Contest]] = {
        f"decode/8M/{depth}": lambda depth=depth: _against_llama(small, depth // scale, TARGETS.get(depth))
        for depth in DEPTHS
    }
    found["decode/8M/flat"] = lambda: _flat(small)
    found["decode/50M/floor"] = lambda: _over_floor(large)
    return found


def session_at(model: Megalodon, depth: int) -> Session:
    """A session that stands at `depth`; at most two chunks of it were read, the counts are set."""
    chunk = model.config.chunk_size
    session = Session(model)
    read = depth if depth <= 2 * chunk else chunk + depth % chunk
    if read:
        session.feed([token % model.config.vocab_size for token in range(read)])
    return Session(model, moved(session.state, depth - read))


def moved(state: State, tokens: int) -> State:
    """The state as if `tokens` more had been read before it, with the same averages, norms and open chunk."""

    def later(statistics: Any) -> Any:
        return statistics._replace(count=statistics.count + tokens)

    layers = tuple(layer._replace(norm=later(layer.norm)) for layer in state.layers)
    return State(state.position + tokens, layers, later(state.norm))


def our_decoding(model: Megalodon, depth: int, num_tokens: int) -> Callable[[], None]:
    """Write tokens greedily from `depth`; every turn begins there again.

    One token is read before: what a session forms at its first step and its branches share is no cost of a token.
    """
    start = session_at(model, depth)
    start.step(0)

    def run() -> None:
        session, token = start.branch(), 0
        for _ in range(num_tokens):
            token = int(session.step(token).argmax())

    return run


def llama_decoding(model: Any, depth: int, num_tokens: int) -> Callable[[], None]:
    """The same of Llama."""
    cache = hugging_face.filled_cache(model, depth)

    def run() -> None:
        hugging_face.decode(model, cache, num_tokens)
        cache.crop(-num_tokens)

    return run


def _against_llama(size: Size, depth: int, least: float | None) -> Contest:
    ours = Megalodon(size.ours).eval()
    llama = hugging_face.build(size.llama, size.ours.num_parameters()).eval()
    # a whole chunk: a token costs more at its end than at its beginning
    num = size.ours.chunk_size
    few = num if depth < NEAR else FEW
    sides = {
        "ours": Side(our_decoding(ours, depth, num), num),
        "Llama": Side(llama_decoding(llama, depth, few), few),
    }
    return Contest(sides, [Ratio("speed over Llama", "ours", "Llama", at_least=least)])


def _flat(size: Size) -> Contest:
    """Ours at a depth of a million against the same place of the first chunk; and what a place in the chunk costs."""
    model = Megalodon(size.ours).eval()
    chunk = size.ours.chunk_size
    place = DEEP % chunk
    far = chunk - 64 if chunk > 64 else chunk // 2
    names = (f"depth {place:,}", f"depth {DEEP:,}", "beginning of a chunk", "end of a chunk")
    depths = (place, DEEP, 4 * chunk, 4 * chunk + far)
    num = min(64, chunk // 2)
    sides = {name: Side(our_decoding(model, depth, num), num) for name, depth in zip(names, depths, strict=True)}
    figures = [
        Ratio(f"cost of a token at {names[1]} over {names[0]}", names[0], names[1], at_most=1.05),
        Ratio("cost of a token at the end of a chunk over its beginning", names[2], names[3]),
    ]
    return Contest(sides, figures)


def _over_floor(size: Size) -> Contest:
    """A step against reading every weight it needs once: all but the embedding, of which it takes one row.

    They are read by a product of a matrix and a vector, which is what a step has to do with them; `amax` reads half as
    fast (16 against 35 GB/s on two AVX-512 cores).
    """
    model = Megalodon(size.ours).eval()
    weights = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n != "embed.weight"])
    num, passes, width = 32, 8, 4096
    matrix, vector = weights[: len(weights) // width * width].view(-1, width), torch.randn(width)
    sides = {
        "steps": Side(our_decoding(model, 0, num), num),
        "weights read": Side(lambda: [matrix.mv(vector) for _ in range(passes)], passes),
    }
    figures = [Ratio("time of a step over that of reading the weights once", "weights read", "steps", at_most=1.5)]
    return Contest(sides, figures, units={"weights read": "times/s"})
