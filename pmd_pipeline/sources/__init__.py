"""Sources: one module each, with `INFO` and `read()`.

`INFO` describes what upstream publishes. `read` turns one span of an annotation file into rows;
its arguments after the span are the `[options]` of the recipe. A source does not filter, fetch or
write. A module of this package is found by its name, another one by the `module` of a recipe.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from pmd_pipeline.base.record import BadRow, Candidate, Row
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.models import Kind
from pmd_pipeline.contract.plugins import check_digest, failure, load_module
from pmd_pipeline.contract.suggestions import suggestion
from pmd_pipeline.sources.upstream.files import Span, UpstreamFile, as_one, list_files, matches
from pmd_pipeline.sources.upstream.held_out import HeldOutImages, find_held_out


@dataclass(frozen=True)
class PublishedFile:
    """One annotation file, or a family of them, as upstream publishes it.

    Args:
        pattern: glob for the base name of the file, without `.gz` or `.bz2`.
        description: content of the file, in a few words.
        url: address of the file, where it can be downloaded without a login.
        sha256: SHA-256 of what is behind `url`, where known.
        num_bytes: size of what is behind `url`, where known.
        form: files of one form make a complete input; the first complete form is read.
        role: what the file is among the files of its form; `read` finds it in `span.role`.
        required: the form is incomplete without such a file.
        cut: function that cuts the file into spans; None for a file that is read beside every span.
    """

    pattern: str
    description: str
    url: str | None = None
    sha256: str | None = None
    num_bytes: int | None = None
    form: str = "main"
    role: str = ""
    required: bool = True
    cut: Callable[[UpstreamFile], Sequence[tuple[int, int | None]]] | None = as_one


@dataclass(frozen=True)
class PaperRow:
    """The row of a source in FLAVA's table of PMD.

    Args:
        number: position in the table, from 1.
        pairs: image-text pairs, as the paper rounds them.
        words: mean caption length in words.
    """

    number: int
    pairs: int
    words: float


@dataclass(frozen=True)
class Info:
    """Description of a source.

    Args:
        title: upstream's name.
        homepage: upstream's page.
        licence: of the annotations and of the images, in a sentence.
        citation: authors, title, venue, year.
        files: every file that `read` understands, preferred forms first.
        images: where the images come from, and how many still exist.
        collection: `pmd`, `unimodal` (the other corpora of FLAVA), or a name of one's own.
        paper: the source's row in FLAVA's table of PMD.
        by_hand: what the user has to fetch, and where; empty if nothing.
        upstream_rows: rows that upstream publishes, where it states the number.
        shares_coco: some images are COCO's, so Karpathy's held-out images are looked for.
        kind: what the source has: pairs, images alone, or texts alone.
    """

    title: str
    homepage: str
    licence: str
    citation: str
    files: tuple[PublishedFile, ...]
    images: str
    collection: str = "own"
    paper: PaperRow | None = None
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
        return list(dict.fromkeys(file.form for file in self.info.files))

    def files_of(self, form: str) -> list[PublishedFile]:
        """The files of `form`."""
        return [file for file in self.info.files if file.form == form]

    def downloadable(self, form: str | None = None) -> list[PublishedFile]:
        """The files with an address of `form`, or of the first form that can be downloaded.

        A form can be downloaded when all files that it requires have an address.
        """
        for name in [form] if form else self.forms():
            files = self.files_of(name)
            if all(file.url for file in files if file.required):
                return [file for file in files if file.url]
        return []


def names(collection: str | None = None) -> list[str]:
    """Names of the package's sources, or of those of one collection, in alphabetical order."""
    modules = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    sources = sorted(name for name in modules if not name.startswith("_"))
    if collection is None:
        return sources
    return [name for name in sources if load(name).info.collection == collection]


def load(name: str, module: str | None = None, module_sha256: str | None = None) -> Source:
    """The source called `name`: the package's, or the one that the user's `module` defines.

    Raises:
        PmdError: there is no such source; or the module is missing, cannot be imported, has no
            `INFO` or `read`, or is not of the file whose SHA-256 is given.
    """
    if module is not None:
        check_digest(module, module_sha256)
        return _users_source(name, module)
    if name not in names():
        raise PmdError(f"no source {name!r}; {suggestion(name, names())}")
    loaded = importlib.import_module(f"{__name__}.{name}")
    return Source(name=name, info=loaded.INFO, read=loaded.read)


