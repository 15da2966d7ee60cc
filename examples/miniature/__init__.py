"""A small world with sound, and a miniature Video-LLaMA that is trained on it from nothing (docs/miniature.md)."""
