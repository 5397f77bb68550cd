"""The model card of an export: README.md, with the front matter that the Hub reads."""

from collections.abc import Mapping
from typing import Any

import torch

from megalodon.data.chat import ChatFormat
from megalodon.data.tokenizer import Tokenizer
from megalodon.interop.fast_tokenizer import breaks_ties
from megalodon.model.megalodon import ModelConfig


def model_card(
    config: ModelConfig,
    title: str,
    about: Mapping[str, Any],
    tokenizer: Tokenizer | None,
    chat: ChatFormat | None,
    dtype: torch.dtype,
) -> str:
    """Return README.md; what is not known is left out. The license is left to whoever publishes the model."""
    parts = [
        _FRONT_MATTER,
        f"# {title}\n",
        f"A [Megalodon](https://arxiv.org/abs/2404.08801) language model of {config.num_parameters():,} parameters: "
        "attention inside chunks, and complex moving averages and running norms for all that lies before. Its state "
        "has the same size after any number of tokens.\n",
        "## Use\n\n```python" + (_USE_CHAT if chat else _USE if tokenizer else _USE_IDS) + "```\n",
        _USE_NOTES,
        "## Sizes\n",
        _table(_sizes(config, tokenizer, dtype)),
    ]
    if trained := _training(about):
        parts += ["## Training\n", _table(trained)]
    parts += ["## Limits\n", "\n".join(f"- {limit}" for limit in _limits(config, about, tokenizer, chat)) + "\n"]
    return "\n".join(parts)


_FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- megalodon
# license: name the license of the weights before publishing them
---
"""
_LOAD = """
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "."  # this directory, or its name on the Hub
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
"""
_USE = (
    _LOAD
    + """\
inputs = tokenizer("The ", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))
"""
)
_USE_CHAT = (
    _LOAD
    + """\
messages = [{"role": "user", "content": "Hello"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""
)
_USE_IDS = """
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
"""
_USE_NOTES = """\
transformers 5.24 or later. `trust_remote_code` runs the two Python files of this directory, which need torch and
transformers alone. Batches may be padded on either side: what the attention mask hides is not read. Decays, statistics
and norms stay in float32 when the model is loaded in bfloat16. A long prompt is read in little memory with
`generate(..., prefill_chunk_size=4096)`.
"""


def _sizes(config: ModelConfig, tokenizer: Tokenizer | None, dtype: torch.dtype) -> dict[str, str]:
    known = f", of which the tokenizer uses {tokenizer.vocab_size:,}" if tokenizer else ""
    return {
        "parameters": f"{config.num_parameters():,}, stored in {str(dtype).removeprefix('torch.')}",
        "blocks, width": f"{config.num_layers}, {config.model_dim:,}",
        "heads; queries and keys, values": f"{config.num_heads}; {config.z_dim:,}, {config.value_dim:,}",
        "feed-forward": f"{config.ffn_hidden_dim:,}{', gated' if config.swiglu else ''}",
        "averages a feature, norm groups": f"{config.cema_ndim}, {config.norm_num_groups}",
        "chunk": f"{config.chunk_size:,} tokens",
        "vocabulary": f"{config.vocab_size:,} rows{known}",
    }


def _training(about: Mapping[str, Any]) -> dict[str, str]:
    rows = {}
    recipe = about.get("recipe")
    if isinstance(recipe, Mapping):
        rows["recipe"] = f"{recipe.get('name')}, sha256 {str(recipe.get('sha256'))[:16]}"
    for name, key in (("steps", "step"), ("tokens", "tokens"), ("longest training sequence", "seq_len")):
        if isinstance(about.get(key), int):
            rows[name] = f"{about[key]:,}"
    if isinstance(about.get("weights"), str):
        rows["weights"] = about["weights"]
    scores = about.get("scores")
    for name, value in (scores if isinstance(scores, Mapping) else {}).items():
        if isinstance(value, int | float):
            rows[str(name).replace("_", " ")] = f"{value:.4g}"
    return rows


def _limits(
    config: ModelConfig, about: Mapping[str, Any], tokenizer: Tokenizer | None, chat: ChatFormat | None
) -> list[str]:
    found = ["It writes what its training text made likely, true or not."]
    if isinstance(about.get("seq_len"), int):
        found.append(
            f"It was trained on sequences of {about['seq_len']:,} tokens; longer ones run, measure them first."
        )
    found.append("Assisted decoding, packed batches (`padding_free`) and attention maps are not offered.")
    if tokenizer is not None:
        padded = config.num_outputs - tokenizer.vocab_size - (chat.new_rows if chat else 0)
        if padded > 0:
            found.append(
                f"{padded:,} rows only pad the vocabulary; `generate()` never chooses them (`suppress_tokens` in "
                "generation_config.json), other samplers must leave them out."
            )
        found.append(
            "A text that spells a special token, such as `<|eos|>`, is read as that token; "
            "`tokenizer(text, split_special_tokens=True)` reads it as text."
        )
        if breaks_ties(tokenizer):
            found.append(
                "Where two ways to cut a text into tokens are equally likely, as in long runs of one sign, the fast "
                "tokenizer may take another than the one in training."
            )
    return found


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"
