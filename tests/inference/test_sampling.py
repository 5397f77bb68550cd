"""Sampling: what each filter keeps, exactly, and that a seed decides everything."""

import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from megalodon.data.tokenizer import ByteTokenizer
from megalodon.errors import InputError, NumericalError
from megalodon.inference.sampling import SamplingConfig, allowed_ids, sample

PROBABILITIES = (0.1, 0.4, 0.05, 0.3, 0.15)
"""By descending probability: ids 1, 3, 4, 0, 2."""
OFF = SamplingConfig(temperature=1, top_k=0, top_p=1)


def logits_of(*probabilities: float) -> Tensor:
    return torch.tensor(probabilities).log() + 2.5


def drawn(config: SamplingConfig, draws: int = 2000, **filters: Tensor) -> Counter[int]:
    generator, logits = config.generator(), logits_of(*PROBABILITIES)
    return Counter(sample(logits, config, generator, **filters) for _ in range(draws))


def change(**values: float) -> SamplingConfig:
    return SamplingConfig(**{"temperature": 1, "top_k": 0, "top_p": 1, **values})


def near(counts: Counter[int], expected: dict[int, float]) -> bool:
    """Frequencies within five standard deviations of their probability, and nothing else drawn."""
    draws, total = counts.total(), sum(expected.values())
    close = (abs(counts[i] / draws - p / total) < 5 * math.sqrt(0.25 / draws) for i, p in expected.items())
    return counts.keys() == expected.keys() and all(close)


def test_without_filters_frequencies_are_probabilities():
    assert near(drawn(OFF), dict(enumerate(PROBABILITIES)))


def test_top_k_keeps_the_k_likeliest():
    assert near(drawn(change(top_k=2)), {1: 0.4, 3: 0.3})
    assert near(drawn(change(top_k=99)), dict(enumerate(PROBABILITIES)))


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.39, {1}), (0.41, {1, 3}), (0.71, {1, 3, 4}), (0.86, {0, 1, 3, 4}), (0.96, {0, 1, 2, 3, 4})]
)
def test_top_p_keeps_the_fewest_that_reach_the_share(top_p, kept):
    assert near(drawn(change(top_p=top_p)), {i: PROBABILITIES[i] for i in kept})


def test_top_p_is_measured_among_what_top_k_left():
    # 0.4 is 57 % of the two that top-k left, so 50 % needs only the first.
    assert drawn(change(top_k=2, top_p=0.5), draws=50).keys() == {1}


def test_min_p_is_a_share_of_the_highest_probability():
    assert near(drawn(change(min_p=0.36)), {1: 0.4, 3: 0.3, 4: 0.15})


def test_temperature_sharpens():
    expected = {i: p**2 for i, p in enumerate(PROBABILITIES)}
    assert near(drawn(change(temperature=0.5)), expected)
    assert drawn(change(temperature=1e-300), draws=20).keys() == {1}


def test_greedy_takes_the_lowest_of_equals_and_draws_nothing():
    generator = torch.Generator().manual_seed(3)
    before = generator.get_state()
    assert sample(torch.tensor([1.0, 2.0, 2.0, -1.0]), change(temperature=0), generator) == 1
    assert torch.equal(generator.get_state(), before)


def test_top_k_among_equals_keeps_exactly_k():
    generator = OFF.generator()
    assert {sample(torch.zeros(7), change(top_k=3), generator) for _ in range(200)} == {0, 1, 2}


def test_repetition_penalty_makes_seen_ids_rarer_whatever_their_sign():
    seen = torch.tensor([True, False, True])
    generator = OFF.generator()
    greedy = change(temperature=0, repetition_penalty=2)
    assert sample(torch.tensor([3.0, 2.0, 1.0]), greedy, generator, seen=seen) == 1
    assert sample(torch.tensor([-1.0, -1.5, -4.0]), greedy, generator, seen=seen) == 1
    assert sample(torch.tensor([5.0, 2.0, 1.0]), greedy, generator, seen=seen) == 0


def test_one_seed_one_sequence_and_the_global_generator_stays():
    logits = torch.randn(100, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()

    def run(seed: int) -> list[int]:
        config = SamplingConfig(seed=seed)
        generator = config.generator()
        return [sample(logits, config, generator) for _ in range(30)]

    assert run(5) == run(5)
    assert run(5) != run(6)
    assert torch.equal(torch.get_rng_state(), before)


def test_padding_and_special_ids_are_never_written_but_eos_is():
    tokenizer = ByteTokenizer(reserve=2)
    outputs = tokenizer.vocab_size + 7
    allowed = allowed_ids(tokenizer, outputs)
    assert {i for i in range(outputs) if not allowed[i]} == (tokenizer.special_ids - {tokenizer.eos_id}) | set(
        range(tokenizer.vocab_size, outputs)
    )
    tempting = torch.zeros(outputs)
    tempting[~allowed] = 50.0
    for config in (OFF, change(temperature=0), change(top_k=3), change(top_p=0.3)):
        generator = config.generator()
        assert all(allowed[sample(tempting, config, generator, allowed)] for _ in range(100))
    tempting[tokenizer.eos_id] = 9.0
    assert sample(tempting, change(temperature=0), OFF.generator(), allowed) == tokenizer.eos_id


def test_a_tokenizer_larger_than_the_model_is_refused():
    with pytest.raises(InputError, match=r"262 ids but the model only 200 outputs"):
        allowed_ids(ByteTokenizer(reserve=2), 200)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -1.0, "temperature is -1.0; expected 0"),
        ("temperature", math.nan, "temperature is nan; expected 0"),
        ("temperature", math.inf, "temperature is inf; expected 0"),
        ("top_k", -3, "top_k is -3; expected 0"),
        ("top_p", 0.0, "top_p is 0.0; expected above 0 and at most 1"),
        ("top_p", 1.5, "top_p is 1.5; expected above 0 and at most 1"),
        ("min_p", 1.0, "min_p is 1.0; expected from 0"),
        ("repetition_penalty", 0.0, "repetition_penalty is 0.0; expected above 0"),
        ("seed", -1, "seed is -1; expected from 0"),
    ],
)
def test_values_out_of_range_are_refused_not_clamped(name, value, expected):
    with pytest.raises(InputError, match=f"^{expected}"):
        SamplingConfig(**{name: value})


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_logits_are_a_numerical_error(broken):
    with pytest.raises(NumericalError, match="highest logit"):
        sample(torch.tensor([0.0, broken, 1.0]), OFF, OFF.generator())


@pytest.mark.parametrize("top_k", [1, 2, 5, 7, 8, 200])
def test_top_k_takes_the_lower_ids_of_equal_scores(top_k):
    """Against a whole stable sort, with ties inside and across the border of top-k, and with ids that are excluded."""
    logits = torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(top_k)).float()
    allowed = torch.arange(40) % 3 != 1
    best = logits.masked_fill(~allowed, -math.inf).sort(descending=True, stable=True).indices[:top_k].tolist()
    config = SamplingConfig(temperature=1.0, top_k=top_k, top_p=1.0)
    draw = torch.Generator().manual_seed(0)
    drawn = {sample(logits, config, draw, allowed) for _ in range(600)}
    reachable = {token for token in best if allowed[token]}
    assert drawn <= reachable and (top_k > 8 or drawn == reachable)
