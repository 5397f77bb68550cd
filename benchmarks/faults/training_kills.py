"""Campaign A: SIGKILL a training run that saves often at random moments, restart it, and compare the end bit by bit.

    python benchmarks/faults/training_kills.py --kills 200 --seed 1 --json A.json

A step is acknowledged once `saved step N` was printed or its directory has its name. Moments are drawn evenly over what
is left of a run, one in six over what follows its last step; the phase of each kill is counted. Runs alternate
between saves at every and at every second step, and between saves in the background and in line.
Not here: how a process is started and killed (lives.py), power loss (power_loss.py).
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lives import Life, preload
from report import figure, write_figures

STEPS = 24
EVAL_EVERY = 6
RECIPE = f"""base: debug
name: mortal
model: {{model_dim: 24, z_dim: 12, num_heads: 2, value_dim: 34, ffn_hidden_dim: 29, cema_ndim: 3,
  norm_num_groups: 4, chunk_size: 10, dropout: 0.1}}
data: {{dir: data, seq_len: 37}}
train: {{max_steps: {STEPS}, batch_tokens: 148, micro_batch: 2}}
eval: {{every: {EVAL_EVERY}, tokens: 300, samples: {{max_new_tokens: 5}}}}
checkpoint: {{keep_last: 2, keep_best: 1}}
log: {{every: 1}}
"""
VARIANTS = tuple(
    (f"checkpoint.every={every}", f"checkpoint.background={background}")
    for every in (1, 2)
    for background in ("false", "true")
)
TIMES = {"tok_per_s", "seconds", "data_seconds", "peak_share", "memory", "stall_seconds"}
"""Fields of metrics.jsonl that differ between two runs of the same steps."""
PHASES = ("start", "step", "evaluation", "save", "purge", "export", "end")
_SAVED = re.compile(r"saved step ([\d,]+)")
_RESUMED = re.compile(r"resuming at step ([\d,]+)")
_FIRST, _LAST = (re.compile(rf"^step +{step}/", re.MULTILINE) for step in (1, STEPS))
_BEGUN = re.compile(r"resuming at step|starting at step 0")


def number(text: str) -> int:
    """1,204 as an integer."""
    return int(text.replace(",", ""))


def leftovers(run: Path) -> list[Path]:
    """Everything below a run that is half-written or half-deleted."""
    return [path for path in run.rglob(".*") if path.name.startswith((".tmp-", ".del-"))]


def committed(run: Path) -> int:
    """The newest step that has its name; 0 if none."""
    names = [path.name for path in (run / "checkpoints").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def phase(run: Path, text: str) -> str:
    """What a killed run was doing, from what it left and what it had printed."""
    if not _BEGUN.search(text):
        return "start"
    names = [path.name for path in leftovers(run)]
    if any(name.startswith(".tmp-model") for name in names):
        return "export"
    if any(name.startswith(".tmp-step") for name in names):
        return "save"
    if any(name.startswith(".del-") for name in names):
        return "purge"
    if (run / "model").exists():
        return "end"
    rows = re.findall(r"^(?:step +(\d+)/|eval at step (\d+))", text, re.MULTILINE)
    due = bool(rows) and rows[-1][0] != "" and int(rows[-1][0]) % EVAL_EVERY == 0
    return "evaluation" if due or (rows and rows[-1][1]) else "step"


def tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Type, shape and bytes of every tensor of a file; the order of words in its header is drawn anew each time."""
    raw = path.read_bytes()
    begin = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:begin])
    header.pop("__metadata__", None)
    places = {name: [begin + offset for offset in entry["data_offsets"]] for name, entry in header.items()}
    return {name: (entry["dtype"], entry["shape"], raw[slice(*places[name])]) for name, entry in header.items()}


def outcome(run: Path) -> dict[str, Any]:
    """What two runs of the same steps must share: final checkpoint, model and metrics without times."""
    last = run / "checkpoints" / f"step-{STEPS:08d}"
    manifest = json.loads((last / "manifest.json").read_text())
    found: dict[str, Any] = {f"manifest {key}": manifest[key] for key in ("step", "tensors", "valid_loss")}
    for place in (last, run / "model"):
        for path in sorted(place.rglob("*")):
            if path.is_file() and path != last / "manifest.json":
                read = tensors if path.suffix == ".safetensors" else Path.read_bytes
                found[str(path.relative_to(run))] = read(path)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]
    return found | {"metrics.jsonl": rows}


