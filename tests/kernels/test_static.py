"""The recorded figures of compiled kernels; each kernel's own test file compares its launches."""

from dataclasses import replace

import pytest

from tests.kernels.aot import Figures, compile_launch, record
from tests.kernels.figures import Key, all_launches, check_figures, read_figures
from tests.kernels.harness import compiles

pytestmark = compiles

RECORDED = Figures(registers=50, local=0, load_bits=128, store_bits=64)


def first_cases() -> list[tuple[str, str]]:
    first: dict[str, tuple[str, str]] = {}
    for kernel, case in all_launches():
        first.setdefault(kernel, (kernel, case))
    return list(first.values())


@pytest.mark.parametrize(
    "worse", [{"registers": 65}, {"local": 8}, {"load_bits": 64}, {"store_bits": 32}], ids=str
)
def test_a_worse_figure_fails(worse):
    key = Key("kernel", "launch", "case", "sm_90")
    check_figures(key, replace(RECORDED, registers=64), RECORDED)
    with pytest.raises(AssertionError):
        check_figures(key, replace(RECORDED, **worse), RECORDED)


def test_the_file_has_every_launch_and_no_other():
    assert {(key.kernel, key.case) for key in read_figures()} == set(all_launches())


@pytest.mark.full
@pytest.mark.parametrize(("kernel", "case"), first_cases())
def test_unaligned_tensors_compile_without_local_memory(kernel, case):
    for launch in record(all_launches()[kernel, case]):
        assert compile_launch(launch, "sm_90", aligned=False).local == 0
