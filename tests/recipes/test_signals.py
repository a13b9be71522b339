"""A signal ends a run in one line; the same command ends like an undisturbed run."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from recipes.engine import run
from recipes.engine.errors import ProcessError
from recipes.engine.run.folder import RunFolder
from recipes.engine.run.world import World, join, name_of_start
from recipes.mae import RECIPE
from recipes.signals import EXIT_CODES
from tests.recipes.command import config_for
from tests.recipes.slow_phase import PHASES
from tests.recipes.stopping import (
    ENV,
    ROOT,
    STEPS,
    assert_equal_runs,
    finish,
    options,
    start,
    stop_in,
)
from tests.waiting import end_of, wait_until


@pytest.fixture(scope="module")
def undisturbed(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(pictures, out)
    return out


@pytest.fixture(scope="module")
def undisturbed_and_probed(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed-and-probed") / "run"
    finish(labelled, out)
    return out


CELLS = [
    pytest.param(
        phase,
        number,
        id=f"{number.name}-{phase}",
        marks=[] if (number, phase) == (signal.SIGTERM, "step") else pytest.mark.full,
    )
    for number in EXIT_CODES
    for phase in PHASES
]
AT = {
    "start-up": "before training",
    "step": "after step 5 of 12, which is saved",
    "checkpoint": f"of {STEPS}, which is saved",
    "evaluation": "after training, which is saved",
    "report": "after training, which is saved",
}


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[dict[tuple[str, str], str]]:
    """What each signal did in each phase; printed when more than one cell was tried."""
    cells: dict[tuple[str, str], str] = {}
    yield cells
    if len(cells) > 1:
        lines = [f"{'':10}" + "".join(f"{phase:>18}" for phase in PHASES)]
        for number in EXIT_CODES:
            found = (cells.get((number.name, phase), "not tried") for phase in PHASES)
            lines.append(f"{number.name:10}" + "".join(f"{cell:>18}" for cell in found))
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("", *lines, sep="\n")


@pytest.mark.parametrize(("phase", "number"), CELLS)
def test_a_run_that_was_stopped_by_a_signal_ends_like_an_undisturbed_one(
    phase: str,
    number: signal.Signals,
    table: dict[tuple[str, str], str],
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    table[number.name, phase] = "failed"
    out = tmp_path / "run"
    probed = phase == "evaluation"  # only labelled images are
    data = request.getfixturevalue("labelled" if probed else "pictures")
    line = stop_in(phase, number, "mae", data, out)
    assert AT[phase] in line
    finish(data, out)
    whole = "undisturbed_and_probed" if probed else "undisturbed"
    assert_equal_runs(out, request.getfixturevalue(whole))
    saved = line.partition("after step ")[2].split() or ["-"]
    table[number.name, phase] = f"{EXIT_CODES[number]}, step {saved[0]}, same"


@pytest.mark.full
def test_a_second_ctrl_c_leaves_at_once(pictures: Path, tmp_path: Path) -> None:
    process = start("step", "mae", pictures, tmp_path / "run")
    wait_until((tmp_path / "run.reached").exists, "step", process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code, printed = end_of(process)
    assert code == 130
    assert "Traceback" not in printed
    assert not list((tmp_path / "run/checkpoints").glob("*5"))


@pytest.mark.full
def test_a_signal_for_every_process_of_a_job_leaves_the_loading_workers_alone(
    pictures: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start("step", "mae", pictures, out, "--workers", "2")
    wait_until(out.with_suffix(".reached").exists, "step", process)
    workers = children(process.pid)
    assert len(workers) == 2
    for pid in (*workers, process.pid):
        os.kill(pid, signal.SIGTERM)
    code, printed = end_of(process)
    assert code == 143
    assert "after step 5 of 12, which is saved" in printed
    assert "worker" not in printed
    finish(pictures, out)
    assert_equal_runs(out, undisturbed)


@pytest.mark.full
def test_a_loading_worker_that_is_killed_is_one_line(
    pictures: Path, undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start("step", "mae", pictures, out, "--workers", "2")
    wait_until(out.with_suffix(".reached").exists, "step", process)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    code, printed = end_of(process)
    assert code == 2
    *_, error = printed.splitlines()
    assert error.startswith("error: a process that loads images was killed")
    assert "Traceback" not in printed
    finish(pictures, out)
    assert_equal_runs(out, undisturbed)


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in listed.split()]


def launch(pictures: Path, out: Path, *more: str, restarts: int = 0) -> subprocess.Popen[str]:
    """Start two processes by torchrun."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
            "--max-restarts", str(restarts), str(ROOT / "recipes/mae.py"),
            *options(pictures, out, "--max-steps", "300", "--epochs", "400", *more),
        ],
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def process_of_rank(rank: int, job: subprocess.Popen[str]) -> int:
    for pid in children(job.pid):
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError(f"no process of rank {rank}")


def reached(out: Path, step: int) -> bool:
    file = out / "metrics.jsonl"
    return file.exists() and f'"step": {step},' in file.read_text()


