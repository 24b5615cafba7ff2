"""Promise 2, images: invalid images are rejected in one line, and size and memory are limited."""

import base64
import contextlib
import io
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_cases import BMP, DECODED, GIF, JPEG, REJECTED, RGB_PNG, TIFF, WEBP, bomb
from image_files import saved
from PIL import Image

from safervlm.data.embedded import decoded
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.images import ImageSettings, decode, has_frames, image_file, image_kind, open_image
from safervlm.vlm.server.batch import data_url


def rejection(path: Path | str, settings: ImageSettings = ImageSettings()) -> str:  # noqa: B008 (frozen)
    """The error line of a rejected image; both ways to send an image raise the same one."""
    with pytest.raises(RecordError) as one:
        open_image(path, "Set/1", settings)
    with pytest.raises(RecordError) as other:
        data_url(str(path), "Set/1", settings)
    assert str(one.value) == str(other.value)
    line = str(one.value)
    assert line.startswith("Set/1: ")
    assert line.isprintable()
    assert len(line) < 500
    return line


@pytest.mark.parametrize("name", REJECTED)
def test_invalid_image_is_rejected_in_one_line(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, reason = REJECTED[name]
    (tmp_path / name).write_bytes(content)
    line = rejection(tmp_path / name)
    assert str(tmp_path / name) in line
    assert re.search(reason, line), line
    assert "replace" in line or "raise vlm.images." in line
    assert capfd.readouterr() == ("", "")


def test_damaged_image_is_rejected_or_keeps_its_size(tmp_path: Path) -> None:
    """No damage raises anything but a RecordError; a damaged image is never taken for a larger or smaller one."""
    draw = np.random.default_rng(3)
    for content in (RGB_PNG, JPEG, GIF, WEBP, TIFF, BMP, DECODED["profile_swapped.png"][0], DECODED["phone.jpg"][0]):
        for _ in range(60):
            damaged = bytearray(content)
            for at in draw.integers(0, len(content), draw.integers(1, 4)):
                damaged[at] = draw.integers(0, 256)
            (tmp_path / "x.png").write_bytes(bytes(damaged[: draw.integers(1, len(content) + 1)]))
            with contextlib.suppress(RecordError):
                image = open_image(tmp_path / "x.png", "Set/1")
                assert image.mode == "RGB"
                assert image.width * image.height <= ImageSettings.max_pixels


def of_size(kind: str, side: int, frames: int = 1) -> bytes:
    """A square of one colour in each frame."""
    file = io.BytesIO()
    images = [Image.new("RGB", (side, side), (200 * number, 0, 0)) for number in range(frames)]
    images[0].save(file, kind, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_embedded_image_size_is_limited_only_by_max_pixels(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default bound is lowered here, instead of an image of more than 80 million pixels."""
    monkeypatch.setattr(ImageSettings, "max_pixels", 10_000)
    content = of_size(kind, 200)
    assert image_kind(content) == kind.lower()
    assert decoded(base64.b64encode(content).decode()) == (content, f".{kind.lower()}")
    file = tmp_path / "image"
    file.write_bytes(content)
    assert open_image(file, "Set/1", ImageSettings(max_pixels=40_000)).size == (200, 200)
    with pytest.raises(RecordError, match=r"39999.*vlm\.images\.max_pixels"):
        open_image(file, "Set/1", ImageSettings(max_pixels=39_999))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP"])
def test_large_animation_is_detected_as_an_animation(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageSettings, "max_pixels", 10_000)
    content = of_size(kind, 200, frames=2)
    assert has_frames(io.BytesIO(content))
    (tmp_path / "image").write_bytes(content)
    assert not decode(tmp_path / "image", "Set/1", ImageSettings(max_pixels=40_000)).plain


def made_folder(path: Path) -> Path:
    path.mkdir()
    return path


def made_pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def made_link(path: Path, to: str) -> Path:
    path.symlink_to(to)
    return path


def made_unreadable(path: Path) -> Path:
    path.write_bytes(RGB_PNG)
    path.chmod(0)
    return path


# name -> (a function that makes it, the error line)
PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "folder": (made_folder, "not a regular file"),
    "pipe": (made_pipe, "not a regular file"),
    "loop": (lambda path: made_link(path, path.name), "can't be read"),
    "link to nothing": (lambda path: made_link(path, "gone"), "missing"),
    "link to a device": (lambda path: made_link(path, "/dev/zero"), "not a regular file"),
    "device": (lambda path: Path("/dev/zero"), "not a regular file"),
    "missing": (lambda path: path, "missing"),
    "below a file": (lambda path: made_unreadable(path) / "x.png", "can't be read"),
    "long name": (lambda path: path.with_name("x" * 300), "can't be read"),
    "null character": (lambda path: path.with_name("x\0.png"), "can't be read"),
    "line break": (lambda path: path.with_name("x\ny\x1b[2J.png"), "missing"),
}


@pytest.mark.parametrize("name", PLACES)
def test_only_regular_files_are_opened(tmp_path: Path, name: str) -> None:
    make, reason = PLACES[name]
    line = rejection(make(tmp_path / "x.png"))
    assert reason in line
    assert line.count(": the image ") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    assert "Permission denied" in rejection(made_unreadable(tmp_path / "x.png"))


@pytest.mark.parametrize("name", ["loop.png", "x\0.png", "y" * 300 + ".png", "../x.png", "/etc/passwd"])
def test_a_name_in_a_dataset_is_rejected_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "x.png").write_bytes(RGB_PNG)
    made_link(tmp_path / "set" / "loop.png", "loop.png")
    with pytest.raises(RecordError, match=r"^metadata\.jsonl, line 1: the image ") as error:
        image_file(tmp_path / "set", name, "metadata.jsonl, line 1")
    assert str(error.value).isprintable()


# --- bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "width", "height", "argument"),
    [
        ({"max_pixels": 600}, 30, 21, "max_pixels"),
        ({"max_side": 30}, 31, 2, "max_side"),
        ({"max_aspect_ratio": 10}, 2, 21, "max_aspect_ratio"),
        ({"max_bytes": 50}, 20, 20, "max_bytes"),
    ],
)
def test_image_limit_is_configurable_and_exact(
    tmp_path: Path, settings: dict[str, int], width: int, height: int, argument: str
) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(saved(Image.new("RGB", (width, height)), "PNG"))
    assert f"raise vlm.images.{argument}" in rejection(path, ImageSettings(**settings))
    value = {
        "max_pixels": width * height,
        "max_side": width,
        "max_aspect_ratio": 10.5,
        "max_bytes": path.stat().st_size,
    }
    raised = ImageSettings(**{argument: value[argument]})
    assert open_image(path, "1", raised).size == (width, height)


def test_max_pixels_above_pillows_own_limit_is_respected(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    (tmp_path / "x.png").write_bytes(bomb(20_000, 9_000))
    line = rejection(tmp_path / "x.png", ImageSettings(max_pixels=200_000_000))
    assert "damaged" in line  # an image that was decoded and has no pixels
    assert before == Image.MAX_IMAGE_PIXELS


def test_invalid_image_limits_and_backgrounds_are_rejected() -> None:
    for name in ("max_pixels", "max_side", "max_aspect_ratio", "max_bytes"):
        for value in (0, -3, float("nan")):
            with pytest.raises(ArgumentError, match=rf"^vlm\.images\.{name}: at least 1, got {value}"):
                ImageSettings(**{name: value})
    for colour in ("whiteish", "", "#12345", "#ff00ff80", "rgba(1,2,3,4)"):
        with pytest.raises(ArgumentError, match=r"^vlm\.images\.background: .* got "):
            ImageSettings(background=colour)


def test_out_of_memory_while_decoding_rejects_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(RGB_PNG)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("safervlm.io.images.to_srgb", full)
    assert "doesn't fit into memory" in rejection(tmp_path / "x.png")


def test_truncated_images_are_rejected_despite_pillows_global_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    (tmp_path / "x.jpg").write_bytes(JPEG[: len(JPEG) // 2])
    assert "damaged" in rejection(tmp_path / "x.jpg")
