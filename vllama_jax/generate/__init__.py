"""Generation of answers: greedy decoding, sampling, beam search, and the choice between given answers.

`Engine` answers many requests at a time. `generate` answers a batch of prompts with it, or with beam search.
"""

from collections.abc import Iterator, Sequence

from vllama_jax.config import GenerationConfig
from vllama_jax.generate.beam_search import generate_with_beams
from vllama_jax.generate.choose import NO_TOKEN
from vllama_jax.generate.engine import Engine, Generation, Request
from vllama_jax.generate.programs import TOKENS_PER_DISPATCH
from vllama_jax.generate.prompt import EmbeddedPrompt, check_context_length, padded_prompt_length
from vllama_jax.nn.llama import Llama

__all__ = [
    "TOKENS_PER_DISPATCH",
    "EmbeddedPrompt",
    "Engine",
    "Generation",
    "Request",
    "check_context_length",
    "generate",
    "padded_prompt_length",
    "search_beams",
]


def generate(
    llama: Llama,
    prompts: Sequence[EmbeddedPrompt],
    config: GenerationConfig,
    *,
    bos: int | None,
    eos: int | Sequence[int],
    stops: Sequence[Sequence[int]] = (),
    int8_cache: bool = False,
) -> Iterator[list[list[int]]]:
    """Generate answers to a batch of prompts. Each is what its prompt gives alone.

    Args:
        llama: The language model.
        prompts: The prompts.
        config: The options of decoding.
        bos: The BOS token; None for a tokenizer without one. The original starts every answer with a dummy BOS. The
            repetition penalty and the lengths of beams count it, but it is not yielded.
        eos: The token or tokens that end an answer.
        stops: Other token sequences that end an answer; any number, of any length.
        int8_cache: Whether to store the KV cache in int8.

    Yields:
        The new tokens of each prompt since the last yield: up to TOKENS_PER_DISPATCH of them, or with beam search the
        complete answer. The token or sequence that ended an answer is included.

    Raises:
        ConfigError: A prompt and its answer are longer than the model's context, or a stop sequence is empty.
    """
    ends = (eos,) if isinstance(eos, int) else tuple(eos)
    longest = max(map(len, prompts))
    check_context_length(longest, config.max_new_tokens, llama.cfg)
    if config.num_beams > 1:
        dtype = "int8" if int8_cache else str(llama.embedding.dtype)
        first = NO_TOKEN if bos is None else bos
        yield generate_with_beams(llama, prompts, config, bos=first, eos=ends, stops=stops, cache_dtype=dtype)
        return
    engine = Engine(
        llama,
        rows=len(prompts),
        bos=bos,
        eos=ends,
        int8_cache=int8_cache,
        prompt_tokens=longest,
        new_tokens=config.max_new_tokens,
    )
    generations = [engine.add(Request(prompt=prompt, config=config, stops=stops)) for prompt in prompts]
    while engine.is_busy:
        before = [len(generation.tokens) for generation in generations]
        if engine.step():
            yield [generation.tokens[start:] for generation, start in zip(generations, before, strict=True)]


def search_beams(
    llama: Llama, request: Request, *, bos: int | None, eos: Sequence[int], int8_cache: bool = False
) -> Generation:
    """Answer a request with beam search, which has no log-probabilities. See `generate`."""
    ((tokens,),) = generate(
        llama, [request.prompt], request.config, bos=bos, eos=eos, stops=request.stops, int8_cache=int8_cache
    )
    return Generation(
        request=request,
        tokens=tokens,
        prefill_tokens=len(request.prompt),
        finish_reason="length" if len(tokens) == request.config.max_new_tokens else "stop",
    )
