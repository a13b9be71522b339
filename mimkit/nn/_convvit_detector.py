"""ConvMAE's encoder as a detection backbone: window and global attention, four feature maps.

Axes: batch; channels; height, width; windows; tokens (of the grid, or of a window); dim; heads.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from mimkit._arguments import Depth, DropRate, Ratio, Size, checked
from mimkit._grids import Grid, per_axis
from mimkit.masking import Mask
from mimkit.nn._convvit import ConvViT
from mimkit.nn._relative import RelativePositionBias
from mimkit.nn._windows import Windows


class ConvViTDetector(ConvViT):
    """ConvMAE's encoder with windowed attention, as the backbone of a detector.

    Args:
        image_size: Pixels per axis: an integer means a square image, a tuple height and width.
        window: Tokens per axis of an attention window. A grid that it does not divide is padded
            with zeros, which the tokens of a window attend to, as in detectron2.
        global_layers: Indices of the last stage's blocks with global instead of window attention.
        patch_sizes: Stride of each of the three stages, as in `ConvViT`.
        in_channels: Channels of the images.
        dim: Width of each stage.
        depth: Number of blocks of each stage.
        heads: Attention heads of the last stage.
        mlp_ratio: Ratio of MLP hidden width to width, for each stage.
        kernel_size: Kernel size of the depth-wise convolutions; odd.
        drop_path: Stochastic depth rate of the last block, in [0, 1), as in `ConvViT`.

    Raises:
        ValueError: If `global_layers` has an index that the last stage has not; also what `ConvViT`
            raises.

    Source:
        ConvMAE, arXiv:2205.03892, section 3.4 "object detection"; Alpha-VL/ConvMAE `ConvViTDet`.
        All window layers share one relative position table, all global layers another. There is no
        last norm; the fourth feature map is the third one, max-pooled. The position table is
        frozen. Drop path draws for each window, as there.

    Example:
        >>> import torch
        >>> backbone = ConvViTDetector(image_size=(64, 128), window=2, global_layers=(1,),
        ...                            dim=(8, 16, 32), depth=(1, 1, 2), heads=4)
        >>> [tuple(level.shape) for level in backbone(torch.rand(1, 3, 64, 128))]
        [(1, 8, 16, 32), (1, 16, 8, 16), (1, 32, 4, 8), (1, 32, 2, 4)]
    """

    @checked
    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 1024,
        window: int | Sequence[int] = 16,
        global_layers: Sequence[int] = (0, 3, 6, 10),
        patch_sizes: Sequence[int | Sequence[int]] = (4, 2, 2),
        in_channels: Size = 3,
        dim: Sequence[Size] = (256, 384, 768),
        depth: Sequence[Depth] = (2, 2, 11),
        heads: Size = 12,
        mlp_ratio: Sequence[Ratio] = (4.0, 4.0, 4.0),
        kernel_size: Size = 5,
        drop_path: DropRate = 0.0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            patch_sizes=patch_sizes,
            in_channels=in_channels,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            kernel_size=kernel_size,
            drop_path=drop_path,
        )
        if any(not 0 <= layer < depth[-1] for layer in global_layers):
            raise ValueError(
                f"global_layers must be in [0, {depth[-1]}), the blocks of the last stage; "
                f"got {tuple(global_layers)}"
            )
        self.norm = nn.Identity()
        self.window = per_axis("window", window, 2)
        self.global_layers = frozenset(global_layers)
        self.window_bias = RelativePositionBias(grid=self.window, heads=heads)
        self.global_bias = RelativePositionBias(grid=self.grid, heads=heads)

    @checked
    def forward(  # type: ignore[override]
        self, images: Shaped[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch dim rows columns"], ...]:
        """Return the feature maps E1 to E4, from fine to coarse.

        Args:
            images: Images of any size that is divisible into patches.

        Returns:
            Four maps at 1/4, 1/8, 1/16 and 1/32 of the images with the default patch sizes.

        Raises:
            ValueError: If the images are not divisible into patches, are smaller than two patches,
                or have another number of channels.
        """
        if any(
            side < 2 * stride
            for side, stride in zip(images.shape[2:], self.patch_size, strict=True)
        ):
            raise ValueError(
                f"images must have at least {tuple(2 * stride for stride in self.patch_size)} "
                f"pixels, for the fourth map; got {tuple(images.shape)}"
            )
        *levels, coarsest = self.features(images)
        return (*levels, coarsest, F.max_pool2d(coarsest, 2))

    def _attention(self, mask: Mask | None, grid: Grid) -> list[tuple[nn.Module, dict[str, Any]]]:
        windows = Windows(grid, self.window, drop_alone=True)
        inside = {"attn_bias": self.window_bias(), "windows": windows}
        everywhere = {"attn_bias": self.global_bias(grid=grid)} if self.global_layers else {}
        return [
            (block, everywhere if index in self.global_layers else inside)
            for index, block in enumerate(self.blocks)
        ]
