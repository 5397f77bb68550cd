"""Streamed scores are those of the definition: each document whole, alone, every token once."""

import gzip
import io
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
import torch
from byte_texts import NUM_CLASSES, TOKENIZER, TOKENS, byte_model, text, write
from factories import tiny_model
from torch.nn.functional import cross_entropy

from megalodon.data.shards import TokenDocument, write_store
from megalodon.data.tokenizer import SentencePieceTokenizer, Tokenizer, train_sentencepiece
from megalodon.errors import DataError, InputError, NumericalError
from megalodon.evaluation import scoring
from megalodon.evaluation.corpus import StoreCorpus, Tokens, files
from megalodon.evaluation.reading import Reader
from megalodon.evaluation.scoring import BLOCK_BYTES, How, Vocabulary, score
from megalodon.inference.session import Session
from megalodon.model.architectures import LanguageModel, build_model
from megalodon.model.llama import LlamaConfig
from megalodon.model.megalodon import Megalodon

TEXTS = (text(300), "a", text(7, 1), "  \n", text(90, 2))
KEPT = [given for given in TEXTS if given.strip()]


@pytest.fixture(scope="module")
def model() -> Megalodon:
    return byte_model()


def ids_of(given: str) -> list[int]:
    return [TOKENIZER.bos_id, *TOKENIZER.encode(given), TOKENIZER.eos_id]


def whole(model: LanguageModel, ids: list[int]) -> np.ndarray:
    """Losses of all tokens of a document but the first, in one forward pass."""
    with torch.no_grad():
        logits, _ = model(torch.tensor(ids[:-1])[None])
    return cross_entropy(logits[0, :, :NUM_CLASSES], torch.tensor(ids[1:]), reduction="none").numpy()


@pytest.mark.parametrize("piece", [7, 64, 1024])
def test_pieces_of_shared_passes_give_what_each_document_gives_alone(model, tmp_path, piece):
    found = score(model, files(write(tmp_path / "t", *TEXTS)), TOKENS, How(piece=piece))
    losses = [whole(model, ids_of(given)) for given in KEPT]
    flat = np.concatenate(losses)
    assert (found.tokens, found.documents) == (len(flat), len(KEPT))
    assert found.read == found.tokens + found.documents
    assert found.loss().value == pytest.approx(flat.mean(), rel=1e-9)
    size = sum(len(given.encode()) for given in KEPT)
    assert found.bytes == size
    assert found.bits_per_byte().value == pytest.approx(flat.sum() / math.log(2) / size, rel=1e-9)
    words = sum(len(given.split()) for given in KEPT)
    assert found.words == words
    assert found.document()["word_perplexity"] == pytest.approx(math.exp(flat.sum() / words), rel=1e-7)
    assert found.document()["perplexity"] == pytest.approx(math.exp(flat.mean()), rel=1e-9)


