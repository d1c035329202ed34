"""What a run costs, in floating point operations, by stage.

Seconds say little on shared machines; operations are the same everywhere. `helpers.flop` counts them as they happen,
and the store says which stage is running, or had cost what when it was made.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PETA = 1e15


Costs = dict[str, tuple[str, int]]
"""Key of a stored result -> the stage that made it, and the operations which that took itself."""


@dataclass
class Ledger:
    """The operations of a process."""

    total: int = 0
    computed: Costs = field(default_factory=dict)
    stored: Costs = field(default_factory=dict)
    """Results that were read, with those that had been asked for to make them: what the store saved."""
    _open: list[Costs] = field(default_factory=list, repr=False)

    def add(self, operations: int) -> None:
        self.total += operations

    @property
    def outside(self) -> int:
        """Spent in no stage."""
        return self.total - sum(operations for _, operations in self.computed.values())

    @contextlib.contextmanager
    def stage(self, name: str, key: str) -> Iterator[Costs]:
        """While open, what is spent is the stage's, but for what other stages spend that it asks.

        Afterwards what it was given holds its cost and theirs.
        """
        before = self.outside
        costs: Costs = {}
        self._open.append(costs)
        try:
            yield costs
        finally:
            self._open.pop()
        costs[key] = self.computed[key] = (name, self.outside - before)
        self.stored.pop(key, None)
        self._tell(costs)

    def read(self, costs: Costs) -> None:
        """Note that a stored result was used, which had these costs."""
        self.stored |= {key: cost for key, cost in costs.items() if key not in self.computed}
        self._tell(costs)

    def _tell(self, costs: Costs) -> None:
        """Put costs on the account of what asked for them."""
        for asking in self._open:
            asking |= costs

    def record(self) -> dict[str, Any]:
        """For a run's provenance: operations in stages that were computed, in those that were stored, in none."""
        return {"computed": _sums(self.computed), "stored": _sums(self.stored), "outside": self.outside}


def _sums(costs: Costs) -> dict[str, int]:
    sums: dict[str, int] = {}
    for name, operations in costs.values():
        sums[name] = sums.get(name, 0) + operations
    return sums


LEDGER = Ledger()
"""Of this process."""


def spent(record: Mapping[str, Any]) -> int:
    """The operations that a run made, by what `Ledger.record` gave."""
    return sum(record["computed"].values()) + int(record["outside"])


def whole(record: Mapping[str, Any]) -> int:
    """Those that it would have made with an empty store."""
    return spent(record) + sum(record["stored"].values())


def by_stage(record: Mapping[str, Any]) -> dict[str, int]:
    """What each stage costs, whether it was computed or stored, the dearest first; "outside" is what no stage holds."""
    names = dict.fromkeys((*record["computed"], *record["stored"]))
    costs = {name: record["computed"].get(name, 0) + record["stored"].get(name, 0) for name in names}
    costs["outside"] = record["outside"]
    return dict(sorted(costs.items(), key=lambda item: -item[1]))


def petaflop(operations: int) -> str:
    """Operations as PFLOP, to two digits: "0.012"."""
    return f"{float(f'{operations / PETA:.2g}'):.12f}".rstrip("0").rstrip(".")


def told(record: Mapping[str, Any]) -> str:
    """What a run cost, in a few words: "0.012 PFLOP, and 0.034 that the store saved"."""
    saved = sum(record["stored"].values())
    return f"{petaflop(spent(record))} PFLOP" + (f", and {petaflop(saved)} that the store saved" if saved else "")
