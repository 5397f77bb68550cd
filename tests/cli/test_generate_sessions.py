"""`megalodon generate` with files: --read, --state, --save-state, --rebuild, --samples, --input, chat templates."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from factories import endless, tiny_model
from typer.testing import CliRunner

from megalodon.checkpoint.tensors import save_model
from megalodon.data.chat import ChatFormat, load_template
from megalodon.data.tokenizer import ByteTokenizer
from megalodon_cli.app import app
from megalodon_cli.chat_screen import Interrupts

TOKENIZER = ByteTokenizer(reserve=2)
SIZES = {"vocab_size": TOKENIZER.vocab_size, "chunk_size": 16}
BOOK = "It was a dark and stormy night; the rain fell in torrents.\n" * 9


def save(directory: Path, *, template: str = "", seed: int = 0) -> Path:
    def files(place: Path) -> None:
        TOKENIZER.save(place)
        if template:
            ChatFormat(load_template(template), TOKENIZER, bos=True).save(place)

    meta = {"tokenizer_sha256": TOKENIZER.sha256, "bos": True, "recipe": {"name": "tiny"}, "step": 1900}
    save_model(endless(tiny_model(torch.float32, seed, **SIZES), [TOKENIZER.eos_id]), directory, files, meta)
    return directory


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for name, values in {"text": {}, "chat": {"template": "chatml"}, "other": {"seed": 5}}.items():
        save(place / name, **values)
    return place


@pytest.fixture
def text(models, tmp_path, monkeypatch) -> Path:
    """A model that continues text, in an empty working directory with a book."""
    monkeypatch.chdir(tmp_path)
    Path("book.txt").write_text(BOOK)
    return models / "text"


@pytest.fixture
def chat(text, models) -> Path:
    """The same, of a model with a chat template."""
    return models / "chat"


def run(*arguments: object, stdin: str | None = None):
    return CliRunner().invoke(app, ["generate", *map(str, arguments)], input=stdin)


def body(*arguments: object) -> dict:
    result = run(*arguments, "--seed", 1, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["result"]


def refused(result, *words: str, code: int = 2) -> None:
    assert result.exit_code == code, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]


# ----------------------------------------------------------------------------------------------- sessions


def test_a_session_never_takes_the_place_of_another_file(text):
    for target in ("book.txt", text / "model.safetensors"):
        before = Path(target).read_bytes()
        done = run(text, "--read", "book.txt", "--save-state", target)
        refused(done, "is there and is no session")
        assert "read book.txt" not in done.stderr  # said before anything is read
        assert Path(target).read_bytes() == before


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_read(text, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.W_OK)
    done = run(text, "--read", "book.txt", "--save-state", "book.mega")
    refused(done, "book.mega: the folder . cannot be written to", code=3)
    assert "read book.txt" not in done.stderr


@pytest.mark.parametrize("kv", [(), ("--kv",)])
def test_a_book_is_read_once_and_asked_often(text, kv):
    done = run(text, "--read", "book.txt", "--save-state", "book.mega", *kv)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    count = len(BOOK) + 1
    assert f"read book.txt: {count - 1:,} tokens in " in done.stderr
    assert f"context {count:,}, state " in done.stderr
    assert f"saved book.mega: {Path('book.mega').stat().st_size / 1e3:.0f} kB, {count:,} tokens" in done.stderr
    before = Path("book.mega").read_bytes()
    asked = body(text, "--state", "book.mega", "-p", "And then", "-n", 30)
    Path("all.txt").write_text(BOOK + "And then")
    assert asked["text"] == body(text, "-f", "all.txt", "-n", 30)["text"]
    assert asked["context"] == count + len("And then") + 30
    assert Path("book.mega").read_bytes() == before
    # Without a prompt it simply goes on.
    assert body(text, "--state", "book.mega", "-n", 9)["text"] == body(text, "-f", "book.txt", "-n", 9)["text"]
    assert body(text, "--read", "book.txt", "-n", 9)["text"] == body(text, "-f", "book.txt", "-n", 9)["text"]


@pytest.mark.parametrize("kv", [(), ("--kv",)])
def test_a_text_in_two_runs_is_that_of_one(text, kv):
    greedy = ("--temperature", 0)
    whole = body(text, "-p", "Once", "-n", 40, *greedy)["text"]
    first = body(text, "-p", "Once", "-n", 17, *greedy, "--save-state", "s.mega", *kv)["text"]
    rest = body(text, "--state", "s.mega", "-n", 23, *greedy)["text"]
    # A character of several bytes may be cut between the two.
    assert [c for c in first + rest if c.isascii()] == [c for c in whole if c.isascii()]
    assert len(whole) > 20


def test_several_books_and_more_in_the_same_file(text):
    Path("more.txt").write_text("More.")
    run(text, "--read", "book.txt", "--read", "more.txt", "--save-state", "s.mega")
    run(text, "--state", "s.mega", "--read", "more.txt", "--save-state", "s.mega")
    Path("all.txt").write_text(BOOK + "More.More.")
    assert body(text, "--state", "s.mega", "-n", 9)["text"] == body(text, "-f", "all.txt", "-n", 9)["text"]


def test_another_model_is_refused_and_reads_the_transcript_again(text, models):
    said = body(text, "--read", "book.txt", "-p", "And then", "-n", 5, "--save-state", "book.mega")["text"]
    weights = json.loads((text / "megalodon.json").read_text())["weights_sha256"][:8]
    other = json.loads((models / "other" / "megalodon.json").read_text())["weights_sha256"][:8]
    refused(
        run(models / "other", "--state", "book.mega", "-p", "x"),
        f"book.mega belongs to weights {weights} (tiny, step 1,900), this is {other}; "
        "--rebuild reads its transcript again with this model",
    )
    again = run(models / "other", "--state", "book.mega", "--rebuild", "--save-state", "its.mega")
    assert again.exit_code == 0, again.stderr
    assert "book.mega: reading its transcript again" in again.stderr
    assert "read book.txt: " in again.stderr
    answer = body(models / "other", "--state", "its.mega", "-n", 8, "--temperature", 0)
    assert answer["context"] == 1 + len(BOOK) + len(f"And then{said}".encode()) + 8
    Path("book.txt").write_text("Another book.")
    refused(run(models / "other", "--state", "book.mega", "--rebuild"), "book.txt has sha256", "put that file back")


def test_the_template_belongs_to_a_session(chat, models):
    run(chat, "-p", "Hi", "-n", 4, "--seed", 1, "--save-state", "s.mega")
    bare = shutil.copytree(chat, "bare")
    for name in ("chat.json", "chat_template.jinja"):
        (Path(bare) / name).unlink()
    about = json.loads((Path(bare) / "megalodon.json").read_text())
    about["files"] = {n: f for n, f in about["files"].items() if not n.startswith("chat")}
    (Path(bare) / "megalodon.json").write_text(json.dumps(about))
    refused(run(bare, "--state", "s.mega", "-p", "x"), "s.mega belongs to template", "this model has no template")


def test_a_damaged_session_is_refused(text):
    run(text, "--read", "book.txt", "--save-state", "s.mega")
    raw = Path("s.mega").read_bytes()
    Path("s.mega").write_bytes(raw[:-9])
    refused(run(text, "--state", "s.mega"), "s.mega holds ")
    Path("s.mega").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    refused(run(text, "--state", "s.mega"), "s.mega was changed after it was written")
    refused(run(text, "--state", text / "model.safetensors"), "is no session; expected a file that --save-state")


def test_the_norm_policy_stays_with_the_session(text):
    Path("long.txt").write_text(BOOK * 2)
    window = body(text, "--read", "long.txt", "-n", 20, "--norm-stats", "window")
    assert window["norm_stats"] == "window"
    assert window["text"] != body(text, "--read", "long.txt", "-n", 20)["text"]
    run(text, "--read", "long.txt", "--norm-stats", "window", "--save-state", "w.mega")
    again = body(text, "--state", "w.mega", "-n", 20)
    assert (again["text"], again["norm_stats"]) == (window["text"], "window")
    refused(run(text, "--state", "w.mega", "--norm-stats", "cumulative"), "was read with --norm-stats window")
    refused(run(text, "-p", "x", "--norm-stats", "none"), "--norm-stats", "cumulative")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-p", "x", "--kv"], ["--kv goes with --save-state FILE"]),
        (["-p", "x", "--rebuild"], ["--rebuild goes with --state FILE"]),
        (["--state", "no.mega"], ["no.mega: no such file; expected a session"]),
        (["-p", "x", "--save-state", "no/s.mega"], ["no/s.mega: expected a file in a folder that is there"]),
        (["-p", "x", "--save-state", "."], [".: expected a file in a folder"]),
        (["-p", "x", "--samples", 2, "--save-state", "s.mega"], ["--samples 2: several answers are neither saved"]),
        (["-p", "x", "--samples", 0], ["samples is 0; expected at least 1"]),
        (["--read", "no.txt"], ["no.txt: no such file"]),
        (["--read", "bad.txt"], ["bad.txt: byte 4 is 0xff, which is not UTF-8"]),
        (["--read", "empty.txt"], ["empty.txt: is empty"]),
        (["-p", "x", "--system", "Be brief."], ["a system text needs a chat template"]),
        (["-p", "x", "--system", "@no.txt"], ["no.txt: no such file"]),
        (["--input", "in.jsonl"], ["--input goes with --output OUT.jsonl"]),
        (["-p", "x", "--continue"], ["--output and --continue go with --input IN.jsonl"]),
        (["--input", "in.jsonl", "--output", "out.jsonl", "-p", "x"], ["--input and -p are given"]),
        (["--input", "no.jsonl", "--output", "out.jsonl"], ["no.jsonl: no such file"]),
        (["--input", "bad.txt", "--output", "o.jsonl", "--batch-size", 0], ["batch_size is 0; expected at least 1"]),
        (["--chat", "-p", "x"], ["--chat is given with -p"]),
    ],
)
def test_bad_options_are_one_line(text, arguments, words):
    Path("bad.txt").write_bytes(b"abcd\xff")
    Path("empty.txt").touch()
    result = run(text, *arguments)
    refused(result, *words)
    assert result.stdout == ""
    assert not Path("s.mega").exists()


def test_ctrl_c_ends_the_answer_and_saves_the_session(text):
    command = [sys.executable, "-m", "megalodon_cli", "generate", str(text), "-p", "Once"]
    child = subprocess.Popen(
        [*command, "-n", "1000000", "--temperature", "0", "--save-state", "s.mega"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    assert child.stdout is not None
    child.stdout.read(20)
    time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    _, told = child.communicate(timeout=60)
    assert child.returncode == 130, told
    assert "saved s.mega" in told
    assert body(text, "--state", "s.mega", "-n", 3)["new_tokens"] == 3


def test_ctrl_c_before_the_answer_saves_what_was_read(text, monkeypatch):
    class Asked(Interrupts):
        asked = property(lambda self: True, lambda self, value: None)

    monkeypatch.setattr("megalodon_cli.chat_screen.Interrupts", Asked)
    done = run(text, "--read", "book.txt", "-p", "Once", "-n", 3, "--save-state", "s.mega")
    assert (done.exit_code, done.stdout) == (130, ""), done.stderr
    assert (
        f"saved s.mega: {Path('s.mega').stat().st_size / 1e3:.0f} kB, {len(BOOK) + 1:,} tokens, 0 answers"
        in done.stderr
    )
    done = run(text, "-p", "Once", "-n", 3, "--save-state", "none.mega")
    assert (done.exit_code, done.stdout) == (130, ""), done.stderr
    assert "error" not in done.stderr and not Path("none.mega").exists()


# ----------------------------------------------------------------------------------------------- answers


def test_samples_are_those_of_their_seeds(text):
    several = body(text, "-p", "abc", "-n", 12, "--samples", 3)["samples"]
    assert [sample["seed"] for sample in several] == [1, 2, 3]
    for sample in several:
        alone = run(text, "-p", "abc", "-n", 12, "--seed", sample["seed"], "--json")
        assert json.loads(alone.stdout)["result"]["text"] == sample["text"]
    shown = run(text, "-p", "abc", "-n", 12, "--samples", 3, "--seed", 1)
    assert shown.stdout == "".join(f"{sample['text']}\n" for sample in several)
    assert "sample 3 of 3, seed 3" in shown.stderr
    assert "36 tokens in 3 samples" in shown.stderr


def test_the_chat_template_is_used_unless_raw(chat, text):
    assert body(chat, "-p", "Hello", "-n", 5, "--raw")["prompt_tokens"] == 1 + 5
    form = ChatFormat(load_template("chatml"), TOKENIZER, bos=True)
    turn = {"role": "user", "content": "Hello"}
    expected = len(form.encode([turn], answer=True).ids)
    assert body(chat, "-p", "Hello", "-n", 5)["prompt_tokens"] == expected
    system = {"role": "system", "content": "Be brief."}
    Path("system.txt").write_text("Be brief.")
    for given in ("Be brief.", "@system.txt"):
        found = body(chat, "-p", "Hello", "--system", given, "-n", 5)
        assert found["prompt_tokens"] == len(form.encode([system, turn], answer=True).ids)


def test_a_conversation_goes_on_in_another_run(chat):
    first = body(chat, "-p", "Hello", "--system", "Be brief.", "-n", 6, "--save-state", "s.mega")
    second = body(chat, "--state", "s.mega", "-p", "And?", "-n", 6, "--save-state", "s.mega")
    form = ChatFormat(load_template("chatml"), TOKENIZER, bos=True)
    before = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first["text"]},
    ]
    more = form.continuation(before, [*before, {"role": "user", "content": "And?"}])
    assert second["prompt_tokens"] == len(more)
    refused(run(chat, "--state", "s.mega", "-n", 3), "the last turn of this session has its answer")
    refused(run(chat, "--state", "s.mega", "-p", "x", "--system", "y"), "s.mega holds turns already")
    again = run(chat, "--state", "s.mega", "--rebuild", "--save-state", "again.mega")
    assert again.exit_code == 0, again.stderr
    greedy = ("-p", "So?", "-n", 8, "--temperature", 0)
    assert body(chat, "--state", "again.mega", *greedy)["text"] == body(chat, "--state", "s.mega", *greedy)["text"]


def test_a_system_text_given_later_leaves_the_branches(chat):
    from megalodon.inference.conversation import Conversation
    from megalodon.inference.sampling import SamplingConfig
    from megalodon.inference.session import Answering, Session, load_writer

    writer = load_writer(chat)
    talk = Conversation(writer, Session(writer.model))
    list(talk.ask("Hello", Answering(SamplingConfig(), 3)))
    talk.new(None)
    talk.save(Path("s.mega"))
    done = run(chat, "--state", "s.mega", "--system", "Be brief.", "-p", "x", "-n", 3, "--save-state", "s.mega")
    assert done.exit_code == 0, done.stderr
    found = Conversation.load(writer, Path("s.mega"))
    assert found.branches == talk.branches
    assert found.messages[0] == {"role": "system", "content": "Be brief."}


# ----------------------------------------------------------------------------------------------- files of prompts


def lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_file_of_prompts_is_answered_in_order(text):
    prompts = [
        {"prompt": "Once upon a time", "id": "a", "mine": [1, {"x": None}]},
        {"prompt": "x" * 50, "max_new_tokens": 3},
        {"prompt": "Once", "seed": 77, "temperature": 0.2, "stop": "e"},
        {"prompt": "d'été", "stop": ["a", "b"], "id": 9.5},
        {"prompt": "It", "temperature": 0},
    ]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts) + "\n")
    done = run(text, "--input", "in.jsonl", "--output", "out.jsonl", "-n", 20, "--seed", 4, "--batch-size", 3)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == ""
    assert "out.jsonl: 5 answered, 0 done before, 0 failed; " in done.stderr
    found = lines("out.jsonl")
    assert [line["id"] for line in found] == ["a", 2, 3, 9.5, 5]
    assert [line["seed"] for line in found] == [4, 5, 77, 7, 8]
    for number, (asked, line) in enumerate(zip(prompts, found, strict=True)):
        assert asked.items() <= line.items()
        stop = asked.get("stop", [])
        options = [part for one in ([stop] if isinstance(stop, str) else stop) for part in ("--stop", one)]
        options += ["-n", asked.get("max_new_tokens", 20), "--seed", asked.get("seed", 4 + number)]
        options += ["--temperature", asked["temperature"]] if "temperature" in asked else []
        alone = json.loads(run(text, "-p", asked["prompt"], *options, "--json").stdout)["result"]
        for key in ("text", "finish_reason", "prompt_tokens", "new_tokens"):
            assert line[key] == alone[key], (number, key)


def test_bad_lines_get_their_errors_and_the_rest_goes_on(text):
    mistakes = {
        b"nonsense": "in.jsonl:1: not JSON",
        b'"text"': "in.jsonl:2: expected an object",
        b'{"text": "x"}': "in.jsonl:3: expected either `prompt` or `messages`",
        b'{"prompt": "x", "messages": []}': "in.jsonl:4: expected either",
        b'{"prompt": 3}': "in.jsonl:5: prompt is 3; expected text",
        b'{"prompt": ""}': "in.jsonl:6: the prompt has zero tokens",
        b'{"prompt": "x", "temperature": -1}': "in.jsonl:7: temperature is -1.0; expected 0",
        b'{"prompt": "x", "temperature": NaN}': "in.jsonl:8: temperature is nan",
        b'{"prompt": "x", "max_new_tokens": 0}': "in.jsonl:9: max_new_tokens is 0; expected at least 1",
        b'{"prompt": "x", "seed": "one"}': 'in.jsonl:10: seed is "one"; expected a whole number',
        b'{"prompt": "x", "stop": [3]}': "in.jsonl:11: stop is [3]; expected text or a list",
        b'{"prompt": "x", "stop": ""}': "in.jsonl:12: a stop string is empty",
        b'{"prompt": "\\ud800"}': "in.jsonl:13: ",
        b'{"prompt": "\xff"}': "in.jsonl:14: byte 12 is not UTF-8",
        b'{"messages": [{"role": "user", "content": "x"}]}': "in.jsonl:15: messages need a chat template",
        b'{"prompt": "' + b"x" * (1 << 24) + b'"}': "in.jsonl:16: longer than 16 MiB",
        b'{"prompt": "good", "id": 1}': "in.jsonl:17: id 1 came before",
        b'{"prompt": "x", "temperature": 1' + b"0" * 400 + b"}": "in.jsonl:18: temperature is a number of 401 digits",
    }
    Path("in.jsonl").write_bytes(b"\n".join([*mistakes, b'{"prompt": "good", "id": "last"}']))
    done = run(text, "--input", "in.jsonl", "--output", "out.jsonl", "-n", 2)
    refused(done, "18 lines of in.jsonl could not be used; their errors stand in out.jsonl", code=1)
    found = lines("out.jsonl")
    assert len(found) == 19
    for line, expected in zip(found[:-1], mistakes.values(), strict=True):
        assert line["finish_reason"] == "error"
        assert line["error"].startswith(expected), line["error"]
    assert found[-1]["finish_reason"] == "length"


def test_a_run_that_was_broken_off_goes_on(text):
    Path("in.jsonl").write_text("".join(json.dumps({"prompt": f"line {n}"}) + "\n" for n in range(9)) + "bad\n")
    arguments = (text, "--input", "in.jsonl", "-n", 4, "--seed", 2, "--batch-size", 2)
    run(*arguments, "--output", "whole.jsonl")
    whole = Path("whole.jsonl").read_bytes()
    for cut in (0, 40, len(whole) // 2, len(whole) - 1, len(whole)):
        Path("part.jsonl").write_bytes(whole[:cut])
        done = run(*arguments, "--output", "part.jsonl", "--continue")
        refused(done, "1 lines of in.jsonl could not be used", code=1)
        assert Path("part.jsonl").read_bytes() == whole
    refused(run(*arguments, "--output", "whole.jsonl"), "whole.jsonl is there already; --continue goes on with it")
    refused(run(*arguments, "--output", "book.txt", "--continue"), "book.txt:1: is no answer of ours")
    assert Path("book.txt").read_text() == BOOK


@pytest.mark.parametrize("content", ['{"a": 1}', '{"id": 1, "a": 1}', "notes", '{"a": 1}\n{"b": 2'])
def test_a_file_that_is_no_file_of_answers_is_left_alone(text, content):
    Path("in.jsonl").write_text('{"prompt": "x"}\n')
    Path("mine.json").write_text(content)
    done = run(text, "--input", "in.jsonl", "--output", "mine.json", "--continue", "-n", 2)
    refused(done, "mine.json:1: is no answer of ours")
    assert Path("mine.json").read_text() == content


def test_prompts_are_not_answered_into_their_own_file(text):
    Path("in.jsonl").write_text('{"prompt": "x"}')
    for options in ((), ("--continue",)):
        refused(run(text, "--input", "in.jsonl", "--output", "in.jsonl", *options), "in.jsonl is both --input and")
    assert Path("in.jsonl").read_text() == '{"prompt": "x"}'
    refused(run(text, "--input", "in.jsonl", "--output", "/dev/zero", "--continue"), "/dev/zero: is no regular file")


@pytest.mark.parametrize(("code", "exit_code"), [(errno.ENOSPC, 3), (errno.EPIPE, 0)])
def test_a_full_disk_is_no_mistake_of_the_user_and_a_closed_pipe_none_at_all(text, monkeypatch, code, exit_code):
    Path("in.jsonl").write_text('{"prompt": "x"}\n')

    def broken(number):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", broken)
    monkeypatch.setattr("megalodon_cli.app._closed_pipe", lambda: 0)
    done = run(text, "--input", "in.jsonl", "--output", "out.jsonl", "-n", 2)
    assert done.exit_code == exit_code, done.stderr
    if exit_code:
        refused(done, "out.jsonl: no space left on device; free some, then --continue", code=3)


def test_a_file_of_conversations(chat):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "?"},
    ]
    asked = [
        {"messages": turns},
        {"prompt": "Hi"},
        {"messages": turns[:2]},
        {"messages": [{"role": "bot", "content": "x"}]},
        {"messages": "Hi"},
        {"messages": turns[1:]},
    ]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    done = run(chat, "--input", "in.jsonl", "--output", "out.jsonl", "-n", 5, "--system", "Be brief.", "--json")
    assert done.exit_code == 1
    found = lines("out.jsonl")
    assert [json.loads(line) for line in done.stdout.splitlines()[:6]] == found
    form = ChatFormat(load_template("chatml"), TOKENIZER, bos=True)
    system = {"role": "system", "content": "Be brief."}
    assert found[0]["prompt_tokens"] == len(form.encode([system, *turns], answer=True).ids)
    assert found[1]["prompt_tokens"] == len(form.encode([system, turns[0]], answer=True).ids)
    for line, words in zip(found[2:], ("the last turn is the", "turn 1 is", "expected a list", "turn 2"), strict=True):
        assert words in line["error"]


def test_window_statistics_in_a_file_of_prompts(text):
    Path("in.jsonl").write_text(json.dumps({"prompt": BOOK}) + "\n" + json.dumps({"prompt": "x"}) + "\n")
    run(text, "--input", "in.jsonl", "--output", "out.jsonl", "-n", 9, "--seed", 1, "--norm-stats", "window")
    alone = body(text, "-p", BOOK, "-n", 9, "--norm-stats", "window")
    assert lines("out.jsonl")[0]["text"] == alone["text"]
