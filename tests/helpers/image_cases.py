"""Tables of image files: those that are decoded, with their pixels, and those that are rejected, with the reason."""

import struct
import zlib

import numpy as np
from image_files import (
    ALPHA,
    DEEP,
    DEEP_RGB,
    GREY,
    INDEX,
    INKS,
    LAB,
    LAB_BYTES,
    LINEAR_GREY,
    PALETTE,
    PLTE,
    PREMULTIPLIED,
    RANDOM,
    RGB,
    SMOOTH,
    SRGB,
    H,
    W,
    adobe_cmyk,
    animated,
    animated_png,
    animated_webp,
    bits16,
    bmp,
    channels,
    chunk,
    encoded,
    exif,
    framed,
    gif,
    gif_frame,
    iccp,
    jpeg,
    lab_rgb,
    mpo,
    naive_cmyk,
    on_white,
    over,
    packed,
    packed12,
    png,
    saved,
    stretched,
    swapped_profile,
    three,
    tiff,
    turned,
    ycck,
    ycck_pixels,
)
from PIL import Image, features

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
    "black_and_white.tif": (  # without the tag for the number of bits, whose default is one
        tiff(np.packbits(BITS[1], axis=1).tobytes(), W, H, {262: [1], 277: [1]}),
        three(BITS[1] * 255),
        0,
    ),
    "black_and_white_pillow.tif": (saved(Image.fromarray(BITS[1] > 0), "TIFF"), three(BITS[1] * 255), 0),
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
    "channels_apart.tif": (channels(RGB, {262: [2]}), RGB, 0),
    "channels_apart_alpha.tif": (channels(np.dstack([RGB, ALPHA]), {262: [2], 338: [2]}), over(RGB, ALPHA), 1),
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
    "default_apart.png": (animated_png(FLAT_RGB, 8, 2, 0, 0), RGB, 0),
    "default_apart_small.png": (
        animated_png(RGB[1:4, 2:5].reshape(3, -1), 8, 2, 3, 1),
        on_white(RGB[1:4, 2:5], 3, 1),
        0,
    ),
    "default_apart_alpha.png": (
        animated_png(np.dstack([RGB, ALPHA])[:2, :2].reshape(2, -1), 8, 6, 1, 3),
        on_white(over(RGB, ALPHA)[:2, :2], 1, 3),
        1,
    ),
    "default_apart_palette.png": (
        animated_png(INDEX[:, :2], 8, 3, 5, 0, before=PLTE + chunk(b"tRNS", b"\xff\0")),
        on_white(over(PALETTE[INDEX], np.where(INDEX == 1, 0, 255))[:, :2], 5, 0),
        0,
    ),
    "default_apart_profile.png": (
        animated_png(FLAT_RGB, 8, 2, 0, 0, before=iccp(swapped_profile(1.8))),
        encoded((RGB[..., [1, 0, 2]] / 255.0) ** 1.8),
        2,
    ),
    "default_apart_turned.png": (
        animated_png(RGB[:2, :3].reshape(2, -1), 8, 2, 4, 3, before=chunk(b"eXIf", exif(6)[6:])),
        turned(on_white(RGB[:2, :3], 4, 3), 6),
        0,
    ),
    "default_apart_turned_behind.png": (
        animated_png(RGB[:2, :3].reshape(2, -1), 8, 2, 4, 3, behind=chunk(b"eXIf", exif(8)[6:])),
        turned(on_white(RGB[:2, :3], 4, 3), 8),
        0,
    ),
    "animation_turned_behind.png": (
        animated("PNG")[:-12] + chunk(b"eXIf", exif(5)[6:]) + chunk(b"IEND", b""),
        turned(RGB, 5),
        0,
    ),
    "frame_outside.png": (animated_png(RGB[:2, :3].reshape(2, -1), 8, 2, 5, 0), np.zeros((H, W, 3), int), 0),
    "small_frame.webp": (
        animated_webp(("#c86432", "black"), 0x02, 2, 2, 4, 2),
        on_white(np.full((2, 4, 3), (200, 100, 50)), 2, 2),
        0,
    ),
    "small_frame_alpha.webp": (
        animated_webp(("#c86432", "black"), 0x12, 0, 4, 3, 1),
        on_white(np.full((1, 3, 3), (200, 100, 50)), 0, 4),
        0,
    ),
    "whole_frame.webp": (animated_webp(("#c86432", "black"), 0x02, 0, 0, W, H), np.full((H, W, 3), (200, 100, 50)), 0),
    "pages_of_two_sizes.tiff": (
        saved(Image.fromarray(RGB), "TIFF", save_all=True, append_images=[Image.new("L", (30, 40))]),
        RGB,
        0,
    ),
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
    "signed8.tif": (tiff(GREY.tobytes(), W, H, {258: [8], 262: [1], 277: [1], 339: [2]}), "signed integers"),
    "deep_channels_apart.tif": (channels(DEEP_RGB.astype("<u2"), {262: [2]}), "3 channels of 16 bits are stored in"),
    "alpha_apart.tif": (channels(np.dstack([GREY, ALPHA]), {262: [1], 338: [2]}), "2 channels of 8 bits are stored in"),
    "lab_apart.tif": (channels(LAB_BYTES.reshape(H, W, 3), {262: [8]}), "3 channels of 8 bits are stored in separate"),
    "channel_missing.tif": (channels(RGB, {262: [2], 273: [8], 279: [RGB.size]}), "no data for some of its rows"),
    "strip_too_short.tif": (
        tiff(FLAT_RGB.tobytes(), W, H, {258: [8] * 3, 262: [2], 277: [3], 278: [H - 1], 273: [8, 29], 279: [21, 84]}),
        "no data for some of its rows",
    ),
    "not_finite.tif": (tiff(np.full((1, 2), np.nan, "<f4").tobytes(), 2, 1, ONE_FLOAT), "nan"),
    "beyond_one.tif": (tiff(np.array([[0, 255]], "<f4").tobytes(), 2, 1, ONE_FLOAT), "from 0 to 255"),
    "transparent16.png": (png(bits16(DEEP_RGB), 16, 2, W, chunk(b"tRNS", bytes(6))), "16 bits per channel"),
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
