"""Questions for a server, each with its image as a data URL."""

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
    """Questions, and each image once as the data URL that is sent.

    Args:
        questions: the B questions.
        images: data URLs.
        image_rows: which of them each question is about.
    """

    def __init__(self, questions: list[Question], images: list[str], image_rows: list[int]) -> None:
        super().__init__(questions)
        self.images, self.image_rows = images, image_rows

    def select(self, rows: Tensor, answers: Sequence[Sequence[int]] | None = None) -> Self:
        """Some of the questions; a server scores no answers, so there are none to take along."""
        chosen = rows.tolist()
        return type(self)(
            [self.questions[row] for row in chosen], self.images, [self.image_rows[row] for row in chosen]
        )


@dataclass(frozen=True)
class ServerCollator:
    """Examples -> :class:`ServerBatch`; picklable.

    Attributes:
        settings: how images are decoded.
    """

    settings: ImageSettings = field(default=ImageSettings())

    def __call__(self, examples: Sequence[Example]) -> ServerBatch:
        """Reads the images, once each; a blank one stands for none."""
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
    """An image as a data URL: the file as it is where every server sees the same pixels in it as we do, else a PNG.

    Args:
        path: the image's file.
        record: the id of the record that it belongs to, for the error.
        settings: how the image is decoded.

    Raises:
        RecordError: the file is missing, damaged, too large or not an image.
    """
    decoded = decode(path, record, settings)
    return as_url(decoded.content, decoded.format) if decoded.plain else png_url(decoded.image)


def png_url(image: Image.Image) -> str:
    """An image as the data URL of a PNG."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return as_url(file.getvalue(), "PNG")


def as_url(content: bytes, kind: str) -> str:
    """The data URL of an image file of a format that Pillow names."""
    return f"data:{Image.MIME[kind]};base64,{base64.b64encode(content).decode()}"


@cache
def blank_url() -> str:
    """The blank image, encoded once."""
    return png_url(BLANK)
