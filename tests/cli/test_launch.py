"""--gpus N: what N processes do together, and what happens when one of them does not. Real processes over gloo."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from stores import metrics

from megalodon.errors import EnvironmentFault, InputError
from megalodon_cli import recipe_files
from megalodon_cli.joining import place_in_world
from megalodon_cli.launch import GRACE_SECONDS, start_if_asked


def slow(*values: Any) -> Any:
    """Values of a case that only `make test-all` tries."""
    return pytest.param(*values, marks=pytest.mark.slow)


QUIET = ["eval.samples.prompts=[]", "eval.every=null", "eval.at_start=false", "checkpoint.every=2", "log.every=1"]
FAULT = """
import os
if os.environ.get("RANK") == {rank!r}:
    from megalodon.training.loop import Trainer
    step = Trainer.train_step

    def faulty(trainer):
        if trainer.step == {at}:
            {fault}
        return step(trainer)

    Trainer.train_step = faulty
"""


def megalodon(folder: Path, *arguments: str, **env: str) -> Any:
    """The command, started in a folder."""
    where = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": where, "OMP_NUM_THREADS": "1", **env}
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "megalodon_cli", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def started(folder: Path, *arguments: str, fault: str = "", rank: int = 1, at: int = 5, **env: str) -> Any:
    """A run of `debug` with the arguments in a folder, and a fault in one rank before step `at` + 1."""
    if fault:
        (folder / "sitecustomize.py").write_text(FAULT.format(rank=str(rank), at=at, fault=fault))
    return megalodon(folder, "pretrain", "debug", *QUIET, *arguments, **env)


def ended(process: Any, within: float = 100) -> tuple[int, str]:
    out, err = process.communicate(timeout=within)
    return process.returncode, out + err


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if row["kind"] == "train"]


def test_a_run_of_two_is_killed_and_goes_on_as_one(tmp_path: Path) -> None:
    """Rank 1 dies: all end, rank 1 is named, nothing saved is lost; one process goes on with the same data."""
    code, said = ended(started(tmp_path, "--gpus", "2", fault="os.kill(os.getpid(), 9)"))
    assert code == 128 + signal.SIGKILL
    assert "error: rank 1 was ended by SIGKILL" in said
    assert "Traceback" not in said
    log = re.search("hint: its log: (.*)", said)
    assert log and Path(log[1]) == tmp_path / "runs/debug/logs/rank-00001.log"
    (tmp_path / "sitecustomize.py").unlink()
    code, said = ended(started(tmp_path))
    assert code == 0 and "resuming at step 4" in said
    code, said = ended(started(tmp_path, "-o", "runs/whole"))
    assert code == 0
    assert losses(tmp_path / "runs/debug") == pytest.approx(losses(tmp_path / "runs/whole"), rel=1e-5)
    one, two = (json.loads((tmp_path / run / "checkpoints/step-00000008/state.json").read_text())["data"]
                for run in ("runs/debug", "runs/whole"))  # fmt: skip
    assert one == two


@pytest.mark.slow
def test_the_error_of_another_rank_is_told(tmp_path: Path) -> None:
    code, said = ended(started(tmp_path, "--gpus", "2", fault="raise trainer.nothing()"))
    assert code == 1
    assert "error: rank 1 ended with exit code 1: internal: AttributeError" in said
    assert "rank 0 lost another rank" in said


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_where_it_stands(tmp_path: Path) -> None:
    fault = "import time; time.sleep(1000)"
    begin = time.monotonic()
    code, said = ended(started(tmp_path, "--gpus", "2", "parallel.timeout_minutes=0.1", fault=fault))
    assert code == 3
    assert time.monotonic() - begin < 90
    assert "error: rank 1 did not end within 20 s after another rank failed; killed" in said
    log = re.search("Where it stood: (.*)", said)
    assert log and "in faulty" in Path(log[1]).read_text()


@pytest.mark.parametrize(("number", "whom"), [slow(signal.SIGTERM, "all"), (signal.SIGUSR1, "rank 1")])
def test_a_signal_saves_and_ends_with_75(tmp_path: Path, number: int, whom: str) -> None:
    process = started(tmp_path, "--gpus", "2", "--max-steps", "100000")
    wait_for(tmp_path / "runs/debug/metrics.jsonl", '"step": 3')
    begin = time.monotonic()
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid if whom == "all" else int(ranks[1]), number)
    code, said = ended(process)
    assert code == 75 and time.monotonic() - begin < 30
    assert f"{signal.Signals(number).name}: stopping after step" in said
    step = int(re.search(r"stopping after step (\d+)", said)[1])
    (again,) = json.loads((tmp_path / "runs/debug/run.json").read_text())["next"]
    assert again == "megalodon pretrain runs/debug/recipe.yaml -o runs/debug --gpus 2"
    assert (tmp_path / f"runs/debug/checkpoints/step-{step:08d}/manifest.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc/net says who listens")
def test_ranks_listen_to_this_machine_alone(tmp_path: Path) -> None:
    process = started(tmp_path, "--gpus", "2", "--max-steps", "100000")
    wait_for(tmp_path / "runs/debug/metrics.jsonl", '"step": 3')
    pid = json.loads((tmp_path / "runs/debug/lock.json").read_text())["pid"]
    own = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            own.add(os.readlink(descriptor))
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 75
    addresses = {line[1].split(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own}
    assert addresses == {"0100007F"}


@pytest.mark.slow
def test_no_rank_outlives_the_launcher(tmp_path: Path) -> None:
    process = started(tmp_path, "--gpus", "2", "--max-steps", "100000")
    wait_for(tmp_path / "runs/debug/metrics.jsonl", '"step": 3')
    process.kill()
    _, said = ended(process, within=60)  # whoever lives holds its stdout
    assert "SIGTERM: stopping after step" in said


@pytest.mark.parametrize("piped", [slow(False), True])
def test_ctrl_c_on_a_terminal_is_heard_once(tmp_path: Path, piped: bool) -> None:
    """Also where stdin is no terminal: every rank finishes the step and saves, none takes it for two."""
    keyboard, terminal = os.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)

    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megalodon_cli", "pretrain", "debug", *QUIET, "--gpus", "2"]
    process = subprocess.Popen(
        [*command, "--max-steps", "100000"], cwd=tmp_path, env=env, stdin=subprocess.DEVNULL if piped else terminal,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=own_terminal,
    )  # fmt: skip
    try:
        wait_for(tmp_path / "runs/debug/metrics.jsonl", '"step": 3')
        os.write(keyboard, b"\x03")
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        os.close(keyboard)
        os.close(terminal)
    assert process.returncode == 75, said
    assert "SIGINT: stopping after step" in said


def wait_for(file: Path, text: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < until, f"{file} never said {text}"
        time.sleep(0.05)


def test_ranks_that_would_train_different_things_do_not_begin(tmp_path: Path) -> None:
    different = "import os, sys\nif os.environ.get('RANK') == '1':\n    sys.argv.append('optim.lr=0.5')\n"
    (tmp_path / "sitecustomize.py").write_text(different)
    code, said = ended(started(tmp_path, "--gpus", "2"))
    assert code == 6
    assert re.search("error: ranks would train different things: recipe of rank 1 is [0-9a-f]+, of rank 0 ", said)
    assert not (tmp_path / "runs/debug/run.json").exists()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["train.batch_tokens=288"], "train.batch_tokens 288 is not a multiple of data.seq_len 96 x 2 data-parallel"),
        pytest.param(
            ["parallel.cp=3"],
            "2 ranks are not a multiple of parallel.dp_replicate 1 x cp 3 x tp 1 = 3",
            marks=pytest.mark.slow,
        ),
        slow(["parallel.tp=2"], "model.num_heads 1: not a multiple of parallel.tp 2"),
        pytest.param(
            ["parallel.cp=2"],
            "data.seq_len 96 is not a multiple of parallel.cp 2 x model.chunk_size 32 = 64",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--dry-run"], "--dry-run and --check-resume are for one process; this is one of 2", marks=pytest.mark.slow
        ),
    ],
)
def test_what_does_not_divide_is_refused_once(tmp_path: Path, changes: list[str], problem: str) -> None:
    code, said = ended(started(tmp_path, "--gpus", "2", *changes))
    assert code == 2
    assert said.count("error: ") == 1 and problem in said
    assert not (tmp_path / "runs").exists()


COMPLETE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "::1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("missing", COMPLETE)
def test_what_a_launcher_left_out_is_named(missing: str) -> None:
    given = {key: value for key, value in COMPLETE.items() if key != missing}
    if missing == "RANK":
        assert place_in_world(given) is None  # that one makes it a launcher
        return
    with pytest.raises(EnvironmentFault, match=f"but {missing} is not set"):
        place_in_world(given)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"RANK": "2"}, "RANK=2 and WORLD_SIZE=2"), ({"RANK": "-1"}, "RANK=-1"), ({"MASTER_PORT": "x"}, "MASTER_PORT=x")],
)
def test_numbers_of_a_launcher_are_checked(changes: Mapping[str, str], problem: str) -> None:
    with pytest.raises(EnvironmentFault, match=problem):
        place_in_world({**COMPLETE, **changes})


def test_slurm_tells_a_rank_where_it_stands() -> None:
    given = {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "n1"}
    world = place_in_world({**given, "MASTER_PORT": "29500"})
    assert world is not None
    assert (world.rank, world.size, world.local_rank, world.by) == (5, 8, 1, "srun")
    assert place_in_world({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a batch script outside srun
    with pytest.raises(EnvironmentFault, match="started by srun"):
        place_in_world(given)


@pytest.mark.parametrize("gpus", ["0", "-1", "two", "1.5", "", "2000000"])
def test_a_number_of_processes_is_expected(gpus: str) -> None:
    with pytest.raises(InputError, match="expected a number of processes from 1"):
        start_if_asked(gpus, "cpu")


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        code, said = ended(started(tmp_path, RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", **where))
    assert code == 3
    assert re.search(r"error: rank 0 of 2 did not meet the others at 127.0.0.1:\d+: .*", said)
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_rank_that_another_launcher_started_says_what_is_wrong(tmp_path: Path) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TMPDIR": str(tmp_path)}
    given = "parallel.timeout_minutes=0.02"
    code, said = ended(started(tmp_path, given, RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", **where))
    assert code == 3
    assert "error: rank 1 of 2 did not meet the others at 127.0.0.1:1: " in said
    assert list(tmp_path.glob("*.log")) == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of `debug` and a text of some thousand tokens."""
    folder = tmp_path_factory.mktemp("trained")
    code, said = ended(started(folder, "--max-steps", "2"))
    assert code == 0, said
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    return folder


