"""`python -m serve.chaos`: rounds of clients, kills and an end under load. Prints figures; ends with 1 at trouble."""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .ends import JOBS, kills, terminated
from .health import Health, polled
from .plan import clients
from .process import GRACE_S, Keeper, keeping
from .storm import Pictures, Storm, alone, storm


def main() -> int:
    """Return 1 if anything was not as it must be."""
    parser = argparse.ArgumentParser(prog="python -m serve.chaos", description=__doc__)
    parser.add_argument("--clients", type=int, default=300, help="clients of a round")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; leaks are sought between the first and the last")
    parser.add_argument("--rate", type=float, default=12.0, help="clients that come in a second, on average")
    parser.add_argument("--kills", type=int, default=5, help="how often the server is killed with jobs pending")
    parser.add_argument("--seed", type=int, default=0, help="of the plan of the first round")
    given, began = parser.parse_args(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, keeping(Path(folder)) as keeper:
        expected = asyncio.run(alone(keeper.up().port))
        troubles = rounds(keeper, expected, given)
        troubles += killed(keeper, expected, given.kills) + ended(keeper)
    for trouble in troubles[:50]:
        say(f"TROUBLE {trouble}")
    say(f"{len(troubles)} troubles, {time.perf_counter() - began:.0f} s")
    return min(len(troubles), 1)


def rounds(keeper: Keeper, expected: Pictures, given: Any) -> list[str]:
    """Let clients come in rounds, and say what came of them."""
    process, before, seen, troubles = keeper.up(), dict[str, int](), Health(), list[str]()
    for number in range(given.rounds):
        with polled(process.port) as health:
            found = asyncio.run(storm(process.port, clients(given.clients, given.rate, given.seed + number), expected))
        seen.seconds += health.seconds
        seen.failed += health.failed
        say(f"round {number + 1}: {told(found)}; health {of_health(health)}")
        now = process.settled()
        before = before or now
        say("  holds " + ", ".join(f"{n} {v // 2**20 if n == 'rss' else v}" for n, v in now.items()))
        troubles += found.troubles
    if seen.failed:
        troubles.append(f"{seen.failed} of {len(seen.seconds)} questions for health failed")
    say(f"health of all rounds: {of_health(seen)}")
    return troubles + process.leaks(before) + process.errors()


def killed(keeper: Keeper, expected: Pictures, times: int) -> list[str]:
    """Kill the server with jobs pending, and say what came of it."""
    found = kills(keeper, expected, times)
    say(f"{times} kills with {JOBS} jobs: {told(found)}")
    return found.troubles


def ended(keeper: Keeper) -> list[str]:
    """End the server under load, and say what came of it."""
    process = keeper.up()
    found = asyncio.run(terminated(process))
    say(f"SIGTERM, grace {GRACE_S:g} s: exit code {found.code} after {found.seconds:.1f} s; "
        f"under way {dict(found.answers)}; a new one {found.refused}")  # fmt: skip
    return found.troubles + process.errors() + [f"exit code {found.code}"] * (found.code != 0)


def told(found: Storm) -> str:
    """The figures of some clients."""
    waited = sorted(found.waited)
    middle = f", answers after {waited[len(waited) // 2]:.1f} s, at most {waited[-1]:.1f}" if waited else ""
    pictures = f"{found.pictures} pictures, worst {found.worst} of 255"
    return f"{found.seconds:.0f} s, {dict(sorted(found.statuses.items()))}, {pictures}{middle}"


def of_health(health: Health) -> str:
    """Its figures, in milliseconds."""
    shares = [f"P{share * 100:g} {1000 * health.quantile(share):.1f}" for share in (0.5, 0.95, 0.99)]
    return f"{len(health.seconds)} asked, {' '.join(shares)} max {1000 * max(health.seconds):.1f} ms"


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
