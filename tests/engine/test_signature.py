"""What has to be equal in calls that may be one."""

from __future__ import annotations

import torch

from speca.engine.signature import signature


def token(tensor: torch.Tensor) -> object:
    return tuple(tensor.flatten().tolist())


def a_call(rows: int, seed: int, **changes: object) -> dict[str, object]:
    """A call with inputs of every kind."""
    draw = torch.Generator().manual_seed(seed)
    return dict(
        hidden_states=torch.randn(rows, 4, 6, generator=draw), timestep=torch.full((rows,), 0.5 + seed),
        encoder_hidden_states_llama3=torch.randn(3, rows, 5, generator=draw), img_ids=torch.arange(12.0).view(4, 3),
        image_rotary_emb=(torch.ones(rows, 2), torch.zeros(rows, 2)), shapes=[[(1, 4, 4)]] * rows,
        residuals=[torch.randn(rows, 2, generator=draw) for _ in range(3)], guidance=3.5, return_dict=False,
        options={"adapter": torch.randn(rows, 2, generator=draw), "scale": 1.0}, nothing=None,
    ) | changes  # fmt: skip


def test_a_signature_is_equal_for_what_can_be_joined_and_for_nothing_else() -> None:
    plain = signature(a_call(1, 0), 1, token)
    assert plain == signature(a_call(1, 5), 1, token)
    others = [
        dict(img_ids=torch.arange(12.0).view(4, 3) + 1), dict(guidance=4.0), dict(nothing=1), dict(return_dict=True),
        dict(hidden_states=torch.randn(1, 5, 6)), dict(hidden_states=torch.randn(1, 4, 6).double()),
        dict(shapes=[[(1, 2, 8)]]), dict(options={"adapter": torch.randn(1, 2), "scale": 0.5}), dict(options={}),
    ]  # fmt: skip
    found = [signature(a_call(1, 0, **changes), 1, token) for changes in others]
    assert plain not in found and len(set(found)) == len(found)
