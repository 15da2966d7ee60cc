"""The server of `vllama serve`: an OpenAI-compatible API for a model, on one engine (docs/serving.md)."""
