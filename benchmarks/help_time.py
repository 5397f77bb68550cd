"""Time `megalodon --help` in fresh processes and list what it loads; prints a Markdown line and the modules.

python benchmarks/help_time.py
"""

import argparse
import statistics
import subprocess
import sys
import time

HEAVY = ("torch", "triton", "numpy", "datasets", "sentencepiece")
LIST_MODULES = """
import sys
sys.argv = ["megalodon", "--help"]
from megalodon_cli.app import main
try:
    main()
except SystemExit:
    pass
sys.stderr.write("\\n".join(sys.modules))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Median time of `megalodon --help` and the modules it loads.")
    parser.add_argument("--runs", type=int, default=5, help="processes to time (default 5)")
    runs = parser.parse_args().runs
    command = [sys.executable, "-m", "megalodon_cli", "--help"]
    # The first process compiles bytecode, which users pay once; it is not counted.
    seconds = [_time(command) for _ in range(runs + 1)][1:]
    listed = subprocess.run([sys.executable, "-c", LIST_MODULES], capture_output=True, text=True, check=True).stderr
    modules = listed.splitlines()
    heavy = [name for name in HEAVY if name in modules] or ["none"]
    times = ", ".join(f"{second:.2f}" for second in seconds)
    sys.stdout.write(
        f"`megalodon --help`: median {statistics.median(seconds):.2f} s of {runs} ({times}); "
        f"{len(modules)} modules, heavy ones among them: {', '.join(heavy)}\n"
    )


def _time(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
