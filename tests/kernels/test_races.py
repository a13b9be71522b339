"""No two accesses to the same memory race; shown on the compiled code, and between programs."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from mimkit import masking
from mimkit.patches import neighbors
from tests.kernels import planted, ptx
from tests.kernels.emulated import emulated_launches
from tests.kernels.harness import assert_near, compiles
from tests.kernels.interpreter import run_in_interpreter
from tests.kernels.ptx import Race

pytestmark = compiles

# In the package, functions have the names of these modules.
(
    blockwise_sample, gather_patches, linear_cross_entropy, masked_pixel_loss,
    move_tokens, packed_depthwise_conv, regressor_inputs, uniform_sample,
) = (
    import_module(f"mimkit_kernels.{name}")
    for name in (
        "blockwise_sample", "gather_patches", "linear_cross_entropy", "masked_pixel_loss",
        "move_tokens", "packed_depthwise_conv", "regressor_inputs", "uniform_sample",
    )
)  # fmt: skip

WARPS = {"num_warps": 4}


@pytest.fixture(autouse=True)
def _emulated():
    with emulated_launches():
        yield


# The checker


def test_load_after_the_last_barrier_is_a_race():
    """The fault that `linear_cross_entropy` once had."""
    logits, target = torch.randn(1, 8192), torch.tensor([8000])
    with pytest.raises(Race, match="read and write of argument 0 by two warps"):
        planted.late_load_kernel[(1,)](
            logits, target, torch.zeros(1), 8192, BLOCK=4096, num_warps=8
        )


def test_two_writes_of_one_address_are_a_race_without_a_barrier():
    out = torch.zeros(512, dtype=torch.int32)
    with pytest.raises(Race, match="write and write of argument 0 by two warps"):
        planted.two_writes_kernel[(1,)](out, BLOCK=512, BARRIER=False, **WARPS)
    planted.two_writes_kernel[(1,)](out, BLOCK=512, BARRIER=True, **WARPS)
    assert torch.equal(out, torch.arange(512, dtype=torch.int32).flip(0))


def test_reading_what_another_warp_wrote_is_a_race_without_a_barrier():
    out, scratch = torch.zeros(512, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)
    with pytest.raises(Race, match="read and write of argument 1 by two warps"):
        planted.scratch_kernel[(1,)](out, scratch, BLOCK=512, BARRIER=False, **WARPS)
    planted.scratch_kernel[(1,)](out, scratch, BLOCK=512, BARRIER=True, **WARPS)
    assert torch.equal(out, torch.arange(512, dtype=torch.int32).flip(0))


def test_programs_that_write_the_same_address_are_a_race():
    out = torch.zeros(100, dtype=torch.int32)
    planted.overlap_kernel[(3,)](out, BLOCK=32, STEP=32)
    with pytest.raises(Race, match="write and write of argument 0 by two programs"):
        planted.overlap_kernel[(3,)](out, BLOCK=32, STEP=31)


def test_reading_what_another_program_writes_is_a_race():
    data = torch.zeros(100)
    planted.neighbors_kernel[(2,)](data, data, BLOCK=32, OVERLAP=0, num_warps=1)
    planted.neighbors_kernel[(2,)](torch.zeros(64), data, BLOCK=32, OVERLAP=1, num_warps=1)
    with pytest.raises(Race, match="read and write of argument 0 by two programs"):
        planted.neighbors_kernel[(2,)](data, data, BLOCK=32, OVERLAP=1, num_warps=1)


def test_overwriting_what_another_warp_reads_in_a_loop_is_a_race_without_barriers():
    out, buffer = torch.zeros(512, dtype=torch.int32), torch.zeros(512, dtype=torch.int32)
    sizes = {"STEPS": 3, "BLOCK": 512, **WARPS}
    with pytest.raises(Race, match="read and write of argument 1 by two warps"):
        planted.loop_kernel[(1,)](out, buffer, BARRIER=False, **sizes)
    planted.loop_kernel[(1,)](out, buffer, BARRIER=True, **sizes)


def test_barriers_of_a_sum_do_not_order_what_follows_it():
    out, buffer = torch.zeros(1024), torch.zeros(1024)
    sizes = {"ROWS": 16, "COLUMNS": 64, **WARPS}
    with pytest.raises(Race, match="read and write of argument 1 by two warps"):
        planted.centered_kernel[(1,)](out, buffer, BARRIER=False, **sizes)
    planted.centered_kernel[(1,)](out, buffer, BARRIER=True, **sizes)


def test_race_of_more_warps_or_behind_a_branch_is_found_where_it_happens():
    out, scratch = torch.zeros(1024, dtype=torch.int32), torch.zeros(1024, dtype=torch.int32)
    on, off = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    # With four warps, a thread has written itself what it reads.
    sizes = {"BLOCK": 1024, "SHIFT": 512}
    planted.shifted_kernel[(1,)](out, scratch, on, **sizes, num_warps=4)
    planted.shifted_kernel[(1,)](out, scratch, off, **sizes, num_warps=8)
    with pytest.raises(Race, match="read and write of argument 1 by two warps"):
        planted.shifted_kernel[(1,)](out, scratch, on, **sizes, num_warps=8)


def test_programs_that_begin_again_at_the_start_are_a_race():
    out = torch.zeros(64, dtype=torch.int32)
    planted.modulo_kernel[(2,)](out, BLOCK=32, LENGTH=64, num_warps=1)
    with pytest.raises(Race, match="write and write of argument 0 by two programs"):
        planted.modulo_kernel[(3,)](out, BLOCK=32, LENGTH=64, num_warps=1)


@pytest.mark.parametrize("shares_storage", [True, False])
def test_tensors_that_overlap_race(shares_storage):
    whole = torch.zeros(64 + 4)
    parts = whole[4:], whole[:64]
    if not shares_storage:  # each is a storage of its own
        parts = tuple(torch.from_numpy(part.numpy()) for part in parts)
    planted.neighbors_kernel[(2,)](*parts[::-1], BLOCK=32, OVERLAP=-4, num_warps=1)
    with pytest.raises(Race, match="read and write of argument 0 by two programs"):
        planted.neighbors_kernel[(2,)](*parts, BLOCK=32, OVERLAP=0, num_warps=1)


@pytest.mark.parametrize("name", ["linear_cross_entropy", "uniform_sample"])
def test_each_barrier_of_a_kernel_is_needed(name, monkeypatch):
    """Without any one of them, the checker finds a race in shared memory."""
    key = masking.key([3], seed=1)
    calls = {
        "linear_cross_entropy": lambda: linear_cross_entropy._launch(
            torch.randn(1, 8192), torch.tensor([8000]), torch.zeros(1), torch.zeros(1)
        ),
        "uniform_sample": lambda: uniform_sample._launch(
            key.sample_ids, key.seed_and_epoch, 0, 784, 196
        ),
    }
    barrier, execute = re.compile(r"\n\s*bar\.sync\s+0;"), ptx.execute
    found: list[int] = []

    def run(code: str, *launch: Any) -> None:
        places = list(barrier.finditer(code))
        found.append(len(places))
        for place in places:
            with pytest.raises(Race, match="shared memory"):
                execute(code[: place.start()] + code[place.end() :], *launch)

    monkeypatch.setattr(ptx, "execute", run)
    calls[name]()
    assert found[0] > 1


def test_access_outside_the_arguments_is_an_error():
    for out in (torch.zeros(100), torch.zeros(200)[:100]):
        with pytest.raises(IndexError, match="outside_kernel.* outside the arguments"):
            planted.outside_kernel[(1,)](out, BLOCK=128)


def test_instructions_that_are_not_executed_are_an_error():
    with pytest.raises(NotImplementedError, match=r"instruction atom\..* is not executed"):
        planted.atomic_kernel[(1,)](torch.zeros(64), BLOCK=64)
    with pytest.raises(NotImplementedError, match=r"instruction cp\.async.* is not executed"):
        planted.pipelined_kernel[(1,)](torch.zeros(512), torch.zeros(2048), 2048, BLOCK=512)


# The kernels, at sizes that use several warps


def test_linear_cross_entropy_is_free_of_races():
    logits, target = torch.randn(2, 8192), torch.tensor([8000, 5])
    right, ours = ([torch.zeros(2), torch.zeros(2)] for _ in range(2))
    expected = linear_cross_entropy.softmax_gradient_reference(logits.clone(), target, *right)
    assert_near(linear_cross_entropy._launch(logits, target, *ours), expected, torch.float32)
    for values, reference in zip(ours, right, strict=True):
        assert_near(values, reference, torch.float32)


@pytest.mark.parametrize("tokens", [196, 784])
def test_uniform_sample_is_free_of_races(tokens):
    key = masking.key([3], seed=1)
    inputs = (key.sample_ids, key.seed_and_epoch, 0, tokens, tokens // 4)
    expected = uniform_sample.uniform_sample_reference(*inputs)
    for result, right in zip(uniform_sample._launch(*inputs), expected, strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize(
    "side", [7, *(pytest.param(side, marks=pytest.mark.full) for side in (14, 32))]
)
def test_blockwise_sample_is_free_of_races(side):
    key = masking.key([3], seed=1)
    masked = 2 * side**2 // 5
    options = (0, 1, side, side, masked, 16, masked, -1.2, 1.2, 10)
    inputs = (key.sample_ids, key.seed_and_epoch, *options)
    expected = blockwise_sample.blockwise_sample_reference(*inputs)
    for result, right in zip(blockwise_sample._launch(*inputs), expected, strict=True):
        assert torch.equal(result, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_move_tokens_is_free_of_races(dtype):
    visible, fill = torch.randn(2, 3, 768).to(dtype), torch.randn(768).to(dtype)
    visible_ids, masked_ids = torch.tensor([[0, 3], [1, 2]]), torch.tensor([[1, 2], [0, 3]])
    arguments = (visible, fill, visible_ids, masked_ids, torch.randn(5, 768), 1)
    restored = move_tokens._launch_restore(*arguments)
    assert_near(restored, move_tokens.restore_tokens_reference(*arguments), torch.float32)
    taken = move_tokens._launch_gather(restored, visible_ids, 1)
    assert torch.equal(taken, move_tokens.gather_tokens_reference(restored, visible_ids, 1))
    scattered = move_tokens._launch_scatter(taken, visible_ids, 4, 1)
    assert torch.equal(scattered, move_tokens._scatter_reference(taken, visible_ids, 4, 1))
    total = move_tokens._launch_sum(restored, masked_ids, 1)
    assert_near(total, move_tokens._sum_reference(restored, masked_ids, 1), torch.float32)


@pytest.mark.parametrize("channels_last", [True, False])
def test_gather_patches_is_free_of_races(channels_last):
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    ids = torch.tensor([[0, 3], [2, 1]])
    arguments = (images, ids, [16, 16], (0.5, 0.4, 0.3), (0.2, 0.2, 0.3), channels_last)
    patches = gather_patches._launch_gather(*arguments)
    assert_near(patches, gather_patches.gather_patches_reference(*arguments), torch.float32)
    backward = (patches, ids, [2, 3, 32, 32], [16, 16], (0.2, 0.2, 0.3), channels_last)
    grad = gather_patches._launch_scatter(*backward, torch.float32)
    assert_near(grad, gather_patches._scatter_reference(*backward, torch.float32), torch.float32)


@pytest.mark.parametrize("channels_last", [True, pytest.param(False, marks=pytest.mark.full)])
def test_masked_pixel_loss_is_free_of_races(channels_last):
    images = torch.rand(2, 3, 64, 64)
    ids, prediction = torch.tensor([[0, 3], [2, 1]]), torch.randn(2, 2, 3 * 32**2)
    options = ([32, 32], None, None, channels_last, True, "l2", 1.0)
    saved = masked_pixel_loss._launch_forward(prediction, images, ids, *options)
    expected = masked_pixel_loss._reference_forward(prediction, images, ids, *options)
    for result, right in zip(saved, expected, strict=True):
        assert_near(result, right, torch.float32)
    backward = (torch.ones(2, 2), *expected[1:], prediction, images, ids, *options)
    grad = masked_pixel_loss._launch_backward(*backward)
    assert_near(grad, masked_pixel_loss._reference_backward(*backward), torch.float32)


@pytest.mark.parametrize("side", [2, 4])
def test_packed_depthwise_conv_is_free_of_races(side):
    mask = masking.uniform(masking.key([0], seed=0), (2, 2), num_masked=1)
    cells, weight, bias = torch.randn(1, 3, side**2, 64), torch.randn(64, 1, 5, 5), torch.randn(64)
    around = neighbors(mask)
    inputs = (cells, weight, bias, around, (side, side))
    out = packed_depthwise_conv._launch_conv(*inputs)
    expected = packed_depthwise_conv.packed_depthwise_conv_reference(*inputs)
    assert_near(out, expected, torch.float32)
    backward = (cells, expected, around, (side, side), (5, 5))
    grads = packed_depthwise_conv._launch_weight_gradient(*backward)
    wanted = packed_depthwise_conv._weight_gradient_reference(*backward)
    for result, right in zip(grads, wanted, strict=True):
        assert_near(result, right, torch.float32)


@pytest.mark.parametrize("width", [768, pytest.param(1000, marks=pytest.mark.full)])
def test_regressor_inputs_is_free_of_races(width):
    tokens = [torch.randn(2, n, width) for n in (3, 4, 3, 4)]
    parameters = [torch.randn(width) for _ in range(6)]
    inputs = (*tokens, *parameters, 1e-6, torch.float32)
    made = regressor_inputs._launch_forward(*inputs)
    expected = regressor_inputs._forward_reference(*inputs)
    for result, right in zip(made, expected, strict=True):
        assert_near(result, right, torch.float32)
    grads = [torch.randn_like(part) for part in expected[:3]]
    backward = (*grads, *tokens, *parameters[::2], expected[3], True)
    ours = regressor_inputs._launch_backward(*backward)
    for result, right in zip(ours, regressor_inputs._backward_reference(*backward), strict=True):
        assert_near(result, right, torch.float32)


# The launches of these have races on purpose, are emulated already, or run in the interpreter.
LEFT_OUT = {"test_ownership", "test_races", "test_interpreter"}


@pytest.mark.full
@pytest.mark.parametrize(
    "name", sorted({p.stem for p in Path(__file__).parent.glob("test_*.py")} - LEFT_OUT)
)
def test_launches_of_all_tests_are_free_of_races(name):
    """Every test that launches kernels passes on the compiled code too."""
    file = Path(__file__).with_name(f"{name}.py")
    if "@launches" not in file.read_text():
        pytest.skip(f"{name} launches nothing")
    selection = "launches and (full or not full)"
    run_in_interpreter(selection, file, plugins=["tests.kernels.emulate_launches"])
