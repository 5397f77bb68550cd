"""What training shows: the header, a progress line every few steps, the lines at the end.

Not here: what is computed (megalodon/training), how a line reaches the terminal (console.py).
"""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalodon_cli import console
from megalodon_cli.job import Ending, Job, Tuning
from megalodon_cli.training_job import result_name

if TYPE_CHECKING:
    from megalodon.model.architectures import LanguageModelConfig
    from megalodon.training.loop import Result, Row
    from megalodon.training.run import RunRecord


SHOWN = 1500
"""Characters of an example that are shown at most."""


class Screen:
    """Shows what the loop reports: where the training stands, other things on lines of their own."""

    def __init__(self, live: console.Progress, horizon: int, every: int, record: "RunRecord") -> None:
        self.live, self.horizon, self.every, self.record = live, horizon, every, record
        self._recent: list[float] = []

    def __call__(self, row: "Row") -> None:
        kind = row["kind"]
        if kind == "train":
            self._recent = [*self._recent[-31:], row["seconds"]]
            self._stand(row)
        elif kind in ("eval", "health", "sample", "event"):
            self.live.line(line_of(row))
            if row.get("by_position"):
                self.live.line(f"  loss by position: {_by_position(row)}")
        elif kind == "warning":
            console.warning(row["text"])
        else:
            self.live.line(row["text"])
            if row["event"] == "saved":
                self.record.update(step=row["step"])

    def _stand(self, row: "Row") -> None:
        """One plain line every so many steps; a terminal shows every step, as a bar and its figures."""
        step = row["step"]
        eta = _time((self.horizon - step) * sum(self._recent) / len(self._recent))
        said = step % self.every == 0 or step in (1, self.horizon)
        head = f"step {step:,}/{self.horizon:,}  {step / self.horizon:.1%}  {console.amount(row['tok_per_s'])} tok/s"
        lines = (f"{head}  eta {eta}", "  ".join((*_learned(row), *_used(row))))
        self.live.update(f"{line_of(row, self.horizon)}  eta {eta}", lines, step / self.horizon, keep=said)


def line_of(row: Mapping[str, Any], horizon: int | None = None) -> str:
    """Return a row of metrics.jsonl as the line that the user sees of it."""
    kind, step = row["kind"], row["step"]
    if kind == "train":
        of = f"step {step:>{len(str(horizon))}}/{horizon}  {step / horizon:.1%}" if horizon else f"step {step}"
        speed = f"{console.amount(row.get('tok_per_s') or 0)} tok/s"
        return "  ".join((of, *_learned(row), speed, *_used(row)))
    if kind == "eval":
        averaged = f"; averaged weights {_number(row['ema_valid_loss'], '.4f')}" if "ema_valid_loss" in row else ""
        return f"eval at step {step:,}: loss {_number(row.get('valid_loss'), '.4f')}{_bits(row)}{averaged}"
    if kind == "sample":
        return f"sample at step {step:,}: {console.printable(row['prompt'] + '|' + row['text'])}"
    if kind == "health":
        memory = " ".join(_number(layer["memory"]["median"], ".0f") for layer in row["layers"])
        return f"health at step {step:,}: memory of layers (tokens) {memory}"
    if row.get("event") == "rollback":
        left_out = ", ".join(f"{start:,} to {stop - 1:,}" for start, stop in row["samples"])
        back = f"step {row['from']:,}: rolled back to step {row['to']:,}"
        return f"{back}; samples {left_out} are left out from now on: {row['reason']}"
    return f"step {step:,}: {row.get('event', kind)}: {row.get('reason', '')}"


def _learned(row: Mapping[str, Any]) -> tuple[str, ...]:
    loss, bits, norm = (
        _number(row.get(k), f) for k, f in (("loss", ".3f"), ("bits_per_byte", ".3f"), ("grad_norm", ".2f"))
    )
    return f"loss {loss}", f"bpb {bits}", f"lr {_number(row.get('lr'), '.1e')}", f"gnorm {norm}"


def _used(row: Mapping[str, Any]) -> tuple[str, ...]:
    share, seconds, memory = row.get("peak_share"), row.get("seconds") or 0.0, row.get("memory") or 0
    waited = (row.get("data_seconds") or 0.0) / max(seconds, 1e-9)
    peak = () if share is None else (f"peak {share:.0%}",)
    return (*peak, f"data {waited:.1%}", f"mem {memory / 2**30:.1f}G")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _bits(row: Mapping[str, Any]) -> str:
    return "" if row.get("bits_per_byte") is None else f", {row['bits_per_byte']:.3f} bits per byte"


def _by_position(row: Mapping[str, Any]) -> str:
    return "  ".join(f"{end}: {_number(loss, '.2f')}" for end, loss in row["by_position"].items())


