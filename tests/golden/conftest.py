"""The sample world, built once for all golden tests by the commands that a user would give."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from golden_commands import run_well, sample_world
from golden_files import Golden

SCENES = 30
NINE = (
    *("cc12m", "cc3m", "coco", "localized_narratives", "redcaps", "sbu"),
    *("visual_genome", "wit", "yfcc100m"),
)
LOCAL = ("--runner", "local", "--workers", 2, "--quiet")


@dataclass(frozen=True)
class SampleDatasets:
    """A folder with the built sample world.

    Args:
        printed: by `pmd build`: a line for each manifest, with its path and its digest.
    """

    folder: Path
    printed: str

    @property
    def digests(self):
        """Digest of each manifest, by its path."""
        return dict(line.split("  ") for line in self.printed.splitlines())


@pytest.fixture
def golden(request):
    return Golden(request.config.getoption("--golden-rewrite"))


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """All sources as `pmd build` leaves them, before there are image codes."""
    folder = tmp_path_factory.mktemp("golden")
    with sample_world(folder, SCENES) as world:
        # few records in a part, so that sources have several
        (folder / "pmd.toml").write_text(
            f"include = {json.dumps(NINE)}\npart_records = 15\n"
            f'[fetch.connect_to]\n"*" = "{world.origin}"\n'
        )
        archives = [word for path in world.images for word in ("--images", path)]
        words = ("--recipe", "pmd.toml", "--raw", "world/raw", "--images", "web", *archives)
        printed = run_well("pmd", "build", *words, *LOCAL, cwd=folder)
    run_well("pmd", "tokenizer", "manifests/pmd.json", "--size", 400, "--quiet", cwd=folder)
    # as many tokens as the text encoder of flava_tiny takes
    (folder / "texts.toml").write_text(
        'include = ["ccnews", "bookcorpus"]\n[texts]\ntokenizer = "vocab.txt"\ntokens = 128\n'
    )
    for recipe in (("--recipe", "texts.toml"), ("--source", "imagenet1k")):
        words = (*recipe, "--raw", "world/raw", *LOCAL)
        printed += run_well("pmd", "build", *words, cwd=folder)
    return SampleDatasets(folder, printed)


@pytest.fixture(scope="session")
def coded(built):
    """The same after all that may follow a build: codes, kits, a report, a bundle, an export."""
    folder = built.folder
    for name in ("pmd", "imagenet1k"):
        sizes = ("--grid", 4, "--vocabulary", 32, "--views", 2)
        run_well("pmd", "codes", "make", f"manifests/{name}.json", *sizes, *LOCAL, cwd=folder)
    for words in (
        ("lock", "manifests/pmd.json", "--out", "kit", *LOCAL),
        ("lock", "manifests/pmd.json", "--out", "kit-hashed", "--hash-captions", *LOCAL),
        ("codes", "export", "manifests/imagenet1k.json", "--out", "exported", *LOCAL),
        ("report", "manifests/pmd.json", "--quiet"),
        ("bundle", "manifests/pmd.json", "--kit", "kit"),
    ):
        run_well("pmd", *words, cwd=folder)
    return built
