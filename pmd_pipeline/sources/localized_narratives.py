"""Localized Narratives: spoken descriptions of four image collections, split into sentences."""

import json
import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from pmd_pipeline.base.record import BadRow, Candidate, Json, Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import Info, PaperRow, PublishedFile
from pmd_pipeline.sources.upstream.files import Span, by_lines, lines
from pmd_pipeline.sources.upstream.json_fields import text_at

_BASE = "https://storage.googleapis.com/localized-narratives/annotations"
_TRAIN = ("open_images_train_v6", "coco_train", "flickr30k_train", "ade20k_train")
_OTHERS = (
    "open_images_validation",
    "open_images_test",
    "coco_val",
    "flickr30k_val",
    "flickr30k_test",
    "ade20k_validation",
)
_PARTS = (*_OTHERS, *_TRAIN)
"""Required parts last: if they exist, no download was interrupted before them."""

_SHARDED = {"open_images_train_v6": 10, "coco_train": 4}


def _small(part: str) -> PublishedFile:
    name = f"{part}_captions.jsonl"
    return PublishedFile(
        pattern=name,
        description=f"narratives of {part}, text only",
        url=f"{_BASE}/{name}",
        form="small",
        required=part in _TRAIN,
        cut=by_lines,
    )


def _full(part: str) -> list[PublishedFile]:
    num_shards = _SHARDED.get(part)
    suffixes = [f"-{i:05d}-of-{num_shards:05d}" for i in range(num_shards)] if num_shards else [""]
    names = [f"{part}_localized_narratives{suffix}.jsonl" for suffix in suffixes]
    return [
        PublishedFile(
            pattern=name,
            description=f"narratives of {part} with mouse traces and timing",
            url=f"{_BASE}/{name}",
            form="full",
            required=part in _TRAIN,
            cut=by_lines,
        )
        for name in names
    ]


INFO = Info(
    title="Localized Narratives",
    homepage="https://google.github.io/localized-narratives/",
    licence="annotations CC BY 4.0; images of Open Images CC BY 2.0, of COCO per image, of "
    "Flickr30k for research only, of ADE20k under its own terms",
    citation="Pont-Tuset et al., Connecting Vision and Language with Localized Narratives, "
    "ECCV 2020",
    files=(
        *(_small(part) for part in _PARTS),
        *(file for part in _PARTS for file in _full(part)),
        PublishedFile(
            pattern="ln_*_captions_multi.jsonl",
            description="sentences as facebook/pmd on Hugging Face has them (terms to accept "
            "there)",
            form="pmd",
            cut=by_lines,
        ),
    ),
    images="Open Images and COCO one by one; ADE20k in "
    "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip; Flickr30k by hand",
    by_hand="the annotation files are public, but the images of Flickr30k "
    "(flickr30k-images.tar.gz) must be requested at "
    "http://shannon.cs.illinois.edu/DenotationGraph/data/index.html, or flickr30k left out of the "
    "recipe's families",
    collection="pmd",
    paper=PaperRow(3, pairs=1_900_000, words=13.8),
    upstream_rows=873_107,
    shares_coco=True,
)


_COLLECTION = re.compile(r"(open_?images|coco|flickr?30k|ade20k).*?(train|val|test)", re.IGNORECASE)
_SPELLINGS = {"openimages": "open_images", "flick30k": "flickr30k"}
_IMAGE_ID = re.compile(r"[\w-]{1,64}", re.ASCII)
_COCO_ID = re.compile(r"\d{1,12}", re.ASCII)


