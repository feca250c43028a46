"""What every test of the pipeline does without: proxies, and clients of the test before."""

import pytest
from fake_host import CLIENTS


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(autouse=True)
def no_open_clients(no_proxies):
    mine = len(CLIENTS)
    yield
    while len(CLIENTS) > mine:
        CLIENTS.pop().close()
