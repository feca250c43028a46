"""The members of a bundle, by their names."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from pmd_pipeline import sources
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.files import read_bytes, sha256_of
from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.contract.models import FileDigest, Manifest, ShardEntry
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.inspect.stats import lengths, remarks
from pmd_pipeline.publish.bundle.croissant import croissant, image_format
from pmd_pipeline.publish.bundle.project import this_project
from pmd_pipeline.publish.bundle.provenance import provenance
from pmd_pipeline.publish.bundle.recipes import recipe_toml
from pmd_pipeline.publish.bundle.requirements import pins, requirements_text, with_hashes
from pmd_pipeline.publish.bundle.wheel import wheel
from pmd_pipeline.publish.lockfile.format import LOCKFILE_NAME, LockFile, load_lockfile
from pmd_pipeline.recipe import recipe_folder

CONFIGS = "flava*.toml"
"""Training configurations among the recipes of the package."""

FIRST_CONFIG = "flava_pmd.toml"
"""The paper's configuration, which the README's command names unless the user gives others."""

_PACKAGED_SOURCES = frozenset(sources.names())
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class BundleRequest:
    """What to pack for the manifest at `manifest`.

    Args:
        lockfile: folder that `pmd lock` wrote.
        configs: training configurations; none packs those of the package.
        wheel: a wheel to pack instead of one made of the installed code.
        hashes: pip's report on the requirements, which has their sha256.
        url: page of the dataset.
        published: its day of publication.
    """

    manifest: str
    lockfile: str | None = None
    configs: tuple[str, ...] = ()
    wheel: str | None = None
    hashes: str | None = None
    url: str | None = None
    published: str | None = None


Content = bytes | Path
"""A member's content: the bytes, or the file that has them."""


def contents(request: BundleRequest) -> dict[str, Content]:
    """Every member of the bundle except `SHA256SUMS`, by its name.

    Raises:
        PmdError: a requested file does not exist or is not what it should be.
    """
    if request.published and not re.fullmatch(r"\d{4}-\d\d-\d\d", request.published):
        raise PmdError(f"--published {request.published}: give a day as YYYY-MM-DD")
    manifest = with_relative_paths(load_manifest(request.manifest))
    project = this_project()
    name, content = _given_wheel(request.wheel) if request.wheel else wheel(project)
    pinned = pins(project.requires)
    if request.hashes:
        pinned = with_hashes(pinned, request.hashes)
    wheel_digest = (name, FileDigest.of(name, content).sha256)
    members: dict[str, Content] = {
        "manifest.json": (manifest.model_dump_json(indent=1) + "\n").encode(),
        "croissant.json": _json(croissant(manifest, request.url, request.published)),
        "provenance.json": _json(provenance(manifest, wheel_digest)),
        "requirements.txt": requirements_text(pinned).encode(),
        f"wheel/{name}": content,
        **_recipes(manifest),
        **_configs(request.configs),
    }
    lockfile = load_lockfile(request.lockfile) if request.lockfile else None
    if request.lockfile and lockfile:
        members |= _lockfile_members(request.lockfile, lockfile, manifest)
    facts = _page_facts(manifest, members, lockfile, has_hashes=request.hashes is not None)
    for page in ("README.md", "DATA_CARD.md"):
        members[page] = _TEMPLATES.get_template(page).render(facts).encode()
    return members


def with_relative_paths(manifest: Manifest) -> Manifest:
    """`manifest` with the paths of shards that are built beside it; URLs stay as they are."""
    for name in (manifest.name, *manifest.sources):
        if not _NAME.fullmatch(name):
            raise PmdError(f"{name!r} cannot name a file: build or merge under a plain name")
    shards = [shard.model_copy(update={"path": _shard_path(shard)}) for shard in manifest.shards]
    return manifest.model_copy(update={"shards": shards})


def build_commands(manifest: Manifest) -> Iterator[str]:
    """The commands that build the dataset from upstream: one, unless limits of sources differ."""
    options = " --tokenizer vocab.txt" if manifest.kind == "text" else ""
    limits = {entry.limit for entry in manifest.sources.values()}
    if len(limits) == 1:
        yield _build_command(f"recipes/{manifest.name}.toml", limits.pop()) + options
        return
    for source, entry in manifest.sources.items():
        yield _build_command(f"recipes/sources/{source}.toml", entry.limit) + options
    inputs = " ".join(f"manifests/{source}.json" for source in manifest.sources)
    yield f"pmd merge {inputs} --out manifests/{manifest.name}.json"


