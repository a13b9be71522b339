"""`RaggedMask`: masks of samples that differ in grid or in number of masked tokens.

Axes: samples; tokens (of all samples, concatenated; row-major, prefix tokens excluded); visible;
masked.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Int, Int64, Shaped
from torch import Tensor

from mimkit._arguments import Count, checked
from mimkit._containers import container, static
from mimkit._grids import Grid, as_sizes, count_tokens
from mimkit.masking._key import Key
from mimkit.masking._mask import Mask, check_same_device


@checked
@container
class RaggedMask:
    """Which tokens the encoder sees, for samples that differ in grid or in number of tokens.

    Tokens are packed: the rows of the first sample, then those of the second, and so on, without
    padding. So a batch may contain images of different sizes, each with its own grid. Like `Mask`,
    it is a pytree of tensors. Counts and grids are its context: they are known on the host, and a
    compiled graph is specialised to them. Make one with `ragged`, `RaggedMask.cat` or
    `RaggedMask.from_*`; the constructor checks dtypes, devices and the number of samples only.

    Attributes:
        visible_ids: Row-major positions in each sample's grid that the encoder sees, ascending.
        masked_ids: The other positions, ascending within each sample.
        cu_visible: Start of each sample's visible ids, and the total number at the end.
        cu_masked: The same for the masked ids.
        grids: Tokens per axis of each sample.
        num_visible: Number of visible tokens of each sample.

    Raises:
        ValueError: If the numbers of entries of grids, counts and cumulative counts do not fit.

    Source:
        mimkit's own.

    Example:
        >>> wide, tall = torch.tensor([[False, True]]), torch.tensor([[True], [True], [False]])
        >>> mask = RaggedMask.from_bool([wide, tall])
        >>> mask
        RaggedMask(grids=((1, 2), (3, 1)), num_visible=(1, 1), num_masked=(1, 2), device='cpu')
        >>> mask.masked_ids, mask.cu_masked
        (tensor([1, 0, 1]), tensor([0, 1, 3]))
    """

    visible_ids: Int64[Tensor, " visible"]
    masked_ids: Int64[Tensor, " masked"]
    cu_visible: Int64[Tensor, " samples_and_one"]
    cu_masked: Int64[Tensor, " samples_and_one"]
    grids: tuple[Grid, ...] = static()
    num_visible: tuple[int, ...] = static()

    def __post_init__(self) -> None:
        numbers = len(self.grids), len(self.num_visible), len(self.cu_visible) - 1
        if len(set(numbers)) > 1:
            raise ValueError(
                "grids and num_visible must have one entry per sample, and cu_visible and "
                f"cu_masked one more; got {numbers[0]}, {numbers[1]} and {numbers[2] + 1} entries"
            )

    @classmethod
    @checked
    def from_bool(
        cls, is_masked: Bool[Tensor, "samples *grid"] | Sequence[Bool[Tensor, "..."]]
    ) -> "RaggedMask":
        """Make a mask from booleans, True = masked: one tensor, or one tensor per sample.

        Masked tokens are counted, which synchronises a GPU and is not possible in a compiled
        graph.

        Args:
            is_masked: One boolean per grid position of each sample, all on one device.

        Returns:
            A mask on that device.

        Raises:
            TypeError: If it is not boolean.
            ValueError: If there are no samples, or a sample has no axis.

        Example:
            >>> wide, tall = torch.tensor([[False, True]]), torch.tensor([[True], [True], [False]])
            >>> RaggedMask.from_bool([wide, tall]).num_masked
            (1, 2)
        """
        samples = list(is_masked)
        wrong = next((sample for sample in samples if sample.dtype != torch.bool), None)
        if wrong is not None:
            raise TypeError(f"is_masked must be boolean (True = masked); got {wrong.dtype}")
        _check_not_empty("is_masked", samples)
        grids = tuple(as_sizes("the grid of is_masked", tuple(s.shape)) for s in samples)
        flat = torch.cat([sample.flatten() for sample in samples])
        starts = _cumulate([count_tokens(grid) for grid in grids], flat.device)
        visible, masked = ((flat == hidden).nonzero().squeeze(1) for hidden in (False, True))
        cu_visible = torch.searchsorted(visible, starts)
        cu_masked = starts - cu_visible
        num_visible = cu_visible.diff()
        return cls(
            visible - _repeat_per_token(starts[:-1], num_visible, len(visible)),
            masked - _repeat_per_token(starts[:-1], cu_masked.diff(), len(masked)),
            cu_visible,
            cu_masked,
            grids,
            tuple(num_visible.tolist()),
        )

    @classmethod
    @checked
    def from_visible_ids(
        cls, ids: Sequence[Int[Tensor, "_"]], grids: Sequence[Sequence[int]]
    ) -> "RaggedMask":
        """Make a mask from the row-major positions that are visible in each sample, in any order.

        Args:
            ids: Per sample, positions in [0, tokens) without repetition.
            grids: Tokens per axis of each sample.

        Returns:
            A mask on the device of the ids, which are ascending in each sample.

        Raises:
            TypeError: If the ids are not integers.
            ValueError: If the numbers of grids and samples differ, or (on a CPU) ids are out of
                range or repeated.

        Example:
            >>> ids = [torch.tensor([3, 0]), torch.tensor([1])]
            >>> RaggedMask.from_visible_ids(ids, [(2, 2), (1, 3)]).visible_ids
            tensor([0, 3, 1])
        """
        if len(ids) != len(grids):
            raise ValueError(f"{len(ids)} samples of ids need {len(ids)} grids; got {len(grids)}")
        pairs = zip(ids, grids, strict=True)
        return cls.cat([Mask.from_visible_ids(one.unsqueeze(0), grid) for one, grid in pairs])

    @classmethod
    @checked
    def cat(cls, masks: Sequence["Mask | RaggedMask"]) -> "RaggedMask":
        """Concatenate the samples of masks with any grids and counts.

        Args:
            masks: At least one mask, rectangular or ragged; all on one device.

        Returns:
            A mask with the samples of all, in order.

        Raises:
            ValueError: If there are no masks.

        Example:
            >>> from mimkit import masking
            >>> key = masking.key([0, 1], seed=0)
            >>> masks = [masking.uniform(key, grid, 0.75) for grid in ((4, 4), (2, 8), (4, 6))]
            >>> RaggedMask.cat(masks).num_visible
            (4, 4, 4, 4, 6, 6)
        """
        _check_not_empty("masks", masks)
        visible_ids = torch.cat([mask.visible_ids.flatten() for mask in masks])
        masked_ids = torch.cat([mask.masked_ids.flatten() for mask in masks])
        grids: list[Grid] = []
        num_visible: list[int] = []
        for mask in masks:
            if isinstance(mask, Mask):
                grids += [mask.grid] * mask.batch_size
                num_visible += [mask.num_visible] * mask.batch_size
            else:
                grids += mask.grids
                num_visible += mask.num_visible
        return cls._pack(visible_ids, masked_ids, grids, num_visible)

    @classmethod
    def _pack(
        cls,
        visible_ids: Tensor,
        masked_ids: Tensor,
        grids: Sequence[Grid],
        num_visible: Sequence[int],
    ) -> "RaggedMask":
        counts = zip(grids, num_visible, strict=True)
        num_masked = [count_tokens(grid) - count for grid, count in counts]
        cu_visible, cu_masked = (
            _cumulate(n, visible_ids.device) for n in (num_visible, num_masked)
        )
        context = tuple(grids), tuple(num_visible)
        return cls(visible_ids, masked_ids, cu_visible, cu_masked, *context)

    @property
    def batch_size(self) -> int:
        """Number of samples."""
        return len(self.grids)

    @property
    def num_tokens(self) -> tuple[int, ...]:
        """Number of positions in each sample's grid."""
        return tuple(count_tokens(grid) for grid in self.grids)

    @property
    def num_masked(self) -> tuple[int, ...]:
        """Number of masked tokens of each sample."""
        counts = zip(self.num_tokens, self.num_visible, strict=True)
        return tuple(tokens - visible for tokens, visible in counts)

    @property
    def device(self) -> torch.device:
        """Device of the ids."""
        return self.visible_ids.device

    @property
    def is_masked(self) -> list[Bool[Tensor, "..."]]:
        """One boolean per grid position of each sample, True = masked."""
        return [mask.is_masked[0] for mask in self.unbind()]

    @property
    def visible_rows(self) -> Int64[Tensor, " visible"]:
        """Row of each visible token among the packed tokens of all samples."""
        return self.visible_ids + self._starts(self.cu_visible, self.visible_ids)

    @property
    def masked_rows(self) -> Int64[Tensor, " masked"]:
        """Row of each masked token among the packed tokens of all samples."""
        return self.masked_ids + self._starts(self.cu_masked, self.masked_ids)

    def _starts(self, cumulative: Tensor, ids: Tensor) -> Tensor:
        starts = (self.cu_visible + self.cu_masked)[:-1]
        return _repeat_per_token(starts, cumulative.diff(), len(ids))

    @checked
    def split_visible(
        self, packed: Shaped[Tensor, "rows ..."], *, num_prefix: Count = 0
    ) -> tuple[Tensor, ...]:
        """Split packed rows into samples: `num_prefix` rows and the visible tokens of each.

        Args:
            packed: Rows of all samples, one sample after the other.
            num_prefix: Rows in front of the visible tokens of each sample.

        Returns:
            One view per sample, [num_prefix + its visible tokens, ...].

        Raises:
            ValueError: If the number of rows is wrong.

        Example:
            >>> mask = RaggedMask.from_bool([torch.tensor([False, True]), torch.tensor([False])])
            >>> [len(rows) for rows in mask.split_visible(torch.randn(4, 8), num_prefix=1)]
            [2, 2]
        """
        return _split(packed, [num_prefix + count for count in self.num_visible])

    @checked
    def split_masked(self, packed: Shaped[Tensor, "rows ..."]) -> tuple[Tensor, ...]:
        """Split rows of masked tokens into samples.

        Args:
            packed: One row per masked token of all samples, one sample after the other.

        Returns:
            One view per sample, [its masked tokens, ...].

        Raises:
            ValueError: If the number of rows is wrong.

        Example:
            >>> mask = RaggedMask.from_bool([torch.tensor([False, True]), torch.tensor([False])])
            >>> [len(rows) for rows in mask.split_masked(torch.randn(1, 8))]
            [1, 0]
        """
        return _split(packed, self.num_masked)

    @checked
    def unbind(self) -> list[Mask]:
        """Split the batch into masks of one sample.

        Returns:
            One mask per sample, each a batch of one.

        Example:
            >>> mask = RaggedMask.from_bool([torch.tensor([False, True]), torch.tensor([False])])
            >>> RaggedMask.cat(mask.unbind()).equal(mask)
            True
        """
        samples = zip(
            self.split_visible(self.visible_ids),
            self.split_masked(self.masked_ids),
            self.grids,
            strict=True,
        )
        return [Mask(v.unsqueeze(0), m.unsqueeze(0), grid) for v, m, grid in samples]

    @checked
    def complement(self) -> "RaggedMask":
        """Swap visible and masked tokens: `~mask`, which `torch.compile` cannot trace.

        Returns:
            A mask of the same grids, without a copy of the ids.

        Example:
            >>> mask = RaggedMask.from_bool([torch.tensor([False, True]), torch.tensor([False])])
            >>> mask.complement().num_masked
            (1, 1)
        """
        return RaggedMask(
            self.masked_ids,
            self.visible_ids,
            self.cu_masked,
            self.cu_visible,
            self.grids,
            self.num_masked,
        )

    def __invert__(self) -> "RaggedMask":
        return self.complement()

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> "RaggedMask":
        if isinstance(rows, Tensor):
            rows = torch.arange(self.batch_size)[rows.cpu()].view(-1).tolist()
        if isinstance(rows, int | slice):
            index = range(self.batch_size)[rows]
            rows = [index] if isinstance(index, int) else list(index)
        visible = self.split_visible(self.visible_ids)
        masked = self.split_masked(self.masked_ids)
        _check_not_empty("rows", rows)
        return RaggedMask._pack(
            torch.cat([visible[row] for row in rows]),
            torch.cat([masked[row] for row in rows]),
            [self.grids[row] for row in rows],
            [self.num_visible[row] for row in rows],
        )

    @checked
    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "RaggedMask":
        """Move the tensors to `device`.

        Args:
            device: A device, or its name.
            non_blocking: Whether a copy from pinned memory may run beside the host.

        Returns:
            The same mask there.

        Example:
            >>> mask = RaggedMask.from_bool([torch.tensor([False, True]), torch.tensor([False])])
            >>> mask.to("cpu").device
            device(type='cpu')
        """
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    @checked
    def pin_memory(self) -> "RaggedMask":
        """Copy to page-locked memory (`DataLoader(pin_memory=True)` calls this).

        Returns:
            The same mask, in page-locked memory of the host.
        """
        return self._map(Tensor.pin_memory)

    def _map(self, function: Callable[[Tensor], Tensor]) -> "RaggedMask":
        return RaggedMask(
            function(self.visible_ids),
            function(self.masked_ids),
            function(self.cu_visible),
            function(self.cu_masked),
            self.grids,
            self.num_visible,
        )

    @checked
    def equal(self, other: "RaggedMask") -> bool:
        """Whether both mask the same positions of the same grids in every sample.

        Args:
            other: A ragged mask on the same device.

        Returns:
            A Python boolean; a GPU is synchronised.

        Raises:
            ValueError: If the masks are on different devices.

        Example:
            >>> mask = RaggedMask.from_bool([torch.tensor([False, True]), torch.tensor([False])])
            >>> mask.equal(~~mask), mask.equal(~mask)
            (True, False)
        """
        check_same_device(self, other)
        return (
            (self.grids, self.num_visible) == (other.grids, other.num_visible)
            and torch.equal(self.visible_ids, other.visible_ids)
            and torch.equal(self.masked_ids, other.masked_ids)
        )

    @checked
    def validate(self) -> None:
        """Check the counts, and that each sample's ids are ascending and fill its grid.

        Raises:
            ValueError: If they do not; the message names the first wrong sample.

        Example:
            >>> mask = RaggedMask.from_bool([torch.tensor([False, True]), torch.tensor([False])])
            >>> mask.validate()
        """
        for name, ids, cumulative, counts in (
            ("visible", self.visible_ids, self.cu_visible, self.num_visible),
            ("masked", self.masked_ids, self.cu_masked, self.num_masked),
        ):
            if cumulative.tolist() != [0, *accumulate(counts)] or len(ids) != sum(counts):
                raise ValueError(
                    f"cu_{name} {cumulative.tolist()} and {len(ids)} {name} ids do not fit the "
                    f"counts {counts} of grids {self.grids}"
                )
        for row, mask in enumerate(self.unbind()):
            try:
                mask.validate()
            except ValueError as error:
                raise ValueError(f"in sample {row} of a ragged mask: {error}") from None

    def __repr__(self) -> str:
        return (
            f"RaggedMask(grids={self.grids}, num_visible={self.num_visible}, "
            f"num_masked={self.num_masked}, device='{self.device}')"
        )


