"""The fixtures are those of all tests: ``shop``, ``client`` and ``library``."""

from tests.service import Client, Reply, Shop

__all__ = ["Client", "Reply", "Shop"]
