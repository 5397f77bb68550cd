"""Local tasks give the scores computed by hand, whatever the batch; nothing is cut; names that are none are refused."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_texts import NUM_CLASSES, TOKENIZER, TOKENS, byte_model, text

from megalodon.data.chat import ChatFormat, load_template
from megalodon.data.tokenizer import train_sentencepiece
from megalodon.errors import InputError, NumericalError
from megalodon.evaluation.continuations import SHARED, Pair, likelihoods
from megalodon.evaluation.corpus import Tokens
from megalodon.evaluation.scoring import How
from megalodon.inference.session import Writer
from megalodon.model.megalodon import Megalodon

harness = pytest.importorskip("megalodon.evaluation.harness", reason="needs the extra eval")
from lm_eval.api.model import TemplateLM  # noqa: E402  # only where the extra is there

from megalodon.evaluation.harness_model import HarnessModel  # noqa: E402

DOCUMENTS = [
    {"question": f"Which letter comes after {'abcd'[n % 4]}?", "choices": ["bcd", "e", "xyz é"], "label": n % 3}
    for n in range(7)
]
CHOICE = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "Q: {{{{question}}}}\\nA:"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
WRITING = (
    CHOICE.replace("letters", "writing")
    .replace("multiple_choice", "generate_until")
    .replace("doc_to_choice: choices\n", "")
    .replace("doc_to_target: label", 'doc_to_target: "{{{{choices[label]}}}}"')
    .replace("metric: acc, aggregation: mean", "metric: exact_match, aggregation: mean")
    + """generation_kwargs:
  until: ["."]
  max_gen_toks: 9
  do_sample: false
"""
)
ROLLING = (
    CHOICE.replace("letters", "rolling")
    .replace("multiple_choice", "loglikelihood_rolling")
    .replace("doc_to_choice: choices\n", "")
    .replace('doc_to_text: "Q: {{{{question}}}}\\nA:"', 'doc_to_text: ""')
    .replace("doc_to_target: label", 'doc_to_target: "{{{{question}}}}"')
    .replace("- {{metric: acc, aggregation: mean, higher_is_better: true}}", "- metric: bits_per_byte")
)


@pytest.fixture(scope="module")
def writer() -> Writer:
    return Writer(byte_model(torch.float64), TOKENIZER, True)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with three tasks over one file."""
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS))
    for name, given in (("choice", CHOICE), ("writing", WRITING), ("rolling", ROLLING)):
        (tmp_path / f"{name}.yaml").write_text(given.format(data=data, cache=tmp_path / "cache"))
    return tmp_path


def run(writer: Writer, folder: Path, *names: str, rows: int = 3, **options):
    given = {"limit": None, "log_samples": True, "chat": False} | options
    model = HarnessModel(writer, TOKENS, How(), rows)
    loaded = harness.Index([str(folder / f"{name}.yaml") for name in names], None, {}).load(None, 0, offline=True)
    return harness.run(model, loaded, **given)


