"""The tests of the fault list, long ones too, as figures: how many items of the list each have only passing tests.

    python benchmarks/faults/fault_tests.py --json list.json

Not here: the tests, and which of them belong to an item (tests/faults/fault_list.py).
"""

import argparse
import runpy
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from report import figure, write_figures

ROOT = Path(__file__).resolve().parents[2]
BAD_INPUTS = 60
"""Distinct bad inputs that have to be tried at least."""
_WORST = ("passed", "skipped", "failed")


def run_tests(tests: Sequence[str]) -> tuple[dict[str, str], int]:
    """Run tests by their ids. Returns how each function ended, the worst of its cases, and the number of bad inputs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "junit.xml"
        options = ["-q", "-p", "no:cacheprovider", f"--junitxml={path}", "-o", "junit_family=xunit1"]
        subprocess.run([sys.executable, "-m", "pytest", *options, *tests], cwd=ROOT, check=False)
        cases = list(ElementTree.parse(path).iter("testcase"))
    outcomes: dict[str, str] = {}
    for case in cases:
        name = f"{case.get('file')}::{str(case.get('name')).partition('[')[0]}"
        kinds = {child.tag for child in case}
        ended = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        outcomes[name] = max(outcomes.get(name, "passed"), ended, key=_WORST.index)
    tried = sum(str(case.get("file")).endswith("test_bad_inputs.py") and "[" in str(case.get("name")) for case in cases)
    return outcomes, tried


def main() -> None:
    """Run the tests and write the figures."""
    parser = argparse.ArgumentParser(description="Run the tests of the fault list.")
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    given = parser.parse_args()
    items: Sequence[Mapping[str, Any]] = runpy.run_path(str(ROOT / "tests/faults/fault_list.py"))["ITEMS"]
    began = time.monotonic()
    wanted = dict.fromkeys(test for item in items for test in item.get("tests", ()))
    files = dict.fromkeys([*(test.partition("::")[0] for test in wanted), "tests/faults/test_bad_inputs.py"])
    outcomes, tried = run_tests(list(files))
    applicable = [item for item in items if "why_not" not in item]
    good = [item for item in applicable if all(outcomes.get(test) == "passed" for test in item["tests"])]
    figures = [
        figure("items of the fault list that pass", f"{len(good)} of {len(applicable)}", "all", good == applicable),
        figure("bad inputs tried", tried, f"≥ {BAD_INPUTS}", tried >= BAD_INPUTS),
        figure(
            "tests that fail",
            sum(end == "failed" for end in outcomes.values()),
            "= 0",
            "failed" not in outcomes.values(),
        ),
    ]
    about = {"seconds": round(time.monotonic() - began, 1), "outcomes": {t: outcomes.get(t, "not run") for t in wanted}}
    write_figures(given.json, "fault_list", figures, **about)


if __name__ == "__main__":
    main()
