"""Sizes, layouts and settings at the edge of what kernels take; see kernels/README.md."""

import ast
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mimkit
import mimkit_kernels as kernels
from mimkit import masking
from mimkit.losses import linear_cross_entropy, masked_pixel_loss
from mimkit_kernels import _launch, _patches
from tests.kernels import planted
from tests.kernels.aot import compiled, record, specialization
from tests.kernels.emulated import emulated_launches
from tests.kernels.figures import all_launches
from tests.kernels.harness import DEVICE, INTERPRETED, compiles, laid_out, launches, meta

FILES = sorted(Path(kernels.__file__).parent.glob("*.py"))
FAR = 1 << 31  # elements; a 32-bit offset overflows
not_watched = pytest.mark.skipif(
    INTERPRETED and os.environ.get("TRITON_INTERPRET") != "1",
    reason="the emulator keeps a record for every byte of a tensor",
)


def module(name: str) -> Any:
    """Return a kernel's module; in the package, functions have the modules' names."""
    return import_module(f"mimkit_kernels.{name}")


# Offsets beyond 2 ** 31


def far_apart(samples: Tensor) -> Tensor:
    """Return two samples whose first elements are more than 2 ** 31 elements apart.

    The memory between them is not touched, so the system provides none.
    """
    first, second = samples
    storage = torch.empty(FAR + 64 + second.numel(), dtype=samples.dtype, device=DEVICE)
    view = storage.as_strided(samples.shape, (FAR + 64, *second.contiguous().stride()))
    return view.copy_(samples)


@launches
@not_watched
def test_images_far_apart_are_read_correctly():
    images = torch.randint(256, (2, 1, 4, 4), dtype=torch.uint8)
    ids, far = torch.tensor([[0, 3], [1, 2]], device=DEVICE), far_apart(images)
    assert far.stride(0) > FAR
    with mimkit.use("triton"):
        patches = kernels.gather_patches(far, ids, (2, 2))
        errors = kernels.masked_pixel_loss(torch.zeros(2, 2, 4, device=DEVICE), far, ids, (2, 2))
    with mimkit.use("reference"):
        near = images.to(DEVICE)
        right = kernels.gather_patches(near, ids, (2, 2))
        expected = kernels.masked_pixel_loss(torch.zeros(2, 2, 4, device=DEVICE), near, ids, (2, 2))
    torch.testing.assert_close(patches, right)
    torch.testing.assert_close(errors, expected)


@launches
@not_watched
def test_tokens_far_apart_are_read_correctly():
    tokens = torch.randn(2, 3, 4).half()
    ids, others = torch.tensor([[2], [0]], device=DEVICE), torch.tensor([[0, 1], [1, 2]])
    far, others = far_apart(tokens), others.to(DEVICE)
    near, fill = tokens.to(DEVICE), torch.ones(4, dtype=torch.float16, device=DEVICE)
    with mimkit.use("triton"):
        taken = kernels.gather_tokens(far, ids, 0)
        restored = kernels.restore_tokens(far[:, :1], fill, ids, others, None, 0)
        total = module("move_tokens")._launch_sum(far, ids, 0)
    with mimkit.use("reference"):
        assert torch.equal(taken, kernels.gather_tokens(near, ids, 0))
        right = kernels.restore_tokens(near[:, :1], fill, ids, others, None, 0)
    assert torch.equal(restored, right)
    torch.testing.assert_close(total, taken.float().sum((0, 1)))


# Grids


@compiles
def test_grids_are_within_the_limits_of_gpus():
    for (kernel, case), call in all_launches().items():
        for launch in record(call):
            first, *others = launch.grid
            assert first < 1 << 31, (kernel, case)
            assert all(size <= 65_535 for size in others), (kernel, case)


@compiles
def test_grids_do_not_grow_with_the_batch_along_y_and_z():
    ids, tokens = meta(1 << 16, 784, dtype=torch.int64), meta(1 << 16, 784, 768)
    move, images = module("move_tokens"), meta(1 << 16, 3, 448, 448, dtype=torch.uint8)
    calls = [
        lambda: move._launch_gather(tokens, ids, 0),
        lambda: move._launch_scatter(tokens, ids, 1568, 1),
        lambda: move._launch_sum(tokens, ids, 0),
        lambda: module("gather_patches")._launch_gather(images, ids, [16, 16], None, None, True),
        lambda: module("uniform_sample")._launch(ids[:, 0], ids[0, :2], 0, 784, 196),
    ]
    for call in calls:
        for launch in record(call):
            assert all(size <= 64 for size in launch.grid[1:]), (launch.name, launch.grid)


