"""Conversations as ids: what is trained on, what ends a turn, that turn by turn and as a whole are the same."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalodon.data import template
from megalodon.data.chat import BUILT_IN, ChatFormat, ChatTemplate, default_template, load_template
from megalodon.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, train_sentencepiece
from megalodon.errors import DataError

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "Now this."},
]
UNMARKED = """\
{% for message in messages %}[{{ message.role }}] {{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"""
"""As many a model's: nothing says what is trained on; the newline belongs to the next turn."""


def chat(name: str = "chatml", tokenizer: Tokenizer | None = None) -> ChatFormat:
    """A format of a template that is shipped, or of its source."""
    given = load_template(name) if name in BUILT_IN else ChatTemplate("mine", name)
    return ChatFormat(given, tokenizer or ByteTokenizer(), bos=True)


def trained_texts(format: ChatFormat, turns: list[dict[str, str]], **options: str) -> list[str]:
    return [text for text, trained in format.describe(format.encode(turns, **options)) if trained]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["plain", "chatml", UNMARKED], ids=["plain", "chatml", "unmarked"])
def test_the_assistants_turns_are_trained_with_what_ends_them(name: str) -> None:
    format = chat(name)
    end = "<|im_end|>" if name == "chatml" else "<eos>"
    assert trained_texts(format, TURNS) == [f"Hello{end}", f"Now this.{end}"]
    assert trained_texts(format, TURNS, trained="last") == [f"Now this.{end}"]
    encoded = format.encode(TURNS, trained="all")
    assert encoded.trained == [False] + [True] * (len(encoded.ids) - 1)  # of BOS nothing is a target


@pytest.mark.parametrize("name", ["plain", "chatml", UNMARKED], ids=["plain", "chatml", "unmarked"])
def test_turn_by_turn_is_as_a_whole(name: str) -> None:
    tokenizer = ByteTokenizer()
    format = chat(name, tokenizer)
    read = format.encode(TURNS[:2], answer=True).ids
    for number in (2, 4):
        answer = tokenizer.encode(TURNS[number]["content"])
        assert read + answer == format.encode(TURNS[: number + 1]).ids[: len(read) + len(answer)]
        read += [*answer, *format.stop_ids]
        if number + 1 < len(TURNS):
            more = format.continuation(TURNS[: number + 1], TURNS[: number + 2])
            assert more is not None
            read += more
            assert read == format.encode(TURNS[: number + 2], answer=True).ids


def test_turn_by_turn_is_as_a_whole_with_pieces(pieces: SentencePieceTokenizer) -> None:
    for name in BUILT_IN:
        format = chat(name, pieces)
        whole = format.encode(TURNS[:4], answer=True).ids
        first = format.encode(TURNS[:2], answer=True).ids
        answer = pieces.encode_array(TURNS[2]["content"], begins=False).tolist()
        rest = format.continuation(TURNS[:3], TURNS[:4])
        assert rest is not None
        assert [*first, *answer, *format.stop_ids, *rest] == whole


@pytest.fixture(scope="module")
def pieces() -> SentencePieceTokenizer:
    """A small SentencePiece model."""
    return train_sentencepiece(["User Assistant system hello now this and that is brief " * 30], 330, reserve=16)


def test_a_template_that_rewrites_earlier_turns_is_found_out() -> None:
    format = chat(
        "{% for m in messages[-2:] %}{{ m.role }}: "
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"
    )
    assert format.continuation(TURNS[1:3], TURNS[1:4]) is None
    rewriting = UNMARKED.replace("{{ message.content }}", "{{ message.content }}{{ messages | length }}")
    with pytest.raises(DataError, match=r"writes turn 2 differently once more turns follow.*generation"):
        chat(rewriting).encode(TURNS[1:])


@given(st.text(st.sampled_from(list("<|im_endstar>\ufdd0\ufdd1\ufdd2\ufdd3\ufdd4é🦈 \n-0123456789")), max_size=60))
def test_what_people_write_never_passes_for_a_marker(text: str) -> None:
    tokenizer = ByteTokenizer()
    for name in BUILT_IN:
        format = ChatFormat(load_template(name), tokenizer, bos=True)
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text + "."}]
        plain = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
        encoded, usual = format.encode(turns), format.encode(plain)
        specials = [token for token in encoded.ids if token in tokenizer.special_ids]
        assert specials == [token for token in usual.ids if token in tokenizer.special_ids]
        asked, answered = text.encode(), (text + ".").encode()
        whole = b"".join(tokenizer.token_bytes(token) for token in encoded.ids)
        assert whole.count(answered) >= 1
        assert len(whole) == len(b"".join(map(tokenizer.token_bytes, usual.ids))) + len(asked) + len(answered) - 2


