"""What happened in a round, and to each client in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import lightning as L

from dynfed_lightning.algorithm import Reply
from dynfed_lightning.errors import RoundFailure
from dynfed_lightning.schema import Schema
from dynfed_lightning.transport import Outcome


@dataclass
class ClientRecord:
    """What happened to one client in one round (a row of ``clients.csv``)."""

    client: int
    status: str
    bytes_down: int
    bytes_up: int = 0
    bits: float | None = None
    num_examples: int = 0
    loss: float | None = None
    grad_norm: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    rank: float | None = None
    energy: float | None = None


@dataclass
class RoundRecord:
    """What happened in one round (a row of ``rounds.csv``); `metrics` holds the method's own columns.

    `rank_down` is the mean rank of the factors that were sent to clients, None if there were none.
    """

    round: int
    clients: list[ClientRecord]
    seconds: float
    train_loss: float
    bytes_up: int
    bytes_down: int
    total_bytes_up: int
    total_bytes_down: int
    failures: dict[str, int]
    metrics: dict[str, float]
    rank_down: float | None = None

    @property
    def bits(self) -> list[float]:
        """Bits per weight of every reply that was quantised."""
        return [c.bits for c in self.clients if c.bits is not None]

    @property
    def rank(self) -> float | None:
        """The mean over clients of the mean rank of the factors they sent; None if nobody sent any."""
        return _mean([c.rank for c in self.clients if c.rank is not None])

    @property
    def energy(self) -> float | None:
        """The mean over clients of the share of the energy that their factors were to keep."""
        return _mean([c.energy for c in self.clients if c.energy is not None])

    def values(self, reasons: Iterable[str] = ()) -> dict[str, float]:
        """What is logged of the round; `reasons`: why clients failed in this round or any before."""
        own = {"bits": _mean(self.bits), "rank": self.rank, "rank_down": self.rank_down, "energy": self.energy}
        failed = sum(self.failures.values())
        return {
            "train_loss": self.train_loss,
            "mb_up": self.total_bytes_up / 1e6,
            "mb_down": self.total_bytes_down / 1e6,
            "clients": float(len(self.clients) - failed),
            "failed": float(failed),
            **{f"failed/{reason}": float(self.failures.get(reason, 0)) for reason in sorted(reasons)},
            **self.metrics,
            **{name: value for name, value in own.items() if value is not None},
        }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def mean_loss(records: Sequence[ClientRecord]) -> float:
    """Mean training loss by samples over the clients that said one; NaN if none did."""
    losses = [(r.loss, r.num_examples) for r in records if r.status == "ok" and r.loss is not None]
    return sum(loss * n for loss, n in losses) / sum(n for _, n in losses) if losses else math.nan


def mean_bits(reply: Reply, schema: Schema) -> float | None:
    """Bits per value over the tensors that were quantised; None if none was."""
    sizes = {spec.name: math.prod(spec.shape) for spec in schema}
    bits = [(b, sizes[n]) for n, b in reply.decoded.bits.items() if b is not None]
    return sum(b * n for b, n in bits) / sum(n for _, n in bits) if bits else None


def mean_rank(ranks: Mapping[str, int | None]) -> float | None:
    """The mean rank of the tensors that were sent as factors, each counted once; None if none was."""
    return _mean([rank for rank in ranks.values() if rank is not None])


def planned_rounds(trainer: L.Trainer) -> int | None:
    """How many rounds there will be; None if open-ended."""
    given = [n for n in (trainer.max_epochs, trainer.max_steps) if n is not None and n > 0]
    return min(given) if given else None


def round_failure(
    round: int, asked: int, needed: int, records: Sequence[ClientRecord], outcomes: Sequence[Outcome]
) -> RoundFailure:
    """The error of a round that too few clients replied to, caused by the first of theirs."""
    reasons = Counter(r.status for r in records if r.status != "ok")
    why = ", ".join(f"{reason}: {n}" for reason, n in sorted(reasons.items()))
    error = RoundFailure(
        f"Round {round + 1}: {asked - sum(reasons.values())} of {asked} clients replied, {needed} needed ({why})."
    )
    error.__cause__ = next((o.error for o in outcomes if o.error is not None), None)
    return error
