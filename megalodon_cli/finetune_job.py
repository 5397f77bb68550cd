"""What `finetune` works on: a base model, examples in its chat format, adapters; checked and put together.

Not here: what any training does around its loop (training_job.py), what is shown (training_screen.py).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megalodon.errors import InputError, RecipeError
from megalodon_cli import console, run_start
from megalodon_cli.base_models import Base, read_base
from megalodon_cli.job import Asked, Job, Tuning

if TYPE_CHECKING:
    from torch import Tensor

    from megalodon.data.chat import ChatFormat
    from megalodon.data.examples import PreparedExamples, Request
    from megalodon.model.architectures import LanguageModel
    from megalodon.model.megalodon import ModelConfig
    from megalodon.recipe import FinetuneConfig, Resolved
    from megalodon.training.optim import OptimConfig


def prepare(resolved: "Resolved", asked: Asked, scratch: bool = False) -> Job | None:
    """Check recipe, base, directory and examples. None if the run is finished already; that was said then.

    Args:
        scratch: nothing will be written into the directory, and what is in it does not matter.
    """
    from megalodon.data.examples import prepare_examples
    from megalodon.data.packing import PackedLoader, packed_validation
    from megalodon.model.adapters import inject, require_peft
    from megalodon.model.architectures import as_megalodon
    from megalodon.model.weights import copy_weights
    from megalodon.parallel.tensor import limits_of
    from megalodon.training.memory import available_memory, fitted
    from megalodon.training.plan import make_plan
    from megalodon.training.run import frozen_values
    from megalodon.training.sinks import require

    config = resolved.finetuning()
    resolved.require_complete()
    _refuse_warmup(resolved, config)
    lora = config.model.lora
    if lora is not None:
        require_peft()
    require(config.log.to)
    _check_prompts(config)
    base = read_base(str(config.model.init_from))
    if lora is not None and base.directory is None:
        raise InputError(
            f"model.init_from {config.model.init_from}: {base.source} is a step of a run; adapters record the model "
            "directory they belong to, expected one, or --method full"
        )
    chat = _chat(config, base)
    seq_len, optim = _seq_len(config, base), _optim(config, base)
    parts = (config.train, optim, config.checkpoint, config.log, config.parallel)
    model_config, weights, rows = _rows(base, chat, lora is not None)
    shape = {
        "seq_len": seq_len,
        "device": asked.device,
        "world_size": asked.ranks,
        **limits_of(model_config),
    }
    make_plan(*parts, windows=1, **shape)
    if lora is not None and config.parallel.tp > 1:
        raise RecipeError(f"parallel.tp {config.parallel.tp} with model.lora: adapters are not divided; expected 1")
    directory = run_start.directory_of(config, asked)
    frozen = frozen_values(config.model_dump(mode="json", by_alias=True)) | {"model.base": base.sha256}
    if not scratch and run_start.finished(directory, config, asked, frozen):
        return None
    with console.Progress() as live:
        prepared = prepare_examples(
            _request(config, seq_len),
            base.tokenizer,
            chat,
            bos=base.bos,
            make=not asked.no_prepare,
            report=lambda examples: live.update(f"examples: {examples:,} encoded"),
        )
    loader = PackedLoader(prepared.train, prepared.train_packing, config.data.isolate, config.train.seed)
    plan = make_plan(*parts, windows=loader.num_samples, **shape)
    before = None if scratch else run_start.micro_rows(directory, frozen, plan.device.type)

    def adapted(model: "LanguageModel") -> None:
        if lora is not None:
            inject(as_megalodon(model, "an adapter"), lora, config.train.seed)

    def build(model: "LanguageModel") -> None:  # no checkpoint holds frozen weights
        copy_weights(model, weights, base.source)
        adapted(model)

    plan = fitted(model_config, plan, available_memory(plan.device), before, adapted)
    inherited = [*_inherited(config, base, chat, seq_len, optim), *rows]
    return Job(
        config,
        resolved,
        directory,
        prepared,
        loader,
        model_config,
        plan,
        frozen,
        asked,
        bos=base.bos,
        num_classes=base.tokenizer.vocab_size + chat.new_rows,
        validation=lambda: packed_validation(
            prepared.valid, prepared.valid_packing, config.data.isolate, plan.micro_rows, config.eval.tokens
        ),
        build=None if lora is None else build,
        weights=weights if lora is None else None,
        tuning=Tuning(base, chat, inherited, _first_example(prepared, chat)),
    )


def _refuse_warmup(resolved: "Resolved", config: "FinetuneConfig") -> None:
    """Raises: InvalidRecipe: shorter windows would cut the examples that share one."""
    from megalodon.config import InvalidRecipe, Place, Problem

    if config.train.seq_len_warmup is None:
        return
    node = resolved.tree.find(["train", "seq_len_warmup"])
    text = "is not available in finetune, as it would cut examples; expected null"
    place = node.place if node else Place(config.name)
    raise InvalidRecipe([Problem(place, "train.seq_len_warmup", text)])


def _check_prompts(config: "FinetuneConfig") -> None:
    """Raises: DataError for a prompt of `eval.samples` whose turns are out of order, or that leaves no answer open."""
    from megalodon.data.conversations import check_turns
    from megalodon.evaluation.perplexity import ChatPromptConfig

    for number, prompt in enumerate(config.eval.samples.prompts):
        if isinstance(prompt, ChatPromptConfig):
            place = f"eval.samples.prompts.{number}"
            check_turns([{"role": turn.role, "content": turn.content} for turn in prompt.messages], place)
            if prompt.messages[-1].role != "user":
                raise InputError(f"{place}: ends with a turn of {prompt.messages[-1].role}; expected the user's")


def _chat(config: "FinetuneConfig", base: Base) -> "ChatFormat":
    """The template that was asked for, with the ids that the base gave its markers, if it knows it."""
    from megalodon.data.chat import ChatFormat, default_template, load_template

    given = config.data.chat_template
    if given == "inherit" and base.chat is not None:
        return base.chat
    template = default_template(base.tokenizer) if given == "inherit" else load_template(given)
    if base.chat is not None and base.chat.template.sha256 == template.sha256:
        return base.chat
    return ChatFormat(template, base.tokenizer, bos=base.bos, learnt=base.chat.markers if base.chat else None)


def _seq_len(config: "FinetuneConfig", base: Base) -> int:
    if config.data.seq_len != "inherit":
        return config.data.seq_len
    if base.seq_len is None:
        raise InputError(f"data.seq_len is inherit, but {base.source} does not record its own; give data.seq_len=1024")
    return base.seq_len


def _optim(config: "FinetuneConfig", base: Base) -> "OptimConfig":
    """The optimizer, with its peak rate worked out."""
    if config.optim.lr_factor is None:
        return config.optim
    if base.lr is None:
        factor = f"optim.lr_factor is {config.optim.lr_factor:g}"
        raise InputError(f"{factor}, but {base.source} does not record its peak rate; give optim.lr")
    return config.optim.model_copy(update={"lr": config.optim.lr_factor * base.lr})


def _rows(base: Base, chat: "ChatFormat", adapted: bool) -> "tuple[ModelConfig, Mapping[str, Tensor], list[str]]":
    """Sizes and weights with a row for each id of the chat format, and what was done for it in words.

    Raises: InputError if adapters would need rows that the base does not have.
    """
    from megalodon.model.weights import with_rows

    known = base.tokenizer.vocab_size + (base.chat.new_rows if base.chat else 0)
    wanted, have = base.tokenizer.vocab_size + chat.new_rows, base.config.vocab_size
    if wanted <= known:
        return base.config, base.tensors, []
    names = ", ".join(name for name, token in chat.markers.items() if token >= known)
    if adapted and wanted <= have:
        note = f"no ids are reserved for {names}: padding rows are taken, and adapters leave them as they are"
        return base.config, base.tensors, [note]
    if adapted:
        raise InputError(
            f"{base.source}: template {chat.template.name} needs {wanted - have} rows more than the model has, for "
            f"{names}, and adapters leave the rows as they are; use data.chat_template=plain, or --method full"
        )
    config, tensors = with_rows(base.config, base.tensors, known, wanted)
    added = f"{config.vocab_size - have} rows are added" if config.vocab_size > have else "padding rows are taken"
    return config, tensors, [f"no ids are reserved for {names}: {added}, which start as the mean of the others"]


def _request(config: "FinetuneConfig", seq_len: int) -> "Request":
    from megalodon.data.examples import ExampleSource, Request

    data = config.data
    sources = [ExampleSource(s.name, s.path, s.format) for s in data.sources if s.path is not None]
    fraction = data.valid.share
    return Request(
        config.name,
        tuple(sources),
        data.valid.path,
        fraction,
        data.fields,
        data.train_on,
        seq_len,
        data.over_length,
        data.packing,
    )


def _inherited(
    config: "FinetuneConfig", base: Base, chat: "ChatFormat", seq_len: int, optim: "OptimConfig"
) -> list[str]:
    """What the base gave, in lines."""
    own = "inherited" if config.data.seq_len == "inherit" else "given"
    known = base.chat is not None and base.chat.template.sha256 == chat.template.sha256
    template = f"template {chat.template.name} ({'inherited' if known else 'new to this model'})"
    rate = f"peak lr {optim.lr:.3g}"
    if config.optim.lr_factor is not None:
        rate += f" = {config.optim.lr_factor:g} x {base.lr:.3g} of the base"
    tokenizer = base.tokenizer
    return [
        f"base     {base.source}, weights {base.sha256[:8]}",
        f"takes    seq_len {seq_len:,} ({own}), tokenizer {tokenizer.kind} {tokenizer.sha256[:8]}, "
        f"{'BOS' if base.bos else 'no BOS'}, {template}, {rate}",
    ]


def _first_example(prepared: "PreparedExamples", chat: "ChatFormat") -> list[tuple[str, bool]]:
    """The first example of the store as text, in runs."""
    from megalodon.data.chat import Encoded

    end = int(prepared.train_packing.begins[1])
    ids, mask = prepared.train.tokens(0, end).tolist(), prepared.train.mask(0, end).tolist()
    return chat.describe(Encoded(ids, mask))
