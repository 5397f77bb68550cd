"""A model as lm-evaluation-harness asks for it: likelihoods of texts, and texts that are written, of any length.

The harness speaks in strings. Documents begin with BOS here if they did in training; a conversation is rendered by the
model's own template, whose markers travel through the strings as ids behind a key that no text holds, so text that
looks like a marker stays text. Nothing is ever cut or dropped: `truncated_tokens` stays 0.
Imported only where the extra `eval` is there. Not here: which tasks, and their scores (harness.py).
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from megalodon.errors import InputError
from megalodon.evaluation.continuations import Pair, likelihoods
from megalodon.evaluation.corpus import Tokens
from megalodon.evaluation.scoring import How
from megalodon.evaluation.writing import GREEDY, Prompt, write
from megalodon.inference.sampling import SamplingConfig
from megalodon.inference.session import Writer

NO_LIMIT = 1 << 40
"""What the harness takes for the longest context."""
MAX_NEW_TOKENS = 256
"""Of a text, where a task does not say; the harness's own default."""

Told = Callable[[str, int, int], None]
"""Told now and then: what is done, how many of how many."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the library has no types
    """A model, its tokenizer and chat template behind the harness's interface.

    Args:
        batch_size: requests answered side by side.
    """

    def __init__(
        self, writer: Writer, tokens: Tokens, how: How, batch_size: int, told: Told = lambda what, done, total: None
    ) -> None:
        super().__init__()
        self.writer, self.tokens, self.how, self.batch_size, self.told = writer, tokens, how, batch_size, told
        self.truncated_tokens = 0
        self._key = f"\ue000{writer.tokenizer.sha256[:16]}:"  # the same in every run: samples are logged with it
        self._mark = re.compile(f"{self._key}([0-9]+)\ue001")
        self.chatting = False
        """Whether a conversation was rendered: then the end of a turn ends a text."""

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.writer.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context."""
        return self.writer.tokenizer.bos_id if self.tokens.bos else self.writer.tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """No model of ours has one."""
        return NO_LIMIT

    @property
    def max_gen_toks(self) -> int:
        """Tokens of a text, where a task does not say."""
        return MAX_NEW_TOKENS

    @property
    def tokenizer_name(self) -> str:
        """What requests depend on: tokenizer and template."""
        chat = self.writer.chat
        return f"{self.writer.tokenizer.sha256[:16]}-{chat.template.sha256[:16] if chat else 'raw'}"

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the model's template. Raises: InputError if it has none."""
        return self._chat().template.source if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text, its markers as ids behind the key.

        Without `add_generation_prompt` its last turn is the assistant's and goes on: what would end it is left out.
        """
        chat, tokenizer = self._chat(), self.writer.tokenizer
        ids = chat.encode(chat_history, answer=add_generation_prompt).ids
        if not add_generation_prompt and chat_history[-1]["role"] == "assistant":
            ids = ids[: max(place for place, token in enumerate(ids) if token in chat.stop_ids)]
        self.chatting = True
        special = tokenizer.special_ids | set(chat.markers.values())
        found, plain = list[str](), list[int]()
        for token in ids:
            if token in special:
                found += [tokenizer.decode(plain), f"{self._key}{token}\ue001"]
                plain = []
            else:
                plain.append(token)
        return "".join((*found, tokenizer.decode(plain)))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The ids of a text, without BOS: it is put before what is read, once."""
        tokenizer = self.writer.tokenizer
        ids, place = list[int](), 0
        for mark in self._mark.finditer(string) if self.chatting else ():
            ids += tokenizer.encode_array(string[place : mark.start()], not ids and not place).tolist()
            ids.append(int(mark[1]))
            place = mark.end()
        rest = string[place:]
        return ids + (tokenizer.encode(rest) if not ids and not place else tokenizer.encode_array(rest, False).tolist())

    def tok_decode(self, tokens: Sequence[int]) -> str:
        """The text of ids."""
        return self.writer.tokenizer.decode(tokens)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The harness's division: spaces at the context's end belong to the continuation, both are tokenised as one.

        Where a token would reach across the border, it would drop what the token holds of the continuation: there each
        side is tokenised by itself.
        """
        before, whole = context.rstrip(), self.tok_encode(context + continuation)
        first = self.tok_encode(before)
        if not first:  # white space alone: the text begins with it
            return [self.prefix_token_id], whole
        if whole[: len(first)] == first and len(whole) > len(first):
            return first, whole[len(first) :]
        rest = context[len(before) :] + continuation
        return first, self.writer.tokenizer.encode_array(rest, False).tolist()

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of every continuation."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [Pair(tuple(self._begun(context)), tuple(own)) for _, context, own in requests]
        empty = next((texts for (texts, _, own) in requests if not own), None)
        if empty is not None:
            raise InputError(f"a task asks how likely nothing is after {empty[0][-40:]!r}; expected at least 1 token")
        return self._likelihoods(pairs, "likelihoods")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of whole texts, of any length, each token after all that stand before it."""
        pairs = [Pair((self.prefix_token_id,), tuple(self.tok_encode(request.args[0]))) for request in requests]
        scored = [number for number, pair in enumerate(pairs) if pair.continuation]
        found = self._likelihoods([pairs[number] for number in scored], "texts")
        totals = dict(zip(scored, (nats for nats, _ in found), strict=True))
        return [totals.get(number, 0.0) for number in range(len(pairs))]

    def _likelihoods(self, pairs: Sequence[Pair], what: str) -> list[tuple[float, bool]]:
        markers = self.writer.chat.new_rows if self.chatting and self.writer.chat else 0
        found = likelihoods(
            self.writer.model,
            pairs,
            self.writer.tokenizer.vocab_size + markers,
            self.how,
            self.batch_size,
            lambda done: self.told(what, done, len(pairs)),
        )
        return [(own.nats, own.greedy) for own in found]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Write a text after every context, up to one of its `until`. Raises: InputError for options of a task that
        are not known here, so that none is ignored."""
        asked = Counter[int]()  # a task asks the same several times to draw several texts
        prompts = []
        for request in requests:
            context, options = request.args[:2]
            prompts.append(self._prompt(context, options, asked[id(request)]))
            asked[id(request)] += 1
        order = sorted(range(len(prompts)), key=lambda n: (prompts[n].max_new_tokens, len(prompts[n].ids)))
        texts = write(
            self.writer,
            [prompts[number] for number in order],
            batch_size=self.batch_size,
            norm_stats=self.how.norm_stats,
            chat=self.chatting,
            told=lambda done: self.told("texts written", done, len(prompts)),
        )
        found = dict(zip(order, texts, strict=True))
        return [found[number] for number in range(len(prompts))]

    def _prompt(self, context: str, options: dict[str, Any], number: int = 0) -> Prompt:
        """What is to be written, for the how manieth time: the seed of its draws."""
        rest = dict(normalize_gen_kwargs(options, MAX_NEW_TOKENS))
        until, limit = rest.pop("until"), rest.pop("max_gen_toks")
        sampled, heat = rest.pop("do_sample"), float(rest.pop("temperature", 1.0))
        top_k, top_p = rest.pop("top_k", 0), rest.pop("top_p", 1.0)
        if rest:
            raise InputError(
                f"a task asks for {', '.join(sorted(rest))} in writing; known: until, max_gen_toks, "
                "do_sample, temperature, top_k, top_p"
            )
        sampling = SamplingConfig(heat, int(top_k), float(top_p), seed=number) if sampled else GREEDY
        return Prompt(self._begun(self.tok_encode(context)), limit, tuple(text for text in until if text), sampling)

    def _begun(self, ids: Sequence[int]) -> list[int]:
        """Ids after BOS, where documents begin with one."""
        bos = self.writer.tokenizer.bos_id
        return list(ids) if not self.tokens.bos or list(ids[:1]) == [bos] else [bos, *ids]

    def _chat(self) -> Any:
        if self.writer.chat is None:
            raise InputError("--apply-chat-template: the model has no chat template; leave the option out")
        return self.writer.chat
