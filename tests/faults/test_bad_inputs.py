"""Bad input of every kind: one line that says what came and what was expected, its exit code, nothing left behind.

One table: what stands in the folder, the command, its exit code, a part of its message. Not here: what happens to a
damaged checkpoint or store (test_checkpoint_faults.py, test_data_faults.py), mistakes in the spelling of commands
(tests/cli/test_errors.py).
"""

import gzip
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from breakable import command, errors, pretrain, tree

GZIP = gzip.compress(b'{"text": "a line"}\n' * 200, mtime=0)
HEADER = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
RECIPE = "base: debug\nname: mine\n"


@dataclass(frozen=True)
class Case:
    """A bad input."""

    line: str
    """The command, in words."""
    code: int
    said: str
    """A part of the one message."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """What stands in the folder besides text.txt and chats.jsonl."""


TOKENIZE = "tokenize --tokenizer bytes -o out --input"
TABLE = "tokenize --tokenizer bytes -o out --document line --input"

CASES = {
    # recipes
    "recipe: empty": Case("pretrain ./r.yaml", 2, "r.yaml", {"r.yaml": b""}),
    "recipe: no YAML": Case("pretrain ./r.yaml", 2, "r.yaml:2:1: not YAML", {"r.yaml": b"a: [1\n"}),
    "recipe: a list": Case("pretrain ./r.yaml", 2, "r.yaml", {"r.yaml": b"- a\n- b\n"}),
    "recipe: a tab": Case("pretrain ./r.yaml", 2, "r.yaml", {"r.yaml": b"model:\n\tnum_layers: 2\n"}),
    "recipe: not UTF-8": Case("pretrain ./r.yaml", 2, "r.yaml", {"r.yaml": b"name: \xff\xfe\n"}),
    "recipe: NUL": Case("pretrain ./r.yaml", 2, "r.yaml", {"r.yaml": b"name: a\x00b\n"}),
    "recipe: binary": Case("pretrain ./r.yaml", 2, "r.yaml", {"r.yaml": bytes(range(256))}),
    "recipe: an alias bomb": Case(
        "pretrain ./r.yaml",
        2,
        "r.yaml",
        {
            "r.yaml": (
                "a: &a [x,x,x,x,x,x,x,x,x]\n"
                + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(8))
            ).encode()
        },
    ),
    "recipe: deep": Case("pretrain ./r.yaml", 2, "r.yaml", {"r.yaml": b"a: " + b"[" * 2000 + b"]" * 2000}),
    "recipe: a Python object": Case(
        "pretrain ./r.yaml", 2, "r.yaml", {"r.yaml": RECIPE.encode() + b"log: !!python/object/apply:os.getcwd {}\n"}
    ),
    "recipe: a key twice": Case(
        "pretrain ./r.yaml", 2, "r.yaml:4", {"r.yaml": (RECIPE + "log: {every: 1}\nlog: {every: 2}\n").encode()}
    ),
    "recipe: its own base": Case("pretrain ./r.yaml", 2, "r.yaml", {"r.yaml": b"base: ./r.yaml\nname: a\n"}),
    "recipe: a base that is not there": Case(
        "pretrain ./r.yaml", 2, "nowhere", {"r.yaml": b"base: ./nowhere.yaml\nname: a\n"}
    ),
    "recipe: a newer schema": Case("pretrain ./r.yaml", 2, "schema", {"r.yaml": RECIPE.encode() + b"schema: 99\n"}),
    "recipe: of another kind": Case("pretrain ./r.yaml", 2, "kind", {"r.yaml": RECIPE.encode() + b"kind: cook\n"}),
    "recipe: a name with a slash": Case("pretrain ./r.yaml", 2, "name", {"r.yaml": b"base: debug\nname: ../../x\n"}),
    "recipe: a folder": Case("pretrain ./d.yaml", 2, "d.yaml", {"d.yaml/x": b""}),
    "recipe: missing": Case("pretrain ./nowhere.yaml", 2, "nowhere.yaml"),
    "recipe: a text where a number belongs": Case("pretrain debug optim.lr=fast", 2, "optim.lr=fast"),
    # overrides
    "override: no value": Case("pretrain debug optim.lr=", 2, "optim.lr="),
    "override: not a number": Case("pretrain debug optim.lr=.nan", 2, "optim.lr=.nan"),
    "override: infinite": Case("pretrain debug optim.lr=.inf", 2, "optim.lr=.inf"),
    "override: negative": Case("pretrain debug optim.lr=-1", 2, "optim.lr=-1"),
    "override: no layers": Case("pretrain debug model.num_layers=0", 2, "model.num_layers=0"),
    "override: half a layer": Case("pretrain debug model.num_layers=1.5", 2, "model.num_layers=1.5"),
    "override: too many digits": Case(f"pretrain debug train.max_steps={'9' * 5000}", 2, "train.max_steps"),
    "override: a window of no tokens": Case("pretrain debug data.seq_len=0", 2, "data.seq_len=0"),
    "override: heads that do not divide": Case("pretrain debug model.num_heads=7", 2, "7"),
    "override: no key": Case("pretrain debug =5", 2, "=5"),
    "override: a list index that is not there": Case("pretrain debug data.sources.7.weight=1", 2, "data.sources.7"),
    "override: a source that is not there": Case("pretrain debug data.sources.book.weight=1", 2, "data.sources.book"),
    "override: dropout of everything": Case("pretrain debug model.dropout=1.0", 2, "model.dropout=1.0"),
    "override: a key that was reset and does not exist": Case("pretrain debug ~optim.lrr", 2, "lrr"),
    "override: no checkpoint is kept": Case("pretrain debug checkpoint.keep_last=0", 2, "checkpoint.keep_last=0"),
    "override: one is kept while another is written": Case(
        "pretrain debug checkpoint.keep_last=1 checkpoint.background=true", 2, "keep_last"
    ),
    "override: an unknown sink": Case("pretrain debug log.to=[paper]", 2, "paper"),
    # options of pretrain
    "pretrain: a step of zero": Case("pretrain debug --stop-at-step 0", 2, "--stop-at-step"),
    "pretrain: a negative step": Case("pretrain debug --stop-at-step -3", 2, "--stop-at-step"),
    "pretrain: words for steps": Case("pretrain debug --max-steps many", 2, "max_steps=many"),
    "pretrain: an endless time": Case("pretrain debug --max-time inf", 2, "--max-time"),
    "pretrain: no GPU": Case("pretrain debug --device cuda:99", 3, "cuda:99"),
    "pretrain: a directory below a file": Case("pretrain debug -o text.txt/run", 2, "text.txt is a file"),
    "pretrain: a directory of other things": Case(
        "pretrain debug -o d", 2, "choose another -o", {"d/thesis.tex": b"x"}
    ),
    "pretrain: a run.json that is none": Case("pretrain debug -o d", 2, "d/run.json", {"d/run.json": b"{"}),
    "pretrain: a run.json of the future": Case(
        "pretrain debug -o d", 2, "megalodon/run/99", {"d/run.json": b'{"format": "megalodon/run/99"}'}
    ),
    "pretrain: a run.json without anything": Case("pretrain debug -o d", 2, "d/run.json", {"d/run.json": b"{}"}),
    # text
    "text: not UTF-8": Case(f"{TOKENIZE} a.txt", 2, "a.txt:2: not UTF-8", {"a.txt": b"fine\nb\xff\n"}),
    "text: UTF-16": Case(f"{TOKENIZE} a.txt", 2, "a.txt:1: not UTF-8", {"a.txt": "text".encode("utf-16")}),
    "text: a binary file": Case(f"{TOKENIZE} a.txt", 2, "a.txt:", {"a.txt": bytes(range(256)) * 20}),
    "text: empty": Case(f"{TOKENIZE} a.txt", 2, "no text", {"a.txt": b""}),
    "text: white space only": Case(f"{TOKENIZE} a.txt", 2, "no text", {"a.txt": b" \n\t\r\n "}),
    "text: a cut character": Case(f"{TOKENIZE} a.txt", 2, "not UTF-8", {"a.txt": "é".encode()[:1]}),
    "text: an overlong form": Case(f"{TOKENIZE} a.txt", 2, "not UTF-8", {"a.txt": b"a\xc0\xafb"}),
    "text: a lone surrogate": Case(f"{TOKENIZE} a.txt", 2, "not UTF-8", {"a.txt": b"a\xed\xa0\x80b"}),
    "text: no such file": Case(f"{TOKENIZE} nowhere.txt", 2, "nowhere.txt does not exist"),
    "text: a glob without a match": Case(f"{TOKENIZE} *.none", 2, "matches no file"),
    "text: an empty folder": Case(f"{TOKENIZE} d", 2, "holds no", {"d/.hidden.txt": b"x"}),
    "text: an unknown suffix": Case(f"{TOKENIZE} a.pdf", 2, "unknown suffix", {"a.pdf": b"%PDF"}),
    "text: a device": Case(f"{TOKENIZE} /dev/zero", 2, "/dev/zero"),
    "text: listed twice": Case(f"{TOKENIZE} text.txt --input ./text.txt", 2, "listed twice"),
    # JSON lines
    "jsonl: cut": Case(f"{TOKENIZE} a.jsonl", 2, "a.jsonl:2", {"a.jsonl": b'{"text": "a"}\n{"text": "b\n'}),
    "jsonl: an array": Case(f"{TOKENIZE} a.jsonl", 2, "a.jsonl:1", {"a.jsonl": b'["text"]\n'}),
    "jsonl: a number": Case(f"{TOKENIZE} a.jsonl", 2, "a.jsonl:1", {"a.jsonl": b"5\n"}),
    "jsonl: another field": Case(f"{TOKENIZE} a.jsonl", 2, "field `text` is missing", {"a.jsonl": b'{"body": "a"}\n'}),
    "jsonl: a field of another type": Case(f"{TOKENIZE} a.jsonl", 2, "a.jsonl:1", {"a.jsonl": b'{"text": {"a": 1}}\n'}),
    "jsonl: a list of texts": Case(f"{TOKENIZE} a.jsonl", 2, "a.jsonl:1", {"a.jsonl": b'{"text": ["a"]}\n'}),
    "jsonl: null": Case(f"{TOKENIZE} a.jsonl", 2, "a.jsonl:1", {"a.jsonl": b'{"text": null}\n'}),
    "jsonl: half a pair": Case(f"{TOKENIZE} a.jsonl", 2, "surrogate", {"a.jsonl": b'{"text": "\\ud800"}\n'}),
    "jsonl: deep": Case(
        f"{TOKENIZE} a.jsonl", 2, "a.jsonl:1", {"a.jsonl": b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n"}
    ),
    "jsonl: NaN for a text": Case(f"{TOKENIZE} a.jsonl", 2, "a.jsonl:1", {"a.jsonl": b'{"text": NaN}\n'}),
    "jsonl: a number of 5,000 digits": Case(
        f"{TOKENIZE} a.jsonl", 2, "a.jsonl:1", {"a.jsonl": b'{"text": ' + b"9" * 5000 + b"}\n"}
    ),
    "jsonl: not UTF-8": Case(f"{TOKENIZE} a.jsonl", 2, "a.jsonl:1", {"a.jsonl": b'{"text": "\xff"}\n'}),
    "jsonl: a field that no row has": Case(f"{TOKENIZE} chats.jsonl --field body", 2, "body"),
    # tables and compressed files
    "parquet: none": Case(f"{TOKENIZE} a.parquet", 2, "a.parquet", {"a.parquet": b"PAR1 not really PAR1"}),
    "parquet: empty": Case(f"{TOKENIZE} a.parquet", 2, "a.parquet", {"a.parquet": b""}),
    "arrow: none": Case(f"{TOKENIZE} a.arrow", 2, "a.arrow", {"a.arrow": b"ARROW1 not really"}),
    "csv: no such column": Case(f"{TOKENIZE} a.csv", 2, "text", {"a.csv": b"body\na\nb\n"}),
    "csv: not UTF-8": Case(f"{TOKENIZE} a.csv", 2, "a.csv", {"a.csv": b"text\n\xff\xfe\n"}),
    "gzip: cut": Case(f"{TOKENIZE} a.jsonl.gz", 2, "a.jsonl.gz", {"a.jsonl.gz": GZIP[:-9]}),
    "gzip: none": Case(f"{TOKENIZE} a.jsonl.gz", 2, "a.jsonl.gz", {"a.jsonl.gz": b'{"text": "a"}\n'}),
    "gzip: a flipped bit": Case(
        f"{TOKENIZE} a.jsonl.gz", 2, "a.jsonl.gz", {"a.jsonl.gz": GZIP[:30] + bytes([GZIP[30] ^ 8]) + GZIP[31:]}
    ),
    "gzip: empty": Case(f"{TOKENIZE} a.txt.gz", 2, "hold no text", {"a.txt.gz": b""}),
    # tokenizers
    "tokenizer: none is named": Case("tokenize -o out --input text.txt", 2, "--tokenizer bytes"),
    "tokenizer: a text": Case("tokenize -o out --input text.txt --tokenizer text.txt", 2, "text.txt"),
    "tokenizer: empty": Case("tokenize -o out --input text.txt --tokenizer t.model", 2, "t.model", {"t.model": b""}),
    "tokenizer: missing": Case("tokenize -o out --input text.txt --tokenizer nowhere.model", 2, "nowhere.model"),
    "tokenizer: too large for the text": Case(
        "tokenize -o out --input text.txt --train --vocab-size 30000", 2, "vocab"
    ),
    "tokenizer: too small for bytes": Case("tokenize -o out --input text.txt --train --vocab-size 100", 2, "100"),
    "tokenizer: an unknown kind": Case(
        "tokenize -o out --input text.txt --train --model-type wordpiece", 2, "wordpiece"
    ),
    # options of tokenize
    "tokenize: no limit": Case(f"{TOKENIZE} text.txt --on-error skip", 2, "--on-error"),
    "tokenize: a share above one": Case(f"{TOKENIZE} text.txt --valid 1.5", 2, "--valid"),
    "tokenize: a negative share": Case(f"{TOKENIZE} text.txt --valid=-0.1", 2, "--valid"),
    "tokenize: a share that is none": Case(f"{TOKENIZE} text.txt --valid nan", 2, "--valid"),
    "tokenize: everything for validation": Case(f"{TABLE} text.txt --valid 99.9999%", 2, "validation"),
    "tokenize: a store below a file": Case(
        "tokenize --tokenizer bytes --input chats.jsonl -o text.txt/out", 2, "text.txt"
    ),
    "tokenize: a folder in use": Case(
        "tokenize --tokenizer bytes --input text.txt -o d", 2, "d", {"d/thesis.tex": b"x"}
    ),
    # looking at stores
    "store: none": Case("tokenize --verify d", 2, "not a token store", {"d/x": b""}),
    "store: a manifest that is none": Case("tokenize --stats d", 2, "d/manifest.json", {"d/manifest.json": b"{"}),
    "store: a manifest without anything": Case("tokenize --stats d", 2, "d", {"d/manifest.json": b"{}"}),
    "store: a manifest that is a list": Case(
        "tokenize --inspect 2 d", 2, "d/manifest.json", {"d/manifest.json": b"[]"}
    ),
    "store: no documents to show": Case("tokenize --inspect 0 d", 2, "--inspect"),
    # models
    "model: missing": Case("generate nowhere -p x", 2, "nowhere"),
    "model: an empty folder": Case("generate d -p x", 2, "d", {"d/x": b""}),
    "model: a config that is none": Case("generate d -p x", 2, "d/megalodon.json", {"d/config.json": b"{"}),
    "model: another architecture": Case(
        "generate d -p x", 2, "d/megalodon.json", {"d/config.json": b'{"model_type": "llama", "hidden_size": 64}'}
    ),
    "model: a run without a model": Case("generate d -p x", 2, "d", {"d/run.json": b'{"format": "megalodon/run/1"}'}),
    "model: the empty name": Case("generate --temperature 1 -p x", 2, "no CKPT given"),
    # runs, recipes
    "runs: none of that name": Case("runs show nowhere", 2, "not a run"),
    "runs: a file": Case("runs show text.txt", 2, "text.txt"),
    "runs: a run.json that is none": Case("runs show d", 2, "d/run.json", {"d/run.json": b"\xff"}),
    "recipes: no such key": Case("recipes schema optim.nothing", 2, "optim.nothing"),
    "recipes: a copy over a file": Case("recipes cp debug text.txt", 2, "text.txt"),
    "recipes: no recipe": Case("recipes show debugg", 2, "did you mean debug?"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_is_one_line_and_leaves_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("".join(f"line {n} of the text\n" for n in range(60)))
    Path("chats.jsonl").write_text("".join(json.dumps({"text": f"chat {n}"}) + "\n" for n in range(60)))
    for path, content in case.files.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
    before = tree(tmp_path)
    done = command(*case.line.split(" "))
    assert done.exit_code == case.code, done.output
    found = errors(done)
    assert len(found) == 1, done.stderr
    assert case.said in found[0] and len(found[0]) < 1000, found[0]
    assert "internal: " not in found[0]
    assert done.stdout == ""
    assert tree(tmp_path) == before


def model(folder: str) -> Path:
    """A finished run's model directory."""
    assert pretrain("--max-steps", "1", "-o", folder, f"data.dir={folder}/../data").exit_code == 0
    return Path(folder) / "model"


