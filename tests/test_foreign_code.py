"""Nothing of ours runs what is in a file: no pickle, no eval, no shell. Not here: that what is read is checked."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ALLOWED = {
    # Writes a state dict as torch.save does, one tensor at a time; never reads.
    ("megalodon/interop/official_files.py", "import pickle"),
    # The one place that opens a foreign .pth: weights_only, in a process of its own with limits.
    ("megalodon/interop/pickle_process.py", "torch.load"),
}
PLACES = [p for top in ("megalodon", "megalodon_cli", "kernels/megalodon_kernels") for p in (ROOT / top).rglob("*.py")]


def findings(tree: ast.AST) -> set[str]:
    """What a piece of code does that could run what it reads."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {a.name for a in node.names} if isinstance(node, ast.Import) else {str(node.module)}
            found |= {f"import {name}" for name in names if name.split(".")[0] in PICKLES}
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called in ("eval", "exec", "torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system"):
            found.add(called)
        if called in ("np.load", "numpy.load") and keywords.get("allow_pickle") != "False":
            found.add("np.load without allow_pickle=False")
        for option in ("shell", "trust_remote_code", "allow_pickle"):
            if keywords.get(option) == "True":
                found.add(f"{option}=True")
    return found


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_only_the_listed_places_come_near_a_pickle_and_none_runs_what_it_reads() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), what) for path in PLACES for what in findings(ast.parse(path.read_text()))
    }
    assert found == ALLOWED


def test_the_one_torch_load_is_weights_only() -> None:
    tree = ast.parse((ROOT / "megalodon/interop/pickle_process.py").read_text())
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert [ast.unparse(k.value) for call in calls for k in call.keywords if k.arg == "weights_only"] == ["True"]
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle", "import pickle"),
        ("from dill import loads", "import dill"),
        ("torch.load(p)", "torch.load"),
        ("eval(x)", "eval"),
        ("np.load(p)", "np.load without allow_pickle=False"),
        ("subprocess.run(x, shell=True)", "shell=True"),
        ("AutoModel.from_pretrained(p, trust_remote_code=True)", "trust_remote_code=True"),
        ("yaml.load(f, Loader)", "yaml.load"),
    ],
)
def test_each_of_them_would_be_found(code: str, what: str) -> None:
    assert findings(ast.parse(code)) == {what}
