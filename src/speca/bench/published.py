"""Published figures of other authors, with sources, listed beside the results of the paper's suites."""

from __future__ import annotations

from typing import NamedTuple


class Published(NamedTuple):
    """One row of a published table. `speed` is the speed-up in FLOPs, `latency` that in time; None if not given."""

    method: str
    speed: float | None
    latency: float | None
    figures: dict[str, float]
    source: str


SPECA = "SpeCa, arXiv:2509.11628, abstract"
TAYLORSEER = "TaylorSeer, arXiv:2503.06923, and its repository"
LINCA = "LinCa, arXiv:2608.17973 (same lab), re-measured"
RFC = "RFC, ICLR 2026, read at second hand"
ISSUE = "Shenyi-Z/Cache4Diffusion, issue 10"
STEPS = "Shenyi-Z/Cache4Diffusion, issue 17"
DPCACHE = "DPCache, arXiv:2602.22654"
CHEBYSHEV = "ChebBooster, arXiv:2608.23429; its full run has FID 2.18"

PUBLISHED: dict[str, tuple[Published, ...]] = {
    "paper-dit": (
        Published("DDIM, 50 steps", 1.0, None, {"FID": 2.32}, TAYLORSEER),
        Published("TaylorSeer N=3", 2.77, None, {"FID": 2.34}, TAYLORSEER),
        Published("TaylorSeer N=4", 3.57, None, {"FID": 2.49}, TAYLORSEER),
        Published("TaylorSeer", 4.53, None, {"FID": 2.65, "sFID": 5.36}, TAYLORSEER),
        Published("ChebBooster", 4.15, None, {"FID": 2.44}, CHEBYSHEV),
        Published("SpeCa, the paper's row", 4.99, None, {"FID": 2.72}, f"quoted in {ISSUE}"),
        Published("SpeCa, code defaults, a user's run", 4.57, None, {"FID": 2.74}, ISSUE),
        Published("SpeCa, top row (its FID was not found)", 7.3, None, {}, SPECA),
        Published("RFC", 7.05, None, {"FID": 3.40, "sFID": 5.21}, RFC),
    ),
    "paper-flux": (
        Published("50 steps", 1.0, 1.0, {"ImageReward": 0.9930, "CLIP": 32.61}, LINCA),
        Published("34 % of the steps", 3.13, 2.85, {"ImageReward": 0.9482, "CLIP": 32.28}, LINCA),
        Published("FORA N=4", 3.84, 3.14, {"ImageReward": 0.9757, "CLIP": 32.31}, LINCA),
        Published("TeaCache 0.8", 4.17, 3.58, {"ImageReward": 0.8710, "CLIP": 31.89}, LINCA),
        Published("DBCache F4B4", 4.10, 3.90, {"ImageReward": 0.6372, "CLIP": 32.10}, LINCA),
        Published("TaylorSeer N=5", 4.16, 3.46, {"ImageReward": 0.9793, "CLIP": 32.63}, LINCA),
        Published("SpeCa, drafts of 2 to 8", 4.70, 3.48, {"ImageReward": 1.0012, "CLIP": 32.45}, LINCA),
        Published("LinCa N=8 (trained)", 5.51, 5.25, {"ImageReward": 1.0162, "CLIP": 32.72}, LINCA),
        Published("SpeCa", 6.34, None, {"ImageReward": 0.9355}, f"{SPECA}; figure at second hand"),
        Published("25 steps", 2.0, None, {"ImageReward": 0.9553, "CLIP": 30.94}, STEPS),
        Published("10 steps", 5.0, None, {"ImageReward": 0.8859, "CLIP": 30.28}, STEPS),
    ),
    "paper-hunyuan": (
        Published("50 steps", 1.0, 1.0, {"VBench": 80.66}, LINCA),
        Published("22 % of the steps", 4.55, 4.55, {"VBench": 78.74}, LINCA),
        Published("TeaCache 0.4", 4.55, 4.76, {"VBench": 79.36}, LINCA),
        Published("TaylorSeer N=5", 5.00, 4.16, {"VBench": 79.93}, LINCA),
        Published("SpeCa, drafts of 2 to 8", 5.23, 4.20, {"VBench": 79.98}, LINCA),
        Published("SpeCa", 6.1, None, {"VBench": 79.84}, SPECA),
        Published("DPCache", 4.05, None, {"VBench": 80.35}, DPCACHE),
    ),
}
"""Published rows by name of the suite."""
