"""One module per source, found by its name; each has `INFO` and `read()`.

A source module tells what upstream publishes (`INFO`) and what the rows of one span of it say
(`read`). It knows nothing of filters, of fetching or of shards. The keyword-only arguments of
`read` are the `[options]` of its recipe.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from pmd_pipeline.base.record import BadRow, Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.models import Kind
from pmd_pipeline.sources.upstream.files import Span, UpstreamFile, as_one, find, fits

UNIMODAL = ("bookcorpus", "ccnews", "imagenet1k")
"""Sources of images alone or texts alone: what FLAVA learns from besides PMD."""


@dataclass(frozen=True)
class Published:
    """One annotation file, or one family of them, as upstream publishes it.

    Args:
        pattern: glob that the file's base name fits, without `.gz` or `.bz2`.
        what: what the file is, in a few words.
        url: where it can be downloaded without asking anyone.
        sha256: of what is behind `url`, where known.
        num_bytes: size of what is behind `url`, where known.
        form: files of one form make a complete input; the first form that is there is read.
        role: what the file is among the files of its form, told to `read` in `span.role`.
        needed: the form is incomplete without such a file.
        cut: how the file is cut into spans; None for a file that is read beside every span.
    """

    pattern: str
    what: str
    url: str | None = None
    sha256: str | None = None
    num_bytes: int | None = None
    form: str = "main"
    role: str = ""
    needed: bool = True
    cut: Callable[[UpstreamFile], Sequence[tuple[int, int | None]]] | None = as_one


@dataclass(frozen=True)
class Info:
    """What a user must know of a source before building it.

    Args:
        title: upstream's name.
        homepage: upstream's page.
        licence: of the annotations and of the images, in a sentence.
        citation: authors, title, venue, year.
        published: every file that `read` understands, preferred forms first.
        images: where images come from and what is left of them.
        paper_pairs: pairs in FLAVA's table of PMD; 0 for what is not in it.
        paper_words: mean caption length in words in the same table.
        by_hand: what the user has to fetch themself and where; empty when nothing.
        upstream_rows: rows upstream publishes, where it says so.
        shares_coco: some images are COCO's, so Karpathy's held-out images are looked for.
        kind: what the source has: pairs, images alone, or texts alone.
    """

    title: str
    homepage: str
    licence: str
    citation: str
    published: tuple[Published, ...]
    images: str
    paper_pairs: int = 0
    paper_words: float = 0.0
    by_hand: str = ""
    upstream_rows: int | None = None
    shares_coco: bool = False
    kind: Kind = "pairs"


@dataclass(frozen=True)
class Source:
    """A source module with its parts named and typed."""

    name: str
    info: Info
    read: Callable[..., Iterator[Row | BadRow]]

    def forms(self) -> list[str]:
        """The forms that the source's files may have, the preferred one first."""
        return list(dict.fromkeys(entry.form for entry in self.info.published))

    def published(self, form: str) -> list[Published]:
        """The files of `form`."""
        return [entry for entry in self.info.published if entry.form == form]

    def downloadable(self, form: str | None = None) -> list[Published]:
        """The files with an address of `form`, or of the first form that can be downloaded.

        A form can be downloaded when all files that it needs have an address.
        """
        for name in [form] if form else self.forms():
            entries = self.published(name)
            if all(entry.url for entry in entries if entry.needed):
                return [entry for entry in entries if entry.url]
        return []


def names() -> list[str]:
    """The sources of PMD by name, in alphabetical order."""
    modules = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return sorted(name for name in modules if not name.startswith("_") and name not in UNIMODAL)


def load(name: str) -> Source:
    """The source called `name`.

    Raises:
        PmdError: there is no such source.
    """
    known = [*names(), *UNIMODAL]
    if name not in known:
        raise PmdError(f"no source {name!r}; there are {', '.join(known)}")
    module = importlib.import_module(f"{__name__}.{name}")
    return Source(name=name, info=cast(Info, module.INFO), read=module.read)


def find_spans(source: Source, folder: str, form: str | None = None) -> list[Span]:
    """The spans of the source's files under `folder`, in upstream order.

    Takes `form`, or the first form of `INFO.published` whose needed files are all there.

    Raises:
        PmdError: no form is complete; the sentence says what is missing and how to get it.
    """
    files = find(folder)
    if form is not None and form not in source.forms():
        raise PmdError(f"{source.name} has no form {form!r}; it has {', '.join(source.forms())}")
    missing: list[str] = []
    for name in [form] if form else source.forms():
        entries = source.published(name)
        there = {e: [file for file in files if fits(file, e.pattern)] for e in entries}
        lacking = [e.pattern for e in entries if e.needed and not there[e]]
        if not lacking and any(there.values()):
            return _spans(there)
        missing.append(_named(lacking or [e.pattern for e in entries]))
    how = [f"see `pmd sources {source.name}`"]
    if source.downloadable(form):
        how.insert(0, "build without --raw and they are downloaded")
    if source.info.by_hand:
        how.append(source.info.by_hand)
    raise PmdError(f"{folder} has no {', nor '.join(missing)}: {'; '.join(how)}")


def _named(patterns: Sequence[str]) -> str:
    """The patterns, or the first three of many."""
    more = f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
    return ", ".join(patterns[:3]) + more


def _spans(there: dict[Published, list[UpstreamFile]]) -> list[Span]:
    beside = tuple(
        (entry.role, file) for entry, files in there.items() if not entry.cut for file in files
    )
    return [
        Span(file, start, stop, entry.form, entry.role, beside)
        for entry, files in there.items()
        if entry.cut
        for file in files
        for start, stop in entry.cut(file)
    ]
