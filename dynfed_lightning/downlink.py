"""The server's side and the client's side of the downlink.

A lossless downlink sends the weights. A lossy one cannot (the loss would stay in the weights), so it sends the encoded
*difference* to what the clients already hold, and the server keeps the decoded reference: both sides stay identical to the bit,
and what one round's compression lost is part of the next round's difference. A client that missed rounds gets the differences it
missed, or the dense reference, whichever is smaller.

Where the initial weights are known to everyone (a published checkpoint), the first round sends nothing, and a client that joins
later under a lossy downlink may be sent all differences since the beginning instead of the dense weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynfed_lightning.codec import Codec, CodecContext
from dynfed_lightning.errors import ClientFailure
from dynfed_lightning.schema import Schema
from dynfed_lightning.tensors import Tensors, added, difference, weights_of

_DENSE = Codec()


@dataclass
class Download:
    """What one client is sent: the message kind, the round its differences start from, and the payloads."""

    kind: str
    base: int | None
    parts: Sequence[bytes]


def initial_tensors(module: nn.Module, schema: Schema) -> Tensors:
    """What a client that knows `module` can tell of the first broadcast: its weights; 0 for all else (control variates)."""
    weights = weights_of(module)
    return {s.name: weights[s.name].cpu() if s.name in weights else torch.zeros(s.shape, dtype=s.dtype) for s in schema}


class DownlinkSender:
    """The server's half. Call `prepare` once a round, then `download` per client.

    Args:
        codec: the algorithm's downlink codec.
        history: how many rounds of differences are kept for clients that missed some. (Where initial weights were agreed, all
            are, as long as they are smaller than the weights.)

    Attributes:
        initial: what every client holds before its first round (see `agree`); None: nothing.
        ranks: of the factors in this round's difference, as `Decoded.ranks`; empty if there are none.
    """

    def __init__(self, codec: Codec, history: int = 8) -> None:
        self.codec = codec
        self.history = history
        self.initial: Tensors | None = None
        self.ranks: dict[str, int | None] = {}
        self._reference: Tensors | None = None
        self._round = -1
        # round -> payload that turns the reference of round - 1 into that of round; empty where they are the same
        self._differences: dict[int, bytes] = {}
        self._held: dict[int, int] = {}  # client -> the round whose reference it is known to hold
        self._unchanged = False  # the round's broadcast is what was agreed
        self._dense: bytes | None = None
        self._schema = Schema()

    def agree(self, initial: Tensors) -> None:
        """Before round 0: every client holds `initial` already, bit for bit, without its being sent."""
        self.initial = initial

    def prepare(
        self, tensors: Tensors, schema: Schema, round: int, seed: int, num_rounds: int | None = None
    ) -> Tensors:
        """Encode this round's broadcast; returns what every client of the round will hold."""
        tensors = {n: t.detach().cpu() for n, t in tensors.items()}
        self._schema, self._dense, self.ranks = schema, None, {}
        ctx = CodecContext(seed=seed, round=round, num_rounds=num_rounds)
        known = round == 0 and self.initial is not None
        self._unchanged = known and all(torch.equal(t, self.initial[n]) for n, t in tensors.items())  # type: ignore[index]
        if self.codec.lossless:
            self._round = round
            if self._unchanged:
                return {n: t.clone() for n, t in tensors.items()}
            self._dense = self.codec.encode(tensors, ctx, schema)
            return self.codec.decode(self._dense, schema)
        if known:
            self._reference, self._differences, self._round = self.initial, {}, -1
        if self._reference is None or self._round != round - 1:
            self._reference, self._differences = {n: t.clone() for n, t in tensors.items()}, {}
        elif self._unchanged:
            self._differences[round] = b""
        else:
            self._differences[round] = self.codec.encode(difference(tensors, self._reference), ctx, schema)
            decoded = self.codec.decode_full(self._differences[round], schema)
            self._reference, self.ranks = added(self._reference, decoded.tensors), decoded.ranks
        self._round = round
        self._forget()
        return self._reference

    def _forget(self) -> None:
        """Drop the differences that would not be sent any more."""
        whole = self.initial is not None and self._size(list(self._differences.values())) < self._dense_size()
        for r in [] if whole else [r for r in self._differences if r <= self._round - self.history]:
            del self._differences[r]

    def download(self, client_id: int) -> Download:
        """The cheapest way to bring this client to the round's reference."""
        options: list[Download] = []
        if self.codec.lossless:
            if self._unchanged:
                options.append(Download("known", None, []))
        else:
            held = self._held.get(client_id)
            if held is not None and (parts := self._since(held)) is not None:
                options.append(Download("difference", held, parts))
            if self.initial is not None and (parts := self._since(-1)) is not None:
                options.append(Download("known", None, parts))
        if options:
            best = min(options, key=lambda d: self._size(d.parts))
            size = self._size(best.parts)
            if size < self._dense_size() or size < len(self._dense_payload()):
                return best
        return Download("full", None, [self._dense_payload()])

    def _since(self, held: int) -> list[bytes] | None:
        """The payloads that lead from the reference of round `held` to this round's; None if one is forgotten."""
        rounds = range(held + 1, self._round + 1)
        if any(r not in self._differences for r in rounds):
            return None
        return [self._differences[r] for r in rounds if self._differences[r]]

    @staticmethod
    def _size(parts: Sequence[bytes]) -> int:
        return sum(map(len, parts))

    def _dense_size(self) -> int:
        """A dense payload's bytes without its header."""
        return sum(s.numel * s.dtype.itemsize for s in self._schema)

    def _dense_payload(self) -> bytes:
        if self._dense is None:
            assert self._reference is not None
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
        state: dict[str, Any] = {
            "reference": dict(self._reference),
            "round": self._round,
            # latin-1 keeps every byte, and strings are what torch.load(weights_only=True) reads back.
            "differences": {str(r): p.decode("latin-1") for r, p in self._differences.items()},
            "held": {str(k): r for k, r in self._held.items()},
        }
        if self.initial is not None and self._since(-1) is not None:  # clients to come may still start from it
            state["initial"] = dict(self.initial)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        if not state:
            return
        self.initial = dict(state["initial"]) if "initial" in state else None
        self._reference = dict(state["reference"])
        self._round = int(state["round"])
        self._differences = {int(r): p.encode("latin-1") for r, p in state["differences"].items()}
        self._held = {int(k): int(r) for k, r in state["held"].items()}