def read(
    span: Span,
    *,
    sentences: Literal["pmd", "whole"] = "pmd",
    families: Sequence[Literal["open_images", "coco", "flickr30k", "ade20k"]] = (
        "open_images",
        "coco",
        "flickr30k",
        "ade20k",
    ),
    splits: Sequence[Literal["train", "val", "test"]] = ("train",),
) -> Iterator[Row | BadRow]:
    """Rows of one span, one for each narrative; the id is `family/image_id`.

    Args:
        span: a file of any of the three forms.
        sentences: `pmd` makes a candidate of each sentence, see `pmd_sentences`; `whole` makes one
            of the narrative.
        families: image collections to take.
        splits: to take; `val` is also what upstream calls validation. Val and test of Flickr30k are
            never taken.

    Raises:
        PmdError: `sentences` is `whole`, but the files hold sentences.
    """
    if span.form == "pmd" and sentences == "whole":
        raise PmdError(
            f"{span.file} holds sentences: set sentences = 'pmd', or take upstream's own files"
        )
    for line in lines(span):
        if not line:
            continue
        narrative = _parse_line(line, span.file.name)
        if isinstance(narrative, BadRow):
            yield narrative
            continue
        whole = span.form == "pmd" or sentences == "whole"
        taken = narrative.family in families and narrative.split in splits
        refused = None if taken else "split"
        url, path = _address_and_path(narrative)
        yield Row(
            id=f"{narrative.family}/{narrative.image_id}",
            url=url,
            file=path,
            candidates=_sentence_candidates(narrative.caption, whole=whole),
            meta=_meta(narrative),
            refused="heldout" if _is_heldout(narrative) else refused,
        )


def pmd_sentences(narrative: str) -> list[str]:
    """The sentences of a narrative as in PMD: the texts between full stops, with a full stop each.

    Every full stop separates, those of numbers and abbreviations too; other marks do not.

    >>> pmd_sentences("A dog, 3.5 feet high. Is it big? Yes.It is")
    ['A dog, 3.', '5 feet high.', 'Is it big? Yes.', 'It is.']
    """
    sentences = (sentence.strip() for sentence in narrative.split("."))
    return [f"{sentence}." for sentence in sentences if sentence]


class _Narrative(NamedTuple):
    """One line; `split` is `train`, `val` or `test`, whatever upstream calls it."""

    family: str
    split: str
    image_id: str
    caption: str


def _parse_line(line: bytes, file_name: str) -> _Narrative | BadRow:
    """The narrative of a line; the collection is that of `dataset_id`, or else of the file name."""
    try:
        item = json.loads(line)
    except (ValueError, RecursionError):
        return BadRow("the line is no JSON")
    dataset = text_at(item, "dataset_id") or ""
    match = _COLLECTION.search(dataset) or _COLLECTION.search(file_name)
    if not match:
        return BadRow(f"neither dataset_id {dataset[:80]!r} nor the file's name tells the images")
    spelling = match[1].lower()
    family = _SPELLINGS.get(spelling, spelling)
    image_id, caption = text_at(item, "image_id"), text_at(item, "caption")
    if image_id is None or caption is None:
        return BadRow("image_id or caption is missing or no text")
    if not (_COCO_ID if family == "coco" else _IMAGE_ID).fullmatch(image_id):
        return BadRow(f"image_id {image_id[:80]!r} is none of {family}")
    image_id = str(int(image_id)) if family == "coco" else image_id
    return _Narrative(family, match[2].lower(), image_id, caption)


def _is_heldout(narrative: _Narrative) -> bool:
    return narrative.family == "flickr30k" and narrative.split != "train"


def _address_and_path(narrative: _Narrative) -> tuple[str | None, str]:
    """Address and archive path of the image; no address where it is in an archive only."""
    family, split, name = narrative.family, narrative.split, f"{narrative.image_id}.jpg"
    if family == "open_images":
        path = f"{'validation' if split == 'val' else split}/{name}"
        return f"https://s3.amazonaws.com/open-images-dataset/{path}", path
    if family == "coco":
        path = f"{split}2017/{narrative.image_id.zfill(12)}.jpg"
        return f"http://images.cocodataset.org/{path}", path
    if family == "ade20k":
        folder = "training" if split == "train" else "validation"
        return None, f"ADEChallengeData2016/images/{folder}/{name}"
    return None, f"flickr30k-images/{name}"


def _sentence_candidates(caption: str, *, whole: bool) -> list[Candidate]:
    texts = [caption] if whole else pmd_sentences(caption)
    # a narrative of full stops only is counted as well
    return [Candidate(text, "caption") for text in texts] or [
        Candidate(caption, "caption", refused="no_text")
    ]


def _meta(narrative: _Narrative) -> dict[str, Json]:
    """Facts of the image, none of the narrative, because an image may have several narratives."""
    if narrative.family == "coco":
        return {"family": "coco", "coco_id": int(narrative.image_id)}
    if narrative.family == "flickr30k":
        return {"family": "flickr30k", "flickr_id": narrative.image_id}
    return {"family": narrative.family}
