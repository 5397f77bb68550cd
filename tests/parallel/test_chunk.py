"""Chunk parallelism: ranks that read pieces of a sequence compute what one rank computes of the whole."""

import pytest
import torch
import torch.distributed as dist
from factories import random_starts, random_tokens, tiny_model
from ranks import on_ranks
from tolerances import assert_close

from megalodon.model.loss import cross_entropy
from megalodon.parallel.chunk import ChunkPrefix
from megalodon.parallel.collectives import counted

B, L, C = 3, 20, 10


def piece_of_a_pass(form, isolated, dtype):
    """Hidden states of this rank's piece, its loss, gradients of all parameters summed over ranks, what was sent."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    model = tiny_model(dtype, share_emb=False)
    tokens, targets = random_tokens(B, ranks * L), random_tokens(B, ranks * L, seed=1)
    starts = random_starts(B, ranks * L) if isolated else None
    prefix = ChunkPrefix(dist.group.WORLD, starts, B, L, C, form=form)
    mine = slice(rank * L, (rank + 1) * L)
    with counted() as forward:
        hidden, state = model.hidden(tokens[:, mine], starts=prefix.starts, prefix=prefix)
    loss, _ = cross_entropy(hidden, model.output_weight, targets[:, mine])
    with counted() as backward:
        loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        dist.all_reduce(parameter.grad)
        gradients[name] = parameter.grad
    dist.all_reduce(loss.detach())
    return hidden.detach(), loss.detach(), gradients, state.detach(), forward, backward


@pytest.mark.parametrize("isolated", [False, True])
@pytest.mark.parametrize(("ranks", "form"), [(2, "gather"), (4, "gather"), (4, "doubling")])
def test_pieces_make_a_whole(ranks, form, isolated):
    found = on_ranks(ranks, piece_of_a_pass, form, isolated, torch.float64)
    model = tiny_model()
    starts = random_starts(B, ranks * L) if isolated else None
    hidden, state = model.hidden(random_tokens(B, ranks * L), starts=starts)
    loss, _ = cross_entropy(hidden, model.output_weight, random_tokens(B, ranks * L, seed=1))
    loss.backward()
    assert_close(torch.cat([piece for piece, *_ in found], dim=1), hidden.detach(), 1e-12)
    for _, total, gradients, *_ in found:
        assert_close(total, loss.detach(), 1e-12)
        for name, parameter in model.named_parameters():
            assert_close(gradients[name], parameter.grad, 1e-10)
    last = found[-1][3]
    for ours, whole in zip(last.layers, state.layers, strict=True):
        assert_close(ours.cema, whole.cema.detach(), 1e-12)
        assert_close(ours.norm.var, whole.norm.var.detach(), 1e-12)
        assert torch.equal(ours.norm.count, whole.norm.count)
        assert_close(ours.k, whole.k.detach(), 1e-12)
    assert torch.equal(last.position, state.position)


@pytest.mark.parametrize("form", ["gather", "doubling"])
def test_what_is_sent_is_small_and_known(form):
    """A layer: a gather of statistics, one of averages or log₂ rounds of them; backward as much, whatever L is."""
    D, N, G, layers, ranks = 24, 3, 4, 2, 4
    for isolated in (False, True):
        for *_, forward, backward in on_ranks(ranks, piece_of_a_pass, form, isolated, torch.float32):
            averages, statistics = B * D * N * 2 * 4, B * G * 2 * 8  # float32, float64
            norms = (layers + 1) * statistics
            if form == "gather":
                expected = {"all_gather": (2 * layers + 1, layers * averages + norms)}
                back = {"reduce_scatter": expected["all_gather"]}
            else:
                expected = {"all_gather": (layers + 1, norms), "exchange": (2 * layers, 2 * layers * averages)}
                back = {"reduce_scatter": (layers + 1, norms), "exchange": (2 * layers, 2 * layers * averages)}
            if isolated:  # and open chunks, of those ranks that have one behind their piece
                forward, backward = ({k: v for k, v in x.items() if k != "exchange"} for x in (forward, backward))
                expected, back = ({k: v for k, v in x.items() if k != "exchange"} for x in (expected, back))
            assert forward == expected
            assert backward == back


def refused(length, chunk_size):
    with pytest.raises(ValueError) as fault:
        ChunkPrefix(dist.group.WORLD, None, B, length, chunk_size)
    return str(fault.value)


def test_pieces_shorter_than_a_chunk_are_refused():
    (said, _) = on_ranks(2, refused, 9, 10)
    assert said == "a piece has 9 tokens; expected at least chunk_size 10"