@checked
def ragged(
    sampler: Callable[..., Mask],
    key: Key,
    grids: Sequence[int] | Sequence[Sequence[int]],
    ratios: float | Fraction | Sequence[float | Fraction] | None = None,
    *,
    num_masked: int | Sequence[int] | None = None,
    **options: Any,
) -> RaggedMask:
    """Draw masks of different ratios, counts or grids; each equals the mask drawn alone.

    Args:
        sampler: Any sampler, such as `uniform` or `blockwise`.
        key: Seed, epoch and sample ids (see `masking.key`).
        grids: Tokens per axis: one grid for all samples, or one per sample.
        ratios: Fraction of tokens to mask, in [0, 1]: one for all samples, or one per sample. Here
            0 masks no token and 1 masks all, where a sampler alone leaves one visible and one
            masked.
        num_masked: Number of tokens to mask, instead of `ratios`.
        options: Further keyword arguments of the sampler.

    Returns:
        A mask on the device of `key`.

    Raises:
        TypeError: If the sampler does not return a `Mask`.
        ValueError: If the number of grids, ratios or counts is not the number of samples; also what
            the sampler raises.

    Source:
        mimkit's own.

    Example:
        >>> from mimkit import masking
        >>> key = masking.key([7, 8], seed=0)
        >>> mask = ragged(masking.uniform, key, [(4, 4), (2, 6)], [0.5, 0.75])
        >>> mask.num_visible
        (8, 3)
        >>> mask.unbind()[1].equal(masking.uniform(masking.key([8], seed=0), (2, 6), 0.75))
        True
    """
    one_grid = not (len(grids) and isinstance(grids[0], Sequence))
    kinds = zip(
        _per_sample("grids", grids, key, one=one_grid),
        _per_sample("ratios", ratios, key, one=not isinstance(ratios, Sequence)),
        _per_sample("num_masked", num_masked, key, one=not isinstance(num_masked, Sequence)),
        strict=True,
    )
    groups: dict[Any, list[int]] = {}
    for row, (grid, ratio, count) in enumerate(kinds):
        groups.setdefault((tuple(grid), ratio, count), []).append(row)
    masks: dict[int, Mask] = {}
    for (grid, ratio, count), rows in groups.items():
        wanted = {"ratio": ratio, "num_masked": count}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        part = Key(key.sample_ids[rows], key.seed_and_epoch, key.view_index)
        if ratio in (0, 1) and count is None:
            drawn = _none_or_all(part, grid, is_masked=ratio == 1)
        else:
            drawn = sampler(part, grid, **wanted, **options)
        if not isinstance(drawn, Mask):
            raise TypeError(f"sampler must return a Mask; got {type(drawn).__name__}")
        masks |= {row: drawn[i] for i, row in enumerate(rows)}
    return RaggedMask.cat([masks[row] for row in range(key.batch_size)])


