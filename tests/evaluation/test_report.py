"""What a report says in words follows from its numbers. Not here: the commands that print it (tests/cli)."""

import pytest

from megalodon.evaluation.report import words


def said(seq_len: int | None, **by_position: float) -> list[str]:
    buckets = {end.removeprefix("to"): {"loss": loss, "tokens": 10} for end, loss in by_position.items()}
    quick = {"tokens": 9, "documents": 1, "units": 1, "drawn": "documents", "by_position": buckets}
    model = {"name": "m", "seq_len": seq_len, "quick": quick}
    return [line for line in words({"models": [model], "comparisons": [], "cutting_tasks": []})]


def test_the_slope_beyond_the_training_length_is_of_positions_that_no_window_had():
    """Up to 128 are 65 to 128: of 96 tokens of training a third of them."""
    [_, line] = said(96, to64=3.0, to128=9.0, to256=3.0, to512=3.25, to1024=3.5)
    assert "beyond its training length of 96 tokens the loss changes by +0.2500 nats a token" in line
    [_, line] = said(128, to128=9.0, to256=3.0, to512=3.25)
    assert "+0.2500" in line


@pytest.mark.parametrize("seq_len", [None, 256])
def test_nothing_is_said_of_what_was_not_read(seq_len):
    assert len(said(seq_len, to256=3.0, to512=2.0)) == 1
