from __future__ import annotations

import json
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tests.datasets import write_zip
from twotower import progress
from twotower.data.sources.download import fetch_zip
from twotower.errors import DownloadError
from twotower.hashing import sha256_file

pytestmark = pytest.mark.sockets

FILE = "ml-1m.zip"


class Server:
    """Serves bytes by path and counts the requests; ``cut`` ends an answer early."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.cut: int | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append(self.path)
                data = outer.files.get(self.path)
                if data is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[: outer.cut])

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/data"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.stop()


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    noise = np.random.default_rng(3).bytes(40_000)
    return write_zip(tmp_path / "content.zip", {"a.txt": noise}).read_bytes()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


def test_a_download_is_cached_with_its_origin_and_checksum(
    tmp_path: Path, server: Server, content: bytes
) -> None:
    server.files[f"/data/{FILE}"] = content
    first = fetch_zip(FILE, server.url, None, tmp_path / "cache")
    second = fetch_zip(FILE, server.url, None, tmp_path / "cache")
    assert first == second
    assert len(server.requests) == 1
    assert first.path.read_bytes() == content
    record = json.loads(first.path.with_name(f"{FILE}.json").read_text())
    assert record["sha256"] == first.sha256 == sha256_file(first.path)
    assert record["url"] == f"{server.url}/{FILE}"
    assert record["bytes"] == len(content)
    assert not list(first.path.parent.glob("*.part"))


def test_a_mirror_and_the_official_file_are_kept_apart(
    tmp_path: Path, server: Server, content: bytes
) -> None:
    other = write_zip(tmp_path / "other.zip", {"b.txt": "other"}).read_bytes()
    server.files[f"/data/{FILE}"] = content
    server.files[f"/mirror/{FILE}"] = other
    mirror = server.url.replace("/data", "/mirror")
    assert fetch_zip(FILE, server.url, mirror, tmp_path / "cache").path.read_bytes() == other
    assert fetch_zip(FILE, server.url, None, tmp_path / "cache").path.read_bytes() == content


def test_a_truncated_file_in_the_cache_is_said_and_fetched_again(
    tmp_path: Path, server: Server, content: bytes, said: list[str]
) -> None:
    server.files[f"/data/{FILE}"] = content
    path = fetch_zip(FILE, server.url, None, tmp_path / "cache").path
    path.write_bytes(content[:1_000])
    assert fetch_zip(FILE, server.url, None, tmp_path / "cache").path.read_bytes() == content
    assert any("damaged or truncated (1,000 bytes); fetching it again" in line for line in said)
    path.with_name(f"{FILE}.json").unlink()
    assert fetch_zip(FILE, server.url, None, tmp_path / "cache").path.read_bytes() == content
    assert len(server.requests) == 3


def test_what_a_killed_download_left_is_written_over(tmp_path: Path, server: Server, content: bytes) -> None:
    server.files[f"/data/{FILE}"] = content
    path = fetch_zip(FILE, server.url, None, tmp_path / "cache").path
    path.unlink()
    path.with_name(f".{FILE}.part").write_bytes(content[:777] + b"x" * 100_000)
    assert fetch_zip(FILE, server.url, None, tmp_path / "cache").path.read_bytes() == content


def test_an_answer_that_ends_early_is_an_error_and_leaves_nothing(
    tmp_path: Path, server: Server, content: bytes
) -> None:
    server.files[f"/data/{FILE}"] = content
    server.cut = 5_000
    with pytest.raises(DownloadError, match=r"5,000 of [\d,]+ bytes|can not be reached"):
        fetch_zip(FILE, server.url, None, tmp_path / "cache")
    server.cut = None
    assert fetch_zip(FILE, server.url, None, tmp_path / "cache").path.read_bytes() == content


@pytest.mark.parametrize("damage", ["truncated", "html", "flipped"])
def test_what_is_no_complete_zip_is_refused_and_not_cached(
    tmp_path: Path, server: Server, content: bytes, damage: str
) -> None:
    flipped = bytearray(content)
    flipped[200] ^= 0xFF
    wrong = {"truncated": content[:-600], "html": b"<html>log in first</html>", "flipped": bytes(flipped)}
    server.files[f"/data/{FILE}"] = wrong[damage]
    with pytest.raises(DownloadError, match=r"is not a complete zip file|is damaged"):
        fetch_zip(FILE, server.url, None, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob(FILE))


def test_a_missing_file_says_so_and_what_to_do(tmp_path: Path, server: Server) -> None:
    with pytest.raises(
        DownloadError, match=rf"/data/{FILE} answers 404 .*data\.mirror \(or TWOTOWER_MIRROR\)"
    ):
        fetch_zip(FILE, server.url, None, tmp_path / "cache")


def test_an_unreachable_server_says_so_and_what_to_do(tmp_path: Path, server: Server) -> None:
    server.server.server_close()  # nothing listens there any more
    started = time.monotonic()
    with pytest.raises(DownloadError, match=r"can not be reached .*data\.mirror"):
        fetch_zip(FILE, server.url, None, tmp_path / "cache")
    assert time.monotonic() - started < 60


def test_a_folder_is_read_in_place(tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "mirror"
    folder.mkdir()
    (folder / FILE).write_bytes(content)
    for mirror in (str(folder), folder.as_uri()):
        fetched = fetch_zip(FILE, "https://unused.invalid", mirror, tmp_path / "cache")
        assert fetched.path == folder / FILE
        assert fetched.sha256 == sha256_file(folder / FILE)
    assert not (tmp_path / "cache").exists()


def test_a_folder_without_the_file_says_what_it_holds(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "ml-20m.zip").write_bytes(content)
    with pytest.raises(DownloadError, match=r"ml-1m\.zip is not in the mirror .*which holds ml-20m\.zip"):
        fetch_zip(FILE, "https://unused.invalid", str(tmp_path / "mirror"), tmp_path / "cache")
    with pytest.raises(DownloadError, match="which is no folder"):
        fetch_zip(FILE, "https://unused.invalid", str(tmp_path / "nowhere"), tmp_path / "cache")


def test_a_truncated_zip_in_a_folder_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / FILE).write_bytes(content[:-600])
    with pytest.raises(DownloadError, match=rf"{FILE} is not a complete zip file .*truncated"):
        fetch_zip(FILE, "https://unused.invalid", str(tmp_path), tmp_path / "cache")
    assert not zipfile.is_zipfile(tmp_path / FILE)


def test_another_scheme_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"scheme 's3'; use a folder, http or https"):
        fetch_zip(FILE, "https://unused.invalid", "s3://bucket/x", tmp_path / "cache")
