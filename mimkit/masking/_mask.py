"""`Mask`: which tokens of a batch are masked.

Axes: batch; tokens (of the whole grid, row-major, prefix tokens excluded); visible; masked.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from mimkit._arguments import Count, checked
from mimkit._containers import container, static
from mimkit._grids import Grid, as_integer, as_sizes, count_tokens, divide, per_axis
from mimkit._settings import can_read_values
from mimkit_kernels import split_positions


@checked
@container
class Mask:
    """Which tokens of every sample the encoder sees (visible) and which it does not (masked).

    Every sample of a batch has the same number of masked tokens, so batches are rectangular. A mask
    is a pytree of tensors: `torch.compile`, DDP and `DataLoader` accept it. Make one with a sampler
    or with `Mask.from_*`. The constructor checks shapes, dtypes and devices; the ids themselves are
    checked by `validate`, and with `mimkit.use(check=True)` in every operation.

    Attributes:
        visible_ids: Row-major positions that the encoder sees, ascending in every row.
        masked_ids: The other positions, ascending in every row.
        grid: Tokens per axis, one to three axes.

    Source:
        mimkit's own. The authors' codes pass tensors of 0 and 1, where 1 is a masked token in MAE
        and BEiT, and a visible one in Hiera and SparK.

    Example:
        >>> mask = Mask.from_bool(torch.tensor([[[False, True], [True, True]]]))
        >>> mask
        Mask(batch_size=1, grid=(2, 2), num_visible=1, num_masked=3, device='cpu')
        >>> mask.visible_ids, mask.masked_ids
        (tensor([[0]]), tensor([[1, 2, 3]]))
    """

    visible_ids: Int64[Tensor, "batch visible"]
    masked_ids: Int64[Tensor, "batch masked"]
    grid: Grid = static()

    @classmethod
    @checked
    def from_bool(
        cls, is_masked: Bool[Tensor, "batch *grid"], *, num_masked: int | None = None
    ) -> "Mask":
        """Make a mask from booleans, True = masked.

        Args:
            is_masked: One boolean per grid position.
            num_masked: Masked tokens per sample, if known. If `None` they are counted, which
                synchronises a GPU and is not possible in a compiled graph.

        Returns:
            A mask of the given grid, on the same device.

        Raises:
            TypeError: If it is not boolean.
            ValueError: If samples have different numbers of masked tokens; the message names the
                first sample that differs.

        Example:
            >>> Mask.from_bool(torch.tensor([[[False, True], [True, True]]])).masked_ids
            tensor([[1, 2, 3]])
            >>> Mask.from_bool(torch.tensor([[False, True], [True, True]]))
            Traceback (most recent call last):
            ValueError: ... the same number of tokens, 1 of 2, but sample 1 masks 2
        """
        _check_tensor("is_masked", is_masked)
        if is_masked.dtype != torch.bool:
            raise TypeError(f"is_masked must be boolean (True = masked); got {is_masked.dtype}")
        grid = as_sizes("the grid of is_masked", tuple(is_masked.shape[1:]))
        flat = is_masked.flatten(1)
        if num_masked is None and flat.is_meta:
            raise ValueError("is_masked must hold values to count; got a tensor on the meta device")
        if num_masked is None or can_read_values(flat):
            counts = flat.sum(dim=1).tolist()
            expected = num_masked if num_masked is not None else counts[0] if counts else 0
            other = next((row for row, count in enumerate(counts) if count != expected), None)
            if other is not None:
                raise ValueError(
                    "every sample of is_masked must mask the same number of tokens, "
                    f"{expected} of {flat.shape[1]}, but sample {other} masks {counts[other]}"
                )
            num_masked = expected
        return cls._from_flat(flat, grid, num_masked)

    @classmethod
    @checked
    def from_noise(
        cls, noise: Float[Tensor, "batch tokens"], grid: Sequence[int], num_masked: int
    ) -> "Mask":
        """Keep the tokens with the lowest noise visible; of equal values, the lower index.

        Args:
            noise: One number per token, such as `torch.rand(batch, tokens)`; not NaN.
            grid: Tokens per axis.
            num_masked: Masked tokens per sample, in [0, tokens].

        Returns:
            A mask on the device of the noise.

        Raises:
            TypeError: If the count is not an integer.
            ValueError: If the shape is not [batch, tokens of the grid], the count is outside [0,
                tokens], or (on a CPU) the noise contains NaN.

        Source:
            MAE, arXiv:2111.06377; facebookresearch/mae `random_masking`, which sorts unstably and
            keeps the visible tokens in the order of their noise; here ids are ascending.

        Example:
            >>> noise = torch.tensor([[0.9, 0.1, 0.5, 0.3]])
            >>> Mask.from_noise(noise, (2, 2), num_masked=2).visible_ids
            tensor([[1, 3]])
        """
        _check_tensor("noise", noise)
        grid, num_masked = as_sizes("grid", grid), as_integer("num_masked", num_masked)
        num_tokens = count_tokens(grid)
        if noise.ndim != 2 or noise.shape[1] != num_tokens:
            raise ValueError(
                f"noise must be [batch, {num_tokens}] for grid {grid}; got {tuple(noise.shape)}"
            )
        if not 0 <= num_masked <= num_tokens:
            raise ValueError(f"num_masked must be in [0, {num_tokens}]; got {num_masked}")
        if can_read_values(noise) and bool(noise.isnan().any()):
            raise ValueError("noise must not contain NaN, which cannot be sorted")
        lowest = noise.argsort(dim=1, stable=True)[:, : num_tokens - num_masked]
        is_masked = torch.ones_like(noise, dtype=torch.bool).scatter(1, lowest, False)
        return cls._from_flat(is_masked, grid, num_masked)

    @classmethod
    @checked
    def from_visible_ids(cls, ids: Int[Tensor, "batch visible"], grid: Sequence[int]) -> "Mask":
        """Make a mask from the row-major positions that stay visible, in any order.

        Args:
            ids: Row-major positions in [0, tokens), without repetition in a row.
            grid: Tokens per axis.

        Returns:
            A mask on the device of the ids, which are ascending in it.

        Raises:
            TypeError: If the ids are not integers.
            ValueError: If the ids are not [batch, visible], or (on a CPU) are out of range or
                repeated.

        Example:
            >>> Mask.from_visible_ids(torch.tensor([[3, 0]]), (2, 2)).visible_ids
            tensor([[0, 3]])
        """
        _check_integers("ids", ids)
        grid = as_sizes("grid", grid)
        num_tokens = count_tokens(grid)
        if ids.ndim != 2 or ids.shape[1] > num_tokens:
            raise ValueError(
                f"ids must be [batch, visible] with at most {num_tokens} visible tokens for grid "
                f"{grid}; got shape {tuple(ids.shape)}"
            )
        ids = ids.long()
        low, high = (
            (int(ids.min()), int(ids.max())) if ids.numel() and can_read_values(ids) else (0, 0)
        )
        if low < 0 or high >= num_tokens:
            raise ValueError(
                f"ids must be in [0, {num_tokens}) for grid {grid}; got {low} to {high}"
            )
        is_masked = torch.ones(ids.shape[0], num_tokens, dtype=torch.bool, device=ids.device)
        is_masked = is_masked.scatter(1, ids, False)
        num_masked = num_tokens - ids.shape[1]
        counts = is_masked.sum(dim=1)
        if can_read_values(ids) and not bool((counts == num_masked).all()):
            row = int((counts != num_masked).nonzero()[0])
            raise ValueError(f"ids of a sample must differ; sample {row} has {ids[row].tolist()}")
        return cls._from_flat(is_masked, grid, num_masked)

    @classmethod
    @checked
    def from_boxes(
        cls,
        boxes: Int[Tensor, "batch boxes bounds"],
        grid: Sequence[int],
        *,
        num_masked: int | None = None,
    ) -> "Mask":
        """Mask the union of axis-aligned boxes.

        Args:
            boxes: Per box, the start on every axis, then the end (exclusive) on every axis, in
                tokens: (top, left, bottom, right) on two axes.
            grid: Tokens per axis.
            num_masked: Masked tokens per sample, if known (see `from_bool`).

        Returns:
            A mask on the device of the boxes.

        Raises:
            TypeError: If the bounds are not integers.
            ValueError: If the bounds do not fit the grid, or samples have different counts.

        Example:
            >>> boxes = torch.tensor([[[0, 0, 1, 2]], [[1, 0, 2, 2]]])
            >>> Mask.from_boxes(boxes, (2, 2)).masked_ids
            tensor([[0, 1],
                    [2, 3]])
        """
        _check_integers("boxes", boxes)
        grid = as_sizes("grid", grid)
        axes = len(grid)
        if boxes.ndim != 3 or boxes.shape[2] != 2 * axes:
            raise ValueError(
                f"boxes must be [batch, boxes, {2 * axes}] for grid {grid}; "
                f"got {tuple(boxes.shape)}"
            )
        if num_masked is None and boxes.is_meta:
            raise ValueError("boxes must hold values to count; got a tensor on the meta device")
        start, stop = boxes[..., :axes], boxes[..., axes:]
        if can_read_values(boxes):
            limit = torch.tensor(grid, device=boxes.device)
            wrong = ((start < 0) | (stop < start) | (stop > limit)).any(dim=2)
            if bool(wrong.any()):
                row, box = wrong.nonzero()[0].tolist()
                raise ValueError(
                    f"box {boxes[row, box].tolist()} of sample {row} does not fit grid {grid}"
                )
        inside = torch.ones(*boxes.shape[:2], *grid, dtype=torch.bool, device=boxes.device)
        for axis, size in enumerate(grid):
            position = torch.arange(size, device=boxes.device)
            on_axis = (position >= start[..., axis, None]) & (position < stop[..., axis, None])
            inside = inside & on_axis.view(*boxes.shape[:2], *_only_axis(size, axis, axes))
        return cls.from_bool(inside.any(dim=1), num_masked=num_masked)

    @classmethod
    @checked
    def cat(cls, masks: Sequence["Mask"]) -> "Mask":
        """Concatenate masks of one grid and one count along the batch.

        Args:
            masks: At least one mask; all on one device.

        Returns:
            A mask with the samples of all, in order.

        Raises:
            ValueError: If there are no masks, or their grids or counts differ.

        Example:
            >>> mask = Mask.from_bool(torch.tensor([[True, False]]))
            >>> Mask.cat([mask, ~mask]).is_masked
            tensor([[ True, False],
                    [False,  True]])
        """
        if not masks:
            raise ValueError("Mask.cat needs at least one mask")
        kinds = {(mask.grid, mask.num_masked) for mask in masks}
        if len(kinds) > 1:
            raise ValueError(f"masks must share grid and number of masked tokens; got {kinds}")
        return cls(
            torch.cat([mask.visible_ids for mask in masks]),
            torch.cat([mask.masked_ids for mask in masks]),
            masks[0].grid,
        )

    @classmethod
    def _from_flat(
        cls, is_masked: Bool[Tensor, "batch tokens"], grid: Grid, num_masked: int
    ) -> "Mask":
        """Make a mask from booleans that are known to mask `num_masked` tokens per sample."""
        num_visible = count_tokens(grid) - num_masked
        return cls(*split_positions(is_masked, num_visible), grid)

    @property
    def batch_size(self) -> int:
        """Number of samples."""
        return self.visible_ids.shape[0]

    @property
    def num_visible(self) -> int:
        """Visible tokens per sample."""
        return self.visible_ids.shape[1]

    @property
    def num_masked(self) -> int:
        """Masked tokens per sample."""
        return self.masked_ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """Positions of the grid."""
        return count_tokens(self.grid)

    @property
    def device(self) -> torch.device:
        """Device of the ids."""
        return self.visible_ids.device

    @property
    def is_masked(self) -> Bool[Tensor, "batch *grid"]:
        """One boolean per grid position, True = masked."""
        flat = torch.zeros(self.batch_size, self.num_tokens, dtype=torch.bool, device=self.device)
        return flat.scatter(1, self.masked_ids, True).view(self.batch_size, *self.grid)

    @property
    def restore_ids(self) -> Int64[Tensor, "batch tokens"]:
        """Index of each grid position among the visible tokens followed by the masked ones.

        `torch.cat([visible, masked], 1)` indexed by it along axis 1 is in grid order.
        """
        order = torch.cat([self.visible_ids, self.masked_ids], dim=1)
        slots = torch.arange(self.num_tokens, device=self.device).expand_as(order)
        return torch.empty_like(order).scatter(1, order, slots)

    @checked
    def refine(self, k: int | Sequence[int]) -> "Mask":
        """Split every token into `k` tokens per axis, which are masked if the token is.

        Args:
            k: Parts per axis, at least 1: one integer, or one per axis.

        Returns:
            A mask whose grid is `k` times as fine.

        Example:
            >>> Mask.from_bool(torch.tensor([[True, False]])).refine(2).is_masked
            tensor([[ True,  True, False, False]])
        """
        factors = per_axis("k", k, len(self.grid))
        names = "abc"[: len(factors)]
        split = " ".join(f"({axis} {axis}1)" for axis in names)
        sizes = {f"{axis}1": factor for axis, factor in zip(names, factors, strict=True)}
        fine = repeat(self.is_masked, f"n {' '.join(names)} -> n {split}", **sizes)
        num_masked = self.num_masked * count_tokens(factors)
        return Mask._from_flat(fine.flatten(1), tuple(fine.shape[1:]), num_masked)

    @checked
    def coarsen(self, k: int | Sequence[int]) -> "Mask":
        """Undo `refine(k)`.

        Args:
            k: Tokens per axis to merge, at least 1: one integer, or one per axis.

        Returns:
            A mask whose grid is `k` times as coarse.

        Raises:
            ValueError: If `k` does not divide the grid, or (on a CPU) a cell is partly masked.

        Example:
            >>> mask = Mask.from_bool(torch.tensor([[True, False]]))
            >>> mask.refine(3).coarsen(3).equal(mask)
            True
        """
        factors = per_axis("k", k, len(self.grid))
        coarse_grid = divide("grid", self.grid, factors, "k")
        names = "abc"[: len(factors)]
        split = " ".join(f"({axis} {axis}1)" for axis in names)
        merged = f"n {' '.join(names)} ({' '.join(f'{axis}1' for axis in names)})"
        sizes = {f"{axis}1": factor for axis, factor in zip(names, factors, strict=True)}
        cells = rearrange(self.is_masked, f"n {split} -> {merged}", **sizes)
        if can_read_values(cells) and not torch.equal(cells.any(-1), cells.all(-1)):
            row, *cell = (cells.any(-1) != cells.all(-1)).nonzero()[0].tolist()
            raise ValueError(
                f"cell {tuple(cell)} of sample {row} is partly masked; coarsen needs whole cells"
            )
        num_masked = self.num_masked // count_tokens(factors)
        return Mask._from_flat(cells.any(-1).flatten(1), coarse_grid, num_masked)

    @checked
    def complement(self) -> "Mask":
        """Swap visible and masked tokens: `~mask`, which `torch.compile` cannot trace.

        Returns:
            A mask of the same grid, without a copy of the ids.

        Example:
            >>> Mask.from_bool(torch.tensor([[True, False, False]])).complement().is_masked
            tensor([[False,  True,  True]])
        """
        return Mask(self.masked_ids, self.visible_ids, self.grid)

    def __invert__(self) -> "Mask":
        return self.complement()

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> "Mask":
        if isinstance(rows, slice):
            index: slice | Tensor = rows
        else:
            rows = list(rows) if isinstance(rows, Sequence) else rows
            # A single row keeps its batch axis.
            index = torch.arange(self.batch_size, device=self.device)[rows].view(-1)
        return Mask(self.visible_ids[index], self.masked_ids[index], self.grid)

    @checked
    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "Mask":
        """Move the ids to `device`.

        Args:
            device: A device, or its name.
            non_blocking: Whether a copy from pinned memory may run beside the host.

        Returns:
            The same mask there.

        Example:
            >>> Mask.from_bool(torch.tensor([[True, False]])).to("cpu").device
            device(type='cpu')
        """
        return Mask(
            self.visible_ids.to(device, non_blocking=non_blocking),
            self.masked_ids.to(device, non_blocking=non_blocking),
            self.grid,
        )

    @checked
    def pin_memory(self) -> "Mask":
        """Copy the ids to page-locked memory (`DataLoader(pin_memory=True)` calls this).

        Returns:
            The same mask, in page-locked memory of the host.
        """
        return Mask(self.visible_ids.pin_memory(), self.masked_ids.pin_memory(), self.grid)

    @checked
    def equal(self, other: "Mask") -> bool:
        """Whether both mask the same positions of the same grid in every sample.

        Args:
            other: A mask on the same device.

        Returns:
            A Python boolean; a GPU is synchronised.

        Raises:
            ValueError: If the masks are on different devices.

        Example:
            >>> mask = Mask.from_bool(torch.tensor([[True, False]]))
            >>> mask.equal(~~mask), mask.equal(~mask)
            (True, False)
        """
        check_same_device(self, other)
        return self.grid == other.grid and torch.equal(self.visible_ids, other.visible_ids)

    @checked
    def expand(self, batch_size: Count) -> "Mask":
        """Repeat a mask of one sample `batch_size` times, without a copy.

        Args:
            batch_size: Number of samples.

        Returns:
            A mask of that many samples, all with the same ids.

        Raises:
            ValueError: If the mask has several samples.

        Example:
            >>> Mask.from_bool(torch.tensor([[True, False]])).expand(3).visible_ids
            tensor([[1],
                    [1],
                    [1]])
        """
        if self.batch_size not in (1, batch_size):
            raise ValueError(f"cannot expand a mask of {self.batch_size} samples to {batch_size}")
        return Mask(
            self.visible_ids.expand(batch_size, -1),
            self.masked_ids.expand(batch_size, -1),
            self.grid,
        )

    @checked
    def validate(self) -> None:
        """Check that ids are ascending and contain every position of the grid exactly once.

        Raises:
            ValueError: If they are not; the message names the first wrong sample.

        Example:
            >>> Mask(torch.tensor([[1]]), torch.tensor([[1]]), (2,)).validate()
            Traceback (most recent call last):
            ValueError: sample 0 does not split grid (2,) into ... [1] and masked ids [1]
        """
        order = torch.cat([self.visible_ids, self.masked_ids], dim=1)
        positions = torch.arange(self.num_tokens, device=self.device)
        if order.shape[1] != self.num_tokens:
            raise ValueError(f"{order.shape[1]} ids do not fill grid {self.grid}")
        right = (order.sort(dim=1).values == positions).all(dim=1)
        for ids in (self.visible_ids, self.masked_ids):
            right = right & (ids.diff(dim=1) > 0).all(dim=1)
        if not bool(right.all()):
            row = int((~right).nonzero()[0])
            raise ValueError(
                f"sample {row} does not split grid {self.grid} into ascending visible ids "
                f"{self.visible_ids[row].tolist()} and masked ids {self.masked_ids[row].tolist()}"
            )

    def __repr__(self) -> str:
        return (
            f"Mask(batch_size={self.batch_size}, grid={self.grid}, num_visible={self.num_visible}, "
            f"num_masked={self.num_masked}, device='{self.device}')"
        )


def check_same_device(mask: Any, other: Any) -> None:
    """Check that two masks are on one device.

    Raises:
        ValueError: If they are not.
    """
    if mask.device != other.device:
        raise ValueError(f"other is on {other.device}, but this mask is on {mask.device}")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {value!r}")


def _check_integers(name: str, value: Tensor) -> None:
    _check_tensor(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must be integers; got {value.dtype}")


def _only_axis(size: int, axis: int, num_axes: int) -> list[int]:
    return [size if a == axis else 1 for a in range(num_axes)]
