"""A picture that kills its decoder costs that picture, and no other."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
from toy import toy_rows, write_pictures, write_rows

from pmd_pipeline.contract.manifest import load_manifest
from pmd_pipeline.images.decode.isolation import _KEY_BYTES, isolated_processor
from pmd_pipeline.images.decode.processor import ImageProcessor
from pmd_pipeline.images.fetch.client import FetchedImage
from pmd_pipeline.recipe import Images

MARK = b"this one kills"

DEADLY = f"""
import ctypes
import simplejpeg

decode = simplejpeg.decode_jpeg

def deadly(body, *args, **keywords):
    if {MARK!r} in bytes(body):
        ctypes.string_at(0)  # as a decoder does: at once, in the thread that is at it
    return decode(body, *args, **keywords)

simplejpeg.decode_jpeg = deadly
"""
"""A decoder with a hole in it: Python runs a module of this name in every process it starts."""


@pytest.fixture
def deadly(tmp_path, monkeypatch):
    folder = tmp_path / "deadly"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(DEADLY)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def mark(path: Path) -> None:
    """Write the mark into a JPEG, as a comment."""
    body = path.read_bytes()
    comment = b"\xff\xfe" + (2 + len(MARK)).to_bytes(2, "big") + MARK
    path.write_bytes(body[:2] + comment + body[2:])


@pytest.fixture
def body(tmp_path):
    return (write_pictures(tmp_path / "one", ["1.jpg"]) / "1.jpg").read_bytes()


@pytest.mark.slow
def test_a_suspect_is_made_apart_and_only_what_kills_again_is_a_crash(tmp_path, deadly, body):
    keys = ["0" * _KEY_BYTES, "1" * _KEY_BYTES]
    marked = tmp_path / "marked.jpg"
    marked.write_bytes(body)
    mark(marked)
    (tmp_path / ".part.first.note.tmp").write_text(keys[0])
    (tmp_path / ".part.second.note.tmp").write_text(keys[1])
    maker = ImageProcessor(Images())

    with isolated_processor(maker, str(tmp_path), "part") as careful:
        well = careful.process(keys[0], FetchedImage(body))
        killed = careful.process(keys[1], FetchedImage(marked.read_bytes()))

    assert well == maker.process(FetchedImage(body))
    assert (killed.status, killed.reason) == ("failed_to_resize", "crash")
    assert not list(tmp_path.glob(".part*"))


def test_who_dies_leaves_the_key_of_what_it_was_at(tmp_path, body):
    class Dying(ImageProcessor):
        def process(self, found):
            notes.append([path.read_bytes().decode() for path in tmp_path.glob(".part*")])
            return super().process(found)

    notes = []
    with isolated_processor(Dying(Images()), str(tmp_path), "part") as careful:
        careful.process("a" * _KEY_BYTES, FetchedImage(body))
        notes.append([path.read_bytes().decode() for path in tmp_path.glob(".part*")])

    assert notes == [["a" * _KEY_BYTES], ["-" * _KEY_BYTES]]


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["local", "ray"])
def test_a_build_loses_the_pictures_that_kill_and_no_others(tmp_path, deadly, runner):
    write_rows(tmp_path / "raw", toy_rows(60))
    pictures = write_pictures(tmp_path / "pictures", [f"{n}.jpg" for n in range(60)])
    recipe = tmp_path / "toy.toml"
    recipe.write_text('source = "cc3m"\npart_records = 20\n')
    killers = random.Random(0).sample(range(60), 1)
    for number in killers:
        mark(pictures / f"{number}.jpg")

    done = subprocess.run(
        [
            *(sys.executable, "-m", "pmd_pipeline.cli", "build", "--recipe", str(recipe)),
            *("--raw", str(tmp_path / "raw"), "--images", str(pictures)),
            *("--out", str(tmp_path / "out"), "--manifests", str(tmp_path / "manifests")),
            *("--runner", runner, "--workers", "2", "--quiet"),
        ],
        check=False,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    manifest = load_manifest(str(tmp_path / "manifests" / "cc3m.json"))
    pairs = Counter(address for _, address in toy_rows(60))
    lost = sum(pairs[f"http://a.test/{number}.jpg"] for number in killers)
    assert manifest.sources["cc3m"].counts.failed == {"crash": lost}
    ledgers = (tmp_path / "out" / "shards" / "cc3m").glob("*.parquet")
    rows = pl.concat([pl.read_parquet(path) for path in sorted(ledgers)])
    crashed = rows.filter(pl.col("reason") == "crash")["url"].to_list()
    assert crashed == [f"http://a.test/{number}.jpg" for number in killers]
    assert not list((tmp_path / "out").rglob("*.note.tmp"))
