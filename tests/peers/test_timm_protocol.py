"""timm's functions on mimkit's encoders: optimizers, checkpointing, feature extraction."""

import pytest
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer as TimmSwin
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from mimkit import masking
from mimkit.interop import from_timm, to_timm
from mimkit.masking import Mask
from mimkit.nn import ConvViT, SwinTransformer, ViT
from tests.nn import plain

SIZES = {"img_size": 16, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3}
OURS = {"image_size": 16, "patch_size": 4, "dim": 12, "depth": 3, "heads": 3}
SWIN = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2, 2), "window_size": 4}


def vit() -> tuple[nn.Module, nn.Module]:
    theirs = VisionTransformer(**SIZES, num_classes=5, init_values=0.1)
    return theirs, ViT(**OURS, learn_positions=True, layer_scale=0.1, num_classes=5, pool="token")


def registers() -> tuple[nn.Module, nn.Module]:
    theirs = VisionTransformer(**SIZES, num_classes=5, reg_tokens=2, no_embed_class=True)
    options = {"learn_positions": True, "num_registers": 2, "num_classes": 5, "pool": "token"}
    return theirs, ViT(**OURS, **options)


def beit() -> tuple[nn.Module, nn.Module]:
    theirs = Beit(
        **SIZES, num_classes=5, init_values=0.1, use_rel_pos_bias=True, use_abs_pos_emb=True
    )
    options = {"layer_scale": 0.1, "qkv_bias": "qv", "relative_positions": "block"}
    return theirs, ViT(**OURS, **options, learn_positions=True, num_classes=5, pool_norm=True)


def swin() -> tuple[nn.Module, nn.Module]:
    theirs = TimmSwin(**SWIN, num_heads=(2, 2, 4), num_classes=5)
    shape = {"image_size": 32, "patch_size": 2, "dim": 8, "depth": (2, 2, 2), "heads": (2, 2, 4)}
    return theirs, SwinTransformer(**shape, window=4, num_classes=5)


PAIRS = {"vit": vit, "registers": registers, "beit": beit, "swin": swin}


def settings_of(model: nn.Module, **options: float) -> dict[str, tuple[float, float]]:
    """(lr_scale, weight decay) of every parameter."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, **options)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


@pytest.mark.parametrize("options", [{"layer_decay": 0.75}, {}])
@pytest.mark.parametrize("name", PAIRS)
def test_optimizers_treat_every_parameter_as_in_timms_own_model(name, options):
    theirs, ours = PAIRS[name]()
    expected = settings_of(theirs, weight_decay=0.05, **options)
    found = settings_of(ours, weight_decay=0.05, **options)
    numbered = {n: torch.full((2, 2, 2), float(i)) for i, n in enumerate(found)}
    renamed = to_timm(numbered)
    ours_by_their_name = {n: list(found.values())[int(t.flatten()[-1])] for n, t in renamed.items()}
    assert ours_by_their_name == expected
    assert len(set(expected.values())) > 1


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_weights_features_heads_and_intermediates_agree(name):
    theirs, ours = (model.eval() for model in PAIRS[name]())
    plain.randomize(theirs)
    converted = from_timm(theirs.state_dict())
    ours.load_state_dict(converted, strict=True)
    images = torch.randn(2, 3, *ours.image_size, generator=torch.Generator().manual_seed(0))
    close = {"rtol": 1e-4, "atol": 2e-5}
    features = theirs.forward_features(images)
    tokens = ours.forward_features(images)
    torch.testing.assert_close(tokens, features.flatten(1, -2), **close)
    torch.testing.assert_close(ours.forward_head(tokens), theirs(images), **close)
    expected = theirs.forward_head(features, pre_logits=True)
    torch.testing.assert_close(ours.forward_head(tokens, pre_logits=True), expected, **close)
    for indices in (None, 2, [0, 2]):
        _, theirs_maps = theirs.forward_intermediates(images, indices=indices)
        last, maps = ours.forward_intermediates(images, indices=indices)
        torch.testing.assert_close(last, tokens, **close)
        torch.testing.assert_close(maps, theirs_maps, **close)
    assert ours.num_features == theirs.num_features
    ours.reset_classifier(7, "avg")
    assert ours.get_classifier().out_features == ours.num_classes == 7
    assert ours.forward_head(tokens).shape == (2, 7)


ENCODERS = {
    "vit": lambda: ViT(**OURS),
    "swin": lambda: swin()[1],
    "convvit": lambda: ConvViT(image_size=32, dim=(8, 12, 16), depth=(1, 1, 2), heads=4),
}


def run(encoder: nn.Module, images: Tensor, mask: Mask | None) -> tuple[list[Tensor], int]:
    """Return the output and all gradients, and how many numbers were kept for backward."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    encoder.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = encoder(images, mask)
    output.square().mean().backward()
    return [output, *(p.grad for p in encoder.parameters() if p.grad is not None)], sum(kept)


@pytest.mark.parametrize("name", ENCODERS)
def test_checkpointing_keeps_less_and_changes_no_number(name):
    encoder = ENCODERS[name]()
    images = torch.randn(2, 3, *encoder.image_size)
    mask = masking.uniform(masking.key([0, 1], seed=0), encoder.grid, 0.5)
    for each in [None] if name == "swin" else [None, mask]:
        plainly, kept = run(encoder, images, each)
        plainly = [tensor.clone() for tensor in plainly]
        encoder.set_grad_checkpointing()
        again, fewer = run(encoder, images, each)
        encoder.set_grad_checkpointing(False)
        assert all(torch.equal(a, b) for a, b in zip(plainly, again, strict=True))
        assert fewer < kept
