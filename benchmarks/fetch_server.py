"""Serves the photographs of a folder on loopback; see `fetch.py`.

    python benchmarks/fetch_server.py FOLDER [--certificate FILE --key FILE] [--latency 0.2]

Prints its port. `/N/NAME` is the photograph NAME, whatever N is; `/endless/N` sends N megabytes
without saying so before. Any other address is not found.
"""

import argparse
import asyncio
import ssl
from pathlib import Path

MEGABYTE = bytes(1 << 20)


class Server(asyncio.Protocol):
    """One connection; requests are answered in order."""

    def __init__(self, bodies: dict[str, bytes], latency: float) -> None:
        self._bodies = bodies
        self._latency = latency
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the connection."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer every request that is whole."""
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, self._received = self._received.split(b"\r\n\r\n", 1)
            path = head.split(b" ", 2)[1].decode()
            asyncio.get_running_loop().call_later(self._latency, self._answer, path)

    def _answer(self, path: str) -> None:
        if "/endless/" in path:
            self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n\r\n")
            self._send(int(path.rsplit("/", 1)[1]))
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

    def _send(self, megabytes: int) -> None:
        if not megabytes or self._transport.is_closing():
            self._transport.close()
            return
        self._transport.write(MEGABYTE)
        asyncio.get_running_loop().call_later(0.001, self._send, megabytes - 1)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--certificate", type=Path)
    parser.add_argument("--key", type=Path)
    parser.add_argument("--latency", type=float, default=0.0)
    given = parser.parse_args()
    bodies = {path.name: path.read_bytes() for path in given.folder.iterdir()}
    context = None
    if given.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(given.certificate, given.key)
    server = await asyncio.get_running_loop().create_server(
        lambda: Server(bodies, given.latency), "127.0.0.1", 0, ssl=context, backlog=1024
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
