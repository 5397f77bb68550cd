"""Laws of the model: whole = split = streamed, packed = separate, causal, rows independent. All at odd sizes."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from factories import random_starts, random_tokens, tiny_config, tiny_model
from tolerances import BF16_LOGITS, GRADIENTS, LOGITS, assert_close, assert_near
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalodon.model.loss import cross_entropy
from megalodon.model.megalodon import Megalodon
from megalodon.model.state import State

DTYPES = [torch.float64, torch.float32]
C = tiny_config().chunk_size
SPLITS = {
    "inside a chunk": (3, 4),
    "to the border": (3, C - 3, 2 * C, 5),
    "across borders": (C + 1, 2 * C, 7, C),
    "nothing in between": (0, 13, 0, 11, 0),
    "token by token": (1,) * 27,
    "long after one": (1, 3 * C + 2),
}


def stream(
    model: Megalodon, tokens: Tensor, split: Sequence[int], starts: Tensor | None = None
) -> tuple[Tensor, State]:
    state, pieces = None, []
    bounds = starts.split(list(split), dim=1) if starts is not None else [None] * len(split)
    for piece, piece_starts in zip(tokens.split(list(split), dim=1), bounds, strict=True):
        logits, state = model(piece, state, piece_starts)
        pieces.append(logits)
    assert state is not None
    return torch.cat(pieces, dim=1), state


def assert_same_state(actual: State, expected: State, dtype: torch.dtype) -> None:
    assert torch.equal(actual.position, expected.position)
    pairs = [(actual.norm, expected.norm)]
    for a, e in zip(actual.layers, expected.layers, strict=True):
        pairs.append((a.norm, e.norm))
        for name in ("k", "v", "cema"):
            assert_close(getattr(a, name), getattr(e, name), GRADIENTS[dtype], name)
    for a_norm, e_norm in pairs:
        assert torch.equal(a_norm.count, e_norm.count)
        assert_close(a_norm.mean, e_norm.mean, GRADIENTS[dtype], "mean")
        assert_close(a_norm.var, e_norm.var, GRADIENTS[dtype], "var")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_any_split_is_the_whole(split: tuple[int, ...], dtype: torch.dtype) -> None:
    model, tokens = tiny_model(dtype), random_tokens(3, sum(split))
    whole, expected = model(tokens)
    pieces, actual = stream(model, tokens, split)
    assert_near(pieces, whole, LOGITS[dtype])
    assert_same_state(actual, expected, dtype)


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS.keys())
def test_any_split_has_the_gradients_of_the_whole(split: tuple[int, ...]) -> None:
    model, tokens = tiny_model(), random_tokens(2, sum(split))
    weights = torch.randn(2, sum(split), model.config.num_outputs, dtype=torch.float64)
    results = []
    for logits in (model(tokens)[0], stream(model, tokens, split)[0]):
        model.zero_grad()
        (logits * weights).sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in results[0].items():
        assert_close(results[1][name], expected, GRADIENTS[torch.float64], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_is_separate(dtype: torch.dtype) -> None:
    """Outputs, loss and every gradient of documents packed in one row = those of each document alone."""
    model, length = tiny_model(dtype), 67
    tokens, starts = random_tokens(3, length), random_starts(3, length)
    targets = random_tokens(3, length, seed=7)
    hidden, state = model.hidden(tokens, None, starts)
    total, _ = cross_entropy(hidden, model.output_weight, targets)
    total.backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(tokens, None, starts)[0]
    for row in range(3):
        bounds = [*starts[row].nonzero().flatten().tolist(), length]
        for begin, end in pairwise(bounds):
            alone, last = model.hidden(tokens[row : row + 1, begin:end])
            assert_near(model(tokens[row : row + 1, begin:end])[0][0], logits[row, begin:end], LOGITS[dtype])
            cross_entropy(alone, model.output_weight, targets[row : row + 1, begin:end])[0].backward()
        assert int(state.position[row]) == int(last.position)
        assert_close(state.layers[1].cema[row], last.layers[1].cema[0], GRADIENTS[dtype])
        open_keys = last.layers[1].k.shape[1]
        assert_close(state.layers[1].k[row, :open_keys], last.layers[1].k[0], GRADIENTS[dtype])
    for name, p in model.named_parameters():
        assert_close(packed[name], p.grad, GRADIENTS[dtype], name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_and_split_is_the_whole(dtype: torch.dtype) -> None:
    """Rows that stand at different places in their chunks continue together."""
    model, split = tiny_model(dtype), (5, 1, 1, 19, 23, 0, 4)
    tokens, starts = random_tokens(3, sum(split)), random_starts(3, sum(split))
    whole, expected = model(tokens, None, starts)
    pieces, actual = stream(model, tokens, split, starts)
    assert_near(pieces, whole, LOGITS[dtype])
    assert_same_state(actual, expected, dtype)


def test_a_start_on_the_first_token_discards_the_state() -> None:
    model, tokens = tiny_model(), random_tokens(2, 17)
    _, state = model(random_tokens(2, 26, seed=3))
    starts = torch.zeros(2, 17, dtype=torch.bool)
    starts[1, 0] = True
    logits, _ = model(tokens, state, starts)
    assert_near(logits[1], model(tokens)[0][1], LOGITS[torch.float64])
    assert_near(logits[0], model(tokens, state)[0][0], LOGITS[torch.float64])


def test_other_documents_do_not_change_a_single_bit() -> None:
    model, length = tiny_model(torch.float32), 67
    tokens, starts = random_tokens(1, length), torch.zeros(1, length, dtype=torch.bool)
    starts[0, [0, 21, 40]] = True
    changed = tokens.clone()
    changed[0, 21:40] = (changed[0, 21:40] + 1) % model.config.vocab_size
    before, after = model(tokens, None, starts)[0], model(changed, None, starts)[0]
    assert torch.equal(before[0, :21], after[0, :21])
    assert torch.equal(before[0, 40:], after[0, 40:])
    assert not torch.equal(before[0, 21:40], after[0, 21:40])


@pytest.mark.parametrize("place", [1, C - 1, C, 2 * C + 3, 30])
def test_causal(place: int) -> None:
    model, tokens = tiny_model(torch.float32), random_tokens(2, 31)
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % model.config.vocab_size
    before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])


def test_the_past_reaches_across_chunks() -> None:
    """Through CEMA and the statistics, though attention ends at the border."""
    model, tokens = tiny_model(torch.float64), random_tokens(1, 3 * C)
    changed = tokens.clone()
    changed[0, 0] = (changed[0, 0] + 1) % model.config.vocab_size
    assert (model(tokens)[0][0, 2 * C :] - model(changed)[0][0, 2 * C :]).abs().max() > 1e-6


def test_rows_are_independent() -> None:
    model, tokens = tiny_model(torch.float32), random_tokens(3, 29)
    together = model(tokens)[0]
    changed = tokens.clone()
    changed[1] = random_tokens(1, 29, seed=9)
    assert torch.equal(model(changed)[0][[0, 2]], together[[0, 2]])
    for row in range(3):
        assert_near(model(tokens[row : row + 1])[0][0], together[row], LOGITS[torch.float32])


def test_a_state_can_be_branched() -> None:
    """Nothing in a state is modified by using it."""
    model, tokens = tiny_model(), random_tokens(2, 13)
    _, state = model(tokens)
    copy = state.map(Tensor.clone)
    first = model(random_tokens(2, 9, seed=1), state)[0]
    model(random_tokens(2, 25, seed=2), state)
    assert torch.equal(model(random_tokens(2, 9, seed=1), state)[0], first)
    kept: list[Tensor] = []
    copy.map(lambda x: kept.append(x) or x)
    state.map(lambda x: x if torch.equal(x, kept.pop(0)) else pytest.fail("the state changed"))


def test_size_of_the_state_does_not_depend_on_what_was_read() -> None:
    model = tiny_model(torch.float32)
    states = [model(random_tokens(2, chunks * C + rest))[1] for chunks in (1, 2, 7, 31) for rest in (0, 3)]
    assert {state.num_bytes() for state in states[::2]} == {model.empty_state(2).num_bytes()}
    # What is alive is the storage, which a view could keep larger than it looks.
    for state in states:
        storages: list[int] = []
        state.map(lambda x, storages=storages: storages.append(x.untyped_storage().nbytes()) or x)
        assert sum(storages) <= state.num_bytes()


def test_no_tokens() -> None:
    model = tiny_model()
    nothing = torch.zeros(2, 0, dtype=torch.int64)
    logits, state = model(nothing)
    assert logits.shape == (2, 0, model.config.num_outputs)
    tokens = random_tokens(2, 14)
    assert_near(model(tokens, state)[0], model(tokens)[0], LOGITS[torch.float64])
    assert model(nothing, state)[1] is state


class NoReads(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: a number, or a shape, that depends on values.

    `Tensor.cpu` is let through: Triton's interpreter reads its arguments by it.
    """

    READS = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "repeat_interleave.Tensor")

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("tolist reads a tensor"))
        return super().__enter__()

    def __exit__(self, *error):
        self._patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        assert not any(read in name for read in self.READS), name
        if name.startswith("aten.index."):
            assert not any(x is not None and x.dtype == torch.bool for x in args[1]), "an index by a mask"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("with_starts", [False, True])