def test_two_processes_read_a_prompt_and_write_what_one_does(trained: Path) -> None:
    answers = []
    for gpus in ("1", "2"):
        process = megalodon(trained, "generate", "debug", "-p", "-", "-n", "20", "--temperature", "0", "--gpus", gpus)
        out, err = process.communicate((trained / "text.txt").read_text(), timeout=100)
        assert process.returncode == 0, err
        answers.append(out)
    assert answers[0] == answers[1] and len(answers[0]) > 10


def test_two_processes_score_as_one_does(trained: Path) -> None:
    found = []
    for gpus in ("1", "2"):
        process = megalodon(trained, "evaluate", "debug", "--data", "text.txt", "--json", "--gpus", gpus)
        out, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
        found.append(json.loads(out)["result"]["models"][0]["quick"]["loss"]["value"])
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_what_rank_0_refuses_before_it_meets_the_others_ends_at_once(trained: Path) -> None:
    begin = time.monotonic()
    (trained / "tmp").mkdir()
    process = megalodon(trained, "generate", "debug", "-f", "nowhere.txt", "--gpus", "2", TMPDIR=str(trained / "tmp"))
    code, said = ended(process)
    assert code == 2 and said.count("error: ") == 1
    assert time.monotonic() - begin < GRACE_SECONDS
    assert list((trained / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_model_whose_text_cannot_be_cut_is_read_by_rank_0_alone(tmp_path: Path) -> None:
    code, said = ended(started(tmp_path, "model.arch=llama", "--max-steps", "1"))
    assert code == 0, said
    process = megalodon(tmp_path, "generate", "debug", "-p", "The", "-n", "3", "--gpus", "2")
    code, said = ended(process, within=60)
    assert code == 0, said


def test_a_file_of_prompts_is_not_cut(trained: Path) -> None:
    process = megalodon(trained, "generate", "debug", "--input", "a", "--output", "b", "--gpus", "2")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and "error: --input and --gpus are given" in err


def test_the_job_files_say_what_the_command_takes(repository: Path) -> None:
    subprocess.run(["bash", "-n", str(repository / "examples/slurm.sh")], check=True)
    job = yaml.safe_load((repository / "examples/kubernetes.yaml").read_text())
    container = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]
    names, changes = recipe_files.split([container["command"][-1], *container["args"][:2]])
    resolved = recipe_files.load(names, changes)
    resolved.require_complete()
    assert resolved.config.name == "7b"


def test_doctor_lets_processes_talk(tmp_path: Path) -> None:
    process = megalodon(tmp_path, "doctor", "--gpus", "2")
    out, _ = process.communicate(timeout=100)
    (line,) = [line for line in out.splitlines() if "collectives" in line]
    assert "2 ranks over gloo: all-reduce, all-gather, reduce-scatter, send and receive exact; 16 MiB summed at" in line
    assert out.count("torch") == 2  # rank 0 alone speaks
