"""Tests marked `launches` run in Triton's interpreter where there is no GPU.

The quick tier runs all kernels in one child process, since starting one costs more than most of its
tests. The long tier runs more cases, and one child a file, so that a crash fails one file.
"""

from pathlib import Path

import pytest

from tests.kernels.harness import HAS_TRITON, ON_GPU
from tests.kernels.interpreter import run_in_interpreter

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="on a GPU, the tests launch the kernels there"),
    pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed"),
]
HERE = Path(__file__).parent
FILES = [path for path in sorted(HERE.glob("test_*.py")) if "\n@launches\n" in path.read_text()]


def test_kernels_are_correct_in_the_interpreter():
    run_in_interpreter("launches and not full", *FILES)


@pytest.mark.full
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_case_is_correct_in_the_interpreter(file):
    run_in_interpreter("launches and (full or not full)", file)
