import pytest

from bn_lightning.data import files, mirrors, sources
from tests.support.mirror import Mirror


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Replace the full data set by the sample, remove the system's copy, and shorten timeouts."""
    monkeypatch.setattr(files, "FULL", files.SAMPLE)
    monkeypatch.setattr(sources, "SYSTEM", tmp_path / "no-system")
    monkeypatch.setattr(mirrors, "REACH_SECONDS", 1.0)
    monkeypatch.setattr(mirrors, "STALL_SECONDS", 0.5)


@pytest.fixture
def mirror():
    """Return a function that starts a mirror; see `Mirror` for its behaviours."""
    servers = []

    def start(behaviour="good"):
        servers.append(Mirror(behaviour))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