def test_markers_take_reserved_ids_then_new_rows() -> None:
    assert chat("chatml", ByteTokenizer(reserve=2)).markers == {"<|im_start|>": 4, "<|im_end|>": 5}
    few = ByteTokenizer(reserve=1)
    format = chat("chatml", few)
    assert format.markers == {"<|im_start|>": 4, "<|im_end|>": few.vocab_size}
    assert format.new_rows == 1
    assert format.stop_ids == {few.vocab_size}
    assert default_template(few).name == "plain"
    assert default_template(ByteTokenizer()).name == "chatml"


def test_reserved_ids_of_pieces(pieces: SentencePieceTokenizer) -> None:
    assert pieces.reserved_ids == tuple(range(3, 19))


def test_a_format_is_saved_with_the_model(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    assert ChatFormat.load(tmp_path, tokenizer, bos=True) is None
    format = chat()
    format.save(tmp_path)
    again = ChatFormat.load(tmp_path, tokenizer, bos=True)
    assert again is not None
    assert again.encode(TURNS) == format.encode(TURNS)
    assert (again.template, again.markers) == (format.template, format.markers)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("chat_template.jinja", "{{ 1 }}", "sha256 is .*the template was changed"),
        ("chat.json", "{", "chat.json: .*expected name, sha256 and markers"),
        (
            "chat.json",
            '{"name": "x", "sha256": "y", "markers": {"<|im_start|>": -1}}',
            "an id of a marker is no number",
        ),
        ("chat.json", "[]", "expected name, sha256 and markers"),
    ],
)
def test_a_damaged_format_is_refused(tmp_path: Path, file: str, content: str, said: str) -> None:
    chat().save(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=said):
        ChatFormat.load(tmp_path, ByteTokenizer(), bos=True)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for m in messages %}{{ m.content }}", "line 1: Unexpected end of template"),
        ("{{ raise_exception('roles must\nalternate') }}", "roles must alternate"),
        ("{{ messages[0].__class__.__mro__ }}", "unsafe"),
        ("{{ 'a' * 100000000000 }}", "needs more than 1,024 MiB|ended its process"),
        ("{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}", "wrote more than"),
        ("{{ messages[0].content }}", "nothing ends the assistant's turn"),
        ("{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}", "stands inside another"),
        ("{{ undefined.field.other }}", "undefined"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(source: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        chat(source)
    assert "\n" not in str(caught.value)


def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.5)
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match=r"took longer than 0.5 s for one conversation"):
        chat(endless)


def test_a_foreign_template_runs_outside_this_process() -> None:
    renderer = template.Renderer("{{ messages[0].content }}", trusted=False)
    assert renderer.render({"messages": [{"content": "é🦈\ud800\n"}]}) == "é🦈\ud800\n"
    process = renderer._process
    assert process is not None
    process.kill()
    process.wait()
    with pytest.raises(template.TemplateError, match="ended its process"):
        renderer.render({"messages": [{"content": "x"}]})
    assert renderer.render({"messages": [{"content": "again"}]}) == "again"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama", "expected plain, chatml or a file ending in .jinja"),
        ("no.jinja", "no such file.*expected a chat template"),
    ],
)
def test_no_template(name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load_template(name)


def test_files_that_are_no_template(tmp_path: Path) -> None:
    for number, (content, said) in enumerate([(b"\xff", "byte 0 is not UTF-8"), (b"a" * 70_000, "more than 65,536")]):
        path = tmp_path / f"{number}.jinja"
        path.write_bytes(content)
        with pytest.raises(DataError, match=said):
            load_template(str(path))


def test_half_a_surrogate_is_refused() -> None:
    with pytest.raises(DataError, match="surrogate"):
        chat().encode([{"role": "user", "content": "\ud800"}])


def test_markers_of_another_template_keep_the_ids_the_model_has_learnt() -> None:
    tokenizer = ByteTokenizer(reserve=3)
    learnt = chat("chatml", tokenizer).markers
    source = "{# first <|im_end|>, then <|tool|> #}" + BUILT_IN["chatml"]
    other = ChatFormat(ChatTemplate("mine", source), tokenizer, bos=True, learnt=learnt)
    assert other.markers == {"<|im_end|>": 5, "<|tool|>": 6, "<|im_start|>": 4}
    assert other.encode(TURNS) == chat("chatml", tokenizer).encode(TURNS)
    few = ByteTokenizer(reserve=1)
    more = ChatFormat(ChatTemplate("mine", source), few, bos=True, learnt=chat("chatml", few).markers)
    assert more.markers == {"<|im_end|>": few.vocab_size, "<|tool|>": few.vocab_size + 1, "<|im_start|>": 4}
    assert more.new_rows == 2


@pytest.mark.parametrize("tag", ["{%+ generation %}", "{%- generation +%}"])
def test_a_mark_is_seen_however_it_treats_white_space(tag: str) -> None:
    format = chat(BUILT_IN["chatml"].replace("{% generation %}", tag))
    assert format.encode(TURNS) == chat().encode(TURNS)
