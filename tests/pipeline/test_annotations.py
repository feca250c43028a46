import hashlib
import io
import random
import signal
import subprocess
import sys
import threading
import zipfile
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pmd_pipeline import sources
from pmd_pipeline.base.parallel import ignore_progress
from pmd_pipeline.base.record import BadRow
from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.sources import Info, PublishedFile, Source
from pmd_pipeline.sources.upstream.download import download_all, download_annotations

CONTENT = random.Random(0).randbytes(3_000_000)


class Upstream:
    """A server on loopback that serves `files` by path and records its `requests`.

    Args:
        supports_ranges: it answers range requests.
        breaks: bytes after which the connection of the next requests breaks, one each.
        statuses: statuses of the next responses, one each.
    """

    def __init__(self):
        self.files = {}
        self.supports_ranges = True
        self.breaks = []
        self.statuses = []
        self.requests = []

    def respond(self, request):
        self.requests.append((request.path, request.headers.get("Range")))
        self.agent = request.headers["User-Agent"]
        if self.statuses:
            request.send_error(self.statuses.pop(0))
        elif (content := self.files.get(request.path)) is None:
            request.send_error(404)
        else:
            self.send(request, content)

    def send(self, request, content):
        stated = request.headers.get("Range") if self.supports_ranges else None
        start = int(stated.removeprefix("bytes=").removesuffix("-")) if stated else 0
        if start >= len(content):
            request.send_response(416)
            request.send_header("Content-Range", f"bytes */{len(content)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        request.send_response(206 if stated else 200)
        if stated:
            last = len(content) - 1
            request.send_header("Content-Range", f"bytes {start}-{last}/{len(content)}")
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        until = start + self.breaks.pop(0) if self.breaks else len(content)
        request.wfile.write(content[start:until])


@pytest.fixture
def upstream():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            served.respond(self)

        def log_message(self, *_):
            pass

    served = Upstream()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.origin = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=partial(server.serve_forever, 0.01))
    thread.start()
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def download(upstream, folder, name="rows.tsv", pauses=None, **known):
    entry = PublishedFile(name, "", url=f"{upstream.origin}/{name}?x=1", **known)
    download_all(
        [entry],
        str(folder),
        "me@a.test",
        ignore_progress,
        wait=(pauses if pauses is not None else []).append,
    )


def test_a_file_is_downloaded_whole_with_a_contact_in_the_user_agent(upstream, tmp_path):
    upstream.files["/rows.tsv?x=1"] = CONTENT
    progress = []
    entry = PublishedFile("rows.tsv", "", url=f"{upstream.origin}/rows.tsv?x=1")

    download_all([entry], str(tmp_path / "raw"), "me@a.test", lambda *all_: progress.append(all_))

    assert (tmp_path / "raw" / "rows.tsv").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["rows.tsv"]
    assert upstream.requests == [("/rows.tsv?x=1", None)]
    assert upstream.agent.startswith("pmd-flava/")
    assert "me@a.test" in upstream.agent
    assert progress[-1] == (entry.url, {"bytes": len(CONTENT)})


def test_a_download_resumes_where_its_connection_broke(upstream, tmp_path):
    upstream.files["/rows.tsv?x=1"] = CONTENT
    upstream.breaks = [1_000_000] * 2 + [0]
    pauses = []

    download(upstream, tmp_path, pauses=pauses, sha256=hashlib.sha256(CONTENT).hexdigest())

    assert (tmp_path / "rows.tsv").read_bytes() == CONTENT
    assert [stated for _, stated in upstream.requests] == [
        None,
        "bytes=1000000-",
        "bytes=2000000-",
        "bytes=2000000-",
    ]
    assert pauses == [1.0, 1.0, 2.0]
    assert "me@a.test" in upstream.agent


def test_broken_connections_that_bring_new_bytes_do_not_end_a_download(upstream, tmp_path):
    upstream.files["/rows.tsv?x=1"] = CONTENT
    upstream.breaks = [100_000] * 20

    download(upstream, tmp_path)

    assert (tmp_path / "rows.tsv").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_the_file_from_its_beginning(upstream, tmp_path):
    upstream.files["/rows.tsv?x=1"] = CONTENT
    upstream.supports_ranges = False
    upstream.breaks = [1_500_000]

    download(upstream, tmp_path)

    assert (tmp_path / "rows.tsv").read_bytes() == CONTENT


_KILLED = """
import os, signal, sys
from pmd_pipeline.sources.upstream.download import download_all
from pmd_pipeline.sources import PublishedFile
def die(url, counts):
    if counts["bytes"] > 1_000_000:
        os.kill(os.getpid(), signal.SIGKILL)
download_all([PublishedFile("rows.tsv", "", url=sys.argv[1])], sys.argv[2], "", die)
"""


