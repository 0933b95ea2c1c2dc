"""What clients remember between rounds: nested dicts and lists of tensors, numbers and strings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

State = dict[str, Any]


def copy_tree(value: Any) -> Any:
    """Copy the containers of a state, not its leaves: replacing a leaf in the copy leaves the original whole."""
    if isinstance(value, dict):
        return {k: copy_tree(v) for k, v in value.items()}
    if isinstance(value, list):
        return [copy_tree(v) for v in value]
    return value


class MemoryStore:
    """Client state in memory; only clients that have any take room.

    A client works on a copy (`read`) that replaces the stored state only when its round is over (`write`), so a round that
    fails half-way leaves nothing behind.
    """

    def __init__(self) -> None:
        self._states: dict[int, State] = {}

    def read(self, client_id: int) -> State:
        """A working copy of a client's state, empty if it has none."""
        return copy_tree(self._states.get(client_id, {}))

    def write(self, client_id: int, state: State) -> None:
        """Replace a client's state."""
        if state:
            self._states[client_id] = state
        else:
            self._states.pop(client_id, None)

    def __len__(self) -> int:
        return len(self._states)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._states))

    def state_dict(self) -> dict[str, State]:
        """Everything, for a checkpoint that ``torch.load(weights_only=True)`` can read."""
        return {str(k): copy_tree(self._states[k]) for k in self}

    def load_state_dict(self, states: dict[str, State]) -> None:
        """Replace everything by what `state_dict` gave."""
        self._states = {int(k): copy_tree(v) for k, v in states.items()}
