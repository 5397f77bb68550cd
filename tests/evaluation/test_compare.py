"""Equal models do not differ; different ones by what their scores differ by, also with different tokenizers."""

import math

import numpy as np
import pytest
import torch
from byte_texts import TOKENS, byte_model, text, write
from factories import tiny_model

from megalodon.data.tokenizer import train_sentencepiece
from megalodon.evaluation import bootstrap, scoring
from megalodon.evaluation.compare import context_difference, difference
from megalodon.evaluation.context import choose, measure
from megalodon.evaluation.corpus import Tokens, files
from megalodon.evaluation.scoring import Block, How, Scores, score


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return files(write(tmp_path_factory.mktemp("texts") / "t", *(text(200, seed) for seed in range(8))))


def test_equal_models_differ_by_exactly_nothing(corpus):
    first, second = (score(byte_model(), corpus, TOKENS, How()) for _ in range(2))
    found = difference("b", second, "a", first)
    assert found is not None and found.bits_per_byte[:3] == (0, 0, 0)
    assert not found.bits_per_byte.excludes_zero()


def test_a_worse_model_is_told_from_a_better_one_though_their_own_intervals_meet(corpus):
    """A model that is the other one with a little noise: paired, what is hard for both cancels."""
    good, bad = byte_model(), byte_model()
    with torch.no_grad():
        noise = torch.randn(bad.output_weight.shape, generator=torch.Generator().manual_seed(1))
        bad.output_weight.add_(0.05 * noise)
    a, b = (score(model, corpus, TOKENS, How()) for model in (good, bad))
    found = difference("b", b, "a", a)
    assert found is not None
    change, own = found.bits_per_byte, a.bits_per_byte()
    assert own is not None and b.bits_per_byte() is not None
    assert change.value == pytest.approx(b.bits_per_byte().value - own.value, rel=1e-9)
    assert change.error < own.error


def test_models_with_other_tokenizers_are_paired_by_text(corpus):
    pieces = train_sentencepiece([text(3000, 9)] * 2, 400, 2)
    tokens = Tokens(pieces, True, True)
    other = score(tiny_model(vocab_size=pieces.vocab_size).eval(), corpus, tokens, How())
    own = score(byte_model(), corpus, TOKENS, How())
    assert own.bytes == other.bytes
    assert own.tokens > other.tokens
    assert own.blocks.keys() == other.blocks.keys()
    found = difference("pieces", other, "bytes", own)
    assert found is not None and found.units == len(own.blocks)
    expected = other.bits_per_byte().value - own.bits_per_byte().value
    assert found.bits_per_byte.value == pytest.approx(expected, rel=1e-9)
    for key, block in own.blocks.items():  # a token lies in the block that its first byte is in
        assert abs(block.bytes - other.blocks[key].bytes) < 30


def test_windows_are_paired_at_every_length(corpus):
    choice = choose(corpus, TOKENS, 64, 32, 6)
    a, b = (measure(byte_model(seed=seed), choice, TOKENS, (0, 64), How()) for seed in (0, 1))
    found = context_difference("b", b, "a", a)
    assert [loss.value for loss in found.loss] == pytest.approx((b.losses - a.losses).mean(0).tolist())


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Of 200 samples of 60 units, about 95 % of the intervals hold the mean they were drawn around."""
    draw = np.random.default_rng(0)
    held = [
        interval.low <= 1 <= interval.high for interval in (bootstrap.mean(draw.normal(1, 2, 60)) for _ in range(200))
    ]
    assert 0.9 <= np.mean(held) <= 0.98


def test_the_standard_error_of_a_mean_is_that_of_the_textbook():
    values = np.random.default_rng(1).normal(size=400)
    assert bootstrap.mean(values).error == pytest.approx(values.std(ddof=1) / 20, rel=0.06)


def test_blocks_are_joined_alike_though_one_tokenizer_has_a_byte_more(corpus):
    """At the border of MOST_UNITS one model would join two blocks and the other none."""
    nats = {(0, n): Block(1000.0 * (n % 2), 1000, 900, 100) for n in range(40)}
    more = Scores(nats | {(0, 39): Block(1000, 1001, 900, 100)}, {}, 1, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "MOST_UNITS", 13)
        patch.setattr(scoring, "BLOCK_BYTES", 3077)  # 40,001 bytes together
        own = Scores(nats, {}, 1, 0)
        assert own.joined != more.joined
        found = difference("a", own, "b", more)
    assert found is not None and abs(found.bits_per_byte.high) < 1e-3 > abs(found.bits_per_byte.low)


def test_no_interval_is_drawn_of_five_units_which_all_lie_on_one_side_by_chance():
    assert math.isnan(bootstrap.mean(np.arange(1.0, 6)).high)
    assert bootstrap.mean(np.arange(1.0, 6)).error > 0
    assert bootstrap.mean(np.arange(1.0, 7)).excludes_zero()
    few = bootstrap.difference(np.ones(5), np.ones(5), np.zeros(5), np.ones(5))
    assert few.value == 1 and not few.excludes_zero()


def test_a_draw_without_any_words_gives_no_interval_and_no_warning():
    words = np.array([1.0, 0, 0, 0, 0, 0, 0])
    interval = bootstrap.ratio(np.ones(7), words)
    assert interval.document() == {"value": 7, "low": None, "high": None, "error": None}
    found = bootstrap.difference(np.ones(7), words, np.ones(7), words)
    assert found.value == 0 and math.isnan(found.low)


def test_of_one_unit_nothing_is_said():
    interval = bootstrap.mean(np.array([3.0]))
    assert interval.value == 3
    assert interval.document() == {"value": 3, "low": None, "high": None, "error": None}
    assert not interval.excludes_zero()
