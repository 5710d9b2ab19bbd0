"""The client of the HTTP service: answers as objects, errors as exceptions, one clock for each call.

A call ends within ``timeout_s``, its tries and the waits between them included; every try tells the service
how long the client still waits, so that it does no work for nobody. Every route only reads, so a call whose
connection broke, or that the service was too busy for, is tried again while there is time. Only a server
that sends the head of its answer in drops can hold a call longer: each read of it has the whole time.

This module loads neither torch nor faiss nor ray.
"""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NoReturn, Required, Self, TypedDict, Unpack
from urllib.parse import quote, urlencode, urlsplit

import orjson
import urllib3

from twotower.errors import ConfigError, TwotowerError

_FIRST_WAIT_S, _MOST_DOUBLINGS = 0.025, 5
_MOST_DEADLINE_MS = 600_000
"""The longest that the service takes."""
_BLOCK_BYTES = 1 << 16
_SHOWN_CHARACTERS = 200


class HistoryItem(TypedDict, total=False):
    """One item of a history."""

    item_id: Required[str | int]
    """The item."""
    time: datetime | str | None
    """When it happened; without a time it counts at every moment."""
    weight: float
    """Weight of the interaction."""
    features: dict[str, Any]
    """Values by column of the item table: what an item is read by that the model does not know."""


class Request(TypedDict, total=False):
    """The question "which k items for this user, now?"; every key but k has a default."""

    k: Required[int]
    """Number of items wanted."""
    user_id: str | int | None
    """The user; an unknown one is served from history or features, and with neither from popularity."""
    history: Sequence[str | int | HistoryItem] | None
    """The user's items, oldest first; replaces the stored history."""
    features: Mapping[str, Any]
    """Values of user feature columns; each replaces the stored value."""
    at: datetime | str | None
    """What of the user's history counts: what happened strictly before this moment; now when not given.
    Without a zone: UTC. What has been seen, and what is popular, is as of the generation all the same."""
    exclude_seen: bool
    """Leave out what the user has already had, and the items of ``history``."""
    exclude_items: Sequence[str | int]
    """Further items to leave out."""
    allow_items: Sequence[str | int] | None
    """Items that alone may be answered; all when not given."""
    filter: Mapping[str, Any] | None
    """Predicates by attribute, such as ``{"year": {"gte": 1990}}``, all of which an item must satisfy."""
    fields: Sequence[str]
    """Columns of the item table to return with each item."""


@dataclass(frozen=True)
class Item:
    """One item of an answer."""

    item_id: str
    """The item."""
    score: float
    """The larger the better; what it measures depends on the strategy."""
    fields: dict[str, Any]
    """Values of the item columns that were asked for."""


@dataclass(frozen=True)
class Answer:
    """The items of one request."""

    items: list[Item]
    """Best first; fewer than k only where fewer allowed items exist, or the answer is partial."""
    generation: str
    """Id of the generation that answered."""
    strategy: str
    """personal, history, features or popular; similar for similar items."""
    partial: bool
    """Whether a part of the index did not answer."""
    missing_groups: list[str]
    """The parts of the index that did not answer."""
    timing_ms: dict[str, float]
    """Milliseconds in the service: encode, search, total."""
    request_id: str
    """X-Request-ID of the call, as in the service's logs."""
    history: dict[str, int] | None = None
    """How many items of the history were read ``by_id``, ``by_features``, or ``ignored``."""


@dataclass(eq=False)
class ServiceError(TwotowerError):
    """A call that got no answer to use, and why."""

    message: str
    """What was wrong."""
    code: str
    """As the service says, such as invalid_request; else timeout, no_connection or bad_answer."""
    status: int | None = None
    """HTTP status; None where no answer came."""
    allowed: str = ""
    """What is allowed, or what to do."""
    details: list[dict[str, str]] = field(default_factory=list)
    """An entry {where, message, allowed} for each thing that is wrong with the request."""
    request_id: str = ""
    """X-Request-ID of the call."""

    def __str__(self) -> str:
        """Say everything but the details."""
        status = "" if self.status is None else f"{self.status} "
        allowed = f"; allowed: {self.allowed}" if self.allowed else ""
        return f"{status}{self.code}: {self.message}{allowed} (request {self.request_id})"


