"""Make requests for the engine of requests of the API: prompts, options of decoding, and stop sequences."""

import collections
import dataclasses
import hashlib
import secrets
from collections.abc import Sequence

import numpy as np

from vllama_jax.chat import embed_prompt
from vllama_jax.config import GREEDY, GenerationConfig
from vllama_jax.errors import ConfigError, ContextLengthError
from vllama_jax.generate import EmbeddedPrompt, Request, check_context_length
from vllama_jax.model import Model
from vllama_jax.serve.conversations import Dialog
from vllama_jax.serve.errors import ApiError
from vllama_jax.serve.media_requests import RequestedMedia
from vllama_jax.serve.options import ServeOptions
from vllama_jax.serve.protocol import MAX_STOPS, ChatRequest, CompletionRequest, GenerationFields
from vllama_jax.serve.scheduler import MAX_STOP_SEQUENCES, MAX_STOP_TOKENS
from vllama_jax.serve.vllm_protocol import check_config
from vllama_jax.text import prompts
from vllama_jax.text.templates import ChatTemplate, Mark

_MAX_STOP_LENGTH = 256  # characters
_MAX_CHARACTERS_PER_TOKEN = 32  # longer texts are refused without tokenizing them
_MAX_PAST_ANSWERS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerJob:
    """Requests for the engine, and what is needed to make text of their answers.

    Attributes:
        requests: The requests: `n` for each prompt.
        template: The template, with the request's stop texts.
        conversation: The conversation; None for a text without a template.
        media: The files of the conversation.
        start: When the request arrived, by `time.monotonic`.
    """

    requests: Sequence[Request]
    template: ChatTemplate
    conversation: prompts.Conversation | None = None
    media: Sequence[RequestedMedia] = ()
    start: float = 0.0

    @property
    def num_tokens(self) -> int:
        """The largest number of tokens of prompts and answers."""
        return sum(len(request.prompt) + request.config.max_new_tokens for request in self.requests)

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of all prompts; a prompt with several answers counts once."""
        return sum({id(request.prompt): len(request.prompt) for request in self.requests}.values())


class RequestMaker:
    """Makes requests for the engine. Its answers are those of `Chat` for the same conversation.

    Args:
        model: The model.
        options: The server's options.
    """

    def __init__(self, model: Model, options: ServeOptions):
        self._model, self._options = model, options
        name = options.template or model.config.template
        self._start = prompts.start_conversation(name, model.config.has_audio)
        prompts.check_special_tokens(self._start.template, model.tokenizer, name)
        self._past_answers: collections.OrderedDict[bytes, tuple[str, bool]] = collections.OrderedDict()

    def make_chat_job(self, fields: ChatRequest, dialog: Dialog, media: Sequence[RequestedMedia]) -> AnswerJob:
        """Make the requests of a conversation. May take milliseconds: call it in a thread.

        Args:
            fields: The request.
            dialog: Its conversation.
            media: The files of the conversation, in order.

        Raises:
            ApiError: The conversation is too long, or an option is invalid.
        """
        self._check_fields(fields)
        texts = [dialog.system or "", dialog.answer_start]
        texts += [text for turn in dialog.turns for text in (turn.question, turn.answer or "")]
        self._check_characters(texts)
        conversation = self.build_conversation(dialog, media)
        tokens = [array for one in media for array in one.encoded.arrays]
        try:
            prompt = embed_prompt(self._model, conversation, tokens, 1, dialog.answer_start)  # type: ignore[arg-type]
        except ContextLengthError as error:
            context = self._model.network.llama.cfg.max_length
            why = f"the prompt does not fit the model's context of {context} tokens; remove turns or media"
            raise _too_long(why) from error
        top_logprobs = (fields.top_logprobs or 0) if fields.logprobs else 0
        limit = fields.max_completion_tokens if fields.max_tokens is None else fields.max_tokens
        return self._make_job(
            fields, [prompt], conversation.template, limit, top_logprobs, conversation=conversation, media=media
        )

    def make_completion_job(self, fields: CompletionRequest) -> AnswerJob:
        """Make the requests of texts without a template, or of token ids. May take milliseconds: call it in a thread.

        Raises:
            ApiError: A prompt is too long or invalid, or an option is.
        """
        self._check_fields(fields)
        if fields.echo or fields.suffix:
            raise ApiError(
                400, "echo and suffix are not supported; omit them", param="echo" if fields.echo else "suffix"
            )
        given = fields.prompt
        texts: list[str | list[int]]
        if isinstance(given, str):
            texts = [given]
        elif all(isinstance(item, int) for item in given):
            texts = [[item for item in given if isinstance(item, int)]]
        else:
            texts = [item for item in given if not isinstance(item, int)]
        self._check_characters([text for text in texts if isinstance(text, str)])
        if not texts or not all(texts):
            raise ApiError(400, "prompt: it is empty; give a text", param="prompt")
        embedded = [self._embed_text(text) for text in texts]
        template = dataclasses.replace(self._start.template, stop=Mark.EOS, role="")
        return self._make_job(fields, embedded, template, fields.max_tokens, fields.logprobs or 0)

    def remember(self, job: AnswerJob, text: str, tokens: Sequence[int]) -> None:
        """Remember how an answer is written in later prompts, where its text alone does not determine that."""
        if job.conversation is None:
            return
        past = prompts.decode_past_answer(self._model.tokenizer, job.template, tokens)
        if past == (text, False):
            return
        self._past_answers[_digest(job.conversation, text)] = past
        if len(self._past_answers) > _MAX_PAST_ANSWERS:
            self._past_answers.popitem(last=False)

    def build_conversation(self, dialog: Dialog, media: Sequence[RequestedMedia]) -> prompts.Conversation:
        """Return the conversation of a request, with its media.

        Raises:
            ApiError: The model's template has no system message.
        """
        conversation = self._start
        if dialog.system is not None:
            if dialog.system and conversation.template.system is None:
                raise ApiError(400, "messages: the model's template has no system message; omit it", param="messages")
            conversation = dataclasses.replace(conversation, system=dialog.system)
        files = iter(media)
        for turn in dialog.turns:
            for _ in turn.media:
                conversation = conversation.add(next(files).encoded.prompt_media)
            conversation = conversation.ask(turn.question)
            if turn.answer is not None:
                past = self._past_answers.get(_digest(conversation, turn.answer), (turn.answer, False))
                conversation = conversation.answer(*past)
        return conversation

    def _embed_text(self, text: str | list[int]) -> EmbeddedPrompt:
        llama, tokenizer = self._model.network.llama, self._model.tokenizer
        ids = tokenizer.encode(text, bos=True, special=False) if isinstance(text, str) else text
        if min(ids) < 0 or max(ids) >= llama.cfg.vocab_size:
            raise ApiError(400, f"prompt: a token id is not below {llama.cfg.vocab_size}", param="prompt")
        media = np.zeros((0, llama.cfg.width), np.float32)
        return EmbeddedPrompt(np.array(ids, np.int32), np.zeros(len(ids), bool), media)

    def _make_job(
        self,
        fields: GenerationFields,
        embedded: Sequence[EmbeddedPrompt],
        template: ChatTemplate,
        max_tokens: int | None,
        top_logprobs: int,
        *,
        conversation: prompts.Conversation | None = None,
        media: Sequence[RequestedMedia] = (),
    ) -> AnswerJob:
        stop = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ())
        template = dataclasses.replace(template, more_stops=stop)
        sequences = prompts.stop_sequences(self._model.tokenizer, template)
        stops = [ids for ids in sequences if len(ids) <= MAX_STOP_TOKENS][:MAX_STOP_SEQUENCES]
        requests = []
        for prompt in embedded:
            config = self._make_config(fields, len(prompt), max_tokens, top_logprobs, stop)
            for number in range(fields.n):
                numbered = dataclasses.replace(config, seed=(config.seed + number) % 2**64)
                requests.append(Request(prompt=prompt, config=numbered, stops=stops))
        return AnswerJob(requests=requests, template=template, conversation=conversation, media=media)

    def _make_config(
        self, fields: GenerationFields, length: int, max_tokens: int | None, top_logprobs: int, stop: tuple[str, ...]
    ) -> GenerationConfig:
        """Return the options of decoding for a prompt of a length. Those that are not given are the defaults."""
        cfg, most = self._model.network.llama.cfg, self._options.new_tokens
        if length > self._options.prompt_tokens:
            why = f"the prompt has {length} tokens, but this server takes at most {self._options.prompt_tokens}"
            raise _too_long(f"{why} (--prompt-tokens); remove turns or media")
        if max_tokens is None:
            max_tokens = max(min(GREEDY.max_new_tokens, most, cfg.max_length - length), 1)
        elif max_tokens > most:
            why = f"{max_tokens}, but an answer has at most {most} tokens on this server (--new-tokens)"
            raise ApiError(400, f"max_tokens: {why}", param="max_tokens")
        chosen = {
            "temperature": fields.temperature,
            "top_p": fields.top_p,
            "top_k": None if fields.top_k is None else max(fields.top_k, 0),  # -1 is all, as in vLLM
            "repetition_penalty": fields.repetition_penalty,
            "min_new_tokens": fields.min_tokens,
            "no_repeat_ngram_size": fields.no_repeat_ngram_size,
        }
        try:
            check_context_length(length, max_tokens, cfg)
            config = GenerationConfig(
                max_new_tokens=max_tokens,
                seed=secrets.randbits(32) if fields.seed is None else fields.seed % 2**64,
                top_logprobs=top_logprobs,
                stop=stop,
                **{name: value for name, value in chosen.items() if value is not None},  # type: ignore[arg-type]
            )
        except ContextLengthError as error:
            raise _too_long(error) from error
        except ConfigError as error:
            message = str(error).replace("max_new_tokens", "max_tokens").replace("min_new_tokens", "min_tokens")
            raise ApiError(400, message, param=message.split()[0]) from error
        if self._options.engine is not None:
            check_config(config)
        return config

    def _check_fields(self, fields: GenerationFields) -> None:
        if fields.use_beam_search or (fields.best_of or 1) > fields.n:
            name = "use_beam_search" if fields.use_beam_search else "best_of"
            raise ApiError(400, f"{name}: beam search is not offered by the server; omit it", param=name)
        stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        if len(stops) > MAX_STOPS or any(len(stop) > _MAX_STOP_LENGTH for stop in stops):
            why = f"at most {MAX_STOPS} texts of at most {_MAX_STOP_LENGTH} characters"
            raise ApiError(400, f"stop: {why} are possible", param="stop")
        if isinstance(fields, ChatRequest):
            if fields.tools:
                raise ApiError(400, "tools: the model calls no tools; omit them", param="tools")
            if (fields.response_format or {}).get("type", "text") != "text":
                raise ApiError(400, "response_format: only text is possible; omit it", param="response_format")
            if fields.top_logprobs and not fields.logprobs:
                raise ApiError(400, "top_logprobs: set logprobs to true", param="top_logprobs")

    def _check_characters(self, texts: Sequence[str]) -> None:
        most = self._options.prompt_tokens * _MAX_CHARACTERS_PER_TOKEN
        if (count := sum(map(len, texts))) > most:
            raise _too_long(f"the text has {count} characters, but this server takes at most {most}; shorten it")


def _digest(conversation: prompts.Conversation, answer: str) -> bytes:
    return hashlib.sha256(f"{prompts.render(conversation)}\0{answer}".encode("utf-8", "replace")).digest()


def _too_long(reason: object) -> ApiError:
    return ApiError(400, str(reason), param="messages", code="context_length_exceeded")
