"""The streaming measurement: it reads exactly what was asked and reports memory that can be checked."""

import mmap

import pytest
import torch

from megalodon.errors import InputError
from megalodon.model.megalodon import Megalodon, ModelConfig
from megalodon.profiling.streaming import Point, StreamReport, resident_memory, stream_memory

CONFIG = ModelConfig(
    num_layers=1,
    model_dim=6,
    num_heads=1,
    z_dim=4,
    value_dim=8,
    ffn_hidden_dim=10,
    cema_ndim=2,
    norm_num_groups=3,
    chunk_size=64,
    vocab_size=50,
)


def test_a_stream_is_measured_point_by_point():
    seen = []
    report = stream_memory(45_000, CONFIG, piece=2048, pieces=5, report=seen.append)
    assert [p.tokens for p in report.points] == [10_240, 20_480, 30_720, 40_960, 45_000]
    assert list(report.points) == seen
    assert report.tokens == 45_000
    assert report.num_parameters == CONFIG.num_parameters()
    assert report.tokens_per_second == pytest.approx(45_000 / report.seconds)
    begun = torch.zeros(1, 45_000 % CONFIG.chunk_size, dtype=torch.long)  # the state keeps the chunk it is in
    assert report.state_bytes == Megalodon(CONFIG)(begun)[1].num_bytes()
    assert report.growth < 0.1
    assert all(p.resident > 10**7 for p in report.points)


def test_growth_counts_from_the_end_of_the_warm_up():
    points = [Point(10_000, 1, 50), Point(20_000, 2, 100), Point(30_000, 3, 108), Point(40_000, 4, 101)]
    report = StreamReport(40_000, 4.0, 1, 1, 1, tuple(points))
    assert report.growth == pytest.approx(0.08)


def test_resident_memory_sees_an_allocation():
    before = resident_memory()
    with mmap.mmap(-1, 64 << 20) as block:  # new pages, whatever earlier tests have freed
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        assert resident_memory() - before > 60 << 20


def test_fewer_tokens_than_the_warm_up_are_refused():
    with pytest.raises(InputError, match="100; expected at least the warm-up of 20,000"):
        stream_memory(100, CONFIG)
