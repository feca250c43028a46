import bz2
import gzip
import io
import json
import random
import tarfile
import zipfile
from itertools import chain, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pmd_pipeline import sources
from pmd_pipeline.base.record import BadRow
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import Info, PublishedFile, Source, find_annotations
from pmd_pipeline.sources.upstream import files as upstream
from pmd_pipeline.sources.upstream.files import (
    Span,
    UpstreamFile,
    by_lines,
    json_items,
    lines,
    list_files,
)

CONTENT = "first\tone\nsecond \u2028 and \x85 on one line\r\n\nlast, without an end".encode()
LINES = [
    b"first\tone",
    "second \u2028 and \x85 on one line".encode(),
    b"",
    b"last, without an end",
]


def packed(folder, kind, content, name="rows.tsv"):
    """`content` as a file in `folder`, plain or packed by `kind`."""
    folder.mkdir(exist_ok=True)
    if kind == "plain":
        (folder / name).write_bytes(content)
    elif kind in {"gz", "bz2"}:
        pack = gzip.compress if kind == "gz" else bz2.compress
        (folder / f"{name}.{kind}").write_bytes(pack(content))
    elif kind == "zip":
        with zipfile.ZipFile(folder / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"below/{name}", content)
    elif kind == "zip of gz":
        with zipfile.ZipFile(folder / "all.zip", "w") as archive:
            archive.writestr(f"{name}.gz", gzip.compress(content))
    else:
        mode = {"tar": "w", "tgz": "w:gz", "tar.gz": "w:gz", "tar.bz2": "w:bz2"}[kind]
        with tarfile.open(folder / f"all.{kind}", mode) as tar:
            member = tarfile.TarInfo(f"./below/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder


KINDS = ["plain", "gz", "bz2", "zip", "zip of gz", "tar", "tgz", "tar.gz", "tar.bz2"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_reads_the_same_however_it_is_packed(kind, tmp_path):
    [file] = list_files(str(packed(tmp_path, kind, CONTENT)))

    assert file.name == "rows.tsv"
    assert list(lines(Span(file))) == LINES


@pytest.mark.parametrize("kind", KINDS)
def test_json_reads_the_same_however_it_is_packed(kind, tmp_path):
    content = b'{"images": [{"id": 1, "x": 0.5}, {"id": 2}]}'
    [file] = list_files(str(packed(tmp_path, kind, content, "a.json")))

    found = list(json_items(file, "images.item"))

    assert found == [{"id": 1, "x": 0.5}, {"id": 2}]
    assert [type(value) for value in found[0].values()] == [int, float]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_packed_file_cut_short_is_one_sentence_that_names_it(kind, tmp_path):
    content = random.Random(0).randbytes(30_000) + b"\n"
    packed(tmp_path, kind, content)
    [path] = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:20_000])

    with pytest.raises(PmdError) as caught:
        list(chain.from_iterable(lines(Span(file)) for file in list_files(str(tmp_path))))

    assert str(path) in str(caught.value)
    assert str(caught.value).endswith("download it again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["gz", "bz2", "zip"])
def test_a_damaged_byte_in_the_middle_is_one_sentence_that_names_the_file(kind, tmp_path):
    packed(tmp_path, kind, b"".join(b"%d a line\n" % number for number in range(5000)))
    [path] = tmp_path.iterdir()
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 255
    path.write_bytes(damaged)
    [file] = list_files(str(tmp_path))

    with pytest.raises(PmdError) as caught:
        list(lines(Span(file)))

    assert str(caught.value).startswith(f"{file} is cut short or damaged (")


def test_a_zip_with_a_password_is_one_sentence(tmp_path):
    packed(tmp_path, "zip", CONTENT)
    [path] = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[6] |= 1  # the flag of a password, in the member's header and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)
    [file] = list_files(str(tmp_path))

    with pytest.raises(PmdError, match=r"cannot be unpacked here .*: unpack it first"):
        list(lines(Span(file)))


def test_a_missing_file_is_one_sentence(tmp_path):
    for file in (UpstreamFile(f"{tmp_path}/none.tsv"), UpstreamFile(f"{tmp_path}/none.zip", "a")):
        with pytest.raises(PmdError) as caught:
            list(lines(Span(file)))

        assert str(caught.value) == f"cannot read {file}: No such file or directory"


@given(
    content=st.lists(
        st.sampled_from([b"a", b"bc", b"\n", b"\r\n", "\u2028".encode(), "\x85".encode()])
    ).map(b"".join),
    span_bytes=st.integers(1, 12),
)
@example(content=b"ab\ncd\n", span_bytes=3)  # a span that begins with a line
@example(content=b"\n\n\n", span_bytes=1)
def test_spans_of_any_size_give_every_line_once(tmp_path, content, span_bytes):
    path = tmp_path / "rows.tsv"
    path.write_bytes(content)
    whole = content.replace(b"\r\n", b"\n").split(b"\n")
    expected = whole[:-1] if whole[-1] == b"" else whole

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upstream, "SPAN_BYTES", span_bytes)
        spans = [Span(UpstreamFile(str(path)), *cut) for cut in by_lines(UpstreamFile(str(path)))]

    assert len(spans) == max(1, -(-len(content) // span_bytes))
    assert [line for span in spans for line in lines(span)] == expected


@given(data=st.data())
def test_spans_with_any_bounds_give_every_line_once(tmp_path, data):
    path = tmp_path / "rows.tsv"
    path.write_bytes(CONTENT)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(CONTENT) + 5))))
    bounds = [0, *cuts, None]

    spans = [Span(UpstreamFile(str(path)), start, stop) for start, stop in pairwise(bounds)]

    assert [line for span in spans for line in lines(span)] == LINES