# Alignment


@compiles
@pytest.mark.parametrize("layout", ["unaligned", "strided", "transposed"])
def test_no_access_is_wider_than_the_alignment_of_its_address(layout):
    """The emulator raises at an access of n bytes whose address is no multiple of n."""

    def on_cpu(tensor):  # the emulator's memory, also where there is a GPU
        return laid_out(tensor, layout, torch.device("cpu"))

    tokens, ids = on_cpu(torch.randn(2, 4, 64)), torch.tensor([[3], [1]])
    with emulated_launches():
        taken = module("move_tokens")._launch_gather(tokens, ids, 0)
        images = on_cpu(torch.randn(1, 3, 16, 16))
        patches = module("gather_patches")._launch_gather(
            images, ids[:1], [8, 8], None, None, False
        )
    assert torch.equal(taken, kernels.gather_tokens(tokens, ids, 0))
    expected = kernels.gather_patches(images, ids[:1], (8, 8), channels_last=False)
    assert torch.equal(patches, expected)


@compiles
def test_misaligned_access_is_found():
    with emulated_launches():
        planted.misaligned_kernel[(1,)](torch.zeros(600), 4, BLOCK=512)
        with pytest.raises(IndexError, match="16 bytes that are not aligned"):
            planted.misaligned_kernel[(1,)](torch.zeros(600), 2, BLOCK=512)


# Strides


def strided(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a meta tensor of which no two values are neighbors in memory."""
    return meta(*shape, 2, dtype=dtype)[..., 0]


def tensors(name: str, argument: Any) -> list[tuple[str, Tensor]]:
    """Return the tensors of a kernel's argument, each with its name."""
    if isinstance(argument, tuple):
        names = getattr(argument, "_fields", map(str, range(len(argument))))
        parts = zip(names, argument, strict=True)
        return [found for part, value in parts for found in tensors(part, value)]
    return [(name, argument)] if isinstance(argument, Tensor) else []


# Kernels read images by their strides. The others are of `linear_cross_entropy`, which makes them.
NOT_COPIED = {"images", "logits", "losses", "hits"}


@compiles
@pytest.mark.parametrize("kernel", sorted({kernel for kernel, _ in all_launches()}))
def test_kernels_that_take_no_strides_get_contiguous_tensors(kernel):
    """One that is not would be read at wrong addresses, with no error."""
    calls = [call for (of, _), call in all_launches().items() if of == kernel]
    with mock.patch.object(import_module(f"tests.kernels.test_{kernel}"), "meta", strided):
        launched = [launch for call in calls for launch in record(call)]
    found = [
        (launch.name, *pair)
        for launch in launched
        for argument in launch.arguments.items()
        for pair in tensors(*argument)
    ]
    assert len(found) > len(launched)
    for launch, name, tensor in found:
        assert tensor.is_contiguous() or name in NOT_COPIED, (launch, name)


# Devices and streams


class OnSecondGPU:
    """Stand-in for a tensor on another GPU than the current one."""

    is_cuda, device = True, torch.device("cuda:1")


def test_launches_make_the_device_of_the_tensor_current():
    with mock.patch.object(torch.cuda, "device") as guard, _launch.on_device(OnSecondGPU()):
        guard.assert_called_once_with(torch.device("cuda:1"))


@pytest.mark.parametrize("file", [f for f in FILES if not f.stem.startswith("_")], ids=str)
def test_every_launch_is_inside_on_device(file):
    """Triton launches on the current device and its current stream, which PyTorch sets."""
    found = {True: 0, False: 0}

    def visit(node: ast.AST, guarded: bool) -> None:
        if isinstance(node, ast.With):
            guards = [item.context_expr for item in node.items]
            guarded |= any(getattr(g, "func", g).__dict__.get("id") == "on_device" for g in guards)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            name = getattr(node.func.value, "id", "")
            found[guarded] += name.endswith("_kernel")
        for child in ast.iter_child_nodes(node):
            visit(child, guarded)

    visit(ast.parse(file.read_text()), False)
    assert found[True]
    assert not found[False]


# CUDA graphs and torch.compile


@compiles
def test_launchers_read_no_values():
    """Meta tensors have none: reading one, which would synchronize with a GPU, raises."""
    with pytest.raises(RuntimeError, match="meta"):
        meta(1).item()
    for call in all_launches().values():
        assert record(call)


@pytest.mark.parametrize("mode", ["fake", "compiled"])
def test_constants_are_made_when_a_call_is_traced(mode):
    """Made by the first run, they would belong to the memory of its CUDA graph."""
    made: list[Any] = []
    real = torch.tensor

    def seen(*arguments: Any, **named: Any) -> Tensor:
        made.append(real(*arguments, **named))
        return made[-1]

    images, ids = torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, dtype=torch.int64)
    op = module("gather_patches").gather_patches_op
    mean = [0.125, 0.25, {"fake": 0.5, "compiled": 0.75}[mode]]  # a set of its own
    with mock.patch.object(torch, "tensor", seen):
        if mode == "fake":
            with FakeTensorMode() as fake:
                op(fake.from_tensor(images), fake.from_tensor(ids), [2, 2], mean, None, True)
        else:
            graphs = []
            torch.compile(
                lambda i: op(i, ids, [2, 2], mean, None, True),
                backend=lambda graph, inputs: graphs.append(len(made)) or graph.forward,
                fullgraph=True,
            )(images)
            assert graphs == [1]  # before the graph has run
    (constant,) = made
    assert type(constant) is Tensor
    assert constant.tolist() == mean
    kept = _patches.channel_tensor(mean, torch.device("cpu"))
    assert kept is constant