def test_no_layer_waits_for_the_device(with_state: bool, with_starts: bool) -> None:
    """On the kernels, forward and backward; what depends on values is asked once a call, before the first layer."""
    options = {"norm_num_groups": 3, "num_layers": 1}
    model = tiny_model(torch.float32, backend="triton", **options)
    with torch.no_grad():  # or the backward pass would go on into this other model
        state = tiny_model(torch.float32, **options)(random_tokens(2, 6))[1] if with_state else None
    ones = torch.ones(2)
    reads = (
        lambda: bool(ones[0]),
        lambda: ones[ones > 0],
        lambda: ones.repeat_interleave(ones.long()),
        lambda: len(ones.tolist()),
    )
    for read in reads:
        with pytest.raises((AssertionError, pytest.fail.Exception)), NoReads():
            read()
    block = model.layers[0]

    def forward(*args):
        with NoReads():
            return type(block).forward(block, *args)

    block.forward = forward
    hidden, after = model.hidden(random_tokens(2, 13), state, random_starts(2, 13) if with_starts else None)
    assert after.layers[0].k.shape[1] > 0
    with NoReads():
        hidden.sum().backward()


def test_gradients_flow_through_a_state_unless_detached() -> None:
    model = tiny_model()
    _, state = model(random_tokens(1, 14))
    logits, _ = model(random_tokens(1, 5, seed=1), state)
    (through,) = torch.autograd.grad(logits.sum(), model.embed.weight)
    logits, _ = model(random_tokens(1, 5, seed=1), state.detach())
    (cut,) = torch.autograd.grad(logits.sum(), model.embed.weight)
    assert (through - cut).abs().max() > 1e-9


