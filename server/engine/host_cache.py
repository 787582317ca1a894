"""Validated weights in the host's memory, behind the slots: a version that comes back is copied, not read again."""

from __future__ import annotations

from collections import OrderedDict

from adapters.adapter_files import AdapterWeights

__all__ = ["HostCache"]


class HostCache:
    """Weights by version digest, at most `max_bytes` of them; the least recently used leave first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._entries: OrderedDict[str, tuple[AdapterWeights, int]] = OrderedDict()
        self._num_bytes = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_bytes(self) -> int:
        """Bytes held, never more than `max_bytes`."""
        return self._num_bytes

    @property
    def digests(self) -> list[str]:
        """The versions that are here, least recently used first."""
        return list(self._entries)

    def get(self, digest: str) -> AdapterWeights | None:
        """A version's weights, which count as used; None if they are not here."""
        entry = self._entries.get(digest)
        if entry is None:
            return None
        self._entries.move_to_end(digest)
        return entry[0]

    def put(self, digest: str, weights: AdapterWeights) -> bool:
        """Keep weights as the most recently used and drop others for them; False if they exceed the whole budget."""
        num_bytes = weights.num_bytes
        self.discard(digest)
        if num_bytes > self.max_bytes:
            return False
        while self._num_bytes + num_bytes > self.max_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self._num_bytes -= freed
        self._entries[digest] = (weights, num_bytes)
        self._num_bytes += num_bytes
        return True

    def discard(self, digest: str) -> None:
        """Forget a version's weights, if they are here."""
        _, freed = self._entries.pop(digest, (None, 0))
        self._num_bytes -= freed
