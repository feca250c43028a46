"""What `pmd sources` prints: what each source is, and what a user has to do for it."""

from collections.abc import Iterator

from pmd_pipeline import sources
from pmd_pipeline.sources import Source


def all_sources() -> Iterator[str]:
    """A paragraph per source, in alphabetical order."""
    for name in sources.names():
        yield "\n".join(_summary(sources.load(name)))


def one_source(name: str) -> Iterator[str]:
    """All that is known of one source.

    Raises:
        PmdError: there is no such source.
    """
    source = sources.load(name)
    info = source.info
    yield "\n".join(_summary(source))
    yield f"  homepage   {info.homepage}\n  citation   {info.citation}"
    for entry in info.published:
        facts = [f"  file       {entry.pattern} ({entry.form}): {entry.what}"]
        if not entry.needed:
            facts.append("             not needed")
        if entry.url:
            facts.append(f"             {entry.url}")
        if entry.sha256:
            facts.append(f"             sha256 {entry.sha256}, {entry.num_bytes or 0:,} bytes")
        yield "\n".join(facts)


def _summary(source: Source) -> Iterator[str]:
    info = source.info
    rows = f", {info.upstream_rows:,} rows upstream" if info.upstream_rows else ""
    yield f"{source.name}: {info.title}"
    yield f"  pairs      {info.paper_pairs:,} of {info.paper_words} words in the paper{rows}"
    yield f"  licence    {info.licence}"
    yield f"  images     {info.images}"
    yield f"  by hand    {info.by_hand or 'nothing: pmd build downloads the annotation files'}"
