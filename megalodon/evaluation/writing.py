"""Texts that a model writes, many at once, for questions and tasks. Not here: how (megalodon/inference)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from megalodon.inference.batch import Request, write_together
from megalodon.inference.norm_window import NormStats
from megalodon.inference.sampling import SamplingConfig
from megalodon.inference.session import Session, Writer
from megalodon.inference.stream import Stops

GREEDY = SamplingConfig(temperature=0, top_k=0, top_p=1.0)


class Prompt(NamedTuple):
    """What is to be continued, how far, and which texts end it."""

    ids: Sequence[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    sampling: SamplingConfig = GREEDY


def write(
    writer: Writer,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    norm_stats: NormStats,
    chat: bool,
    told: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """Continue prompts; as many texts as prompts, in their order, without what ended them.

    Args:
        chat: the model's template is in use: its end of a turn ends a text too.
        told: told the number of texts done, now and then.
    """
    ends = {writer.tokenizer.eos_id} | (writer.chat.stop_ids if chat and writer.chat else frozenset())
    texts = list[str]()
    for start in range(0, len(prompts), batch_size):
        own = prompts[start : start + batch_size]
        requests = [Request(p.ids, p.max_new_tokens, p.sampling, Stops(p.stop)) for p in own]
        sessions = (Session(writer.model, norm_stats=norm_stats) for _ in own)
        texts += [written.text for written in write_together(writer, sessions, requests, ends)]
        told(len(texts))
    return texts
