"""Lists of numbers, shares and shapes as `profile` reads them, and what is wrong with one in a line."""

import pytest

from megalodon.errors import InputError
from megalodon.profiling import numbers

OPS = {"cema": "B L D N", "rms_norm": "B L D"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512", (512,)),
        ("512,32Ki", (512, 32768)),
        ("512-4Ki*2", (512, 1024, 2048, 4096)),
        ("1-10*3", (1, 3, 9)),
        ("0,4k,1Mi", (0, 4000, 1 << 20)),
        ("8,8,4-8*2", (8, 4)),
    ],
)
def test_lists_ranges_and_suffixes(text: str, expected: tuple[int, ...]) -> None:
    assert numbers.counts(text, "-d", 0) == expected


@pytest.mark.parametrize("text", ["", "x", "5,,6", "-5", "1.5", "4-2*2", "1-8", "1-8*1", "0-8*2", "1-8*x", "5Kib"])
def test_what_is_no_number_is_named(text: str) -> None:
    with pytest.raises(InputError, match=r"^-p: `.*` of `.*`: expected numbers such as 512,32Ki or a range"):
        numbers.counts(text, "-p")


def test_numbers_that_are_too_small_or_too_many() -> None:
    with pytest.raises(InputError, match=r"^-p: 0 is too small: expected at least 1"):
        numbers.counts("0", "-p")
    with pytest.raises(InputError, match=r"^-d: 9223372036854775807 is too large: expected at most 1125899906842624"):
        numbers.counts("9223372036854775807", "-d", 0)
    with pytest.raises(InputError, match="more than 100 numbers"):
        numbers.counts(",".join(map(str, range(1, 102))), "-p")


def test_shares() -> None:
    assert numbers.share("10%", "--fail-over") == numbers.share("0.1", "--fail-over") == 0.1
    for text in ("ten", "-1", "10%%", "nan", "inf", ""):
        with pytest.raises(InputError, match=r"^--fail-over: `.*` is not a share such as 10% or 0.1"):
            numbers.share(text, "--fail-over")


def test_a_list_of_shapes_is_for_every_op() -> None:
    found = numbers.shapes('[{"L": "4Ki", "N": 8}, {"B": 2}]', OPS)
    assert found == {"cema": [{"L": 4096, "N": 8}, {"B": 2}], "rms_norm": [{"L": 4096}, {"B": 2}]}


def test_shapes_of_some_ops(tmp_path) -> None:
    text = '{"rms_norm": [{"D": 7}]}'
    assert numbers.shapes(text, OPS) == {"rms_norm": [{"D": 7}]}
    (tmp_path / "shapes.json").write_text(text)
    assert numbers.shapes(str(tmp_path / "shapes.json"), OPS) == {"rms_norm": [{"D": 7}]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "--shapes: not JSON"),
        (" ", "--shapes: it is empty; expected JSON such as"),
        ("[]", "--shapes: the list is empty; expected shapes such as"),
        ("[" * 100_000, "--shapes: not JSON"),
        ("nope.json", "--shapes nope.json: no such file or directory; expected JSON such as"),
        ('{"cemma": [{}]}', "--shapes: no op `cemma`; did you mean cema?"),
        ('{"zzz": [{}]}', "--shapes: no op `zzz`; ops: cema, rms_norm"),
        ("{}", "--shapes: expected a list of shapes, or op -> list"),
        ('{"cema": []}', "--shapes: cema: expected a list of shapes"),
        ('{"cema": [4]}', "--shapes: cema: `4` is no shape"),
        ('{"cema": [{"M": 4}]}', "--shapes: cema: no size `M` here; sizes: B, D, L, N"),
        ('{"cema": [{"L": "many"}]}', '--shapes: cema: L is "many"; expected a count'),
        ('{"cema": [{"L": 0}]}', "--shapes: cema: L is 0; expected a count"),
        ('{"cema": [{"L": 1.5}]}', "--shapes: cema: L is 1.5; expected a count"),
        ('{"cema": [{"L": true}]}', "--shapes: cema: L is true; expected a count"),
        ('[{"Q": 1}]', "--shapes: no size `Q` here"),
    ],
)
def test_a_wrong_shape_is_one_line(text: str, message: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        numbers.shapes(text, OPS)
    assert str(error.value).startswith(message), error.value
    assert "\n" not in str(error.value)
