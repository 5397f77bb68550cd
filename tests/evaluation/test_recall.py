"""Tasks have right answers, by checkers of their own; prompts have their length; scores are those of the definition."""

import random
import re
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from byte_texts import TOKENIZER, TOKENS, byte_model, text, write

from megalodon.data.tokenizer import train_sentencepiece
from megalodon.errors import DataError, InputError
from megalodon.evaluation import answers, recall
from megalodon.evaluation.answers import DEPTHS, Plan, answer, ask, wilson
from megalodon.evaluation.continuations import Likelihood
from megalodon.evaluation.corpus import Document, Tokens, files
from megalodon.evaluation.listops import MAX_ARGUMENTS, MAX_DEPTH, grow
from megalodon.evaluation.recall import DEPTHLESS, TASKS, Material, Sample, haystack
from megalodon.evaluation.scoring import How

LINES = haystack(None, TOKENS)


@pytest.fixture(scope="module")
def pieces() -> Tokens:
    return Tokens(train_sentencepiece([text(3000, 9), *LINES], 600, 2), True, True)


def sample(task: str, length: int = 1024, depth: float = 0.5, seed: int = 0, tokens: Tokens = TOKENS) -> Sample:
    return TASKS[task](random.Random(seed), Material(tokens, length, depth, LINES))


def prompt(made: Sample, tokens: Tokens = TOKENS) -> str:
    return tokens.tokenizer.decode(made.ids.tolist())


def value_of(written: str) -> int:
    """An evaluator of the notation by a stack, written anew."""
    stack: list[list] = [[]]
    for symbol in written.split():
        if symbol.startswith("["):
            stack.append([symbol[1:]])
        elif symbol == "]":
            name, *values = stack.pop()
            results = {
                "MIN": min(values),
                "MAX": max(values),
                "MED": int(statistics.median(values)),
                "SM": sum(values) % 10,
            }
            stack[-1].append(results[name])
        else:
            stack[-1].append(int(symbol))
    [[found]] = stack
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [700, 1024, 4096])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_prompt_has_its_length_in_the_tokens_of_the_model(task, length, kind, pieces):
    tokens = TOKENS if kind == "bytes" else pieces
    made = sample(task, length, tokens=tokens)
    whole = len(made.ids) + len(tokens.tokenizer.encode_array(made.answer, False))
    assert length - 130 <= whole <= length
    assert made.ids[0] == tokens.tokenizer.bos_id
    if not tokens.tokenizer.spans_lines:
        assert made.ids[1:].tolist() == tokens.tokenizer.encode(prompt(made, tokens))


def test_a_table_is_no_longer_than_asked_for_with_a_tokenizer_that_has_words_of_its_own():
    tokens = Tokens(train_sentencepiece(["mmmmmmmm 999999\n" * 99], 268, 2), True, True)
    for length in range(1000, 1040):
        made = sample("multikey", length, tokens=tokens)
        whole = len(made.ids) + len(tokens.tokenizer.encode_array(made.answer, False))
        assert length - 40 <= whole <= length


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_sample_and_another_seed_another(task):
    assert prompt(sample(task, seed=3)) == prompt(sample(task, seed=3))
    assert prompt(sample(task, seed=3)) != prompt(sample(task, seed=4))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(5))
def test_candidates_are_ten_and_only_one_is_right(task, seed):
    made = sample(task, seed=seed)
    assert len({made.answer, *made.others}) == 10 == 1 + len(made.others)
    assert {len(made.answer)} == {len(other) for other in made.others}


@pytest.mark.parametrize("seed", range(4))
def test_the_answers_stand_in_the_prompt_where_they_are_to_stand(seed):
    for depth in DEPTHS:
        for task, pattern in (
            ("passkey", r"The pass key is( \d{5})\. Remember it"),
            ("needle", r"The number of \w+ is( \d{5})\.\n"),
            ("copy", r"The letters are \w{4}(\w{20})\."),
        ):
            made = sample(task, 3000, depth, seed)
            [found] = re.finditer(pattern, prompt(made))
            assert found[1] == made.answer, task
            assert abs(found.start() / len(prompt(made)) - depth) < 0.1, task
        made = sample("multikey", 3000, depth, seed)
        *table, asked = re.findall(r"The number of (\w+) is( \d{6}|$)", prompt(made))
        assert dict(table)[asked[0]] == made.answer
        assert len(dict(table)) == len(table)
        assert set(made.others) < {number for _, number in table}
        assert abs([name for name, _ in table].index(asked[0]) / len(table) - depth) < 0.1
        made = sample("associative", 3000, depth, seed)
        *pairs, asked = prompt(made).split()
        values = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert f" {values[asked]}" == made.answer
        assert pairs[::2].count(asked) == 1
        assert abs(pairs.index(asked) / len(pairs) - depth) < 0.1
        assert all(values[name] == digit for name, digit in zip(pairs[::2], pairs[1::2], strict=True))


@pytest.mark.parametrize("seed", range(8))
def test_listops_is_the_value_by_another_evaluator(seed):
    made = sample("listops", 2000, seed=seed)
    expression = prompt(made).removesuffix(" =")
    assert int(made.answer) == value_of(expression)
    depth = np.cumsum([(s[0] == "[") - (s == "]") for s in expression.split()])
    assert depth.max() <= MAX_DEPTH and depth[-1] == 0


