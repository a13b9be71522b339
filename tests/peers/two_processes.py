"""Run a script in two processes of one job."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# With PyTorch 2.14, a process now and then aborts while its interpreter ends: no Python is left to
# run, and its process group was destroyed, but a thread of gloo is still there.
AT_EXIT = "terminate called without an active exception"


def run_in_two_processes(script: Path) -> str:
    """Run a script, which must print what it has done before it waits for the other process.

    Returns:
        What both have printed. They share a pipe: a line may follow another without a break.

    Raises:
        AssertionError: If a process fails, other than by PyTorch's abort at its exit.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script)]
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    # Unbuffered: the other process of one that aborts is ended at once.
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0 or AT_EXIT in done.stderr, done.stderr[-3000:]
    return done.stdout
