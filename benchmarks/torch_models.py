"""The same networks in PyTorch: classes of transformers with SDPA and a static cache, eager and with torch.compile.

Weights are random. The vision encoder and the Q-Formers are BLIP-2's, which Video-LLaMA uses. transformers has no
ImageBind; the Audio Spectrogram Transformer of the same size stands for its audio tower, with 230 tokens for 229.

This module does not import jax, so that the start of a process without it can be measured.
"""

import concurrent.futures
import contextlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from clips import read_with_pyav
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vllama_jax.config import ImageBindAudioConfig, LlamaConfig, QFormerConfig, VideoLlamaConfig, VitConfig
from vllama_jax.convert.language_config import to_hugging_face_config

DEVICE, DTYPE = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
CLIP_STATISTICS = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as XLA has
torch.set_grad_enabled(False)
transformers.utils.logging.set_verbosity_error()


@contextlib.contextmanager
def _default_dtype() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, DTYPE))
    try:
        with torch.device(DEVICE):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def _common_fields(cfg: VitConfig | QFormerConfig | ImageBindAudioConfig) -> dict[str, int]:
    """Return the fields that the configs of transformers' encoders share."""
    return {
        "hidden_size": cfg.width,
        "intermediate_size": cfg.mlp_dim,
        "num_hidden_layers": cfg.depth,
        "num_attention_heads": cfg.num_heads,
    }


def make_llama(cfg: LlamaConfig) -> Any:
    """Return transformers' LLaMA."""
    config = transformers.LlamaConfig.from_dict(to_hugging_face_config(cfg))
    with _default_dtype():
        return transformers.LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()


def make_vit(cfg: VitConfig) -> Any:
    """Return BLIP-2's EVA-CLIP ViT."""
    config = transformers.Blip2VisionConfig(
        **_common_fields(cfg),
        image_size=cfg.image_size,
        patch_size=cfg.patch_size,
        initializer_range=0.02,
    )
    with _default_dtype():
        return transformers.Blip2VisionModel._from_config(config, attn_implementation="sdpa").eval()


def make_qformer(cfg: QFormerConfig, memory_width: int) -> Any:
    """Return BLIP-2's Q-Former."""
    config = transformers.Blip2QFormerConfig(
        **_common_fields(cfg),
        cross_attention_frequency=cfg.cross_attention_every,
        encoder_hidden_size=memory_width,
    )
    with _default_dtype():
        return transformers.Blip2QFormerModel._from_config(config, attn_implementation="sdpa").eval()


def make_audio_tower(cfg: ImageBindAudioConfig) -> Any:
    """Return an Audio Spectrogram Transformer of the size of ImageBind's audio tower."""
    config = transformers.ASTConfig(
        **_common_fields(cfg),
        patch_size=cfg.patch_size,
        frequency_stride=cfg.patch_stride,
        time_stride=cfg.patch_stride,
        max_length=cfg.num_mel_frames,
        num_mel_bins=cfg.num_mel_bins,
    )
    with _default_dtype():
        return transformers.ASTModel._from_config(config, attn_implementation="sdpa").eval()


class VideoEncoder(torch.nn.Module):
    """The vision branch: ViT, image Q-Former, frame positions, video Q-Former and projection.

    Args:
        cfg: The config of the model.
    """

    def __init__(self, cfg: VideoLlamaConfig):
        super().__init__()
        image, video = cfg.image_qformer, cfg.video_qformer
        self.vit, self.image_qformer = make_vit(cfg.vit), make_qformer(image, cfg.vit.width)
        self.video_qformer = make_qformer(video, image.width)
        with _default_dtype():
            self.image_queries = torch.nn.Parameter(0.02 * torch.randn(1, image.num_queries, image.width))
            self.video_queries = torch.nn.Parameter(0.02 * torch.randn(1, video.num_queries, video.width))
            self.positions = torch.nn.Parameter(torch.randn(cfg.num_frame_positions, 1, image.width))
            self.projection = torch.nn.Linear(video.width, cfg.llama.width)

    def encode_frames(self, frames: Any) -> Any:
        """Encode frames [t, 3, h, w] to features [t, 32, 768]."""
        patches = self.vit(frames).last_hidden_state
        queries = self.image_queries.expand(len(frames), -1, -1)
        return self.image_qformer(query_embeds=queries, encoder_hidden_states=patches).last_hidden_state

    def forward(self, frames: Any) -> Any:
        """Encode the frames of a video, [t, 3, h, w], to media tokens [1, 32, width of the language model]."""
        features = self.encode_frames(frames) + self.positions[: len(frames)]
        memory = features.reshape(1, -1, features.shape[-1])
        tokens = self.video_qformer(query_embeds=self.video_queries, encoder_hidden_states=memory).last_hidden_state
        return self.projection(tokens)


