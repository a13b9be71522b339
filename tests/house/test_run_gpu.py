"""The run of everything that needs a GPU: no kill, failure or slip loses what is done."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks import run_gpu
from benchmarks.run_gpu import Step

COUNT = "import pathlib; f = pathlib.Path({file!r}); f.open('a').write('x'); "
Call = Callable[..., int]


def step(name: str, code: str, minutes: float = 8, part: str = "tests") -> Step:
    return Step(part, name, [sys.executable, "-c", code], minutes)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Call]:
    """Call the program with steps of our own; its folder is `tmp_path / "out"`."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    monkeypatch.setattr(run_gpu, "missing", lambda parts: [])
    monkeypatch.setenv("MIMKIT_COMMIT", "0")

    def run(steps: list[Step], *arguments: str) -> int:
        monkeypatch.setattr(run_gpu, "steps", lambda *_: iter(steps))
        return run_gpu.main([str(tmp_path / "out"), *arguments])

    yield run
    run_gpu.STOP.clear()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def results(tmp_path: Path) -> dict[str, dict[str, float]]:
    read: dict[str, dict[str, float]] = json.loads((tmp_path / "out" / "steps.json").read_text())
    return read


def last_lines(text: str) -> list[str]:
    return text.splitlines()[-2:]


def test_a_step_that_is_done_is_not_repeated(call: Call, tmp_path: Path) -> None:
    file = tmp_path / "times"
    steps = [step("once", COUNT.format(file=str(file)))]
    assert [call(steps), call(steps)] == [0, 0]
    assert file.read_text() == "x"


