"""The deadlines of the tests that wait for other processes."""

import subprocess
import sys

import pytest

from tests.waiting import end_of, wait_until


def child(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-S", "-c", code],
        stderr=subprocess.PIPE,
        text=True,
    )


def test_what_never_comes_is_named_and_the_process_is_stopped():
    process = child("import time; time.sleep(60)")
    with pytest.raises(pytest.fail.Exception, match="still no checkpoint"):
        wait_until(lambda: False, "checkpoint", process, seconds=0.1)
    assert process.returncode is not None


def test_a_process_that_ends_too_early_is_reported_with_its_errors():
    with pytest.raises(pytest.fail.Exception, match="(?s)code 3, without checkpoint.*the disk"):
        wait_until(
            lambda: False,
            "checkpoint",
            child("import sys; print('the disk', file=sys.stderr); sys.exit(3)"),
        )


def test_a_process_may_end_first_where_that_is_allowed():
    process = child("")
    wait_until(lambda: False, "checkpoint", process, or_end=True)
    assert end_of(process) == (0, "")


def test_a_process_that_does_not_end_is_stopped():
    process = child("import time; time.sleep(60)")
    with pytest.raises(pytest.fail.Exception, match="still ran"):
        end_of(process, seconds=0.1)
    assert process.returncode is not None
