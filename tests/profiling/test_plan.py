"""The plan agrees with what a run really holds and writes, and says which change helps."""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import tiny_config
from stores import BYTES_TABLE, NUM_CLASSES, SEQ_LEN, saved_tensors, tiny_plan, tiny_run, tiny_store
from torch import Tensor

from megalodon.data.loader import Loader
from megalodon.errors import InputError, RecipeError
from megalodon.model.architectures import build_model
from megalodon.model.megalodon import PRESETS, ModelConfig
from megalodon.parallel.layout import Layout, ParallelConfig
from megalodon.profiling.devices import DEVICES, device_spec
from megalodon.profiling.estimate import least_memory
from megalodon.profiling.exchange import exchanges
from megalodon.profiling.plan import RunPlan, Setup, activations, document_starts, edits, plan_run, sizes_of
from megalodon.training.loop import Run, train
from megalodon.training.memory import fitted
from megalodon.training.optim import OptimConfig, build_optimizer, optimizer_tensors
from megalodon.training.plan import TrainConfig

ROOT = Path(__file__).parents[2]
H100 = DEVICES["h100"]
CPU = H100._replace(name="cpu", memory=1 << 40, card=None)
M200 = ModelConfig(**{**PRESETS["mega200M"], "vocab_size": 32000})


def setup(config: ModelConfig, *, ranks: int = 1, seq_len: int = SEQ_LEN, device: Any = CPU, **parts: Any) -> Setup:
    train = {"max_steps": 7, "batch_tokens": 4 * seq_len} | parts.pop("train", {})
    optim = OptimConfig(**parts.pop("optim", {}))
    parallel = ParallelConfig(**parts.pop("parallel", {}))
    return Setup(config, TrainConfig(**train), optim, parallel, seq_len, ranks, device, **parts)


def bytes_of(plan: RunPlan) -> dict[str, int]:
    return {part.name: part.bytes for part in plan.parts}


def test_parameters_moments_and_checkpoint_are_exact(tmp_path: Path) -> None:
    config, averaged = tiny_config(swiglu=True), {"ema": 0.9}
    plan = plan_run(setup(config, optim=averaged))
    model = build_model(config)
    moments = optimizer_tensors(build_optimizer(dict(model.named_parameters()), plan.setup.optim))
    steps = sum(tensor.nbytes for name, tensor in moments.items() if ".step." in name)
    held = bytes_of(plan)
    assert held["parameters"] == held["gradients"] == sum(p.nbytes for p in model.parameters())
    assert held["optimizer"] == sum(tensor.nbytes for tensor in moments.values()) - steps
    assert held["averaged weights"] == held["parameters"]

    result = tiny_run(
        tiny_store(tmp_path / "store"), tmp_path / "run", tiny_plan(optim=averaged), model={"swiglu": True}
    )
    assert result.saved is not None
    tensors = saved_tensors(tmp_path / "run", result.step)
    small = steps + sum(buffer.nbytes for name, buffer in model.named_buffers())
    assert plan.checkpoint == sum(tensor.nbytes for tensor in tensors.values()) - small


def test_activations_are_those_that_a_run_counts_before_its_first_step() -> None:
    train = {"recompute": "attention", "micro_batch": 1}
    needs = fitted(tiny_config(), tiny_plan(train=train), None).needs
    plan = plan_run(setup(tiny_config(), train=train))
    assert needs is not None
    assert {part: size for part, size in needs.kept if part != "loss"} == plan.kept


