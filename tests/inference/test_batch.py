"""Batched generation: every row writes what it would write alone."""

import pytest
import torch
from factories import random_tokens, tiny_model
from tolerances import LOGITS, assert_near

from megalodon.data.tokenizer import ByteTokenizer
from megalodon.errors import InputError
from megalodon.inference.batch import Request, write_together
from megalodon.inference.sampling import SamplingConfig
from megalodon.inference.session import Answering, Session, Writer, Writing, allowed_ids
from megalodon.inference.stream import Stops
from megalodon.model.decoder import Decoder
from megalodon.model.state import stack_states

TOKENIZER = ByteTokenizer(reserve=2)
SIZES = {"vocab_size": TOKENIZER.vocab_size, "chunk_size": 16}
LENGTHS = [1, 15, 16, 17, 5, 40, 48, 31, 33]
"""Of prompts: at and around the ends of chunks, and inside."""


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(tiny_model(torch.float32, **SIZES).eval(), TOKENIZER, True)


def prompt(length: int) -> list[int]:
    return random_tokens(1, length, TOKENIZER.vocab_size, seed=length)[0].tolist()


def alone(writer: Writer, ids: list[int], how: Answering, norm_stats: str = "cumulative") -> tuple[str, str, int]:
    ends: list[int] = []  # so that the model, which is random, ends nothing by chance
    session = Session(writer.model, norm_stats=norm_stats)  # type: ignore[arg-type]
    writing = Writing(session, TOKENIZER, ids, how, ends, allowed_ids(TOKENIZER, SIZES["vocab_size"], ends))
    text = "".join(writing)
    return text, writing.finish, len(writing.ids)


def together(writer: Writer, prompts: list[list[int]], hows: list[Answering], norm_stats: str = "cumulative", ends=()):
    requests = [
        Request(ids, how.max_new_tokens, how.sampling, Stops(how.stop)) for ids, how in zip(prompts, hows, strict=True)
    ]
    sessions = (Session(writer.model, norm_stats=norm_stats) for _ in prompts)  # type: ignore[arg-type]
    return write_together(writer, sessions, requests, ends)


def test_ragged_prompts_give_the_greedy_text_of_each_alone(writer):
    """Every phase of a chunk of 16, past two of its ends, and rows that end at other times."""
    hows = [Answering(SamplingConfig(temperature=0), 20 + 3 * number) for number in range(len(LENGTHS))]
    prompts = [prompt(length) for length in LENGTHS]
    found = together(writer, prompts, hows)
    assert [tuple(its) for its in found] == [alone(writer, *pair) for pair in zip(prompts, hows, strict=True)]
    assert {its.new_tokens for its in found} == {how.max_new_tokens for how in hows}


@pytest.mark.parametrize("norm_stats", ["cumulative", "window"])
def test_rows_have_their_own_seeds_and_lengths(writer, norm_stats):
    hows = [
        Answering(SamplingConfig(seed=number, temperature=0.5 + number, repetition_penalty=1.3), 1 + 9 * number)
        for number in range(4)
    ]
    prompts = [prompt(length) for length in (130, 9, 16, 127)]
    found = together(writer, prompts, hows, norm_stats)
    assert [tuple(its) for its in found] == [
        alone(writer, ids, how, norm_stats) for ids, how in zip(prompts, hows, strict=True)
    ]


def test_rows_stop_at_their_own_texts(writer):
    how = Answering(SamplingConfig(seed=5), 60)
    whole = alone(writer, prompt(7), how)[0]
    assert len(whole) > 30
    hows = [how, how._replace(stop=(whole[20:23],)), how._replace(stop=(whole[5:7], "never written"))]
    found = together(writer, [prompt(7)] * 3, hows)
    assert [its.finish_reason for its in found] == ["length", "stop", "stop"]
    assert found[0].text == whole
    assert [its.text for its in found] == [alone(writer, prompt(7), one)[0] for one in hows]
    assert len(found[2].text) < len(found[1].text) < len(whole)


def test_eos_ends_a_row_alone(writer, monkeypatch):
    yes = TOKENIZER.encode("yes")
    script = iter([yes[0], yes[0], yes[1], TOKENIZER.eos_id, yes[2], yes[0], TOKENIZER.eos_id])
    monkeypatch.setattr("megalodon.inference.sampling.sample", lambda *_: next(script))
    found = together(writer, [prompt(3), prompt(4)], [Answering(SamplingConfig(), 9)] * 2, ends=[TOKENIZER.eos_id])
    assert [(its.text, its.finish_reason, its.new_tokens) for its in found] == [("yesy", "stop", 4), ("y", "stop", 1)]


def test_a_stacked_state_is_each_of_its_rows(writer):
    """Positions and open chunks differ; steps of all are steps of each."""
    model = tiny_model(**SIZES).eval()
    sessions = [Session(model) for _ in LENGTHS]
    for session, length in zip(sessions, LENGTHS, strict=True):
        session.feed(prompt(length))
    stacked = stack_states([session.state for session in sessions])
    assert stacked.position.tolist() == LENGTHS
    some = [4, 0, 6]
    decoder, part = Decoder(model, stacked), Decoder(model, stacked.rows(some))
    for token in range(40, 60):
        logits = decoder.step(torch.full((len(LENGTHS),), token))
        assert_near(part.step(torch.full((3,), token)), logits[some], LOGITS[torch.float64])
        for number, session in enumerate(sessions):
            assert_near(logits[number], session.step(token), LOGITS[torch.float64])


def test_what_cannot_be_written(writer):
    with pytest.raises(InputError, match="zero tokens"):
        together(writer, [[]], [Answering(SamplingConfig(), 3)])
    assert together(writer, [], []) == []
