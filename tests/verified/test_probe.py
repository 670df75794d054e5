"""What the first call teaches, on models written for the purpose: state, rows, layouts, ragged batches, self-test."""

from __future__ import annotations

import itertools
import re
import timeit
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import speca
import tiny
from speca.diffusers.accelerator import ATTRIBUTE
from speca.verified import probe
from speca.verified.gate import Features, Gate, Mode

STEPS = 12
LOOSE = dict(preset=tiny.VERIFYING, num_inference_steps=STEPS, threshold=1e9, min_draft=0, max_draft=2)


class Block(nn.Module):
    """Three streams in an unusual order: what was read so far, nothing, the tokens; the reading comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, shift: Tensor, tokens: Tensor, notes: Tensor, keep: Tensor | None = None) -> Any:
        seen = tokens if keep is None else tokens * keep[..., None]
        context = seen.sum(1, keepdim=True) / (tokens.shape[1] if keep is None else keep.sum(1)[:, None, None])
        notes = notes + 0.2 * torch.tanh(context[:, 0])
        return notes, None, tokens + 0.3 * torch.tanh(self.mix(tokens) + context + shift[:, None] + notes[:, None])


class Toy(nn.Module):
    """A denoiser of tokens (B, 5, 8) with a memory (B, 8) that every block reads and writes.

    `odd` makes it special: "places" takes a list of three tables; "aside" gives a second output from the first block;
    "short" lets a call leave out the second list; "padded front" and "padded end" drop a batch's masked tokens as far
    as its longest row allows.
    """

    def __init__(self, odd: str = "") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.odd = odd
        self.first, self.second = nn.ModuleList(Block() for _ in range(3)), nn.ModuleList(Block() for _ in range(3))
        self.time, self.head = nn.Linear(1, 8), nn.Linear(16, 8)
        self.eval().requires_grad_(False)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        places: list[Tensor] | None = None,
        mask: Tensor | None = None,
        short: bool = False,
        lengths: list[int] | None = None,
        kv_cache: Any = None,
    ) -> Any:
        times = timestep if timestep.dim() == 1 else timestep.amax(1)
        shift = torch.sin(self.time(times[:, None].float() / 100))
        tokens, keep = sample if places is None else sample + sum(p.sum() for p in places), None
        if mask is not None:
            tokens, keep = self._cut(tokens, mask)
        if lengths is not None:
            tokens, keep = self._cut(tokens, (torch.arange(5) < torch.tensor(lengths)[:, None]).float())
        notes, aside = torch.zeros(sample.shape[0], 8), None
        for block in self.first:
            notes, _, tokens = block(shift, tokens, notes, keep=keep)
            aside = notes if aside is None else aside
        for block in [] if short else self.second:
            notes, _, tokens = block(shift, tokens, notes=notes, keep=keep)
        tokens = torch.nn.functional.pad(tokens, (0, 0, 0, sample.shape[1] - tokens.shape[1]))
        if mask is not None and self.odd == "padded front":
            tokens = tokens.flip(1)
        out = self.head(torch.cat([tokens, notes[:, None].expand(-1, 5, -1)], 2))
        out = out if mask is None else out * mask[..., None]
        return (out, aside) if self.odd == "aside" else (out,)

    def _cut(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        longest = int(mask.sum(1).max())
        tokens, keep = tokens[:, :longest], mask[:, :longest]
        return (tokens.flip(1), keep.flip(1)) if self.odd == "padded front" else (tokens, keep)


def loop(model: nn.Module, rows: list[int], arguments: Any = None) -> Tensor:
    x = torch.stack([torch.randn(5, 8, generator=torch.Generator().manual_seed(row)) for row in rows])
    for i in range(STEPS):
        t = torch.full((len(rows),), 1000.0 * (1 - i / STEPS))
        x = x - 0.05 * model(x, t, **(arguments(rows) if arguments else {}))[0]
    return x


def finding(model: nn.Module) -> probe.Discovery:
    return list(model.__dict__[ATTRIBUTE].drafts.findings.values())[-1]


def decisions(model: nn.Module) -> list[str]:
    return [s.decisions for s in speca.report(model).samples]


def between(model: nn.Module) -> float:
    """A threshold in the widest gap between the errors of the last run."""
    errors = sorted({e for s in speca.report(model).samples for e in s.errors if e is not None})
    return max(itertools.pairwise(errors), key=lambda pair: pair[1] / pair[0])[0] * 1.001


def masks(rows: list[int]) -> dict[str, Tensor]:
    return dict(mask=torch.stack([(torch.arange(5) < (5, 3, 4)[row]).float() for row in rows]))


def assert_rows_are_their_own(model: nn.Module, arguments: Any = None) -> None:
    speca.enable(model, **LOOSE)
    loop(model, [0, 1, 2], arguments)
    settings = {**LOOSE, "threshold": between(model), "threshold_decay": 1.0}
    speca.enable(model, **settings)
    together, decided = loop(model, [0, 1, 2], arguments), decisions(model)
    assert {"A", "R"} <= set("".join(decided))
    for row in range(3):
        alone = loop(model, [row], arguments)
        assert decisions(model) == [decided[row]]
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


# -- state ----------------------------------------------------------------------------------------------
def test_state_is_found_whatever_its_order_and_number() -> None:
    model = Toy()
    plain = loop(model, [0, 1, 2])
    speca.enable(model, **{**LOOSE, "threshold": 0.0})
    assert torch.equal(loop(model, [0, 1, 2]), plain)
    found = finding(model)
    assert found.supported and found.verify_block == "second.2"
    assert found.blocks == (("first", 3), ("second", 3))
    assert set(found.state) == {"tokens", "notes"}
    assert_rows_are_their_own(model)


def test_an_output_that_passes_the_verify_block_by_is_noticed() -> None:
    model = Toy("aside")
    plain = loop(model, [0, 1])
    speca.enable(model, **LOOSE)
    with pytest.warns(UserWarning, match=r"runs plainly.*something past second\.2"):
        assert torch.equal(loop(model, [0, 1]), plain)


def test_two_kinds_of_calls_keep_what_each_has_learnt() -> None:
    """One call uses both lists, the other one only: another verify block, in turns at every step."""
    model = Toy()
    both = [loop(speca.enable(model, **LOOSE), [0, 1]), loop(speca.enable(model, **LOOSE), [0, 1], lambda _: SHORT)]
    speca.enable(model, **LOOSE)
    x, y = (torch.stack([torch.randn(5, 8, generator=torch.Generator().manual_seed(r)) for r in (0, 1)]) for _ in "ab")
    for i in range(STEPS):
        t = torch.full((2,), 1000.0 * (1 - i / STEPS))
        x, y = x - 0.05 * model(x, t)[0], y - 0.05 * model(y, t, **SHORT)[0]
    assert torch.equal(x, both[0]) and torch.equal(y, both[1])
    found = model.__dict__[ATTRIBUTE].drafts.findings.values()
    assert [f.verify_block for f in found] == ["second.2", "first.2"]
    assert decisions(model) == ["FFF" + "AAF" * 3] * 2


SHORT = dict(short=True)


# -- rows -----------------------------------------------------------------------------------------------
def test_a_list_that_looks_like_a_batch_is_run_plainly() -> None:
    """Three tables and three rows: shapes cannot tell; the row alone can. With two rows nothing is in doubt."""
    model, tables = Toy("places"), [torch.arange(2.0) / 9, torch.arange(3.0) / 9, torch.arange(4.0) / 9]
    plain = {n: loop(model, list(range(n)), lambda _: dict(places=list(tables))) for n in (1, 2, 3)}
    speca.enable(model, **{**LOOSE, "threshold": 0.0})
    for n in (1, 2):
        assert torch.equal(loop(model, list(range(n)), lambda _: dict(places=list(tables))), plain[n])
        assert finding(model).supported
    with pytest.warns(UserWarning, match=r"row \d computed alone differs"):
        assert torch.equal(loop(model, [0, 1, 2], lambda _: dict(places=list(tables))), plain[3])
    assert len(model.__dict__[ATTRIBUTE].drafts.findings) == 3


def test_one_row_needs_no_test_of_its_own_after_many() -> None:
    model = Toy()
    speca.enable(model, **LOOSE)
    for rows in ([0, 1, 2], [0, 1], [0]):
        loop(model, rows)
        assert len(model.__dict__[ATTRIBUTE].drafts.findings) == 1
    assert decisions(model) == ["FFF" + "AAF" * 3]


def test_ragged_rows_are_drafted_one_by_one() -> None:
    model = Toy("padded end")
    plain = loop(model, [0, 1, 2], masks)
    speca.enable(model, **{**LOOSE, "threshold": 0.0})
    assert torch.equal(loop(model, [0, 1, 2], masks), plain)
    assert finding(model).supported and finding(model).ragged
    assert_rows_are_their_own(model, masks)
    even = lambda rows: dict(mask=torch.ones(len(rows), 5))  # noqa: E731 - one more set of arguments
    assert_rows_are_their_own(model, even)
    assert not finding(model).ragged


def test_a_ragged_model_that_pads_in_front_is_run_plainly() -> None:
    model = Toy("padded front")
    plain = loop(model, [0, 1, 2], masks)
    speca.enable(model, **LOOSE)
    with pytest.warns(UserWarning, match="runs plainly"):
        assert torch.equal(loop(model, [0, 1, 2], masks), plain)


def test_rows_that_turn_out_ragged_in_mid_run_are_run_plainly_from_there() -> None:
    """The row run alone happens to be the longest, and lengths are given where no mask shows them."""
    model, lengths = Toy(), lambda rows: dict(lengths=[(3, 4, 5)[row] for row in rows])
    plain = loop(model, [0, 1, 2], lengths)
    speca.enable(model, **LOOSE)
    loop(model, [0, 1, 2], lengths)
    speca.enable(model, **{**LOOSE, "threshold": between(model), "threshold_decay": 1.0})
    with pytest.warns(UserWarning, match="runs plainly from step") as caught:
        got = loop(model, [0, 1, 2], lengths)
    assert len(caught) == 1
    step = int(re.findall(r"from step (\d+) on", str(caught[0].message))[0])
    assert [d[step:] for d in decisions(model)] == ["F" * (STEPS - step)] * 3
    assert (got - plain).norm() < 0.02 * plain.norm()
    report = speca.report(model)
    assert any("from step" in note for note in report.notes)
    computed = sum(sample.full + sample.rejected for sample in report.samples)
    assert report.evaluations_full == 3 * STEPS and report.evaluations >= computed, "plain steps are counted"
    assert report.flops is not None and report.flops_full is not None and report.flops_full > 0


# -- calls ----------------------------------------------------------------------------------------------
def test_a_call_with_a_cache_of_its_own_is_run_plainly_with_one_warning() -> None:
    model = Toy()
    plain = loop(model, [0, 1])
    speca.enable(model, **LOOSE)
    with pytest.warns(UserWarning, match="kv_cache") as caught:
        assert torch.equal(loop(model, [0, 1], lambda _: dict(kv_cache={})), plain)
    assert len([w for w in caught if "runs plainly" in str(w.message)]) == 1


def test_one_time_per_token_is_placed_by_its_noisiest() -> None:
    model = Toy()
    speca.enable(model, **LOOSE)
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    for i in range(STEPS):
        t = torch.full((2, 5), 1000.0 * (1 - i / STEPS))
        t[:, 0] = 0.0  # a token that is given
        x = x - 0.05 * model(x, t)[0]
    assert decisions(model) == ["FFF" + "AAF" * 3] * 2


def test_a_counter_that_fails_costs_the_figure_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise TypeError("no implementation found")

    monkeypatch.setattr(probe, "FlopCounterMode", broken)
    model = Toy()
    speca.enable(model, **LOOSE)
    loop(model, [0, 1])
    assert finding(model).supported and finding(model).flops_full is None
    report = speca.report(model)
    assert report.flops is None and report.flops_speedup == 2.0, "then evaluations are what is told"
    assert decisions(model) == ["FFF" + "AAF" * 3] * 2


# -- cost -----------------------------------------------------------------------------------------------
class Deep(nn.Module):
    """57 blocks as FLUX has them, with next to nothing in them."""

    def __init__(self, blocks: int = 57) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Light() for _ in range(blocks))

    def forward(self, x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        for block in self.blocks:
            text, x = block(hidden_states=x, encoder_hidden_states=text, temb=temb, image_rotary_emb=temb)
        return x


class Light(nn.Module):
    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, **_: Any) -> Any:
        return encoder_hidden_states + 1, hidden_states + 1


def test_skipping_a_stack_costs_microseconds() -> None:
    """About 30 microseconds for 57 blocks; the bound leaves room for a busy machine."""
    model = Deep()
    gate = Gate(model)
    gate.attach()
    x, text, temb = torch.ones(1, 4, 2), torch.ones(1, 3, 2), torch.ones(1, 2)
    gate.mode = Mode.TRACE
    model(x, text, temb)
    gate.state, gate.mode = ("hidden_states", "encoder_hidden_states"), Mode.UNCHECKED
    gate.forecast = Features([x, text], [text, x])
    assert min(timeit.repeat(lambda: model(x, text, temb), number=1, repeat=500)) < 100e-6
    gate.detach()


def test_a_block_called_in_another_way_is_still_handed_through() -> None:
    model = Deep(2)
    gate = Gate(model)
    gate.attach()
    x, text, temb = torch.ones(1, 4, 2), torch.ones(1, 3, 2), torch.ones(1, 2)
    gate.mode = Mode.TRACE
    model(x, text, temb)
    gate.mode = Mode.PASS
    first = next(iter(model.blocks))
    out = first(x, text, temb)  # by position now
    assert out[0] is text and out[1] is x
    gate.detach()
