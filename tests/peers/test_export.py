"""Exported programs: torch.export, ONNX and AOTInductor compute what the encoder computes."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from mimkit import masking
from mimkit.masking import Mask
from mimkit.nn import ConvViT, SwinTransformer, ViT


class WithToken(nn.Module):
    """A Swin under a mask, which needs a mask token."""

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"dim": 16, "depth": (2, 2), "heads": (2, 2), "window": 4}
        self.encoder = SwinTransformer(image_size=32, patch_size=4, **sizes)
        self.grid = self.encoder.grid
        self.token = nn.Parameter(torch.randn(16))

    def forward(self, images: Tensor, mask: Mask | None = None) -> Tensor:
        token = None if mask is None else self.token
        encoded: Tensor = self.encoder(images, mask, mask_token=token)
        return encoded


CONV: dict[str, Any] = {"patch_sizes": (4, 2, 1), "dim": (8, 8, 16), "depth": (1, 1, 1), "heads": 2}
ENCODERS: dict[str, Callable[[], Any]] = {
    "vit": lambda: ViT(image_size=32, patch_size=8, dim=32, depth=1, heads=2),
    "swin": WithToken,
    "convvit": lambda: ConvViT(image_size=32, **CONV),
}
BATCH = Dim("batch", max=64)


def build(name: str) -> Any:
    torch.manual_seed(0)
    return ENCODERS[name]().eval()


def inputs(encoder: Any, batch: int, seed: int) -> tuple[Tensor, Mask]:
    key = masking.key(range(batch), seed=seed)
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return images, masking.uniform(key, encoder.grid, 0.5)


LOAD = """
import sys, torch, mimkit
from mimkit import masking
program = torch.export.load(sys.argv[1]).module()
images, expected, grid = torch.load(sys.argv[2], weights_only=True)
mask = masking.uniform(masking.key(range(5), seed=7), tuple(grid), 0.5)
assert torch.equal(program(images, mask), expected)
"""


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_a_saved_program_loads_in_another_process_and_takes_another_mask(
    name: str, tmp_path: Path
) -> None:
    encoder = build(name)
    shapes = ({0: BATCH}, [{0: BATCH}, {0: BATCH}])
    program = torch.export.export(encoder, inputs(encoder, 3, 0), dynamic_shapes=shapes)
    torch.export.save(program, tmp_path / "program.pt2")
    images, mask = inputs(encoder, 5, 7)
    expected = encoder(images, mask)
    torch.save((images, expected, list(encoder.grid)), tmp_path / "expected.pt")
    files = [str(tmp_path / file) for file in ("program.pt2", "expected.pt")]
    subprocess.run([sys.executable, "-c", LOAD, *files], check=True, timeout=120)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_a_program_without_a_mask_takes_any_batch(name: str) -> None:
    encoder = build(name)
    images, _ = inputs(encoder, 3, 0)
    program = torch.export.export(encoder, (images,), dynamic_shapes=({0: BATCH},)).module()
    for batch in (1, 6):
        images, _ = inputs(encoder, batch, 1)
        assert torch.equal(program(images), encoder(images))


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_onnxruntime_computes_what_the_encoder_does(name: str, tmp_path: Path) -> None:
    encoder = build(name)
    program = torch.onnx.export(encoder, inputs(encoder, 3, 0), dynamo=True, verbose=False)
    assert program is not None
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    images, mask = inputs(encoder, 3, 5)
    values = pytree.tree_leaves((images, mask))
    feed = {
        one.name: value.numpy() for one, value in zip(session.get_inputs(), values, strict=True)
    }
    (found,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(found), encoder(images, mask), rtol=0, atol=1e-5)


# A C++ compiler takes minutes for the other two: `python -m pytest tests/peers -m full`.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.full] * (n != "vit")) for n in ENCODERS]
)
@torch.no_grad()
def test_aotinductor_computes_what_the_encoder_does(name: str, tmp_path: Path) -> None:
    encoder = build(name)
    program = torch.export.export(encoder, inputs(encoder, 3, 0))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "model.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    images, mask = inputs(encoder, 3, 5)
    torch.testing.assert_close(loaded(images, mask), encoder(images, mask), rtol=1e-5, atol=1e-5)
