"""A model directory -> one that transformers loads as it is, with no package of ours.

    write_export(directory, config, dtype=torch.float32, title="books", about=info)
    logits = check_with_transformers(directory, tokens)

Weights, tokenizer and chat template lie in the directory already; what is added: config.json with the keys that
transformers looks for, the two files of code it needs (flat/), the tokenizer as a fast one, the defaults of generate(),
and a model card. Nothing here needs transformers, but for the check, which runs in a process of its own.
Not here: the weights (checkpoint/tensors.py), when to export (convert.py).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalodon.checkpoint.store import write_json
from megalodon.data.chat import ChatFormat, ChatTemplate
from megalodon.data.tokenizer import BYTES_FILE, SENTENCEPIECE_FILE, Tokenizer, load_tokenizer
from megalodon.errors import CheckFailed, CheckpointError, DataError
from megalodon.interop.fast_tokenizer import fast_tokenizer, special_ids
from megalodon.interop.model_card import model_card
from megalodon.model.extras import check_installed
from megalodon.model.megalodon import ModelConfig

CODE = ("configuration_megalodon.py", "modeling_megalodon.py")
SECONDS = 1800.0
"""How long transformers may take to answer."""
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "max_new_tokens": 256}
"""What generate() does unless it is told otherwise; the defaults of our own (inference/sampling.py)."""
_BEGINNINGS = ("", "{{ bos_token }}", '{{ bos_token + " " }}')
"""What a template may need before it so that it begins with BOS, and with the space that its tokenizer puts there."""
_PROBE = ({"role": "user", "content": "a"},)


def write_export(
    directory: Path, config: ModelConfig, *, dtype: torch.dtype, title: str, about: Mapping[str, Any]
) -> None:
    """Make a directory with weights and tokenizer one that transformers loads.

    A chat template that leaves BOS to us is rewritten to begin with it: transformers adds none to a conversation.

    Args:
        directory: holds the weights, and, unless the model has none, our tokenizer files and chat template.
        config:    of the model.
        dtype:     that most of the weights are stored in.
        title:     of the model card.
        about:     what megalodon.json records: `bos`, recipe, step, tokens, scores.
    Raises:
        DataError: the tokenizer or the chat template cannot be read, or not be expressed for transformers.
    """
    bos = bool(about.get("bos", True))
    has_tokenizer = any((directory / name).exists() for name in (SENTENCEPIECE_FILE, BYTES_FILE))
    tokenizer = load_tokenizer(directory) if has_tokenizer else None
    chat = None if tokenizer is None else _with_bos(directory, tokenizer, bos)
    fields: dict[str, Any] = {
        "architectures": ["MegalodonForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_megalodon.MegalodonConfig",
            "AutoModel": "modeling_megalodon.MegalodonModel",
            "AutoModelForCausalLM": "modeling_megalodon.MegalodonForCausalLM",
        },
        "model_type": "megalodon",
        **config.model_dump(mode="json"),
        "dtype": str(dtype).removeprefix("torch."),
    }
    generation: dict[str, Any] = {**SAMPLING, "use_cache": True}
    if tokenizer is not None:
        whole, known = fast_tokenizer(tokenizer, chat.markers if chat else None, bos)
        _write(directory / "tokenizer.json", json.dumps(whole, ensure_ascii=False, indent=1))
        write_json(directory / "tokenizer_config.json", known)
        ids = special_ids(tokenizer)
        ends = sorted({tokenizer.eos_id, *(chat.stop_ids if chat else ())})
        tokens = {"bos_token_id": ids.bos, "eos_token_id": ends if len(ends) > 1 else ends[0], "pad_token_id": ids.pad}
        fields |= tokens
        generation |= tokens | {"suppress_tokens": _never_written(tokenizer, config.num_outputs, ends)}
    write_json(directory / "config.json", fields)
    write_json(directory / "generation_config.json", generation)
    for name in CODE:
        _write(directory / name, _code(name))
    _write(directory / "README.md", model_card(config, title, about, tokenizer, chat, dtype))


def check_with_transformers(directory: Path, tokens: Tensor) -> Tensor:
    """Return the logits that transformers computes from an export: (B, L) ids -> (B, L, num_outputs) float32.

    It runs in a process of its own that knows no package of ours, without the network, and runs no code but ours:
    what the directory holds is compared first.

    Raises:
        EnvironmentFault: transformers is missing.
        CheckpointError: the code in the directory is not what this version writes.
        CheckFailed: transformers does not load the directory; the message has its last line.
    """
    check_installed("transformers", "the check of an export needs", "hf")
    for name in CODE:
        path = directory / name
        if not path.is_file() or path.read_text(encoding="utf-8") != _code(name):
            raise CheckpointError(f"{path} is not what this version of megalodon writes; convert the model again")
    with tempfile.TemporaryDirectory(prefix="megalodon-") as scratch:
        asked, answered = Path(scratch) / "asked", Path(scratch) / "answered"
        save_file({"tokens": tokens.cpu().contiguous()}, asked)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": f"{scratch}/modules"}
        environment.pop("PYTHONPATH", None)
        program = [sys.executable, "-P", "-c", _PROGRAM, str(directory), str(asked), str(answered)]
        try:
            done = subprocess.run(
                program, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=SECONDS
            )
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"{directory}: transformers gave no answer in {SECONDS:g} s; it was given up") from None
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise CheckFailed(f"{directory}: transformers does not load it: {said}")
        return load_file(answered)["logits"]


_PROGRAM = """\
import sys
sys.modules["megalodon"] = sys.modules["megalodon_kernels"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
directory, asked, answered = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, dtype="auto").eval()
with torch.inference_mode():
    logits = model(load_file(asked)["tokens"], use_cache=False).logits
save_file({"logits": logits.float().contiguous()}, answered)
"""


def _with_bos(directory: Path, tokenizer: Tokenizer, bos: bool) -> ChatFormat | None:
    """The chat format of a directory, whose template begins with BOS afterwards if conversations do."""
    chat = ChatFormat.load(directory, tokenizer, bos=bos)
    if chat is None or not bos:
        return chat
    wanted = chat.encode(_PROBE, answer=True).ids
    for begin in _BEGINNINGS:
        template = ChatTemplate(chat.template.name, begin + chat.template.source)
        if ChatFormat(template, tokenizer, bos=False, markers=chat.markers).encode(_PROBE, answer=True).ids == wanted:
            written = ChatFormat(template, tokenizer, bos=bos, markers=chat.markers)
            written.save(directory)
            return written
    raise DataError(
        f"chat template {chat.template.name}: cannot be made to begin with BOS for transformers; let it begin with "
        "{{ bos_token }} and tune the model again"
    )


def _never_written(tokenizer: Tokenizer, num_outputs: int, ends: Sequence[int]) -> list[int]:
    """Ids that generate() must not choose: rows that pad the vocabulary, and special ids that end no text."""
    padding = range(tokenizer.vocab_size, num_outputs)
    return sorted((tokenizer.special_ids | set(padding)) - set(ends))


def _code(name: str) -> str:
    return (resources.files("megalodon.interop") / "flat" / name).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")
