"""The contract package: ledger schema, names, boxes, image formats, paths and user modules."""

import dataclasses
import math
import subprocess
import sys
from io import BytesIO
from typing import get_args

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from pmd_pipeline.contract.boxes import are_boxes, is_box
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.contract.image_format import FORMATS, open_stored, stored_format
from pmd_pipeline.contract.names import Address, FileName, RelativePath, Sha256
from pmd_pipeline.contract.paths import ShardPaths
from pmd_pipeline.contract.plugins import check_digest, load_reference, source_digest
from pmd_pipeline.contract.reasons import Status
from pmd_pipeline.contract.schemas import (
    LEDGER_SCHEMA,
    LedgerColumn,
    LedgerRow,
    ledger_bytes,
    ledger_rows,
)


def test_the_columns_of_the_ledger_have_one_order_everywhere():
    names = [field.name for field in dataclasses.fields(LedgerRow)]

    assert list(get_args(LedgerColumn)) == names == LEDGER_SCHEMA.names


def test_a_ledger_row_is_read_as_it_was_written():
    rows = [
        LedgerRow(key="0" * 16, id="1", num_pairs=2, status=Status.SUCCESS, image_offset=1 << 40),
        LedgerRow(key="1" * 16, id="2", num_pairs=1, status=Status.DROPPED, reason="is_large"),
    ]

    table = pq.read_table(BytesIO(ledger_bytes(rows)))

    assert list(ledger_rows(table)) == rows


NAMES = TypeAdapter(FileName)
HOSTILE = [
    "",
    ".",
    "..",
    ".bashrc",
    "a/b",
    "../x",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "a\nb",
    "x" * 256,
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_a_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(ValidationError, match="no name of a file"):
        NAMES.validate_python(name)


@pytest.mark.parametrize("path", ["../x", "a//b", "/a", "a/../b", "a/.b", "a/", "./a"])
def test_a_path_that_could_leave_its_folder_is_refused(path):
    with pytest.raises(ValidationError, match="no name of a file"):
        TypeAdapter(RelativePath).validate_python(path)


def test_a_file_below_the_folder_is_a_relative_path():
    path = "annotations/crafts_2017.json"

    assert TypeAdapter(RelativePath).validate_python(path) == path


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "../" + "0" * 61])
def test_a_sha256_has_64_hex_digits(digest):
    with pytest.raises(ValidationError, match="no SHA-256"):
        TypeAdapter(Sha256).validate_python(digest)


@pytest.mark.parametrize("address", ["ftp://a/b.tar", "zip://x::s3://y", "a::b", "a\nb", "a\\b"])
def test_an_address_of_another_protocol_is_refused(address):
    with pytest.raises(ValidationError):
        TypeAdapter(Address).validate_python(address)


@pytest.mark.parametrize(
    "address", ["../data/shards/coco/00000.tar", "s3://b/a.tar", "/data/a.tar"]
)
def test_paths_and_known_protocols_are_addresses(address):
    assert TypeAdapter(Address).validate_python(address) == address


@given(st.lists(st.one_of(st.floats(), st.integers(), st.booleans(), st.text()), max_size=5))
def test_a_box_bounds_an_area_inside_the_image(sides):
    if is_box(sides):
        x0, y0, x1, y1 = sides
        assert all(map(math.isfinite, sides))
        assert 0 <= x0 < x1 <= 1
        assert 0 <= y0 < y1 <= 1


@pytest.mark.parametrize(
    "sides",
    [
        (0.2, 0.5, 0.8, 0.5),
        (0.5, 0.2, 0.5, 0.8),
        (0.2, 0.8, 0.8, 0.5),
        (0.0, -0.1, 1.0, 1.0),
        (0.0, 0.0, 1.0, 1.1),
        (0.0, 0.0, 1.1, 1.0),
        (-0.1, 0.0, 1.0, 1.0),
    ],
)
def test_a_box_without_area_or_beyond_the_image_is_no_box(sides):
    assert not is_box(sides)


def test_a_box_that_float32_makes_empty_is_no_box():
    assert not is_box([0.5, 0.0, 0.5 + 1e-12, 1.0])
    assert not is_box([0.0, 0.0, 1e300, 1.0])
    assert are_boxes([[0.0, 0.0, 1.0, 1.0]], 1)
    assert not are_boxes([[0.0, 0.0, 1.0, 1.0]], 2)


@pytest.mark.parametrize("name", FORMATS)
def test_a_stored_image_is_recognised_by_its_first_bytes(name):
    out = BytesIO()
    Image.new("RGB", (8, 6)).save(out, FORMATS[name].pillow)

    assert stored_format(out.getvalue()) == FORMATS[name]
    assert open_stored(out.getvalue()).size == (8, 6)


def test_no_other_format_is_opened():
    out = BytesIO()
    Image.new("RGB", (8, 6)).save(out, "PNG")

    with pytest.raises(OSError, match="neither jpeg nor webp"):
        open_stored(out.getvalue())


@pytest.mark.parametrize("address", ["s3://b/coco/00007.tar", "s3://b/coco/00007.parquet"])
def test_all_files_of_a_shard_are_in_one_folder(address):
    paths = ShardPaths.of(address)

    assert paths == ShardPaths.in_folder("s3://b/coco", 7)
    assert paths.folder == "s3://b/coco"
    assert paths.name == "00007"


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Write `NAME.py` into the working directory; imports of it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text, encoding="utf-8")

    yield write
    for name in set(sys.modules) - before:
        if (tmp_path / f"{name}.py").exists():
            del sys.modules[name]


def test_a_module_in_the_working_directory_can_be_imported_here_and_in_new_processes(user_module):
    user_module("own_filters", "def is_short(caption: str) -> bool:\n    return len(caption) < 9\n")

    assert load_reference("own_filters:is_short")("a dog")
    script = "import own_filters; print(own_filters.is_short('a dog'))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    assert done.stdout == b"True\n"


def test_a_changed_module_has_another_digest_and_is_imported_anew(user_module):
    user_module("own_rule", "def keep(x: str) -> int:\n    return 1\n")
    before = source_digest("own_rule:keep")
    assert load_reference("own_rule:keep")("") == 1

    user_module("own_rule", "def keep(x: str) -> int:\n    return 2\n")

    assert load_reference("own_rule:keep")("") == 2
    assert source_digest("own_rule:keep") != before
    assert source_digest("own_rule") == source_digest("own_rule:keep")


@pytest.mark.parametrize("stated", [None, "0" * 64])
def test_a_module_of_another_digest_is_not_even_imported(user_module, stated):
    user_module("own_bomb", "raise SystemExit\n")

    with pytest.raises(
        PmdError, match=r"own_bomb:f: (its file has another|the rules state no) SHA"
    ):
        check_digest("own_bomb:f", stated)


@pytest.mark.parametrize(
    ("reference", "text", "sentence"),
    [
        ("nowhere_1:f", "", "there is no module 'nowhere_1'"),
        ("own_a:is_shrt", "def is_short(): ...", "did you mean 'is_short'"),
        ("own_b:f", "raise RuntimeError('no GPU')", "importing own_b fails: RuntimeError: no GPU"),
        ("own_c:f", "import nowhere_2", "importing own_c fails: No module named 'nowhere_2'"),
        ("own_d.f", "", "not of the form module:function"),
    ],
    ids=["no module", "misspelled", "raises", "imports what is not there", "no colon"],
)
def test_a_reference_that_cannot_be_loaded_is_one_sentence(user_module, reference, text, sentence):
    if text:
        user_module(reference.partition(":")[0], text)

    with pytest.raises(PmdError, match=sentence):
        load_reference(reference)
