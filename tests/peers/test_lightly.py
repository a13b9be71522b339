"""lightly's masked autoencoder and mimkit's: the same weights give the same loss and gradients."""

import torch
from lightly.models import utils
from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit.interop import from_official
from mimkit.masking import key, uniform
from recipes.mae import MAE, MAEConfig
from tests.nn import plain

SIZES = {"embed_dim": 32, "img_size": 32, "patch_size": 8}
CONFIG = MAEConfig(
    image_size=32, patch_size=8, dim=32, depth=2, heads=4, decoder_dim=24, decoder_depth=2,
    decoder_heads=3, normalize_pixels=False,
)  # fmt: skip


def official(backbone: nn.Module, decoder: nn.Module, *, gradients: bool) -> dict[str, Tensor]:
    """Weights or gradients under the names of MAE's authors, which lightly has in two modules."""
    parts = [(name.removeprefix("vit."), p) for name, p in backbone.named_parameters()]
    named = dict(part for part in parts if part[0] != "mask_token")
    named |= dict(decoder.named_parameters())
    tensors = {name: p.grad if gradients else p.detach() for name, p in named.items()}
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


def test_lightlys_masked_autoencoder_has_the_same_loss_and_gradients() -> None:
    vit = VisionTransformer(**SIZES, depth=2, num_heads=4, num_classes=0)
    backbone = MaskedVisionTransformerTIMM(vit=vit)
    decoder = MAEDecoderTIMM(
        num_patches=16, patch_size=8, embed_dim=32, decoder_embed_dim=24, decoder_depth=2,
        decoder_num_heads=3,
    )  # fmt: skip
    plain.randomize(nn.ModuleList([backbone, decoder]))
    ours = MAE(CONFIG)
    converted = from_official("mae", official(backbone, decoder, gradients=False))
    assert not converted.dropped
    ours.load_state_dict(converted)

    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    mask = uniform(key(range(3), seed=0), (4, 4), 0.75)
    prefix = torch.zeros(3, 1, dtype=torch.int64)  # lightly counts the class token
    keep, hidden = torch.cat([prefix, mask.visible_ids + 1], dim=1), mask.masked_ids + 1
    tokens = utils.repeat_token(decoder.mask_token, (3, 17))
    latent = decoder.embed(backbone.encode(images, idx_keep=keep))
    decoded = decoder.decode(utils.set_at_index(tokens, keep, latent))
    predicted = decoder.predict(utils.get_at_index(decoded, hidden))
    target = utils.get_at_index(utils.patchify(images, 8), hidden - 1)
    expected = F.mse_loss(predicted, target)
    loss = ours(images, mask).loss
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=0)

    expected.backward()
    loss.backward()
    theirs = from_official("mae", official(backbone, decoder, gradients=True))
    own = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert len(own) > 40
    for name, gradient in own.items():
        difference = (gradient - theirs[name]).abs().max()
        assert difference <= 2e-5 * gradient.abs().max().clamp(min=1e-6), name
