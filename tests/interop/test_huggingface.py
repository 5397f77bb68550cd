"""Exports as others use them: without our packages, in generate(), in chats, saved again, tuned with peft and TRL."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from factories import random_tokens, tiny_model
from safetensors.torch import load_file, save_file
from tolerances import LOGITS, assert_near

from megalodon.checkpoint.tensors import OF_TRANSFORMERS
from megalodon.data.chat import ChatFormat, Message, load_template
from megalodon.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, train_sentencepiece
from megalodon.errors import CheckFailed, CheckpointError, DataError, EnvironmentFault
from megalodon.inference.sampling import SamplingConfig, allowed_ids
from megalodon.inference.session import Session, generate
from megalodon.interop import huggingface
from megalodon.interop.huggingface import CODE, check_with_transformers, write_export
from megalodon.model.loss import cross_entropy
from megalodon.model.megalodon import Megalodon, ModelConfig

pytest.importorskip("transformers", reason="the extra hf is not installed")

TEXTS = [
    "The quick brown fox, jumps over the lazy dog 0123456789.",
    "    if tokens is None:\n        return [token for token in range(10)]",
] * 30
CHATS: list[list[Message]] = [
    [{"role": "user", "content": "Who are you?"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "\n\nif x:\n    y "}],
    [
        {"role": "user", "content": "  fox\n"},
        {"role": "assistant", "content": "\nThe lazy dog."},
        {"role": "user", "content": "日本 🙂\n\n"},
    ],
]
PROMPTS = [
    "The fox",
    "    if tokens is None:\n" * 5,
    "lazy",
    "The quick brown fox, jumps over the lazy dog 0123456789. " * 2,
]


def export(
    directory: Path, model: Megalodon, tokenizer: Tokenizer | None, template: str | None = None, *, bos: bool = True
) -> ChatFormat | None:
    """Write weights and tokenizer as they lie in a model directory, then what transformers needs."""
    directory.mkdir()
    save_file(model.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
    chat = None
    if tokenizer is not None:
        tokenizer.save(directory)
        if template is not None:
            chat = ChatFormat(load_template(template), tokenizer, bos=bos)
            chat.save(directory)
    about = {
        "bos": bos,
        "recipe": {"name": "small", "sha256": "0123456789abcdef" * 4},
        "step": 1200,
        "tokens": 9_830_400,
    }
    about |= {"seq_len": 1024, "scores": {"bits_per_byte": 2.0637}}
    write_export(directory, model.config, dtype=torch.float32, title="Small", about=about)
    return chat


PROGRAM = """
import json, sys
sys.modules["megalodon"] = sys.modules["megalodon_kernels"] = None  # as if they were not installed
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
given = json.load(sys.stdin)
found = {}
for place in given["places"]:
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
    here = found[place] = {"ids": [tokenizer(text)["input_ids"] for text in given["texts"]]}
    here["back"] = [tokenizer.decode(ids, skip_special_tokens=True) for ids in here["ids"]]
    if tokenizer.chat_template:
        here["chats"] = [
            tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in given["chats"]
        ]
        whole = tokenizer.apply_chat_template(given["chats"][-1], return_dict=True, return_assistant_tokens_mask=True)
        here["trained"] = [whole["input_ids"], whole["assistant_masks"]]
    options = {"do_sample": False, "max_new_tokens": 200}
    batch = tokenizer(given["texts"], return_tensors="pt", padding=True)
    width = batch["input_ids"].shape[1]
    here["batch"] = [row[width:].tolist() for row in model.generate(**batch, **options)]
    one = tokenizer(given["texts"][-1], return_tensors="pt")
    here["one"] = model.generate(**one, **options)[0, one["input_ids"].shape[1] :].tolist()
    model.save_pretrained(place + "-saved")
    tokenizer.save_pretrained(place + "-saved")
    again = AutoModelForCausalLM.from_pretrained(place + "-saved", trust_remote_code=True)
    here["bits"] = all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())
    same = AutoTokenizer.from_pretrained(place + "-saved")
    here["ids again"] = [same(text)["input_ids"] for text in given["texts"]]
    here["settings"] = again.generation_config.to_diff_dict()
    body = AutoModel.from_pretrained(place, trust_remote_code=True)
    here["body"] = torch.equal(body(**one).last_hidden_state, model.base_model(**one).last_hidden_state)
