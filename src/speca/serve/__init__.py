"""An HTTP server for pipelines, with the endpoints of OpenAI's images and videos API, on top of the engine."""
