"""Hostile hosts: each behaviour, its result, and that it ends within the timeout."""

import gzip
import io
import shutil
import socket
import ssl
import struct
import subprocess
import threading
import time
import zipfile
import zlib
from typing import NamedTuple

import pytest
from fake_host import FakeHost, drip, in_sequence, new_client, redirect, response
from PIL import Image

from pmd_pipeline.contract.errors import RecordError
from pmd_pipeline.contract.reasons import FAILURE_REASONS, Status
from pmd_pipeline.images.decode.decoder import open_image
from pmd_pipeline.images.decode.stored_image import make_stored_image
from pmd_pipeline.recipe import Fetch, Images

TIMEOUT = 0.5
MOST_BYTES = 100_000
SOON = 1.0
"""Seconds above the timeout that any fetch may take."""


def image_file(form="JPEG", size=(40, 30), mode="RGB"):
    out = io.BytesIO()
    Image.new(mode, size, 9).save(out, form)
    return out.getvalue()


def zipped():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("1.jpg", image_file())
    return out.getvalue()


def header_only_png(side):
    """A PNG whose header states a size that its pixels do not have."""

    def chunk(name, content):
        checksum = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checksum

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def png_with(name, content):
    """A PNG with an additional chunk."""
    body, head = image_file("PNG"), 8 + 25
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return body[:head] + struct.pack(">I", len(content)) + name + content + checksum + body[head:]


def jpeg_with_exif(entries):
    """A JPEG whose EXIF is a directory with `entries`."""
    exif = b"Exif\0\0II*\0\x08\0\0\0" + entries
    body = image_file()
    return body[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + body[2:]


def tiff_of_many_strips():
    """A TIFF that states 2**32 - 1 strips."""
    tags = [(256, 1, 40), (257, 1, 30), (273, 2**32 - 1, 8), (279, 2**32 - 1, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, count, at) for tag, count, at in tags)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4)


BOMB = zlib.compress(bytes(50 << 20), 9)
CYCLE = struct.pack("<HHHII", 1, 0x8769, 4, 1, 8) + struct.pack("<I", 8)
MANY_ENTRIES = (
    struct.pack("<H", 65_535) + struct.pack("<HHII", 0x0112, 3, 2**32 - 1, 2**32 - 16) * 5000
)

JPEG = image_file()
CHUNKED = response(body=b"", Content_Length="", Transfer_Encoding="chunked")


