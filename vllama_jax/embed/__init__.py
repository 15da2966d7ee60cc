"""Features of media files from each stage of the encoders: `embed_files` returns them, `vllama embed` writes them."""

from vllama_jax.embed.files import EmbedOptions, FileFeatures, embed_files, load_encoders

__all__ = ["EmbedOptions", "FileFeatures", "embed_files", "load_encoders"]
