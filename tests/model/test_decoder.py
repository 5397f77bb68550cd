"""Decoding = the forward pass: logits and states, from any place, over chunk borders, for rows at different places."""

import copy

import pytest
import torch
from factories import random_tokens, tiny_model
from tolerances import LOGITS, OP, assert_close, assert_near
from torch import Tensor

from megalodon.model.decoder import Decoder
from megalodon.model.megalodon import Megalodon
from megalodon.model.row_product import RowProduct, row_product
from megalodon.model.state import State
from megalodon_kernels import KernelError, dispatch
from megalodon_kernels import decode as decode_ops

DTYPES = [torch.float64, torch.float32]
OPTIONS = [
    {},
    {"swiglu": True, "rescale_nffn": True, "scale_emb": True, "share_emb": True},
    {"norm_affine": False, "num_heads": 1, "output_size": 31},
]
STEPS = 33
"""Over three borders of chunks of 10."""


@pytest.fixture(params=[1, 2], ids=["one-thread", "two-threads"])
def threads(request):
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(1)


def decode(decoder: Decoder, tokens: Tensor) -> Tensor:
    """(B, L) ids, one step each -> (B, L, outputs)."""
    return torch.stack([decoder.step(column) for column in tokens.unbind(1)], dim=1)


def assert_same_state(actual: State, expected: State, relative: float) -> None:
    assert torch.equal(actual.position, expected.position)
    pairs = [(actual.norm, expected.norm)]
    for a, e in zip(actual.layers, expected.layers, strict=True):
        pairs.append((a.norm, e.norm))
        for name in ("k", "v", "cema"):
            assert getattr(a, name).dtype == getattr(e, name).dtype
            assert_close(getattr(a, name), getattr(e, name), relative, name)
    for mine, other in pairs:
        assert torch.equal(mine.count, other.count)
        assert_close(mine.mean, other.mean, relative)
        assert_close(mine.var, other.var, relative)


@pytest.mark.parametrize("read", [0, 1, 9, 10, 17])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all-options", "bare"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_one_forward_pass(dtype, options, read, threads) -> None:
    """From an empty state and after a prompt that ends anywhere in a chunk; then the state, too."""
    model = tiny_model(dtype, **options).eval()
    tokens = random_tokens(1, read + STEPS)
    with torch.no_grad():
        expected, expected_state = model(tokens)
        state = model(tokens[:, :read])[1]
    decoder = Decoder(model, state)
    logits = decode(decoder, tokens[:, read:])
    assert logits.dtype == expected.dtype
    assert_near(logits, expected[:, read:], LOGITS[dtype])
    # A state is a sum of at most 50 terms that are each off by what the op is.
    assert_same_state(decoder.state(), expected_state, 10 * OP[dtype])


def ragged_state(model: Megalodon, lengths: list[int], tokens: Tensor) -> State:
    """Rows that have read different numbers of tokens, from one call with a document start in each row."""
    longest = max(lengths)
    padded = torch.zeros(len(lengths), longest, dtype=torch.int64)
    starts = torch.zeros(padded.shape, dtype=torch.bool)
    for row, length in enumerate(lengths):
        padded[row, longest - length :] = tokens[row, :length]
        starts[row, longest - length] = True
    with torch.no_grad():
        return model(padded, None, starts)[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_different_places(dtype, threads) -> None:
    model = tiny_model(dtype).eval()
    lengths = [13, 4, 20]
    tokens = random_tokens(3, 20 + STEPS)
    decoder = Decoder(model, ragged_state(model, lengths, tokens))
    following = torch.stack([tokens[row, n : n + STEPS] for row, n in enumerate(lengths)])
    logits, states = decode(decoder, following), decoder.state()
    for row, length in enumerate(lengths):
        with torch.no_grad():
            expected, alone = model(tokens[row : row + 1, : length + STEPS])
        assert_near(logits[row], expected[0, length:], LOGITS[dtype])
        own = alone.layers[0].k.shape[1]
        assert_close(states.layers[1].k[row, :own], alone.layers[1].k[0], 10 * OP[dtype])
        assert not states.layers[1].k[row, own:].any() and not states.layers[1].v[row, own:].any()


@pytest.mark.parametrize("read", [0, 10, 13])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_a_state_comes_back_as_it_went_in(dtype, read) -> None:
    model = tiny_model(dtype).eval()
    with torch.no_grad():
        state = model(random_tokens(2, read))[1]
    assert_same_state(Decoder(model, state).state(), state, 0)


def test_states_are_values() -> None:
    """Neither the state that came nor one that was given back moves with the decoder; two decoders are independent."""
    model = tiny_model(torch.float32).eval()
    tokens = random_tokens(1, 40)
    with torch.no_grad():
        state = model(tokens[:, :7])[1]
    kept = copy.deepcopy(state)
    decoder = Decoder(model, state)
    decode(decoder, tokens[:, 7:9])
    given = decoder.state()
    held = copy.deepcopy(given)
    twin = decoder.at(given)
    logits = decode(decoder, tokens[:, 9:])
    assert_same_state(state, kept, 0)
    assert_same_state(given, held, 0)
    assert torch.equal(decode(twin, tokens[:, 9:]), logits)
    # What came back goes on in the model as well, with gradients.
    model(tokens[:, 9:], given)[0].sum().backward()


def test_logits_are_not_overwritten() -> None:
    decoder = Decoder(tiny_model(torch.float32).eval())
    first = decoder.step(torch.tensor([3]))
    kept = first.clone()
    decoder.step(torch.tensor([4]))
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.layers[0].mega.cema.alpha.add_(0.5),
        lambda model: model.layers[1].nffn.fc2.weight.mul_(2),
        lambda model: setattr(model.layers[0].mega.wv, "bias", torch.nn.Parameter(torch.ones(34))),
        lambda model: setattr(model.output.final_norm.weight, "data", torch.ones(24)),
        lambda model: model.load_state_dict(tiny_model(torch.float32, seed=5).state_dict()),
    ],
    ids=["coefficient", "matrix", "replaced", "data", "loaded"],
)
@torch.no_grad()
def test_changed_parameters_are_used(change) -> None:
    model = tiny_model(torch.float32).eval()
    tokens = random_tokens(1, 5)
    decoder = Decoder(model)
    decode(decoder, tokens)
    state = decoder.state()
    change(model)
    expected = model(tokens[:, :1], state)[0][0]
    assert_near(decoder.step(tokens[:, 0]), expected, LOGITS[torch.float32])


