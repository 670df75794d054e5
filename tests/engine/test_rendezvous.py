"""Functions that stop and go on: answers, errors, and what a thread carries along."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from speca.engine.rendezvous import Rendezvous
from speca.engine.signature import Tokens


def test_answers_reach_who_asked_and_ends_are_told() -> None:
    meet = Rendezvous()

    def adder(start: int) -> int:
        return start + meet.ask("more") + meet.ask("still more")

    for key in range(3):
        meet.start(key, lambda key=key: adder(100 * key))
    assert {key: question for key, (question, _) in meet.asked.items()} == {0: "more", 1: "more", 2: "more"}
    for key in (2, 0, 1):
        meet.answer(key, 10)
    for key in (1, 2, 0):
        meet.answer(key, key)
    assert [(e.key, e.value) for e in meet.ended] == [(1, 111), (2, 212), (0, 10)] and not len(meet)


def test_an_error_stays_with_its_function_and_holds_none_of_its_variables() -> None:
    meet = Rendezvous()
    held: list[weakref.ref[torch.Tensor]] = []

    def fails() -> None:
        latents = torch.ones(3)
        held.append(weakref.ref(latents))
        if meet.ask("go on?"):
            raise ValueError(f"with {len(latents)}")

    def takes_another_way() -> str:
        try:
            meet.ask("go on?")
        except KeyError as error:
            return str(error)
        return "none"

    meet.start(0, fails)
    meet.start(1, takes_another_way)
    meet.answer(0, True)
    meet.throw(1, KeyError("thrown"))
    failed, went_on = meet.ended
    assert isinstance(failed.error, ValueError) and "fails" in str(failed.error.__traceback__.tb_next.tb_frame.f_code)
    assert went_on.value == "'thrown'"
    gc.collect()
    assert held[0]() is None


def test_gradients_autocast_and_chance_are_private() -> None:
    meet, seen = Rendezvous(), {}

    def function(key: int, gradients: bool) -> list[float]:
        torch.manual_seed(key)
        torch.set_grad_enabled(gradients)
        torch.set_autocast_enabled("cpu", not gradients)
        drawn = []
        for _ in range(3):
            drawn.append(float(torch.rand(())))
            meet.ask("next")
            seen.setdefault(key, set()).add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return drawn

    torch.manual_seed(7)
    before = torch.get_rng_state()
    for key in range(2):
        meet.start(key, lambda key=key: function(key, gradients=bool(key)))
    for _ in range(3):
        for key in (1, 0):
            meet.answer(key, None)
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert seen == {0: {(False, True)}, 1: {(True, False)}}
    drawn = {e.key: e.value for e in meet.ended}
    for key in range(2):
        torch.manual_seed(key)
        assert drawn[key] == [float(torch.rand(())) for _ in range(3)]


def test_a_rendezvous_that_is_forgotten_leaves_nothing() -> None:
    meet, held = Rendezvous(), []

    def function() -> Any:
        big = torch.ones(5)
        held.append(weakref.ref(big))
        return meet.ask(big)

    meet.start(0, function)
    meet.forget()
    gc.collect()
    assert held[0]() is None


@pytest.mark.parametrize("change", [lambda t: t.add_(1), lambda t: t.resize_(4)])
def test_tokens_are_of_content_and_notice_changes(change: Any) -> None:
    tokens, one, other = Tokens(), torch.arange(6.0), torch.arange(6.0)
    first = tokens(one)
    assert first == tokens(other) == tokens(one) != tokens(torch.arange(6))
    change(one)
    assert tokens(one) != first == tokens(other)
