"""Ways to a store: whose, by which client, and what a test has to know of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Way:
    name: str
    protocol: str
    obstore: str
    """EVERSTEP_OBSTORE."""
    bucket: str
    """Fixture of the bucket's URL; with `_server` that of the server's."""
    endpoint: str
    """Variable that says where the server is."""
    condition: str
    """Field of a request that makes a write create-only."""


WAYS = (
    Way("s3 by s3fs", "s3", "0", "s3", "AWS_ENDPOINT_URL", "If-None-Match"),
    Way("s3 by obstore", "s3", "1", "s3", "AWS_ENDPOINT_URL", "If-None-Match"),
    Way("gs by obstore", "gs", "1", "gcs", "STORAGE_EMULATOR_HOST", "x-goog-if-generation-match"),
)
