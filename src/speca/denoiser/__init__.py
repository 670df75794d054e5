"""The main road: what runs when a denoiser is called. It knows neither torch modules nor pipelines."""
