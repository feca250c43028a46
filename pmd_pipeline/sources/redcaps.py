"""RedCaps v1.0: posts of Reddit's image forums, by subreddit and year."""

from collections.abc import Iterator
from typing import Any, Literal

from pmd_pipeline.base.record import BadRow, Candidate, Json, Row, flickr_id
from pmd_pipeline.sources import Info, PaperRow, PublishedFile
from pmd_pipeline.sources.upstream.files import Span, json_items

INFO = Info(
    title="RedCaps v1.0",
    homepage="https://redcaps.xyz",
    licence="annotations CC BY 4.0 under Reddit's API terms, for non-commercial research only; "
    "the images belong to their owners",
    citation="Desai et al., RedCaps: web-curated image-text data created by the people, for the "
    "people, NeurIPS Datasets and Benchmarks 2021",
    files=(
        PublishedFile(
            # 2017 in a file name means all years up to 2017, so a post's year is not in the name.
            pattern="[a-z0-9]*_20[12][0-9].json",
            description="posts, 1,391 files of one subreddit and year each, read inside their zip",
            url="https://huggingface.co/datasets/red_caps/resolve/main/data/"
            "redcaps_v1.0_annotations.zip",
            sha256="d502951cb91fe9163c53ef7a72587f29e3d975f081b86139d66cf29dd14e8864",
            num_bytes=1_061_908_181,
        ),
    ),
    images="from i.redd.it, i.imgur.com and Flickr, one by one; about 7 of 12 million were left "
    "in 2024, after Imgur's purge",
    collection="pmd",
    paper=PaperRow(8, pairs=11_600_000, words=9.5),
    upstream_rows=12_011_121,
)


def read(
    span: Span, *, caption: Literal["raw_caption", "caption"] = "raw_caption"
) -> Iterator[Row | BadRow]:
    """Rows of one file; the id is the post's. Authors are left out.

    Args:
        span: a whole file.
        caption: `raw_caption` is the post's title; `caption` is upstream's cleaned version, in
            lower case and ASCII, sometimes empty.
    """
    for post in json_items(span.file, "annotations.item"):
        yield _post_row(post, caption)


def _post_row(post: Any, caption: str) -> Row | BadRow:  # noqa: ANN401 - JSON of any shape
    if not isinstance(post, dict):
        return BadRow("the annotation is no object")
    for name in ("image_id", "url"):
        if not isinstance(post.get(name), str) or not post[name]:
            return BadRow(f"the annotation has no {name}")
    text = post.get(caption)
    if text is not None and not isinstance(text, str):
        return BadRow(f"{caption} is no text")
    address = _first_address(post["url"])
    if not address.lower().startswith(("http://", "https://")):
        return BadRow(f"url is no http address: {address[:80]!r}")
    meta: dict[str, Json] = {
        name: post[name]
        for name, kind in (("subreddit", str), ("created_utc", int), ("score", int))
        if isinstance(post.get(name), kind)
    }
    photo = flickr_id(address)
    if photo:
        meta["flickr_id"] = photo
    return Row(
        id=post["image_id"],
        url=address,
        candidates=[] if text is None else [Candidate(text, caption)],
        meta=meta,
    )


def _first_address(url: str) -> str:
    """The first address, where a post has several with blanks or commas between them.

    >>> _first_address("https://i.imgur.com/a,b.jpg,https://i.imgur.com/c.jpg")
    'https://i.imgur.com/a,b.jpg'
    """
    first = url.strip(" ,").split(maxsplit=1)
    return first[0].partition(",http")[0].rstrip(",") if first else ""
