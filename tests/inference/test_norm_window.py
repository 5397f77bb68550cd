"""The norm policy `window`: the first 8 chunks as ever, then statistics of 6 to 8 chunks, however the text comes."""

import pytest
import torch
from factories import random_tokens, tiny_model
from tolerances import LOGITS, assert_near
from torch import Tensor

from megalodon.errors import InputError
from megalodon.inference.norm_window import is_due
from megalodon.inference.session import Session
from megalodon.model.megalodon import Megalodon
from megalodon.model.state import State

C, CHUNKS = 10, 15


@pytest.fixture(scope="module")
def model() -> Megalodon:
    return tiny_model().eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return random_tokens(1, CHUNKS * C + 4)


@pytest.fixture(scope="module")
def expected(model, tokens) -> Tensor:
    """The released procedure, written out: two chunks a call, then the last six once more for their statistics."""
    logits, state = [], None
    with torch.no_grad():
        for start in range(0, tokens.shape[1], 2 * C):
            if start >= 8 * C:
                _, fresh = model(tokens[:, start - 6 * C : start])
                layers = zip(state.layers, fresh.layers, strict=True)
                state = State(state.position, tuple(x._replace(norm=y.norm) for x, y in layers), fresh.norm)
            piece, state = model(tokens[:, start : start + 2 * C], state)
            logits.append(piece)
    return torch.cat(logits, dim=1)[0]


@pytest.mark.parametrize("piece", [3, 10, 27, 1024])
@pytest.mark.parametrize("cuts", [(), (100,), (7, 80, 81, 99), (79, 119, 120), (85, 86, 87)])
def test_the_logits_are_those_of_the_released_procedure(model, tokens, expected, piece, cuts):
    session = Session(model, piece=piece, norm_stats="window")
    ids = tokens[0].tolist()
    for start, end in zip((0, *cuts), (*cuts, len(ids)), strict=True):
        assert_near(session.feed(ids[start:end]), expected[end - 1], LOGITS[torch.float64])


def test_steps_are_as_feeding(model, tokens, expected):
    session = Session(model, norm_stats="window")
    ids = tokens[0].tolist()
    session.feed(ids[:75])
    for place in range(75, 125):
        assert_near(session.step(ids[place]), expected[place], LOGITS[torch.float64], str(place))
    assert_near(session.feed(ids[125:]), expected[-1], LOGITS[torch.float64])


def test_eight_chunks_are_as_ever_and_then_not(model, tokens):
    ids = tokens[0].tolist()
    window, ever = Session(model, norm_stats="window"), Session(model)
    for start in range(0, 8 * C, C):
        assert torch.equal(window.feed(ids[start : start + C]), ever.feed(ids[start : start + C]))
    assert window.state.norm.count.item() == 8 * C
    assert (window.feed(ids[80:81]) - ever.feed(ids[80:81])).abs().max() > 1e-3
    assert window.state.norm.count.item() == 6 * C + 1
    assert window.state.position.item() == 8 * C + 1


def test_it_goes_back_and_branches(model, tokens, expected):
    ids = tokens[0].tolist()
    session = Session(model, norm_stats="window")
    places = {}
    for place in (76, 80, 83, 100, 109, 131):
        session.feed(ids[session.position : place])
        places[place] = session.snapshot()
    for place in (131, 80, 100, 83, 109, 76):
        session.rewind(places[place])
        twin = session.branch()
        for its in (session, twin):
            assert_near(its.feed(ids[place : place + 5]), expected[place + 4], LOGITS[torch.float64])
            assert_near(its.step(ids[place + 5]), expected[place + 5], LOGITS[torch.float64])


def test_it_remembers_eight_chunks_and_no_more(model):
    session = Session(model, norm_stats="window")
    for _ in range(30):
        session.feed(range(2 * C))
    assert [len(chunk) for chunk in session.snapshot().past.recent] == [C] * 8
    assert Session(model).snapshot().past.recent == ()


def test_when_it_is_due():
    assert [n for n in range(0, 130) if is_due(n, C)] == [80, 100, 120]


def test_what_it_cannot_do(model):
    with pytest.raises(InputError, match="norm_stats is 'last'; expected cumulative or window"):
        Session(model, norm_stats="last")  # type: ignore[arg-type]
    state = Session(model)
    state.feed([1, 2])
    with pytest.raises(InputError, match="under norm_stats window a state needs the ids before it"):
        Session(model, state.state, norm_stats="window")
