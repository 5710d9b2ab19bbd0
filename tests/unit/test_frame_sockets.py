"""The inner loop has no sockets, since a test that has one must say so."""

from __future__ import annotations

import socket

import pytest


def test_a_socket_without_the_marker_is_refused() -> None:
    with socket.socket() as one, pytest.raises(RuntimeError, match="give it the marker sockets"):
        one.bind(("127.0.0.1", 0))


@pytest.mark.sockets
def test_a_socket_with_the_marker_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()
