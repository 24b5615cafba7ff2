"""Batches of questions for a server, with each image as a data URL."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Self

from PIL import Image
from torch import Tensor

from safervlm.io.images import BLANK, ImageSettings, decode
from safervlm.records import Example, Question
from safervlm.vlm.base import Batch


class ServerBatch(Batch):
    """Questions, and each distinct image once as the data URL that is sent.

    Args:
        questions: The B questions.
        images: Data URLs of the distinct images.
        image_rows: For each question, the index of its image.
    """

    def __init__(self, questions: list[Question], images: list[str], image_rows: list[int]) -> None:
        super().__init__(questions)
        self.images, self.image_rows = images, image_rows

    def select(self, rows: Tensor, answers: Sequence[Sequence[int]] | None = None) -> Self:
        """Returns a batch of some of the questions.

        Args:
            rows: Indices of the questions to keep.
            answers: Ignored, because a server doesn't score completions.
        """
        chosen = rows.tolist()
        return type(self)(
            [self.questions[row] for row in chosen], self.images, [self.image_rows[row] for row in chosen]
        )


@dataclass(frozen=True)
class ServerCollator:
    """Makes a :class:`ServerBatch` of examples; picklable.

    Attributes:
        settings: How images are decoded.
    """

    settings: ImageSettings = field(default=ImageSettings())

    def __call__(self, examples: Sequence[Example]) -> ServerBatch:
        """Encodes each distinct image once; questions without an image get a blank one.

        Raises:
            RecordError: An image is missing, damaged, too large or not an image.
        """
        rows: dict[str | None, int] = {}
        images: list[str] = []
        for question in (example.question for example in examples):
            path = question.image_path
            if path not in rows:
                rows[path] = len(images)
                images.append(blank_url() if path is None else data_url(path, question.id, self.settings))
        questions = [example.question for example in examples]
        return ServerBatch(questions, images, [rows[question.image_path] for question in questions])


def data_url(path: str, record: str, settings: ImageSettings = ImageSettings()) -> str:  # noqa: B008 (frozen)
    """Returns an image as a data URL: the unmodified file if every decoder sees the same pixels in it, else a PNG.

    Args:
        path: Path of the image file.
        record: Id of the record that the image belongs to, for error messages.
        settings: How the image is decoded.

    Raises:
        RecordError: The file is missing, damaged, too large or not an image.
    """
    decoded = decode(path, record, settings)
    return as_url(decoded.content, decoded.format) if decoded.plain else png_url(decoded.image)


def png_url(image: Image.Image) -> str:
    """Returns an image as the data URL of a PNG.

    Args:
        image: The image.
    """
    file = io.BytesIO()
    image.save(file, "PNG")
    return as_url(file.getvalue(), "PNG")


def as_url(content: bytes, kind: str) -> str:
    """Returns the data URL of an image file.

    Args:
        content: Bytes of the file.
        kind: Pillow's name of the file format, for example ``PNG``.
    """
    return f"data:{Image.MIME[kind]};base64,{base64.b64encode(content).decode()}"


@cache
def blank_url() -> str:
    """Returns the data URL of the blank image, encoded once."""
    return png_url(BLANK)
