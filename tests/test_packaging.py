"""What the checkout must hold for its packages to be right. Built wheels are tested by .ci/run."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from megalodon_cli import recipe_files

ROOT = Path(__file__).parents[1]
TEXTS = [
    *(path for pattern in ("*.md", "Makefile", "pyproject.toml") for path in ROOT.glob(pattern)),
    *(path for folder in ("docs", "megalodon", "megalodon_cli", "kernels", "recipes", ".ci", "examples", "benchmarks")
      for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts),
]  # fmt: skip


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_newest_changelog_version_is_the_projects(project):
    versions = re.findall(r"^## \[([0-9][^\]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == project["project"]["version"]


def test_the_version_stands_in_one_place(project):
    version = project["project"]["version"]
    for folder in ("megalodon", "megalodon_cli", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert f'"{version}"' not in path.read_text(), path


def test_kernels_is_a_source_root_and_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "megalodon_kernels" / "__init__.py").exists()


def test_the_wheel_has_three_packages_and_the_recipes(project):
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {Path(package).name for package in wheel["packages"]} == {"megalodon", "megalodon_cli", "megalodon_kernels"}
    assert wheel["force-include"] == {"recipes": "megalodon_cli/_recipes"}
    for package in wheel["packages"]:
        for folder in (ROOT / package).rglob("*"):
            if folder.is_dir() and any(folder.glob("*.py")):
                assert (folder / "__init__.py").exists(), f"{folder} would be left out of imports"


def test_a_checkout_reads_its_own_recipes():
    assert recipe_files.folder() == ROOT / "recipes"
    assert {"quickstart", "7b-llama", "finetune-lora"} <= set(recipe_files.names())


def test_nothing_tells_to_install_the_bare_name():
    bare = re.compile(r"pip3?\s+install\s+(?:-\S+\s+)*['\"]?megalodon(?!-lm)\b(?![/\\.])")
    assert bare.search("pip install megalodon") and not bare.search("pip install megalodon-lm")
    for path in TEXTS:
        assert not bare.search(path.read_text(errors="ignore")), path


def test_the_tested_versions_satisfy_the_ranges(project):
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    peers = [entry for entry in project["project"]["optional-dependencies"]["bench"] if ">=" in entry]
    assert len(peers) == 5
    for requirement in (*project["project"]["dependencies"], *peers):
        name, floor = re.match(r"([\w-]+)>=([\d.]+)", requirement).groups()
        assert [int(n) for n in pins[name].split(".")] >= [int(n) for n in floor.split(".")], requirement


def test_the_hook_and_ci_call_the_makes_verbs():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for repo in hooks for hook in repo["hooks"]] == ["make lint"]
    run = ROOT / ".ci" / "run"
    assert run.stat().st_mode & 0o111
    assert "lint test" in run.read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {"quickstart", "test", "test-all", "lint", "fix"} <= set(targets)
