"""The network: towers, Q-Formers, the language model, LoRA and quantized layers."""