def test_bfloat16(threads) -> None:
    """Roundings of 2⁻⁹ in other places than the forward pass has them: no farther apart than both from float32."""
    wide = tiny_model(torch.float32).eval()
    model = copy.deepcopy(wide).bfloat16()
    tokens = random_tokens(1, STEPS)
    with torch.no_grad():
        exact, rounded = wide(tokens)[0], model(tokens)[0]
    logits = decode(Decoder(model), tokens)
    assert logits.dtype == torch.float32
    spread = (rounded - exact).abs().max().item()
    assert_near(logits, exact, 1.5 * spread)


def test_dropout_is_off() -> None:
    model = tiny_model(torch.float32, dropout=0.5, hidden_dropout=0.5, attention_dropout=0.5).train()
    tokens = random_tokens(1, 12)
    logits = decode(Decoder(model), tokens)
    with torch.no_grad():
        assert_near(logits, model.eval()(tokens)[0], LOGITS[torch.float32])
    assert torch.equal(logits, decode(Decoder(model), tokens))


@pytest.mark.parametrize("backend", ["reference", "portable", "triton"])
def test_a_named_backend_is_the_one_that_steps(backend, monkeypatch) -> None:
    """Every op of a step, and no other implementation of any; the same logits."""
    ran = set()
    for op in ("NORM", "NORM_CEMA", "ATTENTION"):
        for name, prepare in getattr(decode_ops, op).items():

            def watched(*args, op=op, name=name, prepare=prepare):
                ran.add((op, name))
                return prepare(*args)

            monkeypatch.setitem(getattr(decode_ops, op), name, watched)
    tokens = random_tokens(1, 12)
    logits = decode(Decoder(tiny_model(torch.float32, backend=backend)), tokens)
    assert ran == {(op, backend) for op in ("NORM", "NORM_CEMA", "ATTENTION")}
    with torch.no_grad():
        assert_near(logits, tiny_model(torch.float32)(tokens)[0], LOGITS[torch.float32])


def test_a_backend_that_cannot_step_here_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    with pytest.raises(KernelError, match="norm_cema_step: backend triton cannot run: the device is cpu"):
        Decoder(tiny_model(torch.float32, backend="triton"))


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("bias", [(False,), (True,), (True, False)])
@pytest.mark.parametrize("outputs", [[6], [64], [5, 17], [900, 40]])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
def test_a_row_product_is_the_linear_maps_side_by_side(dtype, outputs, bias, batch, pack, threads) -> None:
    """`bias` in turn for the maps; 940 outputs take several blocks; a float32 input is rounded to the maps' dtype."""

    def linear(width: int, bias: bool) -> torch.nn.Linear:
        return torch.nn.Linear(8, width, bias=bias, dtype=dtype).requires_grad_(False)

    maps = [linear(width, bias[i % len(bias)]) for i, width in enumerate(outputs)]
    x = torch.randn(batch, 8, dtype=torch.promote_types(dtype, torch.float32))
    product = row_product(*maps, pack=pack)
    expected = torch.cat([linear(x.to(dtype)) for linear in maps], dim=-1)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]
    assert_close(product.prepare(batch, {})(x), expected, tolerance)
    assert (type(product) is RowProduct) is not pack
