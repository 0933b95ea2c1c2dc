"""How messages move: ``exchange(requests) -> outcomes`` over one function, ``run_client(request: bytes) -> bytes``.

The same function serves clients in this process, on other ranks and behind a network engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from dynfed_lightning.errors import ClientFailure, PayloadError
from dynfed_lightning.state_file import StateError

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What became of one request.

    Args:
        client_id: whose.
        reply: the bytes that came back; None if the client failed.
        reason: a short word why it failed, None if it did not.
        error: the exception, where there is one in this process.
    """

    client_id: int
    reply: bytes | None = None
    reason: str | None = None
    error: BaseException | None = None


class Transport(Protocol):
    """Carries requests to clients and brings back what they answer."""

    def exchange(self, requests: Sequence[tuple[int, bytes]]) -> list[Outcome]:
        """Deliver ``(client_id, request)`` pairs; one outcome each, in the order of the requests.

        A client that crashes gives an outcome with a reason; it never raises, but for what the server itself has lost.

        Raises:
            StateError: what a client remembers cannot be read.
        """
        ...

    def settle(self, accepted: Mapping[int, bool]) -> None:
        """Tell clients whether their reply became part of the round; only then does what they remember change."""
        ...


class InProcessTransport:
    """Clients that live in this process, one after the other.

    Args:
        run_client: runs one client's round, bytes in, bytes out.
        settle: see `Transport.settle`.
    """

    def __init__(
        self,
        run_client: Callable[[bytes], bytes],
        settle: Callable[[Mapping[int, bool]], None] = lambda accepted: None,
    ) -> None:
        self.run_client = run_client
        self._settle = settle

    def exchange(self, requests: Sequence[tuple[int, bytes]]) -> list[Outcome]:
        """See `Transport.exchange`."""
        outcomes = []
        for client_id, request in requests:
            try:
                outcomes.append(Outcome(client_id, reply=self.run_client(request)))
            except ClientFailure as error:
                outcomes.append(Outcome(client_id, reason=error.reason, error=error))
            except PayloadError as error:
                outcomes.append(Outcome(client_id, reason="payload", error=error))
            except StateError:
                raise  # what clients remember lies with the server here: its loss is no client's failure
            except Exception as error:
                log.warning("Client %d crashed: %s: %s", client_id, type(error).__name__, error)
                outcomes.append(Outcome(client_id, reason="crash", error=error))
        return outcomes

    def settle(self, accepted: Mapping[int, bool]) -> None:
        """See `Transport.settle`."""
        self._settle(accepted)