def outputs(result: Any) -> list[tuple[Any, ...]]:
    """Return shape, strides and dtype of each result."""
    parts = result if isinstance(result, tuple | list) else (result,)
    return [(part.shape, part.stride(), part.dtype) for part in parts]


IDS = torch.int64
CASES: dict[str, tuple[str, str, str, tuple[Any, ...]]] = {
    # name: file, launcher, fake, arguments
    "gather": ("move_tokens", "_launch_gather", "_fake_gather",
               (meta(2, 6, 8).transpose(0, 1), meta(6, 1, dtype=IDS), 0)),
    "scatter": ("move_tokens", "_launch_scatter", "_fake_scatter",
                (meta(2, 8, 3).mT, meta(2, 2, dtype=IDS), 5, 1)),
    "restore": ("move_tokens", "_launch_restore", "_fake_restore",
                (meta(2, 8, 3).mT, meta(8), meta(2, 2, dtype=IDS), meta(2, 3, dtype=IDS), None, 1)),
    "sum": ("move_tokens", "_launch_sum", "_fake_sum",
            (meta(2, 8, 3).mT, meta(2, 2, dtype=IDS), 1)),
    "gather patches": ("gather_patches", "_launch_gather", "_fake_gather",
                       (meta(2, 4, 4, 3).permute(0, 3, 1, 2), meta(2, 2, dtype=IDS),
                        [2, 2], None, None, True)),
    "scatter patches": ("gather_patches", "_launch_scatter", "_fake_scatter",
                        (meta(2, 12, 2).mT, meta(2, 2, dtype=IDS), [2, 3, 4, 4], [2, 2],
                         None, True, torch.float16)),
    "uniform": ("uniform_sample", "_launch", "_fake",
                (meta(3, dtype=IDS), meta(2, dtype=IDS), 0, 9, 4)),
    "blockwise": ("blockwise_sample", "_launch", "_fake",
                  (meta(3, dtype=IDS), meta(2, dtype=IDS), 0, 1, 3, 3, 4, 1, 4, -1.0, 1.0, 9)),
    "pixel loss": ("masked_pixel_loss", "_launch_forward", "_fake_forward",
                   (meta(2, 12, 2).mT, meta(2, 3, 4, 4), meta(2, 2, dtype=IDS),
                    [2, 2], None, None, True, True, "l2", 1.0)),
    "conv": ("packed_depthwise_conv", "_launch_conv", "_fake_conv",
             (meta(2, 3, 8, 4).mT, meta(8, 1, 3, 3), None, meta(2, 3, 9, dtype=torch.int32),
              [2, 2])),
    "regressor": ("regressor_inputs", "_launch_forward", "_forward_reference",
                  (*[meta(2, 8, 3).mT] * 4, *[meta(8)] * 6, 1e-6, torch.float16)),
}  # fmt: skip


