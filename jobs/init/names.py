"""What the name of a column says about it."""

from __future__ import annotations

import re

USER = {
    "user": 3.0, "customer": 3.0, "client": 3.0, "member": 3.0, "account": 2.5, "buyer": 3.0,
    "shopper": 3.0,
    "visitor": 2.8, "viewer": 3.0, "reader": 3.0, "listener": 3.0, "subscriber": 3.0, "reviewer": 3.0,
    "person": 2.5, "player": 2.5, "household": 2.5, "patron": 3.0, "guest": 2.5, "uid": 3.0, "cust": 3.0,
    "consumer": 3.0, "session": 1.8, "cookie": 2.0, "device": 1.5, "basket": 0.8, "order": 0.6,
    "invoice": 0.6, "transaction": 0.5, "kunde": 3.0, "cliente": 3.0, "usuario": 3.0, "nutzer": 3.0,
}  # fmt: skip
ITEM = {
    "item": 3.0, "product": 3.0, "article": 3.0, "sku": 3.0, "movie": 3.0, "film": 3.0, "track": 3.0,
    "song": 3.0, "book": 3.0, "video": 3.0, "asin": 3.0, "isbn": 3.0, "stock": 2.5, "goods": 3.0,
    "listing": 3.0, "offer": 2.5, "game": 3.0, "app": 2.5, "news": 3.0, "recipe": 3.0, "property": 2.5,
    "hotel": 3.0, "restaurant": 3.0, "business": 2.5, "show": 2.5, "anime": 3.0, "course": 3.0, "poi": 3.0,
    "content": 2.5, "document": 2.5, "post": 2.5, "ad": 2.0, "artist": 2.0, "venue": 2.5, "location": 1.5,
    "material": 2.0, "artikel": 3.0, "produkt": 3.0, "articulo": 3.0, "iid": 3.0, "pid": 2.5,
    "brand": 0.8, "category": 0.5,
}  # fmt: skip
TIME = {
    "timestamp": 3.0, "time": 2.5, "date": 2.5, "datetime": 3.0, "ts": 3.0, "created": 2.5, "when": 2.5,
    "day": 1.5, "at": 1.0, "occurred": 2.0, "datum": 2.5, "zeit": 2.5, "fecha": 2.5, "dt": 2.0,
}  # fmt: skip
NOT_THE_EVENT = {
    "birth", "birthday", "dob", "release", "released", "expiry", "expires", "end", "updated", "join",
    "joined", "signup", "registered", "registration",
}  # fmt: skip
EVENT = {
    "event": 3.0, "action": 3.0, "behavior": 3.0, "behaviour": 3.0, "activity": 2.5, "interaction": 2.5,
    "type": 1.5, "kind": 1.5, "feedback": 2.0,
}  # fmt: skip
RATING = {"rating", "stars", "star", "score", "grade", "overall"}
AMOUNT = {
    "quantity", "qty", "amount", "count", "plays", "playcount", "value", "weight", "strength", "units",
    "menge", "duration", "listens", "views", "clicks",
}  # fmt: skip
TITLE = {
    "title": 3.0,
    "name": 2.5,
    "label": 2.0,
    "headline": 3.0,
    "description": 1.0,
    "titel": 3.0,
    "titulo": 3.0,
}
ID = {
    "id",
    "code",
    "no",
    "nr",
    "number",
    "key",
    "sku",
    "asin",
    "isbn",
    "uid",
    "uuid",
    "guid",
    "ean",
    "upc",
    "hash",
}
CLASS = {
    "code", "type", "class", "category", "group", "zip", "zipcode", "postcode", "department", "segment",
    "brand", "status", "store", "region", "aisle", "genre", "color", "colour", "size", "section",
}  # fmt: skip
_WORDS = {*USER, *ITEM, *TIME, *EVENT, *RATING, *AMOUNT, *TITLE, *ID, *CLASS, *NOT_THE_EVENT}


def words(name: str) -> list[str]:
    """Return the words of a name: customerID, customer_id and CUSTOMER ID are customer and id."""
    spaced = re.sub(r"([a-z0-9])([A-Z])", r"\1 \2", name)
    spaced = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1 \2", spaced)
    found: list[str] = []
    for word in re.findall(r"[a-zA-Z]+", spaced):
        found += _parts(word.lower())
    return found


def _parts(word: str) -> list[str]:
    """Return the known words in one (movieid), or itself; plurals count as singular."""
    if word in _WORDS:
        return [word]
    if word.endswith("s") and word[:-1] in _WORDS:
        return [word[:-1]]
    for at in range(len(word) - 1, 1, -1):
        if word[:at] in _WORDS and word[at:] in _WORDS:
            return [word[:at], word[at:]]
    return [word]


def hint(name: str, of: dict[str, float]) -> float:
    """Return how much a name speaks for a role, 0 where it does not."""
    return max((of.get(word, 0.0) for word in words(name)), default=0.0)


def has(name: str, of: set[str]) -> bool:
    """Return whether a name has one of some words."""
    return not of.isdisjoint(words(name))


def safe(name: str) -> str:
    """Return a name that a feature can have."""
    text = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_")
    return text if re.match(r"[A-Za-z_]", text) else f"column_{text}"
