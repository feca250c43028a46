"""Descriptions of the sources for `pmd sources`: licence, images, files, manual steps."""

import textwrap
from collections.abc import Iterable, Iterator

from pmd_pipeline import sources
from pmd_pipeline.recipe import load_recipe
from pmd_pipeline.sources import PublishedFile, Source

Fact = tuple[str, str]
"""Name and text of one line of a description."""


_UNIMODAL = {
    "images": "images alone, in 15 % of FLAVA's steps",
    "text": "texts alone, in 15 % of FLAVA's steps, CC-News and BookCorpus together",
}
"""Their use in FLAVA's joint training (section 3.4, table of sampling probabilities)."""


def list_sources(width: int) -> Iterator[str]:
    """A paragraph per source, in lines of at most `width` characters.

    Those of PMD in alphabetical order, then the others.
    """
    known = map(sources.load, sources.names())
    for source in sorted(known, key=lambda source: source.info.collection != "pmd"):
        yield _paragraph(source, _summary(source), width)


def describe_source(name: str, width: int) -> str:
    """Full descriptions of a source, or of the sources of a recipe file, `width` characters wide.

    Raises:
        PmdError: there is no such source or file, or the recipe is wrong.
    """
    if not name.endswith(".toml"):
        return _full_description(sources.load(name), width)
    loaded = (recipe.load_source() for recipe in load_recipe(name))
    return "\n\n".join(_full_description(source, width) for source in loaded)


def _full_description(source: Source, width: int) -> str:
    info = source.info
    facts = [*_summary(source), ("homepage", info.homepage), ("citation", info.citation)]
    files = (fact for entry in info.files for fact in _file_facts(source, entry))
    return _paragraph(source, [*facts, *files], width)


def _summary(source: Source) -> Iterator[Fact]:
    info = source.info
    rows = f"; {info.upstream_rows:,} rows upstream" if info.upstream_rows else ""
    if info.paper:
        yield "paper", f"{info.paper.pairs:,} pairs of {info.paper.words} words{rows}"
    else:
        use = f": {_UNIMODAL[info.kind]}" if info.collection == "unimodal" else ""
        yield "paper", f"not in PMD{use}{rows}"
    yield "licence", info.licence
    yield "images", info.images
    if source.downloadable():
        yield "files", "pmd build downloads the annotation files"
    if info.by_hand:
        yield "by hand", info.by_hand


def _file_facts(source: Source, entry: PublishedFile) -> Iterator[Fact]:
    traits = [f"form {entry.form}"] if len(source.forms()) > 1 else []
    traits += [] if entry.required else ["not needed"]
    yield (
        "file",
        f"{entry.pattern}: {entry.description}" + (f" ({', '.join(traits)})" if traits else ""),
    )
    if entry.url:
        yield "", entry.url
    if entry.sha256:
        size = f", {entry.num_bytes:,} bytes" if entry.num_bytes else ""
        yield "", f"sha256 {entry.sha256}{size}"


def _paragraph(source: Source, facts: Iterable[Fact], width: int) -> str:
    lines = [f"{source.name}, {source.info.title}"]
    lines += [
        textwrap.fill(
            text,
            width,
            initial_indent=f"  {name:<9} ",
            subsequent_indent=" " * 12,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in facts
    ]
    return "\n".join(lines)
