"""Which server a client connects to: addresses, overrides, proxies, TLS."""

import shutil
import socket
import ssl
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from fake_host import BODY, FakeHost, client_for, drip, failure_kind, new_client, redirect, response

from pmd_pipeline.contract.errors import PmdError
from pmd_pipeline.images.fetch.addresses import is_public
from pmd_pipeline.recipe import Fetch


@pytest.mark.parametrize(
    "authority",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f000001",
        "0177.0.0.1",
        "127.1",
        "0",
        "0.0.0.0",  # noqa: S104 - requested, not bound
        "①②⑦.0.0.1",
        "localhost",
        "LOCALHOST.",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "[::127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
    ],
)
def test_this_machine_is_never_connected_to(authority):
    with FakeHost(response()) as host:
        client = new_client()

        kind = failure_kind(client, f"http://{authority}:{host.port}/1.jpg")

    assert kind in {"blocked_address", "dns"}
    assert host.connections == 0


def test_a_name_with_a_private_address_is_never_connected_to(monkeypatch):
    with FakeHost(response()) as host:
        resolve_to(monkeypatch, "127.0.0.1")

        assert failure_kind(new_client(), f"http://a.example:{host.port}/") == "blocked_address"

    assert host.connections == 0


def test_a_redirect_to_a_private_address_is_never_followed():
    with FakeHost(response()) as inside:
        with FakeHost(redirect(f"http://127.0.0.1:{inside.port}/")) as outside:
            client = client_for(outside, connect_to={"*.example": outside.origin})

            assert failure_kind(client) == "blocked_address"
            assert len(outside.requests) == 1
        assert inside.connections == 0


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("64:ff9b::808:808", True),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.0.1", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("255.255.255.255", False),
        ("64:ff9b::a00:1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:192.168.0.1", False),
        ("::10.0.0.1", False),
        ("2002:c0a8:1::", False),
    ],
)
def test_which_ip_addresses_are_public(address, public):
    assert is_public(address) is public


def test_an_unknown_name_is_final_and_a_name_server_without_answer_is_retried(monkeypatch):
    lookups = []

    def fail(host, *_args, **_keywords):
        lookups.append(host)
        raise socket.gaierror(errors[host], "in the words of this system")

    errors = {"gone.example": socket.EAI_NONAME, "later.example": socket.EAI_AGAIN}
    monkeypatch.setattr(socket, "getaddrinfo", fail)
    client = new_client(Fetch(retries=2))

    assert failure_kind(client, "http://gone.example/") == "dns"
    assert failure_kind(client, "http://later.example/") == "dns"
    assert lookups == ["gone.example"] + ["later.example"] * 3


def test_the_second_address_of_a_host_is_tried(monkeypatch):
    with FakeHost(response()) as host:
        resolve_to(monkeypatch, "127.0.0.2", "127.0.0.1")
        overrides = {"*": f"http://somewhere.example:{host.port}"}

        assert client_for(host, connect_to=overrides).get("http://a.example/1.jpg").body == BODY


def test_an_override_without_a_scheme_keeps_that_of_the_url(tls_host):
    client = client_for(tls_host, connect_to={"*": f"127.0.0.1:{tls_host.port}"})

    assert client.get("https://a.example/1.jpg").body == BODY
    assert failure_kind(client, "http://a.example/1.jpg") == "connect"


@pytest.mark.parametrize(
    "authority", ["", "nowhere", "ftp://a:1", "http://", "a:x", "a:1/b", "[::1"]
)
def test_a_malformed_override_is_a_mistake_of_the_recipe(authority):
    with pytest.raises(PmdError, match=r"fetch\.connect_to"):
        new_client(Fetch(connect_to={"*": authority}))


def test_a_certificate_for_another_host_is_refused(tls_host):
    assert client_for(tls_host).get("https://a.example/1.jpg").body == BODY
    assert failure_kind(client_for(tls_host), "https://b.example/1.jpg") == "tls"