def to_torch(array: np.ndarray) -> Any:
    """Return an array as a tensor on the device, floats in the dtype of the weights."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(DEVICE)
    return tensor.to(getattr(torch, DTYPE)) if tensor.is_floating_point() else tensor


def eager_and_compiled(
    function: Callable[..., Any], *arguments: Any, compiles: bool = True
) -> dict[str, Callable[[], Any]]:
    """Return the candidates of `timing.compare`: a function of tensors as it is, and with torch.compile."""
    candidates = {"PyTorch": lambda: function(*arguments)}
    if not compiles:
        return candidates
    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=False)
    try:
        compiled(*arguments)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        print(f"torch.compile: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
        return candidates
    return {**candidates, "PyTorch, compiled": lambda: compiled(*arguments)}


class Decoder:
    """Greedy decoding with a static cache.

    Args:
        model: The language model.
        cfg: Its config.
        batch: The number of rows.
        prompt: The number of positions of the cache that are filled, with zeros.
        new: The number of tokens that there is room for.
    """

    def __init__(self, model: Any, cfg: LlamaConfig, batch: int, prompt: int, new: int):
        self.model, self.ids = model, torch.full((batch, 1), 5, device=DEVICE)
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=prompt + new)
        dtype = getattr(torch, DTYPE)
        self.cache.early_initialization(batch, cfg.num_kv_heads, cfg.head_dim, dtype, torch.device(DEVICE))
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(prompt)

    def step(self, ids: Any) -> Any:
        """Return the next token of each row, [batch, 1]."""
        return self.model(ids, cache=self.cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)

    def make_prompt(self, length: int) -> Any:
        """Return the token ids of a prompt for each row."""
        return self.ids.expand(-1, length).contiguous()

    def prefill(self, ids: Any) -> Any:
        """Process prompts from the start of the cache, and return the first token of each row."""
        self.cache.reset()
        return self.step(ids)

    def forget(self, count: int) -> None:
        """Forget the last positions."""
        for layer in self.cache.layers:
            layer.cumulative_length.sub_(count)


class TorchModel(torch.nn.Module):
    """The vision branch and the language model.

    Args:
        config: The config of the model.
        length: The length of a prompt, with the media tokens.
    """

    def __init__(self, config: VideoLlamaConfig, length: int):
        super().__init__()
        self.config, self.length = config, length
        self.encoder, self.llama = VideoEncoder(config), make_llama(config.llama)
        self.text = torch.full((1, length - config.video_qformer.num_queries), 5, device=DEVICE)

    def read(self, path: Path) -> Any:
        """Read and normalize the frames of a file."""
        frames = np.stack(read_with_pyav(path, self.config.vit.image_size, self.config.num_frames))
        mean, std = (np.float32(255) * np.array(x, np.float32) for x in CLIP_STATISTICS)
        return to_torch(((frames - mean) / std).transpose(0, 3, 1, 2))

    def embed(self, frames: Any) -> Any:
        """Encode frames, and return the embeddings of a prompt with them."""
        return torch.cat([self.encoder(frames), self.llama.get_input_embeddings()(self.text)], dim=1)

    def generate(self, embeddings: Any, new: int) -> Any:
        """Generate an answer to each prompt."""
        cache = transformers.StaticCache(config=self.llama.config, max_cache_len=self.length + new)
        options = {"cache": cache, "use_cache": True}
        ids = self.llama(inputs_embeds=embeddings, logits_to_keep=1, **options).logits[:, -1:].argmax(-1)
        answer = [ids]
        for _ in range(new - 1):
            ids = self.llama(ids, **options).logits[:, -1:].argmax(-1)
            answer.append(ids)
        return torch.cat(answer, dim=1).cpu()

    def answer_all(self, paths: Sequence[Path], *, rows: int, new: int, readers: int) -> None:
        """Answer a question about each file, in batches of `rows`, while files are read ahead in threads."""
        with concurrent.futures.ThreadPoolExecutor(readers) as pool:
            frames = pool.map(self.read, paths)
            for _ in range(0, len(paths), rows):
                self.generate(torch.cat([self.embed(one) for one in itertools.islice(frames, rows)]), new)