def test_a_killed_download_is_resumed(upstream, tmp_path):
    upstream.files["/rows.tsv?x=1"] = CONTENT
    arguments = [sys.executable, "-c", _KILLED, f"{upstream.origin}/rows.tsv?x=1", str(tmp_path)]
    ended = subprocess.run(arguments, check=False)
    there = (tmp_path / ".rows.tsv.part").stat().st_size

    download(upstream, tmp_path)

    assert ended.returncode == -signal.SIGKILL
    assert there > 0
    assert upstream.requests[1:] == [("/rows.tsv?x=1", f"bytes={there}-")]
    assert (tmp_path / "rows.tsv").read_bytes() == CONTENT
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("there", [CONTENT, CONTENT + b"of an older file"])
def test_a_partial_file_of_the_full_size_or_more_becomes_the_file(there, upstream, tmp_path):
    upstream.files["/rows.tsv?x=1"] = CONTENT
    (tmp_path / ".rows.tsv.part").write_bytes(there)

    download(upstream, tmp_path)

    assert (tmp_path / "rows.tsv").read_bytes() == CONTENT
    assert len(upstream.requests) == 1 + (there != CONTENT)


def test_a_file_of_another_sha256_is_refused_and_removed(upstream, tmp_path):
    upstream.files["/rows.tsv?x=1"] = CONTENT

    with pytest.raises(PmdError) as caught:
        download(upstream, tmp_path, sha256="0" * 64)

    assert str(caught.value) == (
        f"{upstream.origin}/rows.tsv?x=1 has sha256 {hashlib.sha256(CONTENT).hexdigest()} instead "
        f"of {'0' * 64}: upstream has changed it; if you trust it, put it into {tmp_path} yourself"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_is_one_sentence_at_once(upstream, tmp_path):
    with pytest.raises(PmdError) as caught:
        download(upstream, tmp_path)

    assert str(caught.value) == (
        f"{upstream.origin}/rows.tsv?x=1 answers HTTP 404: get it by hand and put it into "
        f"{tmp_path}"
    )
    assert len(upstream.requests) == 1


def test_server_errors_are_retried_with_growing_pauses_and_then_fail(upstream, tmp_path):
    upstream.files["/rows.tsv?x=1"] = CONTENT
    upstream.statuses = [503, 429, 500]
    pauses = []
    download(upstream, tmp_path / "a", pauses=pauses)
    upstream.statuses = [503] * 4

    with pytest.raises(PmdError) as caught:
        download(upstream, tmp_path / "b")

    assert pauses == [1.0, 2.0, 4.0]
    assert (tmp_path / "a" / "rows.tsv").read_bytes() == CONTENT
    assert str(caught.value).startswith(
        f"cannot download {upstream.origin}/rows.tsv?x=1 (HTTP 503): run the same command again"
    )


def test_a_refused_connection_is_one_sentence(tmp_path):
    entry = PublishedFile("a", "", url="http://127.0.0.1:1/a")

    with pytest.raises(PmdError, match=r"cannot download http://127\.0\.0\.1:1/a \(NewConn"):
        download_all([entry], str(tmp_path), "", ignore_progress, wait=lambda _: None)


@pytest.mark.parametrize("url", ["ftp://a.test/a", "file:///etc/passwd", "s3://a/b"])
def test_only_http_addresses_are_requested(url, tmp_path):
    with pytest.raises(PmdError, match=f"{url} is not an http address"):
        download_all([PublishedFile("a", "", url=url)], str(tmp_path), "", ignore_progress)


def test_a_folder_that_cannot_be_made_is_one_sentence(upstream, tmp_path):
    (tmp_path / "raw").write_bytes(b"")

    with pytest.raises(PmdError, match=r"cannot write .*/raw/\.rows\.tsv\.part: "):
        download(upstream, tmp_path / "raw")


@contextmanager
def held_by_another_process(path):
    code = (
        "import fcntl, sys; file = open(sys.argv[1], 'ab'); fcntl.flock(file, fcntl.LOCK_EX);"
        "print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout.readline() == b"held\n"
        yield
        other.stdin.close()


def test_two_processes_do_not_write_the_same_download(upstream, tmp_path):
    with (
        held_by_another_process(tmp_path / ".rows.tsv.part"),
        pytest.raises(PmdError, match=r"\.rows\.tsv\.part is being written by another process"),
    ):
        download(upstream, tmp_path)

    assert upstream.requests == []


def toy(*published, shares_coco=False):
    info = Info("Toy", "", "", "", published, "", by_hand="ask a.test", shares_coco=shares_coco)
    return Source("toy", info, lambda _: iter([BadRow("")]))


def zipped(**files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return out.getvalue()


def test_the_first_downloadable_form_is_downloaded(upstream, tmp_path):
    upstream.files = {"/b.tsv": b"b", "/extra.tsv": b"extra", "/c.tsv": b"c"}
    at = upstream.origin
    source = toy(
        PublishedFile("a1.tsv", "", form="a", url=f"{at}/a1.tsv"),
        PublishedFile("a2.tsv", "", form="a"),
        PublishedFile("b.tsv", "", form="b", url=f"{at}/b.tsv"),
        PublishedFile("extra.tsv", "", form="b", url=f"{at}/extra.tsv", required=False),
        PublishedFile("more.tsv", "", form="b", required=False),
        PublishedFile("c.tsv", "", form="c", url=f"{at}/c.tsv"),
    )

    assert download_annotations(source, str(tmp_path / "b"), None, "", ignore_progress)[1] == []
    assert download_annotations(source, str(tmp_path / "c"), "c", "", ignore_progress)[1] == []
    with pytest.raises(PmdError, match=r"a has no a1\.tsv, a2\.tsv"):
        download_annotations(source, str(tmp_path / "a"), "a", "", ignore_progress)

    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["b.tsv", "extra.tsv"]
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["c.tsv"]
    assert not (tmp_path / "a").exists()


def test_a_complete_form_needs_no_request(upstream, tmp_path):
    source = toy(
        PublishedFile("a.tsv", "", url=f"{upstream.origin}/a.tsv"),
        PublishedFile("b.tsv", "", form="b"),
    )
    (tmp_path / "b.tsv").write_bytes(b"")

    assert download_annotations(source, str(tmp_path), None, "", ignore_progress)[1] == []

    assert upstream.requests == []


def test_files_that_the_user_has_are_not_requested(upstream, tmp_path):
    upstream.files = {"/b.tsv": b"b"}
    at = upstream.origin
    source = toy(
        PublishedFile("a*.tsv", "", url=f"{at}/a.zip"),
        PublishedFile("b.tsv", "", url=f"{at}/b.tsv"),
    )
    (tmp_path / "a1.tsv").write_bytes(b"")

    download_annotations(source, str(tmp_path), None, "", ignore_progress)

    assert upstream.requests == [("/b.tsv", None)]


def test_files_of_a_form_appear_together_or_not_at_all(upstream, tmp_path):
    upstream.files = {"/a.tsv": b"a"}
    at = upstream.origin
    source = toy(
        PublishedFile("a.tsv", "", form="ab", url=f"{at}/a.tsv", required=False),
        PublishedFile("b.tsv", "", form="ab", url=f"{at}/b.tsv"),
        PublishedFile("a.tsv", "", form="a"),
    )
    with pytest.raises(PmdError, match=r"HTTP 404: ask a\.test"):
        download_annotations(source, str(tmp_path), None, "", ignore_progress)
    with pytest.raises(PmdError, match=r"has no b.tsv, nor a.tsv"):
        sources.find_annotations(source, str(tmp_path))
    upstream.files["/b.tsv"] = b"b"

    download_annotations(source, str(tmp_path), None, "", ignore_progress)

    assert [span.form for span in sources.find_annotations(source, str(tmp_path)).spans] == [
        "ab",
        "ab",
    ]
    assert [path for path, _ in upstream.requests].count("/a.tsv") == 1


@pytest.fixture
def karpathy(upstream, monkeypatch):
    """COCO's files of the form `karpathy`, served by `upstream`."""
    coco = sources.load("coco")
    entries = coco.files_of("karpathy")
    moved = [
        PublishedFile(
            entry.pattern,
            entry.description,
            f"{upstream.origin}/{Path(entry.url).name}",
            form=entry.form,
            role=entry.role,
            required=entry.required,
        )
        for entry in entries
    ]
    info = toy(*moved, shares_coco=True).info
    monkeypatch.setattr(sys.modules["pmd_pipeline.sources.coco"], "INFO", info)
    upstream.files = {
        "/annotations_trainval2014.zip": zipped(captions_train2014__json=b"{}"),
        "/caption_datasets.zip": zipped(dataset_coco__json=b"{}", dataset_flickr8k__json=b"{}"),
    }
    return upstream


def test_a_source_that_shares_cocos_images_gets_karpathys_split_in_the_folder_beside(
    karpathy, tmp_path
):
    source = toy(PublishedFile("regions.json", ""), shares_coco=True)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "regions.json").write_bytes(b"")

    first = download_annotations(source, str(tmp_path / "toy"), None, "", ignore_progress)
    num_requests = len(karpathy.requests)
    again = download_annotations(source, str(tmp_path / "toy"), None, "", ignore_progress)

    assert first[1] == again[1] == []
    assert first[0].held_out
    assert first == again
    assert len(karpathy.requests) == num_requests == 2
    forms = {
        span.form
        for span in sources.find_annotations(sources.load("coco"), str(tmp_path / "coco")).spans
    }
    assert forms == {"karpathy"}


@pytest.mark.parametrize("place", ["toy", "coco"])
def test_karpathys_split_is_not_requested_where_it_exists(place, karpathy, tmp_path):
    source = toy(PublishedFile("regions.json", ""), shares_coco=True)
    for path in ("toy/regions.json", f"{place}/dataset_coco.json"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"")

    assert download_annotations(source, str(tmp_path / "toy"), None, "", ignore_progress)[1] == []

    assert karpathy.requests == []


def test_a_failed_download_of_karpathys_split_is_a_warning(karpathy, tmp_path):
    source = toy(PublishedFile("regions.json", ""), shares_coco=True)
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "regions.json").write_bytes(b"")
    del karpathy.files["/caption_datasets.zip"]

    _, [sentence] = download_annotations(source, str(tmp_path / "toy"), None, "", ignore_progress)

    assert sentence.startswith(
        f"toy goes on without dataset_coco.json: {karpathy.origin}/caption_datasets.zip answers "
        "HTTP 404"
    )
