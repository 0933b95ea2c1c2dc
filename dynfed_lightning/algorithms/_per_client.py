"""Arguments that may differ from client to client: a mapping from client id, or a list that is dealt out in turn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def by_client(value: Any) -> bool:
    """Whether a mapping's keys are clients' ids, not patterns of names. YAML and JSON make text of the numbers."""
    return isinstance(value, Mapping) and all(isinstance(k, int) or str(k).isdecimal() for k in value)


def numbered(value: Any) -> Any:
    """A mapping by client with integers for keys; anything else as it is."""
    return {int(k): v for k, v in value.items()} if by_client(value) else value


def entries(value: Any) -> list[Any]:
    """Everything that `dealt` may give."""
    if isinstance(value, list):
        if not value:
            raise ValueError("Expected a list that is dealt out to clients to have entries, but it is empty.")
        return value
    return list(value.values()) if by_client(value) else [value]


def dealt(value: Any, client_id: int | None, what: str) -> Any:
    """One client's share of a mapping by client or of a list dealt out in turn; anything else is everybody's."""
    if not isinstance(value, list) and not by_client(value):
        return value
    if client_id is None:
        raise ValueError(f"Expected a client's id, since `{what}` differs from client to client.")
    if isinstance(value, list):
        return value[client_id % len(value)]
    if client_id not in value:
        raise ValueError(f"Expected `{what}` to have an entry for client {client_id}, but it has none.")
    return value[client_id]