class DownlinkReceiver:
    """The client's half: keeps the reference in the client's own state, under ``"downlink"``.

    Attributes:
        initial: what was agreed when the client joined, as `DownlinkSender.initial`.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.initial: Tensors | None = None
        # Clients simulated in one process decode the same bytes: the last round's results, by what they were decoded from.
        self._memo: dict[tuple[Any, ...], Tensors] = {}
        self._memo_round = -1

    def receive(
        self, kind: str, base: int | None, parts: Sequence[bytes], schema: Schema, round: int, state: dict[str, Any]
    ) -> Tensors:
        """Decode a download to the tensors this client now holds.

        Raises:
            ClientFailure: ``stale_base``, the differences start from a round, or from initial weights, that this client does
                not hold.
            PayloadError: a payload does not decode.
        """
        held = state.get("downlink")
        if kind == "difference" and (held is None or held["round"] != base):
            raise ClientFailure(
                "stale_base",
                f"Expected differences to round {None if held is None else held['round']}, but got {base}.",
            )
        if kind == "known" and self.initial is None:
            raise ClientFailure(
                "stale_base", "Expected weights, but got differences to initial ones never agreed upon."
            )
        if self._memo_round != round:
            self._memo, self._memo_round = {}, round
        key = (kind, base, *parts)
        if key not in self._memo:
            if kind == "full":
                codec = self.codec if self.codec.lossless else _DENSE
                tensors = codec.decode(parts[0], schema)
            else:
                start = self.initial if kind == "known" else held["tensors"]  # type: ignore[index]
                assert start is not None
                tensors = start
                for part in parts:
                    tensors = added(tensors, self.codec.decode(part, schema))
            self._memo[key] = tensors
        tensors = self._memo[key]
        if not self.codec.lossless:
            state["downlink"] = {"round": round, "tensors": tensors}
        return tensors