def _users_source(name: str, module: str) -> Source:
    loaded = load_module(module)
    if not isinstance(getattr(loaded, "INFO", None), Info):
        raise PmdError(f"{module}: it defines no INFO, an Info of pmd_pipeline.sources")
    if not inspect.isfunction(getattr(loaded, "read", None)):
        raise PmdError(f"{module}: it defines no function read(span) that yields rows")
    return Source(name=name, info=loaded.INFO, read=_checked(loaded.read, f"{module}:read"))


def _checked(
    read: Callable[..., Iterator[Row | BadRow]], reference: str
) -> Callable[..., Iterator[Row | BadRow]]:
    """`read` of the user's own, with its mistakes as one sentence each."""

    @wraps(read)
    def checked_read(span: Span, **options: Any) -> Iterator[Row | BadRow]:  # noqa: ANN401 - options
        try:
            for row in read(span, **options):
                if not _is_row(row):
                    raise PmdError(
                        f"{reference}: {row!r:.200} is no Row with a text as its id and Candidates "
                        "with texts, and no BadRow"
                    )
                yield row
        except PmdError:
            raise
        except Exception as error:  # the user's code may raise anything
            raise failure(reference, error, f"on {span.file}") from error

    return checked_read


def _is_row(row: object) -> bool:
    if isinstance(row, BadRow):
        return True
    return (
        isinstance(row, Row)
        and isinstance(row.id, str)
        and all(isinstance(one, Candidate) and isinstance(one.text, str) for one in row.candidates)
    )


@dataclass(frozen=True)
class Annotations:
    """The annotation files of a source in a folder.

    Args:
        folder: the folder.
        spans: spans for `read`, in upstream order.
        held_out: Karpathy's split, if the source shares images with COCO and the file exists.
    """

    folder: str
    spans: tuple[Span, ...]
    held_out: HeldOutImages | None = None


def find_annotations(source: Source, folder: str, form: str | None = None) -> Annotations:
    """The source's files under `folder`, and Karpathy's split, also of the folder `coco` beside.

    Takes `form`, or the first form of `INFO.files` whose required files are all in the folder.

    Raises:
        PmdError: no form is complete; the message lists what is missing and how to get it.
    """
    files = list_files(folder)
    held_out = None
    if source.info.shares_coco:
        held_out = find_held_out(files) or find_held_out(
            list_files(str(Path(folder).parent / "coco"))
        )
    return Annotations(folder, tuple(_find_spans(source, folder, files, form)), held_out)


def _find_spans(
    source: Source, folder: str, files: Sequence[UpstreamFile], form: str | None
) -> list[Span]:
    if form is not None and form not in source.forms():
        raise PmdError(f"{source.name} has no form {form!r}; it has {', '.join(source.forms())}")
    missing: list[str] = []
    for name in [form] if form else source.forms():
        entries = source.files_of(name)
        matching = {e: [file for file in files if matches(file, e.pattern)] for e in entries}
        absent = [e.pattern for e in entries if e.required and not matching[e]]
        if not absent and any(matching.values()):
            return _cut_spans(matching)
        missing.append(_list_patterns(absent or [e.pattern for e in entries]))
    advice = [f"see `pmd sources {source.name}`"]
    if source.downloadable(form):
        advice.insert(0, "build without --raw and they are downloaded")
    if source.info.by_hand:
        advice.append(source.info.by_hand)
    raise PmdError(f"{folder} has no {', nor '.join(missing)}: {'; '.join(advice)}")


def _list_patterns(patterns: Sequence[str]) -> str:
    """The first three patterns, and the number of the others."""
    more = f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
    return ", ".join(patterns[:3]) + more


def _cut_spans(matching: dict[PublishedFile, list[UpstreamFile]]) -> list[Span]:
    beside = tuple(
        (entry.role, file) for entry, files in matching.items() if not entry.cut for file in files
    )
    return [
        Span(file, start, stop, entry.form, entry.role, beside)
        for entry, files in matching.items()
        if entry.cut
        for file in files
        for start, stop in entry.cut(file)
    ]
