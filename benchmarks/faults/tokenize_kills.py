"""Campaign B: SIGKILL `megalodon tokenize` at random moments, run it again, and compare the store with an unbroken one.

    python benchmarks/faults/tokenize_kills.py --kills 50 --seed 1 --data ../shared/data/books/train --json B.json

Every third kill hits a worker, and then the command has to end with an error of its own; the others hit the command.
Stores alternate between a given tokenizer and one that is trained by the killed command. Without --data the text is
generated. The final store must have the same files with the same bytes as one that was built without a fault.
Not here: how a process is started and killed (lives.py), what the journal holds (megalodon/data).
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lives import Life
from report import figure, write_figures

MOST_BYTES = 12 * 10**6
"""Text that is tokenized: enough for several seconds and several tasks."""
WORKERS = 2
WAYS = (("--tokenizer", "tok.model"), ("--train", "--vocab-size", "1000"))
"""A tokenizer that is there; one that the killed command trains."""


def generated(folder: Path, seed: int) -> None:
    """Write 24 texts of half a megabyte, of words drawn from a seeded generator."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnoprstuvwyéß", k=draw.randint(1, 9))) for _ in range(4000)]
    for number in range(24):
        lines = [" ".join(draw.choices(words, k=draw.randint(1, 20))) for _ in range(7000)]
        (folder / f"{number:02d}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def copied(data: Path, folder: Path) -> None:
    """Copy the first texts of a folder, MOST_BYTES of them at most."""
    total = 0
    for path in sorted(data.rglob("*.txt")):
        if (total := total + path.stat().st_size) > MOST_BYTES:
            return
        shutil.copyfile(path, folder / path.name)


def contents(store: Path) -> dict[str, str]:
    """The sha256 of every file of a store by its name."""
    files = sorted(path for path in store.rglob("*") if path.is_file())
    return {str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def workers(pid: int) -> list[int]:
    """The worker processes of a command: its children that came by multiprocessing's spawn."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    except OSError:
        return []


class Campaign:
    """Stores that are built by a command which is killed again and again."""

    def __init__(self, work: Path, kills: int, seed: int) -> None:
        self.work, self.kills, self.draw = work, kills, random.Random(seed)
        self.faults: list[str] = []
        self.victims: Counter[str] = Counter()
        self.done = self.stores = self.unequal = 0
        self.references: dict[tuple[str, ...], dict[str, str]] = {}
        self.seconds: dict[tuple[str, ...], float] = {}

    def arguments(self, way: tuple[str, ...], store: str) -> list[str]:
        """The command that builds a store."""
        return ["tokenize", "--input", "text", "--document", "blank-line", "--valid", "5%", *way, "-o", store]

    def go(self) -> None:
        """Build the stores to compare with, then kill until there were enough kills."""
        first = self.build(WAYS[1], "whole-1")
        shutil.copyfile(self.work / "whole-1/tokenizer/tokenizer.model", self.work / "tok.model")
        self.references = {WAYS[1]: first, WAYS[0]: self.build(WAYS[0], "whole-0")}
        while self.done < self.kills:
            self.one_store(WAYS[self.stores % 2])

    def build(self, way: tuple[str, ...], store: str) -> dict[str, str]:
        """Build a store without a fault."""
        began = time.monotonic()
        with Life.spawned(self.arguments(way, store), self.work, self.work / "log.txt") as life:
            life.wait()
            if life.ended != 0:
                raise RuntimeError(f"the unbroken build ended with {life.ended}:\n{life.text()}")
        self.seconds[way] = time.monotonic() - began
        return contents(self.work / store)

    def one_store(self, way: tuple[str, ...]) -> None:
        """Kill the command one to three times, restart it until the store is there, then compare it."""
        store = f"store-{self.stores}"
        self.stores += 1
        planned = self.done + self.draw.randint(1, 3)
        for attempt in range(1000):
            with Life.spawned(self.arguments(way, store), self.work, self.work / "log.txt") as life:
                hit = None
                if self.done < min(planned, self.kills):
                    # a restart keeps what is finished: later attempts are shorter
                    life.wait(self.draw.uniform(0, 1.1 * self.seconds[way] / min(4, 1 + attempt / 2)))
                    hit = self.hit(life)
                life.wait()
                if life.ended == 0:
                    break
                if hit is None:
                    return self.fault(store, f"ended with {life.ended} by itself", life.text())
            self.done += 1
            self.victims[hit] += 1
        if contents(self.work / store) != self.references[way]:
            self.unequal += 1
            self.fault(store, "differs from the unbroken store", "")
        if remains := [path.name for path in self.work.glob(".*")]:
            self.fault(store, f"left {', '.join(remains)}", "")
        shutil.rmtree(self.work / store, ignore_errors=True)

    def hit(self, life: Life) -> str | None:
        """Kill the command or, each third time, one of its workers; return who it was, None if nobody was left."""
        if life.wait(0):
            return None
        if self.done % 3 != 2 or not (pids := workers(life.pid)):
            return "command" if life.kill() else None
        return "worker" if self.hit_worker(life, self.draw.choice(pids)) else None

    def hit_worker(self, life: Life, pid: int) -> bool:
        """Kill a worker and see the command end with an error: documents are never left out in silence."""
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        try:
            if pid in workers(life.pid):  # still that worker, not another process of the same number
                signal.pidfd_send_signal(handle, signal.SIGKILL)
        except ProcessLookupError:
            return False
        finally:
            os.close(handle)
        life.wait()
        said = [line for line in life.text().splitlines() if line.startswith("error: ")]
        # 0: the worker had nothing left to do; that kill is not counted, and the store is compared like any other
        if life.ended != 0 and (life.ended not in (1, 3) or len(said) != 1 or "Traceback" in life.text()):
            self.fault("worker", f"its death ended the command with {life.ended}", life.text())
        return True

    def fault(self, store: str, what: str, text: str) -> None:
        """Record what must not happen, with the last lines that were printed."""
        tail = " | ".join(text.strip().splitlines()[-3:])
        self.faults.append(f"{store}: {what}" + (f" ({tail})" if tail else ""))
        sys.stderr.write(self.faults[-1] + "\n")

    def figures(self) -> Iterator[dict[str, Any]]:
        """What the campaign measured, with limits."""
        yield figure("SIGKILLs of a living tokenize", self.done, f"≥ {self.kills}", self.done >= self.kills)
        yield figure("of these, of the command", self.victims["command"])
        yield figure("of these, of one of its workers", self.victims["worker"])
        equal = f"{self.stores - self.unequal} of {self.stores}"
        yield figure("stores equal to the unbroken one, all files by sha256", equal, "all", self.unequal == 0)
        yield figure("other faults", len(self.faults), "= 0", not self.faults)


def main() -> None:
    """Run the campaign and write its figures."""
    parser = argparse.ArgumentParser(description="SIGKILL tokenize at random moments.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--data", type=Path, default=None, help="folder of .txt files; generated if left out")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    sys.stdout.write(f"seed {seed}\n")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="megalodon-kills-") as folder:
        work = Path(folder)
        (work / "text").mkdir()
        if given.data is None:
            generated(work / "text", seed)
        else:
            copied(given.data, work / "text")
        campaign = Campaign(work, given.kills, seed)
        campaign.go()
    about = {"seed": seed, "seconds": round(time.monotonic() - began, 1), "faults": campaign.faults}
    write_figures(given.json, "tokenize_kills", list(campaign.figures()), **about)


if __name__ == "__main__":
    main()