def test_a_server_without_tls_is_refused_for_https():
    def refuse_tls():
        connection, _ = listener.accept()
        with connection:
            connection.sendall(response(400))
            connection.recv(1 << 16)

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(refuse_tls)
        origin = f"https://127.0.0.1:{listener.getsockname()[1]}"
        client = new_client(Fetch(connect_to={"*": origin}))

        assert failure_kind(client) == "tls"


def test_a_slow_response_over_tls_ends_at_the_timeout(certificate):
    with FakeHost(drip(response(body=b"", Content_Length=1000)), tls=certificate) as host:
        client = client_for(host, timeout=0.5)
        started = time.monotonic()

        assert failure_kind(client) == "timeout"

        assert time.monotonic() - started < 1.5


def test_a_handshake_without_answer_ends_at_the_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        origin = f"https://127.0.0.1:{silent.getsockname()[1]}"
        client = new_client(Fetch(connect_to={"*": origin}, timeout=0.3))
        started = time.monotonic()

        assert failure_kind(client) in {"timeout", "connect"}

        assert time.monotonic() - started < 1.3


def test_a_proxy_of_the_environment_is_used(monkeypatch):
    with FakeHost(response()) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:my%20secret@127.0.0.1:{proxy.port}")

        fetched = new_client().get("http://a.example/1.jpg")

    assert fetched.body == BODY
    assert proxy.paths == ["http://a.example/1.jpg"]
    assert "Proxy-Authorization: Basic bWU6bXkgc2VjcmV0\r\n" in proxy.requests[0]


def test_https_goes_through_a_tunnel_of_the_proxy(monkeypatch, tls_host):
    with FakeHost(lambda _head: lambda connection: tunnel(connection, tls_host.port)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{proxy.port}")

        fetched = new_client().get("https://a.example/1.jpg")

    assert fetched.body == BODY
    assert proxy.paths == ["a.example:443"]


@pytest.mark.parametrize(
    "authority", ["127.0.0.1", "2130706433", "[::1]", "localhost", "a.localhost"]
)
def test_a_proxy_gets_no_request_for_this_machine(monkeypatch, authority):
    with FakeHost(response()) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")

        assert failure_kind(new_client(), f"http://{authority}/1.jpg") == "blocked_address"

    assert proxy.connections == 0


def test_an_override_of_the_recipe_has_priority_over_the_proxy(monkeypatch):
    with FakeHost(response()) as proxy, FakeHost(response()) as host:
        monkeypatch.setenv("http_proxy", proxy.origin)

        client_for(host).get("http://a.example/1.jpg")

        assert proxy.connections == 0


def test_a_proxy_of_another_protocol_is_a_mistake_of_the_environment(monkeypatch):
    monkeypatch.setenv("all_proxy", "socks5://me:secret@127.0.0.1:1080")

    with pytest.raises(PmdError, match="socks5") as caught:
        new_client()

    assert "secret" not in str(caught.value)


def resolve_to(monkeypatch, *addresses):
    """Resolve every name to `addresses`."""

    def resolve(_host, port, **_keywords):
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


def tunnel(connection, port):
    connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port)) as server, ThreadPoolExecutor(1) as pool:
        pool.submit(pump, server, connection)
        pump(connection, server)
        server.shutdown(socket.SHUT_RDWR)


def pump(source, sink):
    with suppress(OSError):
        while content := source.recv(1 << 16):
            sink.sendall(content)


@pytest.fixture(scope="module")
def certificate_files(tmp_path_factory):
    openssl = shutil.which("openssl")
    if not openssl:
        pytest.skip("no openssl here to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    names = "subjectAltName=DNS:a.example"
    request = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    about = ["-days", "2", "-subj", "/CN=a.example", "-addext", names]
    where = ["-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    subprocess.run([openssl, *request, *about, *where], check=True, capture_output=True)
    return folder


@pytest.fixture
def certificate(certificate_files, monkeypatch):
    """The server's TLS context, with a certificate for a.example that clients trust."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate_files / "cert.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate_files / "cert.pem", certificate_files / "key.pem")
    return context


@pytest.fixture
def tls_host(certificate):
    with FakeHost(response(), tls=certificate) as host:
        yield host
