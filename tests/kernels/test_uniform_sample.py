"""Uniform sampler: the kernel gives exactly the masks of the reference."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import mimkit
import mimkit_kernels as kernels
from mimkit import masking
from mimkit_kernels.uniform_sample import _launch, uniform_sample_op, uniform_sample_reference
from tests.kernels.figures import check_case, compiled_cases
from tests.kernels.harness import DEVICE, compiles, few, launches, meta, needs_gpu, poisoned_outputs
from tests.strategies import keys


def draw(num_tokens: int, num_visible: int) -> None:
    ids, seed_and_epoch = meta(256, dtype=torch.int64), meta(2, dtype=torch.int64)
    _launch(ids, seed_and_epoch, 0, num_tokens, num_visible)


LAUNCHES = {
    "49 tokens": lambda: draw(49, 12),
    "1 token": lambda: draw(1, 0),
    "196 tokens": lambda: draw(196, 49),
    "400 tokens": lambda: draw(400, 100),
    "784 tokens": lambda: draw(784, 196),
    "1568 tokens": lambda: draw(1568, 157),
    "4096 tokens": lambda: draw(4096, 1024),
}

sizes = st.sampled_from([1, 2, 3, 4, 5, 7, 49, 64, 97, 196]).flatmap(
    lambda tokens: st.tuples(st.just(tokens), st.integers(0, tokens))
)


@launches
@few
@given(keys(max_batch=3), sizes)
@example(masking.key([5], seed=-1, epoch=(1 << 32) - 1).view(255), (784, 196))
def test_kernel_gives_the_same_masks_as_the_reference(key, size):
    inputs = (key.sample_ids, key.seed_and_epoch, key.view_index, *size)
    expected = uniform_sample_reference(*inputs)
    with mimkit.use("triton"), poisoned_outputs():
        result = kernels.uniform_sample(*(i.to(DEVICE) for i in inputs[:2]), *inputs[2:])
    for ids, right in zip(result, expected, strict=True):
        assert ids.dtype == torch.int64
        assert torch.equal(ids.cpu(), right)


@launches
def test_public_sampler_uses_the_kernel_eager_and_compiled():
    key = masking.key(torch.tensor([1 << 40, -7, 3], device=DEVICE), seed=3, epoch=2).view(1)
    with mimkit.use("reference"):
        expected = masking.uniform(key, (6, 4), 0.75, unit=2)
    with mimkit.use("triton"):
        assert masking.uniform(key, (6, 4), 0.75, unit=2).equal(expected)
        compiled = torch.compile(masking.uniform, fullgraph=True, backend="aot_eager")
        assert compiled(key, (6, 4), 0.75, unit=2).equal(expected)


def test_too_many_tokens_are_an_error_only_if_the_kernel_is_required():
    key = masking.key([0], seed=0)
    with mimkit.use("triton"), pytest.raises(ValueError, match="does not take 4225 tokens"):
        masking.uniform(key, (65, 65), 0.5)
    assert masking.uniform(key, (65, 65), num_masked=1).num_masked == 1


@needs_gpu
@pytest.mark.parametrize("side", [2, 7, 14, 28, 40, 64, 100])
def test_masks_on_gpu_and_cpu_are_identical(side):
    ids = torch.arange(64) * 104729 - (1 << 50)
    for seed, epoch in ((0, 0), (-1, 7), ((1 << 64) - 1, (1 << 32) - 1)):
        on_cpu = masking.uniform(masking.key(ids, seed=seed, epoch=epoch), (side, side), 0.75)
        key = masking.key(ids.cuda(), seed=seed, epoch=epoch)
        on_gpu = masking.uniform(key, (side, side), 0.75)
        assert on_gpu.device.type == "cuda"
        assert on_gpu.to("cpu").equal(on_cpu)
        assert torch.equal(on_gpu.masked_ids.cpu(), on_cpu.masked_ids)


def test_operator_passes_opcheck():
    key = masking.key([3, 1 << 40], seed=-5)
    inputs = (key.sample_ids, key.seed_and_epoch, 2, 13, 5)
    torch.library.opcheck(uniform_sample_op, inputs)


@compiles
@pytest.mark.parametrize(("case", "target"), compiled_cases(LAUNCHES))
def test_static_figures_are_not_worse_than_recorded(case, target):
    check_case("uniform_sample", case, target)
