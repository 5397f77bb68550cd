"""Campaign C: what a power loss could leave of a training run, and whether its last acknowledged step loads.

    python benchmarks/faults/power_loss.py --seed 1 --json C.json

A run is recorded: at each fsync, rename and removal the disk is imagined as it might be after a power loss at that very
moment, and written down as an image. A file holds what it held when it was last forced to the disk; a directory has the
names it had when it was. Three images for each moment:

    strict   nothing survives that was not forced: unsynced files are empty, unsynced names are not there
    names    names survive, contents do not: every unsynced file is there and empty
    mixed    each file and each directory is drawn: as forced, as it was in memory, or (a file) cut in the middle

The command is started on every image; it must go on at the last step that was acknowledged before, or later.
Not here: kills without loss of memory (training_kills.py).
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lives import Life, preload
from report import figure, write_figures
from training_kills import _BEGUN, _RESUMED, _SAVED, RECIPE, number

STEPS = 5
KINDS = ("strict", "names", "mixed")


class Recorder:
    """Follows what this process forces to the disk below `root` and writes images of what a power loss would leave."""

    def __init__(self, root: Path, images: Path, log: Path, seed: int) -> None:
        self.root, self.images, self.log, self.draw = root, images, log, random.Random(seed)
        self.files: dict[int, bytes] = {}
        """File -> content when it was last forced."""
        self.names: dict[int, dict[str, int]] = {}
        """Directory -> its names and what they stood for when it was last forced."""
        self.contents: dict[int, bytes] = {}
        """File -> what stands, or stood last, in memory."""
        self.now: dict[int, dict[str, int]] = {}
        """Directory -> its names in memory now."""
        self.known: dict[int, int] = {}
        """Inode -> our number of the file or directory; a freed inode that comes again gets another number."""
        self.given = 0
        self.count = 0
        self.seen: set[str] = set()
        self.lock = threading.RLock()
        self.busy = threading.local()

    def install(self) -> None:
        """Begin: from here on every fsync, rename and removal of this process is a moment of power loss."""
        self._follow()
        for path in [self.root, *self.root.rglob("*")]:  # what was there before is on the disk
            self._force(path)
        for name in ("fsync", "fdatasync", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, self._watched(getattr(os, name), forces="sync" in name))

    def _watched(self, call: Callable[..., Any], forces: bool) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if getattr(self.busy, "now", False):
                return call(*arguments, **options)
            with self.lock:
                self.busy.now = True
                try:
                    self.moment()
                    done = call(*arguments, **options)
                    if forces:
                        first = arguments[0]
                        descriptor = first if isinstance(first, int) else first.fileno()
                        self._force(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
                    else:
                        self._follow()
                    return done
                finally:
                    self.busy.now = False

        return watched

    def _force(self, path: Path) -> None:
        if not path.is_relative_to(self.root):
            return
        own = self.known[path.lstat().st_ino]
        if path.is_dir():
            self.names[own] = dict(self.now[own])
        else:
            self.files[own] = self.contents[own]

    def _follow(self) -> None:
        """Read what stands in memory now."""
        live: dict[int, Path] = {}
        for folder, _, files in os.walk(self.root):
            live |= {(path := Path(folder, name)).lstat().st_ino: path for name in (".", *files)}
        self.known = {inode: own for inode, own in self.known.items() if inode in live}
        for inode in live:
            if inode not in self.known:
                self.given += 1
                self.known[inode] = self.given
        self.now = {}
        for inode, path in live.items():
            own = self.known[inode]
            if path.is_dir():
                self.now[own] = {entry.name: self.known[entry.inode()] for entry in os.scandir(path)}
            else:
                self.contents[own] = path.read_bytes()

    def moment(self) -> None:
        """Write the images of a power loss now, with the step that was acknowledged before."""
        self._follow()
        found = [number(text) for text in _SAVED.findall(self.log.read_text(encoding="utf-8", errors="replace"))]
        for kind in KINDS:
            image = self.images / f"{self.count:05d}-{kind}"
            self._write(self.known[self.root.lstat().st_ino], image, kind)
            about = {"acknowledged": max(found, default=0)}
            if (seen := f"{about} {_digest(image)}") in self.seen:
                shutil.rmtree(image)
                continue
            self.seen.add(seen)
            (self.images / f"{image.name}.json").write_text(json.dumps(about))
        self.count += 1

    def _write(self, own: int, place: Path, kind: str) -> None:
        """Write an imagined directory."""
        place.mkdir()
        forced, now = self.names.get(own, {}), self.now.get(own, {})
        names = {"strict": forced, "names": now, "mixed": forced if self.draw.random() < 0.5 else now}[kind]
        for name, entry in names.items():
            if entry not in self.contents:
                self._write(entry, place / name, kind)
                continue
            memory, content = self.contents[entry], self.files.get(entry, b"")
            if kind == "mixed" and content != memory:
                cut = memory[: self.draw.randrange(len(memory) + 1)]
                content = self.draw.choice((content, memory, cut))
            (place / name).write_bytes(content)


def _digest(image: Path) -> str:
    found = hashlib.sha256()
    for path in sorted(image.rglob("*")):
        found.update(f"{path.relative_to(image)}\0".encode())
        found.update(path.read_bytes() if path.is_file() else b"/")
    return found.hexdigest()


class Campaign:
    """A recorded run and the command started on every image of it."""

    def __init__(self, work: Path, seed: int) -> None:
        self.work, self.seed = work, seed
        self.faults: list[str] = []
        self.moments = self.tried = self.lost = 0

    def arguments(self, background: bool, steps: int = STEPS) -> list[str]:
        """The command that is recorded, and started again on its images."""
        switch = f"checkpoint.background={'true' if background else 'false'}"
        changes = [
            "checkpoint.every=1",
            switch,
            "eval.every=3",
            f"train.max_steps={steps}",
            f"data.dir={self.work}/data",
        ]
        return ["pretrain", "./mortal.yaml", *changes, "-o", "runs/mortal"]

    def go(self) -> None:
        """Record a run, then go on from each of its images; once with saves in line, once in the background."""
        (self.work / "mortal.yaml").write_text(RECIPE)
        with Life.forked(["tokenize", "./mortal.yaml"], self.work, self.work / "log.txt") as life:
            life.wait()
        for background in (False, True):
            self.one_recording(background)

    def one_recording(self, background: bool) -> None:
        """Record one run and start the command on every different image of it."""
        disk, images = self.work / "disk", self.work / "images"
        disk.mkdir()
        images.mkdir()
        shutil.copyfile(self.work / "mortal.yaml", disk / "mortal.yaml")
        log = self.work / "log.txt"
        recorder = Recorder(disk, images, log, self.seed)
        with Life.forked(self.arguments(background), disk, log, recorder.install) as life:
            life.wait()
            if life.ended != 0:
                raise RuntimeError(f"the recorded run ended with {life.ended}:\n{life.text()}")
        self.moments += len({path.name[:5] for path in images.iterdir()})
        for image in sorted(path for path in images.iterdir() if path.is_dir()):
            self.go_on(image, background, json.loads(image.with_name(f"{image.name}.json").read_text())["acknowledged"])
        shutil.rmtree(disk)
        shutil.rmtree(images)

    def go_on(self, image: Path, background: bool, acknowledged: int) -> None:
        """Start the command on an image and stop it once it has said where it goes on."""
        self.tried += 1
        shutil.copyfile(self.work / "mortal.yaml", image / "mortal.yaml")
        with Life.forked(self.arguments(background, STEPS + 1), image, self.work / "again.txt") as life:
            while not life.wait(0.005) and not _BEGUN.search(life.text()):
                pass
            life.kill()
            text = life.text()
        found = _RESUMED.search(text)
        at = number(found[1]) if found else 0
        if at < acknowledged or (life.ended or 0) > 0:
            self.lost += max(0, acknowledged - at)
            tail = " | ".join(text.strip().splitlines()[-2:])
            self.faults.append(f"{image.name}: step {acknowledged} was acknowledged, went on at {at} ({tail})")
            sys.stderr.write(self.faults[-1] + "\n")

    def figures(self) -> Iterator[dict[str, Any]]:
        """What the campaign measured, with limits."""
        yield figure("moments of power loss that differ", self.moments)
        yield figure("imagined disks on which the command was started", self.tried)
        yield figure("acknowledged steps lost", self.lost, "= 0", self.lost == 0)
        yield figure("disks on which it could not go on", len(self.faults), "= 0", not self.faults)


def main() -> None:
    """Run the campaign and write its figures."""
    parser = argparse.ArgumentParser(description="Imagine power losses during a training run.")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(2**32) if given.seed is None else given.seed
    sys.stdout.write(f"seed {seed}\n")
    preload()
    began = time.monotonic()
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # images are imagined: no disk has to wait for them
    with tempfile.TemporaryDirectory(prefix="megalodon-power-", dir=memory) as folder:
        campaign = Campaign(Path(folder), seed)
        campaign.go()
    about = {"seed": seed, "seconds": round(time.monotonic() - began, 1), "faults": campaign.faults}
    write_figures(given.json, "power_loss", list(campaign.figures()), **about)


if __name__ == "__main__":
    main()