def _time(seconds: float) -> str:
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def header(job: Job, peak: float) -> None:
    """Say what is about to happen: model, data, needs, and where every document and token goes."""
    import torch

    config, plan, loader = job.config, job.plan, job.loader
    if changes := [f"{key} {old} -> {new}" for key, old, new in job.resolved.changes]:
        console.info(f"overrides: {', '.join(changes)}")
    threads = f", {torch.get_num_threads()} threads" if plan.device.type == "cpu" else ""
    precision = "bf16-mixed" if plan.bf16 else "fp32"
    console.info(
        f"{config.kind} {config.name} -> {job.directory}    "
        f"{plan.device}{threads}, torch {torch.__version__}, {precision}"
    )
    count, tokens = job.model_config.num_parameters(), plan.horizon * plan.batch_tokens
    trained, also = count, ""
    if (lora := config.model.lora) is not None:
        from megalodon.model.adapters import num_adapter_parameters
        from megalodon.model.megalodon import ModelConfig

        assert isinstance(job.model_config, ModelConfig)  # a baseline has no adapters
        trained = num_adapter_parameters(job.model_config, lora)
        also = f"; trained: {trained:,} of adapters of rank {lora.r}, {trained / (count + trained):.1%} of all"
    console.info(f"  model    {count:,} parameters: {_shares(job.model_config)}{also}")
    for line in job.tuning.inherited if job.tuning else ():
        console.info(f"  {line}")
    epochs, size = tokens / (loader.num_samples * plan.seq_len), f"{plan.rows} x {plan.seq_len:,}"
    console.info(
        f"  data     {job.prepared.train.num_tokens:,} tokens; {plan.horizon:,} steps of {size} = {tokens:,} tokens, "
        f"{epochs:.2f} epochs; {plan.micro_rows} in a pass"
    )
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    memory = f"memory {plan.needs.total(plan.micro_rows) / 2**30:.1f} GiB, " if plan.needs else ""
    disk = (12 * kept + 4) * trained
    console.info(
        f"  needs    {memory}disk {console.amount(disk, ' ', 'G')}B for up to {kept} checkpoints and the model "
        f"(derived); matrix product of this machine {console.amount(peak, ' ', 'G')}FLOP/s (measured)"
    )
    for note in job.prepared.notes:
        console.detail(note)
    for line in (*job.prepared.ledger.lines(), *loader.ledger_lines()):
        console.info(f"  {line}")
    if job.tuning:
        _example(job, job.tuning)


def _example(job: Job, tuning: Tuning) -> None:
    """Show how the first example is seen, with what is trained on marked."""
    formats = getattr(job.prepared, "formats", {})
    found = ", ".join(f"{name} {count:,}" for name, count in formats.items())
    console.info(f"  examples {found}; template {tuning.chat.template.name}; the first one, trained where marked:")
    left, shown = SHOWN, []
    for text, trained in tuning.example:
        part = console.printable(text[:left])
        shown.append(console.marked(part, sys.stderr) if trained and part else part)
        left -= len(part)
    more = " …" if sum(len(text) for text, _ in tuning.example) > SHOWN else ""
    for line in f"{''.join(shown)}{more}".split("\n"):
        console.info(f"  | {line}")


def _shares(config: "LanguageModelConfig") -> str:
    """Where the parameters are, in percent."""
    import torch

    from megalodon.model.architectures import build_model
    from megalodon.training.optim import group_of

    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in build_model(config).named_parameters()}
    titles = {"embed": "embeddings", "head": "embeddings", "attn": "attention", "ffn": "ffn"}
    parts = {"embeddings": 0, "attention": 0, "ffn": 0, "cema and norms": 0}
    for name, size in sizes.items():
        parts[titles.get(group_of(name), "cema and norms")] += size
    return ", ".join(f"{name} {size / sum(sizes.values()):.0%}" for name, size in parts.items())


def ending(job: Job, result: "Result", how: Ending) -> None:
    """Print how a run ended: its scores, what they compare with, the last samples, what to try next."""
    rows, scores = how.rows, how.scores
    last: Mapping[str, Any] = next((row for row in reversed(rows) if row["kind"] == "eval"), {})
    bits, start, unigram = (scores[key] for key in ("bits_per_byte", "bits_per_byte_at_start", "unigram_bits_per_byte"))
    if last.get("step") != result.step:  # stopped between two evaluations: an older score would mislead
        last, bits = {}, None
    at_start = f" (at start {start:.3f})" if start is not None else ""
    score = f"; validation {bits:.3f} bits per byte{at_start}" if bits is not None else ""
    done = "done" if result.status == "finished" else f"stopped, as {result.reason}"
    console.result(
        f"{done}: {result.step:,}/{job.plan.horizon:,} steps, {result.tokens:,} tokens, {_time(how.seconds)}{score}"
    )
    if last.get("ema_bits_per_byte") is not None:
        holds = f"which {result_name(job)}/ holds"
        console.result(f"  averaged weights, {holds}: {last['ema_bits_per_byte']:.3f} bits per byte")
    if bits is not None and unigram is not None:
        compared = f"{1 - bits / unigram:.1%} below" if bits <= unigram else f"{bits / unigram - 1:.1%} above"
        console.result(f"  unigram model of the same tokens: {unigram:.3f} bits per byte; this model is {compared} it")
    if last.get("by_position"):
        console.result(f"  loss by position: {_by_position(last)}")
    for row in rows:
        if row["kind"] == "sample" and row["step"] == result.step:
            console.result(f"  sample: {console.printable(row['prompt'] + '|' + row['text'])}")
    console.result(f"  next: {' · '.join(how.following)}")
