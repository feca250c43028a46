"""Width and height of stored images by their headers; no pixel is decoded."""

from pmd_pipeline.contract.image_format import JPEG, WEBP, stored_format

_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers that begin a frame and state its size (ITU-T T.81, table B.1)."""


def image_size(content: bytes) -> tuple[int, int] | None:
    """Width and height; None if the bytes are no JPEG and no WebP, or the header is broken."""
    sizes = {JPEG: jpeg_size, WEBP: webp_size}
    stored = stored_format(content)
    return sizes[stored](content) if stored else None


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Width and height by the first frame header; None if there is none."""
    place = 2
    while place + 9 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # padding
            place += 1
            continue
        if marker in _JPEG_FRAMES:
            height, width = (int.from_bytes(content[place + at : place + at + 2]) for at in (5, 7))
            return width, height
        place += 2 + int.from_bytes(content[place + 2 : place + 4])
    return None


def webp_size(content: bytes) -> tuple[int, int] | None:
    """Width and height by the first chunk (RFC 9649, sections 2.5 to 2.7); None if it is broken.

    The chunk is `VP8 ` for lossy images, `VP8L` for lossless ones, and `VP8X` for those with
    transparency, animation or metadata.
    """
    kind, chunk = content[12:16], content[20:30]
    if len(chunk) < 10:
        return None
    if kind == b"VP8 " and chunk[3:6] == b"\x9d\x01\x2a":
        width, height = (int.from_bytes(chunk[at : at + 2], "little") & 0x3FFF for at in (6, 8))
        return width, height
    if kind == b"VP8L" and chunk[0] == 0x2F:
        bits = int.from_bytes(chunk[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X":
        width, height = (int.from_bytes(chunk[at : at + 3], "little") + 1 for at in (4, 7))
        return width, height
    return None