@compiles
@pytest.mark.parametrize("name", CASES)
def test_fake_results_have_the_strides_of_real_ones(name):
    file, launcher, fake, arguments = CASES[name]
    fake = "_fake_forward" if name == "regressor" else fake
    real: list[Any] = []
    record(lambda: real.append(getattr(module(file), launcher)(*arguments)))
    assert outputs(real[0]) == outputs(getattr(module(file), fake)(*arguments))


# Compilations

# Code that a training run needs in which counts change from step to step (Triton compiles numbers
# equal to 1 and multiples of 16 separately), for batches of 64 samples with 1 to 195 of 196 tokens
# visible, and for 49 visible tokens in batches of 2 to 129 samples.
VARIANTS = {
    "gather": (3, 1), "scatter": (3, 1), "restore": (5, 1), "sum": (5, 4),
    "gather patches": (3, 1), "scatter patches": (3, 1),
    "pixel loss": (3, 1), "pixel loss, backward": (3, 1),
    "convolution": (3, 2), "filter's gradient": (6, 3),
    "regressor": (5, 2), "regressor, backward": (5, 5),
    "uniform": (3, 1), "blockwise": (3, 1), "cross-entropy": (1, 1),
}  # fmt: skip


def launch_with(name: str, b: int, v: int) -> Any:
    """Run a launcher for `b` samples with `v` visible tokens of 196."""
    m = 196 - v
    visible_ids, masked_ids = meta(b, v, dtype=IDS), meta(b, m, dtype=IDS)
    images, visible, masked, tokens = (
        meta(b, 3, 224, 224), meta(b, v, 768), meta(b, m, 768), meta(b, 196, 768)
    )  # fmt: skip
    move, patches, loss, conv, regressor = (
        module(file)
        for file in (
            "move_tokens", "gather_patches", "masked_pixel_loss", "packed_depthwise_conv",
            "regressor_inputs",
        )
    )  # fmt: skip
    width, statistics = meta(768), meta(b, 196, 4)
    cells, around = meta(b, v, 16, 256), meta(b, v, 9, dtype=torch.int32)
    of_patches = ([16, 16], None, None, True)
    of_loss = (masked, images, masked_ids, *of_patches, True, "l2", 1.0)
    key = (meta(b, dtype=IDS), meta(2, dtype=IDS))
    rows = meta(b * v)
    calls = {
        "gather": lambda: move._launch_gather(tokens, visible_ids, 0),
        "scatter": lambda: move._launch_scatter(visible, visible_ids, 196, 0),
        "restore": lambda: move._launch_restore(visible, width, visible_ids, masked_ids, None, 0),
        "sum": lambda: move._launch_sum(tokens, visible_ids, 0),
        "gather patches": lambda: patches._launch_gather(images, visible_ids, *of_patches),
        "scatter patches": lambda: patches._launch_scatter(
            visible, visible_ids, [b, 3, 224, 224], [16, 16], None, True, torch.float32
        ),
        "pixel loss": lambda: loss._launch_forward(*of_loss),
        "pixel loss, backward": lambda: loss._launch_backward(*[meta(b, m)] * 3, *of_loss),
        "convolution": lambda: conv._launch_conv(
            cells, meta(256, 1, 5, 5), meta(256), around, [4, 4]
        ),
        "filter's gradient": lambda: conv._launch_weight_gradient(
            cells, cells, around, [4, 4], [5, 5]
        ),
        "regressor": lambda: regressor._launch_forward(
            *[visible, masked] * 2, *[width] * 6, 1e-6, torch.float16
        ),
        "regressor, backward": lambda: regressor._launch_backward(
            masked, tokens, tokens, *[visible, masked] * 2, *[width] * 3, statistics, False
        ),
        "uniform": lambda: module("uniform_sample")._launch(*key, 0, 196, v),
        "blockwise": lambda: module("blockwise_sample")._launch(
            *key, 0, 1, 14, 14, m, 16, m, -1.2, 1.2, 10
        ),
        "cross-entropy": lambda: module("linear_cross_entropy")._launch(
            meta(b * v, 8192), meta(b * v, dtype=IDS), rows, rows
        ),
    }
    return calls[name]()


