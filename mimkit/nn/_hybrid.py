"""Hybrid patch embedding: patches of a CNN's feature map instead of pixels.

Axes: batch; channels; height, width (pixels); tokens; dim.
"""

from collections.abc import Sequence
from typing import Any

from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from mimkit._arguments import Size, checked
from mimkit._checks import check_stacked
from mimkit._grids import Grid, per_axis
from mimkit.masking import Mask, RaggedMask
from mimkit.nn._embed import Images, PatchEmbed


class ConvStem(nn.Sequential):
    """Small convolutional stem: strided convolutions, each with GroupNorm and ReLU.

    Args:
        in_channels: Channels of the images.
        channels: Output channels of each convolution; each has stride 2.

    Attributes:
        out_channels: Channels of the feature map.
        stride: Total stride: pixels per axis of one feature-map position.

    Raises:
        ValueError: If `channels` is empty.

    Source:
        mimkit's own, a small stem for the "Hybrid Architecture" of Dosovitskiy et al.,
        arXiv:2010.11929, section 3.1, which has a ResNet there.

    Example:
        >>> import torch
        >>> ConvStem(in_channels=3, channels=(16, 32))(torch.rand(1, 3, 16, 24)).shape
        torch.Size([1, 32, 4, 6])
    """

    @checked
    def __init__(self, *, in_channels: Size, channels: Sequence[Size]) -> None:
        if not len(channels):
            raise ValueError("channels must have at least one entry, one per convolution; got none")
        layers: list[nn.Module] = []
        for before, after in zip((in_channels, *channels), channels, strict=False):
            convolution = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
            layers += [convolution, nn.GroupNorm(1, after), nn.ReLU()]
        super().__init__(*layers)
        self.out_channels = channels[-1]
        self.stride = 2 ** len(channels)


class HybridEmbed(PatchEmbed):
    """Patch embedding of a stem's feature map.

    Args:
        stem: Module from images to feature maps, with attributes `out_channels` and `stride`.
        patch_size: Feature-map positions per patch, per axis.
        dim: Width of a token.

    Attributes:
        patch_size: Pixels per patch, per axis.

    Source:
        Dosovitskiy et al., arXiv:2010.11929, section 3.1 "Hybrid Architecture" (a ResNet, patches
        of 1x1). With a mask, masked pixels are set to 0 before the stem: its filters overlap, and
        would otherwise leak masked pixels into visible tokens.
    """

    def __init__(self, *, stem: Any, patch_size: Grid, dim: int) -> None:
        super().__init__(patch_size=patch_size, in_channels=stem.out_channels, dim=dim)
        self.stem = stem
        self.patch_on_map = self.patch_size
        stride = per_axis("stride", stem.stride, len(patch_size))
        self.patch_size = tuple(s * p for s, p in zip(stride, patch_size, strict=True))

    def forward(
        self,
        images: Images,
        mask: Mask | RaggedMask | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Embed the visible patches in ascending order of position, or all without a mask.

        Raises:
            TypeError: If the mask is a `RaggedMask`.
        """
        if isinstance(mask, RaggedMask):
            raise TypeError("an encoder with a stem takes a Mask; got a RaggedMask")
        images = self._as_inputs(check_stacked(images))
        if mask is not None:
            down, across = self.patch_size
            hidden = repeat(mask.is_masked, "b h w -> b 1 (h i) (w j)", i=down, j=across)
            images = images.masked_fill(hidden, 0.0)
        return self._embed(self.stem(images), mask, self.patch_on_map)
