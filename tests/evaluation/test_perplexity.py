"""Scores are those of the definition, whatever the batches; the unigram baseline is the one computed by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from factories import tiny_model
from stores import BYTES_TABLE, NUM_CLASSES, SEQ_LEN, tiny_store
from torch.nn.functional import cross_entropy

from megalodon.data.loader import IGNORED, Batch, validation_batches
from megalodon.data.shards import Store, TokenDocument, write_store
from megalodon.errors import DataError
from megalodon.evaluation.perplexity import evaluate, unigram_bits_per_byte


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return tiny_store(tmp_path_factory.mktemp("data") / "store", documents=12)


def batches(store: Store, rows: int = 3, tokens: int = 301) -> list[Batch]:
    return list(validation_batches(store, SEQ_LEN, "doc", rows, tokens))


def test_scores_are_those_of_the_definition(store: Store) -> None:
    model = tiny_model(torch.float32)
    found = evaluate(model, batches(store), BYTES_TABLE, NUM_CLASSES, block=16)
    assert found is not None
    nats, num_bytes, positions = [], 0, []
    with torch.no_grad():
        for batch in batches(store, rows=1):
            logits, _ = model(torch.from_numpy(batch.tokens), starts=torch.from_numpy(batch.starts))
            for position, target in enumerate(batch.targets[0]):
                if target != IGNORED:
                    real = logits[0, position, :NUM_CLASSES].double()
                    nats.append(float(cross_entropy(real[None], torch.tensor([target]))))
                    positions.append(position + 1)
                    num_bytes += int(BYTES_TABLE[target])
    assert found.tokens == len(nats) < 301
    assert found.bytes == num_bytes
    assert found.loss == pytest.approx(np.mean(nats), rel=1e-5)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / num_bytes, rel=1e-5)
    assert list(found.by_position) == [1, 2, 4, 8, 16, 32, 37]
    low = 0
    for high, loss in found.by_position.items():
        inside = [n for n, p in zip(nats, positions, strict=True) if low < p <= high]
        assert loss == pytest.approx(np.mean(inside), rel=1e-4), high
        low = high


def test_the_cut_into_batches_and_blocks_changes_rounding_only(store: Store) -> None:
    model = tiny_model(torch.float32)
    one = evaluate(model, batches(store, rows=1), BYTES_TABLE, NUM_CLASSES, block=5)
    other = evaluate(model, batches(store, rows=5), BYTES_TABLE, NUM_CLASSES)
    assert one is not None and other is not None
    assert one.loss == pytest.approx(other.loss, rel=1e-6)
    assert (one.tokens, one.bytes) == (other.tokens, other.bytes)


def test_dropout_is_off_and_the_mode_is_left_as_it_was(store: Store) -> None:
    model = tiny_model(torch.float32, dropout=0.5).train()
    first, second = (evaluate(model, batches(store), BYTES_TABLE, NUM_CLASSES) for _ in range(2))
    assert first == second
    assert model.training
    model.eval()
    evaluate(model, batches(store), BYTES_TABLE, NUM_CLASSES)
    assert not model.training


def test_bfloat16_is_near_and_not_equal(store: Store) -> None:
    model = tiny_model(torch.float32)
    exact = evaluate(model, batches(store), BYTES_TABLE, NUM_CLASSES)
    half = evaluate(model, batches(store), BYTES_TABLE, NUM_CLASSES, bf16=True)
    assert exact is not None and half is not None
    assert half.loss != exact.loss
    assert half.loss == pytest.approx(exact.loss, rel=0.05)


def test_a_stop_abandons_the_evaluation(store: Store) -> None:
    calls = iter([False, True])
    assert (
        evaluate(tiny_model(torch.float32), batches(store), BYTES_TABLE, NUM_CLASSES, stop=lambda: next(calls)) is None
    )


def test_nothing_to_score_is_an_error(store: Store) -> None:
    batch = Batch(np.zeros((1, 4), np.int64), np.full((1, 4), IGNORED), np.zeros((1, 4), np.bool_))
    with pytest.raises(DataError, match="no target to score"):
        evaluate(tiny_model(torch.float32), [batch], BYTES_TABLE, NUM_CLASSES)


def test_targets_without_text_have_no_bits_per_byte(store: Store) -> None:
    found = evaluate(tiny_model(torch.float32), batches(store), np.zeros(NUM_CLASSES, np.int64), NUM_CLASSES)
    assert found is not None and found.bits_per_byte is None
    assert "by_position" not in found.row(by_position=False)


def test_the_unigram_baseline_is_the_one_computed_by_hand(tmp_path: Path) -> None:
    ids = np.array([0, 1, 1, 2], dtype=np.int64)
    train = write_store(tmp_path / "train", [TokenDocument("a", ids, 3)], 4)
    batch = Batch(np.array([[0, 1]]), np.array([[1, 3]]), np.zeros((1, 2), np.bool_))
    table = np.array([0, 2, 1, 3], dtype=np.int64)
    expected = (math.log2(8 / 3) + math.log2(8 / 1)) / 5  # counts plus one: 2, 3, 2, 1
    assert unigram_bits_per_byte(train, [batch], table, 4) == pytest.approx(expected)
    ignored = Batch(batch.tokens, np.array([[1, IGNORED]]), batch.starts)
    assert unigram_bits_per_byte(train, [ignored], table, 4) == pytest.approx(math.log2(8 / 3) / 2)
