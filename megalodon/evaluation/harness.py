"""Tasks of lm-evaluation-harness on a model: by name, or from local YAML files, which need no network.

    found = load(["hellaswag", "mine.yaml"], include=Path("tasks/"), num_fewshot=5)
    results = run(model, found, limit=100)

What a task cuts by itself, before a model sees it, is named: `cutting`. Imported only where the extra `eval` is there.
Not here: how a model answers (harness_model.py).
"""

import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from megalodon.errors import EnvironmentFault, InputError
from megalodon.evaluation.harness_model import HarnessModel

LOCAL = frozenset({"json", "csv", "text", "parquet", "arrow"})
"""Names of data sets that are files."""
_METRIC = "stderr"


class Tasks(NamedTuple):
    """What was asked for, ready to run."""

    loaded: Mapping[str, Any]
    """As the harness's TaskManager gives it."""
    cutting: tuple[str, ...]
    """Tasks that drop or cut long examples by themselves."""


class Index:
    """Every task there is, by name: the harness's own, and those of a folder."""

    def __init__(self, names: Sequence[str], include: Path | None, metadata: Mapping[str, Any]) -> None:
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        self.names, self._folder = list(names), str(include) if include else None
        missing = [name for name in names if _is_file(name) and not Path(name).is_file()]
        if missing:
            raise InputError(f"--tasks: {missing[0]}: no such file; expected the YAML of a task")
        self._files = {name: _read(name) for name in names if _is_file(name)}
        self._metadata = dict(metadata)
        self._manager = TaskManager(include_path=self._folder, include_defaults=False, metadata=self._metadata)
        if any(name not in self._manager.task_index for name in names if not _is_file(name)):
            # All of them: reading it takes seconds.
            self._manager = TaskManager(include_path=self._folder, metadata=self._metadata)
        for name in names:
            if not _is_file(name) and name not in self._manager.task_index:
                raise _unknown(name, self._manager.all_tasks)

    def remote(self) -> list[str]:
        """Data sets that may have to be fetched, as far as the tasks name them."""
        seen, found = set[str](), dict[str, None]()
        for name in self.names:
            found |= dict.fromkeys(self._data(name, seen))
        return [path for path in found if path not in LOCAL and not Path(path).exists()]

    def _data(self, task: str | Mapping[str, Any], seen: set[str]) -> Iterator[str]:
        """Data sets of a task, or of all in a group or under a tag; of a task in Python, which may fetch anything, its
        name."""
        name = task if isinstance(task, str) else str(task.get("task"))
        entry = self._manager.task_index.get(task) if isinstance(task, str) else None
        config = task if isinstance(task, Mapping) else self._files.get(task) or (entry.cfg if entry else None) or {}
        inside = config.get("task")
        if entry is not None and entry.cfg is None:
            inside = sorted(entry.tags)
        elif isinstance(task, Mapping) and isinstance(inside, str):
            inside = [inside]
        if path := config.get("dataset_path"):
            yield str(path)
        elif isinstance(inside, list):
            for one in inside:
                if not isinstance(one, str) or one not in seen:
                    seen.add(str(one))
                    yield from self._data(one, seen)
        else:
            yield name

    def load(self, num_fewshot: int | None, seed: int, *, offline: bool) -> Tasks:
        """Load all tasks with their data.

        Raises:
            EnvironmentFault: data could not be fetched.
            InputError: a task cannot be used; the message has the reason.
        """
        try:
            loaded: Mapping[str, Any] = self._manager.load(self.names)
        except Exception as error:  # tasks are programs: anything may come out of them
            raise self._fault(error, offline) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False):
                raise InputError(f"task {name} runs the code that a model writes, which is not done here")
            if num_fewshot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=num_fewshot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=seed)
        cutting = (n for n, task in loaded["tasks"].items() if getattr(task, "PRUNE_MAX_TOKENS", None) is not None)
        return Tasks(loaded, tuple(cutting))

    def _fault(self, error: Exception, offline: bool) -> EnvironmentFault | InputError:
        said = _said(error)
        if remote := self.remote():
            why = "which needs the network, and --offline forbids it" if offline else "which could not be fetched"
            return EnvironmentFault(f"tasks {', '.join(self.names)} need {', '.join(remote)}, {why}: {said}")
        return InputError(f"--tasks {', '.join(self.names)}: cannot be loaded: {said}")


def _read(name: str) -> Mapping[str, Any]:
    """A YAML file with what it includes; no Python function that it names is imported. Raises: InputError."""
    try:
        return dict(load_yaml(name, resolve_func=False))
    except Exception as error:
        raise InputError(f"--tasks {name}: cannot be loaded: {_said(error)}") from error


def _said(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _unknown(name: str, known: Sequence[str]) -> InputError:
    near = difflib.get_close_matches(name, known, 3, 0.6)
    meant = f"did you mean {', '.join(near)}?" if near else "expected a name of lm-eval's, or a YAML file"
    return InputError(f"--tasks: no task `{name}`; {meant}")


class Results(NamedTuple):
    """What the harness found."""

    results: Mapping[str, Any]
    """As its `evaluate` gives it."""
    truncated_tokens: int
    cutting: tuple[str, ...]

    def document(self) -> dict[str, Any]:
        """As JSON: a row for each metric of each task and group."""
        found = self.results
        rows = [
            {
                "task": task,
                "metric": metric,
                "filter": name,
                "value": _number(values[key]),
                "error": _number(values.get(f"{metric}_{_METRIC},{name}")),
                "num_fewshot": found["n-shot"].get(task),
                "samples": found["n-samples"].get(task, {}).get("effective"),
                "version": found["versions"].get(task),
            }
            for task, values in {**found["results"], **found.get("groups", {})}.items()
            for key in values
            if "," in key and not (metric := key.partition(",")[0]).endswith(f"_{_METRIC}")
            for name in (key.partition(",")[2],)
        ]
        return {"rows": rows, "truncated_tokens": self.truncated_tokens, "cutting_tasks": list(self.cutting)}

    def samples(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Task -> what was asked and answered, if it was kept."""
        found: Mapping[str, Sequence[Mapping[str, Any]]] = self.results.get("samples") or {}
        return found


def run(model: HarnessModel, tasks: Tasks, limit: int | None, *, log_samples: bool, chat: bool) -> Results:
    """Evaluate. Raises: InputError for what a task asks of the model and cannot be done."""
    found = evaluate(
        lm=model,
        task_dict=tasks.loaded,
        limit=limit,
        log_samples=log_samples,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        bootstrap_iters=1000,
    )
    return Results(found, model.truncated_tokens, tasks.cutting)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number else None
