"""The JSON member of a sample in a tar: its captions and their boxes, validated."""

import json
from dataclasses import dataclass

from pmd_pipeline.contract.boxes import Box, is_box


@dataclass(frozen=True)
class SampleCaptions:
    """The captions of one sample, and one box per caption if they describe regions."""

    captions: list[str]
    boxes: list[Box] | None


def parse_captions(content: bytes) -> SampleCaptions:
    """The captions and boxes in the JSON member of a sample.

    Raises:
        ValueError: it is no JSON, or as for `captions_of`.
    """
    try:
        sample = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON ({error})") from error
    return captions_of(sample)


def captions_of(sample: object) -> SampleCaptions:
    """The captions and boxes of a sample whose JSON is already parsed.

    Raises:
        ValueError: there is no list of captions, or the boxes are not one valid box per caption.

    >>> captions_of({"captions": ["a dog"], "boxes": [[0, 0, 0.5, 1]]}).boxes
    [(0.0, 0.0, 0.5, 1.0)]
    """
    fields = sample if isinstance(sample, dict) else {}
    captions, boxes = fields.get("captions"), fields.get("boxes")
    if not isinstance(captions, list) or not all(isinstance(one, str) for one in captions):
        raise ValueError("has no list of captions")
    if boxes is None:
        return SampleCaptions(captions, None)
    if not isinstance(boxes, list):
        raise ValueError("has boxes that are no list")  # noqa: TRY004  # a bad value, as below
    if len(boxes) != len(captions):
        raise ValueError(f"has {len(boxes)} boxes for {len(captions)} captions")
    if not all(is_box(box) for box in boxes):
        raise ValueError("has a box that is not inside the image")
    return SampleCaptions(
        captions, [(float(x0), float(y0), float(x1), float(y1)) for x0, y0, x1, y1 in boxes]
    )