class Campaign:
    """Runs that are killed and restarted until so many kills have hit a living process."""

    def __init__(self, work: Path, kills: int, seed: int) -> None:
        self.work, self.kills, self.draw = work, kills, random.Random(seed)
        self.faults: list[str] = []
        self.phases: Counter[str] = Counter()
        self.done = self.restarts = self.resumed = self.lost = self.remains = self.runs = self.unequal = 0
        (work / "mortal.yaml").write_text(RECIPE)
        self.references: dict[tuple[str, ...], dict[str, Any]] = {}
        self.first = self.each = self.last = 0.0
        """Seconds up to the first step, of a step, from the last step to the end."""

    def arguments(self, variant: tuple[str, ...], run: Path) -> list[str]:
        """The command of a run."""
        return ["pretrain", "./mortal.yaml", *variant, "-o", run.name]

    def reference(self, variant: tuple[str, ...]) -> None:
        """Run a variant to its end without a fault."""
        run = self.work / f"whole-{len(self.references)}"
        began = time.monotonic()
        with Life.forked(self.arguments(variant, run), self.work, self.work / "log.txt") as life:
            times = []
            for mark in (_FIRST, _LAST):
                while not life.wait(0.005) and not mark.search(life.text()):
                    pass
                times.append(time.monotonic() - began)
            life.wait()
            if life.ended != 0:
                raise RuntimeError(f"the uninterrupted run ended with {life.ended}:\n{life.text()}")
        self.first, last = times
        self.each, self.last = (last - self.first) / (STEPS - 1), time.monotonic() - began - last
        self.references[variant] = outcome(run)

    def go(self) -> None:
        """Kill until there were enough kills, then bring the last run to its end."""
        for variant in VARIANTS:
            self.reference(variant)
        while self.done < self.kills:
            self.one_run(VARIANTS[self.runs % len(VARIANTS)])

    def one_run(self, variant: tuple[str, ...]) -> None:
        """Kill and restart one run until it is finished, then compare it with its reference."""
        run = self.work / f"run-{self.runs}"
        self.runs += 1
        acknowledged = idle = 0
        while True:
            with Life.forked(self.arguments(variant, run), self.work, self.work / "log.txt") as life:
                if self.done < self.kills:
                    self.let_live(life, acknowledged, idle)
                else:
                    life.wait()
                killed = life.kill()
                text = life.text()
            self.check_start(life, run, text, acknowledged)
            newest = max([acknowledged, committed(run), *(number(n) for n in _SAVED.findall(text))])
            acknowledged, idle = newest, 0 if newest > acknowledged else idle + 1
            if not killed:
                break
            self.done += 1
            self.phases[phase(run, text)] += 1
        if life.ended != 0:
            self.fault(run, f"ended with {life.ended}, expected 0", text)
        else:
            self.compare(run, self.references[variant])
        shutil.rmtree(run, ignore_errors=True)

    def let_live(self, life: Life, acknowledged: int, idle: int) -> None:
        """Wait for a random moment of what is left; each sixth life for one after its last step, which is short."""
        if self.draw.random() < 1 / 6:
            while not life.wait(0.005) and not _LAST.search(life.text()):
                pass
            life.wait(self.draw.uniform(0, 1.2 * self.last))
            return
        left = self.first + self.each * (STEPS - acknowledged) + self.last
        # a machine slower than a moment ago must not let every life end before it gets anywhere
        life.wait(self.draw.uniform(0, 1.1 * left * 1.3**idle))

    def check_start(self, life: Life, run: Path, text: str, acknowledged: int) -> None:
        """A life that got past its start continued at the last acknowledged step and removed what others left."""
        if not (begun := _BEGUN.search(text)) and not _SAVED.search(text):
            return
        if acknowledged:
            self.restarts += 1
            found = _RESUMED.search(text)
            at = number(found[1]) if found else 0
            self.resumed += found is not None
            if at < acknowledged:
                self.lost += acknowledged - at
                self.fault(run, f"went on at step {at}, but step {acknowledged} was acknowledged", text)
        # A clock of the file system may be a tick behind; whatever is older than this life was left by another.
        # By ctime: a step that this life renamed in order to remove it keeps the mtime of the life that wrote it.
        old = [path for path in leftovers(run) if path.lstat().st_ctime < life.began - 0.05] if begun else []
        if old:
            self.remains += len(old)
            self.fault(run, f"kept {', '.join(path.name for path in old)} of an earlier life", text)

    def compare(self, run: Path, whole: dict[str, Any]) -> None:
        """A finished run holds what its uninterrupted twin holds, and nothing half-written."""
        mine = outcome(run)
        different = sorted(key for key in whole.keys() | mine.keys() if whole.get(key) != mine.get(key))
        if different:
            self.unequal += 1
            self.fault(run, f"differs from the uninterrupted run in {', '.join(different)}", "")
        if remains := leftovers(run):
            self.remains += len(remains)
            self.fault(run, f"finished with {', '.join(path.name for path in remains)}", "")

    def fault(self, run: Path, what: str, text: str) -> None:
        """Record what must not happen, with the last lines that were printed."""
        tail = " | ".join(text.strip().splitlines()[-3:])
        self.faults.append(f"{run.name}: {what}" + (f" ({tail})" if tail else ""))
        sys.stderr.write(self.faults[-1] + "\n")

    def figures(self) -> Iterator[dict[str, Any]]:
        """What the campaign measured, with limits."""
        yield figure("SIGKILLs of a living training run", self.done, f"≥ {self.kills}", self.done >= self.kills)
        yield figure("acknowledged steps lost", self.lost, "= 0", self.lost == 0)
        yield figure(
            "restarts after an acknowledged step that resume",
            f"{self.resumed} of {self.restarts}",
            "all",
            self.resumed == self.restarts > 0,
        )
        yield figure("half-written files left by an earlier life", self.remains, "= 0", self.remains == 0)
        yield figure(
            "runs that ended bit for bit like their uninterrupted twin",
            f"{self.runs - self.unequal} of {self.runs}",
            "all",
            self.unequal == 0,
        )
        yield figure("other faults", len(self.faults), "= 0", not self.faults)
        yield figure("kills by phase", ", ".join(f"{name} {self.phases[name]}" for name in PHASES))


def main() -> None:
    """Run the campaign and write its figures."""
    parser = argparse.ArgumentParser(description="SIGKILL a training run at random moments.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    sys.stdout.write(f"seed {seed}\n")
    preload()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megalodon-kills-") as work:
        campaign = Campaign(Path(work), given.kills, seed)
        campaign.go()
    about = {"seed": seed, "seconds": round(time.monotonic() - began, 1), "faults": campaign.faults}
    write_figures(given.json, "training_kills", list(campaign.figures()), **about)


if __name__ == "__main__":
    main()
