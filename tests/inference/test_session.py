"""Sessions: reading in any pieces, branching, constant size; the generation loop and its ends."""

import json
import math
import subprocess
import sys

import pytest
import torch
from factories import random_tokens, tiny_config, tiny_model
from tolerances import LOGITS, assert_near

from megalodon.checkpoint.tensors import save_model
from megalodon.data.tokenizer import ByteTokenizer
from megalodon.errors import CheckpointError, DataError, InputError, NumericalError
from megalodon.inference.sampling import SamplingConfig
from megalodon.inference.session import Session, generate, generate_text, load_writer, prompt_tokens
from megalodon.model.decoder import Decoder
from megalodon.model.megalodon import Megalodon

TOKENIZER = ByteTokenizer(reserve=2)
SIZES = {"vocab_size": TOKENIZER.vocab_size + 5, "chunk_size": 16}
CONFIG = tiny_config(**SIZES)
GREEDY = SamplingConfig(temperature=0)


@pytest.fixture(scope="module")
def model() -> Megalodon:
    return tiny_model(torch.float32, **SIZES).eval()


def ids_of(length: int, seed: int = 0) -> list[int]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, TOKENIZER.vocab_size, (length,), generator=draw).tolist()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    # Splits change the order of float32 sums: some 1e-6 of logits of order 1.
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cuts", [(), (1,), (16,), (5, 6, 37), (15, 17, 64), tuple(range(1, 71))])
def test_reading_in_pieces_gives_the_logits_of_one_call(model, cuts):
    ids = ids_of(71)
    with torch.no_grad():
        whole = model(torch.tensor([ids]))[0][0]
    session = Session(model, piece=23)
    for start, end in zip((0, *cuts), (*cuts, len(ids)), strict=True):
        logits = session.feed(ids[start:end])
        assert close(logits, whole[end - 1])
        assert session.position == end
    assert logits.dtype == torch.float32


def test_pieces_end_on_the_grid_wherever_reading_began(model, monkeypatch):
    lengths = []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda tokens, state: (lengths.append(tokens.shape[1]), hidden(tokens, state))[1]
    )
    session = Session(model, piece=16)
    session.feed(iter(ids_of(5)))
    session.feed(iter(ids_of(40)))
    assert lengths == [5, 11, 16, 13]


def test_a_branch_continues_alone(model):
    session = Session(model)
    session.feed(ids_of(21))
    kept, logits = session.branch(), session.logits
    other = session.branch()
    for token in ids_of(15, seed=1):
        session.step(token)
    assert torch.equal(kept.logits, logits)
    assert kept.position == 21
    assert torch.equal(other.feed(ids_of(9, seed=2)), kept.feed(ids_of(9, seed=2)))
    straight = Session(model)
    assert close(kept.logits, straight.feed(ids_of(21) + ids_of(9, seed=2)))


def test_state_does_not_grow_with_length(model):
    session, sizes = Session(model, piece=64), set()
    for _ in range(12):
        session.feed(ids_of(64))
        sizes.add(session.state.num_bytes())
    assert session.position == 12 * 64
    assert len(sizes) == 1
    # Between two chunk borders only the open chunk is added, one key and value per token and layer.
    empty = sizes.pop()
    per_token = CONFIG.num_layers * 4 * (CONFIG.z_dim + CONFIG.value_dim)
    for count in range(1, 16):
        session.step(7)
        assert session.state.num_bytes() == empty + count * per_token


