"""How many windows fit is found before step 1 and leaves no trace; memory that ran out is explained."""

from dataclasses import replace

import pytest
import torch
from factories import tiny_config
from stores import SEQ_LEN, tiny_plan

from megalodon.errors import OutOfMemory
from megalodon.training.memory import available_memory, explained, first_that_fits, fitted
from megalodon.training.plan import MICRO_TOKENS, Needs

CONFIG = tiny_config()


def test_on_a_cpu_as_many_windows_as_the_tokens_hold() -> None:
    assert fitted(CONFIG, tiny_plan(), None).micro_rows == 4
    large = fitted(CONFIG, tiny_plan(train={"batch_tokens": 512 * SEQ_LEN}), None)
    assert large.micro_rows == 128 and 128 * SEQ_LEN <= MICRO_TOKENS["cpu"] < 256 * SEQ_LEN


def test_fewer_windows_when_memory_is_short_and_an_error_when_none_fits() -> None:
    needs = fitted(CONFIG, tiny_plan(), None).needs
    assert needs is not None
    assert fitted(CONFIG, tiny_plan(), needs.total(4)).micro_rows == 4
    assert fitted(CONFIG, tiny_plan(), needs.total(4) - 1).micro_rows == 2
    assert fitted(CONFIG, tiny_plan(), needs.total(1)).micro_rows == 1
    with pytest.raises(OutOfMemory, match=r"out of memory on cpu: 0\.0 GiB are free; planned .* GiB: ") as caught:
        fitted(CONFIG, tiny_plan(), needs.total(1) - 1)
    assert str(caught.value.hint).startswith("train.recompute=block -> ")


def test_a_choice_once_made_holds_and_so_does_the_recipes() -> None:
    assert fitted(CONFIG, tiny_plan(), None, 2).micro_rows == 2
    explicit = fitted(CONFIG, tiny_plan(train={"micro_batch": 1}), None)
    assert explicit.micro_rows == 1 and explicit.needs is not None


def test_measuring_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    fitted(tiny_config(dropout=0.3), tiny_plan(), None)
    assert torch.rand(4).equal(expected)


def test_needs_count_what_the_run_will_hold() -> None:
    plain = fitted(CONFIG, tiny_plan(), None).needs
    averaged = fitted(CONFIG, tiny_plan(optim={"ema": 0.9}), None).needs
    blocks = fitted(CONFIG, tiny_plan(train={"recompute": "block"}), None).needs
    assert plain and averaged and blocks
    assert plain.weights == 8 * CONFIG.num_parameters() == plain.optimizer
    assert averaged.weights == 12 * CONFIG.num_parameters()
    assert blocks.window < plain.window_recomputed < plain.window


def test_the_first_that_fits_is_taken() -> None:
    asked: list[int] = []

    def fits(rows: int) -> bool:
        asked.append(rows)
        return rows <= 3

    assert first_that_fits([12, 6, 3, 1], fits) == 3
    assert asked == [12, 6, 3]
    assert first_that_fits([12, 6], fits) is None


@pytest.mark.parametrize(
    "raised",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.21 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_memory_that_ran_out_comes_with_the_plan_and_three_edits(raised: Exception) -> None:
    gib = 2**30
    plan = replace(tiny_plan(), seq_len=4096, needs=Needs(2 * gib, gib, gib // 2, 4 * gib, gib))
    with pytest.raises(OutOfMemory) as caught, explained(plan):
        raise raised
    message = "planned 19.50 GiB: activations 16.00, weights and gradients 2.00, optimizer 1.00, loss 0.50"
    assert message in str(caught.value)
    assert caught.value.hint == (
        "train.micro_batch=2 -> 11.50 GiB (derived) · train.recompute=block -> 7.50 GiB (derived) · "
        "data.seq_len=2048 -> 11.50 GiB (derived)"
    )


def test_memory_that_ran_out_names_the_parts_that_keep_most_and_what_was_in_use() -> None:
    gib = 2**30
    kept = (("attn", 3 * gib), ("ffn", 2 * gib), ("loss", gib // 4))
    plan = replace(
        tiny_plan(optim={"ema": 0.9}, train={"recompute": "block"}), needs=Needs(gib, gib, 0, 8 * gib, gib, kept)
    )
    with pytest.raises(OutOfMemory) as caught, explained(replace(plan, micro_rows=1)):
        raise MemoryError
    assert "; activations by part: attention 3.00, feed-forward 2.00, loss 0.25" in str(caught.value)
    assert "Python found none; at most " in str(caught.value) and " GiB were in use; planned 10.00 GiB" in str(
        caught.value
    )
    assert caught.value.hint == "optim.ema=null -> 9.50 GiB (derived) · a smaller model"
    assert caught.value.exit_code == 4


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes differ"), explained(tiny_plan()):
        raise RuntimeError("shapes differ")


def test_this_machine_tells_its_free_memory() -> None:
    found = available_memory(torch.device("cpu"))
    assert found is None or found > 2**20
