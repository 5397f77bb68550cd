"""The dependency rule: imports point down, kernels stay lazy. Not here: what the parts do (tests/<part>)."""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = {"megalodon_cli": ROOT, "megalodon": ROOT, "megalodon_kernels": ROOT / "kernels"}
BASE = {"errors", "config"}
RUNS = BASE | {"model", "data", "checkpoint", "parallel"}
MAY = {  # a part -> the parts it may import
    "megalodon_kernels": set(), "errors": set(), "config": {"errors"}, "data": BASE,
    "model": BASE | {"megalodon_kernels"}, "parallel": BASE | {"model", "megalodon_kernels"},
    "checkpoint": BASE | {"model"},
    "interop": BASE | {"model", "data", "checkpoint"}, "training": RUNS, "inference": RUNS,
    "evaluation": RUNS | {"inference"}, "profiling": RUNS | {"training", "inference", "megalodon_kernels"},
    "recipe": RUNS | {"training", "inference", "evaluation"},
}  # fmt: skip
MAY["megalodon_cli"] = MAY.keys() - {"megalodon_kernels"}
MAY["__init__"] = {
    "model",
    "checkpoint",
    "interop",
}  # the few public names, by a lazy __getattr__: `import megalodon` loads no torch


def imported(node):
    """Dotted names imported anywhere under `node`, lazily or not; a relative import shows as '.'."""
    plain = {a.name for n in ast.walk(node) if isinstance(n, ast.Import) for a in n.names}
    froms = [n for n in ast.walk(node) if isinstance(n, ast.ImportFrom)]
    return plain | {"." if n.level else f"{n.module}.{a.name}" for n in froms for a in n.names}


def part(name):
    """'megalodon.model.cema' -> 'model'; 'megalodon_cli.app' -> 'megalodon_cli'; torch and the rest -> ''."""
    top, *rest = name.split(".")
    return (rest or [""])[0] if top == "megalodon" else top if top in SOURCE else ""


FLAT = ROOT / "megalodon" / "interop" / "flat"  # copied into exports, where no package of ours is: it has its own rule
PATHS = [(p, p.relative_to(base)) for top, base in SOURCE.items() for p in (base / top).rglob("*.py")]
PATHS = [(p, short) for p, short in PATHS if p.parent != FLAT]
FILES = {short: ast.parse(path.read_text()) for path, short in PATHS}


def test_imports_point_down():
    assert {path.parts[0] for path in FILES} == SOURCE.keys()
    for path, tree in FILES.items():
        me = part(".".join(path.with_suffix("").parts))
        bad = [name for name in imported(tree) if name == "." or part(name) not in {"", me, *MAY.get(me, ())}]
        assert not bad, f"{path} may not import {bad}"


def test_triton_stays_in_kernel_files_and_these_stay_lazy():
    for path, tree in FILES.items():
        if path.name.startswith(
            "kernel"
        ):  # the Triton side: kernel.py of each op, kernel_math.py for shared jit helpers
            continue
        assert "triton" not in {n.split(".")[0] for n in imported(tree)}, path
        for statement in tree.body:  # elsewhere only the body of a function may import a kernel
            late = isinstance(statement, ast.FunctionDef)
            assert late or not any("kernel" in n.split(".")[1:] for n in imported(statement)), path


def test_the_data_part_needs_no_torch():
    for path, tree in FILES.items():
        if path.parts[:2] == ("megalodon", "data"):
            assert "torch" not in {n.split(".")[0] for n in imported(tree)}, path


def test_only_the_console_prints():
    for path, tree in FILES.items():
        prints = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "print"]
        assert not prints or path.name == "console.py", path


def test_what_an_export_carries_stands_alone():
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    trees = {path.name: ast.parse(path.read_text()) for path in FLAT.glob("*.py")}
    assert {"configuration_megalodon.py", "modeling_megalodon.py"} < trees.keys()
    for name, tree in trees.items():
        assert {n.split(".")[0] for n in imported(tree) if n != "."} <= allowed, name
        beside = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}
        assert {f"{module}.py" for module in beside} <= trees.keys(), name


def test_nothing_of_ours_imports_what_an_export_carries():
    for path, tree in FILES.items():
        assert not any(n.startswith("megalodon.interop.flat") for n in imported(tree)), path