def long_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 10**8 + 1) + b" " * 64)


def endless_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**63) + HEADER)


def overlapping(path: Path) -> None:
    header = {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in ("a", "b")}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)


def doubled(path: Path) -> None:
    entry = b'"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    text = b"{" + entry + b", " + entry + b"}"
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)


def huge_shape(path: Path) -> None:
    text = json.dumps({"w": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)


WEIGHTS = {
    "a header of 100 MB": long_header,
    "a header of eight exabytes": endless_header,
    "tensors that overlap": overlapping,
    "a name twice": doubled,
    "a shape beyond memory": huge_shape,
    "empty": lambda path: path.write_bytes(b""),
    "seven bytes": lambda path: path.write_bytes(b"1234567"),
    "a header that is no JSON": lambda path: path.write_bytes(struct.pack("<Q", 8) + b"notjson!" + b"\0" * 8),
    "missing": lambda path: path.unlink(),
    "a pickle": lambda path: path.write_bytes(b"\x80\x04\x95"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory."""
    return model(str(tmp_path_factory.mktemp("model") / "run"))


def broken_copy(whole: Path, here: Path) -> Path:
    import shutil

    shutil.copytree(whole, here / "model")
    return here / "model"


def refused_model(folder: Path, said: str) -> None:
    before = tree(folder)
    done = command("generate", str(folder), "-p", "x", "-n", "1")
    assert done.exit_code == 2, done.output
    (error,) = errors(done)
    assert said in error and "internal" not in error
    assert done.stdout == "" and tree(folder) == before


@pytest.mark.parametrize("what", WEIGHTS)
def test_42_weights_that_are_none_are_named_before_memory_is_taken(what: str, whole: Path, tmp_path: Path) -> None:
    folder = broken_copy(whole, tmp_path)
    (path,) = folder.glob("*.safetensors")
    WEIGHTS[what](path)
    # hashes come first; without a record of them the header has to speak for itself
    refused_model(folder, path.name)
    about = folder / "megalodon.json"
    if what != "missing" and about.exists():
        kept = json.loads(about.read_text())
        if "files" in kept:
            import hashlib

            entry = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            kept["files"][path.name] = entry
            about.write_text(json.dumps(kept))
            refused_model(folder, path.name)


def test_42_another_architecture_is_named(whole: Path, tmp_path: Path) -> None:
    folder = broken_copy(whole, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 3, "num_hidden_layers": 3}))
    refused_model(folder, "config.json")


def test_42_a_model_without_tokenizer_is_named(whole: Path, tmp_path: Path) -> None:
    import shutil

    folder = broken_copy(whole, tmp_path)
    for path in folder.iterdir():
        if "token" in path.name:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    refused_model(folder, "token")
