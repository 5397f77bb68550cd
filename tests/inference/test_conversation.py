"""Conversations: what the model has read is what was said, after every way to go on, back and aside."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from factories import tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalodon.data.chat import BUILT_IN, ChatFormat, ChatTemplate, load_template
from megalodon.data.tokenizer import ByteTokenizer
from megalodon.errors import DataError, InputError
from megalodon.inference.conversation import (
    KEPT,
    Conversation,
    Reading,
    entry_json,
    entry_of,
    exported,
)
from megalodon.inference.sampling import SamplingConfig
from megalodon.inference.session import Answering, GivenUp, Owner, Session, Snapshot, Writer
from megalodon.inference.session_file import KEPT_TURNS, load_history
from megalodon.model.megalodon import Megalodon
from megalodon.model.state import State

TOKENIZER = ByteTokenizer(reserve=2)
SIZES = {"vocab_size": TOKENIZER.vocab_size + 5, "chunk_size": 16}
HOW = Answering(SamplingConfig(seed=3), max_new_tokens=7)


class Recorder(Session):
    """A session that writes down every id it has read."""

    def __init__(self, model: Megalodon) -> None:
        self.ids: list[int] = []
        self._at: dict[int, tuple[Snapshot, list[int]]] = {}
        super().__init__(model)

    def feed(self, ids: Iterable[int]) -> torch.Tensor:
        given = list(ids)
        logits = super().feed(given)
        self.ids = self.ids + given
        return logits

    def step(self, token: int) -> torch.Tensor:
        logits = super().step(token)
        self.ids = [*self.ids, token]
        return logits

    def snapshot(self) -> Snapshot:
        made = super().snapshot()
        self._at[id(made)] = made, self.ids  # kept alive, or another would get its id
        return made

    def rewind(self, snapshot: Snapshot, state: State | None = None) -> None:
        super().rewind(snapshot, state)
        self.ids = self._at[id(snapshot)][1] if id(snapshot) in self._at else []


@pytest.fixture(scope="module")
def model() -> Megalodon:
    return tiny_model(torch.float32, **SIZES).eval()


def talk_of(model: Megalodon, template: str | None = "chatml", system: str | None = None) -> Conversation:
    """A conversation whose session records."""
    chat = None
    if template is not None:
        given = load_template(template) if template in BUILT_IN else ChatTemplate("mine", template)
        chat = ChatFormat(given, TOKENIZER, bos=True)
    return Conversation(Writer(model, TOKENIZER, True, chat), Recorder(model), system)


def read_ids(talk: Conversation) -> list[int]:
    assert isinstance(talk.session, Recorder)
    return talk.session.ids


def agrees(talk: Conversation) -> bool:
    """Whether the session stands where one that read the same ids at once would."""
    fresh = Session(talk.writer.model).feed(read_ids(talk))
    # Splits change the order of float32 sums: some 1e-6 of logits of order 1.
    return torch.allclose(fresh, talk.session.logits, rtol=1e-4, atol=1e-5)


def say(talk: Conversation, text: str, how: Answering = HOW) -> str:
    return "".join(talk.ask(text, how))


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_what_was_read_is_what_the_template_writes(model, template):
    talk = talk_of(model, template, system="Be brief.")
    chat = talk.writer.chat
    assert chat is not None
    first = say(talk, "Hello")
    opening = chat.encode(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}], answer=True
    )
    assert read_ids(talk)[: len(opening.ids)] == opening.ids
    assert read_ids(talk)[-1] == talk.end
    before = read_ids(talk)
    second = say(talk, "And?")
    rest = chat.continuation(talk.messages[:3], talk.messages[:4])
    assert rest is not None
    assert read_ids(talk)[len(before) : len(before) + len(rest)] == rest
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in talk.messages][1:] == ["Hello", first, "And?", second]
    assert talk.turns == 2
    assert agrees(talk)


def test_answers_end_by_length_stop_text_and_will(model):
    talk = talk_of(model)
    say(talk, "Hello", HOW._replace(max_new_tokens=30))
    assert talk.answer is not None
    assert (talk.answer.finish, talk.answer.new_tokens) == ("length", 30)
    talk.undo()
    writing = talk.ask("Hello", HOW._replace(sampling=SamplingConfig(seed=2)), lambda: len(writing.ids) == 5)
    cut = "".join(writing)
    assert talk.answer.finish == "interrupted"
    assert talk.answer.new_tokens == 5
    assert talk.messages[-1]["content"] == cut
    assert read_ids(talk)[-1] == talk.end
    assert agrees(talk)


def test_the_end_of_turn_ends_an_answer(model):
    talk = talk_of(model)
    only_end = torch.zeros(SIZES["vocab_size"], dtype=torch.bool)
    only_end[talk.end] = True
    talk._allowed = only_end
    assert say(talk, "Hello") == ""
    assert talk.answer is not None
    assert talk.answer.finish == "stop"
    assert read_ids(talk).count(talk.end) == 2  # the user's and the assistant's


def test_undo_and_retry(model):
    talk = talk_of(model)
    first = say(talk, "one")
    at_first = read_ids(talk)
    say(talk, "two")
    undone = talk.undo()
    assert [entry["role"] for entry in undone] == ["user", "assistant"]  # type: ignore[index]
    assert read_ids(talk) == at_first
    assert agrees(talk)
    assert "".join(talk.retry(HOW)) != first  # another seed
    assert talk.turns == 1
    assert agrees(talk)
    talk.undo()
    assert (talk.entries, talk.session.position) == ((), 0)
    with pytest.raises(InputError, match="1 cannot be undone; turns and files that can: 0"):
        talk.undo()
    with pytest.raises(InputError, match="no answer to write again"):
        list(talk.retry(HOW))


def test_only_so_many_turns_can_be_undone(model):
    talk = talk_of(model)
    for number in range(KEPT + 3):
        say(talk, str(number), HOW._replace(max_new_tokens=1))
    with pytest.raises(InputError, match=f"{KEPT + 1} cannot be undone; turns and files that can: {KEPT}"):
        talk.undo(KEPT + 1)
    talk.undo(KEPT)
    assert talk.turns == 3
    assert agrees(talk)


def test_branches_stand_apart(model):
    talk = talk_of(model)
    say(talk, "one")
    talk.branch("other")
    say(talk, "two")
    other = talk.entries
    talk.checkout("main")
    assert talk.turns == 1
    say(talk, "three")
    assert agrees(talk)
    talk.checkout("other")
    assert talk.entries == other
    assert agrees(talk)
    assert talk.branches == ["main", "other"]
    for name in ("main", "other"):
        with pytest.raises(InputError, match=f"branch {name} exists"):
            talk.branch(name)
    with pytest.raises(InputError, match="no branch third; there are: main, other"):
        talk.checkout("third")
    assert talk.new(None) == "talk-2"
    assert talk.session.position == 0
    assert talk.current == "talk-2"
    talk.checkout("other")
    assert talk.entries == other


def test_files_stand_between_turns(model):
    talk = talk_of(model)
    book = TOKENIZER.encode("A book of some length. " * 5)
    about = Reading("book.txt", "0" * 64, len(book))
    talk.read(iter(book), lambda: about)
    say(talk, "What was it?")
    assert read_ids(talk)[: len(book) + 1] == [TOKENIZER.bos_id, *book]
    assert read_ids(talk).count(TOKENIZER.bos_id) == 1
    say(talk, "And?")
    talk.read(iter(book), lambda: about)
    say(talk, "Again?")
    assert agrees(talk)
    assert [entry for entry in talk.entries if isinstance(entry, Reading)] == [about, about]
    assert all(isinstance(entry_of(entry_json(entry)), type(entry)) for entry in talk.entries)
    assert [entry_of(entry_json(entry)) for entry in talk.entries] == list(talk.entries)
    with pytest.raises(InputError, match="no answer to write again"):
        talk.read(iter(book), lambda: about)
        list(talk.retry(HOW))


def test_a_file_that_breaks_off_leaves_nothing(model):
    talk = talk_of(model)
    say(talk, "one")
    before, ids = talk.entries, read_ids(talk)

    def broken():
        yield from TOKENIZER.encode("x" * 100)
        raise DataError("byte 100 is not UTF-8")

    with pytest.raises(DataError):
        talk.read(broken(), lambda: Reading("x", "", 0))
    assert talk.entries == before
    assert read_ids(talk) == ids
    assert agrees(talk)
    say(talk, "two")
    assert agrees(talk)


def test_an_answer_that_is_dropped_leaves_nothing(model):
    talk = talk_of(model)
    say(talk, "one")
    before, ids = talk.entries, read_ids(talk)
    answer = talk.ask("two", HOW)
    next(answer)
    answer.close()
    assert (talk.entries, read_ids(talk)) == (before, ids)
    assert agrees(talk)


def test_a_retry_that_is_broken_off_gives_the_answer_back(model, monkeypatch):
    talk = talk_of(model)
    say(talk, "one")
    say(talk, "two")
    before, ids = talk.entries, read_ids(talk)
    answer = talk.retry(HOW)
    next(answer)
    answer.close()
    assert (talk.entries, read_ids(talk)) == (before, ids)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(talk, "ask", interrupted)
        talk.retry(HOW)
    assert (talk.entries, read_ids(talk)) == (before, ids)
    assert talk.undo(2) == before


def test_a_turn_that_is_given_up_while_it_is_read_leaves_nothing(model):
    talk = talk_of(model)
    talk.session.piece = 32
    say(talk, "one")
    before, ids = talk.entries, read_ids(talk)
    asked = iter([False] * 100)
    answer = talk.ask("word " * 100, HOW, lambda: next(asked, True))
    with pytest.raises(GivenUp):
        list(answer)
    assert (talk.entries, read_ids(talk)) == (before, ids)
    assert agrees(talk)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_system_text_belongs_to_its_branch_and_to_a_template(model):
    talk = talk_of(model, system="Be brief.")
    say(talk, "one")
    talk.new("Be long.")
    say(talk, "two")
    talk.checkout("main")
    assert talk.system == "Be brief."
    raw = Conversation(talk.writer, Session(model), raw=True)
    before = raw.branches
    with pytest.raises(InputError, match="--raw uses none"):
        raw.new("Be brief.")
    assert (raw.system, raw.branches) == (None, before)


def test_a_turn_that_has_its_answer_is_not_answered_again(model):
    talk = talk_of(model)
    say(talk, "one")
    with pytest.raises(InputError, match="has its answer"):
        talk.go_on(HOW)
    with pytest.raises(InputError, match="has its answer"):
        talk.samples(None, HOW, 2)


def test_a_template_that_rewrites_is_read_anew(model):
    rewriting = "{% for m in messages %}{{ m.role }}{{ messages | length // 9 }}: " + (
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "assistant{{ messages | length // 9 }}: {% endif %}"
    )
    talk = talk_of(model, rewriting)
    for number in range(6):
        say(talk, str(number))
    chat = talk.writer.chat
    assert chat is not None
    assert TOKENIZER.decode(read_ids(talk)).startswith("user1: 0\n")
    assert agrees(talk)
    fresh = talk_of(model, rewriting)
    fresh.read(iter(TOKENIZER.encode("a book")), lambda: Reading("b", "", 6))
    for number in range(4):
        say(fresh, str(number))
    with pytest.raises(InputError, match="writes earlier turns anew, and files that were read"):
        say(fresh, "4")
    assert fresh.turns == 4


def test_without_a_template_the_text_goes_on(model):
    talk = talk_of(model, None)
    first = say(talk, "Once")
    say(talk, " more")
    assert read_ids(talk)[:5] == [TOKENIZER.bos_id, *TOKENIZER.encode("Once")]
    assert read_ids(talk).count(TOKENIZER.bos_id) == 1
    assert agrees(talk)
    assert first == talk.messages[1]["content"]
    with pytest.raises(InputError, match="needs a chat template"):
        talk_of(model, None, system="x")


def test_bad_turns_change_nothing(model):
    talk = talk_of(model)
    for bad, fault in (("", "the turn is empty"), (" \n", "the turn is empty")):
        with pytest.raises(InputError, match=fault):
            say(talk, bad)
    with pytest.raises(DataError, match="surrogate"):
        say(talk, "\ud800")
    assert (talk.entries, talk.session.position) == ((), 0)


def test_an_exported_conversation_is_a_line_of_messages(model):
    talk = talk_of(model, system="Be brief.")
    say(talk, "a\nb")
    line = exported(talk.messages)
    assert line.count("\n") == 1
    assert json.loads(line) == {"messages": [dict(message) for message in talk.messages]}


def act_on(talk: Conversation, act: str, number: int) -> bool:
    """Take one step of a path; whether it could be taken."""
    try:
        if act == "ask":
            say(talk, f"turn {number}")
        elif act == "undo":
            talk.undo()
        elif act == "retry":
            list(talk.retry(HOW))
        elif act == "branch":
            talk.branch(f"b{number}")
        elif act == "checkout":
            talk.checkout(talk.branches[number % len(talk.branches)])
        elif act == "read":
            talk.read(iter(TOKENIZER.encode(f"file {number} " * 3)), lambda: Reading("f", "", 1))
        else:
            talk.new(None)
    except InputError:
        return False
    return True


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["ask", "ask", "undo", "retry", "branch", "checkout", "read", "new"]), max_size=14))
def test_every_path_stands_where_its_ids_lead(model, path):
    talk = talk_of(model)
    for number, act in enumerate(path):
        if act_on(talk, act, number):
            assert talk.session.position == len(read_ids(talk))
            assert not read_ids(talk) or agrees(talk)


OWNER = Owner("1" * 64, TOKENIZER.sha256, None, "tiny")


def saved(talk: Conversation, path: Path, *, kv: bool = False) -> Conversation:
    """The conversation out of its own file."""
    talk.writer = talk.writer._replace(owner=OWNER)
    talk.save(path, kv=kv)
    return Conversation.load(talk.writer, path)


def near(one: Conversation, other: Conversation) -> bool:
    assert one.session.position == other.session.position
    if not one.session.position:
        return True
    its = other.session.branch().feed([7, 8])
    return torch.allclose(one.session.branch().feed([7, 8]), its, rtol=1e-4, atol=1e-5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from(["ask", "ask", "undo", "retry", "branch", "checkout", "read"]), min_size=1, max_size=9),
    st.booleans(),
)
def test_a_conversation_from_its_file_is_the_same(model, tmp_path, path, kv):
    """After every path: what was said, where it stands, what can be undone, and every branch."""
    talk = talk_of(model, system="Be brief.")
    for number, act in enumerate(path):
        act_on(talk, act, number)
    if not talk.session.position:
        return
    other = saved(talk, tmp_path / "a.mega", kv=kv)
    assert (other.entries, other.current, other.branches) == (talk.entries, talk.current, talk.branches)
    assert other.system == "Be brief."
    assert near(talk, other)
    for name in talk.branches:
        talk.checkout(name)
        other.checkout(name)
        assert other.entries == talk.entries
        assert near(talk, other)
    back = saved(talk, tmp_path / "b.mega")
    for _ in range(min(KEPT_TURNS, len(talk._earlier))):
        assert back.undo() == talk.undo()
        assert near(talk, back)
    if not talk.turns:
        greedy = HOW._replace(sampling=SamplingConfig(temperature=0))
        assert say(back, "And?", greedy) == say(talk, "And?", greedy)
        assert back.entries == talk.entries


@pytest.mark.parametrize("template", ["plain", "chatml", None])
def test_a_transcript_is_read_again(model, tmp_path, template):
    talk = talk_of(model, template, system=None if template is None else "Be brief.")
    book = TOKENIZER.encode("A book of some length. " * 5)
    talk.read(iter(book), lambda: Reading("book.txt", "0" * 64, len(book)))
    for text in ("one", "two"):
        say(talk, text)
        talk.entries = (*talk.entries[:-1], {"role": "assistant", "content": "An answer."})  # whose ids are its text's
    saved(talk, tmp_path / "a.mega")
    asked = []

    def read(its: Conversation, entry: Reading) -> None:
        asked.append(entry)
        its.read(iter(book), lambda: entry)

    again = Conversation.rebuild(talk.writer, load_history(tmp_path / "a.mega"), read)
    assert asked == [entry for entry in talk.entries if isinstance(entry, Reading)]
    assert again.entries == talk.entries
    straight = talk_of(model, template, system=None if template is None else "Be brief.")
    straight.read(iter(book), lambda: asked[0])
    for text in ("one", "two"):
        straight.session.feed(straight._opening((*straight.messages, *straight._new(text))))
        straight.session.feed([*TOKENIZER.encode("An answer."), *([straight.end] if template else [])])
        straight.entries = talk.entries[: len(straight.entries) + len(straight._new(text)) + 1]
    assert near(straight, again)
    again.undo()
    assert again.turns == 1


def test_a_system_text_before_any_turn_is_kept_when_a_transcript_is_read_again(model, tmp_path):
    talk = talk_of(model, system="Be brief.")
    book = TOKENIZER.encode("A book.")
    talk.read(iter(book), lambda: Reading("book.txt", "0" * 64, len(book)))
    saved(talk, tmp_path / "a.mega")
    again = Conversation.rebuild(
        talk.writer, load_history(tmp_path / "a.mega"), lambda its, entry: its.read(iter(book), lambda: entry)
    )
    assert again.system == "Be brief."
    say(again, "one")
    assert again.messages[0] == {"role": "system", "content": "Be brief."}


def test_a_model_of_no_directory_has_no_session_files(model, tmp_path):
    talk = talk_of(model)
    say(talk, "one")
    with pytest.raises(InputError, match="of no model directory"):
        talk.save(tmp_path / "a.mega")
    with pytest.raises(InputError, match="of no model directory"):
        Conversation.load(talk.writer, tmp_path / "a.mega")


@pytest.mark.parametrize("norm_stats", ["cumulative", "window"])
def test_the_repetition_penalty_of_samples_sees_the_question(model, norm_stats):
    how = Answering(SamplingConfig(temperature=0, repetition_penalty=9.0), 12)
    talk = Conversation(Writer(model, TOKENIZER, True), Session(model, norm_stats=norm_stats))
    text = "".join(map(chr, range(32, 127)))
    (sample,) = talk.samples(text, how, 1)
    assert sample.text == "".join(talk.ask(text, how))


def test_samples_leave_no_trace(model):
    talk = talk_of(model)
    say(talk, "one")
    before = talk.entries
    several = talk.samples("two", HOW, 3)
    assert talk.entries == before
    assert agrees(talk)
    for number, sample in enumerate(several):
        how = HOW._replace(sampling=SamplingConfig(seed=HOW.sampling.seed + number - talk._asked))
        assert "".join(talk.ask("two", how)) == sample.text
        talk.undo()
