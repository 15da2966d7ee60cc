"""Tiny random language models of each family, written by `transformers`, with tokenizers like Qwen's."""

import json
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from torch_weights import randomise
from transformers import PreTrainedModel

from vllama_jax.convert.tiny import train_tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (  # Qwen3's, without tools and thinking
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (  # Mistral-7B-Instruct-v0.1's, without the checks
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "[INST] {{ message.content }} [/INST]{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
WORDS = ["What is the dog doing?", "It runs over the grass.", "<Video></Video> The video contains 8 frames", "system\n"]
WIDTH, VOCABULARY = 64, 512  # as in config.tiny()
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
HEAD_DIMS = {"qwen3": 24}  # set explicitly, different from width / heads


def make_model(family: str, **changes: Any) -> PreTrainedModel:
    """Make a model of three layers whose parameters are all random, including biases and norms."""
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": None,
        "attn_implementation": "eager",
        **({"head_dim": HEAD_DIMS[family]} if family in HEAD_DIMS else {}),
        **({"sliding_window": None} if family == "mistral" else {}),
        **changes,
    }
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **fields))
    randomise(model)
    return model.eval()


def write_model(folder: Path, family: str, **changes: Any) -> PreTrainedModel:
    """Write the model to a directory, with a tokenizer that fits the family."""
    model = make_model(family, **changes)
    qwen = family.startswith("qwen")
    ids = {"bos_token_id": 0, "eos_token_id": [2, 0]} if qwen else {"bos_token_id": 1, "eos_token_id": 2}
    model.config.bos_token_id, model.config.eos_token_id = ids["bos_token_id"], 2
    model.generation_config = transformers.GenerationConfig(**ids)
    model.save_pretrained(folder)
    write_qwen_tokenizer(folder) if qwen else train_tokenizer(folder)
    return model


def write_qwen_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer with Qwen's special tokens, without a BOS."""
    library = tokenizers.Tokenizer(models.BPE())
    library.normalizer = normalizers.NFC()
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=SPECIAL, vocab_size=400)
    library.train_from_iterator(WORDS * 4, trainer)
    library.save(str(folder / "tokenizer.json"))
    declared = {
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(declared))