def forever(head, block):
    """Sends `head`, then `block` without end."""

    def send(connection):
        connection.sendall(head)
        while True:
            connection.sendall(block * (1 + (1 << 16) // len(block)))

    return lambda _head: send


def last(content):
    """Sends `content` and ends the connection."""
    return lambda _head: lambda connection: connection.sendall(content)


def reset(content=b""):
    """Sends `content` and breaks the connection."""

    def send(connection):
        connection.sendall(content)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return lambda _head: send


def silent(content=b""):
    """Sends `content` and nothing more."""

    def send(connection):
        connection.sendall(content)
        connection.recv(1)

    return lambda _head: send


def then_image(*contents):
    """Sends one content for each connection and closes it; at last an image."""
    remaining = list(contents)
    return lambda _head: (
        lambda connection: connection.sendall(
            remaining.pop(0) if remaining else response(body=JPEG)
        )
    )


class Behaviour(NamedTuple):
    name: str
    respond: object
    result: str
    requests: int | None = None


B = Behaviour
HEAD = b"HTTP/1.1 200 OK\r\n"
GOOD = response(body=JPEG)
BEHAVIOURS = [
    # slow
    B("drip: status", lambda: drip(b"HTT"), "connect", 3),
    B("drip: header", lambda: drip(HEAD + b"X-Slow: "), "timeout", 1),
    B("drip: body", lambda: drip(response(body=b"", Content_Length=1000)), "timeout", 1),
    B(
        "drip: body without length",
        lambda: drip(response(body=b"", Content_Length="")),
        "timeout",
        1,
    ),
    B("drip: chunk size", lambda: drip(CHUNKED + b"0"), "timeout", 1),
    B("drip: chunk", lambda: drip(CHUNKED + b"1000\r\n"), "timeout", 1),
    B("drip: trailer", lambda: drip(CHUNKED + b"2\r\nab\r\n0\r\nX: "), "timeout", 1),
    B("drip: redirect", lambda: drip(redirect("/2.jpg", body=b"x")[:-1]), "connect"),
    B("drip: not found", lambda: drip(response(404, b"", Content_Length=1000)), "http_404", 1),
    B("drip: continue", lambda: drip(b"HTTP/1.1 100 Continue\r\n\r\n"), "connect", 3),
    B("silence", silent, "timeout", 1),
    B("silence after the head", lambda: silent(response(body=b"", Content_Length=9)), "timeout", 1),
    B("silence in the head", lambda: silent(HEAD + b"Content-Le"), "timeout", 1),
    # endless
    B("endless body", lambda: forever(response(body=b"", Content_Length=""), b"x"), "too_large", 1),
    B("endless chunks", lambda: forever(CHUNKED, b"4\r\nabcd\r\n"), "too_large", 1),
    B("endless headers", lambda: forever(HEAD, b"X: y\r\n"), "connect", 3),
    B("endless header", lambda: forever(HEAD + b"X: ", b"y"), "connect", 3),
    B("endless status", lambda: forever(b"HTTP/1.1 200 ", b"y"), "connect", 3),
    B("endless chunk size", lambda: forever(CHUNKED, b"0"), "connect", 3),
    B("endless chunk extension", lambda: forever(CHUNKED + b"4;", b"x"), "timeout", 1),
    B("endless trailers", lambda: forever(CHUNKED + b"0\r\n", b"X: y\r\n"), "connect", 3),
    B("endless continue", lambda: forever(b"", b"HTTP/1.1 100 Continue\r\n\r\n"), "connect", 3),
    B(
        "endless redirect",
        lambda: forever(response(302, b"", Location="/2.jpg", Content_Length=1 << 40), b"x"),
        "redirects",
        6,
    ),
    B(
        "endless not found",
        lambda: forever(response(404, b"", Content_Length=""), b"x"),
        "http_404",
    ),
    # lengths
    B("length too great", lambda: last(response(body=JPEG, Content_Length=9999)), "connect", 3),
    B("length too small", lambda: last(response(body=JPEG, Content_Length=50)), "truncated", 1),
    B("length negative", lambda: last(response(body=JPEG, Content_Length=-5)), "connect", 3),
    B("length no number", lambda: last(response(body=JPEG, Content_Length="many")), "connect", 3),
    B(
        "length of a terabyte",
        lambda: last(response(body=JPEG, Content_Length=1 << 40)),
        "too_large",
    ),
    B(
        "length of 5000 digits",
        lambda: last(response(body=JPEG, Content_Length="9" * 5000)),
        Status.SUCCESS,
        1,
    ),
    B(
        "two lengths",
        lambda: last(HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
        "connect",
    ),
    B(
        "chunks and a length",
        lambda: last(
            CHUNKED.replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\n")
            + b"%x\r\n%b\r\n0\r\n\r\n" % (len(JPEG), JPEG)
        ),
        Status.SUCCESS,
        1,
    ),
    B("chunks that stop", lambda: last(CHUNKED + b"5\r\nab"), "connect", 3),
    B("chunk of negative size", lambda: last(CHUNKED + b"-5\r\nabcde\r\n0\r\n\r\n"), "connect"),
    B("chunk of no size", lambda: last(CHUNKED + b"\r\nabcde\r\n0\r\n\r\n"), "connect"),
    B("chunk of a wrong size", lambda: last(CHUNKED + b"zz\r\nabcde\r\n0\r\n\r\n"), "connect"),
    B("chunk of a huge size", lambda: last(CHUNKED + b"f" * 30 + b"\r\nabcde"), "connect", 3),
    # compression
    B(
        "gzip bomb",
        lambda: response(body=gzip.compress(bytes(50 << 20)), Content_Encoding="gzip"),
        "too_large",
        1,
    ),
    B(
        "deflate bomb",
        lambda: response(body=zlib.compress(bytes(50 << 20)), Content_Encoding="deflate"),
        "too_large",
        1,
    ),
    B(
        "gzip without request",
        lambda: response(body=gzip.compress(JPEG), Content_Encoding="gzip"),
        Status.SUCCESS,
    ),
    B("gzip stated wrongly", lambda: response(body=JPEG, Content_Encoding="gzip"), Status.SUCCESS),
    B(
        "gzip truncated",
        lambda: response(body=gzip.compress(JPEG)[:-60], Content_Encoding="gzip"),
        "truncated",
        1,
    ),
    B("brotli", lambda: response(body=b"\x1b\xff\xff\xff", Content_Encoding="br"), "not_an_image"),
    B(
        "gzip in gzip",
        lambda: response(body=gzip.compress(gzip.compress(JPEG)), Content_Encoding="gzip, gzip"),
        "not_an_image",
        1,
    ),
    B(
        "zstd",
        lambda: response(body=b"\x28\xb5\x2f\xfd\0", Content_Encoding="zstd"),
        "not_an_image",
    ),
    # not HTTP
    B("nothing", lambda: last(b""), "connect", 3),
    B("HTTP/0.9", lambda: last(b"<html>hello</html>"), "connect", 3),
    B("TLS on a plain port", lambda: last(b"\x15\x03\x01\x00\x02\x02\x28"), "connect", 3),
    B("another protocol", lambda: last(b"220 mail.example ESMTP\r\n"), "connect", 3),
    B("status of letters", lambda: last(b"HTTP/1.1 2x0 OK\r\n\r\n"), "connect", 3),
    B("status of two digits", lambda: last(b"HTTP/1.1 99 x\r\n\r\n"), "connect", 3),
    B("status of a million", lambda: last(b"HTTP/1.1 1000000 x\r\n\r\n"), "connect", 3),
    B(
        "status without a reason phrase",
        lambda: last(b"HTTP/1.1 200\r\n\r\n" + JPEG),
        Status.SUCCESS,
        1,
    ),
    B("HTTP/1.0", lambda: last(GOOD.replace(b"1.1", b"1.0", 1)), Status.SUCCESS, 1),
    B("HTTP/9.9", lambda: last(GOOD.replace(b"1.1", b"9.9", 1)), "connect", 3),
    B(
        "thousand headers",
        lambda: last(HEAD + b"X: y\r\n" * 1000 + b"\r\n" + JPEG),
        Status.SUCCESS,
        1,
    ),
    B("long header", lambda: last(HEAD + b"X: " + b"y" * 200_000 + b"\r\n\r\n"), "connect", 3),
    B("header without a colon", lambda: last(HEAD + b"nonsense\r\n\r\n" + JPEG), "connect", 3),
    B("header with a null", lambda: last(HEAD + b"X: \x00\r\n\r\n" + JPEG), "connect", 3),
    B("lines without CR", lambda: last(GOOD.replace(b"\r\n", b"\n")), Status.SUCCESS, 1),
    # redirects
    B("redirect cycle", lambda: in_sequence(*[redirect("/1.jpg")] * 6), "redirects", 6),
    B(
        "redirect chain",
        lambda: in_sequence(*[redirect(f"/{n}.jpg") for n in range(6)]),
        "redirects",
        6,
    ),
    B("redirect to nowhere", lambda: response(302), "http_4xx", 1),
    B(
        "redirect to a long URL",
        lambda: in_sequence(redirect("/" + "x" * 60_000), GOOD),
        Status.SUCCESS,
        2,
    ),
    *(
        B(
            f"redirect to {location}",
            lambda location=location: redirect(location),
            "blocked_address",
            1,
        )
        for location in (
            "http://127.0.0.1/",
            "http://10.0.0.1/",
            "http://192.168.1.1/",
            "http://169.254.169.254/latest/meta-data/",
            "http://0.0.0.0/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://localhost/",
            "http://[::1]/",
            "http://[::ffff:169.254.169.254]/",
            "http://[fe80::1%25eth0]/",
            "http://me@127.0.0.1/",
            "//127.0.0.1/",
            "file:///etc/passwd",
            "ftp://b.example/1.jpg",
            "data:image/png;base64,AAAA",
            "javascript:alert(1)",
            "http://[::1",
            "http://b.example:99999/",
            "https://someone@b.example/1.jpg",
        )
    ),
    B(
        "header injection",
        lambda: in_sequence(redirect("/2.jpg\r X-Evil: 1"), GOOD),
        Status.SUCCESS,
        2,
    ),
    B("placeholder", lambda: redirect("https://i.imgur.com/removed.png"), "placeholder", 1),
    # connections that end early
    B("reset", reset, "connect", 3),
    B("reset in the head", lambda: reset(HEAD + b"Content-"), "connect", 3),
    B(
        "reset in the body",
        lambda: reset(response(body=JPEG[:50], Content_Length=9999)),
        "connect",
        3,
    ),
    B("closed, then success", lambda: then_image(b"", b""), Status.SUCCESS, 3),
    B(
        "truncated, then success",
        lambda: then_image(response(body=b"", Content_Length=99)),
        Status.SUCCESS,
        2,
    ),
    B(
        "429, then success",
        lambda: in_sequence(response(429, Retry_After="30"), GOOD),
        Status.SUCCESS,
        2,
    ),
    B(
        "503, then success",
        lambda: in_sequence(response(503), response(503), GOOD),
        Status.SUCCESS,
        3,
    ),
    B("429 for an hour", lambda: response(429, Retry_After="3600"), "http_429", 1),
    # bodies of another type
    B("empty", lambda: response(body=b""), "empty", 1),
    B("no content", lambda: response(204, b""), "empty", 1),
    B("HTML", lambda: response(body=b"<!doctype html><p>gone"), "not_an_image", 1),
    B(
        "HTML stated as JPEG",
        lambda: response(body=b"<html>", Content_Type="image/jpeg"),
        "not_an_image",
        1,
    ),
    B("zip", lambda: response(body=zipped(), Content_Type="image/jpeg"), "not_an_image", 1),
    B("SVG", lambda: response(body=b'<svg xmlns="http://www.w3.org/2000/svg"/>'), "svg", 1),
    B("JPEG truncated", lambda: response(body=JPEG[:-30]), "truncated", 1),
    B("JPEG with a tail", lambda: response(body=JPEG + b"<script>" * 99), Status.SUCCESS, 1),
    B("JPEG and a zip", lambda: response(body=JPEG + zipped()), Status.SUCCESS, 1),
    B(
        "PNG stated as JPEG",
        lambda: response(body=image_file("PNG"), Content_Type="image/jpeg"),
        Status.SUCCESS,
        1,
    ),
    B(
        "JPEG stated as HTML",
        lambda: response(body=JPEG, Content_Type="text/html"),
        Status.SUCCESS,
        1,
    ),
    B("ICC bomb", lambda: response(body=png_with(b"iCCP", b"x\0\0" + BOMB)), "not_an_image", 1),
    B("text bomb", lambda: response(body=png_with(b"zTXt", b"x\0\0" + BOMB)), "not_an_image", 1),
    B("EXIF with a cycle", lambda: response(body=jpeg_with_exif(CYCLE)), Status.SUCCESS, 1),
    B(
        "EXIF with many entries",
        lambda: response(body=jpeg_with_exif(MANY_ENTRIES)),
        Status.SUCCESS,
        1,
    ),
    B("TIFF of 2**32 strips", lambda: response(body=tiff_of_many_strips()), "not_an_image", 1),
    B("PNG of 65,500 a side", lambda: response(body=header_only_png(65_500)), "bomb", 1),
    B("PNG of 2**31 - 1 a side", lambda: response(body=header_only_png(2**31 - 1)), "bomb", 1),
]


def result_of(client, url="http://a.example/1.jpg"):
    """What result of a record with this address, as in `build`."""
    rules = Images()
    try:
        body = client.get(url).body
        make_stored_image(body, open_image(body, rules), rules)
    except RecordError as error:
        assert error.kind in FAILURE_REASONS  # noqa: PT017 - one of two ways
        return error.kind
    return Status.SUCCESS


def hostile_client(host, **politeness):
    overrides = {"*.example": host.origin}
    politeness = {"connect_to": overrides, "timeout": TIMEOUT, **politeness}
    return new_client(Fetch(**politeness), MOST_BYTES)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as `decoder` has it outside of tests
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda behaviour: behaviour.name)
def test_every_behaviour_of_a_host_has_its_reason_within_the_timeout(behaviour):
    with FakeHost(behaviour.respond()) as host:
        client = hostile_client(host)
        started = time.monotonic()

        result = result_of(client)

        assert time.monotonic() - started < TIMEOUT + SOON
    assert result == behaviour.result
    assert behaviour.requests in {None, len(host.requests)}
    assert not any("\r\nX-Evil" in request for request in host.requests)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A good certificate for a.example, and one that has expired."""
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("no openssl here to make certificates with")
    folder = tmp_path_factory.mktemp("tls")
    new = [openssl, "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    about = ["-subj", "/CN=a.example", "-keyout", folder / "key.pem"]
    run(*new, *about, "-out", folder / "request.pem")
    (folder / "names").write_text("subjectAltName=DNS:a.example")
    sign = [openssl, "x509", "-req", "-in", folder / "request.pem", "-signkey", folder / "key.pem"]
    for name, days in (("good", "2"), ("expired", "-1")):
        about = ["-days", days, "-extfile", folder / "names"]
        run(*sign, *about, "-out", folder / f"{name}.pem")
    return folder


def run(*command):
    subprocess.run(command, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("name", "trusted", "url", "result"),
    [
        ("good", True, "https://a.example/1.jpg", Status.SUCCESS),
        ("good", True, "https://b.example/1.jpg", "tls"),
        ("good", True, "https://8.8.8.8/1.jpg", "tls"),
        ("good", False, "https://a.example/1.jpg", "tls"),
        ("expired", True, "https://a.example/1.jpg", "tls"),
    ],
)
def test_a_certificate_must_be_valid_and_for_the_host(
    monkeypatch, certificates, name, trusted, url, result
):
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificates / f"{name}.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / "key.pem")
    with FakeHost(response(body=JPEG), tls=context) as host:
        started = time.monotonic()

        assert result_of(hostile_client(host, connect_to={"*": host.origin}), url) == result

        assert time.monotonic() - started < TIMEOUT + SOON
    assert bool(host.requests) == (result == Status.SUCCESS)


@pytest.mark.parametrize("result", ["timeout", "connect"])
def test_a_handshake_that_stops_ends_at_the_timeout(result):
    def wait(connection):
        connection.recv(1 << 16)
        if result == "timeout":
            connection.recv(1)

    with FakeHost(b"") as host:
        host._serve = lambda connection: serve(connection, wait)
        origin = host.origin.replace("http:", "https:")
        started = time.monotonic()

        assert (
            result_of(hostile_client(host, connect_to={"*": origin}), "https://a.example/")
            == result
        )

        assert time.monotonic() - started < TIMEOUT + SOON


def serve(connection, wait):
    with connection:
        wait(connection)


def test_a_connection_that_the_host_closes_loses_no_image():
    with FakeHost(last(GOOD)) as host:
        client = hostile_client(host)

        assert [result_of(client, f"http://a.example/{n}.jpg") for n in range(5)] == [
            Status.SUCCESS
        ] * 5


def test_a_hostile_host_delays_no_other():
    drips, good = drip(HEAD), response(body=JPEG)

    def either(head):
        return drips(head) if "Host: bad.example\r" in head else good

    with FakeHost(either) as host:
        client = hostile_client(host, per_host=1, retries=0)
        bad = threading.Thread(target=result_of, args=(client, "http://bad.example/"))
        bad.start()
        started = time.monotonic()
        results = {result_of(client, f"http://{n}.example/") for n in range(10)}
        seconds = time.monotonic() - started
        bad.join()

    assert results == {Status.SUCCESS}
    assert seconds < SOON
