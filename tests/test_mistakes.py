"""Common mistakes of a caller raise an error with one clear sentence that repeats the argument."""

import math
import re

import numpy as np
import pytest
import torch

from mimkit import conv, interop, losses, masking, nn, patches, targets
from mimkit.masking import Mask, compat
from recipes.cae import CAEConfig
from recipes.convmae import ConvMAE, ConvMAEConfig, ConvMAEMasking
from recipes.mae import MAE, MAEConfig
from recipes.simmim import SimMIMConfig

pytestmark = pytest.mark.untyped  # shapes and types are wrong on purpose

KEY = masking.key([0, 1], seed=0)
MASK = masking.uniform(KEY, (2, 2), 0.5)
IMAGES = torch.rand(2, 3, 8, 8)
BOOLS = MASK.is_masked
VIT = {"image_size": 8, "patch_size": 4, "dim": 8, "depth": 1, "heads": 2}
TINY = MAEConfig(**VIT, decoder_dim=8, decoder_depth=1, decoder_heads=2)
CLASSES = torch.zeros(2, 2, dtype=torch.int64)

MISTAKES = {
    # A tensor instead of a Mask, as in other libraries.
    "gather": (
        lambda: patches.gather_visible(IMAGES[:, 0], BOOLS),
        TypeError,
        "mask must be a Mask",
    ),
    "loss": (lambda: losses.masked_mse(CLASSES, CLASSES, BOOLS), TypeError, "torch.bool"),
    "target": (lambda: targets.Pixels(4)(IMAGES, BOOLS), TypeError, "mask must be a Mask"),
    "encoder": (lambda: nn.ViT(**VIT)(IMAGES, BOOLS), TypeError, "mask must be a Mask"),
    "model": (lambda: MAE(TINY)(IMAGES, BOOLS), TypeError, "shape (2, 2, 2)"),
    "no mask": (lambda: MAE(TINY)(IMAGES, None), TypeError, "NoneType None"),
    "array": (
        lambda: patches.gather_patches(np.zeros(3), MASK, 4),
        TypeError,
        "ndarray",
    ),
    # Ids instead of a Key.
    "uniform": (lambda: masking.uniform(torch.arange(2), (2, 2), 0.5), TypeError, "masking.key("),
    "gridwise": (lambda: masking.gridwise(torch.arange(2), (2, 2)), TypeError, "masking.key("),
    "one id": (lambda: masking.key(3, seed=0), TypeError, "got 3"),
    "view": (lambda: KEY.view(1.5), TypeError, "view must be an integer; got 1.5"),
    "batch": (lambda: masking.fresh_key(1.5), TypeError, "batch_size must be an integer; got 1.5"),
    # Masks.
    "ratio for count": (
        lambda: Mask.from_noise(torch.rand(1, 4), (2, 2), 0.75),
        TypeError,
        "num_masked must be an integer; got 0.75",
    ),
    "float boxes": (
        lambda: Mask.from_boxes(torch.tensor([[[0, 0, 1.5, 2]]]), (2, 2)),
        TypeError,
        "boxes must be integers; got torch.float32",
    ),
    "list": (lambda: Mask.from_bool([[True, False]]), TypeError, "[[True, False]]"),
    "units": (
        lambda: masking.uniform(KEY, (4, 4), num_masked=20, unit=2),
        ValueError,
        "num_masked must be in [0, 16]; got 20",
    ),
    "axes": (lambda: masking.tube(KEY, (2, 2), 0.5, shared_axes=0.5), TypeError, "got 0.5"),
    "aspect": (lambda: masking.blockwise(KEY, (4, 4), 0.5, aspect=0.3), ValueError, "got 0.3"),
    "extreme aspect": (
        lambda: masking.blockwise(KEY, (4, 4), 0.5, aspect=(1e-30, 1e30)),
        ValueError,
        "aspect must be two numbers from 1/65536 to 65536",
    ),
    "block": (lambda: masking.blockwise(KEY, (4, 4), 0.5, min_block=1.5), TypeError, "got 1.5"),
    "compat aspect": (
        lambda: compat.beit(KEY, (4, 4), 0.5, aspect=(0, 2)),
        ValueError,
        "got (0, 2)",
    ),
    "num_targets": (lambda: compat.ijepa(KEY, (9, 9), num_targets=0), ValueError, "got 0"),
    # Values that would silently be counted, scaled or broadcast.
    "int images": (
        lambda: losses.masked_pixel_loss(torch.zeros(2, 2, 48), IMAGES.int(), MASK, 4),
        TypeError,
        "images must be floats or uint8; got torch.int32",
    ),
    "ignored class": (
        lambda: losses.masked_cross_entropy(torch.zeros(2, 2, 5), CLASSES - 100, MASK),
        ValueError,
        "classes must be in [0, 5); got -100 to -100",
    ),
    "float classes": (
        lambda: losses.masked_cross_entropy(torch.zeros(2, 2, 5), CLASSES.float(), MASK),
        TypeError,
        "classes must be integers; got torch.float32",
    ),
    "no features": (
        lambda: losses.masked_cosine(torch.zeros(2, 2), torch.zeros(2, 2), MASK),
        ValueError,
        "got (2, 2)",
    ),
    "broadcast": (
        lambda: targets.NormalizedPixels(4).invert(torch.zeros(2, 2, 1), IMAGES, MASK),
        ValueError,
        "values must be (2, 2, 48)",
    ),
    "channels": (
        lambda: targets.ColorClusters(4, 2).fit(IMAGES)(torch.rand(2, 6, 8, 8), MASK),
        ValueError,
        "3 channels; got images (2, 6, 8, 8)",
    ),
    "one patch": (
        lambda: targets.PCATarget(8, 1).fit(IMAGES[:1]),
        ValueError,
        "needs at least 2 patches; got 1",
    ),
    "temperature": (
        lambda: patches.sincos_positions(8, (2, 2), temperature=0),
        ValueError,
        "got 0",
    ),
    # Modules.
    "bias": (lambda: nn.TransformerBlock(dim=8, heads=2, qkv_bias="no"), ValueError, "got 'no'"),
    "depth": (lambda: nn.ViT(**(VIT | {"depth": -1})), ValueError, "got -1"),
    "stages": (lambda: nn.SwinTransformer(depth=2), ValueError, "one number per stage; got 2"),
    "empty pool": (
        lambda: nn.ViT(**VIT).pool(torch.zeros(2, 1, 8)),
        ValueError,
        "mean pooling needs a patch token: the mask hides all of them",
    ),
    "accuracy": (
        lambda: nn.TokenHead(dim=8, vocabulary_size=4)(torch.zeros(1, 2, 8), return_accuracy=True),
        ValueError,
        "needs a target",
    ),
    "path for weights": (lambda: interop.from_official("mae", "mae.pth"), TypeError, "'mae.pth'"),
    # Configurations: an unknown name must not train a default model.
    "conv": (lambda: ConvMAEConfig(32, conv="x"), ValueError, "conv must be one of"),
    "decoder": (lambda: ConvMAEConfig(32, decoder="x"), ValueError, "got 'x'"),
    "masks": (lambda: ConvMAEMasking(mask="x"), ValueError, "mask must be one of"),
    "loss on": (lambda: MAEConfig(32, loss_on="x"), ValueError, "loss_on must be one of"),
    "cae": (lambda: CAEConfig(32, target="x"), ValueError, "target must be one of"),
    "simmim": (lambda: SimMIMConfig(32, head="x"), ValueError, "head must be one of"),
    "convmae dim": (
        lambda: ConvMAE(ConvMAEConfig(32, dim=(8, 8)))(IMAGES, MASK),
        ValueError,
        "(8, 8)",
    ),
    "packed kernel": (
        lambda: conv.packed_depthwise_conv2d(
            torch.zeros(2, 2, 1, 3), torch.zeros(3, 1, 2, 2), None, patches.neighbors(MASK), cell=1
        ),
        ValueError,
        "got (2, 2)",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_raises_one_clear_sentence(mistake):
    call, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)


def test_numpy_integers_are_accepted():
    count = np.int64(2)
    assert masking.uniform(KEY, (2, 2), num_masked=count).num_masked == 2
    assert len(masking.complementary(KEY, (2, 2), np.int64(4))) == 4


def test_uint8_images_equal_floats_divided_by_255():
    pixels = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    fractions = pixels / 255
    tokenizer = nn.DiscreteVAE(vocabulary_size=8, dim=4, depth=1, groups=2).eval()
    functions = [
        nn.ViT(**VIT),
        nn.SwinTransformer(image_size=8, patch_size=4, dim=8, depth=(1,), heads=(2,), window=2),
        nn.ConvViT(image_size=8, patch_sizes=(2, 2, 1), dim=(4, 4, 8), depth=(1, 1, 1), heads=2),
        tokenizer.encode,
        lambda images: targets.WindowNormalizedPixels(4, window=3)(images, MASK),
        lambda images: targets.HOG(4, 4)(images, MASK),
    ]
    for function in functions:
        torch.testing.assert_close(function(pixels), function(fractions))


def test_a_block_without_biases_has_none():
    block = nn.TransformerBlock(dim=8, heads=2, qkv_bias=False)
    assert "attn.qkv.bias" not in dict(block.named_parameters())
    assert block(torch.randn(1, 3, 8)).shape == (1, 3, 8)


def test_values_outside_the_bins_fall_into_the_first_or_last_bin():
    row = torch.tensor([-math.inf, -1e20, 1e20, math.inf]).view(1, 1, 1, 4)
    mask = Mask.from_bool(torch.tensor([[[True]]]))
    assert targets.ChannelBins((1, 4), 8)(row, mask).flatten().tolist() == [0, 0, 7, 7]


def test_an_integer_patch_size_means_a_square_patch():
    assert nn.PixelHead(dim=8, patch_size=8, in_channels=3).out_features == 192
    assert nn.PatchEmbed(patch_size=4, in_channels=3, dim=8)(IMAGES).shape == (2, 4, 8)
