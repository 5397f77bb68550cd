"""Several ranks that read one text are as one that reads it: logits, states, sessions, scores."""

import pytest
import torch
import torch.distributed as dist
from factories import random_starts, random_tokens, tiny_model
from ranks import on_ranks
from tolerances import assert_close

from megalodon.inference.session import Session
from megalodon.parallel import spread
from megalodon.parallel.collectives import counted
from megalodon.parallel.spread import follow, leading


def led(work, *arguments):
    """Do it on rank 0 with the others' help; there, what it returned and how many gathers it took."""
    model = tiny_model()
    if dist.get_rank():
        follow([model], dist.group.WORLD)
        return None
    with leading([model], dist.group.WORLD), counted() as sent:
        found = work(model, *arguments)
    return found, sent["all_gather"][0]


def read(model, begin, isolated):
    """Two long passes and a short one, from a state that is empty or in the middle of a chunk."""
    tokens = random_tokens(2, 7 + 40 + 48 + 3)
    starts = random_starts(2, tokens.shape[1]) if isolated else None
    state, hidden, at = None, [], 0
    with torch.inference_mode():
        for length in (begin, 40, 48, 3):
            if length:
                flags = None if starts is None else starts[:, at : at + length]
                found, state = model.hidden(tokens[:, at : at + length], state, flags)
                hidden.append(found)
                at += length
    return torch.cat(hidden, 1), state


def as_rank(begin, isolated):
    return led(read, begin, isolated)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("begin", [0, 7])
@pytest.mark.parametrize("isolated", [False, True])
def test_passes_are_those_of_one(ranks, begin, isolated):
    (hidden, state), gathers = on_ranks(ranks, as_rank, begin, isolated)[0]
    one, after = read(tiny_model(), begin, isolated)
    assert gathers == 2 * (2 * 2 + 1 + 1)  # two passes: of 2 layers, the last norm, hidden values
    assert_close(hidden, one, 1e-12)
    assert torch.equal(state.position, after.position)
    for ours, theirs in zip(state.layers, after.layers, strict=True):
        assert_close(ours.cema, theirs.cema, 1e-12)
        assert_close(ours.k, theirs.k, 1e-12)
        assert_close(ours.norm.var, theirs.norm.var, 1e-12)


def written(model):
    session = Session(model, piece=40)
    logits = session.feed(random_tokens(1, 133)[0].tolist())
    ids = []
    for _ in range(15):
        ids.append(int(logits.argmax()))
        logits = session.step(ids[-1])
    return ids, logits


def session_as_rank():
    return led(written)


def test_an_error_in_a_pass_leaves_at_once(monkeypatch):
    """The others wait for the rest of the pass; rank 0 would wait for ever for them to hear that it leaves."""
    told = []
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "broadcast_object_list", lambda words, src, group: told.append(words[0]))
    monkeypatch.setattr(spread, "_piece", lambda *arguments: 1 / 0)
    model = tiny_model()
    with pytest.raises(ZeroDivisionError), leading([model], None):
        model.hidden(random_tokens(1, 40))
    assert len(told) == 1 and told[0] is not None
    with leading([model], None):
        pass
    assert told[1:] == [None]


def test_a_session_reads_a_long_prompt_together_and_writes_alone():
    (ids, logits), gathers = on_ranks(2, session_as_rank)[0]
    expected, last = written(tiny_model())
    assert ids == expected
    assert gathers == 3 * (2 * 2 + 1 + 1)
    assert_close(logits, last, 1e-11)
