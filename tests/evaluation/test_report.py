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


def test_how_far_back_text_is_used_lies_between_two_lengths():
    def told(used: int) -> str:
        context = {"used_tokens": used, "lengths": [{"context": n} for n in (0, 1024, 4096)], "windows": 9}
        model = {"name": "m", "context": context | {"worse_at": []}}
        return next(words({"models": [model], "comparisons": [], "cutting_tasks": []}))

    assert told(4096).startswith("m uses text more than 1Ki and up to 4Ki tokens back (9 windows")
    assert told(1024).startswith("m uses text up to 1Ki tokens back, and nothing longer up to 4Ki helps beyond")
    assert told(0).startswith("m: no length up to 4Ki helps beyond chance")


@pytest.mark.parametrize("seq_len", [None, 256])
def test_nothing_is_said_of_what_was_not_read(seq_len):
    assert len(said(seq_len, to256=3.0, to512=2.0)) == 1
