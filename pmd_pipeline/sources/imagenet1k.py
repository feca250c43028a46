"""ImageNet-1K: the training images of ILSVRC 2012, with their classes and without captions."""

import json
from collections.abc import Iterator

from pmd_pipeline.base.record import BadRow, Json, Row
from pmd_pipeline.sources import Info, PublishedFile
from pmd_pipeline.sources.upstream.files import Span, by_lines, lines
from pmd_pipeline.sources.upstream.json_fields import int_at, text_at

INFO = Info(
    title="ImageNet-1K",
    homepage="https://www.image-net.org",
    licence="ImageNet's terms of access, for non-commercial research and education; the images "
    "belong to their owners",
    citation="Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015",
    files=(
        PublishedFile(
            pattern="*.jsonl",
            description="the list of images that pmd makes of train/n01440764/*.JPEG and so on, or "
            "of the hub's train-*.parquet",
            cut=by_lines,
        ),
    ),
    images="in the folder that --raw names; a copy of the hub's Parquet files is unpacked first",
    by_hand="accept ImageNet's terms, then put the unpacked train folder (and, for class names, "
    "LOC_synset_mapping.txt) into the folder, or train-*.parquet of the hub's ILSVRC/imagenet-1k; "
    "validation images are never taken",
    upstream_rows=1_281_167,
    collection="unimodal",
    kind="images",
)


def read(span: Span) -> Iterator[Row | BadRow]:
    """Rows of one range of the list; the id is the file's name, the same in all layouts."""
    for line in lines(span):
        entry = json.loads(line)  # our own: see `images/local/imagenet.py`
        path, name = text_at(entry, "file"), text_at(entry, "id")
        if path is None or name is None:
            yield BadRow(text_at(entry, "bad") or "the line has no file")
            continue
        meta: dict[str, Json] = {}
        if (wordnet := text_at(entry, "class")) is not None:
            meta["class"] = wordnet
        if (label := int_at(entry, "label")) is not None:
            meta["label"] = label
        if (words := text_at(entry, "name")) is not None:
            meta["class_name"] = words
        yield Row(id=name, file=path, meta=meta)