def test_only_a_plain_file_is_cut(tmp_path):
    packed(tmp_path, "gz", CONTENT)
    [file] = list_files(str(tmp_path))

    assert list(by_lines(file)) == [(0, None)]
    assert list(by_lines(UpstreamFile("a.zip", "b.tsv"))) == [(0, None)]


def test_a_file_without_newlines_does_not_exhaust_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "_LONGEST_LINE", 10)
    (tmp_path / "rows.tsv").write_bytes(b"123456789\nshort\n1234567890")
    [file] = list_files(str(tmp_path))

    found = lines(Span(file))

    assert [next(found), next(found)] == [b"123456789", b"short"]
    with pytest.raises(PmdError, match="a line of more than 10 bytes at byte 16"):
        next(found)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is not a whole JSON file"),
        (b'{"images": [{"id": 1}, {"i', "is not a whole JSON file"),
        (b"caption\thttp://a.test/1.jpg\n", "is not a whole JSON file"),
        (b'{"images": ["\xff"]}', "is not a whole JSON file"),
        (b'{"images": [1e999]}', "is not a whole JSON file"),
        (b'{"images": 5}', "is JSON, but has no list at 'images'"),
        (b'[{"id": 1}]', "is JSON, but has no list at 'images'"),
    ],
)
def test_unexpected_json_is_one_sentence(content, sentence, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    [file] = list_files(str(tmp_path))

    with pytest.raises(PmdError) as caught:
        list(json_items(file, "images.item"))

    assert str(caught.value).startswith(f"{file} {sentence}")
    assert "\n" not in str(caught.value)
    assert "\\n" not in str(caught.value)


def test_an_object_instead_of_a_list_is_one_sentence_and_an_empty_list_is_no_error(tmp_path):
    (tmp_path / "a.json").write_text('{"images": []}')
    [file] = list_files(str(tmp_path))

    assert list(json_items(file, "images.item")) == []
    assert list(json_items(file, "licences.item", optional=True)) == []
    with pytest.raises(PmdError, match="is JSON, but has no list at its top"):
        list(json_items(file, "item"))


def test_files_are_listed_by_path_and_each_name_once(tmp_path):
    for path in ("b.tsv", "a/c.tsv.gz", "a/b.tsv.gz", "z/c.tsv", "d.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    packed(tmp_path / "y", "zip", b"", "d.json")
    packed(tmp_path / "y", "tar", b"", "e.json")

    found = [str(file).removeprefix(f"{tmp_path}/") for file in list_files(str(tmp_path))]

    assert found == ["a/b.tsv.gz", "a/c.tsv.gz", "d.json", "y/all.tar!./below/e.json"]


def test_hidden_files_and_those_of_macos_are_not_listed(tmp_path):
    for path in (".a.tsv.part", ".trash/b.tsv", "c.tsv"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("d.tsv", b"")
        archive.writestr("__MACOSX/._d.tsv", b"")

    assert [file.name for file in list_files(str(tmp_path))] == ["d.tsv", "c.tsv"]
    assert list_files(str(tmp_path / "nowhere")) == []


def test_a_file_that_is_not_an_archive_is_one_sentence(tmp_path):
    for name in ("a.zip", "a.tar", "a.tgz"):
        (tmp_path / name).write_bytes(b"<html>not found</html>" * 100)

        with pytest.raises(PmdError, match=rf"/{name} is not a whole archive \(.*\): download it"):
            list_files(str(tmp_path))
        (tmp_path / name).unlink()


def toy_source(*published, by_hand=""):
    info = Info("Toy", "", "", "", published, "", by_hand=by_hand)
    return Source("toy", info, lambda _: iter([BadRow("")]))


def test_the_first_form_with_all_required_files_is_read(tmp_path):
    source = toy_source(
        PublishedFile("extra.json", "", form="best", required=False, role="extra"),
        PublishedFile("best.json", "", form="best", role="rows"),
        PublishedFile("ids.json", "", form="best", role="ids", cut=None),
        PublishedFile("plain*.json", "", form="plain"),
    )
    for name in ("plain1.json", "plain2.json", "extra.json", "best.json"):
        (tmp_path / name).write_bytes(b"")
    without_ids = find_annotations(source, str(tmp_path)).spans
    (tmp_path / "ids.json").write_bytes(b"")

    spans = find_annotations(source, str(tmp_path)).spans

    assert [span.file.name for span in without_ids] == ["plain1.json", "plain2.json"]
    assert [(span.form, span.role, span.file.name) for span in spans] == [
        ("best", "extra", "extra.json"),
        ("best", "rows", "best.json"),
    ]
    assert {span.companion("ids").name for span in spans} == {"ids.json"}
    assert [span.form for span in find_annotations(source, str(tmp_path), "plain").spans] == [
        "plain"
    ] * 2


def test_optional_files_alone_are_an_incomplete_form(tmp_path):
    source = toy_source(
        PublishedFile("extra.json", "", required=False), PublishedFile("a.json", "")
    )
    (tmp_path / "extra.json").write_bytes(b"")

    with pytest.raises(PmdError, match=r"has no a\.json"):
        find_annotations(source, str(tmp_path))


def test_an_error_about_missing_files_says_what_to_do(tmp_path):
    by_hand = toy_source(
        PublishedFile("urls.txt", "", form="text"),
        PublishedFile("captions.txt", "", form="text"),
        PublishedFile("all.json", "", form="json"),
        by_hand="ask the authors at a.test",
    )
    (tmp_path / "urls.txt").write_bytes(b"")
    free = toy_source(
        *(PublishedFile(f"{n}.tsv", "", url=f"http://a.test/{n}.tsv") for n in range(5))
    )

    with pytest.raises(PmdError) as asked_for:
        find_annotations(by_hand, str(tmp_path))
    with pytest.raises(PmdError) as downloaded:
        find_annotations(free, str(tmp_path))

    assert str(asked_for.value) == (
        f"{tmp_path} has no captions.txt, nor all.json: see `pmd sources toy`; ask the authors at "
        "a.test"
    )
    assert str(downloaded.value) == (
        f"{tmp_path} has no 0.tsv, 1.tsv, 2.tsv and 2 more: build without --raw and they are "
        "downloaded; see `pmd sources toy`"
    )


def test_a_form_that_the_source_does_not_have_is_one_sentence(tmp_path):
    with pytest.raises(PmdError) as caught:
        find_annotations(sources.load("sbu"), str(tmp_path), "parquet")

    assert str(caught.value) == "sbu has no form 'parquet'; it has json, text"


@pytest.mark.parametrize("name", sources.names("pmd"))
def test_every_source_has_advice_on_missing_files(name, tmp_path):
    with pytest.raises(PmdError) as caught:
        find_annotations(sources.load(name), str(tmp_path))

    assert json.dumps(str(caught.value)).count("\\n") == 0
    assert len(str(caught.value)) < 900
    assert "--raw" in str(caught.value)
    assert sources.load(name).info.by_hand in str(caught.value)
