"""A server of photographs on loopback; see `fetch.py`.

    python benchmarks/fetch_server.py FOLDER [--certificate FILE --key FILE] [--latency 0.2]

Prints its port. `/N/NAME` is the photograph NAME for every N; `/endless/N` sends N megabytes
without a Content-Length. Any other path is not found.
"""

import argparse
import asyncio
import ssl
from pathlib import Path

MEGABYTE = bytes(1 << 20)


class PhotographProtocol(asyncio.Protocol):
    """One connection; responses are sent in the order of requests."""

    def __init__(self, bodies: dict[str, bytes], latency: float) -> None:
        self._bodies = bodies
        self._latency = latency
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Respond to every complete request."""
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, self._received = self._received.split(b"\r\n\r\n", 1)
            path = head.split(b" ", 2)[1].decode()
            asyncio.get_running_loop().call_later(self._latency, self._respond, path)

    def _respond(self, path: str) -> None:
        if "/endless/" in path:
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
            self._send_zeros(int(path.rsplit("/", 1)[1]))
            return
        body = self._bodies.get(path.rsplit("/", 1)[-1])
        status = b"404 Not Found" if body is None else b"200 OK"
        content = body or b"not found"
        self._transport.write(
            b"HTTP/1.1 %b\r\nServer: bench\r\nContent-Type: image/jpeg\r\n"
            b"Cache-Control: max-age=600\r\nContent-Length: %d\r\n\r\n"
            % (status, len(content))
            + content
        )

    def _send_zeros(self, megabytes: int) -> None:
        if not megabytes or self._transport.is_closing():
            self._transport.close()
            return
        self._transport.write(MEGABYTE)
        asyncio.get_running_loop().call_later(0.001, self._send_zeros, megabytes - 1)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--certificate", type=Path)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--latency", type=float, default=0.0)
    options = parser.parse_args()
    bodies = {path.name: path.read_bytes() for path in options.folder.iterdir()}
    context = None
    if options.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(options.certificate, options.key)
    server = await asyncio.get_running_loop().create_server(
        lambda: PhotographProtocol(bodies, options.latency),
        "127.0.0.1",
        0,
        ssl=context,
        backlog=1024,
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
