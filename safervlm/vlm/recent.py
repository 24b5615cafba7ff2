"""Pixel values of the images that were used last, so that training decodes a small dataset once and not every epoch."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from torch import Tensor


class RecentPixels:
    """Keeps pixel values by image file, up to a number of bytes; the least recently used ones are removed.

    A file that has changed since (by size or time of modification) is read again. A copy in another process begins
    empty.

    Args:
        max_bytes: Maximum number of bytes of pixel values to keep.
    """

    def __init__(self, max_bytes: int = 64_000_000) -> None:
        self.max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, int, int], Tensor] = OrderedDict()
        self._bytes = 0

    def __reduce__(self) -> tuple[type["RecentPixels"], tuple[int]]:
        return type(self), (self.max_bytes,)

    def get(self, path: str, make: Callable[[], Tensor]) -> Tensor:
        """Returns the pixel values of an image, which the caller must not change.

        Args:
            path: Image file.
            make: Decodes the file; called if its values are not kept.
        """
        try:
            status = Path(path).stat()
        except (OSError, ValueError):  # decoding raises the error that names the record
            return make()
        key = (path, status.st_size, status.st_mtime_ns)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        pixels = make()
        self._kept[key] = pixels
        self._bytes += pixels.nbytes
        while self._bytes > self.max_bytes:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return pixels
