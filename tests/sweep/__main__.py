"""`python -m sweep [NAME ...]`: run all cases and write docs/models.md, or only those whose name contains a word."""

from __future__ import annotations

import os
import sys
import time

os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch

from .cases import CASES
from .checks import check, classes, untested
from .table import PAGE, page


def main(words: list[str]) -> int:
    """Return the number of cases that failed."""
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    began, results = time.perf_counter(), []
    wanted = [c for c in CASES if c.cls in classes() and (not words or any(w.lower() in c.name.lower() for w in words))]
    for case in wanted:
        result = check(case)
        results.append(result)
        mark = "FAILED" if result.failures else "ok" if result.verified else "output" if result.accelerated else "plain"
        say(f"{mark:6} {result.seconds:5.1f} s  {case.name}" + "".join(f"\n{'':16}{f}" for f in result.failures))
    failed = sum(bool(r.failures) for r in results)
    say(f"{len(results)} cases, {failed} failed, {time.perf_counter() - began:.0f} s")
    if not words:
        PAGE.write_text(page(results), encoding="utf-8")
        say(f"wrote {PAGE.name}; untested: {', '.join(untested()) or 'none'}")
    return failed


def say(text: str) -> None:
    """Print at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
