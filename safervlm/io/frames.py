"""First frame of an animation, and the part of the canvas that it covers: the rest is transparent.

Pillow decodes the default image of an animated PNG even if it is not a frame of the animation (viewers without
animations show it, browsers do not), ignores an orientation after the frames, and fills the canvas of a WebP without
transparency with black outside the first frame.
"""

import struct
import zlib

from PIL import ImageFile

Box = tuple[int, int, int, int]  # left, top, right, bottom

SIGNATURE = b"\x89PNG\r\n\x1a\n"
WEBP_ANIMATION = 0x02  # flag in the header of an extended WebP


def first_frame(image: ImageFile.ImageFile, content: bytes) -> tuple[bytes, Box]:
    """Returns the file whose first image is the first frame, and the part of the canvas that it covers.

    Args:
        image: Opened image, not loaded.
        content: Bytes of its file.

    Returns:
        ``content`` itself, or a file with this frame only; and the box within the canvas that the file has data for.
    """
    whole = 0, 0, *image.size
    if image.format == "PNG" and getattr(image, "is_animated", False):
        found = first_apng_frame(content)
        if found is not None and within(found[1], whole):
            return found
    if image.format == "WEBP":
        box = first_webp_box(content)
        return content, box if box is not None and within(box, whole) else whole
    boxes = [tile.extents for tile in image.tile if tile.extents is not None]
    if not boxes:  # formats that are decoded as a whole
        return content, whole
    left, top, right, bottom = zip(*boxes, strict=True)
    return content, (min(left), min(top), max(right), max(bottom))


def within(box: Box, canvas: Box) -> bool:
    """Returns whether a box is not empty and lies within the canvas; viewers ignore an animation with any other box.

    Args:
        box: Box of a frame.
        canvas: Box of the canvas, from (0, 0).
    """
    return box[0] < box[2] <= canvas[2] and box[1] < box[3] <= canvas[3]


def first_apng_frame(content: bytes) -> tuple[bytes, Box] | None:
    """Extracts the first frame of an animated PNG.

    Args:
        content: Bytes of the file.

    Returns:
        A PNG file with this frame only, with the other chunks of the file, and the frame's box; None if there is none.
    """
    header, others, data = b"", [], []
    box: Box | None = None
    frames, place = 0, len(SIGNATURE)
    while place + 12 <= len(content):
        (size,), kind = struct.unpack_from(">I", content, place), content[place + 4 : place + 8]
        body = content[place + 8 : place + 8 + size]
        place += 12 + size
        if kind == b"IHDR":
            header = body
        elif kind == b"fcTL" and len(body) >= 20:
            frames += 1
            if box is None:
                width, height, left, top = struct.unpack_from(">IIII", body, 4)
                box = left, top, left + width, top + height
        elif kind == b"IDAT" and frames == 1:
            data.append(body)
        elif kind == b"fdAT" and frames == 1:
            data.append(body[4:])  # without the sequence number
        elif kind not in (b"acTL", b"fcTL", b"IDAT", b"fdAT", b"IEND"):  # palette, colours, transparency, orientation
            others.append((kind, body))
    if box is None:
        return None
    size_of_frame = struct.pack(">II", box[2] - box[0], box[3] - box[1])
    chunks = [(b"IHDR", size_of_frame + header[8:]), *others, (b"IDAT", b"".join(data)), (b"IEND", b"")]
    return SIGNATURE + b"".join(png_chunk(kind, body) for kind, body in chunks), box


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """Returns a chunk of a PNG file.

    Args:
        kind: Four letters.
        body: Its data.
    """
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def first_webp_box(content: bytes) -> Box | None:
    """Returns the box of the first frame of an animated WebP; None for a still image.

    Args:
        content: Bytes of the file.
    """
    if content[12:16] != b"VP8X" or not content[20] & WEBP_ANIMATION:
        return None
    place = 12
    while place + 8 <= len(content):
        kind, (size,) = content[place : place + 4], struct.unpack_from("<I", content, place + 4)
        if kind == b"ANMF" and place + 20 <= len(content):
            at = [int.from_bytes(content[start : start + 3], "little") for start in range(place + 8, place + 20, 3)]
            left, top = 2 * at[0], 2 * at[1]
            return left, top, left + at[2] + 1, top + at[3] + 1
        place += 8 + size + size % 2
    return None
