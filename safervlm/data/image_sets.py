"""The images of the unsafe dataset and of its safe counterpart: from the Hub or local folders, and their splits."""

from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from safervlm.data.copies import copy_of, update_copy
from safervlm.data.image_folders import (
    ImageRecord,
    read_images,
    report_unnamed_images,
    require_metadata,
    save_images,
)
from safervlm.data.loaders import Collator
from safervlm.data.module import SaferData
from safervlm.data.splits import Split, paper_split, published_order, safe_split
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.names import path_text, set_name
from safervlm.protocol import SAFE, UNSAFE, published_draw
from safervlm.ranges import in_range

REMEDY = "by data.folder (the unsafe dataset) or data.safe_folder"  # how to specify a local dataset instead

HUB_REPO = "yiting/UnsafeConcepts"
SAFE_HUB_REPO = "yiting/imagenet_1k_unique_class"

PartName = Literal["all", "train", "validation", "test"]


class ImageSets(SaferData):
    """Base class: reads and splits the unsafe dataset and its safe counterpart. Subclasses define the questions.

    A dataset is read from its local folder. Without a folder, it is downloaded once from the Hub into a folder of the
    same format under ``cache_dir``.

    Args:
        folder: Local folder of the unsafe dataset. None downloads it from the Hub.
        safe_folder: Local folder of the safe dataset. None downloads it from the Hub.
        repo: Hub repository of the unsafe dataset, ``owner/name`` or ``owner/name@revision``.
        safe_repo: Hub repository of the safe dataset. None uses no safe images unless ``safe_folder`` is set.
        name: Name of the unsafe dataset, the first component of its record ids.
        safe_name: Name of the safe dataset, the first component of its record ids and the category of its images.
        cache_dir: Folder in which datasets downloaded from the Hub are kept.
        validation_fraction: Fraction of the training images held out as the validation split. The paper holds out none.
        limit: Maximum number of images per dataset (and split), spread over categories and concepts. None uses all.
        collator: Function that turns examples into a batch. The command line sets the model's collator.
        batch_size: Number of examples per step and process.
        num_workers: Number of processes that load images in advance. 0 loads them in the main process.
        seed: Seed of the training order.

    Raises:
        ArgumentError: A number is outside its range, a path or name is invalid, or both datasets have the same name.
    """

    def __init__(
        self,
        folder: str | None,
        safe_folder: str | None,
        repo: str,
        safe_repo: str | None,
        name: str,
        safe_name: str,
        cache_dir: str,
        validation_fraction: float,
        limit: int | None,
        collator: Collator | None,
        batch_size: int | Literal["auto"],
        num_workers: int,
        seed: int = 0,
    ) -> None:
        super().__init__(collator, batch_size, num_workers, seed)
        in_range("data", least=0, below=1, validation_fraction=validation_fraction)
        if limit is not None and limit < 1:
            raise ArgumentError(f"data.limit: at least 1, or null, got {limit}")
        paths = {"folder": folder, "safe_folder": safe_folder, "repo": repo, "safe_repo": safe_repo}
        for argument, path in (paths | {"cache_dir": cache_dir}).items():
            if path is not None:
                path_text(f"data.{argument}", path)
        name, safe_name = set_name("data.name", name), set_name("data.safe_name", safe_name)
        if name == safe_name:
            raise ArgumentError(f"data.safe_name: the two datasets need different names, got {name!r} twice")
        self.cache = Path(cache_dir).expanduser()
        self.repo = None if folder else repo
        self.safe_repo = None if safe_folder else safe_repo
        self._folders = folder, safe_folder
        self.dataset = name
        self.safe_dataset = safe_name
        self.validation_fraction = validation_fraction
        self.limit = limit

    @property
    def folder(self) -> Path:
        """Local folder of the unsafe dataset; a copy from the Hub exists after :meth:`prepare_data`."""
        return copy_of(self.repo, self.cache) if self.repo is not None else Path(str(self._folders[0]))

    @property
    def safe_folder(self) -> Path | None:
        """Local folder of the safe dataset; None without one."""
        if self.safe_repo is not None:
            return copy_of(self.safe_repo, self.cache)
        return Path(self._folders[1]) if self._folders[1] else None

    def prepare_data(self) -> None:
        """Downloads missing datasets, on one process; reports images that the metadata does not name.

        Raises:
            RecordError: A dataset is unavailable, or a local folder has no metadata.
        """
        for repo, folder in ((self.repo, self.folder), (self.safe_repo, self.safe_folder)):
            if repo is None and folder is not None:
                require_metadata(folder)  # before any download
        for repo in (self.repo, self.safe_repo):
            if repo is not None:
                update_copy(repo, self.cache, REMEDY, partial(save_images, repo), "")
        for name, folder in ((self.dataset, self.folder), (self.safe_dataset, self.safe_folder)):
            if folder is not None:
                report_unnamed_images(name, folder)

    @cached_property
    def sets(self) -> tuple[list[ImageRecord], list[ImageRecord]]:
        """All images of the unsafe dataset and of the safe dataset; the latter is empty if there is no safe dataset."""
        unsafe = read_images(self.folder, self.dataset, UNSAFE)
        return unsafe, read_images(self.safe_folder, self.safe_dataset, SAFE) if self.safe_folder else []

    @cached_property
    def splits(self) -> tuple[Split, Split]:
        """Splits of the unsafe and of the safe dataset."""
        unsafe, safe = self.sets
        split = paper_split([image.concept for image in unsafe], self.validation_fraction)
        return split, safe_split(len(safe), split, self.validation_fraction)

    def images(self, part: PartName) -> tuple[list[ImageRecord], list[ImageRecord]]:
        """Returns the unsafe and the safe images of a split, without the limit.

        Args:
            part: Name of the split. ``all`` returns both datasets completely.

        Raises:
            RecordError: The split has neither unsafe nor safe images, or a dataset can't be read.
        """
        if part == "all":
            return self.sets
        unsafe, safe = (
            [images[row] for row in getattr(split, part)] for images, split in zip(self.sets, self.splits, strict=True)
        )
        if not unsafe and not safe:
            way_out = "set data.validation_fraction above 0" if part == "validation" else "it needs more images"
            raise RecordError(f"{self.folder}: the {part} part of {self.dataset} is empty: {way_out}")
        return unsafe, safe

    def published_draw(self) -> dict[tuple[str, str], int]:
        """Returns, for each test image, which of the five questions the published evaluation samples.

        The numbers are sampled over the test images in the first implementation's order: the unsafe images concept by
        concept, in shuffled order, then the safe images.

        Returns:
            The question's number, 0 to 4, by dataset name and image name.
        """
        unsafe, safe = self.sets
        test = [
            unsafe[row] for rows, training in published_order([i.concept for i in unsafe]) for row in rows[training:]
        ]
        test += [safe[row] for row in self.splits[1].test]
        return {(image.dataset, image.image): n for image, n in zip(test, published_draw(len(test)), strict=True)}

    def image_files(self) -> dict[str, str]:
        """Returns the files of all images of both datasets, whether a question is asked about them or not."""
        return {f"{image.dataset}/{image.image}": image.path for images in self.sets for image in images}

    def describe(self) -> dict[str, Any]:
        """Extends :meth:`SaferData.describe` by the datasets' names, repositories, validation fraction and limit."""
        return super().describe() | {
            "names": [self.dataset, self.safe_dataset] if self.safe_folder else [self.dataset],
            "sources": [repo for repo in (self.repo, self.safe_repo) if repo],
            "validation_fraction": self.validation_fraction,
            "limit": self.limit,
        }
