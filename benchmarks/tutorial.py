"""Run every command of docs/tutorial.md, in order, in a fresh folder; what fails ends it.

    python benchmarks/tutorial.py
    python benchmarks/tutorial.py --folder /tmp/x --svg docs/chat.svg       # also draw the last two conversations
    python benchmarks/tutorial.py --folder /tmp/x --first 6                 # go on in a folder, from a block on

Not here: the commands (docs/tutorial.md), which tests hold to what they say.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def blocks(text: str) -> list[str]:
    """The shell blocks of a page."""
    return re.findall(r"^```sh\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def main() -> None:
    """Run the page."""
    parser = argparse.ArgumentParser(description="Run every command of docs/tutorial.md in a fresh folder.")
    parser.add_argument("--folder", type=Path, help="where; a temporary folder if left out")
    parser.add_argument("--first", type=int, default=1, help="the block to begin with (default 1)")
    parser.add_argument("--svg", type=Path, help="draw the last block with its output")
    parser.add_argument("--first-on-path", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    folder = given.folder or Path(tempfile.mkdtemp(prefix="megalodon-tutorial-"))
    folder.mkdir(parents=True, exist_ok=True)
    # The commands are those of the environment that runs this file.
    places = (given.first_on_path, str(Path(sys.executable).parent), os.environ["PATH"])
    path = os.pathsep.join(place for place in places if place)
    environment = {**os.environ, "PATH": path, "MEGALODON": str(ROOT)}
    began, shown = time.monotonic(), ""
    page = blocks((ROOT / "docs/tutorial.md").read_text(encoding="utf-8"))
    for number, block in list(enumerate(page, 1))[given.first - 1 :]:
        say(f"\n== {number} of {len(page)}, after {time.monotonic() - began:.0f} s\n{block}")
        # The last block is drawn with all that a terminal shows; of the others notes come as they are written.
        beside = subprocess.STDOUT if number == len(page) else None
        done = subprocess.run(
            ["sh", "-e"],
            input=block,
            cwd=folder,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=beside,
            check=False,
        )
        say(done.stdout)
        shown = done.stdout
        if done.returncode:
            sys.exit(f"block {number} ended with {done.returncode}")
    say(f"{len(page)} blocks in {time.monotonic() - began:.0f} s, in {folder}")
    if given.svg:
        draw(page[-1], shown, given.svg)


def say(text: str) -> None:
    """Show a line at once, beside what the commands say on stderr."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def draw(block: str, shown: str, target: Path) -> None:
    """Draw commands and what they printed as a terminal would show them."""
    from rich.console import Console
    from rich.text import Text

    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=100, file=nowhere)
        console.print(Text(f"$ {block.rstrip()}", style="bold"))
        console.print(Text(shown.rstrip()))
        target.write_text(console.export_svg(title="megalodon generate"), encoding="utf-8")


if __name__ == "__main__":
    main()
