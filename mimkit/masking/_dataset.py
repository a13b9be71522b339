"""Sample ids for any map-style data set."""

from typing import Any, Generic, TypeVar

from torch.utils.data import Dataset, IterableDataset
from torch.utils.data._utils.collate import default_collate_fn_map

from mimkit._arguments import describe
from mimkit.masking._mask import Mask
from mimkit.masking._ragged import RaggedMask

Item = TypeVar("Item")


def _collate(masks: Any, *, collate_fn_map: Any = None) -> Any:
    """Concatenate the masks of samples, as a `DataLoader` stacks tensors."""
    return type(masks[0]).cat(masks)


default_collate_fn_map[Mask] = default_collate_fn_map[RaggedMask] = _collate


class _WithIds(Dataset[tuple[Item, int]], Generic[Item]):
    def __init__(self, dataset: Dataset[Item]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Item, int]:
        sample_id = index + len(self) if index < 0 else index
        return self.dataset[index], sample_id


def with_ids(dataset: Dataset[Item]) -> Dataset[tuple[Item, int]]:
    """Wrap a map-style data set so that its items are (item, sample id).

    The sample id is the index. Batches from any `DataLoader`, with any number of workers, then
    contain the ids that `masking.key` needs to draw masks on the training device.

    Args:
        dataset: Has `__getitem__` and `__len__`.

    Returns:
        A data set of the same length.

    Raises:
        TypeError: If the data set is not map-style.

    Source:
        mimkit's own.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> loader = DataLoader(with_ids(TensorDataset(torch.zeros(4, 2))), batch_size=2)
        >>> [sample_ids.tolist() for _, sample_ids in loader]
        [[0, 1], [2, 3]]
    """
    if isinstance(dataset, IterableDataset | str) or not hasattr(dataset, "__getitem__"):
        raise TypeError(f"dataset must be a map-style data set; got {describe(dataset)}")
    return _WithIds(dataset)
