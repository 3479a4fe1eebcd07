"""Looks at the requests of a batch as they arrive, and decides how to order them. Flat memory. Pure."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from service.db.run_order import CHUNK_SIZE, CHUNK_TOKENS, FAR_LONGER, LONG, Plan, taper
from service.worker.prefixes import HEAD_BYTES, text_bytes

# How deep to look for beginnings that came before: leading bytes of keys, and the text that they stand for.
DEPTHS = tuple((HEAD_BYTES + blocks, text_bytes(blocks)) for blocks in (4, 8, 16, 32, 64, 128))
# How many beginnings are remembered.
REMEMBERED = 50_000
# After so many prompts only one in SAMPLED is looked at.
ALL_OF = 4_096
SAMPLED = 8
# Ordering by prefix must spare this part of the prompts. The engine would hardly notice less.
WORTH = 0.05


@dataclass
class Survey:
    """What is known of the requests so far."""

    requests: int = 0
    tokens: int = 0
    longest: int = 0
    # Bytes of bodies, and of those about the text that a cache would still have if they ran in the order of their
    # prefixes, and may not have in the order of the file.
    body_bytes: int = 0
    spared_bytes: float = 0
    _prompts: int = 0
    # Where chunks end in the file's order: how many requests there are up to it, and how many tokens it has.
    _ends: "array[int]" = field(default_factory=lambda: array("l"))
    _run_tokens: "array[int]" = field(default_factory=lambda: array("q"))
    _run: int = 0
    _run_sum: int = 0
    _seen: set[int] = field(default_factory=set)
    _last: bytes = b""

    def add(self, tokens: Sequence[int], body_bytes: int, prefixes: Sequence[bytes]) -> None:
        """Looks at the next requests: the tokens of each, the size of all, the keys of those that have one."""
        number, run, run_sum = self.requests, self._run, self._run_sum
        for more in tokens:
            if run and (run >= CHUNK_SIZE or run_sum + more > CHUNK_TOKENS):
                self._ends.append(number)
                self._run_tokens.append(run_sum)
                run = run_sum = 0
            number += 1
            run += 1
            run_sum += more
        self.requests, self._run, self._run_sum = number, run, run_sum
        self.tokens += sum(tokens)
        self.longest = max(self.longest, *tokens)
        self.body_bytes += body_bytes
        if prefixes:
            some = prefixes if self._prompts < ALL_OF else prefixes[::SAMPLED]
            self.spared_bytes += sum(map(self._came_before, some)) * len(prefixes) / len(some)
            self._prompts += len(prefixes)

    @property
    def spared(self) -> float:
        """Which part of the prompts need not be computed in the order of their prefixes."""
        return self.spared_bytes / max(1, self.body_bytes)

    def plan(self, is_input_order: bool) -> Plan:
        """How to order the requests seen."""
        if not is_input_order:
            if self.spared >= WORTH:
                return Plan("prefix", far_longer=FAR_LONGER * self.tokens // self.requests)
            if self.longest * self.requests >= LONG * self.tokens:
                return Plan("length")
        return Plan("input", *taper([*self._ends, self.requests], [*self._run_tokens, self._run_sum]))

    def _came_before(self, prefix: bytes) -> int:
        """How many bytes of the prompt came before, but not in the one just before."""
        seen = last = 0
        for depth, text in DEPTHS:
            if depth > len(prefix):
                break
            beginning = prefix[:depth]
            if self._last.startswith(beginning):
                last = text
            name = hash(beginning)
            if name in self._seen:
                seen = text
            elif len(self._seen) < REMEMBERED:
                self._seen.add(name)
        self._last = prefix
        return max(0, seen - last)