def test_no_pass_is_longer_than_a_piece(model, monkeypatch):
    longest = 0
    linear = torch.nn.functional.linear

    def spy(x, *rest):
        nonlocal longest
        longest = max(longest, x.numel() // x.shape[-1])
        return linear(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    monkeypatch.setattr("megalodon.inference.session.linear", spy)
    Session(model, piece=32).feed(ids_of(300))
    assert 0 < longest <= 32


def test_zero_tokens_are_refused(model):
    session = Session(model)
    with pytest.raises(InputError, match="zero tokens to read; expected at least 1"):
        session.feed([])
    with pytest.raises(InputError, match="zero tokens were fed"):
        _ = session.logits
    with pytest.raises(InputError, match="zero tokens were fed"):
        next(generate(session, [], 5, GREEDY))
    with pytest.raises(InputError, match="zero tokens; expected at least 1"):
        prompt_tokens(TOKENIZER, "", bos=True)


def test_a_wrong_id_leaves_the_session_where_it_was(model):
    session = Session(model, piece=8)
    logits = session.feed(ids_of(10)).clone()
    with pytest.raises(ValueError, match="outside the vocabulary"):
        session.feed([1] * 20 + [CONFIG.vocab_size])
    assert session.position == 10
    assert torch.equal(session.logits, logits)


def test_a_state_of_two_rows_and_an_empty_piece_are_refused(model):
    with pytest.raises(InputError, match="has 2 rows; expected 1"):
        Session(model, model.empty_state(2))
    with pytest.raises(InputError, match="piece is 0"):
        Session(model, piece=0)


def test_a_session_continues_a_state_of_the_model(model):
    ids = ids_of(30)
    with torch.no_grad():
        state = model(torch.tensor([ids[:19]]))[1]
    session = Session(model, state)
    assert session.position == 19
    assert close(session.feed(ids[19:]), Session(model).feed(ids))


def test_dropout_is_off_and_the_mode_comes_back():
    model = tiny_model(torch.float32, **SIZES, dropout=0.5, hidden_dropout=0.5, attention_dropout=0.5).train()
    first, second = (Session(model).feed(ids_of(20)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(module.training for module in model.modules())


def test_greedy_is_the_argmax_of_the_whole_pass(model):
    prompt = ids_of(18)
    written = list(generate(Session(model), prompt, 20, GREEDY))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + written]))[0][0]
    assert len(written) == 20
    assert written == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_a_seed_decides_the_text(model):
    def text(seed: int) -> str:
        return generate_text(model, TOKENIZER, "In the", 24, SamplingConfig(seed=seed))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_generation_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    generate_text(model, TOKENIZER, "a", 5)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_session_has_read_all_but_the_last_id(model):
    session = Session(model)
    written = list(generate(session, ids_of(4), 6, GREEDY))
    assert session.position == 4 + 5
    again = Session(model)
    assert close(again.feed(ids_of(4) + written[:-1]), session.logits)
    # Without a prompt it goes on from there.
    session.step(written[-1])
    assert list(generate(session, [], 3, GREEDY)) == list(generate(Session(model), ids_of(4), 9, GREEDY))[6:]


@pytest.fixture
def scripted(model, monkeypatch):
    """Make the model write given ids, whatever it reads."""

    def script(ids: list[int]) -> None:
        coming = iter(ids)
        monkeypatch.setattr("megalodon.inference.sampling.sample", lambda *_: next(coming))

    return script


def test_eos_ends_the_text_and_is_not_part_of_it(model, scripted):
    word = TOKENIZER.encode("yes")
    scripted([*word, TOKENIZER.eos_id, *word])
    assert generate_text(model, TOKENIZER, "q", 50) == "yes"


def test_a_stop_string_ends_the_text(model, scripted):
    scripted(TOKENIZER.encode("first.\n\nsecond"))
    assert generate_text(model, TOKENIZER, "q", 50, stop=["\n\n"]) == "first."


def test_an_unfinished_character_at_the_end_is_replaced(model, scripted):
    scripted(TOKENIZER.encode("ab€"))
    assert generate_text(model, TOKENIZER, "q", 4) == "ab�"


def test_the_prompt_begins_with_bos_if_training_did(model):
    assert prompt_tokens(TOKENIZER, "x", bos=True) == [TOKENIZER.bos_id, *TOKENIZER.encode("x")]
    assert prompt_tokens(TOKENIZER, "x", bos=False) == TOKENIZER.encode("x")


def test_the_repetition_penalty_sees_prompt_and_text(model):
    # So strong a penalty that, greedy, no id comes twice and none of the prompt comes back.
    config = SamplingConfig(temperature=0, repetition_penalty=1e9)
    prompt = ids_of(6)
    written = list(generate(Session(model), prompt, 40, config))
    assert len(set(written)) == 40
    assert not set(written) & set(prompt)


@pytest.mark.parametrize("count", [0, -4])
def test_a_number_of_tokens_below_one_is_refused(model, count):
    with pytest.raises(InputError, match=f"max_new_tokens is {count}; expected at least 1"):
        next(generate(Session(model), [1], count, GREEDY))


def test_a_model_directory_is_loaded_with_its_tokenizer(model, model_directory):
    writer = load_writer(model_directory)
    assert writer.tokenizer.sha256 == TOKENIZER.sha256
    assert writer.bos is True
    assert not writer.model.training
    ids = ids_of(9)
    assert close(Session(writer.model).feed(ids), Session(model).feed(ids))


def test_a_small_model_is_loaded_without_the_compiler(model_directory):
    """Its imports took 1.5 s of the time to the first token."""
    lines = (
        "import sys",
        "from pathlib import Path",
        "from megalodon.inference.session import Session, load_writer",
        f"Session(load_writer(Path({str(model_directory)!r})).model).feed([1, 2])",
        "print([name for name in ('torch._dynamo', 'sympy', 'triton', 'datasets') if name in sys.modules])",
    )
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_another_tokenizer_is_refused(model_directory, edit_info):
    edit_info(tokenizer_sha256="0" * 64)
    with pytest.raises(CheckpointError, match=r"the tokenizer is \w{8}, but the model was trained with 00000000"):
        load_writer(model_directory)


def test_bos_is_what_the_training_data_had(model_directory, edit_info):
    edit_info(bos=False)
    assert load_writer(model_directory).bos is False


def test_a_model_without_tokenizer_is_refused(model, tmp_path):
    save_model(model, tmp_path / "bare", None, {})
    with pytest.raises(DataError, match="holds neither"):
        load_writer(tmp_path / "bare")


@pytest.fixture
def model_directory(model, tmp_path):
    directory = tmp_path / "model"
    save_model(model, directory, TOKENIZER.save, {"tokenizer_sha256": TOKENIZER.sha256})
    return directory


@pytest.fixture
def edit_info(model_directory):
    path = model_directory / "megalodon.json"

    def edit(**values: object) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def test_nan_weights_are_reported(model):
    broken = tiny_model(torch.float32, **SIZES)
    with torch.no_grad():
        broken.output_weight.fill_(math.nan)
    with pytest.raises(NumericalError, match="highest logit is nan"):
        generate_text(broken, TOKENIZER, "a", 3)


def test_a_step_is_a_feed_of_one_token(model):
    """From every place in a chunk of 16, and read on by either afterwards."""
    ids = ids_of(40)
    fed, stepped = Session(model), Session(model)
    fed.feed(ids[:3])
    stepped.feed(ids[:3])
    for token in ids[3:23]:
        assert close(stepped.step(token), fed.feed((token,)))
        assert stepped.position == fed.position
    assert close(stepped.feed(ids[23:39]), fed.feed(ids[23:39]))
    assert close(stepped.step(ids[39]), fed.feed(ids[39:]))


def test_a_branch_of_a_stepping_session_continues_alone(model):
    session = Session(model)
    session.feed(ids_of(5))
    session.step(7)
    twin = session.branch()
    for token in ids_of(20, seed=3):
        session.step(token)
    assert twin.position == 6
    straight = Session(model)
    straight.feed([*ids_of(5), 7])
    assert close(twin.step(9), straight.feed([9]))


def test_a_step_of_a_wrong_id_leaves_the_session_where_it_was(model):
    session = Session(model)
    session.feed(ids_of(4))
    logits = session.step(2)
    for bad in (-1, CONFIG.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary"):
            session.step(bad)
    assert session.position == 5
    assert torch.equal(session.logits, logits)


def test_a_step_broken_off_half_way_counts_as_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some layers have moved and some have not: the session forms its state anew from the last boundary."""
    model = tiny_model()
    ids = random_tokens(1, 14)[0].tolist()  # chunks of 10
    session, whole = Session(model), Session(model)
    session.feed(ids[:11])
    session.step(ids[11])
    twin = session.branch()
    whole.feed(ids[:12])
    step = Decoder.step

    def broken(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
        step(decoder, tokens)
        raise KeyboardInterrupt

    for broken_off in (session, twin):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Decoder, "step", broken)
            broken_off.step(5)
        assert broken_off.position == 12
        assert_near(broken_off.logits, whole.logits, LOGITS[torch.float64])
    assert_near(twin.feed(ids[12:13]), whole.feed(ids[12:13]), LOGITS[torch.float64])
    assert_near(session.step(ids[12]), whole.logits, LOGITS[torch.float64])


@pytest.mark.parametrize("piece", [4, 10, 23, 1024])
@pytest.mark.parametrize("stepped", [False, True])
def test_going_back_reads_less_than_a_chunk(piece, stepped, monkeypatch):
    """However much was read, and to the same logits; neither of two that share a past moves the other."""
    model = tiny_model().eval()  # chunks of 10
    ids = random_tokens(1, 200)[0].tolist()
    session, places = Session(model, piece=piece), {}
    for place in (1, 9, 10, 11, 57, 60, 139, 140, 171):
        if stepped:
            for token in ids[session.position : place]:
                session.step(token)
        else:
            session.feed(ids[session.position : place])
        places[place] = session.snapshot()
        assert places[place].position == place
        assert len(places[place].tail) == place % 10
    lengths: list[int] = []
    hidden = model.hidden
    monkeypatch.setattr(
        model, "hidden", lambda tokens, state: (lengths.append(tokens.shape[1]), hidden(tokens, state))[1]
    )
    for place in (140, 9, 171, 57, 60, 1, 139, 11, 10):
        lengths.clear()
        session.rewind(places[place])
        assert lengths == []
        assert session.position == place
        assert session.state.position.item() == place
        assert sum(lengths) == place % 10
        twin = session.branch()
        whole = Session(model)
        whole.feed(ids[:place])
        assert_near(session.logits, whole.logits, LOGITS[torch.float64])
        expected = whole.feed(ids[place : place + 25])
        assert_near(session.feed(ids[place : place + 25]), expected, LOGITS[torch.float64])
        for token in ids[place : place + 25]:
            twin.step(token)
        assert_near(twin.logits, expected, LOGITS[torch.float64])


def test_a_session_holds_two_states_and_nothing_else(model):
    """Its tensors are no windows into the values of a pass."""
    session = Session(model, piece=64)
    session.feed(ids_of(500))
    held: dict[int, int] = {}

    def count(x: torch.Tensor) -> torch.Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    for state in (session.state, session.snapshot().past.state):
        state.map(count)
    assert sum(held.values()) <= 2 * session.state.num_bytes()


def test_a_session_that_began_inside_a_chunk_goes_back_too(model):
    ids = ids_of(60)
    with torch.no_grad():
        state = model(torch.tensor([ids[:19]]))[1]
    session = Session(model, state)
    session.feed(ids[19:25])
    place = session.snapshot()
    session.feed(ids[25:60])
    session.rewind(place)
    assert session.position == 25
    assert close(session.feed(ids[25:41]), Session(model).feed(ids[:41]))
