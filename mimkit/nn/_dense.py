"""Dense prediction on feature maps: a pyramid for plain ViTs, and heads for segmentation.

Axes: batch; channels; height, width (of a feature map); classes.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._arguments import Count, DropRate, Positive, Size, checked, uses_autocast
from mimkit.nn._layers import NORM_EPS

Map = Float[Tensor, "batch _ _ _"]


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a feature map."""

    def forward(self, maps: Map) -> Map:  # noqa: D102
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


class FeaturePyramid(nn.Module):
    """Feature maps of several strides from a ViT's maps, which all have one stride.

    Args:
        dim: Channels of the ViT's maps.
        out_dim: Channels of every level, after ViTDet's two convolutions. `None` for the pyramid of
            BEiT and MAE, which keeps `dim` channels and has no such convolutions.
        scales: Size of each level relative to the ViT's maps: powers of two.

    Attributes:
        out_channels: Channels of every level.

    Raises:
        ValueError: If there are no scales, or one is not a power of two.

    Source:
        `out_dim=256`: ViTDet, arXiv:2203.16527, section 3 "simple feature pyramid"; detectron2
        `SimpleFeaturePyramid` with `norm="LN"`, without its last max-pooled level. Every
        transposed convolution halves the channels. `out_dim=None`: BEiT's segmentation,
        microsoft/unilm `beit.py` (`fpn1` to `fpn4`), which MAE and CAE share. Its SyncBN is a
        BatchNorm here: `torch.nn.SyncBatchNorm.convert_sync_batchnorm` converts it.

    Example:
        >>> pyramid = FeaturePyramid(dim=32, out_dim=16)
        >>> [tuple(level.shape) for level in pyramid(torch.randn(1, 32, 4, 6))]
        [(1, 16, 16, 24), (1, 16, 8, 12), (1, 16, 4, 6), (1, 16, 2, 3)]

        One map a level, such as the outputs of four blocks:

        >>> pyramid = FeaturePyramid(dim=32, out_dim=None, scales=(2.0, 1.0))
        >>> [tuple(level.shape) for level in pyramid([torch.randn(2, 32, 4, 6)] * 2)]
        [(2, 32, 8, 12), (2, 32, 4, 6)]
    """

    @checked
    def __init__(
        self,
        *,
        dim: Size,
        out_dim: Size | None = 256,
        scales: Sequence[Positive] = (4.0, 2.0, 1.0, 0.5),
    ) -> None:
        super().__init__()
        if not scales or any(math.frexp(scale)[0] != 0.5 for scale in scales):
            raise ValueError(
                f"scales must be powers of two, such as (4, 2, 1, 0.5); got {tuple(scales)}"
            )
        self.dim, self.scales, self.out_channels = dim, tuple(scales), out_dim or dim
        self.levels = nn.ModuleList(_pyramid_level(dim, out_dim, scale) for scale in scales)

    @checked
    def forward(self, maps: Map | Sequence[Map]) -> list[Float[Tensor, "batch channels _ _"]]:
        """Return one map per scale.

        Args:
            maps: One map for all levels, or one for each.

        Returns:
            Maps of `out_dim` channels, in the order of `scales`.

        Raises:
            ValueError: If there is another number of maps, or a map has other channels or is too
                small for its scale.
        """
        maps = [maps] * len(self.levels) if isinstance(maps, Tensor) else maps
        if len(maps) == 1:
            maps = [*maps] * len(self.levels)
        _check_maps(maps, [self.dim] * len(self.levels), self)
        for given, scale in zip(maps, self.scales, strict=True):
            if min(given.shape[2:]) * scale < 1:
                raise ValueError(
                    f"maps must have at least {round(1 / scale)} rows and columns for a scale of "
                    f"{scale}; got {tuple(given.shape)}"
                )
        return [level(given) for level, given in zip(self.levels, maps, strict=True)]


