"""Upload model directories to the Hugging Face Hub, with a model card."""