def codes_command(manifest: Manifest) -> str | None:
    """The command that makes the image codes, if the dataset has any."""
    rules = manifest.codes
    if rules is None:
        return None
    start = f"pmd codes manifests/{manifest.name}.json"
    options = f"--vocabulary {rules.vocabulary}"
    if rules.tokenizer == "dalle":
        options = f"--weights dvae.safetensors --dtype {rules.dtype}"
    elif rules.tokenizer != "kmeans":
        has_weights = rules.sha256 != FileDigest.of("none", b"").sha256
        weights = " --weights WEIGHTS" if has_weights else ""
        options = f"--tokenizer {rules.tokenizer}{weights} --dtype {rules.dtype}"
    return f"{start} {options} --grid {rules.grid} --views {rules.views} --seed {rules.seed}"


def _shard_path(shard: ShardEntry) -> str:
    if "://" in shard.path:
        return shard.path
    paths = ShardPaths.in_folder(f"data/shards/{shard.source}", shard.part)
    return paths.ledger if shard.path == shard.ledger_path else paths.tar


def _build_command(recipe: str, limit: int | None) -> str:
    return f"pmd build --recipe {recipe}" + (f" --limit {limit}" if limit is not None else "")


def _given_wheel(path: str) -> tuple[str, bytes]:
    name = Path(path).name
    if not re.fullmatch(r"pmd_flava-[^-/]+-.+\.whl", name):
        raise PmdError(f"--wheel {path}: give a wheel of this project, pmd_flava-*.whl")
    return name, read_bytes(path)


def _recipes(manifest: Manifest) -> dict[str, Content]:
    if len(manifest.sources) == 1:
        source, entry = next(iter(manifest.sources.items()))
        return {f"recipes/{manifest.name}.toml": recipe_toml(source, entry).encode()}
    included = [f"sources/{source}.toml" for source in manifest.sources]
    return {
        f"recipes/{manifest.name}.toml": f"include = {json.dumps(included)}\n".encode(),
        **{
            f"recipes/sources/{source}.toml": recipe_toml(source, entry).encode()
            for source, entry in manifest.sources.items()
        },
    }


def _configs(given: Sequence[str]) -> dict[str, Content]:
    packaged = sorted(
        recipe_folder().glob(CONFIGS), key=lambda path: (path.name != FIRST_CONFIG, path.name)
    )
    paths = given or [str(path) for path in packaged]
    names = [Path(path).name for path in paths]
    if duplicates := [name for name in names if names.count(name) > 1]:
        raise PmdError(f"two configurations are called {duplicates[0]}; rename one")
    return {f"configs/{name}": read_bytes(path) for name, path in zip(names, paths, strict=True)}


def _lockfile_members(folder: str, lockfile: LockFile, manifest: Manifest) -> dict[str, Content]:
    """The files that the lock file names; other files in its folder are not packed."""
    if lockfile.manifest.digest != manifest.digest:
        raise PmdError(
            f"--kit {folder} is of {lockfile.manifest.name} {lockfile.manifest.digest[:16]}, not "
            f"of {manifest.name} {manifest.digest[:16]}: write it again with pmd lock"
        )
    members: dict[str, Content] = {f"kit/{LOCKFILE_NAME}": Path(folder, LOCKFILE_NAME)}
    for part in lockfile.parts:
        for file in (part.rows, *([part.codes.file] if part.codes else [])):
            path = Path(folder, part.source, file.name)
            if sha256_of(str(path)) != file.sha256:
                raise PmdError(
                    f"{path} is not the file in its lock file: write it again with pmd lock"
                )
            members[f"kit/{part.source}/{file.name}"] = path
    return members


def _page_facts(
    manifest: Manifest,
    members: dict[str, Content],
    lockfile: LockFile | None,
    *,
    has_hashes: bool,
) -> dict[str, Any]:
    """The variables of the templates."""
    rows = lengths(manifest)
    packaged = [name for name in manifest.sources if name in _PACKAGED_SOURCES]
    return {
        "manifest": manifest,
        "thing": {"pairs": "pairs", "images": "images", "text": "texts"}[manifest.kind],
        "row_of": {row.dataset: row for row in rows},
        "total": rows[-1] if rows else None,
        "infos": {name: sources.load(name).info for name in packaged},
        "remarks": remarks(manifest),
        "formats": sorted({image_format(manifest, name).pillow for name in manifest.sources}),
        "build": list(build_commands(manifest)),
        "codes": codes_command(manifest),
        "tokenizers": sorted(
            {entry.rules.get("texts", {}).get("sha256", "") for entry in manifest.sources.values()}
        ),
        "lockfile": lockfile,
        "has_hashes": has_hashes,
        "wheel": next(name for name in members if name.startswith("wheel/")),
        "configs": [name for name in members if name.startswith("configs/")],
        "num_bytes": sum(shard.num_bytes for shard in manifest.shards),
    }


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("pmd_pipeline.publish.bundle"),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    autoescape=False,  # noqa: S701 - Markdown of our own texts and of the manifest
)
_TEMPLATES.filters |= {"count": "{:,}".format, "share": lambda part, all_: f"{part / all_:.1%}"}
