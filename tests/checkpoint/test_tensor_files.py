"""Every tensor is in the files exactly once, or they are refused by their headers, before anything is allocated."""

import hashlib
import json
import math
import time
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from megalodon.checkpoint import tensor_files
from megalodon.checkpoint.tensor_files import (
    Box,
    Form,
    check_coverage,
    count_files,
    form_of,
    read_all_boxes,
    read_boxes,
    read_tensors,
    write_tensors,
)
from megalodon.errors import CheckpointError
from megalodon.profiling.shapes_only import LiveBytes


def tensors() -> dict[str, Tensor]:
    """A matrix with a NaN, its transpose in another layout, a scalar, nothing, booleans, bytes, half precision."""
    matrix = torch.arange(35.0).reshape(5, 7)
    matrix[2, 3] = math.nan
    return {
        "model.a": matrix,
        "model.t": torch.arange(12.0).reshape(3, 4).T,
        "optim.step.a": torch.tensor(3.0),
        "model.none": torch.zeros(0, 6),
        "model.flags": torch.tensor([True, False, True]),
        "model.bytes": torch.arange(5, dtype=torch.uint8),
        "model.half": torch.arange(6).to(torch.bfloat16),
    }


def forms(of: dict[str, Tensor]) -> dict[str, Form]:
    return {name: form_of(tensor) for name, tensor in of.items()}


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(one, 7.5), torch.nan_to_num(other, 7.5)) and one.dtype == other.dtype


@pytest.mark.parametrize("limit", [10**9, 100, 1])
def test_every_kind_of_tensor_comes_back_bit_by_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", limit)
    written, found = tensors(), {name: torch.full_like(tensor, 1) for name, tensor in tensors().items()}
    write_tensors(tmp_path, written)
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == count_files(written) and all(name.startswith("shard-00001-") for name in files)
    boxes = read_all_boxes(tmp_path, len(written))
    check_coverage(boxes, forms(written), tmp_path)
    read_tensors(boxes, found)
    assert all(same(found[name], tensor) for name, tensor in written.items())


def cut(tmp_path: Path) -> dict[str, Tensor]:
    """A matrix in three pieces, as three ranks write it."""
    whole = {"w": torch.arange(42.0).reshape(6, 7)}
    for number, (rows, columns) in enumerate((((0, 2), (0, 7)), ((2, 6), (0, 4)), ((2, 6), (4, 7)))):
        places = json.dumps({"w": {"saved_offsets": [rows[0], columns[0]]}})
        piece = {"w": whole["w"][slice(*rows), slice(*columns)].contiguous()}
        save_file(piece, tmp_path / f"shard-{number}.safetensors", metadata={"DCP_SHARDING_INFO": places})
    return whole


def test_pieces_of_several_ranks_make_a_whole(tmp_path: Path) -> None:
    whole = cut(tmp_path)
    boxes, found = read_all_boxes(tmp_path, 1), {"w": torch.zeros(6, 7)}
    check_coverage(boxes, forms(whole), tmp_path)
    read_tensors(boxes, found)
    assert torch.equal(found["w"], whole["w"])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_lost_file_is_noticed_by_its_header_and_by_what_stays_unfilled(tmp_path: Path, number: int) -> None:
    whole = cut(tmp_path)
    (tmp_path / f"shard-{number}.safetensors").unlink()
    boxes = read_all_boxes(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"w has (28|26|30) of 42 values"):
        check_coverage(boxes, forms(whole), tmp_path)
    with pytest.raises(CheckpointError, match="never filled: w"):
        read_tensors(boxes, {"w": torch.zeros(6, 7)})


