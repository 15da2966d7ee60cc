"""The miniature: a rendered world, and a small Video-LLaMA that is trained on it from scratch (docs/miniature.md)."""
