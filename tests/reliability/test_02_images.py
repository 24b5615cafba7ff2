"""Promise 2, images: the model sees what an image viewer shows, or the record is rejected in one line.

Every file is created in its test, mostly byte by byte. The expected pixels are computed from the values that were
written, not with Pillow.
"""

import ast
import base64
import contextlib
import io
import multiprocessing
import os
import re
import resource
import shutil
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from safervlm.data.embedded import decoded
from safervlm.data.unsafe_concepts import UnsafeConcepts
from safervlm.errors import ArgumentError, RecordError
from safervlm.io.image_hashes import images_fingerprint, report_frames
from safervlm.io.images import (
    FORMATS,
    IMAGE_ENDINGS,
    ImageSettings,
    decode,
    has_frames,
    image_file,
    image_kind,
    open_image,
)
from safervlm.measure import FaultTolerantCollator
from safervlm.records import Example, Question
from safervlm.vlm.auto import Transformers
from safervlm.vlm.llava import Llava, shrunk_square
from safervlm.vlm.server.batch import ServerCollator, data_url
from safervlm.vlm.server.client import Server

# --- files, byte by byte ----------------------------------------------------------------------------------------------


def chunk(name: bytes, content: bytes) -> bytes:
    """A chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(rows: np.ndarray, bits: int, kind: int, width: int, before: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG of packed rows.

    Args:
        rows: (H, bytes of a row).
        bits: bits per channel.
        kind: 0 greyscale, 2 RGB, 3 palette, 4 greyscale and alpha, 6 RGB and alpha.
        width: width in pixels.
        before: chunks before the pixels.
        behind: chunks after the pixels.
    """
    header = struct.pack(">IIBBBBB", width, len(rows), bits, kind, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    signature = b"\x89PNG\r\n\x1a\n"
    return signature + chunk(b"IHDR", header) + before + chunk(b"IDAT", pixels) + behind + chunk(b"IEND", b"")


def tiff(strip: bytes, width: int, height: int, tags: Mapping[int, Sequence[int]], order: str = "<") -> bytes:
    """An uncompressed TIFF of one strip; every tag holds 16-bit numbers."""
    entries = {256: [width], 257: [height], 259: [1], 273: [8], 278: [height], 279: [len(strip)]} | dict(tags)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(strip))
    directory, extra = struct.pack(f"{order}H", len(entries)), b""
    beyond = 8 + len(strip) + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        wide = tag in (273, 279)
        packed = struct.pack(f"{order}{len(values)}{'I' if wide else 'H'}", *values)
        if len(packed) > 4:
            extra, packed = extra + packed, struct.pack(f"{order}I", beyond + len(extra))
        directory += struct.pack(f"{order}HHI", tag, 4 if wide else 3, len(values)) + packed.ljust(4, b"\0")
    return head + strip + directory + b"\0\0\0\0" + extra


