"""An image that crashes the decoder fails alone."""

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

MARK = b"this one crashes"

CRASHING_DECODER = f"""
import ctypes
import simplejpeg

decode = simplejpeg.decode_jpeg

def crashing(body, *args, **keywords):
    if {MARK!r} in bytes(body):
        ctypes.string_at(0)  # a segmentation fault
    return decode(body, *args, **keywords)

simplejpeg.decode_jpeg = crashing
"""
"""Python imports `sitecustomize` at the start of every process."""


@pytest.fixture
def crashing_decoder(tmp_path, monkeypatch):
    folder = tmp_path / "crashing_decoder"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CRASHING_DECODER)
    monkeypatch.setenv("PYTHONPATH", str(folder))


def mark(path: Path) -> None:
    """Insert the mark into a JPEG as a comment."""
    body = path.read_bytes()
    comment = b"\xff\xfe" + (2 + len(MARK)).to_bytes(2, "big") + MARK
    path.write_bytes(body[:2] + comment + body[2:])


@pytest.fixture
def body(tmp_path):
    return (write_pictures(tmp_path / "one", ["1.jpg"]) / "1.jpg").read_bytes()


@pytest.mark.slow
def test_a_suspect_is_decoded_in_a_subprocess_and_fails_only_if_that_crashes_too(
    tmp_path, crashing_decoder, body
):
    keys = ["0" * _KEY_BYTES, "1" * _KEY_BYTES]
    marked = tmp_path / "marked.jpg"
    marked.write_bytes(body)
    mark(marked)
    (tmp_path / ".part.first.note.tmp").write_text(keys[0])
    (tmp_path / ".part.second.note.tmp").write_text(keys[1])
    processor = ImageProcessor(Images())

    with isolated_processor(processor, str(tmp_path), "part") as isolated:
        intact = isolated.process(keys[0], FetchedImage(body))
        crashed = isolated.process(keys[1], FetchedImage(marked.read_bytes()))

    assert intact == processor.process(FetchedImage(body))
    assert (crashed.status, crashed.reason) == ("failed_to_resize", "crash")
    assert not list(tmp_path.glob(".part*"))


def test_the_note_holds_the_key_of_the_record_in_progress(tmp_path, body):
    class Recording(ImageProcessor):
        def process(self, fetched):
            notes.append([path.read_bytes().decode() for path in tmp_path.glob(".part*")])
            return super().process(fetched)

    notes = []
    with isolated_processor(Recording(Images()), str(tmp_path), "part") as isolated:
        isolated.process("a" * _KEY_BYTES, FetchedImage(body))
        notes.append([path.read_bytes().decode() for path in tmp_path.glob(".part*")])

    assert notes == [["a" * _KEY_BYTES], ["-" * _KEY_BYTES]]


@pytest.mark.slow
@pytest.mark.parametrize("runner", ["local", "ray"])
def test_a_build_loses_the_images_that_crash_the_decoder_and_no_others(
    tmp_path, crashing_decoder, runner
):
    write_rows(tmp_path / "raw", toy_rows(60))
    pictures = write_pictures(tmp_path / "pictures", [f"{n}.jpg" for n in range(60)])
    recipe = tmp_path / "toy.toml"
    recipe.write_text('source = "cc3m"\npart_records = 20\n')
    crashing = random.Random(0).sample(range(60), 1)
    for number in crashing:
        mark(pictures / f"{number}.jpg")

    process = subprocess.run(
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

    assert process.returncode == 0, process.stderr
    manifest = load_manifest(str(tmp_path / "manifests" / "cc3m.json"))
    pairs = Counter(address for _, address in toy_rows(60))
    num_lost = sum(pairs[f"http://a.test/{number}.jpg"] for number in crashing)
    assert manifest.sources["cc3m"].counts.failed == {"crash": num_lost}
    ledgers = (tmp_path / "out" / "shards" / "cc3m").glob("*.parquet")
    rows = pl.concat([pl.read_parquet(path) for path in sorted(ledgers)])
    crashed_urls = rows.filter(pl.col("reason") == "crash")["url"].to_list()
    assert crashed_urls == [f"http://a.test/{number}.jpg" for number in crashing]
    assert not list((tmp_path / "out").rglob("*.note.tmp"))