def test_the_notation_by_hand():
    assert value_of("[MAX 2 9 [MIN 4 7 ] 0 ]") == 9
    assert value_of("[SM 9 [MED 1 2 ] 5 ]") == 5  # the median of two is rounded down
    tree = grow(random.Random(1), 4)
    assert tree.value() == value_of(" ".join(tree.symbols()))
    for length in (4, 50, 5000):
        tree = grow(random.Random(length), length)
        assert length - MAX_ARGUMENTS <= len(tree.symbols()) <= length


def test_the_haystack_is_the_text_of_the_corpus(tmp_path):
    given = [text(400), "one line without end " * 30]
    lines = haystack(files(write(tmp_path / "t", *given)), TOKENS)
    assert "".join(lines) == "".join(given)
    assert max(map(len, lines)) <= 121


def test_of_one_large_document_only_the_beginning_is_read(monkeypatch):
    monkeypatch.setattr(recall, "HAYSTACK", 1000)

    def pieces():
        for _ in range(6):
            yield np.array(TOKENIZER.encode("abc def ghi\n" * 20))
        pytest.fail("it was read to its end")

    corpus = SimpleNamespace(name="c", documents=lambda tokens: [Document("d", pieces)])
    assert len("".join(haystack(corpus, TOKENS))) == 1000


def test_a_corpus_without_text_hides_no_needle(tmp_path):
    with pytest.raises(DataError, match=r"holds no text; expected some, in which a needle"):
        haystack(files(write(tmp_path / "t", " \n")), TOKENS)


def test_too_short_a_length_is_refused():
    for task in TASKS:
        with pytest.raises(InputError, match="--lengths 3: too short"):
            sample(task, 3)
    with pytest.raises(InputError, match="too short for 10 names"):
        sample("multikey", 200)


def test_exact_and_rank_are_those_of_whole_passes():
    model = byte_model()
    for seed in range(6):
        made = sample("associative" if seed % 2 else "passkey", 300, seed=seed)

        def losses(answer: str, made: Sample = made) -> tuple[float, bool]:
            ids = [*made.ids.tolist(), *TOKENIZER.encode(answer)]
            with torch.no_grad():
                logits, _ = model(torch.tensor(ids)[None])
            logits = logits[0, len(made.ids) - 1 : -1, : TOKENIZER.vocab_size]
            own = logits.log_softmax(1)[range(len(answer)), TOKENIZER.encode(answer)].sum()
            return float(own), logits.argmax(1).tolist() == TOKENIZER.encode(answer)

        right, exact = losses(made.answer)
        wrong = [losses(other)[0] for other in made.others]
        _, rank, greedy = answer(model, TOKENS, made, How(piece=64))
        assert (rank, greedy) == (1 + sum(score > right for score in wrong), exact)
        _, window_rank, _ = answer(model, TOKENS, made, How("window"))
        assert 1 <= window_rank <= 10


def test_a_model_that_recalls_is_told_from_one_that_does_not(monkeypatch):
    """With logits that look the answer up, every task of lookup is solved; random weights stay near chance."""
    plan = Plan(("passkey", "copy"), (600,), 3, 0, LINES)
    guessed = ask(byte_model(torch.float32), TOKENS, plan, How()).document()
    assert all(cell["exact"]["value"] == 0 for cell in guessed["cells"])

    def recalled(reader, last, texts, num_classes, rows):
        made = current[0].ids.tolist()
        return [looked_up(made, ids, num_classes) for ids in texts]

    def looked_up(made, ids, num_classes):
        seen = [*made, *ids]
        logits = torch.zeros(len(ids), num_classes)
        for place in range(len(ids)):
            end = len(made) + place
            at = next((n for n in range(6, end) if seen[n - 6 : n] == seen[end - 6 : end]), None)
            if at is not None:  # a wrong candidate leaves what stood before
                logits[place, seen[at]] = 9
        likeliest = tuple(logits.argmax(1).tolist())
        nats = float(logits.log_softmax(1)[range(len(ids)), ids].sum())
        return Likelihood(nats, likeliest == tuple(ids), likeliest)

    current: list[Sample] = []
    make = Plan.sample

    def kept(self, *arguments):
        current[:] = [make(self, *arguments)]
        return current[0]

    monkeypatch.setattr(Plan, "sample", kept)
    monkeypatch.setattr(answers, "after", recalled)
    found = ask(byte_model(torch.float32), TOKENS, plan, How()).document()
    assert [(cell["exact"]["value"], cell["first"]["value"]) for cell in found["cells"]] == [(1, 1)] * 6


def test_every_cell_has_its_samples_and_progress_counts_what_is_read():
    plan, told = Plan(tuple(TASKS), (700,), 2, 1, LINES), []
    found = ask(byte_model(torch.float32), TOKENS, plan, How(), told.append)
    document = found.document()
    assert len(document["cells"]) == len(DEPTHS) * (len(TASKS) - len(DEPTHLESS)) + len(DEPTHLESS)
    assert {cell["samples"] for cell in document["cells"]} == {2}
    assert told[-1] == sum(own.prompt_tokens for own in found.answers) <= plan.cost()
    assert document["chance_first"] == 0.1


def test_wilson_by_hand():
    assert wilson(0, 10) == pytest.approx({"value": 0, "low": 0, "high": 0.2775}, abs=1e-4)
    assert wilson(8, 10) == pytest.approx({"value": 0.8, "low": 0.4902, "high": 0.9433}, abs=1e-4)
