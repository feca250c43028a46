import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors gain nothing from more threads

settings.register_profile("unhurried", deadline=None)  # first calls import and compile
settings.load_profile("unhurried")


@pytest.fixture(autouse=True)
def own_cache_folder(tmp_path, monkeypatch):
    """Isolate the tests from the cache of the user and of other runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
