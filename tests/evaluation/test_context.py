"""Losses after L tokens of context are those of a direct pass; windows are even; what is said follows from them."""

import numpy as np
import pytest
import torch
from byte_texts import NUM_CLASSES, TOKENIZER, TOKENS, byte_model, text, write
from torch.nn.functional import cross_entropy

from megalodon.errors import InputError
from megalodon.evaluation.context import Use, choose, cost, measure
from megalodon.evaluation.corpus import Concatenated, Tokens, files
from megalodon.evaluation.scoring import How
from megalodon.model.architectures import build_model
from megalodon.model.llama import LlamaConfig

LENGTHS = (0, 1, 30, 75)


@pytest.fixture(scope="module")
def model():
    return byte_model()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_window_after_a_length_of_context_is_a_direct_pass_over_both(model, tmp_path, bos, rows):
    given, tokens = text(120), Tokens(TOKENIZER, bos, True)
    choice = choose(files(write(tmp_path / "t", given)), tokens, 75, 24, 4)
    told: list[int] = []
    use = measure(model, choice, tokens, LENGTHS, How(piece=20), rows, told.append)
    ids, first = TOKENIZER.encode(given), [TOKENIZER.bos_id] if bos else []
    scored = 24 if bos else 23
    for number, window in enumerate(choice.windows):
        for column, length in enumerate(LENGTHS):
            seen = [*first, *ids[window.start - length : window.start + 24]]
            with torch.no_grad():
                logits, _ = model(torch.tensor(seen[:-1])[None])
            losses = cross_entropy(logits[0, :, :NUM_CLASSES], torch.tensor(seen[1:]), reduction="none")[-scored:]
            assert use.losses[number, column] == pytest.approx(float(losses.mean()), rel=1e-9)
            assert use.buckets[4][number, column] == pytest.approx(float(losses[2:4].mean()), rel=1e-9)
        assert use.bytes[number] == scored
    assert told[-1] == cost(choice, LENGTHS) - (0 if bos else 4 * len(LENGTHS))
    widths = {end: min(end, scored) - (end // 2 if end > 1 else 0) for end in (1, 2, 4, 8, 16)} | {scored: scored - 16}
    mean = sum(use.buckets[end] * width for end, width in widths.items()) / scored
    assert list(use.buckets) == list(widths)
    np.testing.assert_allclose(mean, use.losses, rtol=1e-9)


def test_the_baseline_reads_the_same_windows(tmp_path):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    sizes = {"num_layers": 2, "model_dim": 24, "num_heads": 2, "ffn_hidden_dim": 37, "vocab_size": NUM_CLASSES + 5}
    llama, given = build_model(LlamaConfig.model_validate(sizes), seed=3).eval(), text(80)
    choice = choose(files(write(tmp_path / "t", given)), TOKENS, 60, 24, 3)
    use = measure(llama, choice, TOKENS, (0, 60), How(piece=20), 2)
    for number, window in enumerate(choice.windows):
        seen = torch.tensor([TOKENIZER.bos_id, *window.ids.tolist()])
        with torch.no_grad():
            logits, _ = llama(seen[None, :-1])
        losses = cross_entropy(logits[0, :, :NUM_CLASSES], seen[1:], reduction="none")[-24:]
        assert use.losses[number, 1] == pytest.approx(float(losses.mean()), rel=1e-5)


def test_windows_lie_evenly_in_all_documents_that_are_long_enough(tmp_path):
    corpus = files(write(tmp_path / "t", text(200), text(9, 1), text(200, 2)))
    lengths = [len(TOKENIZER.encode(text(200, seed))) for seed in (0, 2)]
    possible = sum((length - 100) // 16 for length in lengths)
    choice = choose(corpus, TOKENS, 100, 16, 10_000)
    assert len(choice.windows) == choice.possible == possible
    starts = [window.start for window in choice.windows]
    assert starts == [100 + 16 * k for length in lengths for k in range((length - 100) // 16)]
    few = choose(corpus, TOKENS, 100, 16, 6)
    steps = np.diff([starts.index(w.start) + (len(starts) // 2) * ("02.txt" in w.document) for w in few.windows])
    assert steps.max() - steps.min() <= 2
    for window in few.windows:
        ids = TOKENIZER.encode(text(200, 0 if "00.txt" in window.document else 2))
        assert window.ids.tolist() == ids[window.start - 100 : window.start + 16]


def test_a_length_that_no_document_has_is_refused_unless_they_are_joined(tmp_path):
    corpus = files(write(tmp_path / "t", "abc " * 90, "def " * 80))
    message = r"--lengths 512: the longest document has 360 tokens, .*--concatenate"
    with pytest.raises(InputError, match=message):
        choose(corpus, TOKENS, 512, 16, 4)
    joined = choose(Concatenated(corpus), TOKENS, 512, 16, 4)
    assert joined.possible == (680 - 512) // 16
    assert TOKENIZER.decode(joined.windows[0].ids.tolist()) in "abc " * 90 + "def " * 80


def made_up(*columns: float, noise: float = 0.01) -> Use:
    draw = np.random.default_rng(0)
    hard = draw.normal(0, 1, (40, 1))  # the same for every length: pairing takes it away
    losses = np.array(columns)[None] + hard + noise * draw.normal(size=(40, len(columns)))
    return Use((0, 4, 16, 64)[: len(columns)], losses, {4: losses}, np.full(40, 4), 4)


def test_what_is_used_is_the_last_length_that_helps_beyond_chance():
    assert made_up(3, 2, 1.9, 1.9).used() == 16
    assert made_up(3, 2, 2, 1.98).used() == 64
    assert made_up(3, 2, 2.2, 2.1).used() == 4  # better than the length before, worse than one still shorter
    assert made_up(3, 3, 3, 3).used() == 0
    assert made_up(3, 2, 2.2, 2.2).hurt() == (16,)
    assert made_up(3, 2, 1.9, 1.9).hurt() == ()
    step = made_up(3, 2, 1.9, 1.9).steps()[1]
    assert step.low < -0.1 < step.high
    assert step.error < 0.01  # though windows differ by one nat


def test_the_document_pairs_every_length_with_reset_shortest_and_previous():
    document = made_up(3, 2, 1.5).document()
    reset, short, long = document["lengths"]
    assert [row["context"] for row in document["lengths"]] == [0, 4, 16]
    assert reset["less_previous"] is reset["less_reset"] is short["less_shortest"] is None
    assert short["less_reset"]["value"] == pytest.approx(-1, abs=0.02) == short["less_previous"]["value"]
    assert long["less_shortest"]["value"] == pytest.approx(-0.5, abs=0.02)
    assert long["less_reset"]["value"] == pytest.approx(-1.5, abs=0.02)
    assert document["used_tokens"] == 16
