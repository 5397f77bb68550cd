"""What `profile` measures: every section has its rows, their numbers fit together, and what cannot be is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import tiny_config, tiny_model
from stores import tiny_store

from megalodon.data.loader import Loader
from megalodon.errors import InputError, OutOfMemory
from megalodon.inference.session import Session
from megalodon.profiling import baseline, meter, model_timing, timing
from megalodon.profiling.explain import explain
from megalodon.profiling.meter import Row
from megalodon.profiling.timing import Request, profile
from megalodon.training.activations import kept_by_part
from megalodon.training.plan import TrainConfig
from megalodon_kernels import KernelError
from megalodon_kernels.costs import COSTS

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _known_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "matmul_rate", lambda *_: 1e11)
    monkeypatch.setattr(meter, "copy_rate", lambda *_: 1e10)


def request(*what: str, **changes) -> Request:
    given = {"train": TrainConfig(max_steps=1, batch_tokens=74), "repeats": 1, "window": 37, "lengths": (37,)}
    given |= {"depths": (0, 1_000_000), "new_tokens": (2,)}
    given |= {"model_config": tiny_config(), "device": CPU, "what": what}
    return Request(**(given | changes))


def test_kernels_have_both_passes_of_every_op_with_their_error() -> None:
    report = profile(request("kernels", lengths=(20, 37)))
    passes = ("forward", "backward")
    steps = [("norm_cema_step", "forward", None), ("attention_step", "forward", None)]  # have no length: once
    ops = [[(op, what, n) for op, cost in COSTS.items() if cost.backward for what in passes] for n in (20, 37)]
    assert [(r.name, r.what, r.shape.get("L")) for r in report.rows] == [*ops[0], *steps, *ops[1]]
    for row in report.rows:
        assert row.error is not None and 0 < row.error < 1e-5 and row.error_tokens == row.shape.get("L", 1)
        assert row.backend == "portable" and row.dtype == "fp32"
        assert row.ms_low <= row.ms <= row.ms_high
        assert row.tflops == pytest.approx(row.flops / row.ms / 1e9)
        assert row.gb_per_s == pytest.approx(row.bytes / row.ms / 1e6)
        assert (row.matmul_share, row.copy_share) == (pytest.approx(row.tflops / 0.1), pytest.approx(row.gb_per_s / 10))
        assert row.floor_ms == pytest.approx(max(row.flops / 1e8, row.bytes / 1e7))
        assert row.step_share is None if row.name.endswith("_step") else 0 < row.step_share < 1
        assert (row.kept_bytes is not None) == (row.what == "forward")
    assert report.constants == {"matmul_tflops": 0.1, "copy_gb_per_s": 10.0}
    json.dumps(report.document(), allow_nan=False)


def test_shapes_replace_the_models_and_have_no_share_of_its_step() -> None:
    report = profile(request("kernels", shapes={"cema": [{"B": 2, "D": 8}, {"D": 8, "B": 2}], "rms_norm": [{}]}))
    assert [(r.name, dict(r.shape)) for r in report.rows[::2]] == [
        ("cema", {"B": 2, "L": 37, "D": 8, "N": 3}),
        ("rms_norm", {"B": 1, "L": 37, "D": 24}),
    ]
    assert report.rows[0].step_share is None and report.rows[2].step_share is not None
    with pytest.raises(InputError, match="--shapes: timestep_norm: D 24 is not a multiple of G 5"):
        profile(request("kernels", shapes={"timestep_norm": [{"G": 5}]}))


def test_layers_have_the_block_first_and_every_part_once() -> None:
    rows = profile(request("layers")).rows
    assert [(r.name, r.what) for r in rows[:2]] == [("block", "forward"), ("block", "backward")]
    assert rows[0].step_share + rows[1].step_share == pytest.approx(1)
    names = [r.name for r in rows[2::2]]
    assert {"mega.cema", "mega.timenorm", "mega.attention", "nffn.norm"} <= set(names)
    assert len(names) == len(set(names)) and "mega" not in names


def test_train_counts_tokens_and_its_parts_make_the_step() -> None:
    step, *parts = profile(request("train")).rows
    assert (step.name, dict(step.shape)) == ("step", {"B": 2, "L": 37})
    assert step.tokens_per_s == pytest.approx(74 / step.ms * 1e3)
    assert step.flops == 74 * tiny_config().flops_per_token(37)
    assert {"loss", "optimizer", "rest", "mega.cema"} <= {part.name for part in parts}
    assert sum(part.ms for part in parts) == pytest.approx(step.ms)
    assert step.kept_bytes > 0 and step.peak_bytes > 0


def test_prefill_and_decode_at_depths() -> None:
    rows = profile(request("prefill", "decode", lengths=(12,))).rows
    assert [(r.section, r.shape["depth"], r.shape["tokens"]) for r in rows] == [
        ("prefill", 0, 12), ("prefill", 1_000_000, 12), ("decode", 0, 2), ("decode", 1_000_000, 2),
    ]  # fmt: skip
    for shallow, deep in (rows[:2], rows[2:]):
        assert shallow.flatness == 1 and deep.flatness == pytest.approx(shallow.ms / deep.ms)
        assert deep.tokens_per_s == pytest.approx(deep.shape["tokens"] / deep.ms * 1e3)
    config = tiny_config()
    assert rows[2].bytes == 2 * 4 * (config.num_parameters() - config.vocab_size * config.model_dim)


@pytest.mark.parametrize("depth", [0, 7, 10, 1_000_003])
def test_a_state_at_a_depth_is_one_that_a_session_takes(depth: int) -> None:
    """Its shapes and dtypes are those of a session that has read so many tokens."""
    model = tiny_model(torch.float32)
    made = Session(model, model_timing.state_at(model, depth))
    assert made.position == depth
    made.step(1)
    real = Session(model)
    real.feed([1] * (depth % 10 + 1))  # the same place in the chunk of 10

    def described(session: Session) -> list[tuple[torch.Size, torch.dtype]]:
        found: list[tuple[torch.Size, torch.dtype]] = []
        session.state.map(lambda x: found.append((x.shape, x.dtype)) or x)
        return found

    assert made.position == depth + 1 and described(made) == described(real)
    assert made.logits.isfinite().all()


def test_data_reads_the_loader(tmp_path: Path) -> None:
    loader = Loader(tiny_store(tmp_path / "store"), 37, "doc", seed=0)
    (row,) = profile(request("data", loader=loader)).rows
    assert row.tokens_per_s == pytest.approx(74 / row.ms * 1e3)
    with pytest.raises(InputError, match="data: no token store"):
        profile(request("data"))


def test_bfloat16_and_float64_run() -> None:
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float64, "fp64")):
        rows = profile(request("kernels", "layers", "train", "decode", dtype=dtype, shapes={"rms_norm": [{}]})).rows
        assert {row.dtype for row in rows} == {name}


def test_a_named_backend_runs_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megalodon_kernels.dispatch.INTERPRETED", False)
    for what in ("kernels", "train", "decode"):
        with pytest.raises(KernelError, match="backend triton cannot run: the device is cpu, expected cuda"):
            profile(request(what, backend="triton"))
    rows = profile(request("kernels", backend="reference", shapes={"rms_norm": [{}]})).rows
    assert {row.backend for row in rows} == {"reference"}


@pytest.mark.parametrize("what", ["kernels", "layers", "prefill", "decode", "train"])
def test_what_does_not_fit_is_refused_before_anything_is_allocated(what: str, monkeypatch) -> None:
    monkeypatch.setattr(timing, "available_memory", lambda _: 1 << 30)
    # at 10^9 tokens an attempt to allocate would take more than this machine has
    huge = request(what, lengths=(10**9,), model_config=tiny_config(value_dim=1 << 20))
    with pytest.raises(OutOfMemory, match=rf"^{what}: .* needs about [\d,.]+ GiB \(estimated\); cpu has 1.0 GiB free"):
        profile(huge)


def test_a_model_in_half_of_the_bytes_is_made_in_all_of_them() -> None:
    """It is float32 before it is converted: an estimate of what is left would let a CPU run out of memory."""
    half = dict(model_timing.needs("decode", request("decode", dtype=torch.bfloat16)))
    full = dict(model_timing.needs("decode", request("decode")))
    config = tiny_config()
    chunk = 2 * config.num_layers * config.chunk_size * (config.z_dim + config.value_dim)
    assert list(half.values()) == [need - chunk for need in full.values()]


def test_a_prompt_of_any_length_takes_no_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr(Session, "feed", lambda self, ids: given.append(ids))
    profile(request("prefill", lengths=(10**12,), depths=(0,)))
    first = iter(given[-1])
    assert not hasattr(given[-1], "__len__") and [next(first) for _ in range(3)] == [0, 1, 2]


def test_the_estimate_of_a_block_is_near_what_it_keeps() -> None:
    """Not below half of it, or runs would die; not above four times of it, or runs that fit would be refused."""
    config = tiny_config(model_dim=128, value_dim=256, z_dim=64, ffn_hidden_dim=256, chunk_size=64, vocab_size=8)
    model = tiny_model(torch.float32, **config.model_dump())
    tokens = torch.zeros(1, 4096, dtype=torch.int64)
    kept = sum(kept_by_part(model, lambda: model.hidden(tokens)[0]).values()) / config.num_layers / 4096
    assert kept / 2 < model_timing._kept_per_token(config) < 4 * kept


def test_the_trace_names_what_was_timed(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    profile(request("kernels", "decode", shapes={"rms_norm": [{}]}, traced=path))
    names = {event["name"] for event in json.loads(path.read_text())["traceEvents"]}
    assert {"rms_norm forward B 1 L 37 D 24", "decode at depth 1,000,000"} <= names
    assert any(name.startswith("aten::") for name in names)


ROW = Row("kernels", "cema", "forward", {"B": 1, "L": 37}, "fp32", "portable", 2.0, 1.9, 2.1)


def stored(path: Path, **changes) -> Path:
    header = {"device": "this one", "threads": 1} | changes.pop("header", {})
    result = {"header": header, "constants": {}, "rows": [ROW.document()]} | changes.pop("result", {})
    path.write_text(json.dumps({"schema": baseline.SCHEMA, "ok": True, "result": result} | changes))
    return path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "machine", lambda _: {"device": "this one", "threads": 1})


@pytest.mark.usefixtures("here")
def test_a_baseline_gives_the_time_of_every_row_but_what_is_left_of_a_step(tmp_path: Path) -> None:
    rest = replace(ROW, section="train", name=meter.REST, ms=-0.3)  # parts may take longer alone than in their step
    path = stored(tmp_path / "old.json", result={"rows": [ROW.document(), rest.document()]})
    assert baseline.load(path, CPU) == {"kernels cema forward B1 L37 fp32 portable": 2.0}
    assert baseline.Change("a row", 2.0, 3.0).slowdown == 0.5


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "megalodon/profile/0"}, r"its schema is megalodon/profile/0, expected megalodon/profile/1"),
        ({"header": {"device": "an A100"}}, r"was measured on an A100, this is this one: not comparable"),
        ({"header": {"threads": 64}}, r"was measured with 64 threads, these are 1: not comparable"),
        ({"result": {"rows": [{"ms": 1}]}}, "missing or damaged"),
        ({"result": {"rows": [ROW.document() | {"ms": -1}]}}, "missing or damaged"),
        ({"result": {"rows": [ROW.document() | {"ms": "inf"}]}}, "missing or damaged"),
        ({"result": {"rows": []}}, "missing or damaged"),
        ({"result": {"rows": None}}, "missing or damaged"),
        ({"result": {"header": {}}}, "missing or damaged"),
    ],
)
def test_a_baseline_that_cannot_be_compared_with_is_one_line(changes, message: str, tmp_path: Path) -> None:
    path = stored(tmp_path / "old.json", **changes)
    with pytest.raises(InputError, match=message) as error:
        baseline.load(path, CPU)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b'"x"', b"[" * 100_000])
def test_a_corrupt_baseline_is_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"not JSON|its schema is"):
        baseline.load(path, CPU)
    with pytest.raises(InputError, match="no such file"):
        baseline.load(tmp_path / "none.json", CPU)


def test_a_row_is_explained_by_what_binds_it() -> None:
    rates = {"matmul_tflops": 1.0, "copy_gb_per_s": 100.0}
    slow = replace(ROW, flops=1e6, bytes=1e7, floor_ms=0.1)
    assert "bound by memory: 10 MB take 0.1 ms" in explain(slow, rates) and "20x of that" in explain(slow, rates)
    fast = replace(ROW, flops=1.5e9, bytes=1e3, floor_ms=1.5)
    assert "bound by arithmetic: 1.5 GFLOP take 1.5 ms" in explain(fast, rates) and "1.33x of that, near" in explain(
        fast, rates
    )
    assert "a cache held a part" in explain(replace(slow, ms=0.05), rates)
    assert explain(ROW, rates) is None
