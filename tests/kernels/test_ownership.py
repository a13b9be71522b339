"""The check that no two programs of a launch access one address; it runs in all launches' tests."""

import pytest
import torch

from tests.kernels import planted
from tests.kernels.harness import INTERPRETED, launches
from tests.kernels.ownership import Conflict

in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")


@launches
@in_interpreter
def test_overlapping_writes_of_two_programs_are_an_error():
    out = torch.zeros(100, dtype=torch.int32)
    planted.overlap_kernel[(3,)](out, BLOCK=32, STEP=32)
    with pytest.raises(Conflict, match="two programs of overlap_kernel write"):
        planted.overlap_kernel[(3,)](out, BLOCK=32, STEP=31)


@launches
@in_interpreter
def test_reading_what_another_program_writes_is_an_error():
    data = torch.zeros(100)
    planted.neighbors_kernel[(2,)](data, data, BLOCK=32, OVERLAP=0)
    planted.neighbors_kernel[(2,)](torch.zeros(64), data, BLOCK=32, OVERLAP=1)
    with pytest.raises(Conflict, match="neighbors_kernel reads what another"):
        planted.neighbors_kernel[(2,)](data, data, BLOCK=32, OVERLAP=1)


@launches
@in_interpreter
def test_writes_that_begin_again_at_the_start_are_an_error():
    out = torch.zeros(64, dtype=torch.int32)
    planted.modulo_kernel[(2,)](out, BLOCK=32, LENGTH=64)
    with pytest.raises(Conflict, match="two programs of modulo_kernel write"):
        planted.modulo_kernel[(3,)](out, BLOCK=32, LENGTH=64)


@launches
@in_interpreter
def test_atomic_operations_of_two_programs_are_an_error():
    planted.atomic_kernel[(1,)](torch.zeros(64), BLOCK=64)
    with pytest.raises(Conflict, match="two programs of atomic_kernel write"):
        planted.atomic_kernel[(2,)](torch.zeros(64), BLOCK=64)


@launches
@in_interpreter
def test_reading_a_part_of_what_another_program_writes_is_an_error():
    words = torch.zeros(100, dtype=torch.int32)
    planted.halves_kernel[(2,)](words.clone(), words.view(torch.int16), BLOCK=32)
    with pytest.raises(Conflict, match="halves_kernel reads what another"):
        planted.halves_kernel[(2,)](words, words.view(torch.int16), BLOCK=32)
