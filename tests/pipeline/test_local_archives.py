"""Local images in folders, zips and tars, intact and damaged."""

import io
import struct
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pmd_pipeline.contract.errors import PmdError, RecordError
from pmd_pipeline.images.local import archives
from pmd_pipeline.images.local.archives import archive_stamp, candidate_names, open_archive
from pmd_pipeline.index.records import IndexRecord

FILES = {
    "train2014/1.jpg": b"one",
    "train2014/2.jpg": b"two",
    "val2014/3.jpg": b"three",
    "val2014/2.jpg": b"another two",
    "4.jpg": b"four",
    "deep/er/4.jpg": b"another four",
}


def record(file=None, url=None):
    missing = dict.fromkeys(["licence", "width", "height", "sha256", "meta", "boxes"])
    return IndexRecord(
        **missing, key="0", id="1", url=url, file=file,
        captions=["a dog"], fields=["caption"], spans=[0], rows=[0],
    )  # fmt: skip


def make_folder(path, files):
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def make_zip(path, files, **options):
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.mkdir("train2014")
        for name, content in files.items():
            archive.writestr(name, content)


def make_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@pytest.fixture(params=["folder", "zip", "tar"])
def look_up(request, tmp_path):
    path = tmp_path / f"images.{request.param}"
    {"folder": make_folder, "zip": make_zip, "tar": make_tar}[request.param](path, FILES)
    return open_archive(str(path))


def body_of(fetched):
    return fetched.body if fetched else None


@pytest.mark.parametrize("name", FILES)
def test_an_image_is_found_by_its_path(look_up, name):
    assert look_up(record(file=name)).body == FILES[name]


@pytest.mark.parametrize(
    ("file", "body"),
    [
        ("coco/train2014/1.jpg", b"one"),
        ("coco/val2014/2.jpg", b"another two"),
        ("somewhere/4.jpg", b"four"),
        ("train2014/5.jpg", None),
        ("train2014", None),
        ("1", None),
    ],
)
def test_an_image_is_found_without_the_folder_around_it(look_up, file, body):
    assert body_of(look_up(record(file=file))) == body


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_image_in_a_zip_or_tar_is_found_by_a_unique_base_name(tmp_path, kind):
    path = tmp_path / f"images.{kind}"
    {"zip": make_zip, "tar": make_tar}[kind](path, FILES)
    look_up = open_archive(str(path))

    assert look_up(record(file="other/3.jpg")).body == b"three"
    assert look_up(record(url="https://a.example/x/3.jpg?size=z#top")).body == b"three"
    assert look_up(record(file="other/2.jpg")) is None  # two files have that name


def test_a_leading_dot_in_a_tar_is_ignored(tmp_path):
    make_tar(tmp_path / "images.tar", {f"./{name}": content for name, content in FILES.items()})
    look_up = open_archive(str(tmp_path / "images.tar"))

    assert look_up(record(file="train2014/2.jpg")).body == b"two"
    assert look_up(record(file="4.jpg")).body == b"four"


def test_candidate_names_go_from_exact_to_bare():
    both = record(file="a/b/c.jpg", url="http://a.example/x/d%20e.jpg?f/g#h")

    assert candidate_names(both) == ["a/b/c.jpg", "d%20e.jpg", "d e.jpg", "b/c.jpg", "c.jpg"]
    assert candidate_names(record(url="http://a.example/d.jpg#h/i")) == ["d.jpg"]
    assert candidate_names(record(url="http://a.example/")) == []
    assert candidate_names(record()) == []


@pytest.mark.parametrize(
    "name",
    [
        "../secret.jpg",
        "a/../../secret.jpg",
        "train2014/../../secret.jpg",
        "..",
        ".",
        "/",
        "a\0b",
        "n" * 300,
        "/".join(["n" * 200] * 30),
    ],
)
def test_a_hostile_name_does_not_leave_the_folder(tmp_path, name):
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    make_folder(tmp_path / "images", FILES)
    look_up = open_archive(str(tmp_path / "images"))

    assert look_up(record(file=name)) is None
    assert look_up(record(file=str(tmp_path / "secret.jpg"))) is None
    assert look_up(record(url=f"http://a.example/{name.replace('/', '%2F')}")) is None