def test_a_failure_is_tried_twice_named_last_and_both_logs_are_kept(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails = f"{COUNT.format(file=str(tmp_path / 'n'))} print('try', f.read_text()); exit(7)"
    steps = [step("bad", fails), step("good", "print('good')")]
    assert call(steps) == 3
    output = capsys.readouterr().out
    assert re.search(r"tests/bad: exit code 7 after [\d.]+ s: try x\n", output)
    assert "tests/good: exit code 0" in output
    assert last_lines(output) == [
        "failed or out of time: tests/bad",
        "left: tests/bad; call it again",
    ]
    assert [call(steps), call(steps)] == [1, 1]
    assert last_lines(capsys.readouterr().out) == [
        "failed or out of time: tests/bad",
        "left: nothing",
    ]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert [line for line in log.splitlines() if line.startswith("try")] == ["try x", "try xx"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["log.txt", "steps.json"]


def test_a_step_that_hangs_is_stopped_with_all_that_it_started_and_the_run_goes_on(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_gpu, "PATIENCE", 1)
    monkeypatch.setattr(run_gpu, "LEAST", 1)
    child = tmp_path / "child"
    hangs = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        f"p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
        f"open({str(child)!r}, 'w').write(str(p.pid)); print('began', flush=True); time.sleep(600)"
    )
    assert call([step("hangs", hangs, 3 / 60), step("good", "")]) == 3
    result = results(tmp_path)
    assert result["tests/hangs"]["exit_code"] is None
    assert result["tests/good"]["exit_code"] == 0
    assert "began" in (tmp_path / "out" / "log.txt").read_text()
    assert is_gone(int(child.read_text()))


def test_a_step_that_had_little_time_has_not_had_its_try(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_gpu, "run", lambda step, output, *_: output.touch())
    late = step("late", "", 0.4)
    assert [call([late]) for _ in range(run_gpu.TRIES + 1)] == [3] * (run_gpu.TRIES + 1)
    assert results(tmp_path)["tests/late"]["tries"] == 0
    long = step("long", "", 8)
    assert [call([long]) for _ in range(run_gpu.TRIES + 1)] == [3, 1, 1]


def test_a_smoke_test_that_fails_ends_the_call_and_is_tried_again_each_time(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    after = [step("after", "")]
    fails = step("smoke", "exit('PyTorch sees no GPU')", part="smoke")
    for _ in range(run_gpu.TRIES + 1):
        assert call([fails, *after], "--part", "tests") == 1
    assert "PyTorch sees no GPU" in capsys.readouterr().out
    assert "tests/after" not in results(tmp_path)
    assert call([step("smoke", "", part="smoke"), *after], "--part", "tests") == 0
    assert results(tmp_path)["tests/after"]["exit_code"] == 0


PROGRAM = """
import sys
from benchmarks import run_gpu
run_gpu.missing = lambda parts: []
code = f"import os, time; open({file!r}, 'a').write(str(os.getpid()) + chr(10)); time.sleep(600)"
run_gpu.steps = lambda *_: iter(
    [run_gpu.Step("tests", "done", [sys.executable, "-c", ""]),
     run_gpu.Step("tests", "long", [sys.executable, "-c", code])]
)
sys.exit(run_gpu.main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_the_steps_keeps_what_is_done_and_costs_no_try(
    call: Call, tmp_path: Path, number: signal.Signals
) -> None:
    if number == signal.SIGKILL and sys.platform != "linux":
        pytest.skip("only Linux ends a process with its parent")
    started = tmp_path / "started"
    program = PROGRAM.replace("{file!r}", repr(str(started)))
    command = [sys.executable, "-c", program, str(tmp_path / "out"), "--jobs", "1"]
    process = subprocess.Popen(command, cwd=run_gpu.ROOT, stdout=subprocess.PIPE, text=True)
    wait_for(lambda: started.exists() and started.read_text().endswith("\n"))
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    wait_for(lambda: is_gone(int(started.read_text())))
    result = results(tmp_path)
    assert result["tests/done"]["exit_code"] == 0
    if number == signal.SIGKILL:
        assert "tests/long" not in result
    else:
        assert process.returncode == 3
        assert last_lines(output)[1] == "left: tests/long; call it again"
        assert result["tests/long"]["tries"] == 0
    assert call([step("long", "")]) == 0


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Return whether a process has ended; one that nobody has waited for counts."""
    status = Path(f"/proc/{pid}/stat")
    if status.exists():
        return status.read_text().rsplit(")", 1)[1].split()[0] == "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("text", ['{"tests/good": {"tri', "", "null"])
def test_a_damaged_record_of_steps_is_kept_and_the_run_goes_on(
    call: Call, tmp_path: Path, text: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "steps.json").write_text(text)
    assert call([step("good", "")]) == 0
    assert (tmp_path / "out" / "steps.damaged.json").read_text() == text
    assert results(tmp_path)["tests/good"]["exit_code"] == 0


def test_many_steps_at_once_are_all_recorded(call: Call, tmp_path: Path) -> None:
    assert call([step(str(n), f"print('step', {n})") for n in range(12)], "--jobs", "4") == 0
    assert len(results(tmp_path)) == 12
    log = (tmp_path / "out" / "log.txt").read_text()
    assert sorted(re.findall(r"^step (\d+)$", log, re.M), key=int) == [str(n) for n in range(12)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--part", "kernel"), "invalid choice: 'kernel'"),
        (("--minutes", "0"), "--minutes 0: at least 1, or there is time for no step"),
        (("--minutes", "nan"), "--minutes nan: at least 1"),
        (("--jobs", "0"), "--jobs 0: at least 1"),
        (("--jobs", "-1"), "--jobs -1: at least 1"),
    ],
)
def test_a_wrong_word_is_an_error_at_once(
    call: Call, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call([step("never", "")], *arguments)
    assert sentence in capsys.readouterr().err


def test_a_folder_that_is_a_file_is_an_error(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match="2"):
        call([])
    assert str(tmp_path / "out") in capsys.readouterr().err


def test_a_second_call_in_the_same_folder_is_an_error(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = run_gpu.read_options([str(tmp_path / "out"), "--stand-in"])
    with pytest.raises(SystemExit, match="2"):
        call([])
    assert "another call works in" in capsys.readouterr().err
    options.log.close()
    assert call([]) == 0


def test_a_dry_run_and_a_real_one_do_not_share_a_folder(
    call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call([step("good", "")], "--stand-in") == 0
    assert call([step("good", "")]) == 2
    assert "give another folder" in capsys.readouterr().err


def test_without_history_the_commit_must_be_named(
    call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_gpu, "has_commit", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        call([])
    assert "set MIMKIT_COMMIT" in capsys.readouterr().err
    assert call([], "--stand-in") == 0


def test_packages_are_named_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = {"absent": ("no_such_module", ("steps",)), "optional": ("no_such_module", ())}
    monkeypatch.setattr(run_gpu, "PACKAGES", absent)
    assert run_gpu.missing(["steps"]) == ["absent (steps): No module named 'no_such_module'"]
    assert run_gpu.missing(["kernels"]) == []
    with pytest.raises(SystemExit, match="2"):
        run_gpu.read_options([str(tmp_path), "--part", "steps", "--stand-in"])
    assert "absent (steps)" in capsys.readouterr().err


def test_every_part_is_known_and_has_steps(tmp_path: Path) -> None:
    parts = list(dict.fromkeys(step.part for step in run_gpu.steps(tmp_path, True, 1)))
    assert tuple(parts) == run_gpu.PARTS
    assert {part for _, users in run_gpu.PACKAGES.values() for part in users} <= set(parts)


def test_wheels_are_unpacked_afresh_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    wheel = tmp_path / "thing-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as files:
        files.writestr("thing.py", "value = 1\n" * 100)
    half = tmp_path / "unpacked" / "other.py"
    half.parent.mkdir()
    half.write_text("")
    run_gpu.unpack(tmp_path)
    assert [path.name for path in half.parent.iterdir()] == ["thing.py"]
    whole = wheel.read_bytes()
    for damaged in (whole[:-30], whole.replace(b"value", b"valve")):
        wheel.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"thing-1-py3-none-any\.whl cannot be unpacked"):
            run_gpu.unpack(tmp_path)


def test_the_script_takes_a_folder_relative_to_where_it_is_called(tmp_path: Path) -> None:
    where = tmp_path / "some where"
    where.mkdir()
    command = [str(run_gpu.ROOT / "benchmarks" / "run_gpu.sh"), "a file"]
    (where / "a file").write_text("")
    run = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert str(where / "a file") in run.stderr
