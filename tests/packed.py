"""Packed examples beside the same ones alone: loss and every gradient. For tests of packing and of finetuning."""

from typing import Any

import numpy as np
import torch

from megalodon.data.loader import IGNORED
from megalodon.data.packing import Packing, first_fit, read_windows
from megalodon.data.shards import Store
from megalodon.model.loss import loss_sums
from megalodon.model.megalodon import Megalodon

SEQ_LEN, VOCAB = 41, 47


def packed(store: Store, seq_len: int = SEQ_LEN) -> Packing:
    lengths = store.lengths()
    return Packing(first_fit(lengths, seq_len), lengths, seq_len)


def total(model: Megalodon, batches: list[Any], num_classes: int = VOCAB) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over all targets, and every gradient."""
    count = sum(int((batch.targets != IGNORED).sum()) for batch in batches)
    model.zero_grad(set_to_none=True)
    loss = 0.0
    for tokens, targets, starts in batches:
        hidden, _ = model.hidden(torch.from_numpy(tokens), starts=torch.from_numpy(starts))
        sums = loss_sums(hidden, model.output_weight, torch.from_numpy(targets), num_classes=num_classes)
        (sums.objective / count).backward()
        loss += float(sums.loss)
    return loss / count, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_packed_is_separate(
    store: Store, model: Megalodon, seq_len: int, tolerance: float, num_classes: int = VOCAB
) -> None:
    """Loss and every gradient, each relative to its own norm."""
    packing, lengths = packed(store, seq_len), store.lengths()
    assert packing.num_windows < len(lengths), "nothing shares a window: the test would prove nothing"
    together = [read_windows(store, packing, [window], "doc") for window in range(packing.num_windows)]
    alone = [
        read_windows(store, Packing(np.arange(len(lengths)), lengths, seq_len), [number], "doc")
        for number in range(len(lengths))
    ]
    alone = [type(b)(*(part[:, :length] for part in b)) for b, length in zip(alone, lengths.tolist(), strict=True)]
    (loss, gradients), (expected, separate) = total(model, together, num_classes), total(model, alone, num_classes)
    assert abs(loss - expected) <= tolerance * abs(expected)
    assert gradients.keys() == separate.keys() == dict(model.named_parameters()).keys()
    for name, gradient in gradients.items():
        apart, norm = float((gradient - separate[name]).norm()), float(separate[name].norm())
        assert apart <= tolerance * norm, (name, apart / norm)
