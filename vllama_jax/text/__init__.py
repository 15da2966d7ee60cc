"""Text to token ids and back: tokenizers and prompt templates. Knows no model and imports no jax."""
