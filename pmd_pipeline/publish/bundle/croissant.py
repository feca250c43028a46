"""The dataset in Croissant 1.1 (JSON-LD): its files, and how to read records from them."""

from typing import Any

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.image_format import FORMATS, ImageFormat
from pmd_pipeline.contract.models import Manifest, ShardEntry
from pmd_pipeline.inspect.stats import remarks

SPECIFICATION = "http://mlcommons.org/croissant/1.1"

_CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context of the specification; readers warn about any other."""

_LEDGER = {
    "key": ("sc:Text", "name of the sample in its tar, 16 hex digits"),
    "id": ("sc:Text", "upstream's id of the image"),
    "url": ("sc:URL", "address of the image"),
    "caption": ("sc:Text", "the first caption"),
    "num_pairs": ("sc:Integer", "pairs of the image: one per caption"),
    "status": ("sc:Text", "success if the image is in the tar"),
    "reason": ("sc:Text", "why it is not there; docs/reasons.md lists the reasons"),
    "width": ("sc:Integer", "pixels as stored"),
    "height": ("sc:Integer", "pixels as stored"),
    "original_width": ("sc:Integer", "pixels as fetched"),
    "original_height": ("sc:Integer", "pixels as fetched"),
    "sha256": ("sc:Text", "SHA-256 of the fetched bytes"),
}
"""Columns of the ledgers that are described, with their types and meanings."""

_TAR, _PARQUET = "application/x-tar", "application/x-parquet"
_SAFETENSORS = "https://huggingface.co/docs/safetensors"


def croissant(manifest: Manifest, url: str | None, published: str | None) -> dict[str, Any]:
    """The description of a dataset with the shards of `manifest`.

    Args:
        url: page of the dataset, if it has one.
        published: day of publication as `YYYY-MM-DD`. The current time is not used.
    """
    licences = sorted({entry.licence for entry in manifest.sources.values()})
    citations = [entry.citation for _, entry in sorted(manifest.sources.items())]
    optional = {"url": url, "datePublished": published}
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": SPECIFICATION,
        "name": manifest.name,
        "description": _description(manifest),
        "license": licences,
        "citeAs": "; ".join(citations),
        "version": f"{manifest.format}.0.0+{manifest.digest[:16]}",
        "identifier": f"sha256:{manifest.digest}",
        **{name: value for name, value in optional.items() if value},
        "distribution": [
            *(file for shard in manifest.shards for file in _files(shard)),
            *(
                group
                for source in sorted(_sources(manifest))
                for group in _groups(manifest, source)
            ),
        ],
        "recordSet": [
            records
            for source in sorted(_sources(manifest))
            for records in _records(manifest, source)
        ],
    }


def _description(manifest: Manifest) -> str:
    thing = {"pairs": "image-text pairs", "images": "images", "text": "texts"}[manifest.kind]
    kept = sum(entry.counts.kept for entry in manifest.sources.values())
    first = f"{kept:,} {thing} of {', '.join(manifest.sources)} as WebDataset shards with ledgers."
    return " ".join([first, *(f"{one.capitalize()}." for one in remarks(manifest))])


def _files(shard: ShardEntry) -> list[dict[str, Any]]:
    """The files of a shard: tar, ledger and image codes, or the one Parquet file of texts."""
    if shard.path == shard.ledger_path:
        return [_file(shard.path, _PARQUET, shard.sha256, shard.num_bytes)]
    files = [
        _file(shard.path, _TAR, shard.sha256, shard.num_bytes),
        _file(shard.ledger_path, _PARQUET, shard.ledger_sha256, None),
    ]
    if shard.codes_sha256:
        files.append(_file(shard.codes_path, _SAFETENSORS, shard.codes_sha256, None))
    return files


def _file(path: str, encoding: str, sha256: str, num_bytes: int | None) -> dict[str, Any]:
    size = {} if num_bytes is None else {"contentSize": f"{num_bytes} B"}
    return {
        "@type": "cr:FileObject",
        "@id": path,
        "name": path.rpartition("/")[2],
        "contentUrl": path,
        "encodingFormat": encoding,
        "sha256": sha256,
        **size,
    }


def image_format(manifest: Manifest, source: str) -> ImageFormat:
    """The format of the images in the tars of a source; rules without one mean JPEG.

    Raises:
        PmdError: this version does not have the format.
    """
    name = manifest.sources[source].rules.get("images", {}).get("format", "jpeg")
    if name not in FORMATS:
        raise PmdError(
            f"the rules of {source} store images as {name}, which this version does not have: "
            "bundle with the version that built it"
        )
    return FORMATS[name]


def _sources(manifest: Manifest) -> set[str]:
    return {shard.source for shard in manifest.shards}


def _groups(manifest: Manifest, source: str) -> list[dict[str, Any]]:
    """The file sets of a source: images and their JSON in the tars, and the ledgers."""
    shards = [shard for shard in manifest.shards if shard.source == source]
    patterns = _ledger_patterns(shards)
    groups = [_group(f"{source}/ledgers", _PARQUET, patterns)] if patterns else []
    if manifest.kind != "text":
        tars = [{"@id": shard.path} for shard in shards]
        stored = image_format(manifest, source)
        for name, encoding, pattern in (
            ("pictures", stored.mime, f"*.{stored.extension}"),
            ("descriptions", "application/json", "*.json"),
        ):
            group = _group(f"{source}/{name}", encoding, [pattern])
            groups.append({**group, "containedIn": tars})
    return groups


def _ledger_patterns(shards: list[ShardEntry]) -> list[str]:
    """Patterns that match the ledgers and no other file; none where ledgers are URLs.

    A pattern of a file set is relative to the folder of the description.
    """
    folders = sorted({shard.ledger_path.rpartition("/")[0] for shard in shards})
    if any("://" in folder for folder in folders):
        return []
    return [f"{folder}/*.parquet" if folder else "*.parquet" for folder in folders]


def _group(name: str, encoding: str, patterns: list[str]) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": name,
        "name": name,
        "encodingFormat": encoding,
        "includes": patterns,
    }


def _records(manifest: Manifest, source: str) -> list[dict[str, Any]]:
    ledgers = f"{source}/ledgers"
    has_ledgers = (
        _ledger_patterns([shard for shard in manifest.shards if shard.source == source]) != []
    )
    if manifest.kind == "text" and not has_ledgers:
        return []
    if manifest.kind == "text":
        texts = _field(f"{source}/texts", "text", "sc:Text", "a packed sequence", ledgers)
        return [_record_set(f"{source}/texts", "the texts", [texts])]
    rows = [
        _field(f"{source}/records", column, kind, meaning, ledgers)
        for column, (kind, meaning) in _LEDGER.items()
    ]
    records = {
        **_record_set(f"{source}/records", "one row per image, in the shards or not", rows),
        "key": {"@id": f"{source}/records/key"},
    }
    return [
        *([records] if has_ledgers else []),
        _members(
            source,
            "pictures",
            image_format(manifest, source).extension,
            "sc:ImageObject",
            "the images in the shards",
        ),
        _members(
            source,
            "descriptions",
            "json",
            "sc:Text",
            "JSON of each image, with all its captions and their boxes",
        ),
    ]


def _members(source: str, group: str, extension: str, kind: str, meaning: str) -> dict[str, Any]:
    """The members of the tars with this extension, as records of a key and a content."""
    name = f"{source}/{group}-by-key"
    files = {"fileSet": {"@id": f"{source}/{group}"}}
    key = {
        **_field(name, "key", "sc:Text", "name of the sample", ""),
        "source": {
            **files,
            "extract": {"fileProperty": "filename"},
            "transform": {"regex": rf"^(.*)\.{extension}$"},
        },
    }
    content = {
        **_field(name, "content", kind, meaning, ""),
        "source": {**files, "extract": {"fileProperty": "content"}},
    }
    return _record_set(name, meaning, [key, content])


def _record_set(name: str, meaning: str, fields: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "name": name,
        "description": meaning,
        "field": fields,
    }


def _field(records: str, name: str, kind: str, meaning: str, file_set: str) -> dict[str, Any]:
    return {
        "@type": "cr:Field",
        "@id": f"{records}/{name}",
        "name": f"{records}/{name}",
        "description": meaning,
        "dataType": kind,
        "source": {"fileSet": {"@id": file_set}, "extract": {"column": name}},
    }