def test_buckets_of_positions_and_blocks_add_up(model, tmp_path):
    found = score(model, files(write(tmp_path / "t", *TEXTS)), TOKENS, How(piece=50))
    assert sum(count for _, count in found.by_position.values()) == found.tokens
    assert sum(nats for nats, _ in found.by_position.values()) == pytest.approx(found.nats, rel=1e-9)
    losses = [whole(model, ids_of(given)) for given in KEPT]
    for end, (nats, count) in found.by_position.items():
        own = [loss for row in losses for p, loss in enumerate(row, 1) if end / 2 < p <= end]
        assert (count, nats) == (len(own), pytest.approx(sum(own), rel=1e-9)), end
    long = text(2000, 3)
    found = score(model, files(write(tmp_path / "long", long)), TOKENS, How())
    size = len(long.encode())
    assert [key for key, _ in found.blocks.items()] == [(0, n) for n in range(-(-size // BLOCK_BYTES))]
    assert [block.bytes for block in found.blocks.values()][:-1] == [BLOCK_BYTES] * (size // BLOCK_BYTES)


def test_the_window_policy_is_that_of_a_session(model, tmp_path):
    given = text(60, 5)
    ids = ids_of(given)
    assert len(ids) > 150  # beyond chunk 8, where the statistics begin to be renewed
    session, losses = Session(model, norm_stats="window"), []
    for token, target in pairwise(ids):
        logits = session.step(token)[:NUM_CLASSES]
        losses.append(float(cross_entropy(logits[None], torch.tensor([target]))))
    corpus = files(write(tmp_path / "t", given, given))
    for piece in (7, 1024):
        found = score(model, corpus, TOKENS, How("window", piece=piece))
        assert found.loss().value == pytest.approx(np.mean(losses), rel=1e-9)
    assert score(model, corpus, TOKENS, How()).loss().value != pytest.approx(np.mean(losses), rel=1e-4)


def test_a_store_and_its_text_give_the_same_also_with_another_tokenizer(model, tmp_path):
    tokens = Tokens(TOKENIZER, True, True)
    documents = [TokenDocument("s", np.array(ids_of(given)), len(given.encode())) for given in KEPT]
    store = StoreCorpus(
        write_store(tmp_path / "store", documents, TOKENIZER.vocab_size, {"bos": True, "eos": True}), TOKENIZER
    )
    text_files = files(write(tmp_path / "t", *KEPT))
    one, other = (score(model, corpus, tokens, How()) for corpus in (store, text_files))
    assert one.blocks == other.blocks
    pieces: Tokenizer = train_sentencepiece(KEPT * 3, 340, 2)
    again = [document.ids().tolist() for document in store.documents(Tokens(pieces, True, False))]
    assert again == [[pieces.bos_id, *pieces.encode(given)] for given in KEPT]


def test_without_bos_the_first_token_is_read_and_not_scored(model, tmp_path):
    given = text(20)
    found = score(model, files(write(tmp_path / "t", given)), Tokens(TOKENIZER, False, True), How())
    losses = whole(model, ids_of(given)[1:])
    assert found.nats == pytest.approx(losses.sum(), rel=1e-9)
    assert found.bytes == len(given.encode()) - 1
    assert found.words == len(given.split()) - 1


def test_documents_of_one_token_each_hold_nothing_to_score(model, tmp_path):
    corpus, plain = files(write(tmp_path / "t", "a", "b", "c")), Tokens(TOKENIZER, False, False)
    with pytest.raises(DataError, match=r"holds 3 tokens in 3 documents; expected at least 2 of a document"):
        score(model, corpus, plain, How())
    assert score(model, corpus, TOKENS, How()).tokens == 6


@pytest.mark.parametrize("bos", [True, False])
def test_a_space_that_a_tokenizer_puts_before_a_text_is_no_text(tmp_path, bos):
    options = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}
    lines, written = iter(text(2000, 9).split("\n")), io.BytesIO()
    options |= {"remove_extra_whitespaces": False, "add_dummy_prefix": True, "vocab_size": 340}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=written, **options)
    pieces = SentencePieceTokenizer(written.getvalue())  # as Llama's
    texts = ["abc de", " two", "é", text(30)]
    first = [pieces.token_bytes(pieces.encode(given)[0]) for given in texts]
    assert all(piece.startswith(b" ") for piece in first)
    own = tiny_model(vocab_size=pieces.vocab_size).eval()
    found = score(own, files(write(tmp_path / "t", *texts)), Tokens(pieces, bos, True), How(piece=20))
    unscored = 0 if bos else sum(len(piece) - 1 for piece in first)
    assert found.bytes == sum(len(given.encode()) for given in texts) - unscored


def test_words_are_counted_across_tokens_of_several_bytes():
    given = "two words  and\nmore of\tthem é é " * 8
    pieces = train_sentencepiece([given] * 20, 300, 2)
    ids = np.array([pieces.bos_id, *pieces.encode(given)])
    assert int(Vocabulary(pieces).words(ids[:-1], ids[1:]).sum()) == len(given.split())


def test_json_lines_and_compressed_files_are_read(model, tmp_path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": given}) + "\n" for given in TEXTS))
    with gzip.open(tmp_path / "d.txt.gz", "wt") as file:
        file.write(TEXTS[0])
    lines = score(model, files(tmp_path / "d.jsonl"), TOKENS, How())
    assert (lines.documents, lines.bytes) == (len(KEPT), sum(len(given.encode()) for given in KEPT))
    packed = score(model, files(tmp_path / "d.txt.gz"), TOKENS, How())
    assert packed.bytes == len(TEXTS[0].encode())


def test_what_cannot_be_scored_is_refused_in_a_line(model, tmp_path):
    def refused(content: bytes, match: str) -> None:
        (tmp_path / "x.bin").write_bytes(content)
        with pytest.raises(DataError, match=match):
            score(model, files(tmp_path / "x.bin"), TOKENS, How())

    refused(b"a", r"x.bin holds 1 token of text; expected at least 2")
    refused(b"", r"x.bin holds 0 tokens of text; expected at least 2")
    refused(b"ab\n\xff\xfe\x00", r"x.bin:2: not UTF-8 \(byte 0xff at offset 3\)")
    with pytest.raises(DataError, match=r"--data: .*nothing.txt does not exist"):
        files(tmp_path / "nothing.txt")
    damaged = byte_model()
    with torch.no_grad():
        damaged.output_weight[40] = math.nan
    with pytest.raises(NumericalError, match="not finite"):
        score(damaged, files(write(tmp_path / "t", text(9))), TOKENS, How())


def test_a_model_is_left_in_the_mode_it_was_in(model, tmp_path):
    own = byte_model().train()
    score(own, files(write(tmp_path / "t", text(9))), TOKENS, How())
    assert own.training


def test_a_long_document_is_read_piece_by_piece_and_the_state_does_not_grow(tmp_path, monkeypatch):
    given, sizes = text(20_000), list[int]()
    read = Reader.read

    def watched(self: Reader, *arguments):
        for start, hidden in read(self, *arguments):
            assert hidden.shape[1] <= 1024
            sizes.append(self.state.map(lambda x: x[:, :0] if x.dim() == 4 and x.shape[1] < 10 else x).num_bytes())
            yield start, hidden

    monkeypatch.setattr(Reader, "read", watched)
    steps: list[tuple[int, int]] = []
    corpus = files(write(tmp_path / "t", given))
    found = score(byte_model(torch.float32), corpus, TOKENS, How(), lambda size, count: steps.append((size, count)))
    assert found.bytes == len(given.encode()) > 70_000
    assert len(sizes) > 70 and len(set(sizes)) == 1  # but for the keys of an open chunk
    assert steps[-1] == (found.bytes, found.tokens)


def test_the_baseline_is_scored_by_the_same_rule(tmp_path):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    sizes = {"num_layers": 2, "model_dim": 24, "num_heads": 2, "ffn_hidden_dim": 37, "vocab_size": NUM_CLASSES + 5}
    llama = build_model(LlamaConfig.model_validate(sizes), seed=3).eval()
    corpus = files(write(tmp_path / "t", *TEXTS))
    found = score(llama, corpus, TOKENS, How(piece=50))
    losses = np.concatenate([whole(llama, ids_of(given)) for given in KEPT])
    assert found.nats == pytest.approx(losses.sum(), rel=1e-5)
    with pytest.raises(InputError, match="--norm-stats window is not available with arch llama"):
        score(llama, corpus, TOKENS, How("window"))


def test_bfloat16_is_near_and_not_equal_and_carries_its_state(tmp_path):
    model, corpus = byte_model(torch.float32), files(write(tmp_path / "t", text(300)))
    exact, half = (score(model, corpus, TOKENS, How(bf16=bf16, piece=64)) for bf16 in (False, True))
    assert half.nats != exact.nats
    assert half.loss().value == pytest.approx(exact.loss().value, rel=0.02)
    whole_pass = score(model, corpus, TOKENS, How(bf16=True, piece=4096))
    assert half.loss().value == pytest.approx(whole_pass.loss().value, rel=0.005)


def test_errors_of_few_documents_come_from_blocks_and_of_many_from_documents(model, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "BLOCK_BYTES", 512)
    few = score(model, files(write(tmp_path / "few", text(1000), text(50, 1))), TOKENS, How())
    assert few.drawn == "blocks of 512 bytes"
    many = score(model, files(write(tmp_path / "many", *(text(4, n) for n in range(30)))), TOKENS, How())
    assert (many.drawn, len(many.units())) == ("documents", 30)
    for found in (few, many):
        bits = found.bits_per_byte()
        assert bits.low < bits.value < bits.high
        assert 0 < bits.error < 0.2
    monkeypatch.setattr(scoring, "MOST_UNITS", 7)
    for found in (few, many):  # neighbours are joined, nothing is lost
        units = found.units()
        assert len(units) <= 8
        assert sum(block.bytes for block in units.values()) == found.bytes
        assert found.loss().value == pytest.approx(found.nats / found.tokens)
    one = score(model, files(write(tmp_path / "one", text(50))), TOKENS, How())
    assert one.document()["loss"]["error"] is None
