"""The server's side and the client's side of the downlink.

A lossless downlink sends the weights. A lossy one cannot (the loss would stay in the weights), so it sends the encoded
*difference* to what the clients already hold, and the server keeps the decoded reference: both sides stay identical to the bit,
and what one round's quantisation lost is part of the next round's difference. A client that missed rounds gets the differences it
missed, or the dense reference, whichever is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynfed_lightning.codec import Codec, CodecContext
from dynfed_lightning.errors import ClientFailure
from dynfed_lightning.schema import Schema
from dynfed_lightning.tensors import Tensors, added, difference

_DENSE = Codec()


@dataclass
class Download:
    """What one client is sent: the message kind, the round its differences start from, and the payloads."""

    kind: str
    base: int | None
    parts: Sequence[bytes]


class DownlinkSender:
    """The server's half. Call `prepare` once a round, then `download` per client.

    Args:
        codec: the algorithm's downlink codec.
        history: how many rounds of differences are kept for clients that missed some.
    """

    def __init__(self, codec: Codec, history: int = 8) -> None:
        self.codec = codec
        self.history = history
        self._reference: Tensors | None = None
        self._round = -1
        self._differences: dict[
            int, bytes
        ] = {}  # round -> payload that turns the reference of round - 1 into that of round
        self._held: dict[int, int] = {}  # client -> the round whose reference it is known to hold
        self._dense: bytes | None = None
        self._schema: Schema | None = None

    def prepare(
        self, tensors: Tensors, schema: Schema, round: int, seed: int, num_rounds: int | None = None
    ) -> Tensors:
        """Encode this round's broadcast; returns what every client of the round will hold."""
        self._schema = schema
        if self.codec.lossless:
            self._dense = self.codec.encode(
                tensors, CodecContext(seed=seed, round=round, num_rounds=num_rounds), schema
            )
            self._round = round
            return self.codec.decode(self._dense, schema)
        if self._reference is None or self._round != round - 1:
            self._reference, self._differences = {n: t.detach().cpu().clone() for n, t in tensors.items()}, {}
        else:
            ctx = CodecContext(seed=seed, round=round, num_rounds=num_rounds)
            payload = self.codec.encode(difference(_on_cpu(tensors), self._reference), ctx, schema)
            self._differences[round] = payload
            self._differences.pop(round - self.history, None)
            self._reference = added(self._reference, self.codec.decode(payload, schema))
        self._dense, self._round = None, round
        return self._reference

    def download(self, client_id: int) -> Download:
        """The cheapest way to bring this client to the round's reference."""
        if self.codec.lossless:
            assert self._dense is not None
            return Download("full", None, [self._dense])
        held = self._held.get(client_id)
        if held is not None and all(r in self._differences for r in range(held + 1, self._round + 1)):
            parts = [self._differences[r] for r in range(held + 1, self._round + 1)]
            if sum(map(len, parts)) < len(self._dense_payload()):
                return Download("difference", held, parts)
        return Download("full", None, [self._dense_payload()])

    def _dense_payload(self) -> bytes:
        if self._dense is None:
            assert self._reference is not None and self._schema is not None
            self._dense = _DENSE.encode(self._reference, schema=self._schema)
        return self._dense

    def confirm(self, client_id: int, received: bool) -> None:
        """A client that replied holds this round's reference; of one that did not, nothing is known."""
        if self.codec.lossless:
            return
        if received:
            self._held[client_id] = self._round
        else:
            self._held.pop(client_id, None)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint; empty under a lossless downlink, which remembers nothing."""
        if self.codec.lossless or self._reference is None:
            return {}
        return {
            "reference": dict(self._reference),
            "round": self._round,
            # latin-1 keeps every byte, and strings are what torch.load(weights_only=True) reads back.
            "differences": {str(r): p.decode("latin-1") for r, p in self._differences.items()},
            "held": {str(k): r for k, r in self._held.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        if not state:
            return
        self._reference = dict(state["reference"])
        self._round = int(state["round"])
        self._differences = {int(r): p.encode("latin-1") for r, p in state["differences"].items()}
        self._held = {int(k): int(r) for k, r in state["held"].items()}


class DownlinkReceiver:
    """The client's half: keeps the reference in the client's own state, under ``"downlink"``."""

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        # Clients simulated in one process decode the same bytes: the last round's results, by what they were decoded from.
        self._memo: dict[tuple[Any, ...], Tensors] = {}
        self._memo_round = -1

    def receive(
        self, kind: str, base: int | None, parts: Sequence[bytes], schema: Schema, round: int, state: dict[str, Any]
    ) -> Tensors:
        """Decode a download to the tensors this client now holds.

        Raises:
            ClientFailure: ``stale_base``, the differences start from a round this client does not hold.
            PayloadError: a payload does not decode.
        """
        held = state.get("downlink")
        if kind == "difference" and (held is None or held["round"] != base):
            raise ClientFailure(
                "stale_base",
                f"Expected differences to round {None if held is None else held['round']}, but got {base}.",
            )
        if self._memo_round != round:
            self._memo, self._memo_round = {}, round
        key = (kind, base, *parts)
        if key not in self._memo:
            if kind == "full":
                codec = self.codec if self.codec.lossless else _DENSE
                tensors = codec.decode(parts[0], schema)
            else:
                assert held is not None
                tensors = held["tensors"]
                for part in parts:
                    tensors = added(tensors, self.codec.decode(part, schema))
            self._memo[key] = tensors
        tensors = self._memo[key]
        if not self.codec.lossless:
            state["downlink"] = {"round": round, "tensors": tensors}
        return tensors


def _on_cpu(tensors: Tensors) -> Tensors:
    return {n: t.detach().cpu() for n, t in tensors.items()}