json.dump(found, open(sys.argv[1], "w"))
"""


class Exports:
    """Two exports, and what a process without our packages made of them."""

    def __init__(self, root: Path) -> None:
        tokenizers = {"bytes": ByteTokenizer(16), "pieces": train_sentencepiece(TEXTS, 360, 16)}
        self.tokenizers, self.models, self.chats = tokenizers, {}, {}
        for seed, (name, template) in enumerate((("bytes", "chatml"), ("pieces", None))):
            sizes = {"vocab_size": 384, "chunk_size": 64, "num_layers": 2, "swiglu": True}
            self.models[name] = tiny_model(torch.float32, seed, **sizes)
            with torch.no_grad():  # no text ends early: eos and the marker behind an answer are never the likeliest
                self.models[name].output_weight[:21] = 0
            self.chats[name] = export(root / name, self.models[name], tokenizers[name], template, bos=name == "bytes")
        places = {str(root / name): name for name in tokenizers}
        asked = json.dumps({"places": list(places), "texts": PROMPTS, "chats": CHATS})
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(root / "modules")}
        program = [sys.executable, "-P", "-c", PROGRAM, str(root / "found.json")]
        done = subprocess.run(program, input=asked, env=environment, capture_output=True, text=True, cwd=root)
        assert done.returncode == 0, done.stderr[-2000:]
        self.found = {places[place]: here for place, here in json.loads((root / "found.json").read_text()).items()}
        self.root = root


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


def ours(model: Megalodon, ids: Sequence[int], tokenizer: Tokenizer, ends: set[int]) -> list[int]:
    """200 greedy tokens of our own session."""
    allowed = allowed_ids(tokenizer, model.config.num_outputs, ends)
    return list(generate(Session(model), ids, 200, SamplingConfig(temperature=0), ends, allowed))


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_generate_writes_what_ours_writes(exports: Exports, name: str) -> None:
    """Batches of one and of four padded texts, past three chunk boundaries of 64 tokens."""
    tokenizer, found, chat = exports.tokenizers[name], exports.found[name], exports.chats[name]
    ends = {tokenizer.eos_id} | (set(chat.stop_ids) if chat else set())
    expected = [ours(exports.models[name].eval(), ids, tokenizer, ends) for ids in found["ids"]]
    assert [len(ids) for ids in expected] == [200] * 4
    assert min(len(set(ids)) for ids in expected) > 20
    assert found["batch"] == expected
    assert found["one"] == expected[-1]


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_texts_begin_as_in_training(exports: Exports, name: str) -> None:
    tokenizer, found = exports.tokenizers[name], exports.found[name]
    begin = [tokenizer.bos_id] if name == "bytes" else []
    assert found["ids"] == [begin + tokenizer.encode(text) for text in PROMPTS]
    assert found["back"] == PROMPTS
    assert found["ids again"] == found["ids"]


@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_what_transformers_saves_it_loads_again(exports: Exports, name: str) -> None:
    found, root = exports.found[name], exports.root
    assert found["bits"] and found["body"]
    for file in CODE:
        assert (root / f"{name}-saved" / file).read_text() == (root / name / file).read_text()
    saved, stored = (load_file(root / place / "model.safetensors") for place in (f"{name}-saved", name))
    assert saved.keys() == stored.keys() and all(torch.equal(saved[key], stored[key]) for key in saved)
    config = json.loads((root / f"{name}-saved" / "config.json").read_text())
    assert config.keys() - ModelConfig.model_fields.keys() - {"model_type"} <= OF_TRANSFORMERS
    assert (
        ModelConfig(**{k: v for k, v in config.items() if k in ModelConfig.model_fields}) == exports.models[name].config
    )


def test_a_conversation_has_the_ids_of_training(exports: Exports) -> None:
    chat, tokenizer, found = exports.chats["bytes"], exports.tokenizers["bytes"], exports.found["bytes"]
    assert found["chats"] == [chat.encode(messages, answer=True).ids for messages in CHATS]
    whole = chat.encode(CHATS[-1])
    assert found["trained"] == [whole.ids, [int(x) for x in whole.trained]]
    read_again = ChatFormat.load(exports.root / "bytes", tokenizer, bos=True)
    assert [read_again.encode(m, answer=True) for m in CHATS] == [chat.encode(m, answer=True) for m in CHATS]


def test_generate_never_chooses_what_ours_may_not(exports: Exports) -> None:
    for name, tokenizer in exports.tokenizers.items():
        chat, settings = exports.chats[name], exports.found[name]["settings"]
        ends = {tokenizer.eos_id} | (set(chat.stop_ids) if chat else set())
        allowed = allowed_ids(tokenizer, 384, ends)
        assert settings["suppress_tokens"] == (~allowed).nonzero().flatten().tolist()
        eos = settings["eos_token_id"]
        assert set(eos if isinstance(eos, list) else [eos]) == ends
        assert settings["pad_token_id"] not in ends


def test_sampling_is_ours_unless_asked_otherwise(exports: Exports) -> None:
    settings, default = exports.found["bytes"]["settings"], asdict(SamplingConfig())
    assert {key: settings[key] for key in ("temperature", "top_k", "top_p")} == {
        key: default[key] for key in ("temperature", "top_k", "top_p")
    }
    assert settings["do_sample"] is True and settings["max_new_tokens"] == 256


@cache
def made(kind: str) -> Tokenizer:
    return {
        "bytes": lambda: ByteTokenizer(16),
        "pieces": lambda: train_sentencepiece(TEXTS, 360, 16),
        "dummy prefix": with_dummy_prefix,
        "none reserved": lambda: ByteTokenizer(0),
    }[kind]()


LLAMA = {"add_dummy_prefix": True, "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}


def with_dummy_prefix() -> SentencePieceTokenizer:
    import io

    import sentencepiece

    written = io.BytesIO()
    lines = iter([line for text in TEXTS for line in text.split("\n")])
    options = {"vocab_size": 330, "model_type": "bpe", "remove_extra_whitespaces": False, **LLAMA}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=written, **options)
    return SentencePieceTokenizer(written.getvalue())


OWN = """\
{# <|user|> <|system|> #}{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}
{%- if m.role == "assistant" %}{{ eos_token }}{% endif %}
{{ "\\n" }}
{%- endfor %}
{% if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", ["plain", "chatml", "own"])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "dummy prefix", "none reserved"])
def test_chat_templates(kind: str, template: str, bos: bool, tmp_path: Path) -> None:
    """Whether or not the markers have reserved ids, the text begins with a marker, or the tokenizer with a space."""
    from transformers import PreTrainedTokenizerFast

    if template == "own":
        template = str(tmp_path / "own.jinja")
        Path(template).write_text(OWN)
    tokenizer = made(kind)
    chat = export(tmp_path / "it", tiny_model(torch.float32, vocab_size=400), tokenizer, template, bos=bos)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "it")
    # The library puts no space before a text that begins with one: the only text for which that matters is left out.
    odd = kind == "dummy prefix" and template == "plain" and not bos
    for messages in CHATS[::2] if odd else CHATS:
        found = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert found == chat.encode(messages, answer=True).ids
    whole = chat.encode(CHATS[-1])
    assert theirs.apply_chat_template(CHATS[-1])["input_ids"] == whole.ids
    again = ChatFormat.load(tmp_path / "it", tokenizer, bos=bos)
    assert again.encode(CHATS[-1]) == whole and again.stop_ids == chat.stop_ids
    assert theirs.decode(whole.ids, skip_special_tokens=True) == tokenizer.decode(
        [token for token in whole.ids if token < tokenizer.vocab_size]
    )


def test_the_check_runs_transformers_without_our_packages(exports: Exports, tmp_path: Path) -> None:
    model, tokens = exports.models["pieces"].eval(), random_tokens(2, 150, 384)
    found = check_with_transformers(exports.root / "pieces", tokens)
    with torch.no_grad():
        assert_near(found, model(tokens)[0], LOGITS[torch.float32])


def test_the_check_runs_no_code_but_ours_and_not_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "it"
    export(directory, tiny_model(torch.float32), None)
    code = directory / "modeling_megalodon.py"
    kept = code.read_text()
    code.write_text(kept + f"\nopen({str(tmp_path / 'ran')!r}, 'w').write('x')\n")
    with pytest.raises(CheckpointError, match=r"modeling_megalodon.py is not what this version of megalodon writes"):
        check_with_transformers(directory, random_tokens(1, 5))
    assert not (tmp_path / "ran").exists()
    code.write_text(kept)
    monkeypatch.setattr(huggingface, "SECONDS", 0.01)
    with pytest.raises(CheckFailed, match=r"it: transformers gave no answer in 0\.01 s; it was given up"):
        check_with_transformers(directory, random_tokens(1, 5))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'megalodon-lm\[hf\]'"):
        check_with_transformers(directory, random_tokens(1, 5))


@pytest.mark.slow
def test_the_check_says_why_transformers_does_not_load(tmp_path: Path) -> None:
    directory = tmp_path / "it"
    export(directory, tiny_model(torch.float32), None)
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckFailed, match=r"it: transformers does not load it: .*model\.safetensors") as raised:
        check_with_transformers(directory, random_tokens(1, 5))
    assert "\n" not in str(raised.value)