class Client:
    """A client of one service; threads may share it, and connections are kept open between calls.

    What a service is asked is what ``Retriever`` answers in this process; the service answers from the
    generation that is published. Calls raise ``ServiceError`` where there is no answer within ``timeout_s``
    seconds, and where the service refuses the request.

    Example:
        >>> with tt.Client(url, timeout_s=5) as client:  # such as http://127.0.0.1:8000
        ...     answer = client.retrieve(user_id="42", k=2, fields=["title"])
        >>> answer.strategy, [item.fields["title"] for item in answer.items]
        ('personal', ['Heat', 'Alien'])
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        timeout_s: float = 2.0,
        retries: int = 2,
        connections: int = 16,
    ) -> None:
        """Take the address; nothing is sent yet.

        Args:
            url: of the service, such as ``http://127.0.0.1:8000``; a path before the routes is kept.
            token: bearer token, where the service wants one.
            timeout_s: longest time of a call in seconds, its tries and the waits between them included; in
                less than the second that a busy service asks to wait, such a call is not tried again.
            retries: further tries of a call whose connection broke, or that the service was too busy for.
            connections: kept open between calls; more threads than that open further ones for a call each.

        Raises:
            ConfigError: the URL or a number is not allowed.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} is no address of a service; give one such as http://127.0.0.1:8000")
        if not (timeout_s > 0 and retries >= 0 and connections > 0):
            given = f"timeout_s {timeout_s}, retries {retries} and connections {connections}"
            raise ConfigError(f"{given}; give 0 retries or more, and more than 0 of the others")
        self.url = url.rstrip("/")
        self._path = parts.path.rstrip("/")
        self._timeout_s = timeout_s
        self._retries = retries
        self._headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._pool = urllib3.connection_from_url(url, maxsize=connections)

    def __repr__(self) -> str:
        """Name the service, and no token."""
        return f"Client({self.url!r})"

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the connections."""
        self.close()

    def close(self) -> None:
        """Close the connections; the client can not be used afterwards."""
        self._pool.close()

    def retrieve(self, *, request_id: str | None = None, **request: Unpack[Request]) -> Answer:
        """Return the best items for a user.

        Args:
            request_id: to find the call in the service's logs; a new one when not given.
            **request: the keys of a ``Request``.

        Raises:
            ServiceError: there is no answer.
        """
        call = _Call(self._timeout_s, request_id)
        return call.answer(self._send(call, "POST", "/v1/retrieve", _to_json(request)))

    def retrieve_batch(self, requests: Sequence[Request], *, request_id: str | None = None) -> list[Answer]:
        """Return the answer to each of several requests, in their order; one that is wrong refuses all.

        Args:
            requests: one or more.
            request_id: as in ``retrieve``.

        Raises:
            ServiceError: there is no answer.
        """
        call = _Call(self._timeout_s, request_id)
        found = self._send(call, "POST", "/v1/retrieve/batch", _to_json({"requests": requests}))
        if not isinstance(answers := found.get("answers"), list) or len(answers) != len(requests):
            call.bad_answer(f"it has no list of {len(requests)} answers", orjson.dumps(found))
        return [call.answer(answer) for answer in answers]

    def similar(
        self,
        item_id: str | int,
        k: int = 20,
        fields: Sequence[str] = (),
        filter: Mapping[str, Any] | None = None,
        *,
        request_id: str | None = None,
    ) -> Answer:
        """Return the items most similar to an item.

        Args:
            item_id: the item.
            k: number of items wanted.
            fields: columns of the item table to return with each item.
            filter: predicates that the answers must satisfy, as in a ``Request``.
            request_id: as in ``retrieve``.

        Raises:
            ServiceError: there is no such item (status 404), or no answer.
        """
        given = {"k": k, "fields": ",".join(fields), "filter": "" if filter is None else _to_json(filter)}
        query = urlencode({name: value for name, value in given.items() if value != ""})
        path = f"/v1/items/{quote(str(item_id), safe='')}/similar?{query}"
        call = _Call(self._timeout_s, request_id)
        return call.answer(self._send(call, "GET", path))

    def generation(self) -> dict[str, Any]:
        """Return the facts of the generation that answers: id, num_items, attributes, item_fields and more.

        Raises:
            ServiceError: there is no answer.
        """
        return self._send(_Call(self._timeout_s), "GET", "/v1/generation")

    def ready(self) -> bool:
        """Return whether the service can answer now; it is asked once.

        Raises:
            ServiceError: what answers is no such service, or wants another token.
        """
        try:
            self._try(_Call(self._timeout_s), "GET", "/readyz", None)
        except ServiceError as error:
            if error.status not in (None, 503):
                raise
            return False
        return True

    def _send(self, call: _Call, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        """Return the object of an answer with status 200, after as many tries as that takes and may take."""
        for number in range(self._retries + 1):
            try:
                return self._try(call, method, path, body)
            except ServiceError as error:
                wait_s = call.retry_after_s + _wait_s(number)
                again = error.code == "no_connection" or error.status == 503
                if not again or number == self._retries or wait_s >= call.left_s:
                    raise
            time.sleep(wait_s)
        raise AssertionError("the last try returns or raises")

    def _try(self, call: _Call, method: str, path: str, body: bytes | None) -> dict[str, Any]:
        call.status, call.retry_after_s = None, 0.0
        left_s = max(call.left_s, 0.001)
        deadline_ms = min(max(1, int(left_s * 1e3)), _MOST_DEADLINE_MS)
        own = {"X-Request-ID": call.request_id, "X-Deadline-Ms": str(deadline_ms)}
        try:
            response = self._pool.urlopen(
                method,
                self._path + path,
                body,
                {**self._headers, **own},
                retries=False,
                redirect=False,
                timeout=urllib3.Timeout(total=left_s),
                preload_content=False,
            )
            try:
                content = self._read(call, response)
            finally:
                response.release_conn()
        except urllib3.exceptions.HTTPError as error:
            # urllib3 counts a connection that is refused among the timeouts.
            refused = isinstance(error, urllib3.exceptions.NewConnectionError)
            if isinstance(error, urllib3.exceptions.TimeoutError) and not refused:
                raise call.timeout() from error
            reason = f"the connection to {self.url} failed: {type(error).__name__}: {error}"
            raise call.error(reason, "no_connection") from error
        call.status = response.status
        call.request_id = response.headers.get("X-Request-ID", call.request_id)
        call.retry_after_s = _retry_after_s(response.headers.get("Retry-After"))
        return call.checked(content)

    def _read(self, call: _Call, response: urllib3.BaseHTTPResponse) -> bytes:
        """Return the content of an answer; one that comes in drops does not take longer than the call may."""
        content = bytearray()
        while True:
            socket = getattr(response.connection, "sock", None)
            if socket is not None:
                socket.settimeout(max(call.left_s, 0.001))
            if not (part := response.read1(_BLOCK_BYTES)):
                return bytes(content)
            content += part
            if call.left_s <= 0:
                # What is still to come must not be taken for the next answer.
                response.close()
                raise call.timeout()


class _Call:
    """One call: its clock, and what the latest try brought."""

    def __init__(self, timeout_s: float, request_id: str | None = None) -> None:
        self._timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s
        self.request_id = request_id or uuid.uuid4().hex
        self.status: int | None = None
        self.retry_after_s = 0.0

    @property
    def left_s(self) -> float:
        return self._end - time.monotonic()

    def error(self, message: str, code: str, **more: Any) -> ServiceError:
        return ServiceError(message, code, self.status, request_id=self.request_id, **more)

    def timeout(self) -> ServiceError:
        return self.error(f"no answer within {self._timeout_s:g} s", "timeout")

    def bad_answer(self, reason: str, content: bytes) -> NoReturn:
        shown = content[:_SHOWN_CHARACTERS].decode(errors="replace")
        raise self.error(f"this is no answer of twotower, {reason}: {shown!r}", "bad_answer")

    def checked(self, content: bytes) -> dict[str, Any]:
        """Return the object of a good answer, or raise what another one says."""
        try:
            value = orjson.loads(content)
        except orjson.JSONDecodeError as error:
            self.bad_answer(f"it is not JSON ({error})", content)
        if not isinstance(value, dict):
            self.bad_answer("it is no object", content)
        if self.status == 200:
            return value
        try:
            said = value["error"]
            message, code, allowed = str(said["message"]), str(said["code"]), str(said["allowed"])
            raise self.error(message, code, allowed=allowed, details=list(said["details"]))
        except (KeyError, TypeError):
            self.bad_answer("it is an error of another shape", content)

    def answer(self, value: Any) -> Answer:
        try:
            items = [
                Item(
                    str(item["item_id"]),
                    float(item["score"]),
                    {name: item[name] for name in item if name not in ("item_id", "score")},
                )
                for item in value["items"]
            ]
            missing, timing = list(value["missing_groups"]), dict(value["timing_ms"])
            generation, strategy = str(value["generation"]), str(value["strategy"])
            partial = bool(value["partial"])
            used = None if value.get("history") is None else dict(value["history"])
            return Answer(items, generation, strategy, partial, missing, timing, self.request_id, used)
        except (KeyError, TypeError, ValueError) as error:
            self.bad_answer(f"{type(error).__name__}: {error}", orjson.dumps(value))


def _to_json(value: Any) -> bytes:
    # Ids often come out of arrays; this needs no import of NumPy.
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)


def _wait_s(number: int) -> float:
    """Return how long to wait after a failed try: longer each time, and not all clients equally long."""
    return _FIRST_WAIT_S * 2.0 ** min(number, _MOST_DOUBLINGS) * random.uniform(0.5, 1.0)


def _retry_after_s(value: str | None) -> float:
    """Return the seconds of a Retry-After header, which holds seconds or a date; 0 for none or nonsense."""
    if value is None:
        return 0.0
    try:
        return float(urllib3.Retry(0).parse_retry_after(value))
    except urllib3.exceptions.InvalidHeader:
        return 0.0
