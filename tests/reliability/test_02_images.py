"""Promise 2, images: the model sees what an image viewer shows, or the record is rejected in one line.

The expected pixels (tests/helpers/image_cases.py) are computed from the values that were written, not with Pillow.
"""

import ast
import base64
import io
import multiprocessing
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_cases import DECODED, REJECTED, spoiled
from image_files import ALPHA, COMMON, RGB, over, profile, s15
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safervlm.data.unsafe_concepts import UnsafeConcepts
from safervlm.io.image_hashes import images_fingerprint, report_frames
from safervlm.io.images import FORMATS, IMAGE_ENDINGS, ImageSettings, image_kind, open_image
from safervlm.measure import FaultTolerantCollator
from safervlm.records import Example, Question
from safervlm.vlm.auto import Transformers
from safervlm.vlm.llava import Llava, shrunk_square
from safervlm.vlm.server.batch import ServerCollator, data_url
from safervlm.vlm.server.client import Server

# --- what is decoded --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODED)
def test_a_file_is_decoded_as_a_viewer_shows_it(tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, pixels, tolerance = DECODED[name]
    (tmp_path / name).write_bytes(content)
    image = open_image(tmp_path / name, "Set/1")
    assert (image.mode, image.size) == ("RGB", (pixels.shape[1], pixels.shape[0]))
    assert np.abs(np.asarray(image, int) - pixels).max() <= tolerance
    assert capfd.readouterr() == ("", "")
    # A server receives a file that any decoder, also plain Pillow, decodes to the same pixels.
    head, body = data_url(str(tmp_path / name), "Set/1").split(",")
    with Image.open(io.BytesIO(base64.b64decode(body))) as sent:
        assert head == f"data:{Image.MIME[str(sent.format)]};base64"
        assert sent.convert("RGB").tobytes() == image.tobytes()
        assert sent.getexif().get(0x0112, 1) == 1
        assert not sent.info.keys() & {"icc_profile", "transparency"}


def test_transparent_images_are_composited_on_the_configured_background(tmp_path: Path) -> None:
    for name, colour in (("black", (0, 0, 0)), ("#0a64c8", (10, 100, 200))):
        settings = ImageSettings(background=name)
        for file in ("rgba8.png", "small_frame.gif", "grey8_transparent.png"):
            (tmp_path / file).write_bytes(DECODED[file][0])
        seen = np.asarray(open_image(tmp_path / "rgba8.png", "1", settings), int)
        assert np.abs(seen - over(RGB, ALPHA, colour)).max() <= 1
        assert open_image(tmp_path / "small_frame.gif", "1", settings).getpixel((0, 0)) == colour
        assert open_image(tmp_path / "grey8_transparent.png", "1", settings).getpixel((3, 2)) == colour


def test_cmyk_colours_follow_the_embedded_icc_profile(tmp_path: Path) -> None:
    # A table in which only the fourth ink darkens; without the table the pixels would be black.
    lightness = b"".join(bytes([0 if corner & 1 else 255, 128, 128]) for corner in range(16))
    ramp = bytes(range(256))
    identity = b"".join(map(s15, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + lightness + ramp * 3
    made = bytearray(profile(b"CMYK", COMMON | {b"A2B0": table}))
    made[12:16], made[20:24] = b"prtr", b"Lab "
    inks = np.zeros((8, 8, 4), np.uint8)
    inks[..., :3], inks[:4, :, 3] = 255, 255
    Image.frombytes("CMYK", (8, 8), inks.tobytes()).save(tmp_path / "x.tif", icc_profile=bytes(made))
    seen = np.asarray(open_image(tmp_path / "x.tif", "1"), int)
    assert seen[:4].max() <= 3
    assert seen[4:].min() >= 252


# --- collators --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
@pytest.mark.parametrize(
    "size", [(1, 1), (7, 7), (13, 40), (41, 12), (336, 300), (30, 336), (500, 131), (3, 290), (900, 9)]
)
def test_an_image_is_padded_and_shrunk_to_the_same_bits_in_less_memory(
    size: tuple[int, int], resample: Image.Resampling
) -> None:
    noise = np.random.default_rng(sum(size)).integers(0, 256, (*size[::-1], 3), np.uint8)
    for side in (28, 336):
        square = {"shortest_edge": side}
        processor = LlavaImageProcessorPil(
            size=square, crop_size={"height": side, "width": side}, do_pad=True, resample=resample
        )
        image = Image.fromarray(noise)
        small = shrunk_square(image, side, tuple(int(mean * 255) for mean in processor.image_mean), resample)
        expected = processor([image], return_tensors="pt")["pixel_values"]
        assert small.size == (side, side)
        assert torch.equal(processor([small], return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("fit", ["pad", "crop"])
def test_collator_pixels_are_bit_identical_to_the_image_processor(
    tiny_llava: Path, make_questions: Callable[[int], list[Question]], fit: str
) -> None:
    collator = Llava(str(tiny_llava), image_fit=fit).collator
    questions = make_questions(8)
    images = [Image.open(path) for path in dict.fromkeys(str(question.image_path) for question in questions)]
    expected = collator.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(collator(list(map(Example, questions))).pixel_values, expected)


def test_tall_image_is_resized_with_bounded_memory(tiny_llava: Path, tmp_path: Path) -> None:
    """A square of the longer side would take 432 MB; a forked process measures its own peak memory."""
    Image.new("RGB", (700, 12_000), "red").save(tmp_path / "tall.png")
    collator = Llava(str(tiny_llava)).collator
    collator.pixels(Image.new("RGB", (100, 90)))
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def show() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        shape = tuple(collator.pixels(open_image(tmp_path / "tall.png", "1")).shape)
        sender.send((shape, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))

    process = fork.Process(target=show)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    shape, kilobytes = receiver.recv()
    assert shape == (1, 3, 28, 28)
    assert kilobytes < 200_000


def collators(tiny_llava: Path) -> list[FaultTolerantCollator]:
    """The collators of each kind of VLM."""
    vlms = (Llava(str(tiny_llava)), Transformers(str(tiny_llava), template="<image>{question}"))
    return [FaultTolerantCollator(collator) for collator in (*(vlm.collator for vlm in vlms), ServerCollator())]


def test_invalid_image_fails_only_its_own_questions(
    tiny_llava: Path, tmp_path: Path, make_questions: Callable[[int], list[Question]]
) -> None:
    bad = []
    for number, (name, (content, _)) in enumerate(REJECTED.items()):
        (tmp_path / name).write_bytes(content)
        bad.append(replace(make_questions(1)[0], id=f"bad/{number}", image_path=str(tmp_path / name)))
    good = make_questions(4)
    for collator in collators(tiny_llava):
        asked = collator([Example(question) for question in (*good[:2], *bad, *good[2:])])
        asked_about = [question.id for batch in asked.batches for question in batch.questions]
        assert asked_about == [question.id for question in good]
        assert [failure.id for failure in asked.failed] == [question.id for question in bad]
        assert all(failure.reason.startswith(f"{failure.id}: ") for failure in asked.failed)


def test_the_settings_reach_every_collator_and_are_in_the_manifest(tiny_llava: Path) -> None:
    black = ImageSettings(max_pixels=7, background="black")
    for make in (
        lambda **settings: Llava(str(tiny_llava), **settings),
        lambda **settings: Transformers(str(tiny_llava), template="<image>{question}", **settings),
        lambda **settings: Server("m", ["http://localhost:1/v1"], **settings),
    ):
        assert "images" not in make().describe()
        assert "images" not in make(images=ImageSettings(max_pixels=7, background="#fff")).describe()
        assert make(images=black).describe() == make().describe() | {"images": {"background": "black"}}
        collator = make(images=black).collator
        assert black in vars(collator).values()


# --- datasets --------------------------------------------------------------------------------------------------------


def test_the_hash_of_a_dataset_depends_on_every_images_content(
    tiny_sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_sets, tmp_path / "sets")
    folder = next(path.parent for path in (tmp_path / "sets").rglob("metadata.jsonl") if "unsafe" in str(path))
    first = UnsafeConcepts(str(folder)).describe()["images"]
    assert UnsafeConcepts(str(folder)).describe()["images"] == first
    file = sorted(path for path in folder.rglob("*") if path.suffix in IMAGE_ENDINGS)[0]
    content = file.read_bytes()
    file.write_bytes(spoiled(content, -1))  # of the same size
    assert UnsafeConcepts(str(folder)).describe()["images"] != first
    file.write_bytes(content)
    assert UnsafeConcepts(str(folder)).describe()["images"] == first


def test_animations_are_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["two.gif", "one.gif", "pages.tiff", "animation.png", "default_apart.png", "phone.jpg", "rgb8.png"]
    files: dict[str, Path] = {name: tmp_path / name for name in names}
    for name, path in files.items():
        path.write_bytes(DECODED[name][0])
    files["missing.gif"] = tmp_path / "missing.gif"
    files["pipe.gif"] = tmp_path / "pipe.gif"
    os.mkfifo(files["pipe.gif"])
    for _ in range(2):
        report_frames("Moving", files)
    assert capsys.readouterr().out == (
        "Moving: 4 of 9 images are animations or have several pages, for example two.gif: the model is shown the first "
        "frame\n"
    )
    report_frames("Still", {"one.gif": files["one.gif"]})
    assert capsys.readouterr().out == ""
    assert len(images_fingerprint(files)) == 16


def test_image_format_is_detected_from_content_and_not_from_the_file_name() -> None:
    kinds = {name: image_kind(content) for name, (content, _, _) in DECODED.items()}
    assert kinds["misnamed.png"] == kinds["phone.jpg"] == "jpeg"
    assert all(f".{kind}" in IMAGE_ENDINGS for kind in kinds.values())
    assert [image_kind(REJECTED[name][0]) for name in ("script.png", "icon.png", "portable.png", "text.png")] == [
        None
    ] * 4


def test_images_are_opened_in_one_place_with_an_explicit_list_of_formats() -> None:
    assert {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"} <= set(FORMATS) <= {*FORMATS, "AVIF"}
    root = Path(__file__).parents[2]
    opened = []
    for folder in ("safervlm", "callbacks", "scripts"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                    assert "formats" in {keyword.arg for keyword in node.keywords}, f"{path}, line {node.lineno}"
                    opened.append(path.name)
    assert set(opened) == {"images.py"}
