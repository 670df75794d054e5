"""What cannot be told from shapes: the few facts about arguments and classes of diffusers, as data.

Everything else is found on the model's first call (`probe.py`). A wrong or missing line here cannot spoil an image: the
self-test then fails and the model runs plainly.
"""

from __future__ import annotations

ROW_DIMENSIONS: dict[str, int | None] = {
    # Position tables belong to no row, even where their length happens to equal the number of rows.
    "img_ids": None, "txt_ids": None, "image_rotary_emb": None, "rotary_emb": None, "rotary_embedding": None,
    "freqs_cis": None, "visual_rope_pos": None, "text_rope_pos": None,
    # So do Framepack's frame numbers.
    "indices_latents": None, "indices_latents_clean": None, "indices_latents_history_2x": None,
    "indices_latents_history_4x": None,
    # HiDream: (layers, B, S, D).
    "encoder_hidden_states_llama3": 1,
}  # fmt: skip
"""Arguments whose rows are not dimension 0: the dimension that indexes rows, None for one that all rows share."""

PACKED: frozenset[str] = frozenset({"Cosmos3OmniTransformer", "MiniMaxH3Transformer3DModel"})
"""Classes whose inputs are one packed sequence without a row dimension: every call is one row."""

TIME_ARGUMENTS: tuple[str, ...] = ("timestep", "timesteps", "t", "vision_timesteps")
"""Names under which a forward takes the timestep, the first one present counts."""

CACHE_ARGUMENTS: frozenset[str] = frozenset({"kv_cache", "kv_caches", "kv_cache_mode", "kv_cache_flag"})
"""Arguments that, when given, make blocks read or write a cache of their own: a skipped block would not fill it."""
