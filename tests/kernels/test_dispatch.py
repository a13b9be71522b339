"""The choice between kernel and reference."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad

import mimkit
import mimkit_kernels as kernels
from mimkit._settings import settings as own_settings
from mimkit_kernels import _dispatch, settings
from mimkit_kernels._dispatch import takes_kernel
from tests.kernels.harness import DEVICE, INTERPRETED, launches, needs_gpu

CPU = torch.empty(0)


class OnGPU:
    """Stand-in for a tensor on a GPU."""

    is_cuda, device = True, torch.device("cuda")


def nothing() -> None:
    return None


def test_device_decides_by_default():
    assert not takes_kernel("name", CPU, nothing)
    assert takes_kernel("name", OnGPU(), nothing)
    assert not takes_kernel("name", OnGPU(), lambda: "such tensors")
    with mimkit.use("reference"):
        assert not takes_kernel("name", OnGPU(), nothing)


def test_use_restores_the_previous_settings():
    before = settings.backend
    with mimkit.use("reference", check=True), mimkit.use("triton"):
        assert settings.backend == "triton"
    assert settings.backend == before


def test_compiled_code_follows_use():
    gpu = OnGPU()

    def look(x: torch.Tensor) -> torch.Tensor:
        return x + 2 * takes_kernel("name", gpu, nothing) + 4 * own_settings.check

    compiled = torch.compile(look, backend="eager", fullgraph=True)
    backends = ("reference", "auto", "triton", "reference")
    found = []
    for backend, check in zip(backends, (False, True, False, True), strict=True):
        with mimkit.use(backend, check=check):
            found.append(compiled(torch.zeros(1)).item())
    takes = 2 if _dispatch.HAS_TRITON else 0
    assert found == [0, takes + 4, takes, 4]


def test_error_names_an_unknown_backend():
    with pytest.raises(ValueError, match="'cuda'"):
        mimkit.use("cuda")


def test_without_triton_a_gpu_uses_the_reference_and_warns_once(monkeypatch):
    monkeypatch.setattr(_dispatch, "HAS_TRITON", False)
    _dispatch._warn_without_triton.cache_clear()
    with pytest.warns(UserWarning, match="Triton is not installed") as caught:
        answers = [takes_kernel("name", OnGPU(), nothing) for _ in range(2)]
    assert answers == [False, False]
    assert len(caught) == 1
    with mimkit.use("triton"), pytest.raises(ValueError, match="Triton, which is not installed"):
        takes_kernel("name", OnGPU(), nothing)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter takes CPU tensors")
def test_requiring_kernels_on_a_cpu_is_an_error():
    with mimkit.use("triton"), pytest.raises(ValueError, match="tensors on cpu: it needs tensors"):
        kernels.gather_tokens(torch.zeros(1, 2, 3), torch.tensor([[0]]), 0)


def test_import_and_cpu_calls_do_not_import_triton():
    code = (
        "import sys, torch, mimkit_kernels as k\n"
        "k.gather_tokens(torch.zeros(1, 2, 3), torch.tensor([[0]]), 0)\n"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


TOKENS, IDS = torch.randn(2, 4, 3, device=DEVICE), torch.tensor([[1], [2]], device=DEVICE)


def take(tokens: torch.Tensor) -> torch.Tensor:
    return kernels.gather_tokens(tokens, IDS, 1)


@launches
def test_transforms_are_correct_or_raise():
    tangent = torch.randn_like(TOKENS)
    _, derivative = torch.func.jvp(take, (TOKENS,), (tangent,))
    assert torch.equal(derivative, take(tangent))
    # If the kernel is required, a transform is an error.
    with mimkit.use("triton"):
        with pytest.raises(ValueError, match=r"torch\.func transforms"):
            torch.func.jvp(take, (TOKENS,), (tangent,))
        with forward_ad.dual_level(), pytest.raises(ValueError, match="forward-mode"):
            take(forward_ad.make_dual(TOKENS, tangent))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(take(forward_ad.make_dual(TOKENS, tangent)))
        assert torch.equal(dual.tangent, take(tangent))


NORMS, HALF = [torch.ones(3, device=DEVICE)] * 6, torch.tensor([[1], [0]], device=DEVICE)
WORDS, IMAGES = torch.tensor([0, 4], device=DEVICE), torch.rand(2, 1, 4, 2, device=DEVICE)
NEIGHBORS = torch.zeros(2, 4, 1, dtype=torch.int32, device=DEVICE)
CALLS = {
    "gather_tokens": take,
    "restore_tokens": lambda x: kernels.restore_tokens(x[:, :1], x[0, 0], HALF, 1 - HALF, None, 0),
    "gather_patches": lambda x: kernels.gather_patches(x.unsqueeze(1), IDS, (2, 3)),
    "masked_pixel_loss": lambda x: kernels.masked_pixel_loss(x[:, :1, :2], IMAGES, IDS, (1, 2)),
    "linear_cross_entropy": lambda x: kernels.linear_cross_entropy(x[:, 0], x[1], None, WORDS)[0],
    "packed_depthwise_conv": lambda x: kernels.packed_depthwise_conv(
        x.unsqueeze(2), x[0, :3].view(3, 1, 1, 3)[..., :1], None, NEIGHBORS, (1, 1)
    ),
    "regressor_inputs": lambda x: kernels.regressor_inputs(x, x, x, x, NORMS, 1e-6)[0],
}


@launches
@pytest.mark.parametrize("name", CALLS)
def test_required_kernels_never_give_way_to_the_reference(name):
    """What a kernel does not take is an error that names it."""

    def total(x: torch.Tensor) -> torch.Tensor:
        return CALLS[name](x).sum()

    with mimkit.use("triton"):
        total(TOKENS)
        with pytest.raises(ValueError, match=rf"kernel of {name} .* torch\.func transforms"):
            torch.func.grad(total)(TOKENS)
        with pytest.raises(ValueError, match=rf"kernel of {name} .*float64"):
            total(TOKENS.double())


def test_transforms_use_the_reference_even_on_a_gpu():
    seen = []

    def look(x: torch.Tensor) -> torch.Tensor:
        seen.append(takes_kernel("name", OnGPU(), nothing))
        return x.sum()

    torch.func.grad(look)(torch.zeros(2))
    torch.vmap(look)(torch.zeros(1, 2))
    torch.func.jvp(look, (torch.zeros(2),), (torch.zeros(2),))
    with forward_ad.dual_level():
        look(torch.zeros(2))
    assert seen == [False] * 4


@needs_gpu
def test_offsets_beyond_2_to_the_31_are_correct():
    images = torch.zeros(14_300, 3, 224, 224, dtype=torch.uint8, device=DEVICE)
    assert images.numel() > 1 << 31
    images[-1, :, -16:, -16:] = 255
    ids = torch.full((len(images), 1), 195, device=DEVICE)
    patches = kernels.gather_patches(images, ids, (16, 16))
    assert patches[-1].eq(1).all()
    assert patches[:-1].eq(0).all()
    tokens = torch.zeros(11_000, 196, 1024, dtype=torch.bfloat16, device=DEVICE)
    assert tokens.numel() > 1 << 31
    tokens[-1, -1] = 1
    taken = kernels.gather_tokens(tokens, torch.full((len(tokens), 1), 195, device=DEVICE), 0)
    assert taken[-1].eq(1).all()
    assert taken[:-1].eq(0).all()