@st.composite
def partitions(draw: st.DrawFn) -> tuple[Form, list[Box]]:
    """A tensor of up to three dimensions, cut again and again at random."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=0, max_size=3)))
    pieces = [((0,) * len(shape), shape)]
    for _ in range(draw(st.integers(0, 4))):
        offsets, sizes = pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        wide = [axis for axis, size in enumerate(sizes) if size > 1]
        if not wide:
            pieces.append((offsets, sizes))
            continue
        axis = draw(st.sampled_from(wide))
        at = draw(st.integers(1, sizes[axis] - 1))
        rest = [(o + at if a == axis else o) for a, o in enumerate(offsets)]
        left = [(at if a == axis else n) for a, n in enumerate(sizes)]
        right = [(n - at if a == axis else n) for a, n in enumerate(sizes)]
        pieces += [(offsets, tuple(left)), (tuple(rest), tuple(right))]
    boxes = [Box(Path(f"{n}"), "w", o, Form(s, "float32")) for n, (o, s) in enumerate(pieces)]
    return Form(shape, "float32"), boxes


@given(partitions(), st.data())
def test_a_partition_covers_and_without_or_with_one_more_piece_does_not(
    made: tuple[Form, list[Box]], data: st.DataObject
) -> None:
    form, boxes = made
    check_coverage(boxes, {"w": form}, "x")
    one = data.draw(st.sampled_from(boxes))
    with pytest.raises(CheckpointError, match=r"w (is missing|has [\d,]+ of [\d,]+ values)"):
        check_coverage([box for box in boxes if box is not one], {"w": form}, "x")
    with pytest.raises(CheckpointError, match="w has two pieces for the same place"):
        check_coverage([*boxes, one._replace(path=Path("again"))], {"w": form}, "x")
    if form.shape:
        moved = one._replace(offsets=tuple(n + 6 for n in one.offsets))
        with pytest.raises(CheckpointError, match=r"w has a piece .* outside of"):
            check_coverage([moved if box is one else box for box in boxes], {"w": form}, "x")


def test_all_that_is_wrong_is_listed() -> None:
    boxes = [Box(Path("a"), name, (0,), Form((3,), "float32")) for name in ("extra", "other", "short")]
    expected = {"other": Form((3,), "float64"), "short": Form((4,), "float32"), "gone": Form((), "float32")}
    with pytest.raises(CheckpointError) as caught:
        check_coverage(boxes, expected, "step")
    assert str(caught.value).split(": ", 1)[1].split("; ") == [
        "extra is unexpected",
        "other is float32, expected float64",
        "short has 3 of 4 values",
        "gone is missing",
    ]


def file_of(header: Any, num_bytes: int = 0, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(num_bytes)


def entry(begin: int, end: int, shape: list[Any], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


PAIR = {"a": entry(0, 8, [2]), "b": entry(8, 12, [1])}
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has 0 bytes and a header of 0; it was cut off"),
    "seven bytes": (b"\0" * 7, "has 7 bytes and a header of 0; it was cut off"),
    "a header beyond the end": (file_of({}, 0, 2**63), "it was cut off"),
    "no JSON": (file_of(b"{'a'}"), "its header cannot be read"),
    "no UTF-8": (file_of(b'{"\xff": 1}'), "its header cannot be read"),
    "deeply nested": (file_of(b"[" * 60_000), "its header cannot be read"),
    "an endless number": (file_of(b"9" * 50_000), "its header cannot be read"),
    "a list": (file_of([1]), "its header is none of safetensors"),
    "a name twice": (
        file_of(b'{"a": {"dtype":"U8","shape":[1],"data_offsets":[0,1]}, "a": {}}', 1),
        "a stands in it twice",
    ),
    "too many": (file_of({f"{n}": entry(n, n + 1, [1], "U8") for n in range(4)}, 4), "holds 4 tensors; expected at m"),
    "an overlap": (file_of({**PAIR, "b": entry(4, 8, [1])}, 12), "b begins at byte 4 of the data; expected 8"),
    "a gap": (file_of({**PAIR, "b": entry(9, 13, [1])}, 13), "b begins at byte 9 of the data; expected 8"),
    "bytes too few": (file_of(PAIR, 11), "holds 11 bytes of data; its header describes 12"),
    "bytes too many": (file_of(PAIR, 13), "holds 13 bytes of data; its header describes 12"),
    "a huge shape": (file_of({"a": entry(0, 4, [2**40, 2**40])}, 4), r"a is F32 \(1099511627776, 1099511627776\) in 4"),
    "a negative shape": (file_of({"a": entry(0, 4, [-1, -1])}, 4), "its header is none of safetensors"),
    "a shape of words": (file_of({"a": entry(0, 4, ["1"])}, 4), "its header is none of safetensors"),
    "a shape of booleans": (file_of({"a": entry(0, 4, [True])}, 4), "its header is none of safetensors"),
    "an unknown dtype": (file_of({"a": entry(0, 4, [1], "X9")}, 4), "its header is none of safetensors: KeyError"),
    "backward": (file_of({"a": entry(4, 0, [1])}, 4), r"a is F32 \(1,\) in -4 bytes"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [1]}}, 4), "its header is none of safetensors"),
    "an entry of words": (file_of({"a": "b"}, 4), "its header is none of safetensors"),
    "metadata of words": (file_of({"__metadata__": "x", **PAIR}, 12), "its header is none of safetensors"),
    "a piece without a place": (
        file_of({"__metadata__": {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [0]}}'}, **PAIR}, 12),
        "its header is none of safetensors: KeyError",
    ),
    "a place of another rank": (
        file_of({"__metadata__": {"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [0, 0]}}'}, "a": entry(0, 8, [2])}, 8),
        "its header is none of safetensors",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_header_that_lies_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content, said = BAD[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"bad.safetensors.*{said}") as caught:
        read_boxes(path, 3)
    assert len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_a_header_of_100_megabytes_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "long.safetensors"
    with path.open("wb") as file:
        file.write((100 * 2**20).to_bytes(8, "little"))
        file.truncate(101 * 2**20)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="its header has 104,857,600 bytes; expected at most 75,776"):
            read_boxes(path, 10)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_two_ranks_wrote_is_read_by_the_distributed_checkpoints_of_pytorch(tmp_path: Path) -> None:
    """Files of several ranks stay readable without us."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    whole = {"w": torch.arange(42.0).reshape(6, 7), "n": torch.tensor(3)}
    first = write_tensors(tmp_path, {"w": whole["w"][:4], "n": whole["n"]}, places={"w": ((0, 0), (6, 7))})
    second = write_tensors(tmp_path, {"w": whole["w"][4:]}, places={"w": ((4, 0), (6, 7))}, rank=1)
    assert [*first, *second] == sorted(path.name for path in tmp_path.iterdir())
    for name, about in {**first, **second}.items():
        content = (tmp_path / name).read_bytes()
        assert about == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    found = {"w": torch.zeros(6, 7), "n": torch.tensor(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process which reads
        load(found, storage_reader=HuggingFaceStorageReader(str(tmp_path)))
    assert all(torch.equal(found[name], tensor) for name, tensor in whole.items())


def test_a_file_is_written_tensor_by_tensor(tmp_path: Path) -> None:
    """Copied is what does not lie in memory as it will in the file: one at a time."""
    tensors = {str(n): torch.full((256, 512), float(n)).T for n in range(8)}
    tracemalloc.start()
    try:
        with LiveBytes() as live:
            write_tensors(tmp_path, tensors)
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()
    assert live.peak() == tensors["0"].nbytes


def test_thousands_of_pieces_are_checked_in_no_time() -> None:
    """A tensor over 2,048 ranks, cut in two ways: not every piece beside every other."""
    form, columns = Form((4096, 64), "float32"), (0, 32)
    boxes = [Box(Path("x"), "w", (row, at), Form((4, 32), "float32")) for row in range(0, 4096, 4) for at in columns]
    begin = time.process_time()
    check_coverage(reversed(boxes), {"w": form}, "x")
    assert time.process_time() - begin < 0.5
    with pytest.raises(CheckpointError, match="two pieces for the same place"):
        check_coverage([*boxes, boxes[999]._replace(path=Path("y"))], {"w": form}, "x")
