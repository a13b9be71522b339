"""Images, patches and tokens: patchify, gather and restore, positions, packed cells."""

from mimkit.patches._cells import neighbors, pack_cells, unpack_cells
from mimkit.patches._patchify import gather_patches, grid_of, patchify, unpatchify
from mimkit.patches._positions import interpolate_positions, sincos_positions
from mimkit.patches._relative import interpolate_relative_positions
from mimkit.patches._tokens import gather_masked, gather_visible, restore

__all__ = [
    "gather_masked",
    "gather_patches",
    "gather_visible",
    "grid_of",
    "interpolate_positions",
    "interpolate_relative_positions",
    "neighbors",
    "pack_cells",
    "patchify",
    "restore",
    "sincos_positions",
    "unpack_cells",
    "unpatchify",
]
