import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors gain nothing from more, and tests run side by side

settings.register_profile("unhurried", deadline=None)  # first calls import and compile
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def cache_of_their_own(tmp_path, monkeypatch):
    """No test finds what another run, or the person at this machine, has in the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