def _pyramid_level(dim: int, out_dim: int | None, scale: float) -> nn.Sequential:
    doublings = round(math.log2(scale))
    layers: list[nn.Module] = []
    for step in range(doublings):
        width = dim if out_dim is None else max(dim // 2, 1)
        if step:
            norm = nn.BatchNorm2d(dim) if out_dim is None else ChannelNorm(dim, eps=NORM_EPS)
            layers += [norm, nn.GELU()]
        layers.append(nn.ConvTranspose2d(dim, width, 2, stride=2))
        dim = width
    if doublings < 0:
        layers.append(nn.MaxPool2d(2**-doublings))
    if out_dim is not None:
        for width, kernel_size in ((dim, 1), (out_dim, 3)):
            convolution = nn.Conv2d(
                width, out_dim, kernel_size, padding=kernel_size // 2, bias=False
            )
            layers += [convolution, ChannelNorm(out_dim, eps=NORM_EPS)]
    return nn.Sequential(*layers)


class ConvNormReLU(nn.Module):
    """Convolution that keeps height and width, BatchNorm, ReLU."""

    def __init__(self, in_dim: int, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_dim, dim, kernel_size, padding=kernel_size // 2, bias=False)
        self.batch_norm = nn.BatchNorm2d(dim)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, maps: Map) -> Map:  # noqa: D102
        return F.relu(self.batch_norm(self.conv(maps)))


class UPerHead(nn.Module):
    """UPerNet's head: pyramid pooling of the coarsest map, a feature pyramid, a classifier.

    Parameter names are those of transformers' `UperNetHead`.

    Args:
        in_dims: Channels of the maps, from fine to coarse.
        num_classes: Number of classes.
        dim: Channels inside the head.
        pool_scales: Sides of the grids to which the coarsest map is pooled.
        dropout: Probability of dropping a channel before the classifier, in [0, 1).

    Raises:
        ValueError: If `in_dims` is empty.

    Source:
        Xiao et al., arXiv:1807.10221; mmsegmentation `UPerHead`, with its initialization.

    Example:
        >>> head = UPerHead(in_dims=(8, 8, 16), num_classes=5, dim=16)
        >>> maps = [torch.randn(2, 8, 16, 24), torch.randn(2, 8, 8, 12), torch.randn(2, 16, 4, 6)]
        >>> head(maps).shape
        torch.Size([2, 5, 16, 24])
    """

    @checked
    def __init__(
        self,
        *,
        in_dims: Sequence[Size],
        num_classes: Size,
        dim: Size = 512,
        pool_scales: Sequence[Size] = (1, 2, 3, 6),
        dropout: DropRate = 0.0,
    ) -> None:
        super().__init__()
        if not in_dims:
            raise ValueError("in_dims must have the channels of at least one map; got none")
        self.in_dims = tuple(in_dims)
        *fine, coarsest = in_dims
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), ConvNormReLU(coarsest, dim, 1))
            for side in pool_scales
        )
        self.bottleneck = ConvNormReLU(coarsest + len(pool_scales) * dim, dim, 3)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(width, dim, 1) for width in fine)
        self.fpn_convs = nn.ModuleList(ConvNormReLU(dim, dim, 3) for _ in fine)
        self.fpn_bottleneck = ConvNormReLU(len(in_dims) * dim, dim, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(dim, num_classes)

    @checked
    def forward(self, maps: Sequence[Map]) -> Float[Tensor, "batch classes height width"]:
        """Return logits on the grid of the finest map.

        Args:
            maps: Feature maps, from fine to coarse.

        Returns:
            Logits, one per class and position.

        Raises:
            ValueError: If there is another number of maps, or a map has other channels.
        """
        _check_maps(maps, self.in_dims, self)
        *fine, coarsest = maps
        pooled = [_resize(pool(coarsest), coarsest) for pool in self.psp_modules]
        merged = [self.bottleneck(torch.cat([coarsest, *pooled], dim=1))]
        for lateral, finer in reversed([*zip(self.lateral_convs, fine, strict=True)]):
            projected = lateral(finer)
            merged.insert(0, projected + _resize(merged[0], projected))
        levels = [conv(level) for conv, level in zip(self.fpn_convs, merged[:-1], strict=True)]
        levels.append(merged[-1])
        stacked = torch.cat([_resize(level, levels[0]) for level in levels], dim=1)
        logits: Tensor = self.classifier(self.dropout(self.fpn_bottleneck(stacked)))
        return logits


class FCNHead(nn.Module):
    """Fully convolutional head on one map, UPerNet's auxiliary head.

    Parameter names are those of transformers' `UperNetFCNHead`.

    Args:
        in_dim: Channels of the map.
        num_classes: Number of classes.
        dim: Channels inside the head.
        num_convs: 3x3 convolutions before the classifier.
        concat_input: Whether a further convolution sees the map beside their result.
        dropout: Probability of dropping a channel before the classifier, in [0, 1).

    Raises:
        ValueError: If `num_convs` is 0 and `dim` is not `in_dim`.

    Source:
        Long et al., arXiv:1411.4038; mmsegmentation `FCNHead`, with its initialization.

    Example:
        >>> FCNHead(in_dim=8, num_classes=5, dim=16)(torch.randn(2, 8, 4, 6)).shape
        torch.Size([2, 5, 4, 6])
    """

    @checked
    def __init__(
        self,
        *,
        in_dim: Size,
        num_classes: Size,
        dim: Size = 256,
        num_convs: Count = 1,
        concat_input: bool = False,
        dropout: DropRate = 0.0,
    ) -> None:
        super().__init__()
        if not num_convs and dim != in_dim:
            raise ValueError(f"num_convs=0 keeps in_dim={in_dim} channels; got dim={dim}")
        self.in_dim = in_dim
        self.convs = nn.Sequential(
            *(ConvNormReLU(dim if index else in_dim, dim, 3) for index in range(num_convs))
        )
        self.conv_cat = ConvNormReLU(in_dim + dim, dim, 3) if concat_input else None
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = _classifier(dim, num_classes)

    @checked
    def forward(
        self, maps: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch classes height width"]:
        """Return logits on the grid of the map.

        Args:
            maps: One feature map of `in_dim` channels.

        Returns:
            Logits, one per class and position.

        Raises:
            ValueError: If the map has other channels.
        """
        _check_maps([maps], [self.in_dim], self)
        hidden = self.convs(maps)
        if self.conv_cat is not None:
            hidden = self.conv_cat(torch.cat([maps, hidden], dim=1))
        logits: Tensor = self.classifier(self.dropout(hidden))
        return logits


def _classifier(dim: int, num_classes: int) -> nn.Conv2d:
    classifier = nn.Conv2d(dim, num_classes, 1)
    nn.init.normal_(classifier.weight, std=0.01)
    assert classifier.bias is not None
    nn.init.zeros_(classifier.bias)
    return classifier


def _resize(maps: Map, like: Map) -> Map:
    return F.interpolate(maps, size=like.shape[2:], mode="bilinear", align_corners=False)


def _check_maps(maps: Sequence[Tensor], channels: Sequence[int], module: nn.Module) -> None:
    """Check the number of feature maps, and their channels, batch size, dtype and device."""
    shapes = [tuple(given.shape) for given in maps]
    fits = [len(shape) == 4 and min(shape[2:]) > 0 for shape in shapes] == [True] * len(channels)
    if not fits or [shape[1] for shape in shapes] != list(channels):
        wanted = ", ".join(f"[batch, {width}, height, width]" for width in channels)
        raise ValueError(f"maps must be {wanted}; got {shapes}")
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(f"maps must have one batch size; got {shapes}")
    weight = next(module.parameters(), maps[0])
    for given in maps:
        if given.dtype != weight.dtype and not (given.is_floating_point() and uses_autocast(given)):
            raise TypeError(f"maps must be {weight.dtype}, as the weights; got {given.dtype}")
        if given.device != weight.device:
            raise ValueError(f"maps must be on {weight.device}, as the weights; got {given.device}")
