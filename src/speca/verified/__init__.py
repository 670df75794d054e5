"""The drafts of the SpeCa paper: block features are forecast, and one real block checks each forecast.

An option of its own (`preset="paper"`), and what is used where a sampler is not linear. It needs a model whose blocks
stand in lists; the main road does not.
"""