def test_one_token_has_no_gradient_where_there_is_nothing_to_choose() -> None:
    model = tiny_model()
    model(random_tokens(1, 1))[0].square().sum().backward()
    zero = ("wz.weight", "wz.bias", "mega.gamma", "mega.beta", "cema.delta", "cema.theta")
    for name, p in model.named_parameters():
        if name.endswith(zero):
            assert p.grad.abs().max() <= 1e-12, name


def test_bf16_stays_near_float32() -> None:
    model, tokens = tiny_model(torch.float32), random_tokens(2, 43)
    expected = model(tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        mixed, state = model(tokens)
    assert mixed.dtype == torch.float32
    assert state.layers[0].cema.dtype == state.norm.mean.dtype == torch.float64
    assert_near(mixed, expected, BF16_LOGITS)
    half = model.bfloat16()(tokens)[0]
    assert half.dtype == torch.float32
    assert_near(half, expected, BF16_LOGITS)


def test_bf16_gradients_stay_near_float32() -> None:
    """Autocast and a bf16 model: the direction of every large gradient, to the 8 bits of its products."""
    tokens, results = random_tokens(2, 43), []
    for kind in ("plain", "autocast", "half"):
        model = tiny_model(torch.bfloat16 if kind == "half" else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
            total, _ = cross_entropy(model.hidden(tokens)[0], model.output_weight, tokens)
        total.backward()
        results.append(torch.cat([p.grad.flatten().float() for p in model.parameters()]))
    for narrow in results[1:]:
        assert torch.nn.functional.cosine_similarity(results[0], narrow, dim=0) > 0.999


def test_a_state_continues_in_another_precision() -> None:
    wide, tokens = tiny_model(torch.float32), random_tokens(2, 14)
    _, state = wide(tokens)
    expected, _ = wide(random_tokens(2, 5, seed=1), state)
    half = tiny_model(torch.float32).bfloat16()
    actual, after = half(random_tokens(2, 5, seed=1), state)
    assert_near(actual, expected, BF16_LOGITS)
    assert after.layers[0].k.dtype == torch.bfloat16


def test_half_precision_leaves_norms_cema_and_rotations_alone() -> None:
    model = tiny_model(torch.float32).bfloat16()
    narrow = {name for name, t in model.state_dict().items() if t.dtype == torch.bfloat16}
    matrices = ("embed", "wv", "wz", "wr", "wh1", "wh2", "fc1", "fc2", "fc3", "output.output")
    assert narrow == {n for n in model.state_dict() if any(f"{m}." in n for m in matrices)}
