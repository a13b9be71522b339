"""Block-wise sampler: the kernel gives exactly the masks of the reference."""

import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import mimkit
import mimkit_kernels as kernels
from mimkit import masking
from mimkit_kernels.blockwise_sample import (
    _launch,
    blockwise_reference_op,
    blockwise_sample_op,
    blockwise_sample_reference,
)
from tests.kernels.figures import check_case, compiled_cases
from tests.kernels.harness import DEVICE, compiles, few, launches, meta, needs_gpu, poisoned_outputs
from tests.strategies import keys

LOG_ASPECT = (math.log(0.3), -math.log(0.3))


def draw(side: int) -> None:
    ids, seed_and_epoch = meta(256, dtype=torch.int64), meta(2, dtype=torch.int64)
    half = side * side // 2
    _launch(ids, seed_and_epoch, 512, 768, side, side, half, 16, max(half, 1), *LOG_ASPECT, 32)


LAUNCHES = {f"{side}x{side} tokens": lambda side=side: draw(side) for side in (14, 1, 20, 28)}

shapes = st.sampled_from([(1, 1), (1, 13), (7, 1), (3, 4), (5, 9), (14, 14)]).flatmap(
    lambda grid: st.tuples(st.just(grid), st.integers(0, grid[0] * grid[1]))
)


@launches
@few
@given(keys(max_batch=2), shapes, st.sampled_from([1, 4, 16]), st.sampled_from([0, 5]))
@example(masking.key([5], seed=-1, epoch=(1 << 32) - 1).view(255), ((14, 14), 98), 16, 0)
def test_kernel_gives_the_same_masks_as_the_reference(key, shape, min_block, more):
    grid, count = shape
    blocks = (min_block, min_block + more if more else max(count, 1))
    streams = (2 << 8 | key.view_index, 3 << 8 | key.view_index)
    inputs = (key.sample_ids, key.seed_and_epoch)
    expected = blockwise_sample_reference(*inputs, *streams, *grid, count, *blocks, *LOG_ASPECT, 32)
    with mimkit.use("triton"), poisoned_outputs():
        result = kernels.blockwise_sample(
            *(i.to(DEVICE) for i in inputs), streams, grid, count, blocks, LOG_ASPECT, 32
        )
    for ids, right in zip(result, expected, strict=True):
        assert ids.dtype == torch.int64
        assert torch.equal(ids.cpu(), right)


@launches
@pytest.mark.full  # that of `uniform` is in the quick tier
def test_public_sampler_uses_the_kernel_eager_and_compiled():
    key = masking.key(torch.tensor([1 << 40, -7], device=DEVICE), seed=3, epoch=2).view(1)
    with mimkit.use("reference"):
        expected = masking.blockwise(key, (6, 8), 0.5, min_block=4)
    with mimkit.use("triton"):
        assert masking.blockwise(key, (6, 8), 0.5, min_block=4).equal(expected)
        compiled = torch.compile(masking.blockwise, fullgraph=True, backend="aot_eager")
        assert compiled(key, (6, 8), 0.5, min_block=4).equal(expected)


def test_too_many_tokens_are_an_error_only_if_the_kernel_is_required():
    key = masking.key([0], seed=0)
    with mimkit.use("triton"), pytest.raises(ValueError, match="does not take 1089 tokens"):
        masking.blockwise(key, (33, 33), 0.5)
    assert masking.blockwise(key, (33, 33), num_masked=1).num_masked == 1


@needs_gpu
@pytest.mark.parametrize("side", [1, 7, 14, 28, 64])
def test_masks_on_gpu_and_cpu_are_identical(side):
    ids = torch.arange(64) * 104729 - (1 << 50)
    for seed, epoch in ((0, 0), (-1, 7), ((1 << 64) - 1, (1 << 32) - 1)):
        count = side * side // 2
        key = masking.key(ids, seed=seed, epoch=epoch)
        on_cpu = masking.blockwise(key, (side, side), num_masked=count)
        key = masking.key(ids.cuda(), seed=seed, epoch=epoch)
        on_gpu = masking.blockwise(key, (side, side), num_masked=count)
        assert on_gpu.device.type == "cuda"
        assert on_gpu.to("cpu").equal(on_cpu)
        assert torch.equal(on_gpu.masked_ids.cpu(), on_cpu.masked_ids)


@pytest.mark.parametrize("op", [blockwise_sample_op, blockwise_reference_op])
def test_operators_pass_opcheck(op):
    key = masking.key([3, 1 << 40], seed=-5)
    inputs = (key.sample_ids, key.seed_and_epoch, 2, 3, 6, 7, 20, 16, 20, *LOG_ASPECT, 32)
    torch.library.opcheck(op, inputs)


@compiles
@pytest.mark.parametrize(("case", "target"), compiled_cases(LAUNCHES))
def test_static_figures_are_not_worse_than_recorded(case, target):
    check_case("blockwise_sample", case, target)
