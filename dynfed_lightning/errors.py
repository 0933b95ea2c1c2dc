"""The errors this package raises on purpose, each a subclass of a built-in one.

Bad arguments are plain ``ValueError``/``TypeError`` raised by constructors, before any training. What is
here are the things that go wrong *during* a federation and that other code must tell apart.
"""

from __future__ import annotations


class PayloadError(ValueError):
    """A payload that cannot be decoded. Raised before any allocation the payload asks for."""


class TruncatedPayloadError(PayloadError):
    """The payload ends before its header says so, or has bytes after its end."""


class ChecksumError(PayloadError):
    """The payload's bytes do not match its checksum."""


class SchemaMismatchError(PayloadError):
    """The payload was made for other names, shapes or dtypes than the receiver expects."""


class MalformedPayloadError(PayloadError):
    """The payload's index contradicts itself, the schema, or the format."""


class NonFiniteError(PayloadError):
    """The payload, or what was to be encoded, holds NaN or infinity."""


class ClientFailure(RuntimeError):
    """A client could not finish its round; the federation leaves it out and counts the reason.

    Args:
        reason: a short machine-readable word, e.g. ``"nan_loss"``; becomes ``failed/<reason>`` in the metrics.
        message: what happened, for a person.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RoundFailure(RuntimeError):
    """Fewer clients than ``min_clients`` replied in a round, and the policy is to stop."""