@pytest.mark.parametrize(
    ("what", "swiglu", "isolate"),
    [("none", False, "doc"), ("none", True, "none"), ("attention", True, "doc"), ("block", False, "none")],
)
def test_activations_are_those_that_a_step_of_a_run_saves(
    what: Any, swiglu: bool, isolate: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor that autograd saves in a step of the loop is caught; the plan says as many bytes."""
    store, directory = tiny_store(tmp_path / "store"), tmp_path / "run"
    directory.mkdir()
    loader = Loader(store, SEQ_LEN, isolate, 1)
    plan = tiny_plan(train={"recompute": what, "max_steps": 1, "micro_batch": 4})
    saved: dict[int, Tensor] = {}
    forward, backward = [True], Tensor.backward
    own: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        if forward[0] and tensor.untyped_storage()._cdata not in own:
            saved.setdefault(tensor.untyped_storage()._cdata, tensor.detach())
        return tensor

    def without_counting(tensor: Tensor, *args: Any) -> None:
        forward[0] = False
        backward(tensor, *args)

    monkeypatch.setattr(Tensor, "backward", without_counting)
    run = Run(
        directory,
        NUM_CLASSES,
        BYTES_TABLE,
        build=lambda model: own.update(p.untyped_storage()._cdata for p in model.parameters()),
        around=lambda step: torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    )
    train(tiny_config(swiglu=swiglu), loader, plan, run)
    counted = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    starts = loader.batch(0, 4).starts
    places = tuple(tuple(np.flatnonzero(row).tolist()) for row in starts) if starts.any() else None
    predicted = activations(tiny_config(swiglu=swiglu), 4, SEQ_LEN, places, recompute=what)
    assert sum(predicted.kept.values()) == counted > 50_000


def test_the_islands_are_those_that_never_leave_float32() -> None:
    model = build_model(tiny_config()).bfloat16()
    wide = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    sizes = sizes_of(tiny_config())
    assert sizes.islands == wide and sizes.total == model.num_parameters()
    assert sizes.root == model.embed.weight.numel() + model.output_weight.numel()


def test_shards_divide_what_they_hold_and_gather_what_they_use() -> None:
    one = bytes_of(plan_run(setup(M200, seq_len=2048, train={"batch_tokens": 1 << 17}, device=H100)))
    plan = plan_run(setup(M200, seq_len=2048, ranks=8, train={"batch_tokens": 1 << 17}, device=H100))
    eight, sizes = bytes_of(plan), plan.sizes
    assert plan.layout == Layout(1, 8, 1, 1)
    local = -(-(sizes.blocks + sizes.root) // 8) + sizes.islands
    assert eight["parameters"] == eight["gradients"] == 4 * local and eight["optimizer"] == 8 * local
    assert one["parameters"] == 4 * sizes.total and "gathered weights" not in one
    assert eight["gathered weights"] == 2 * 2 * (sizes.blocks // 12) + 4 * sizes.root
    assert plan.peak < sum(one.values())


def test_traffic_of_a_step_is_what_its_collectives_move() -> None:
    sizes = sizes_of(M200)

    def moved(layout: Layout, **changes: Any) -> dict[str, float]:
        how = {"passes": 2, "rows": 3, "tokens": 4096, "bf16": True, "recomputed": False, "isolated": False} | changes
        return {x.name: x.bytes for x in exchanges(M200, sizes, layout, H100, **how)}

    assert moved(Layout()) == {}
    pieces = moved(Layout(cp=4))["pieces of a sequence"]
    averages, statistics = 3 * 2 * 1024 * 16 * 4, 3 * 2 * 32 * 8
    assert pieces == 2 * 2 * 3 * (12 * averages + 13 * statistics)  # passes, forward and back, three others
    assert moved(Layout(cp=4), recomputed=True)["pieces of a sequence"] == 1.5 * pieces
    assert "open chunks" in moved(Layout(cp=4), isolated=True) and "open chunks" not in moved(Layout(cp=4))
    shards = moved(Layout(dp_shard=4))
    assert shards["weights, gathered"] == pytest.approx(2 * 0.75 * (2 * 2 * sizes.blocks + 4 * sizes.root))
    assert shards["gradients, scattered"] == pytest.approx(0.75 * 4 * (sizes.blocks + sizes.root))
    assert shards["islands, summed"] == 2 * 4 * sizes.islands * 0.75
    copies = moved(Layout(dp_replicate=2))
    assert copies["gradients between copies"] == pytest.approx(2 * 0.5 * 4 * (sizes.blocks + sizes.root))
    assert "weights, gathered" not in copies


def test_more_windows_are_taken_until_the_device_is_full() -> None:
    wanted = setup(tiny_config(), train={"batch_tokens": 64 * SEQ_LEN})
    roomy = plan_run(wanted)
    assert roomy.micro_rows == 64 and roomy.fits
    tight = plan_run(replace(wanted, device=CPU._replace(memory=roomy.peak - 1)))
    assert tight.micro_rows == 32 and tight.passes == 2 and tight.fits
    none = plan_run(replace(wanted, device=CPU._replace(memory=1 << 20)))
    assert none.micro_rows == 1 and not none.fits and none.limit == "memory"


def test_edits_against_short_memory_help_and_say_how_much() -> None:
    wanted = setup(M200, seq_len=4096, train={"batch_tokens": 4 * 4096, "micro_batch": 4}, device=H100)
    plan = plan_run(replace(wanted, device=wanted.device._replace(memory=8 << 30)))
    assert plan.limit == "memory"
    found = edits(plan)
    assert len(found) == 3 and all(edit.plan.peak < plan.peak for edit in found)
    assert {edit.change for edit in found} <= {
        "train.recompute=attention", "train.recompute=block", "train.micro_batch=2", "train.loss_chunk=512", "--gpus 2",
    }  # fmt: skip
    best = found[0]
    key, _, value = best.change.partition("=")
    assert best.plan.fits and key.startswith("train.")
    again = plan_run(replace(plan.setup, train=plan.setup.train.model_copy(update={key[6:]: value})))
    assert again.peak == best.plan.peak


def test_a_fast_link_makes_computing_the_limit_and_a_slow_one_talking() -> None:
    wanted = setup(M200, seq_len=2048, ranks=16, train={"batch_tokens": 128 * 2048}, device=H100)
    assert plan_run(wanted).limit == "compute"
    slow = plan_run(replace(wanted, device=H100._replace(network=1e8)))
    assert slow.limit == "communication" and slow.step_seconds > slow.compute_seconds
    best = edits(slow)[0]
    assert best.change == "parallel.dp_replicate=2" and best.plan.step_seconds < slow.step_seconds


def test_what_does_not_divide_or_cannot_be_had_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"6 ranks are not a multiple of .* cp 4 x tp 1 = 4"):
        plan_run(setup(M200, seq_len=8192, ranks=6, parallel={"cp": 4}))
    with pytest.raises(RecipeError, match=r"model.num_heads 1: not a multiple of parallel.tp 2"):
        plan_run(setup(M200, seq_len=8192, ranks=2, parallel={"tp": 2}))
    with pytest.raises(InputError, match="a plan of 0 devices; expected at least 1"):
        plan_run(setup(M200, ranks=0))
    with pytest.raises(RecipeError, match=r"train\.backend: reference goes token by token"):
        plan_run(setup(tiny_config(), train={"backend": "reference"}))
    with pytest.raises(RecipeError, match=r"train\.precision: bf16 is not available"):
        plan_run(setup(tiny_config(), train={"precision": "bf16"}))


def test_devices_have_their_names_and_others_are_suggested() -> None:
    assert device_spec("H100") == H100 and device_spec("rtx 4090").name == "rtx4090"
    assert device_spec("cpu").card is None and device_spec("cpu").measured
    with pytest.raises(InputError, match="--device h10: no such device; did you mean h100"):
        device_spec("h10")
    with pytest.raises(InputError, match="--device cpu:1: "):
        device_spec("cpu:1")


def test_documents_start_where_text_would_and_cover_the_window() -> None:
    (starts,) = document_starts(1, 8192, 512.0)
    assert starts[0] == 0 and starts == tuple(sorted(set(starts))) and starts[-1] < 8192
    assert 12 <= len(starts) <= 16 and max(b - a for a, b in pairwise(starts)) > 1024
    assert document_starts(2, 100, 1e9) == ((0,), (0,))


@pytest.mark.parametrize("what", ["none", "attention", "block"])
@pytest.mark.parametrize("device", [CPU, H100])
def test_the_estimate_of_recipes_ls_is_near_the_plan(what: Any, device: Any) -> None:
    config = ModelConfig(**{**PRESETS["mega200M"], "num_layers": 4, "vocab_size": 4096, "swiglu": True})
    wanted = setup(config, seq_len=2048, train={"batch_tokens": 2048, "recompute": what}, device=device)
    plan = plan_run(wanted)
    rough = least_memory(config, wanted.train, wanted.optim, seq_len=2048, gpu=device.card is not None)
    assert rough == pytest.approx(plan.peak - bytes_of(plan)["process"], rel=0.08)


def test_seven_billion_on_256_devices_are_planned_on_a_laptop() -> None:
    code = "import resource, sys; from megalodon_cli.app import main; sys.argv[1:] = "
    code += "['pretrain', '7b', 'train.recompute=none', '--plan', '--gpus', '256', '--device', 'h100', '--json']\n"
    code += "try: main()\nfinally:\n used = resource.getrusage(resource.RUSAGE_SELF)\n"
    code += " most = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
    code += " print(most.split()[1], used.ru_utime + used.ru_stime, file=sys.stderr)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert '"parameters": 7385817088' in done.stdout
    kib, seconds = map(float, done.stderr.split()[-2:])
    assert kib < 1_000_000 and seconds < 60  # of processors: other work on the machine does not count
