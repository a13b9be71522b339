"""A training step beside that of transformers, timm and lightly, with equal weights and masks.

Forward and backward pass, without the optimizer. It needs the extra `peers`:

    OMP_NUM_THREADS=1 python -m benchmarks.bench_peers_step

Axes: batch; tokens; dim.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit import masking
from mimkit.interop import from_hf, from_official, from_timm, to_timm, wrap_timm
from mimkit.masking import Mask
from mimkit.nn import SwinTransformer, ViT
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

VIT = SIZES | IMAGE | {"intermediate_size": 1536}
BEIT = VIT | {"drop_path_rate": 0.0, "use_relative_position_bias": True}
# Encoders of transformers, without the layer that pools where they have one.
ENCODERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ViTModel": (VIT, {"add_pooling_layer": False}),
    "SwinModel": (SWIN | {"drop_path_rate": 0.0}, {"add_pooling_layer": False}),
    "BeitModel": (BEIT, {"add_pooling_layer": False}),
    "Data2VecVisionModel": (BEIT, {"add_pooling_layer": False}),
    "Dinov2Model": (SIZES | IMAGE, {}),
    "Dinov2WithRegistersModel": (SIZES | IMAGE | {"num_register_tokens": 4}, {}),
}

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


def simmim() -> tuple[str, Side, Side]:
    """ViTForMaskedImageModeling beside SimMIM: three fifths masked."""
    import transformers as hf

    theirs = hf.ViTForMaskedImageModeling(hf.ViTConfig(**VIT, encoder_stride=16))
    converted = from_hf(theirs)
    ours = SimMIM(SimMIMConfig(**(converted.config or {})))
    ours.load_state_dict(converted)
    images = images_of(224)
    mask = masking.uniform(masking.key(range(BATCH), seed=0), (14, 14), 0.6)
    hidden = mask.is_masked.flatten(1)
    return (
        "transformers ViTForMaskedImageModeling",
        (theirs, lambda: theirs(images, bool_masked_pos=hidden).loss),
        (ours, lambda: ours(images, mask).loss),
    )


def beit() -> tuple[str, Side, Side]:
    """BeitForMaskedImageModeling beside SimMIM's encoder and head: two fifths masked."""
    import transformers as hf

    shared = {"use_relative_position_bias": False, "use_shared_relative_position_bias": True}
    config = hf.BeitConfig(**BEIT | shared, vocab_size=8192, use_mask_token=True)
    theirs = hf.BeitForMaskedImageModeling(config)
    converted = from_hf(theirs)
    ours = SimMIM(SimMIMConfig(**(converted.config or {})))
    own = {n: value for n, value in ours.state_dict().items() if n.startswith("target.")}
    ours.load_state_dict({**converted, **own})
    images = images_of(224)
    mask = masking.uniform(masking.key(range(BATCH), seed=0), (14, 14), 0.4)
    hidden = mask.is_masked.flatten(1)
    labels = torch.randint(8192, (int(hidden.sum()),))

    def loss() -> Tensor:
        latent = ours.encoder(images, mask, mask_token=ours.mask_token)
        return F.cross_entropy(ours.head(latent[:, 1:], mask).flatten(0, 1), labels)

    return (
        "transformers BeitForMaskedImageModeling",
        (theirs, lambda: theirs(images, bool_masked_pos=hidden, labels=labels).loss),
        (ours, loss),
    )


def encoder(name: str) -> tuple[str, Side, Side]:
    """An encoder of transformers beside ours: nothing masked."""
    import transformers as hf

    cls = getattr(hf, name)
    config, options = ENCODERS[name]
    theirs = cls(cls.config_class(**config), **options)
    converted = from_hf(theirs)
    ours = (SwinTransformer if name == "SwinModel" else ViT)(**(converted.config or {}))
    ours.load_state_dict(converted)
    images = images_of(192 if name == "SwinModel" else 224)
    return (
        f"transformers {name}",
        (theirs, lambda: spread(theirs(images).last_hidden_state)),
        (ours, lambda: spread(ours(images))),
    )


def lightly_mae() -> tuple[str, Side, Side]:
    """The masked autoencoder in lightly's parts beside MAE: three quarters masked."""
    from lightly.models import utils
    from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=224, patch_size=16, embed_dim=384, depth=6, num_heads=6, num_classes=0
    )
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MAEDecoderTIMM(
        num_patches=196, patch_size=16, embed_dim=384, decoder_embed_dim=192, decoder_depth=2,
        decoder_num_heads=6,
    )  # fmt: skip
    parts = {name.removeprefix("vit."): p for name, p in backbone.state_dict().items()}
    parts.pop("mask_token", None)
    ours = MAE(
        MAEConfig(
            image_size=224,
            patch_size=16,
            dim=384,
            depth=6,
            heads=6,
            decoder_dim=192,
            decoder_depth=2,
            decoder_heads=6,
            normalize_pixels=False,
        )  # fmt: skip
    )
    ours.load_state_dict(from_official("mae", parts | decoder.state_dict()))
    images = images_of(224)
    mask = masking.uniform(masking.key(range(BATCH), seed=0), (14, 14), 0.75)
    keep = torch.cat([torch.zeros(BATCH, 1, dtype=torch.int64), mask.visible_ids + 1], dim=1)
    hidden = mask.masked_ids + 1

    def loss() -> Tensor:
        tokens = utils.repeat_token(decoder.mask_token, (BATCH, 197))
        latent = decoder.embed(backbone.encode(images, idx_keep=keep))
        decoded = decoder.decode(utils.set_at_index(tokens, keep, latent))
        predicted = decoder.predict(utils.get_at_index(decoded, hidden))
        target = utils.get_at_index(utils.patchify(images, 16), hidden - 1)
        return F.mse_loss(predicted, target)

    return (
        "lightly MaskedVisionTransformerTIMM, MAEDecoderTIMM",
        (nn.ModuleList([backbone, decoder]), loss),
        (ours, lambda: ours(images, mask).loss),
    )


def timm_swin() -> tuple[str, Side, Side]:
    """Timm's SwinTransformer beside ours: nothing masked."""
    from timm.models.swin_transformer import SwinTransformer as TimmSwin

    depths, heads, images = (2, 2, 6, 2), (3, 6, 12, 24), images_of(192)
    theirs = TimmSwin(
        img_size=192, embed_dim=48, depths=depths, num_heads=heads, window_size=6, num_classes=0,
        drop_path_rate=0.0,
    )  # fmt: skip
    ours = SwinTransformer(image_size=192, dim=48, depth=depths, heads=heads, window=6)
    ours.load_state_dict(from_timm(theirs.state_dict()))
    return (
        "timm SwinTransformer",
        (theirs, lambda: spread(theirs.forward_features(images).flatten(1, 2))),
        (ours, lambda: spread(ours(images))),
    )


def spread(tokens: Tensor) -> Tensor:
    """Return a loss that depends on every value: a norm alone is fixed by the last layer norm."""
    weights = torch.linspace(0.5, 1.5, tokens[0].numel()).view_as(tokens[0])
    return (tokens * weights).square().mean()


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
    encoders = [partial(encoder, name) for name in ENCODERS]
    timm = (timm_vit, timm_masked, timm_swin)
    for make in (mae, simmim, swin, beit, *encoders, *timm, lightly_mae):
        torch.manual_seed(0)
        print(measure(*make(), repeats), flush=True)


if __name__ == "__main__":
    main()
