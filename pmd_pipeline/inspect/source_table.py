"""What `pmd sources` prints: what each source is, and what a user has to do for it."""

import textwrap
from collections.abc import Iterable, Iterator

from pmd_pipeline import sources
from pmd_pipeline.recipe import load_recipe
from pmd_pipeline.sources import PublishedFile, Source

Fact = tuple[str, str]
"""What is known, and its name."""


_UNIMODAL = {
    "images": "images alone, in 15 % of FLAVA's steps",
    "text": "texts alone, in 15 % of FLAVA's steps, CC-News and BookCorpus together",
}
"""What FLAVA's joint training takes of it (section 3.4, table of sampling probabilities)."""


def all_sources(width: int) -> Iterator[str]:
    """A paragraph per source, in lines of at most `width` characters.

    Those of PMD in alphabetical order, then the others.
    """
    known = map(sources.load, sources.names())
    for source in sorted(known, key=lambda source: source.info.collection != "pmd"):
        yield _paragraph(source, _summary(source), width)


def one_source(name: str, width: int) -> str:
    """All that is known of a source, or of those of a recipe file, in lines of `width` characters.

    Raises:
        PmdError: there is no such source or file, or the recipe is wrong.
    """
    if not name.endswith(".toml"):
        return _description(sources.load(name), width)
    loaded = (recipe.load_source() for recipe in load_recipe(name))
    return "\n\n".join(_description(source, width) for source in loaded)


def _description(source: Source, width: int) -> str:
    info = source.info
    facts = [*_summary(source), ("homepage", info.homepage), ("citation", info.citation)]
    files = (fact for entry in info.files for fact in _file(source, entry))
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


def _file(source: Source, entry: PublishedFile) -> Iterator[Fact]:
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
