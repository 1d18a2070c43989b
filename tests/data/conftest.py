import pytest

from bn_lightning.data import files, mirrors, sources
from tests.support.mirror import Mirror


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The sample stands for the whole data set, so that the network's part is fast; the system's copy is away."""
    monkeypatch.setattr(files, "WHOLE", files.SAMPLED)
    monkeypatch.setattr(sources, "SYSTEM", tmp_path / "no-system")
    monkeypatch.setattr(mirrors, "REACH_SECONDS", 1.0)
    monkeypatch.setattr(mirrors, "STALL_SECONDS", 1.0)


@pytest.fixture
def mirror():
    servers = []

    def start(how="good"):
        servers.append(Mirror(how))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()
