"""Feature maps of encoders, for dense prediction.

Axes: batch; channels; *spatial; tokens (of the grid); dim (channels of a map); *grid.
"""

from abc import abstractmethod
from collections.abc import Iterator, Sequence

from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mimkit._arguments import checked
from mimkit._grids import Grid, as_sizes, divide


class FeatureMaps(nn.Module):
    """An encoder that gives the feature maps of its layers.

    Attributes:
        dim: Width of an output token.
    """

    _last_norm = "norm"

    dim: int

    @property
    @abstractmethod
    def feature_channels(self) -> tuple[int, ...]:
        """Channels of every layer that `features` can return."""

    @checked
    def features(
        self,
        images: Shaped[Tensor, "batch channels *spatial"],
        layers: Sequence[int] | None = None,
        *,
        norm: bool = False,
    ) -> list[Float[Tensor, "batch dim *grid"]]:
        """Return feature maps of chosen layers, for dense prediction.

        Layers are numbered from 0, or from the last one backwards with negative numbers.
        `feature_channels` has the channels of each layer. In a ViT, the layers are the blocks. In
        `ConvViT` and `ConvViTDetector`, they are the first stage, the second stage, then the blocks
        of the last stage. In `SwinTransformer`, they are the stages, before patch merging.

        Args:
            images: Images of any size that is divisible into patches. Position embeddings are
                resampled to their grid with bicubic interpolation, relative position tables with
                `patches.interpolate_relative_positions`.
            layers: Layers to return, in this order. `None` for the last block of a ViT, for the
                last layer of each stage of the others.
            norm: Whether to apply the encoder's last norm to maps that have its width.

        Returns:
            One map per chosen layer, on the grid of that layer.

        Raises:
            ValueError: If the images have a size that does not fit or other channels, or if a layer
                does not exist.

        Example:
            >>> import torch
            >>> from mimkit import nn
            >>> encoder = nn.ViT(image_size=(16, 24), patch_size=8, dim=32, depth=2, heads=4)
            >>> maps = encoder.features(torch.rand(1, 3, 32, 24), layers=(0, -1))
            >>> [tuple(map.shape) for map in maps]
            [(1, 32, 4, 3), (1, 32, 4, 3)]
        """
        chosen = self._choose_layers(layers)
        maps: dict[int, Tensor] = {}
        for layer, (tokens, grid) in enumerate(self._layer_outputs(images)):
            if layer in chosen:
                if norm and self.feature_channels[layer] == self.dim:
                    tokens = self.get_submodule(self._last_norm)(tokens)
                maps[layer] = tokens.mT.unflatten(2, grid).contiguous()
            if layer == max(chosen):
                break
        return [maps[layer] for layer in chosen]

    def _choose_layers(self, layers: Sequence[int] | None) -> list[int]:
        count = len(self.feature_channels)
        chosen = self._default_layers() if layers is None else layers
        if not chosen or any(not -count <= layer < count for layer in chosen):
            raise ValueError(
                f"layers must be among the {count} layers of this encoder, from {-count} to "
                f"{count - 1}; got {layers}"
            )
        return [layer % count for layer in chosen]

    def _grid_for(self, images: Tensor, patch_size: Sequence[int]) -> Grid:
        """Return the grid of images of any size."""
        if images.ndim != 2 + len(patch_size):
            raise ValueError(
                f"images must have {len(patch_size)} axes after batch and channels; got shape "
                f"{tuple(images.shape)}"
            )
        sizes = as_sizes("image size", tuple(images.shape[2:]))
        return divide("image size", sizes, tuple(patch_size), "patch size")

    def _default_layers(self) -> Sequence[int]:
        return (-1,)

    @abstractmethod
    def _layer_outputs(self, images: Tensor) -> Iterator[tuple[Tensor, Grid]]:
        """Give the patch tokens of one layer after the other, with their grid."""
