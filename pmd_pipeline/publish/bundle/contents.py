"""What goes into a bundle, by its place there."""

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
from pmd_pipeline.contract.paths import part_name
from pmd_pipeline.inspect.stats import lengths, remarks
from pmd_pipeline.publish.bundle.croissant import croissant
from pmd_pipeline.publish.bundle.project import this_project
from pmd_pipeline.publish.bundle.provenance import provenance
from pmd_pipeline.publish.bundle.recipes import recipe_toml
from pmd_pipeline.publish.bundle.requirements import pins, requirements_text, with_hashes
from pmd_pipeline.publish.bundle.wheel import wheel
from pmd_pipeline.publish.lockfile.format import LockFile, load_lockfile
from pmd_pipeline.recipe import recipe_folder

CONFIGS = "flava*.toml"
"""Training configurations among the recipes of the package."""

FIRST_CONFIG = "flava_pmd.toml"
"""The one that the README's command takes where the user gives none: the paper's."""

_KNOWN = frozenset(sources.names())
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class BundleRequest:
    """What a user wants in the bundle of the manifest at `manifest`.

    Args:
        kit: folder that `pmd lock` wrote.
        configs: training configurations; none takes those of the package.
        wheel: a wheel to take instead of making one of what is installed.
        hashes: pip's report on the requirements, which has their sha256.
        url: page of the dataset.
        published: its day of publication.
    """

    manifest: str
    kit: str | None = None
    configs: tuple[str, ...] = ()
    wheel: str | None = None
    hashes: str | None = None
    url: str | None = None
    published: str | None = None


Content = bytes | Path
"""A member's content: as it is, or the file that has it."""


def contents(wanted: BundleRequest) -> dict[str, Content]:
    """Every member of the bundle but `SHA256SUMS`, by its name.

    Raises:
        PmdError: something that is asked for is not there or not what it should be.
    """
    if wanted.published and not re.fullmatch(r"\d{4}-\d\d-\d\d", wanted.published):
        raise PmdError(f"--published {wanted.published}: give a day as YYYY-MM-DD")
    manifest = placed(load_manifest(wanted.manifest))
    project = this_project()
    name, content = _wheel(wanted.wheel) if wanted.wheel else wheel(project)
    pinned = pins(project.requires)
    if wanted.hashes:
        pinned = with_hashes(pinned, wanted.hashes)
    members: dict[str, Content] = {
        "manifest.json": (manifest.model_dump_json(indent=1) + "\n").encode(),
        "croissant.json": _json(croissant(manifest, wanted.url, wanted.published)),
        "provenance.json": _json(provenance(manifest, (name, FileDigest.of(name, content).sha256))),
        "requirements.txt": requirements_text(pinned).encode(),
        f"wheel/{name}": content,
        **_recipes(manifest),
        **_configs(wanted.configs),
    }
    kit = load_lockfile(wanted.kit) if wanted.kit else None
    if wanted.kit and kit:
        members |= _kit(wanted.kit, kit, manifest)
    facts = _facts(manifest, members, kit, has_hashes=wanted.hashes is not None)
    for page in ("README.md", "DATA_CARD.md"):
        members[page] = _TEMPLATES.get_template(page).render(facts).encode()
    return members


def placed(manifest: Manifest) -> Manifest:
    """`manifest` with its shards where a build beside it puts them; URLs stay what they are."""
    for name in (manifest.name, *manifest.sources):
        if not _NAME.fullmatch(name):
            raise PmdError(f"{name!r} can be no file's name: build or merge under a plain name")
    shards = [shard.model_copy(update={"path": _place(shard)}) for shard in manifest.shards]
    return manifest.model_copy(update={"shards": shards})


def build_commands(manifest: Manifest) -> Iterator[str]:
    """The commands that build the dataset from upstream: one, unless sources differ in limit."""
    packed = " --tokenizer vocab.txt" if manifest.kind == "text" else ""
    limits = {entry.limit for entry in manifest.sources.values()}
    if len(limits) == 1:
        yield _build_command(f"recipes/{manifest.name}.toml", limits.pop()) + packed
        return
    for source, entry in manifest.sources.items():
        yield _build_command(f"recipes/sources/{source}.toml", entry.limit) + packed
    inputs = " ".join(f"manifests/{source}.json" for source in manifest.sources)
    yield f"pmd merge {inputs} --out manifests/{manifest.name}.json"


def codes_command(manifest: Manifest) -> str | None:
    """The command that makes the image codes again, if the dataset has any."""
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


def _place(shard: ShardEntry) -> str:
    if "://" in shard.path:
        return shard.path
    extension = shard.path.rpartition(".")[2]
    return f"data/shards/{shard.source}/{part_name(shard.part)}.{extension}"


def _build_command(recipe: str, limit: int | None) -> str:
    return f"pmd build --recipe {recipe}" + (f" --limit {limit}" if limit is not None else "")


def _wheel(path: str) -> tuple[str, bytes]:
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
    own = sorted(
        recipe_folder().glob(CONFIGS), key=lambda one: (one.name != FIRST_CONFIG, one.name)
    )
    paths = given or [str(path) for path in own]
    names = [Path(path).name for path in paths]
    if twice := [name for name in names if names.count(name) > 1]:
        raise PmdError(f"two configurations are called {twice[0]}; rename one")
    return {f"configs/{name}": read_bytes(path) for name, path in zip(names, paths, strict=True)}


def _kit(folder: str, kit: LockFile, manifest: Manifest) -> dict[str, Content]:
    """The kit's files, as it names them; what else lies in its folder stays there."""
    if kit.manifest.digest != manifest.digest:
        raise PmdError(
            f"--kit {folder} is of {kit.manifest.name} {kit.manifest.digest[:16]}, not of "
            f"{manifest.name} {manifest.digest[:16]}: write it again with pmd lock"
        )
    members: dict[str, Content] = {"kit/kit.json": Path(folder, "kit.json")}
    for part in kit.parts:
        for file in (part.rows, *([part.codes.file] if part.codes else [])):
            path = Path(folder, part.source, file.name)
            if sha256_of(str(path)) != file.sha256:
                raise PmdError(
                    f"{path} is not the file that its kit names: pmd lock writes it again"
                )
            members[f"kit/{part.source}/{file.name}"] = path
    return members


def _facts(
    manifest: Manifest, members: dict[str, Content], kit: LockFile | None, *, has_hashes: bool
) -> dict[str, Any]:
    """What the pages say."""
    rows = lengths(manifest)
    by_name = {row.dataset: row for row in rows}
    return {
        "manifest": manifest,
        "thing": {"pairs": "pairs", "images": "images", "text": "texts"}[manifest.kind],
        "row_of": by_name,
        "total": rows[-1] if rows else None,
        "infos": {name: sources.load(name).info for name in manifest.sources if name in _KNOWN},
        "remarks": remarks(manifest),
        "build": list(build_commands(manifest)),
        "codes": codes_command(manifest),
        "tokenizers": sorted(
            {entry.rules.get("texts", {}).get("sha256", "") for entry in manifest.sources.values()}
        ),
        "kit": kit,
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
    autoescape=False,  # noqa: S701 - Markdown, of what the project and the manifest say
)
_TEMPLATES.filters |= {"count": "{:,}".format, "share": lambda part, all_: f"{part / all_:.1%}"}