@compiles
@pytest.mark.parametrize("name", VARIANTS)
def test_changing_counts_compile_a_bounded_number_of_kernels(name):
    def compilations(counts: list[tuple[int, int]]) -> int:
        launched = [launch for n in counts for launch in record(lambda n=n: launch_with(name, *n))]
        return len({(str(specialization(launch)), str(launch.options)) for launch in launched})

    of_visible = compilations([(64, visible) for visible in range(1, 196)])
    of_batch = compilations([(batch, 49) for batch in range(2, 130)])
    assert (of_visible, of_batch) == VARIANTS[name]


@compiles
def test_no_stream_compiles_the_samplers_again():
    def call(stream: int) -> Any:
        ids = meta(64, dtype=IDS), meta(2, dtype=IDS)
        return module("uniform_sample")._launch(*ids, stream, 196, 49)

    streams = (0, 1, 255, 32_767, 32_768, 65_535)
    launched = [launch for stream in streams for launch in record(lambda s=stream: call(s))]
    assert len({str(specialization(launch)) for launch in launched}) == 1


# Arithmetic


def compiled_text(launch: Any) -> str:
    return compiled(launch, "sm_90").asm["ttir"]


def narrow_arithmetic(launch: Any) -> str | None:
    """Return an operation of a launch that computes in 16 bits, if there is one."""
    # Of scalars or tensors: "bf16" or "tensor<64xbf16>".
    narrow = r"(?:arith\.(?:add|sub|mul|div|rem)f|math\.\w+) [^\n]*: [^\n]*(?:\b|x)b?f16\b"
    found = re.search(narrow, compiled_text(launch))
    return found and found.group()


@compiles
@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["product", "sum", "float32"])
def test_planted_arithmetic_in_16_bits_is_found(kind, dtype):
    x = meta(64, dtype=dtype)

    def launch() -> None:
        planted.narrow_kernel[(1,)](torch.empty_like(x), x, BLOCK=64, KIND=kind, num_warps=1)

    (launched,) = record(launch)
    assert (narrow_arithmetic(launched) is None) == (kind == "float32")


@compiles
@pytest.mark.full
def test_sums_and_products_are_computed_in_float32():
    cases = [c for c in all_launches() if "float16" in c[1]]
    # Samplers have no floats.
    names = {kernel for kernel, _ in all_launches() if not kernel.endswith("_sample")}
    assert {kernel for kernel, _ in cases} == names
    for case in cases:
        for launch in record(all_launches()[case]):
            assert narrow_arithmetic(launch) is None, case


# Second derivatives


@launches
def test_second_derivatives_that_kernels_lack_raise_one_sentence():
    mask = masking.uniform(masking.key([0], seed=0), (2, 2), 0.5).to(DEVICE)
    images, target = torch.rand(1, 1, 4, 4, device=DEVICE), torch.tensor([1], device=DEVICE)
    prediction = torch.rand(1, 2, 4, device=DEVICE, requires_grad=True)
    x, weight = (torch.rand(n, 4, device=DEVICE, requires_grad=True) for n in (1, 3))

    def loss(x: Tensor) -> Tensor:
        return linear_cross_entropy(x, weight, None, target)

    cases = {
        "masked_pixel_loss_backward": (
            lambda p: masked_pixel_loss(p, images, mask, 2), prediction
        ),
        "linear_cross_entropy_backward": (loss, x),
    }  # fmt: skip
    for name, (function, leaf) in cases.items():
        with mimkit.use("triton"):
            (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
            with pytest.raises(NotImplementedError, match=f"{name} has no derivative"):
                torch.autograd.grad(grad.sum(), leaf)