def _none_or_all(key: Key, grid: Sequence[int], *, is_masked: bool) -> Mask:
    shape = (key.batch_size, *as_sizes("grid", grid))
    count = count_tokens(grid) if is_masked else 0
    flags = torch.full(shape, is_masked, device=key.device)
    return Mask.from_bool(flags, num_masked=count)


def _per_sample(name: str, value: Any, key: Key, *, one: bool) -> Sequence[Any]:
    """Repeat one value for all samples, or check that there is one for each."""
    if one:
        return [value] * key.batch_size
    if len(value) != key.batch_size:
        raise ValueError(f"{key.batch_size} samples need {key.batch_size} {name}; got {len(value)}")
    values: Sequence[Any] = value
    return values


def _split(packed: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    if len(packed) != sum(counts):
        raise ValueError(
            f"packed must have {sum(counts)} rows, {tuple(counts)} for the samples with their "
            f"prefix (num_prefix); got {len(packed)}"
        )
    parts: tuple[Tensor, ...] = packed.split(list(counts))
    return parts


def _cumulate(counts: Sequence[int], device: torch.device) -> Int64[Tensor, " samples_and_one"]:
    return torch.tensor([0, *accumulate(counts)], device=device)


def _repeat_per_token(values: Tensor, counts: Tensor, total: int) -> Tensor:
    """Repeat each sample's value for each of its tokens; `total` avoids a synchronisation."""
    return values.repeat_interleave(counts, output_size=total)


def _check_not_empty(name: str, samples: Sequence[Any]) -> None:
    if not len(samples):
        raise ValueError(f"{name} is empty, but a ragged mask needs at least one sample")
