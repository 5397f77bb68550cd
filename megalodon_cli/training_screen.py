"""What `pretrain` shows: the header, a progress line every few steps, the lines at the end.

Not here: what is computed (megalodon/training), how a line reaches the terminal (console.py).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from megalodon_cli import console

if TYPE_CHECKING:
    from megalodon.model.megalodon import ModelConfig
    from megalodon.training.loop import Result, Row
    from megalodon.training.run import RunRecord
    from megalodon_cli.training_job import Ending, Job


class Screen:
    """Shows what the loop reports: a progress line every so many steps, other things on lines of their own."""

    def __init__(self, live: console.Progress, horizon: int, every: int, record: "RunRecord") -> None:
        self.live, self.horizon, self.every, self.record = live, horizon, every, record
        self._recent: list[float] = []

    def __call__(self, row: "Row") -> None:
        kind = row["kind"]
        if kind == "train":
            self._recent = [*self._recent[-31:], row["seconds"]]
            if row["step"] % self.every == 0 or row["step"] in (1, self.horizon):
                self.live.update(self._line(row))
        elif kind == "eval":
            averaged = f"; averaged weights {row['ema_valid_loss']:.4f}" if "ema_valid_loss" in row else ""
            self.live.line(f"eval at step {row['step']:,}: loss {row['valid_loss']:.4f}{_bits(row)}{averaged}")
            if row.get("by_position"):
                self.live.line(f"  loss by position: {_by_position(row)}")
        elif kind == "health":
            memory = " ".join(f"{layer['memory']['median']:.0f}" for layer in row["layers"])
            self.live.line(f"health at step {row['step']:,}: memory of layers (tokens) {memory}")
        elif kind == "sample":
            self.live.line(f"sample at step {row['step']:,}: {row['prompt']}|{row['text']}")
        elif kind == "event" and row["event"] == "rollback":
            left_out = ", ".join(f"{start:,} to {stop - 1:,}" for start, stop in row["samples"])
            back = f"step {row['from']:,}: rolled back to step {row['to']:,}"
            self.live.line(f"{back}; samples {left_out} are left out from now on: {row['reason']}")
        elif kind == "event":
            self.live.line(f"step {row['step']:,}: {row['event']}: {row['reason']}")
        elif kind == "warning":
            console.warning(row["text"])
        else:
            self.live.line(row["text"])
            if row["event"] == "saved":
                self.record.update(step=row["step"])

    def _line(self, row: "Row") -> str:
        step, share = row["step"], row["peak_share"]
        eta = (self.horizon - step) * sum(self._recent) / len(self._recent)
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        bits = "-" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.3f}"
        norm = "-" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
        peak = "" if share is None else f"  peak {share:.0%}"
        waited = row["data_seconds"] / max(row["seconds"], 1e-9)
        return (
            f"step {step:>{len(str(self.horizon))}}/{self.horizon}  {step / self.horizon:.1%}  loss {loss}  "
            f"bpb {bits}  lr {row['lr']:.1e}  gnorm {norm}  {console.amount(row['tok_per_s'])} tok/s{peak}  "
            f"data {waited:.1%}  mem {row['memory'] / 2**30:.1f}G  eta {_time(eta)}"
        )


def _bits(row: Mapping[str, Any]) -> str:
    return "" if row.get("bits_per_byte") is None else f", {row['bits_per_byte']:.3f} bits per byte"


def _by_position(row: Mapping[str, Any]) -> str:
    return "  ".join(f"{end}: {loss:.2f}" for end, loss in row["by_position"].items())


def _time(seconds: float) -> str:
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 60}m{whole % 60:02d}s" if whole >= 60 else f"{whole}s"


def header(job: "Job", peak: float) -> None:
    """Say what is about to happen: model, data, needs, and where every document and token goes."""
    import torch

    config, plan, loader = job.config, job.plan, job.loader
    if changes := [f"{key} {old} -> {new}" for key, old, new in job.resolved.changes]:
        console.info(f"overrides: {', '.join(changes)}")
    threads = f", {torch.get_num_threads()} threads" if plan.device.type == "cpu" else ""
    precision = "bf16-mixed" if plan.bf16 else "fp32"
    console.info(
        f"pretrain {config.name} -> {job.directory}    {plan.device}{threads}, torch {torch.__version__}, {precision}"
    )
    count, tokens = job.model_config.num_parameters(), plan.horizon * plan.batch_tokens
    console.info(f"  model    {count:,} parameters: {_shares(job.model_config)}")
    epochs, size = tokens / (loader.num_samples * plan.seq_len), f"{plan.rows} x {plan.seq_len:,}"
    console.info(
        f"  data     {job.prepared.train.num_tokens:,} tokens; {plan.horizon:,} steps of {size} = {tokens:,} tokens, "
        f"{epochs:.2f} epochs; {plan.micro_rows} in a pass"
    )
    kept = config.checkpoint.keep_last + config.checkpoint.keep_best + 1
    disk = (12 * kept + 4) * count
    console.info(
        f"  needs    disk {console.amount(disk, ' ', 'G')}B for up to {kept} checkpoints and the model (derived); "
        f"matrix product of this machine {console.amount(peak, ' ', 'G')}FLOP/s (measured)"
    )
    for note in job.prepared.notes:
        console.detail(note)
    for line in (*job.prepared.ledger.lines(), *loader.ledger_lines()):
        console.info(f"  {line}")


def _shares(config: "ModelConfig") -> str:
    """Where the parameters are, in percent."""
    import torch

    from megalodon.model.megalodon import Megalodon

    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in Megalodon(config).named_parameters()}
    parts = {"embeddings": 0, "attention": 0, "ffn": 0, "cema and norms": 0}
    for name, size in sizes.items():
        last = name.split(".")[-2]
        if name.startswith("embed.") or last == "output":
            parts["embeddings"] += size
        elif ".nffn." in name:
            parts["ffn"] += size
        elif last in ("wv", "wz", "wr", "wh1", "wh2", "mega"):
            parts["attention"] += size
        else:
            parts["cema and norms"] += size
    return ", ".join(f"{name} {size / sum(sizes.values()):.0%}" for name, size in parts.items())


def ending(job: "Job", result: "Result", how: "Ending") -> None:
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
        console.result(f"  averaged weights, which model/ holds: {last['ema_bits_per_byte']:.3f} bits per byte")
    if bits is not None and unigram is not None:
        compared = f"{1 - bits / unigram:.1%} below" if bits <= unigram else f"{bits / unigram - 1:.1%} above"
        console.result(f"  unigram model of the same tokens: {unigram:.3f} bits per byte; this model is {compared} it")
    if last.get("by_position"):
        console.result(f"  loss by position: {_by_position(last)}")
    for row in rows:
        if row["kind"] == "sample" and row["step"] == result.step:
            console.result(f"  sample: {row['prompt']}|{row['text']}")
    console.result(f"  next: {' · '.join(how.following)}")
