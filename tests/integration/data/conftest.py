"""What tests of data share: hashes of images are kept in a folder of each test's own."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "anomalib_ot.integration.data.near_duplicates.user_cache_path", lambda *_, **__: tmp_path / "cache"
    )
