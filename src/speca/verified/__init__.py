"""The drafts of the SpeCa paper: block features are forecast, and one real block checks each forecast.

Used with `preset="paper"` and for samplers that are not linear. Unlike forecasts of outputs, it needs a model whose
blocks are in module lists.
"""