def bmp(rows: np.ndarray, bits: int, width: int, palette: bytes = b"") -> bytes:
    """A BMP, whose rows are stored bottom-up."""
    body = b"".join(row.tobytes().ljust(-(-len(row.tobytes()) // 4) * 4, b"\0") for row in rows[::-1])
    offset = 54 + len(palette)
    header = struct.pack("<IiiHHIIiiII", 40, width, len(rows), 1, bits, 0, len(body), 0, 0, len(palette) // 4, 0)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + header + palette + body


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """The bytes of an image saved by Pillow."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def exif(orientation: int) -> bytes:
    """EXIF data with an orientation only."""
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


RANDOM = np.random.default_rng(12)
H, W = 5, 7
GREY = RANDOM.integers(0, 256, (H, W), np.uint8)
RGB = RANDOM.integers(0, 256, (H, W, 3), np.uint8)
ALPHA = RANDOM.integers(0, 256, (H, W), np.uint8)
ALPHA[0, :2] = 0, 255
DEEP = RANDOM.integers(0, 65536, (H, W), np.uint16)
DEEP_RGB = RANDOM.integers(0, 65536, (H, W, 3), np.uint16)
SMOOTH = np.stack(np.meshgrid(np.linspace(20, 220, 24), np.linspace(220, 30, 16)), -1)
SMOOTH = np.dstack([SMOOTH, SMOOTH.mean(-1)]).astype(np.uint8)  # (16, 24, 3), which JPEG reproduces within a few levels
INDEX = np.arange(H * W, dtype=np.uint8).reshape(H, W) % 16
PALETTE = RANDOM.integers(0, 256, (16, 3), np.uint8)
PLTE = chunk(b"PLTE", PALETTE.tobytes())


def three(grey: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3)."""
    return np.repeat(grey[..., None], 3, -1)


def over(colours: np.ndarray, alpha: np.ndarray, background: Sequence[int] = (255, 255, 255)) -> np.ndarray:
    """Colours composited on a background, rounded to the nearest level."""
    share = alpha[..., None] / 255
    return np.rint(colours * share + np.array(background) * (1 - share)).astype(int)


def stretched(grey: np.ndarray, most: int) -> np.ndarray:
    """Converts greyscale of another depth to 8 bits."""
    return three(np.rint(grey.astype(float) * 255 / most).astype(int))


def naive_cmyk(inks: np.ndarray) -> np.ndarray:
    """Converts CMYK (255 is full ink) without a profile."""
    return np.rint((255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255).astype(int)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels after applying an EXIF orientation, as defined by the standard (CIPA DC-008)."""
    return {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: p[::-1].swapaxes(0, 1),
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: p[:, ::-1].swapaxes(0, 1),
    }[orientation](pixels)


def lab_rgb(lab: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (D50) -> sRGB by the formulas of the CIE, Bradford and IEC 61966-2-1."""
    light, a, b = (lab[..., axis].astype(float) for axis in range(3))
    y = (light + 16) / 116
    cube = np.stack([y + a / 500, y, y - b / 200], -1)
    xyz = np.where(cube > 6 / 29, cube**3, 3 * (6 / 29) ** 2 * (cube - 4 / 29)) * [0.9642, 1.0, 0.8249]
    to_linear = [[3.1339, -1.6169, -0.4906], [-0.9788, 1.9161, 0.0335], [0.0719, -0.2290, 1.4052]]
    return encoded(xyz @ np.array(to_linear).T)


def encoded(linear: np.ndarray) -> np.ndarray:
    """Linear light -> sRGB levels."""
    linear = linear.clip(0, 1)
    return np.rint(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)).astype(int)


def s15(value: float) -> bytes:
    """A number of an ICC profile."""
    return struct.pack(">i", round(value * 65536))


def profile(space: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """A version 2 display profile."""
    head = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", head + len(body), len(content))
        body += content.ljust(-(-len(content) // 4) * 4, b"\0")
    size = head + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02100000, b"mntr", space, b"XYZ ") + b"\0" * 12 + b"acsp"
    header += b"\0" * 28 + s15(0.9642) + s15(1.0) + s15(0.8249)
    return header.ljust(128, b"\0") + table + body


def curve(gamma: float) -> bytes:
    """A tone curve."""
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def xyz(*values: float) -> bytes:
    """A colour."""
    return b"XYZ \0\0\0\0" + b"".join(map(s15, values))


TEXT = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + b"\0" * 78
COMMON = {b"desc": TEXT, b"cprt": b"text\0\0\0\0none\0", b"wtpt": xyz(0.9642, 1.0, 0.8249)}
SRGB_D50 = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])


def swapped_profile(gamma: float) -> bytes:
    """A profile whose red is sRGB's green, whose green is sRGB's red, and whose tone curve is a power."""
    red, green, blue = (xyz(*SRGB_D50[:, axis]) for axis in (1, 0, 2))
    curves = {name: curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return profile(b"RGB ", COMMON | {b"rXYZ": red, b"gXYZ": green, b"bXYZ": blue} | curves)


def iccp(content: bytes) -> bytes:
    """The chunk of a PNG with an ICC profile."""
    return chunk(b"iCCP", b"test\0\0" + zlib.compress(content))


LINEAR_GREY = profile(b"GRAY", COMMON | {b"kTRC": curve(1.0)})
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
INKS = np.broadcast_to(RANDOM.integers(0, 256, (1, 1, 4), np.uint8), (16, 16, 4)).copy()  # one colour, for JPEG
LAB = np.dstack([GREY * 100.0 / 255, (RGB[..., 0] % 60) - 30.0, (RGB[..., 1] % 60) - 30.0])
LAB_BYTES = np.dstack([GREY, (LAB[..., 1:]).astype(np.int8).view(np.uint8)])
PREMULTIPLIED = (RGB.astype(int) * ALPHA[..., None] // 255).astype(np.uint8)
GIF_HEAD = b"GIF89a" + struct.pack("<HHBBB", 4, 3, 0x80, 0, 0) + bytes([9, 8, 7, 200, 100, 50])


def gif_frame(left: int, top: int, width: int, height: int, index: int, transparent: bool = False) -> bytes:
    """A frame of one colour of a GIF of two colours; LZW without a code longer than 3 bits."""
    control = b"\x21\xf9\x04" + bytes([1 if transparent else 0]) + b"\x0a\0" + b"\0\0"
    bits = "".join(f"{code:03b}"[::-1] for _ in range(width * height) for code in (4, index)) + f"{5:03b}"[::-1]
    packed = bytes(int(bits[at : at + 8].ljust(8, "0")[::-1], 2) for at in range(0, len(bits), 8))
    blocks = b"".join(bytes([len(packed[at : at + 255])]) + packed[at : at + 255] for at in range(0, len(packed), 255))
    return control + b"\x2c" + struct.pack("<HHHHB", left, top, width, height, 0) + b"\x02" + blocks + b"\0"


def gif(*frames: bytes) -> bytes:
    """A GIF of 4 x 3 pixels; colour 0 is (9, 8, 7), colour 1 (200, 100, 50)."""
    return GIF_HEAD + b"".join(frames) + b"\x3b"


def framed(colour: Sequence[int], box: Sequence[int]) -> np.ndarray:
    """White but for a box (left, top, right, bottom) of a GIF of 4 x 3 pixels."""
    pixels = np.full((3, 4, 3), 255)
    pixels[box[1] : box[3], box[0] : box[2]] = colour
    return pixels


def packed(values: np.ndarray, bits: int) -> np.ndarray:
    """(H, W) values of a few bits -> (H, bytes)."""
    unpacked = np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :].reshape(len(values), -1)
    return np.packbits(unpacked, axis=-1)


def jpeg(pixels: np.ndarray, **options: object) -> bytes:
    """A JPEG of the highest quality."""
    return saved(Image.fromarray(pixels), "JPEG", quality=98, subsampling=0, **options)


def adobe_cmyk() -> bytes:
    """A CMYK JPEG as Adobe writes it: inverted, with its marker. Pillow does the same when it saves CMYK."""
    content = saved(Image.frombytes("CMYK", (16, 16), INKS.tobytes()), "JPEG", quality=98)
    assert b"Adobe" in content
    return content


def ycck() -> bytes:
    """The same pixels as :func:`adobe_cmyk` but marked as YCCK: the first three channels are then a YCbCr."""
    content = bytearray(adobe_cmyk())
    content[content.index(b"Adobe") + 11] = 2
    return bytes(content)


def ycck_pixels() -> np.ndarray:
    """Converts YCCK: YCbCr of the inverted inks -> inverted inks -> RGB without a profile."""
    y, cb, cr, k = (255.0 - INKS[0, 0]).tolist()
    inverted = [y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)]
    inks = np.array([*np.clip(inverted, 0, 255), 255 - k])
    return np.broadcast_to(naive_cmyk(inks[None, None]), (16, 16, 3))


def packed12(values: np.ndarray) -> bytes:
    """12-bit values of rows of an even length, two in three bytes."""
    first, second = values[:, ::2], values[:, 1::2]
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8).tobytes()


def bits16(values: np.ndarray) -> np.ndarray:
    """Rows of big-endian 16-bit values."""
    return values.astype(">u2").reshape(len(values), -1).view(np.uint8)


def mpo(orientation: int) -> bytes:
    """Two JPEGs in one file, as phones write them."""
    first, second = Image.fromarray(SMOOTH), Image.fromarray(255 - SMOOTH)
    options = {"save_all": True, "append_images": [second], "quality": 98, "subsampling": 0}
    return saved(first, "MPO", exif=exif(orientation), **options)


def animated(kind: str, **options: object) -> bytes:
    """Two frames, the second one black."""
    frames = [Image.fromarray(RGB), Image.fromarray(np.zeros_like(RGB))]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)


# --- what is decoded --------------------------------------------------------------------------------------------------

FLAT_RGB, FLAT_RGBA = RGB.reshape(H, -1), np.dstack([RGB, ALPHA]).reshape(H, -1)
SEE_THROUGH = np.array([0, 128, 255, 64] * 4, np.uint8)
BITS = {1: GREY >> 7, 2: GREY >> 6, 4: GREY >> 4}
FLOATS = RANDOM.random((H, W), np.float32)
FLOATS[0, :2] = 0, 1
INKS_FLAT = RANDOM.integers(0, 256, (H, W, 4), np.uint8)
COLOUR_MAP = (PALETTE.T.astype(int) * 257).ravel().tolist()
BMP_PALETTE = np.pad(PALETTE[:, ::-1], ((0, 0), (0, 1))).tobytes()
LONGS = RANDOM.integers(0, 2**32, (H, W), np.uint32)
ODD = int(GREY[2, 3])  # a value that tRNS makes transparent

# name -> (the file, the pixels, by how many levels they may differ)
DECODED: dict[str, tuple[bytes, np.ndarray, int]] = {
    "grey1.png": (png(packed(BITS[1], 1), 1, 0, W), stretched(BITS[1], 1), 0),
    "grey2.png": (png(packed(BITS[2], 2), 2, 0, W), stretched(BITS[2], 3), 0),
    "grey4.png": (png(packed(BITS[4], 4), 4, 0, W), stretched(BITS[4], 15), 0),
    "grey8.png": (png(GREY, 8, 0, W), three(GREY), 0),
    "grey16.png": (png(bits16(DEEP), 16, 0, W), stretched(DEEP, 65535), 1),
    "grey16_of_8.png": (png(bits16(GREY * np.uint16(257)), 16, 0, W), three(GREY), 0),
    "grey16_dark.png": (png(bits16(DEEP >> 8), 16, 0, W), stretched(DEEP >> 8, 65535), 1),
    "rgb8.png": (png(FLAT_RGB, 8, 2, W), RGB, 0),
    "rgb16.png": (png(bits16(DEEP_RGB), 16, 2, W), np.rint(DEEP_RGB / 257.0).astype(int), 1),
    "palette4.png": (png(packed(INDEX, 4), 4, 3, W, PLTE), PALETTE[INDEX], 0),
    "palette8.png": (png(INDEX, 8, 3, W, PLTE), PALETTE[INDEX], 0),
    "grey_alpha8.png": (png(np.dstack([GREY, ALPHA]).reshape(H, -1), 8, 4, W), over(three(GREY), ALPHA), 1),
    "grey_alpha16.png": (
        png(bits16(np.dstack([DEEP, ALPHA * np.uint16(257)])), 16, 4, W),
        over(three(DEEP) / 257.0, ALPHA),
        1,
    ),
    "rgba8.png": (png(FLAT_RGBA, 8, 6, W), over(RGB, ALPHA), 1),
    "rgba16.png": (
        png(bits16(np.dstack([DEEP_RGB, ALPHA * np.uint16(257)])), 16, 6, W),
        over(DEEP_RGB / 257.0, ALPHA),
        1,
    ),
    "grey1_transparent.png": (
        png(packed(BITS[1], 1), 1, 0, W, chunk(b"tRNS", b"\0\0")),
        np.full((H, W, 3), 255),
        0,
    ),
    "grey2_transparent.png": (
        png(packed(BITS[2], 2), 2, 0, W, chunk(b"tRNS", b"\0\1")),
        over(stretched(BITS[2], 3), np.where(BITS[2] == 1, 0, 255)),
        0,
    ),
    "grey8_transparent.png": (
        png(GREY, 8, 0, W, chunk(b"tRNS", struct.pack(">H", ODD))),
        over(three(GREY), np.where(GREY == ODD, 0, 255)),
        0,
    ),
    "grey16_transparent.png": (
        png(bits16(DEEP), 16, 0, W, chunk(b"tRNS", struct.pack(">H", DEEP[1, 1]))),
        over(stretched(DEEP, 65535), np.where(DEEP[1, 1] == DEEP, 0, 255)),
        1,
    ),
    "rgb8_transparent.png": (
        png(FLAT_RGB, 8, 2, W, chunk(b"tRNS", struct.pack(">HHH", *RGB[3, 3]))),
        over(RGB, np.where((RGB[3, 3] == RGB).all(-1), 0, 255)),
        0,
    ),
    "palette_one_transparent.png": (
        png(INDEX, 8, 3, W, PLTE + chunk(b"tRNS", b"\xff\xff\0")),
        over(PALETTE[INDEX], np.where(INDEX == 2, 0, 255)),
        0,
    ),
    "palette_alpha.png": (
        png(INDEX, 8, 3, W, PLTE + chunk(b"tRNS", SEE_THROUGH.tobytes())),
        over(PALETTE[INDEX], SEE_THROUGH[INDEX]),
        1,
    ),
    "orientation_before.png": (
        png(FLAT_RGB, 8, 2, W, chunk(b"eXIf", exif(6)[6:])),
        turned(RGB, 6),
        0,
    ),
    "orientation_behind.png": (
        png(FLAT_RGB, 8, 2, W, b"", chunk(b"eXIf", exif(8)[6:])),
        turned(RGB, 8),
        0,
    ),
    "profile_srgb.png": (png(FLAT_RGB, 8, 2, W, iccp(SRGB)), RGB, 0),
    "profile_swapped.png": (
        png(FLAT_RGB, 8, 2, W, iccp(swapped_profile(1.8))),
        encoded((RGB[..., [1, 0, 2]] / 255.0) ** 1.8),
        2,
    ),
    "profile_swapped_alpha.png": (
        png(FLAT_RGBA, 8, 6, W, iccp(swapped_profile(1.8))),
        over(encoded((RGB[..., [1, 0, 2]] / 255.0) ** 1.8), ALPHA),
        2,
    ),
    "profile_swapped_palette.png": (
        png(INDEX, 8, 3, W, iccp(swapped_profile(1.0)) + PLTE),
        encoded(PALETTE[INDEX][..., [1, 0, 2]] / 255.0),
        2,
    ),
    "profile_grey.png": (png(GREY, 8, 0, W, iccp(LINEAR_GREY)), encoded(three(GREY) / 255.0), 2),
    "profile_of_grey_in_colour.png": (png(FLAT_RGB, 8, 2, W, iccp(LINEAR_GREY)), RGB, 0),
    "profile_damaged.png": (png(FLAT_RGB, 8, 2, W, iccp(swapped_profile(1.0)[:150])), RGB, 0),
    "profile_nonsense.png": (png(FLAT_RGB, 8, 2, W, iccp(b"no profile")), RGB, 0),
    "colours.jpg": (jpeg(SMOOTH), SMOOTH, 6),
    "grey.jfif": (jpeg(SMOOTH[..., 2]), three(SMOOTH[..., 2]), 6),
    "inks.jpg": (adobe_cmyk(), np.broadcast_to(naive_cmyk(INKS), (16, 16, 3)), 4),
    "ycck.jpg": (ycck(), ycck_pixels(), 4),
    "profile.jpg": (
        jpeg(SMOOTH, icc_profile=swapped_profile(1.0)),
        encoded(SMOOTH[..., [1, 0, 2]] / 255.0),
        18,  # the tone curve amplifies JPEG's errors
    ),
    "phone.jpg": (mpo(6), turned(SMOOTH, 6), 6),
    "exif_damaged.jpg": (jpeg(SMOOTH, exif=b"Exif\0\0MM\0*\0\0\xff\xff"), SMOOTH, 6),
    "exif_unknown.jpg": (jpeg(SMOOTH, exif=exif(77)), SMOOTH, 6),
    **{f"orientation{n}.jpg": (jpeg(SMOOTH, exif=exif(n)), turned(SMOOTH, n), 6) for n in range(1, 9)},
    "white_is_zero1.tif": (
        tiff(packed(BITS[1], 1).tobytes(), W, H, {258: [1], 262: [0], 277: [1]}),
        255 - stretched(BITS[1], 1),
        0,
    ),
    "white_is_zero8.tif": (tiff(GREY.tobytes(), W, H, {258: [8], 262: [0], 277: [1]}), 255 - three(GREY), 0),
    "white_is_zero16.tif": (
        tiff(DEEP.astype("<u2").tobytes(), W, H, {258: [16], 262: [0], 277: [1]}),
        255 - stretched(DEEP, 65535),
        1,
    ),
    "grey16.tif": (
        tiff(DEEP.astype("<u2").tobytes(), W, H, {258: [16], 262: [1], 277: [1]}),
        stretched(DEEP, 65535),
        1,
    ),
    "grey16_big_endian.tiff": (
        tiff(DEEP.astype(">u2").tobytes(), W, H, {258: [16], 262: [1], 277: [1]}, ">"),
        stretched(DEEP, 65535),
        1,
    ),
    "grey16_deflate.tif": (
        saved(Image.fromarray(DEEP), "TIFF", compression="tiff_adobe_deflate"),
        stretched(DEEP, 65535),
        1,
    ),
    "grey12.tif": (
        tiff(packed12(DEEP[:, : W - 1] >> 4), W - 1, H, {258: [12], 262: [1], 277: [1]}),
        stretched(DEEP[:, : W - 1] >> 4, 4095),
        1,
    ),
    "grey32.tif": (
        tiff(LONGS.astype("<u4").tobytes(), W, H, {258: [32], 262: [1], 277: [1], 339: [1]}),
        stretched(LONGS, 2**32 - 1),
        1,
    ),
    "float.tif": (
        tiff(FLOATS.astype("<f4").tobytes(), W, H, {258: [32], 262: [1], 277: [1], 339: [3]}),
        three(np.rint(FLOATS * 255).astype(int)),
        1,
    ),
    "float_big_endian.tif": (
        tiff(FLOATS.astype(">f4").tobytes(), W, H, {258: [32], 262: [1], 277: [1], 339: [3]}, ">"),
        three(np.rint(FLOATS * 255).astype(int)),
        1,
    ),
    "rgb16.tif": (
        tiff(DEEP_RGB.astype("<u2").tobytes(), W, H, {258: [16] * 3, 262: [2], 277: [3]}),
        np.rint(DEEP_RGB / 257.0).astype(int),
        1,
    ),
    "inks.tif": (tiff(INKS_FLAT.tobytes(), W, H, {258: [8] * 4, 262: [5], 277: [4]}), naive_cmyk(INKS_FLAT), 1),
    "inks16.tif": (
        tiff((INKS_FLAT * np.uint16(257)).astype("<u2").tobytes(), W, H, {258: [16] * 4, 262: [5], 277: [4]}),
        naive_cmyk(INKS_FLAT),
        1,
    ),
    "lab.tif": (tiff(LAB_BYTES.tobytes(), W, H, {258: [8] * 3, 262: [8], 277: [3]}), lab_rgb(LAB), 3),
    "palette.tif": (
        tiff(packed(INDEX, 4).tobytes(), W, H, {258: [4], 262: [3], 277: [1], 320: COLOUR_MAP}),
        PALETTE[INDEX],
        0,
    ),
    "alpha.tif": (
        tiff(FLAT_RGBA.tobytes(), W, H, {258: [8] * 4, 262: [2], 277: [4], 338: [2]}),
        over(RGB, ALPHA),
        1,
    ),
    "premultiplied.tif": (
        tiff(np.dstack([PREMULTIPLIED, ALPHA]).tobytes(), W, H, {258: [8] * 4, 262: [2], 277: [4], 338: [1]}),
        PREMULTIPLIED.astype(int) + 255 - ALPHA[..., None].astype(int),
        2,
    ),
    "grey_premultiplied.tif": (
        tiff(np.dstack([PREMULTIPLIED[..., 0], ALPHA]).tobytes(), W, H, {258: [8] * 2, 262: [1], 277: [2], 338: [1]}),
        three(PREMULTIPLIED[..., 0]).astype(int) + 255 - ALPHA[..., None].astype(int),
        2,
    ),
    "not_alpha.tif": (tiff(FLAT_RGBA.tobytes(), W, H, {258: [8] * 4, 262: [2], 277: [4], 338: [0]}), RGB, 0),
    "orientation.tif": (
        tiff(FLAT_RGB.tobytes(), W, H, {258: [8] * 3, 262: [2], 277: [3], 274: [6]}),
        turned(RGB, 6),
        0,
    ),
    "orientation_lzw.tif": (
        saved(Image.fromarray(RGB), "TIFF", compression="tiff_lzw", tiffinfo={274: 8}),
        turned(RGB, 8),
        0,
    ),
    "pages.tiff": (animated("TIFF"), RGB, 0),
    "palette1.bmp": (bmp(packed(BITS[1], 1), 1, W, BMP_PALETTE[:8]), PALETTE[BITS[1]], 0),
    "palette8.bmp": (bmp(INDEX, 8, W, BMP_PALETTE.ljust(1024, b"\0")), PALETTE[INDEX], 0),
    "colours.bmp": (bmp(RGB[..., ::-1].reshape(H, -1), 24, W), RGB, 0),
    "unused_byte.bmp": (bmp(np.dstack([RGB[..., ::-1], ALPHA]).reshape(H, -1), 32, W), RGB, 0),
    "one.gif": (gif(gif_frame(0, 0, 4, 3, 1)), framed((200, 100, 50), (0, 0, 4, 3)), 0),
    "two.gif": (
        gif(gif_frame(0, 0, 4, 3, 1), gif_frame(0, 0, 4, 3, 0)),
        framed((200, 100, 50), (0, 0, 4, 3)),
        0,
    ),
    "transparent.gif": (gif(gif_frame(0, 0, 4, 3, 0, True)), framed((0, 0, 0), (0, 0, 0, 0)), 0),
    "small_frame.gif": (gif(gif_frame(1, 1, 2, 2, 1)), framed((200, 100, 50), (1, 1, 3, 3)), 0),
    "small_transparent.gif": (gif(gif_frame(1, 1, 2, 2, 1, True)), framed((200, 100, 50), (1, 1, 3, 3)), 0),
    "animation.png": (animated("PNG"), RGB, 0),
    "colours.webp": (saved(Image.fromarray(RGB), "WEBP", lossless=True), RGB, 0),
    "alpha.webp": (saved(Image.fromarray(np.dstack([RGB, ALPHA])), "WEBP", lossless=True), over(RGB, ALPHA), 1),
    "orientation.webp": (saved(Image.fromarray(RGB), "WEBP", lossless=True, exif=exif(3)), turned(RGB, 3), 0),
    "animation.webp": (animated("WEBP", lossless=True), RGB, 0),
    "misnamed.png": (jpeg(SMOOTH), SMOOTH, 6),
}
if features.check("avif"):
    AVIF = {"quality": 100, "subsampling": "4:4:4"}
    DECODED |= {
        "colours.avif": (saved(Image.fromarray(SMOOTH), "AVIF", **AVIF), SMOOTH, 6),
        "orientation.avif": (saved(Image.fromarray(SMOOTH), "AVIF", exif=exif(6), **AVIF), turned(SMOOTH, 6), 6),
    }


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


def test_transparency_shows_the_background_that_is_asked_for(tmp_path: Path) -> None:
    for name, colour in (("black", (0, 0, 0)), ("#0a64c8", (10, 100, 200))):
        settings = ImageSettings(background=name)
        for file in ("rgba8.png", "small_frame.gif", "grey8_transparent.png"):
            (tmp_path / file).write_bytes(DECODED[file][0])
        seen = np.asarray(open_image(tmp_path / "rgba8.png", "1", settings), int)
        assert np.abs(seen - over(RGB, ALPHA, colour)).max() <= 1
        assert open_image(tmp_path / "small_frame.gif", "1", settings).getpixel((0, 0)) == colour
        assert open_image(tmp_path / "grey8_transparent.png", "1", settings).getpixel((3, 2)) == colour


def test_a_profile_of_inks_decides_their_colours(tmp_path: Path) -> None:
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


# --- what is rejected -------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header declares a large image, with a few bytes of data."""
    return png(np.zeros((1, 1), np.uint8), 8, 2, width).replace(
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, 8, 2, 0, 0, 0)),
        chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
    )


