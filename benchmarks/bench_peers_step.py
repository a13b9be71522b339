"""A training step beside that of transformers and timm, with equal weights and masks.

Forward and backward pass, without the optimizer. It needs the extra `peers`:

    OMP_NUM_THREADS=1 python -m benchmarks.bench_peers_step

Axes: batch; tokens; dim.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mimkit import masking
from mimkit.interop import from_hf, to_timm, wrap_timm
from mimkit.masking import Mask
from mimkit.nn import ViT
from recipes.mae import MAE, MAEConfig
from recipes.simmim import SimMIM, SimMIMConfig

BATCH = 8
SIZES: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
IMAGE: dict[str, Any] = {"image_size": 224, "patch_size": 16}
DECODER: dict[str, Any] = {
    "decoder_hidden_size": 192, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": 6,
    "decoder_intermediate_size": 768,
}  # fmt: skip
SWIN: dict[str, Any] = {
    "image_size": 192, "patch_size": 4, "embed_dim": 48, "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24], "window_size": 6, "encoder_stride": 32,
}  # fmt: skip

Loss = Callable[[], Tensor]
Side = tuple[nn.Module, Loss]


def images_of(size: int) -> Tensor:
    """Return a batch of noise."""
    return torch.randn(BATCH, 3, size, size, generator=torch.Generator().manual_seed(0))


def mae() -> tuple[str, Side, Side]:
    """ViTMAEForPreTraining beside MAE: three quarters masked."""
    import transformers as hf

    config = hf.ViTMAEConfig(
        **SIZES, **IMAGE, **DECODER, intermediate_size=1536, layer_norm_eps=1e-6, norm_pix_loss=True
    )
    theirs = hf.ViTMAEForPreTraining(config)
    converted = from_hf(theirs)
    ours = MAE(MAEConfig(**(converted.config or {})))
    ours.load_state_dict(converted)
    images, noise = images_of(224), torch.rand(BATCH, 196)
    mask = Mask.from_noise(noise, (14, 14), 147)
    return (
        "transformers ViTMAEForPreTraining",
        (theirs, lambda: theirs(images, noise=noise).loss),
        (ours, lambda: ours(images, mask).loss),
    )


def swin() -> tuple[str, Side, Side]:
    """SwinForMaskedImageModeling beside SimMIM: three fifths masked, in units of 32 pixels."""
    import transformers as hf

    theirs = hf.SwinForMaskedImageModeling(hf.SwinConfig(**SWIN, drop_path_rate=0.0))
    converted = from_hf(theirs)
    ours = SimMIM(SimMIMConfig(**(converted.config or {})))
    ours.load_state_dict(converted)
    images = images_of(192)
    mask = masking.uniform(masking.key(range(BATCH), seed=0), (48, 48), 0.6, unit=8)
    hidden = mask.is_masked.flatten(1)
    return (
        "transformers SwinForMaskedImageModeling",
        (theirs, lambda: theirs(images, bool_masked_pos=hidden).loss),
        (ours, lambda: ours(images, mask).loss),
    )


def timm_vit() -> tuple[str, Side, Side]:
    """Timm's VisionTransformer beside nn.ViT: nothing masked."""
    from timm.models.vision_transformer import VisionTransformer

    ours = ViT(**IMAGE, dim=384, depth=6, heads=6)
    theirs = VisionTransformer(
        img_size=224, patch_size=16, embed_dim=384, depth=6, num_heads=6, num_classes=0
    )
    theirs.load_state_dict(to_timm(ours))
    images = images_of(224)
    return (
        "timm VisionTransformer",
        (theirs, lambda: theirs.forward_features(images).square().mean()),
        (ours, lambda: ours(images).square().mean()),
    )


def timm_masked() -> tuple[str, Side, Side]:
    """Timm's VisionTransformer under `wrap_timm` beside nn.ViT: three quarters masked."""
    _, (model, _), (ours, _) = timm_vit()
    wrapped, images = wrap_timm(model), images_of(224)
    mask = masking.uniform(masking.key(range(BATCH), seed=0), (14, 14), 0.75)
    return (
        "timm VisionTransformer under wrap_timm, masked",
        (wrapped, lambda: wrapped(images, mask).square().mean()),
        (ours, lambda: ours(images, mask).square().mean()),
    )


def step(side: Side) -> tuple[float, float, float]:
    """Take a step; return its loss, CPU seconds and wall seconds."""
    model, loss = side
    model.zero_grad(set_to_none=True)
    cpu, wall = time.process_time(), time.perf_counter()
    value = loss()
    value.backward()
    return float(value.detach()), time.process_time() - cpu, time.perf_counter() - wall


def measure(name: str, theirs: Side, ours: Side, repeats: int) -> str:
    """Check that both losses agree, time both in turn, and return a row of a table."""
    torch.testing.assert_close(step(ours)[0], step(theirs)[0], rtol=2e-6, atol=0)
    rows = [(step(theirs)[1:], step(ours)[1:]) for _ in range(repeats)]
    (their_cpu, our_cpu), (their_wall, our_wall) = (
        [min(row[side][kind] for row in rows) for side in (0, 1)] for kind in (0, 1)
    )
    milliseconds = " | ".join(f"{1000 * t:.0f}" for t in (their_cpu, our_cpu, their_wall, our_wall))
    return f"| {name} | {milliseconds} | {their_cpu / our_cpu:.2f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    print("| beside | theirs, CPU ms | ours, CPU ms | theirs, wall ms | ours, wall ms | ratio |")
    print("|---|---|---|---|---|---|")
    for make in (mae, swin, timm_vit, timm_masked):
        torch.manual_seed(0)
        print(measure(*make(), repeats), flush=True)


if __name__ == "__main__":
    main()