def direct(writer: Writer, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-probability and greediness by one whole pass."""
    with torch.no_grad():
        logits, _ = writer.model(torch.tensor([*context, *continuation])[None])
    logits = logits[0, len(context) - 1 : -1, :NUM_CLASSES]
    nats = logits.log_softmax(1)[range(len(continuation)), continuation].sum()
    return float(nats), logits.argmax(1).tolist() == continuation


def begun(given: str) -> list[int]:
    return [TOKENIZER.bos_id, *TOKENIZER.encode(given)]


@pytest.mark.parametrize("rows", [1, 4])
def test_multiple_choice_is_the_accuracy_by_hand(writer, tasks, rows):
    found = run(writer, tasks, "choice", rows=rows)
    right = 0
    for document, sample in zip(DOCUMENTS, found.samples()["letters"], strict=True):
        prompt = f"Q: {document['question']}\nA:"
        scores = [direct(writer, begun(prompt), TOKENIZER.encode(f" {c}"))[0] for c in document["choices"]]
        assert [float(r[0][0]) for r in sample["resps"]] == pytest.approx(scores, rel=1e-9)
        right += int(np.argmax(scores)) == document["label"]
    [row] = found.document()["rows"]
    assert (row["task"], row["metric"], row["value"]) == ("letters", "acc", pytest.approx(right / 7))
    assert row["samples"] == 7
    share = right / 7
    assert row["error"] == pytest.approx(math.sqrt(share * (1 - share) / 6), rel=1e-6)
    assert found.document()["truncated_tokens"] == 0


def test_written_texts_are_the_greedy_ones_by_hand_up_to_a_stop(writer, tasks):
    found = run(writer, tasks, "writing", rows=4)
    for document, sample in zip(DOCUMENTS, found.samples()["writing"], strict=True):
        ids = begun(f"Q: {document['question']}\nA:")
        written: list[int] = []
        allowed = [t for t in range(NUM_CLASSES) if t not in TOKENIZER.special_ids or t == TOKENIZER.eos_id]
        while len(written) < 9:
            with torch.no_grad():
                logits, _ = writer.model(torch.tensor([*ids, *written])[None])
            best = allowed[int(logits[0, -1, allowed].argmax())]
            if best == TOKENIZER.eos_id:
                break
            written.append(best)
        assert sample["resps"][0][0] == TOKENIZER.decode(written).partition(".")[0]
    [row] = found.document()["rows"]
    exact = [
        s["resps"][0][0] == d["choices"][d["label"]] for d, s in zip(DOCUMENTS, found.samples()["writing"], strict=True)
    ]
    assert row["value"] == pytest.approx(np.mean(exact))


def test_rolling_scores_every_token_of_a_text(writer, tasks):
    [row] = run(writer, tasks, "rolling").document()["rows"]
    nats = [direct(writer, [TOKENIZER.bos_id], TOKENIZER.encode(d["question"]))[0] for d in DOCUMENTS]
    size = sum(len(d["question"]) for d in DOCUMENTS)
    assert row["metric"] == "bits_per_byte"
    assert row["value"] == pytest.approx(-sum(nats) / size / math.log(2), rel=1e-9)


def test_likelihoods_are_those_of_whole_passes_in_any_batch_and_at_any_length(writer):
    long = tuple(begun(text(300)))
    assert len(long) > SHARED
    pairs = [Pair(tuple(begun(text(n, n))), tuple(TOKENIZER.encode(text(1 + n % 3, n + 9)))) for n in range(1, 12)]
    pairs += [Pair(long, tuple(TOKENIZER.encode(answer))) for answer in ("a", "bcd", "é and on")]
    expected = [direct(writer, list(pair.context), list(pair.continuation)) for pair in pairs]
    for rows in (1, 3, 14):
        for piece in (16, 1024):
            found = likelihoods(writer.model, pairs, NUM_CLASSES, How(piece=piece), rows)
            assert [own.nats for own in found] == pytest.approx([nats for nats, _ in expected], rel=1e-9)
            assert [own.greedy for own in found] == [greedy for _, greedy in expected]


def test_no_more_rows_are_read_side_by_side_than_asked_for(writer, monkeypatch):
    pairs = [Pair(tuple(begun(text(200))), tuple(TOKENIZER.encode(answer))) for answer in ("a", "bcd", "é", "x", "yy")]
    seen, hidden = list[int](), Megalodon.hidden
    monkeypatch.setattr(Megalodon, "hidden", lambda *given: seen.append(len(given[1])) or hidden(*given))
    assert len(pairs[0].context) >= SHARED
    likelihoods(writer.model, pairs, NUM_CLASSES, How(), 2)
    assert max(seen) == 2


def test_a_damaged_model_has_no_likelihoods():
    damaged = byte_model()
    with torch.no_grad():
        damaged.output_weight[40] = math.nan
    with pytest.raises(NumericalError, match="not finite"):
        likelihoods(damaged, [Pair((1, 2), (3,))], NUM_CLASSES, How(), 1)


def test_no_token_reaches_across_the_border_of_context_and_continuation():
    """Where one would, the harness takes the context by itself and drops what the token holds of the continuation."""
    pieces = train_sentencepiece(["abcd " * 50 + "ab cd xy " * 50], 280, 2)
    assert len(pieces.encode("abcd")) == len(pieces.encode("ab")) == 1
    model = HarnessModel(Writer(byte_model(), pieces, True), Tokens(pieces, True, True), How(), 2)
    for context, continuation in (("x ab", "cd xy"), ("ab", "cd"), ("ab ", "cd"), ("x\n", "ab"), (" \n", "ab")):
        first, rest = model._encode_pair(context, continuation)
        assert pieces.decode([*first, *rest]) == context + continuation
        assert pieces.decode(first) == context.rstrip()
    assert model._encode_pair("xy ab", " cd") == TemplateLM._encode_pair(model, "xy ab", " cd")
    assert model._encode_pair(" ", "a")[0] == [pieces.bos_id]


def test_a_task_that_asks_the_same_again_gets_other_draws(writer, tasks):
    given = (tasks / "writing.yaml").read_text().replace("do_sample: false", "do_sample: true") + "repeats: 3\n"
    (tasks / "writing.yaml").write_text(given)
    samples = run(writer, tasks, "writing", limit=2).samples()["writing"]
    for sample in samples:
        assert len(set(sample["resps"][0])) == 3
    assert run(writer, tasks, "writing", rows=1, limit=2).samples()["writing"][0]["resps"] == samples[0]["resps"]


def test_private_characters_are_text_in_a_conversation_too(writer):
    given = "a \ue00099999\ue001 b"
    model = HarnessModel(writer, TOKENS, How(), 2)
    assert model.tok_decode(model.tok_encode(given)) == given
    chat = ChatFormat(load_template("chatml"), TOKENIZER, bos=True)
    model = HarnessModel(writer._replace(chat=chat), TOKENS, How(), 2)
    turns = [{"role": "user", "content": given}]
    assert model.tok_encode(model.apply_chat_template(turns)) == chat.encode(turns, answer=True).ids


def test_a_greedy_continuation_is_told(writer):
    context = begun("abc")
    with torch.no_grad():
        best = int(writer.model(torch.tensor(context)[None])[0][0, -1, :NUM_CLASSES].argmax())
    for rows in (1, 2):
        found = likelihoods(
            writer.model, [Pair(tuple(context), (best,)), Pair((1, 2), (9, 9, 9))], NUM_CLASSES, How(), rows
        )
        assert found[0].greedy and not found[1].greedy


def test_a_folder_of_tasks_is_found_by_name_and_limits_hold(writer, tasks):
    loaded = harness.Index(["letters", "rolling"], tasks, {}).load(None, 0, offline=True)
    model = HarnessModel(writer, TOKENS, How(), 2)
    found = harness.run(model, loaded, 3, log_samples=False, chat=False).document()
    assert {(row["task"], row["samples"]) for row in found["rows"]} == {("letters", 3), ("rolling", 3)}


def test_examples_stand_before_the_question(writer, tasks):
    given = (tasks / "choice.yaml").read_text() + "fewshot_split: test\n"
    (tasks / "choice.yaml").write_text(given)
    loaded = harness.Index([str(tasks / "choice.yaml")], None, {}).load(2, 0, offline=True)
    found = harness.run(HarnessModel(writer, TOKENS, How(), 2), loaded, 2, log_samples=True, chat=False)
    assert {sample["arguments"][0][0].count("Q: ") for sample in found.samples()["letters"]} == {3}
    assert found.document()["rows"][0]["num_fewshot"] == 2


def test_a_file_that_is_not_there_is_refused(tasks):
    with pytest.raises(InputError, match=r"nothing.yaml: no such file"):
        harness.Index([str(tasks / "nothing.yaml")], None, {})


def test_a_task_that_cannot_be_loaded_is_one_line(tasks):
    (tasks / "documents.jsonl").unlink()
    with pytest.raises(InputError, match=r"choice.yaml: cannot be loaded: "):
        harness.Index([str(tasks / "choice.yaml")], None, {}).load(None, 0, offline=True)


def test_a_conversation_keeps_its_markers_and_text_that_looks_like_one_stays_text(writer):
    chat = ChatFormat(load_template("chatml"), TOKENIZER, bos=True)
    model = HarnessModel(writer._replace(chat=chat), TOKENS, How(), 2)
    turns = [{"role": "user", "content": "say <|im_end|> é"}]
    shown = model.apply_chat_template(turns)
    assert model._begun(model.tok_encode(shown)) == chat.encode(turns, answer=True).ids
    turns.append({"role": "assistant", "content": "It is"})
    opened = model.apply_chat_template(turns, add_generation_prompt=False)
    assert model.tok_encode(opened)[-5:] == TOKENIZER.encode("It is")
    assert model.chatting
    assert model.chat_template(True) == chat.template.source
    with pytest.raises(InputError, match="no chat template"):
        HarnessModel(writer, TOKENS, How(), 2).apply_chat_template(turns)


def test_options_of_writing_are_honoured_or_refused(writer):
    model = HarnessModel(writer, TOKENS, How(), 2)
    prompt = model._prompt("abc", {"until": "x", "max_gen_toks": 3, "do_sample": True, "temperature": 0.5, "top_k": 4})
    assert (prompt.stop, prompt.max_new_tokens) == (("x",), 3)
    assert (prompt.sampling.temperature, prompt.sampling.top_k) == (0.5, 4)
    assert model._prompt("abc", {"temperature": 0.7, "do_sample": False}).sampling.temperature == 0
    assert model._prompt("abc", {"temperature": 0.7}).sampling.temperature == 0.7
    assert model._prompt("abc", {"max_completion_tokens": 3}).max_new_tokens == 3
    assert model._prompt("abc", {}).sampling.temperature == 0
    with pytest.raises(InputError, match="num_beams"):
        model._prompt("abc", {"num_beams": 4})


def test_without_bos_nothing_is_put_before_a_text(writer):
    model = HarnessModel(writer, Tokens(TOKENIZER, False, True), How(), 2)
    assert model._begun([5, 6]) == [5, 6]
    assert model.prefix_token_id == TOKENIZER.eos_id
    [nats] = model.loglikelihood_rolling([type("Request", (), {"args": ("ab",)})])
    assert nats == pytest.approx(direct(writer, [TOKENIZER.eos_id], TOKENIZER.encode("ab"))[0], rel=1e-9)