def test_a_folder_may_have_symbolic_links(tmp_path):
    make_folder(tmp_path / "disk", FILES)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "train2014").symlink_to(tmp_path / "disk" / "train2014")

    look_up = open_archive(str(tmp_path / "images"))

    assert look_up(record(file="train2014/1.jpg")).body == b"one"


def test_links_and_folders_in_a_tar_are_skipped(tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            entry = tarfile.TarInfo(f"{kind.decode()}.jpg")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
    look_up = open_archive(str(tmp_path / "images.tar"))

    assert [look_up(record(file=f"{kind}.jpg")) for kind in "2156"] == [None] * 4


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_of_a_zip_fails_one_record(tmp_path, compression):
    path = tmp_path / "images.zip"
    make_zip(path, {"1.jpg": b"one" * 50, "2.jpg": b"two" * 50}, compression=compression)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("1.jpg").header_offset + 30 + len("1.jpg")
    content = bytearray(path.read_bytes())
    content[start : start + 4] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    look_up = open_archive(str(path))

    with pytest.raises(RecordError) as caught:
        look_up(record(file="1.jpg"))

    assert caught.value.kind == "truncated"
    assert look_up(record(file="2.jpg")).body == b"two" * 50


def test_a_tar_that_was_truncated_after_opening_fails_one_record(tmp_path):
    path = tmp_path / "images.tar"
    make_tar(path, {"1.jpg": b"one", "2.jpg": b"two" * 500})
    look_up = open_archive(str(path))
    path.write_bytes(path.read_bytes()[:2000])

    assert look_up(record(file="1.jpg")).body == b"one"
    with pytest.raises(RecordError) as caught:
        look_up(record(file="2.jpg"))
    assert caught.value.kind == "truncated"


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_a_file_above_the_limit_is_not_read(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_BYTES", 99)
    path = tmp_path / f"images.{kind}"
    make = {"folder": make_folder, "zip": make_zip, "tar": make_tar}[kind]
    make(path, {"1.jpg": bytes(99), "2.jpg": bytes(100)})
    look_up = open_archive(str(path))

    assert look_up(record(file="1.jpg")).body == bytes(99)
    with pytest.raises(RecordError) as caught:
        look_up(record(file="2.jpg"))
    assert caught.value.kind == "too_large"


@pytest.mark.parametrize(
    ("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar", "w:bz2"), ("a", "w:xz")]
)
def test_a_compressed_tar_is_refused(tmp_path, name, mode):
    make_tar(tmp_path / name, FILES, mode)

    with pytest.raises(PmdError, match="unpack it first"):
        open_archive(str(tmp_path / name))


def test_a_missing_archive_is_named_in_the_error():
    with pytest.raises(PmdError, match="--images nowhere/x: there is no such folder"):
        open_archive("nowhere/x")


@pytest.mark.parametrize("content", [b"", b"text", b"\xff\xd8\xff", b"PKtext" * 99, b"x" * 5000])
def test_another_file_is_named_in_the_error(tmp_path, content):
    (tmp_path / "images").write_bytes(content)

    with pytest.raises(PmdError, match="no whole zip" if content[:2] == b"PK" else "neither"):
        open_archive(str(tmp_path / "images"))


def test_a_truncated_zip_is_named_in_the_error(tmp_path):
    make_zip(tmp_path / "images.zip", FILES)
    (tmp_path / "images.zip").write_bytes((tmp_path / "images.zip").read_bytes()[:-30])

    with pytest.raises(PmdError, match="no whole zip"):
        open_archive(str(tmp_path / "images.zip"))


def test_a_member_without_a_name_is_skipped(tmp_path):
    make_zip(tmp_path / "images.zip", {"x": b"none", "1.jpg": b"one"})
    content = (tmp_path / "images.zip").read_bytes()
    (tmp_path / "images.zip").write_bytes(content[::-1].replace(b"x", b"\0", 1)[::-1])

    assert open_archive(str(tmp_path / "images.zip"))(record(file="1.jpg")).body == b"one"


def test_an_encrypted_zip_is_refused(tmp_path):
    path = tmp_path / "images.zip"
    make_zip(path, {"1.jpg": b"one"})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2")
    content[entry + 8 : entry + 10] = struct.pack("<H", 1)
    path.write_bytes(content)

    with pytest.raises(PmdError, match="encrypted"):
        open_archive(str(path))


def test_a_zip_with_an_unsupported_compression_is_refused(tmp_path):
    path = tmp_path / "images.zip"
    make_zip(path, {"1.jpg": b"one"})
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\1\2")
    content[entry + 10 : entry + 12] = struct.pack("<H", 9)  # Deflate64
    path.write_bytes(content)

    with pytest.raises(PmdError, match="unpack it"):
        open_archive(str(path))(record(file="1.jpg"))


@pytest.mark.parametrize("damage", ["cut", "header"])
def test_a_damaged_tar_is_refused(tmp_path, damage):
    path = tmp_path / "images.tar"
    make_tar(path, {f"{n}.jpg": b"n" * 1000 for n in range(9)})
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[5000:]
    else:
        content[1536 * 3 : 1536 * 3 + 8] = b"\xff" * 8
    path.write_bytes(content)

    with pytest.raises(PmdError, match="no whole tar"):
        open_archive(str(path))


def test_a_tar_with_a_zip_inside_is_a_tar(tmp_path):
    make_zip(tmp_path / "inner.zip", FILES)
    make_tar(
        tmp_path / "images.tar", {"1.jpg": b"1", "z.zip": (tmp_path / "inner.zip").read_bytes()}
    )

    assert open_archive(str(tmp_path / "images.tar"))(record(file="1.jpg")).body == b"1"


def test_many_threads_each_get_their_own_member(look_up):
    names = [*FILES] * 100
    with ThreadPoolExecutor(16) as pool:
        bodies = list(pool.map(lambda name: look_up(record(file=name)).body, names))

    assert bodies == [FILES[name] for name in names]


def test_many_threads_may_read_one_compressed_zip(tmp_path):
    files = {f"{n}.jpg": bytes([n]) * 50_000 for n in range(20)}
    make_zip(tmp_path / "images.zip", files, compression=zipfile.ZIP_DEFLATED)
    look_up = open_archive(str(tmp_path / "images.zip"))
    with ThreadPoolExecutor(16) as pool:
        bodies = list(pool.map(lambda name: look_up(record(file=name)).body, [*files] * 10))

    assert bodies == [*files.values()] * 10


def test_a_changed_archive_is_opened_again(tmp_path):
    path = tmp_path / "images.tar"
    make_tar(path, {"1.jpg": b"one"})
    assert open_archive(str(path))(record(file="1.jpg")).body == b"one"

    make_tar(path, {"0.jpg": b"zero", "1.jpg": b"another one"})
    assert open_archive(str(path))(record(file="1.jpg")).body == b"another one"


def test_the_stamp_of_an_archive_is_its_name_and_size(tmp_path):
    for folder in ("a", "b"):
        make_folder(tmp_path / folder, {"images.zip": b"12345"})

    assert {archive_stamp(str(tmp_path / folder / "images.zip")) for folder in "ab"} == {
        "images.zip 5"
    }
    assert archive_stamp(str(tmp_path / "a")) == "a"


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_damage_raises_at_most_an_error_with_a_message(tmp_path, kind):
    make = {"zip": make_zip, "tar": make_tar}[kind]
    files = {f"{n}.jpg": b"image" * 20 for n in range(3)}
    whole = tmp_path / f"whole.{kind}"
    make(whole, files, **({"compression": zipfile.ZIP_DEFLATED} if kind == "zip" else {}))
    numbers = iter(range(10_000))

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def check(data):
        content = bytearray(whole.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        del content[data.draw(st.just(len(content)) | st.integers(0, len(content))) :]
        path = tmp_path / f"{next(numbers)}.{kind}"
        path.write_bytes(content)
        try:
            look_up = open_archive(str(path))
        except PmdError:
            return
        for name in files:
            try:
                look_up(record(file=name))
            except PmdError as error:
                assert str(error)  # noqa: PT017 - one of two ways
        path.unlink()

    check()
