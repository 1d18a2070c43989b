"""Changes to the loaders of a data module: other workers, and no augmentation."""

from typing import Any

from torch.utils.data import DataLoader, Dataset

from bn_lightning.training import seeds
from bn_lightning.training.data_module import DataModule
from bn_lightning.training.exact_data_loader import ExactDataLoader

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader", "predict_dataloader")


class Still(Dataset[Any]):
    """A Dataset whose samples are always read with the same state of the global generators."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        seeds.seed_read(0)
        return self.dataset[index]


def change_loaders(data: DataModule, workers: int, still: bool) -> None:
    """Set the number of workers of all loaders; with `still`, remove the augmentation."""
    for name in LOADERS:
        original = getattr(data, name)

        def changed(original: Any = original) -> Any:
            return _changed(original(), workers, still)

        # Lightning asks whether a data module has this method.
        changed.__wrapped__ = original  # type: ignore[attr-defined]
        setattr(data, name, changed)
    if still:
        data.augmentation = lambda epoch: None  # type: ignore[method-assign]


def _changed(loader: Any, workers: int, still: bool) -> Any:
    if isinstance(loader, ExactDataLoader):
        loader.num_workers = workers
        if still:
            loader.dataset = Still(loader.dataset)
    elif isinstance(loader, DataLoader):
        loader.num_workers = workers
        loader.timeout = loader.timeout if workers else 0
        loader.prefetch_factor = loader.prefetch_factor or 2 if workers else None
    return loader
