"""What the server makes of the bytes that came back: replies it can use, and a record of what happened to each client."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

from dynfed_lightning.algorithm import Algorithm, Reply, Server, finite_number
from dynfed_lightning.downlink import DownlinkSender
from dynfed_lightning.errors import ClientFailure, PayloadError
from dynfed_lightning.message import Message
from dynfed_lightning.records import ClientRecord, mean_bits, mean_rank
from dynfed_lightning.schema import Schema
from dynfed_lightning.transport import Outcome

log = logging.getLogger(__name__)


def receive(
    algorithm: Algorithm,
    schema: Schema,
    server: Server,
    requests: Sequence[tuple[int, bytes]],
    outcomes: Sequence[Outcome],
) -> tuple[list[ClientRecord], list[Reply]]:
    """Decode what came back; what does not decode is a failed client, not a failed round.

    Args:
        algorithm: the method.
        schema: of what clients send.
        server: whose round it is.
        requests: client ids and what they were sent.
        outcomes: what came of each request; a reply that is refused gets its error.

    Returns:
        a record for every client and the replies of those that did not fail, both sorted by client id.
    """
    counted = algorithm.communicates
    down = {client_id: len(request) if counted else 0 for client_id, request in requests}
    records, replies = [], []
    for outcome in sorted(outcomes, key=lambda o: o.client_id):
        record = ClientRecord(outcome.client_id, outcome.reason or "ok", bytes_down=down[outcome.client_id])
        records.append(record)
        if outcome.reply is not None:
            record.bytes_up = len(outcome.reply) if counted else 0
            try:
                reply = decode(algorithm, schema, server, outcome.client_id, outcome.reply)
            except PayloadError as error:
                record.status, outcome.error = "payload", error
            except ClientFailure as error:
                record.status, outcome.error = error.reason, error
            else:
                replies.append(reply)
                record.num_examples = reply.num_examples
                record.loss = finite_number(reply.scalars.get("loss"))
                record.grad_norm = finite_number(reply.scalars.get("grad_norm"))
                record.bits = mean_bits(reply, schema)
                record.rank, record.energy = mean_rank(reply.decoded.ranks), reply.decoded.energy
        if record.status != "ok":
            log.warning(
                "Round %d: client %d left out (%s): %s",
                server.round + 1,
                record.client,
                record.status,
                outcome.error,
            )
    return records, replies


def decode(algorithm: Algorithm, schema: Schema, server: Server, client_id: int, data: bytes) -> Reply:
    """One client's reply.

    Raises:
        PayloadError: the bytes do not decode.
        ClientFailure: ``wrong_round``, ``malformed``, or what the method refuses.
    """
    message = Message.from_bytes(data)
    if message.client_id != client_id or message.round != server.round:
        raise ClientFailure(
            "wrong_round",
            f"Expected a reply of client {client_id} to round {server.round}, "
            f"but got one of client {message.client_id} to round {message.round}.",
        )
    if len(message.parts) != 1 or message.num_examples < 1:
        raise ClientFailure("malformed", "Expected a reply with one payload and a positive number of examples.")
    decoded = algorithm.uplink.decode_full(message.parts[0], schema)
    reply = Reply(
        client_id=client_id,
        tensors=decoded.tensors,
        scalars=message.scalars,
        counters=message.counters,
        num_examples=message.num_examples,
        num_bytes=len(data),
        decoded=decoded,
    )
    algorithm.check_reply(server, reply)
    return reply


class RoundStart:
    """What a round changes before the clients' memory, as it was: a round that fails until then has not begun.

    So a checkpoint that is saved on the exception resumes as if the run had been stopped before the round.
    """

    def __init__(self, server: Server, sender: DownlinkSender) -> None:
        self._state = copy.deepcopy(server.state)
        self._sender = copy.copy(sender)
        self._sender.__dict__ |= {n: dict(v) for n, v in vars(sender).items() if isinstance(v, dict)}
        self._weights = {n: t.detach().clone() for n, t in server.module.state_dict().items()}

    def restore(self, server: Server) -> DownlinkSender:
        """Put it back; returns the sender as it was."""
        server.state = self._state
        server.module.load_state_dict(self._weights)
        return self._sender