def test_the_model_card(exports: Exports) -> None:
    import yaml

    for name in ("bytes", "pieces"):
        card = (exports.root / name / "README.md").read_text()
        head, body = card.removeprefix("---\n").split("\n---\n", 1)
        assert yaml.safe_load(head) == {
            "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["megalodon"],
        }  # fmt: skip
        config = exports.models[name].config
        for part in (
            f"{config.num_parameters():,} parameters",
            "64 tokens",
            "1,200",
            "9,830,400",
            "2.064",
            "0123456789abcdef",
        ):
            assert part in body, part
        assert ("apply_chat_template" in body) == (name == "bytes")
        padding = 384 - exports.tokenizers[name].vocab_size
        assert f"{padding:,} rows only pad the vocabulary" in body


def test_a_model_without_a_tokenizer(tmp_path: Path) -> None:
    export(tmp_path / "it", tiny_model(torch.float32), None)
    assert not (tmp_path / "it" / "tokenizer.json").exists()
    assert "AutoTokenizer" not in (tmp_path / "it" / "README.md").read_text()
    assert "eos_token_id" not in json.loads((tmp_path / "it" / "config.json").read_text())


def test_a_template_that_cannot_begin_with_bos_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None is known; ids must not change unnoticed if there is one."""
    monkeypatch.setattr("megalodon.interop.huggingface._BEGINNINGS", ("", " "))
    with pytest.raises(DataError, match="chat template chatml: cannot be made to begin with BOS"):
        export(tmp_path / "it", tiny_model(torch.float32), train_sentencepiece(TEXTS, 360, 16), "chatml")


@pytest.mark.filterwarnings("ignore")
def test_peft_takes_a_step(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the extra finetune is not installed")
    from megalodon.interop.flat.modeling_megalodon import MegalodonForCausalLM

    base = tiny_model(torch.float32)
    export(tmp_path / "it", base, None)
    model = MegalodonForCausalLM.from_pretrained(tmp_path / "it")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    targets = {name.split(".lora_A")[0].split(".")[-1] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert targets == {"wz", "wv", "wr", "wh1", "wh2", "fc1", "fc2"}
    tokens, losses = random_tokens(2, 33), []
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        loss = adapted(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = MegalodonForCausalLM.from_pretrained(tmp_path / "it")
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, base.state_dict()[name]), name
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted.eval()(tokens).logits
        assert torch.equal(again.eval()(tokens).logits, expected)
        assert_near(again.merge_and_unload()(tokens).logits, expected, LOGITS[torch.float32])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["text", "messages"])
def test_trl_takes_a_step_on_the_loss_of_ours(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts with BOS and EOS, conversations with the answers alone: the loss before the step is that of our model."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from megalodon.interop.flat.modeling_megalodon import MegalodonForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer, base = ByteTokenizer(16), tiny_model(torch.float32, vocab_size=320)
    chat = export(tmp_path / "it", base, tokenizer, "chatml")
    chats = [[*CHATS[2][:2]], [{"role": "user", "content": "if"}, {"role": "assistant", "content": "return " * 5}]]
    if kind == "text":
        rows = [{"text": text} for text in PROMPTS[:3]]
        encoded = [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in PROMPTS[:3]]
        trained = [[True] * len(ids) for ids in encoded]
    else:
        rows = [{"messages": messages} for messages in chats]
        encoded, trained = zip(*(chat.encode(messages) for messages in chats), strict=True)
    total, count = torch.zeros(()), 0
    for ids, flags in zip(encoded, trained, strict=True):
        tokens, wanted = torch.tensor([ids]), torch.tensor([flags])
        targets = tokens.masked_fill(~wanted, -100)[:, 1:]
        with torch.no_grad():
            loss, number = cross_entropy(base.hidden(tokens[:, :-1])[0], base.output_weight, targets)
        total, count = total + loss, count + int(number)
    options = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": len(rows), "report_to": "none"}
    options |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "max_length": None}
    trainer = trl.SFTTrainer(
        model=MegalodonForCausalLM.from_pretrained(tmp_path / "it"),
        args=trl.SFTConfig(output_dir=str(tmp_path / "out"), assistant_only_loss=kind == "messages", **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tmp_path / "it"),
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    after = trainer.model.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    moved = {name for name, value in base.named_parameters() if not torch.equal(after[name], value)}
    assert moved == {name for name, _ in base.named_parameters()}


@pytest.mark.filterwarnings("ignore")
def test_packing_by_trl_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast

    from megalodon.interop.flat.modeling_megalodon import MegalodonForCausalLM

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    export(tmp_path / "it", tiny_model(torch.float32, vocab_size=320), ByteTokenizer(16))
    options = {"max_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no"}
    trainer = trl.SFTTrainer(
        model=MegalodonForCausalLM.from_pretrained(tmp_path / "it"),
        args=trl.SFTConfig(output_dir=str(tmp_path / "out"), packing=True, max_length=64, disable_tqdm=True, **options),
        train_dataset=Dataset.from_list([{"text": text} for text in PROMPTS]),
        processing_class=PreTrainedTokenizerFast.from_pretrained(tmp_path / "it"),
    )
    with pytest.raises(ValueError, match=r"^megalodon: packed texts \(padding_free, packing\) are not offered here"):
        trainer.train()
