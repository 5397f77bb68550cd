"""`--check-resume N` and `--dry-run` of training: in a directory of their own, which is removed in the end.

Not here: what is compared (training/check_resume.py in megalodon), what a rehearsal does (training/rehearsal.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megalodon.errors import CheckFailed
from megalodon_cli import console, run_start, training_job
from megalodon_cli.job import Job
from megalodon_cli.signals import Signals

if TYPE_CHECKING:
    from megalodon.model.architectures import LanguageModel
    from megalodon.training.loop import Row, Run


@contextmanager
def _scratch(job: Job) -> Iterator[Path]:
    """Yield an empty directory on the disk of the run; it vanishes, and so do the folders made for it."""
    from megalodon.data.places import scratch_beside

    parent = job.directory.parent
    made = [path for path in (parent, *parent.parents) if not path.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with scratch_beside(job.directory) as folder:
            yield folder
    finally:
        for path in made:
            if not any(path.iterdir()):
                path.rmdir()


def _run(job: Job, signals: Signals, directory: Path) -> "Run":
    from megalodon.training.loop import Run

    def report(row: "Row") -> None:
        if row["kind"] == "train":
            console.info(f"step {row['step']:,}  loss {'-' if row['loss'] is None else format(row['loss'], '.3f')}")

    return Run(
        directory=directory,
        num_classes=job.num_classes,
        bytes_table=training_job.bytes_table(job),
        build=job.build,
        initialise=run_start.initialise(job),
        report=report,
        stop=signals.reason,
    )


def check_resume(job: Job, signals: Signals, steps: int) -> None:
    """Prove that a stop in the middle changes nothing. Raises: CheckFailed with the first difference."""
    from megalodon.training.check_resume import check_resume as compare

    console.info(f"check-resume: {steps:,} steps against {steps // 2:,}, save, load, {steps - steps // 2:,}")
    with _scratch(job) as scratch:
        run = _run(job, signals, scratch)
        found = compare(job.model_config, job.loader, job.plan, run, steps=steps, scratch=scratch)
    if found is None:
        raise SystemExit(128 + (signals.number or 0))
    if found.difference is not None:
        raise CheckFailed(f"--check-resume {steps}: {found.difference}")
    rows = [["compared", "values", "equal"], *([name, f"{n:,}", "bit by bit"] for name, n in found.compared.items())]
    console.table(rows, right=(1,))
    console.result(f"a run stopped after step {found.half:,} of {steps:,} is the uninterrupted one")
    console.document(
        "check-resume", {"steps": steps, "half": found.half, "seconds": found.seconds, "compared": dict(found.compared)}
    )


def dry_run(job: Job, signals: Signals) -> None:
    """Take one real step, evaluate, save, load and export, and say what each took. Raises: what the run would."""
    from megalodon.parallel.ranks import ALONE
    from megalodon.training.rehearsal import rehearse

    table = training_job.tasks(job, _run(job, signals, job.directory).bytes_table, signals.asked, ALONE)
    tasks = dict(zip(("evaluation", "samples"), table, strict=False))
    with _scratch(job) as scratch:
        run = _run(job, signals, scratch)

        def export(model: "LanguageModel") -> None:
            progress = {"step": 1, "tokens": job.plan.batch_tokens}
            training_job.export(job, model, scratch / training_job.result_name(job), progress, {})

        wanted = export if job.config.checkpoint.export else None
        phases = rehearse(job.model_config, job.loader, job.plan, run, tasks, wanted)
    if phases is None:
        raise SystemExit(128 + (signals.number or 0))
    rows = [[phase.name, f"{phase.seconds:.2f} s", f"{phase.memory / 2**30:.2f} GiB"] for phase in phases]
    console.table([["phase", "time", "peak memory"], *rows], right=(1, 2))
    console.result(f"dry run of {job.config.name}: it works, and nothing of it was kept")
    listed = [{"name": p.name, "seconds": round(p.seconds, 4), "memory": p.memory} for p in phases]
    console.document("dry-run", {"phases": listed})
