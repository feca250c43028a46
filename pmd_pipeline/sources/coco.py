"""COCO Captions: Karpathy's split of the 2014 images, as in PMD, or COCO's caption files."""

import re
from collections.abc import Iterator, Sequence
from typing import Literal

from pmd_pipeline.base.record import BadRow, Candidate, Json, Row, flickr_id
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import Info, PaperRow, PublishedFile
from pmd_pipeline.sources.upstream.files import Span, UpstreamFile, json_items
from pmd_pipeline.sources.upstream.json_fields import int_at, list_at, text_at

IMAGES = "http://images.cocodataset.org"
"""Host of single images; their paths are those inside COCO's zips."""

_ANNOTATIONS = f"{IMAGES}/annotations"

INFO = Info(
    title="COCO Captions",
    homepage="https://cocodataset.org",
    licence="annotations CC BY 4.0; each image under the licence that its Flickr user chose",
    citation="Lin et al., Microsoft COCO, ECCV 2014; Chen et al., Microsoft COCO Captions, 2015; "
    "split of Karpathy and Fei-Fei, CVPR 2015",
    files=(
        PublishedFile(
            # before the split, so that its meta, which has the Flickr id, takes precedence
            pattern="captions_*2014.json",
            description="licence, size and Flickr id of the images",
            url=f"{_ANNOTATIONS}/annotations_trainval2014.zip",
            form="karpathy",
            role="images",
            required=False,
        ),
        PublishedFile(
            pattern="dataset_coco.json",
            description="all captions of 2014 in Karpathy's split",
            url="https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip",
            form="karpathy",
            role="split",
        ),
        PublishedFile(
            pattern="captions_*2014.json",
            description="captions of 2014 in COCO's split",
            url=f"{_ANNOTATIONS}/annotations_trainval2014.zip",
            form="captions2014",
            role="captions",
        ),
        PublishedFile(
            pattern="captions_*2017.json",
            description="captions of 2017 in COCO's split",
            url=f"{_ANNOTATIONS}/annotations_trainval2017.zip",
            form="captions2017",
            role="captions",
        ),
        PublishedFile(
            pattern="captions_*.json",
            description="any captions in COCO's format",
            form="captions",
            role="captions",
        ),
    ),
    images=f"one by one, or in {IMAGES}/zips/train2014.zip (md5 0da8c0bd3d6becc4dcb32757491aca88) "
    "and val2014.zip (md5 a3d79f5ed8d289b7a7554ce06a5782b3), train2017.zip and val2017.zip for "
    "the names of 2017; all of them still exist",
    collection="pmd",
    paper=PaperRow(1, pairs=900_000, words=12.4),
    upstream_rows=566_747,
    shares_coco=True,
)

_FOLDER = re.compile(r"(?:train|val)20\d\d")
_HELDOUT = {"val", "test"}


def read(
    span: Span, *, splits: Sequence[Literal["train", "restval"]] = ("train", "restval")
) -> Iterator[Row | BadRow]:
    """Rows of one file; the id is COCO's, without leading zeros.

    Args:
        span: a whole file.
        splits: Karpathy's splits to take; `val` and `test` are never taken. COCO's own files do
            not have these splits.

    Raises:
        PmdError: the file is of another data set or another COCO task.
    """
    if span.role == "split":
        yield from _split_rows(span.file, splits)
        return
    yield from _image_rows(span.file)
    if span.role == "captions":
        yield from _caption_rows(span.file)


def _split_rows(file: UpstreamFile, splits: Sequence[str]) -> Iterator[Row | BadRow]:
    dataset = next(json_items(file, "dataset", optional=True), None)
    if dataset != "coco":
        raise PmdError(f"{file} has dataset {dataset!r} instead of 'coco': take the file for COCO")
    for number, item in enumerate(json_items(file, "images.item")):
        coco_id, name = int_at(item, "cocoid"), text_at(item, "filename")
        sentences = list_at(item, "sentences")
        if coco_id is None or name is None or sentences is None:
            yield BadRow(f"images[{number}] has no cocoid, filename or sentences")
            continue
        split = text_at(item, "split")
        refused = None if split in splits else "split"
        texts = [text_at(sentence, "raw") for sentence in sentences]
        url, path = _image_location(name, text_at(item, "filepath"))
        yield Row(
            id=str(coco_id),
            url=url,
            file=path,
            candidates=[Candidate(text, "raw") for text in texts if text is not None],
            meta={"coco_id": coco_id},
            refused="heldout" if split in _HELDOUT else refused,
        )
        for _ in range(texts.count(None)):
            yield BadRow(f"images[{number}] has a sentence without raw")


def _image_rows(file: UpstreamFile) -> Iterator[Row | BadRow]:
    licences = _licences(file)
    for number, item in enumerate(json_items(file, "images.item")):
        coco_id, name = int_at(item, "id"), text_at(item, "file_name")
        if coco_id is None or name is None:
            yield BadRow(f"images[{number}] has no id or file_name")
            continue
        address = text_at(item, "coco_url")
        url, path = _image_location(name, address, file.name)
        photo = flickr_id(text_at(item, "flickr_url") or "")
        meta: dict[str, Json] = {"coco_id": coco_id}
        yield Row(
            id=str(coco_id),
            url=url or address,
            file=path,
            licence=licences.get(int_at(item, "license")),
            width=int_at(item, "width"),
            height=int_at(item, "height"),
            meta={**meta, "flickr_id": photo} if photo else meta,
        )


def _caption_rows(file: UpstreamFile) -> Iterator[Row | BadRow]:
    for number, item in enumerate(json_items(file, "annotations.item")):
        coco_id, caption = int_at(item, "image_id"), text_at(item, "caption")
        if coco_id is not None and caption is not None:
            yield Row(
                id=str(coco_id),
                candidates=[Candidate(caption, "caption")],
                meta={"coco_id": coco_id},
            )
        elif int_at(item, "category_id") is not None:
            raise PmdError(
                f"{file} has objects or keypoints where captions should be: take the "
                "captions_*.json of COCO's annotations"
            )
        else:
            yield BadRow(f"annotations[{number}] has no image_id or caption")


def _licences(file: UpstreamFile) -> dict[int | None, str]:
    """Name and address of each licence by its number, as far as the file states them."""
    return {
        int_at(item, "id"): f"{name} ({address})"
        for item in json_items(file, "licenses.item", optional=True)
        if (name := text_at(item, "name")) and (address := text_at(item, "url"))
    }


def _image_location(name: str, *hints: str | None) -> tuple[str | None, str]:
    """Address and archive path of an image; the folder is that of the first hint that names one.

    The split does not give the folder: `restval` images are in `val2014`.
    """
    matches = (_FOLDER.search(hint) for hint in (name, *hints) if hint)
    folder = next((match[0] for match in matches if match), None)
    if folder is None:
        return None, name
    return f"{IMAGES}/{folder}/{name}", f"{folder}/{name}"
