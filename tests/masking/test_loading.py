"""Sample ids from a `DataLoader`, and masks drawn from them."""

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
    default_collate,
)

from mimkit import masking
from mimkit.masking import Mask

GRID = (4, 4)


class Numbers(Dataset[int]):
    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return 100 * range(self.length)[index]


class MasksByWorkers(Dataset[Mask]):
    """Draw masks in the workers, with the same keys as in the training process."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Mask:
        return masking.uniform(masking.key([index], seed=0), GRID, 0.75)


def masks_by_sample(*, workers: int, batch_size: int) -> dict[int, tuple[int, list[int]]]:
    generator = torch.Generator().manual_seed(batch_size)
    loader = DataLoader(
        masking.with_ids(Numbers(10)),
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        generator=generator,
    )
    drawn = {}
    for items, sample_ids in loader:
        mask = masking.uniform(masking.key(sample_ids, seed=1, epoch=2), GRID, 0.75)
        for item, sample, visible in zip(items, sample_ids, mask.visible_ids, strict=True):
            drawn[int(sample)] = (int(item), visible.tolist())
    return drawn


def test_masks_do_not_depend_on_workers_order_or_batch_size():
    expected = masks_by_sample(workers=0, batch_size=10)
    assert sorted(expected) == list(range(10))
    assert masks_by_sample(workers=2, batch_size=3) == expected


def test_masks_drawn_in_workers_equal_those_of_the_training_process():
    loader = DataLoader(MasksByWorkers(), batch_size=3, num_workers=2, collate_fn=Mask.cat)
    expected = masking.uniform(masking.key(range(6), seed=0), GRID, 0.75)
    assert Mask.cat(list(loader)).equal(expected)


def test_the_id_of_an_item_is_its_index():
    dataset = masking.with_ids(Numbers(4))
    assert len(dataset) == 4
    assert [dataset[index] for index in range(4)] == [(0, 0), (100, 1), (200, 2), (300, 3)]
    assert dataset[-1] == (300, 3)


@pytest.mark.untyped
def test_an_index_may_be_a_numpy_integer():
    item, sample_id = masking.with_ids(Numbers(4))[np.int64(2)]
    assert (item, sample_id) == (200, 2)


def test_a_subset_of_a_dataset_with_ids_keeps_the_ids():
    part = Subset(masking.with_ids(Numbers(10)), [7, 3])
    assert [sample_id for _, sample_id in part] == [7, 3]


def test_an_iterable_dataset_raises():
    class Stream(IterableDataset[int]):
        def __iter__(self):
            yield 0

    with pytest.raises(TypeError, match="Stream"):
        masking.with_ids(Stream())


def test_iteration_ends_with_the_dataset():
    dataset = masking.with_ids(TensorDataset(torch.arange(3)))
    assert [sample_id for _, sample_id in dataset] == [0, 1, 2]


def test_masks_of_samples_are_collated():
    key = masking.key(range(3), seed=0)
    mask = masking.uniform(key, (4, 4), 0.5)
    pairs = [(torch.tensor(row), mask[row]) for row in range(3)]
    numbers, again = default_collate(pairs)
    assert numbers.tolist() == [0, 1, 2]
    assert again.equal(mask)
    ragged = masking.ragged(masking.uniform, key, (4, 4), [0.0, 0.5, 1.0])
    assert default_collate([ragged[row] for row in range(3)]).equal(ragged)
    with pytest.raises(ValueError, match="number of"):
        default_collate([mask[:1], masking.uniform(key, (4, 4), 0.75)])


def test_files_with_masks_and_keys_load_with_weights_only(tmp_path):
    key = masking.key(range(3), seed=0)
    mask = masking.uniform(key, (4, 4), 0.5)
    ragged = masking.ragged(masking.uniform, key, (4, 4), [0.0, 0.5, 1.0])
    torch.save({"mask": mask, "ragged": ragged, "key": key}, tmp_path / "masks.pt")
    loaded = torch.load(tmp_path / "masks.pt", weights_only=True)
    assert loaded["mask"].equal(mask)
    assert loaded["ragged"].equal(ragged)
    assert masking.uniform(loaded["key"], (4, 4), 0.5).equal(mask)
