"""What compilers make of the kernels, on GPUs that need not be there."""

import pytest

from tests.kernels.aot import TARGETS, compile_launch, record
from tests.kernels.figures import all_launches, measure, quick_launches, read_table
from tests.kernels.harness import INTERPRETED

pytestmark = pytest.mark.skipif(
    INTERPRETED, reason="the interpreter's process cannot compile: Triton's helpers are interpreted"
)
pytest.importorskip("triton", reason="Triton is not installed")

# Releases of a version of Triton, and of its compilers, differ by that much.
SLACK = 1.2


def check_case(kernel: str, case: str, target: str) -> None:
    recorded = read_table()
    for key, figures in measure(kernel, case, target):
        assert key in recorded, f"{key} is not in the table: run python -m tests.kernels.figures"
        limit = recorded[key][target]
        assert figures.local == 0, f"{key} uses the stack or local memory on {target}: {figures}"
        assert figures.registers <= limit.registers * SLACK + 4, (key, figures)
        assert figures.load_bits >= limit.load_bits, (key, figures)
        assert figures.store_bits >= limit.store_bits, (key, figures)


QUICK = [(*case, target) for case in quick_launches() for target in ("sm_90", "gfx942")]
ALL = [(*case, target) for case in all_launches() for target in TARGETS]


@pytest.mark.parametrize(("kernel", "case", "target"), QUICK)
def test_no_figure_is_worse_than_the_table(kernel, case, target):
    check_case(kernel, case, target)


@pytest.mark.full
@pytest.mark.parametrize(("kernel", "case", "target"), [c for c in ALL if c not in QUICK])
def test_no_figure_is_worse_than_the_table_in_any_case(kernel, case, target):
    check_case(kernel, case, target)


@pytest.mark.full
@pytest.mark.parametrize(("kernel", "case"), quick_launches())
def test_unaligned_tensors_compile_without_local_memory(kernel, case):
    for launch in record(all_launches()[kernel, case]):
        assert compile_launch(launch, "sm_90", aligned=False).local == 0


def test_the_table_lists_the_launches_and_nothing_else():
    assert {(kernel, case) for kernel, _, case in read_table()} == set(all_launches())
