"""`mimkit doctor`: what this machine and this environment can do."""

import importlib.metadata
import importlib.util
import platform
import sys
from collections.abc import Mapping

import torch

import mimkit
from mimkit import losses, masking, nn

# Package, as pip calls it -> what is missing without it.
_OPTIONAL = {
    "tyro": "recipes: pip install mimkit[recipes]",
    "pillow": "recipes: images",
    "scikit-image": "recipes: the bundled photographs",
    "simplejpeg": "recipes: decoding JPEG files about twice as fast",
    "tifffile": "recipes: TIFF files with any bands",
    "nibabel": "recipes: NIfTI files",
    "soundfile": "recipes: WAVE files",
    "torchvision": "detection, RandAugment in fine-tuning, --decode gpu",
    "torchmetrics": "detection",
    "faster-coco-eval": "detection",
    "hypothesis": "mimkit.testing",
    "timm": "interop.wrap_timm, and comparing what is converted",
    "transformers": "comparing what is converted",
}


def main() -> int:
    """Print versions, devices, whether kernels run and are right, and what is missing for what."""
    print(
        f"versions   mimkit {mimkit.__version__}, PyTorch {torch.__version__}, "
        f"Triton {_version('triton') or 'missing'}, Python {platform.python_version()}"
    )
    print(f"device     {_device()}")
    print(f"kernels    {_kernels()}")
    found = {name: _version(name) for name in _OPTIONAL}
    print(f"decoding   {_decoding(found)}")
    versions = ", ".join(f"{name} {version}" for name, version in found.items() if version)
    print(f"found      {versions or 'no optional package'}")
    for name, version in found.items():
        if not version:
            print(f"missing    {name}, for {_OPTIONAL[name]}")
    return 0


def _decoding(found: Mapping[str, str | None]) -> str:
    """Say who decodes the image files of a folder."""
    if not found["pillow"]:
        return "no images: pillow is missing"
    if not found["simplejpeg"]:
        return "pictures by pillow"
    return "JPEG files by simplejpeg, other pictures by pillow"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    if not torch.cuda.is_available():
        return f"CPU with {torch.get_num_threads()} threads ({platform.machine()}); no GPU"
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return f"{len(names)} GPU: {', '.join(names)}"


def _kernels() -> str:
    """Compare a step whose parts have kernels with the same step in plain PyTorch."""
    if not torch.cuda.is_available():
        return "run on a GPU only; here every part takes its PyTorch path"
    if importlib.util.find_spec("triton") is None:
        return "need Triton; every part takes its PyTorch path"
    with mimkit.use("triton"):
        ours = _step()
    with mimkit.use("reference"):
        plain = _step()
    difference = float((ours - plain).abs().max() / plain.abs().max())
    verdict = "equal to plain PyTorch" if difference < 1e-4 else "WRONG: please report this"
    return f"run; loss and gradient are {verdict} (largest difference {difference:.1e})"


def _step() -> torch.Tensor:
    """Return the loss of a small masked autoencoder, and a gradient, as one vector."""
    torch.manual_seed(0)
    images = torch.rand(4, 3, 64, 64).cuda()
    encoder = nn.ViT(image_size=64, patch_size=8, dim=64, depth=1, heads=2).cuda()
    decoder = nn.MAEDecoder(grid=encoder.grid, in_dim=64, dim=32, depth=1, heads=2).cuda()
    head = nn.PixelHead(dim=32, patch_size=(8, 8), in_channels=3).cuda()
    mask = masking.uniform(masking.key(range(4), seed=0), encoder.grid, 0.75).to("cuda")
    prediction = head(decoder(encoder(images, mask), mask))
    loss = losses.masked_pixel_loss(prediction, images, mask, patch_size=8)
    loss.backward()
    gradient = next(p.grad for p in encoder.parameters() if p.grad is not None)
    return torch.cat([loss.detach()[None], gradient.flatten()])


if __name__ == "__main__":
    sys.exit(main())