def spoiled(content: bytes, at: int, by: int = 255) -> bytes:
    """Changes one byte; a negative position counts from the end."""
    changed = bytearray(content)
    changed[at] ^= by
    return bytes(changed)


RGB_PNG, JPEG, GIF = DECODED["rgb8.png"][0], DECODED["colours.jpg"][0], DECODED["one.gif"][0]
WEBP, TIFF, BMP = DECODED["colours.webp"][0], DECODED["rgb16.tif"][0], DECODED["colours.bmp"][0]
SIGNED = tiff(DEEP.astype("<i2").tobytes(), W, H, {258: [16], 262: [1], 277: [1], 339: [2]})
ONE_FLOAT = {258: [32], 262: [1], 277: [1], 339: [3]}
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 40
ICO = b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + struct.pack("<II", len(RGB_PNG), 22) + RGB_PNG
# name -> (the file, the error line)
REJECTED: dict[str, tuple[bytes, str]] = {
    "empty.png": (b"", "is empty"),
    "text.png": (b"no image", "is not an image"),
    "heic.jpg": (HEIC, r"is not an image .* but HEIC"),
    "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", r"is not an image .* but SVG"),
    "page.jpg": (b"<!DOCTYPE html><title>404</title>", r"is not an image .* but a web page"),
    "page2.jpg": (b"\xef\xbb\xbf\n<html>", r"is not an image .* but a web page"),
    "paper.jpg": (b"%PDF-1.7\n", r"is not an image .* but a PDF"),
    "script.png": (EPS, r"is not an image .* but PostScript"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "layers.png": (b"8BPS\0\1" + b"\0" * 40, "a Photoshop file"),
    "icon.png": (ICO, "is not an image"),
    "portable.png": (b"P6 1 1 255\n\1\2\3", "is not an image"),
    "meta.png": (b"\xd7\xcd\xc6\x9a" + b"\0" * 80, "is not an image"),
    "zeros.jpg": (b"\0" * 1000, "is not an image"),
    "signature.png": (RGB_PNG[:8], "not an image|damaged"),
    "header.png": (RGB_PNG[:30], "not an image|damaged"),
    "cut.png": (RGB_PNG[:-30], "damaged"),
    "cut_end.png": (RGB_PNG[:-12], "damaged"),
    "flipped_pixels.png": (spoiled(RGB_PNG, 60), "damaged"),
    "flipped_checksum.png": (spoiled(RGB_PNG, RGB_PNG.index(b"IEND") - 5), "damaged"),
    "unknown_filter.png": (
        RGB_PNG[:33] + chunk(b"IDAT", zlib.compress((b"\x09" + b"\0" * 3 * W) * H)) + chunk(b"IEND", b""),
        "damaged",
    ),
    "few_rows.png": (RGB_PNG[:33] + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b""), "damaged"),
    "no_palette.png": (png(INDEX, 8, 3, W), "damaged"),
    "no_width.png": (png(np.zeros((1, 0), np.uint8), 8, 0, 0), "damaged|not an image"),
    "text_bomb.png": (
        png(FLAT_RGB, 8, 2, W, chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(9_000_000)))),
        "damaged",
    ),
    "cut.jpg": (JPEG[: len(JPEG) // 2], "damaged"),
    "head.jpg": (JPEG[:12], "not an image|damaged"),
    "no_tables.jpg": (JPEG.replace(b"\xff\xdb", b"\xff\xfe"), "damaged"),
    "cut.gif": (GIF[:40], "not an image|damaged"),
    "head.gif": (GIF[:13], "not an image|damaged"),
    "cut.webp": (WEBP[:-20], "not an image|damaged"),
    "flipped.webp": (spoiled(WEBP, 16, 0x7F), "not an image|damaged"),
    "cut.tif": (TIFF[:60], "not an image|damaged"),
    "short_strip.tif": (tiff(GREY[:2].tobytes(), W, H, {258: [8], 262: [1], 277: [1]}), "damaged"),
    "one_strip_missing.tif": (tiff(GREY.tobytes(), W, H, {258: [8], 262: [1], 277: [1], 278: [2]}), "damaged"),
    "no_size.tif": (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "not an image|damaged"),
    "loop.tif": (b"II*\0\x08\0\0\0\0\0\x08\0\0\0", "not an image|damaged"),
    "signed.tif": (SIGNED, "signed integers"),
    "signed32.tif": (saved(Image.fromarray(LONGS.view(np.int32)), "TIFF"), "signed integers"),
    "not_finite.tif": (tiff(np.full((1, 2), np.nan, "<f4").tobytes(), 2, 1, ONE_FLOAT), "nan"),
    "beyond_one.tif": (tiff(np.array([[0, 255]], "<f4").tobytes(), 2, 1, ONE_FLOAT), "from 0 to 255"),
    "transparent16.png": (png(bits16(DEEP_RGB), 16, 2, W, chunk(b"tRNS", bytes(6))), "16 bits a channel"),
    "cut.bmp": (BMP[:70], "damaged"),
    "long.png": (bomb(60_000, 2), r"60000 x 2: .* more than .*vlm\.images\.max_side"),
    "thin.png": (bomb(3, 900), r"3 x 900: 300 times .* more than 100.*vlm\.images\.max_aspect_ratio"),
    "many.png": (bomb(10_000, 9_000), r"90000000 pixels.*vlm\.images\.max_pixels|too large .*max_pixels"),
    "bomb.png": (bomb(60_000, 60_000), r"too large .*vlm\.images\.max_pixels"),
    "most.png": (bomb(2**31 - 1, 2**31 - 1), r"too large .*vlm\.images\.max_pixels"),
    "bomb.gif": (GIF[:6] + struct.pack("<HH", 65535, 65535) + GIF[10:], "too large"),
    "frame_bomb.gif": (
        gif(gif_frame(0, 0, 1, 1, 0).replace(struct.pack("<HH", 1, 1), b"\xff\xff\xff\xff")),
        "too large",
    ),
    "bomb.bmp": (BMP[:18] + struct.pack("<ii", 60_000, 60_000) + BMP[26:], "too large"),
    "bomb.tif": (tiff(b"\0\0", 65_000, 65_000, {258: [8], 262: [1], 277: [1]}), "too large"),
}


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
def test_what_can_not_be_shown_is_rejected_in_one_line(
    tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    content, reason = REJECTED[name]
    (tmp_path / name).write_bytes(content)
    line = rejection(tmp_path / name)
    assert str(tmp_path / name) in line
    assert re.search(reason, line), line
    assert "replace" in line or "raise vlm.images." in line
    assert capfd.readouterr() == ("", "")


def test_every_byte_that_is_missing_or_changed_is_a_rejection_or_the_same_size(tmp_path: Path) -> None:
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
def test_a_large_image_in_a_table_is_bounded_by_the_users_setting_alone(
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
def test_a_large_animation_is_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    "folder": (made_folder, "no regular file"),
    "pipe": (made_pipe, "no regular file"),
    "loop": (lambda path: made_link(path, path.name), "can't be read"),
    "link to nothing": (lambda path: made_link(path, "gone"), "missing"),
    "link to a device": (lambda path: made_link(path, "/dev/zero"), "no regular file"),
    "device": (lambda path: Path("/dev/zero"), "no regular file"),
    "missing": (lambda path: path, "missing"),
    "below a file": (lambda path: made_unreadable(path) / "x.png", "can't be read"),
    "long name": (lambda path: path.with_name("x" * 300), "can't be read"),
    "null character": (lambda path: path.with_name("x\0.png"), "can't be read"),
    "line break": (lambda path: path.with_name("x\ny\x1b[2J.png"), "missing"),
}


@pytest.mark.parametrize("name", PLACES)
def test_only_regular_files_are_opened(tmp_path: Path, name: str) -> None:
    make, reason = PLACES[name]
    assert reason in rejection(make(tmp_path / "x.png"))


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
def test_a_bound_is_an_argument_and_holds_exactly(
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


def test_a_bound_above_pillows_own_holds(tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    (tmp_path / "x.png").write_bytes(bomb(20_000, 9_000))
    line = rejection(tmp_path / "x.png", ImageSettings(max_pixels=200_000_000))
    assert "damaged" in line  # an image that was decoded and has no pixels
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_bounds_are_checked() -> None:
    for name in ("max_pixels", "max_side", "max_aspect_ratio", "max_bytes"):
        for value in (0, -3, float("nan")):
            with pytest.raises(ArgumentError, match=rf"^vlm\.images\.{name}: at least 1, got {value}"):
                ImageSettings(**{name: value})
    for colour in ("whiteish", "", "#12345", "#ff00ff80", "rgba(1,2,3,4)"):
        with pytest.raises(ArgumentError, match=r"^vlm\.images\.background: .* got "):
            ImageSettings(background=colour)


def test_memory_that_runs_out_is_a_rejection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_bytes(RGB_PNG)

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("safervlm.io.images.to_srgb", full)
    assert "doesn't fit into memory" in rejection(tmp_path / "x.png")


def test_another_library_can_not_make_it_take_truncated_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.ImageFile.LOAD_TRUNCATED_IMAGES", True)
    (tmp_path / "x.jpg").write_bytes(JPEG[: len(JPEG) // 2])
    assert "damaged" in rejection(tmp_path / "x.jpg")


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
def test_the_collator_returns_the_processors_bits(
    tiny_llava: Path, make_questions: Callable[[int], list[Question]], fit: str
) -> None:
    collator = Llava(str(tiny_llava), image_fit=fit).collator
    questions = make_questions(8)
    images = [Image.open(path) for path in dict.fromkeys(str(question.image_path) for question in questions)]
    expected = collator.image_processor(images, return_tensors="pt")["pixel_values"]
    assert torch.equal(collator(list(map(Example, questions))).pixel_values, expected)


def test_a_tall_screenshot_is_shown_in_little_memory(tiny_llava: Path, tmp_path: Path) -> None:
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


def test_one_bad_image_costs_its_own_questions_alone(
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
    names = ["two.gif", "one.gif", "pages.tiff", "animation.png", "animation.webp", "phone.jpg", "rgb8.png"]
    files: dict[str, Path] = {name: tmp_path / name for name in names}
    for name, path in files.items():
        path.write_bytes(DECODED[name][0])
    files["missing.gif"] = tmp_path / "missing.gif"
    files["pipe.gif"] = made_pipe(tmp_path / "pipe.gif")
    for _ in range(2):
        report_frames("Moving", files)
    assert capsys.readouterr().out == (
        "Moving: 4 of 9 images are animations or have several pages, for example two.gif: the model is shown the first "
        "frame\n"
    )
    report_frames("Still", {"one.gif": files["one.gif"]})
    assert capsys.readouterr().out == ""
    assert len(images_fingerprint(files)) == 16


def test_the_kind_of_an_image_is_its_contents() -> None:
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
