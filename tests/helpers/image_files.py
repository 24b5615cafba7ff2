"""Image files of all formats, written byte by byte, and the pixels that they must be decoded to."""

import io
import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageCms


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
    """An uncompressed TIFF of one strip, or of those that begin at 273 and have the lengths 279."""
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


def channels(pixels: np.ndarray, tags: Mapping[int, Sequence[int]]) -> bytes:
    """Returns a TIFF that stores each channel in a separate plane."""
    count, size = pixels.shape[2], pixels[..., 0].nbytes
    strips = {273: range(8, 8 + count * size, size), 279: [size] * count}
    layout = {258: [pixels.itemsize * 8] * count, 277: [count], 284: [2]} | strips | dict(tags)
    return tiff(np.moveaxis(pixels, 2, 0).tobytes(), W, H, layout)


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


def animated_png(frame: np.ndarray, bits: int, kind: int, left: int, top: int, **chunks: bytes) -> bytes:
    """A PNG of one black image that is not a frame of its animation, and two frames.

    Args:
        frame: (rows, bytes) packed rows of each frame, with ``bits`` per channel.
        bits: bits per channel.
        kind: see :func:`png`.
        left: place of the frames on the canvas.
        top: place of the frames on the canvas.
        **chunks: ``before`` and ``behind`` the pixels of the default image.
    """
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[kind]
    width = frame.shape[1] * 8 // (bits * channels)
    animation, number = b"", 0
    for rows in (frame, frame ^ 1):
        place = struct.pack(">IIIIIHHBB", number, width, len(rows), left, top, 1, 10, 0, number % 2)
        data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
        animation += chunk(b"fcTL", place) + chunk(b"fdAT", struct.pack(">I", number + 1) + data)
        number += 2
    default = np.zeros((H, W * channels * bits // 8), np.uint8)
    before = chunk(b"acTL", struct.pack(">II", 2, 0)) + chunks.get("before", b"")
    return png(default, bits, kind, W, before, animation + chunks.get("behind", b""))


def animated_webp(colours: Sequence[str], flags: int, left: int, top: int, width: int, height: int) -> bytes:
    """A WebP of W x H pixels; each frame is a box of one colour. Its coordinates must be even."""

    def riff(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)

    def u24(*numbers: int) -> bytes:
        return b"".join(struct.pack("<I", number)[:3] for number in numbers)

    body = riff(b"VP8X", bytes([flags, 0, 0, 0]) + u24(W - 1, H - 1)) + riff(b"ANIM", b"\0\0\0\xff\0\0")
    for colour in colours:
        still = saved(Image.new("RGB", (width, height), colour), "WEBP", lossless=True)[12:]
        body += riff(b"ANMF", u24(left // 2, top // 2, width - 1, height - 1, 100) + b"\0" + still)
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def on_white(part: np.ndarray, left: int, top: int) -> np.ndarray:
    """A part of the canvas of W x H pixels, which is white elsewhere."""
    pixels = np.full((H, W, 3), 255)
    pixels[top : top + len(part), left : left + part.shape[1]] = part
    return pixels


def framed(colour: Sequence[int], box: Sequence[int]) -> np.ndarray:
    """Returns a white image except for a box (left, top, right, bottom) of a GIF of 4 x 3 pixels."""
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