@pytest.mark.full
@pytest.mark.parametrize("ranks", [(0,), (1,), (1, 0)], ids=str)
def test_a_signal_to_one_process_makes_all_save_the_same_step(
    ranks: tuple[int, ...], pictures: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    job = launch(pictures, out)
    wait_until(lambda: reached(out, 6), "step 6", job)
    for rank in ranks:
        os.kill(process_of_rank(rank, job), signal.SIGUSR1)
        time.sleep(0.05)
    code, printed = end_of(job)
    assert code == 1  # torchrun's, whatever the code of its processes
    assert "exitcode  : 75" in printed
    (line,) = (line for line in printed.splitlines() if line.startswith("stopped by"))
    step = int(line.split("after step ")[1].split()[0])
    assert (out / f"checkpoints/step-{step:08d}/COMPLETE").exists()
    again = launch(pictures, out)
    wait_until(lambda: reached(out, step + 2), "two more steps", again)
    again.terminate()
    end_of(again)
    steps = [json.loads(row)["step"] for row in (out / "metrics.jsonl").open()]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.full
def test_a_hanging_process_is_named_after_the_timeout(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = launch(pictures, out, "--timeout", "8")
    wait_until(lambda: reached(out, 3), "step 3", job)
    hanging = process_of_rank(1, job)
    os.kill(hanging, signal.SIGSTOP)
    try:
        wait_until(
            lambda: (
                not Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
                or job.poll() is not None
            ),
            "end",
            job,
            seconds=90,
            or_end=True,
        )
    finally:
        with contextlib.suppress(ProcessLookupError):  # torchrun has killed it
            os.kill(hanging, signal.SIGKILL)
    _, printed = end_of(job)
    assert "error: process 1 of 2 hangs: no answer for --timeout 8 seconds" in printed
    assert "exitcode  : 124" in printed


@pytest.mark.full
def test_torchrun_starts_a_killed_job_again(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    job = launch(pictures, out, "--max-steps", "40", restarts=1)
    wait_until(lambda: reached(out, 6), "step 6", job)
    os.kill(process_of_rank(1, job), signal.SIGKILL)
    code, printed = end_of(job)
    assert code == 0, printed
    steps = [json.loads(row)["step"] for row in (out / "metrics.jsonl").open()]
    assert steps == list(range(1, 41))


WRONG = [
    ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x must be 0 to 1"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be 0 to 1"),
    ({"RANK": "0", "WORLD_SIZE": "-1"}, "WORLD_SIZE=-1 must be 1 to"),
    ({"RANK": "0", "WORLD_SIZE": str(2**31)}, "WORLD_SIZE=2147483648 must be 1 to 2147483647"),
    ({"RANK": "0" * 5_000, "WORLD_SIZE": "1"}, "must be 0 to 0"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set, and RANK is not"),
    ({"RANK": "x"}, "RANK is set, and WORLD_SIZE is not"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "and MASTER_PORT is not"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "http"}, "MASTER_PORT=http must be"),
    ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "5000"}, "and MASTER_ADDR is not"),
]
ADDRESS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(("variables", "says"), WRONG)
def test_wrong_variables_of_torchrun_give_one_line(variables, says, monkeypatch, capsys):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(RECIPE, "", ["--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize(
    ("rank", "says"),
    [
        # PyTorch waits ten seconds more before it gives up.
        pytest.param("0", "1 of them have joined within --timeout 1", marks=pytest.mark.full),
        ("1", "nothing listens at localhost"),
    ],
)
def test_a_process_whose_job_is_incomplete_gives_up_in_one_line(rank, says, monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]  # free again from here on
    for name, value in (ADDRESS | {"RANK": rank, "MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match=says), join("cpu", timeout=1):
        pass


def test_each_start_of_a_job_has_its_own_name_in_the_store_that_torchrun_keeps():
    store = dist.HashStore()
    store.set("mimkit/here/1", "of a process that has ended")
    names = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            worlds = [World(rank, 3) for rank in range(3)]
            found = [pool.submit(name_of_start, store, world, 60) for world in worlds]
            names.append({one.result() for one in found})
    assert [len(each) for each in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        for name, value in (ADDRESS | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        says = f"MASTER_PORT={port}: Address already in use"
        with pytest.raises(ProcessError, match=says), join("cpu", timeout=1):
            pass


def test_a_local_rank_without_a_gpu_of_its_own_is_named(monkeypatch):
    variables = ADDRESS | {"MASTER_PORT": "5000", "LOCAL_RANK": "4"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ProcessError, match="LOCAL_RANK=4 must be 0 to 3"), join("cuda", timeout=1):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_explained(number, labelled, tmp_path, monkeypatch, capsys):
    def refuse(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    arguments = options(labelled, tmp_path / "run", "--max-steps", "1")
    assert run(RECIPE, "", arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "refuses to lock a file" in line
    assert os.strerror(number) in line
    assert "--no-lock" in line
    config = config_for(RECIPE, *arguments)
    with RunFolder(tmp_path / "run", config, lock=False):
        assert (tmp_path / "run/config.yaml").exists()
