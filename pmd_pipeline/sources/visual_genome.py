"""Visual Genome: phrases that describe regions, with their boxes."""

import re
from collections.abc import Iterator

from pmd_pipeline.base.record import BadRow, Candidate, Json, Row
from pmd_pipeline.sources import Info, PaperRow, PublishedFile
from pmd_pipeline.sources.upstream.files import Span, UpstreamFile, json_items
from pmd_pipeline.sources.upstream.json_fields import int_at, list_at, number_at, text_at

_BASE = "https://visualgenome.org/static/data/dataset"


def _image_list(form: str) -> PublishedFile:
    return PublishedFile(
        pattern="image_data*.json",
        description="address, size, COCO id and Flickr id of the images",
        url=f"{_BASE}/image_data.json.zip",
        sha256="b87a94918cb2ff4d952cf1dfeca0b9cf6cd6fd204c2f8704645653be1163681a",
        num_bytes=1_780_854,
        form=form,
        role="images",
    )


INFO = Info(
    title="Visual Genome",
    homepage="https://homes.cs.washington.edu/~ranjay/visualgenome/",
    licence="annotations CC BY 4.0; the photos are those of YFCC100M and COCO, each under its own",
    citation="Krishna et al., Visual Genome, IJCV 2017",
    files=(
        _image_list("v1.2"),
        PublishedFile(
            pattern="region_descriptions.json",
            description="region descriptions of version 1.2",
            url=f"{_BASE}/region_descriptions.json.zip",
            form="v1.2",
            role="regions",
        ),
        _image_list("v1.0"),
        PublishedFile(
            pattern="region_descriptions_v1.json",
            description="region descriptions of version 1.0",
            url=f"{_BASE}/region_descriptions_v1.json.zip",
            sha256="9e54cd76082f7ce5168a1779fc8c3d0629720492ec0fa12f2d8339c3e0dc9734",
            num_bytes=99_460_401,
            form="v1.0",
            role="regions",
        ),
    ),
    images="one by one, or in https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip "
    "(9.7 GB, VG_100K/) and images2.zip beside it (5.5 GB, VG_100K_2/); all of them still exist",
    collection="pmd",
    paper=PaperRow(5, pairs=5_400_000, words=5.1),
    shares_coco=True,
)

_FILE = re.compile(r"VG_100K(?:_2)?/\d+\.jpg$")


def read(span: Span) -> Iterator[Row | BadRow]:
    """Rows of one file, one for each image; the id is Visual Genome's.

    Repeated phrases of an image are kept. Versions 1.0 and 1.2 differ only in names of keys.

    Raises:
        PmdError: the file is not a list.
    """
    rows = _image_list_rows if span.role == "images" else _region_rows
    yield from rows(span.file)


def _image_list_rows(file: UpstreamFile) -> Iterator[Row | BadRow]:
    for number, item in enumerate(json_items(file, "item")):
        image_id, url = _image_id(item), text_at(item, "url")
        if image_id is None or url is None:
            yield BadRow(f"image {number} has no image_id or url")
            continue
        path = _FILE.search(url)
        yield Row(
            id=str(image_id),
            url=url,
            file=path[0] if path else None,
            width=int_at(item, "width"),
            height=int_at(item, "height"),
            meta=_shared_ids(item),
        )


def _region_rows(file: UpstreamFile) -> Iterator[Row | BadRow]:
    for number, item in enumerate(json_items(file, "item")):
        image_id, regions = int_at(item, "id"), list_at(item, "regions")
        if image_id is None or regions is None:
            yield BadRow(f"image {number} has no id or regions")
            continue
        candidates = [_candidate(region) for region in regions]
        yield Row(id=str(image_id), candidates=[one for one in candidates if one])
        for _ in range(candidates.count(None)):
            yield BadRow(f"image {image_id} has a region without phrase")


def _image_id(item: object) -> int | None:
    image_id = int_at(item, "image_id")
    return int_at(item, "id") if image_id is None else image_id


def _shared_ids(item: object) -> dict[str, Json]:
    """COCO's and Flickr's ids where they are known, in the types that other sources use."""
    coco_id, photo = int_at(item, "coco_id"), int_at(item, "flickr_id")
    coco: dict[str, Json] = {} if coco_id is None else {"coco_id": coco_id}
    flickr: dict[str, Json] = {} if photo is None else {"flickr_id": str(photo)}
    return coco | flickr


def _candidate(region: object) -> Candidate | None:
    phrase = text_at(region, "phrase")
    if phrase is None:
        return None
    x, y = number_at(region, "x"), number_at(region, "y")
    width, height = number_at(region, "width"), number_at(region, "height")
    if x is None or y is None or not width or not height or width < 0 or height < 0:
        return Candidate(phrase, "phrase", refused="bad_box")
    return Candidate(phrase, "phrase", box=(x, y, x + width, y + height))
