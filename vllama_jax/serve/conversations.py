"""Convert the messages of a request to the turns of a conversation, and to the media files that they need."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Literal

from vllama_jax.errors import ConfigError
from vllama_jax.media import FrameSampling
from vllama_jax.media_tokens import DEFAULT_SAMPLING
from vllama_jax.serve.errors import ApiError
from vllama_jax.serve.protocol import (
    AudioPart,
    ChatRequest,
    FilePart,
    ImagePart,
    InputAudioPart,
    MediaFields,
    MediaPart,
    Message,
    TextPart,
    VideoPart,
)

Kind = Literal["image", "video", "audio"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaReference:
    """A media file that a request refers to, and how to read it.

    Attributes:
        part: The field of the request, such as "messages[0].content[1]".
        kind: The kind of media that the file must have; None for any.
        urls: Its URL; of a video whose frames are images, those of the images.
        is_frames: Whether it is a video whose frames are images.
        sampling: Which frames are sampled, and from which window.
        audio: Whether the audio of a video is used.
        image_rate: Frames per second of images that are frames.
    """

    part: str
    kind: Kind | None
    urls: tuple[str, ...]
    is_frames: bool = False
    sampling: FrameSampling = DEFAULT_SAMPLING
    audio: bool = True
    image_rate: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class UserTurn:
    """The messages of a user between two answers.

    Attributes:
        media: Their media files.
        question: Their texts.
        answer: The answer that follows; None for the last turn.
    """

    media: tuple[MediaReference, ...]
    question: str
    answer: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dialog:
    """A conversation that ends with a question.

    Attributes:
        system: The system text; None for the model's own.
        turns: The turns.
        answer_start: The beginning of the answer, which is given to the model.
    """

    system: str | None
    turns: tuple[UserTurn, ...]
    answer_start: str = ""

    @property
    def media(self) -> list[MediaReference]:
        """The media files of all turns, in order."""
        return [media for turn in self.turns for media in turn.media]


def read_dialog(request: ChatRequest) -> Dialog:
    """Convert the messages of a request.

    Consecutive messages of a role are one: their texts are joined by line breaks. Media precede the text of their
    turn, as in the prompts that the models were trained on.

    Raises:
        ApiError: The order of the messages is invalid, or an option is.
    """
    messages = list(enumerate(request.messages))
    system = [_read_text(number, message) for number, message in messages if message.role in ("system", "developer")]
    spoken = [(number, message) for number, message in messages if message.role in ("user", "assistant")]
    if not spoken or spoken[0][1].role != "user":
        raise ApiError(400, "messages: the first must be the user's, after those of the system", param="messages")
    answer_start = ""
    if spoken[-1][1].role == "assistant":
        if not request.continue_final_message:
            why = "the last must be the user's, or set continue_final_message to continue an answer"
            raise ApiError(400, f"messages: {why}", param="messages")
        answer_start = _read_text(*spoken.pop())
    elif request.continue_final_message:
        raise ApiError(400, "continue_final_message: the last message is not the assistant's", param="messages")
    turns: list[UserTurn] = []
    for number, message in spoken:
        if message.role == "assistant":
            text = _read_text(number, message)
            before = turns[-1].answer
            turns[-1] = dataclasses.replace(turns[-1], answer=text if before is None else f"{before}\n{text}")
            continue
        media, text = _read_user_message(number, message, request)
        if turns and turns[-1].answer is None:
            last = turns.pop()
            media, text = (*last.media, *media), "\n".join(filter(None, (last.question, text)))
        turns.append(UserTurn(media=media, question=text, answer=None))
    return Dialog(system="\n".join(system) if system else None, turns=tuple(turns), answer_start=answer_start)


def read_parts(parts: Sequence[tuple[str, MediaPart]], fields: MediaFields) -> tuple[MediaReference, ...]:
    """Return the media files of content parts.

    Args:
        parts: The parts with their places in the request.
        fields: The fields of the request about its media.

    Raises:
        ApiError: An option is invalid, or a part has no file.
    """
    images = [place for place, part in parts if isinstance(part, ImagePart)]
    if _are_frames(fields, images, has_video=any(isinstance(part, VideoPart) for _, part in parts)):
        frames = MediaReference(
            part=images[0] if len(images) == 1 else f"{images[0]} to {images[-1]}",
            kind="video",
            urls=tuple(part.image_url.url for _, part in parts if isinstance(part, ImagePart)),
            is_frames=True,
            sampling=_sampling(fields, "video"),
            image_rate=fields.image_rate or 1.0,
        )
        first = next(number for number, (_, part) in enumerate(parts) if isinstance(part, ImagePart))
        others = [_read_part(place, part, fields) for place, part in parts[:first]]
        rest = [_read_part(place, part, fields) for place, part in parts[first:] if not isinstance(part, ImagePart)]
        return (*others, frames, *rest)
    return tuple(_read_part(place, part, fields) for place, part in parts)


def _are_frames(fields: MediaFields, images: Sequence[str], *, has_video: bool) -> bool:
    """Return whether the images of a message are the frames of one video.

    Clients that cannot send videos, such as lmms-eval, send several images and options for videos.
    """
    if not images or fields.as_video is False:
        return False
    has_options = fields.media_io_kwargs is not None and fields.media_io_kwargs.video is not None
    return fields.as_video is True or (has_options and len(images) > 1 and not has_video)


def _read_user_message(number: int, message: Message, fields: MediaFields) -> tuple[tuple[MediaReference, ...], str]:
    places = [(f"messages[{number}].content[{index}]", part) for index, part in enumerate(message.content or ())]
    texts = [part.text for _, part in places if isinstance(part, TextPart)]
    media = [(place, part) for place, part in places if not isinstance(part, TextPart)]
    return read_parts(media, fields), "\n".join(texts)


def _read_text(number: int, message: Message) -> str:
    """Return the text of a message that may have only text."""
    texts = []
    for index, part in enumerate(message.content or ()):
        if not isinstance(part, TextPart):
            place = f"messages[{number}].content[{index}]"
            raise ApiError(400, f"{place}: a message of the role {message.role} has only text", param=place)
        texts.append(part.text)
    return "\n".join(texts)


def _read_part(place: str, part: MediaPart, fields: MediaFields) -> MediaReference:
    processor = fields.mm_processor_kwargs
    audio = processor is None or processor.use_audio_in_video
    if isinstance(part, ImagePart):
        return MediaReference(part=place, kind="image", urls=(part.image_url.url,))
    if isinstance(part, VideoPart):
        sampling = _sampling(fields, "video")
        return MediaReference(part=place, kind="video", urls=(part.video_url.url,), sampling=sampling, audio=audio)
    if isinstance(part, AudioPart | InputAudioPart):
        data = isinstance(part, InputAudioPart)
        url = f"data:;base64,{part.input_audio.data}" if isinstance(part, InputAudioPart) else part.audio_url.url
        if data and url.startswith("data:;base64,data:"):
            raise ApiError(400, f"{place}: input_audio has bare base64; send a data: URL as audio_url", param=place)
        return MediaReference(part=place, kind="audio", urls=(url,), sampling=_sampling(fields, "audio"))
    url = _file_url(place, part)
    return MediaReference(part=place, kind=None, urls=(url,), sampling=_sampling(fields, "video"), audio=audio)


def _file_url(place: str, part: FilePart) -> str:
    if (part.file.file_id is None) == (part.file.file_data is None):
        raise ApiError(400, f"{place}: a file has either file_id or file_data", param=place)
    return part.file.file_data or f"{UPLOAD_SCHEME}{part.file.file_id}"


UPLOAD_SCHEME = "upload:"  # of a URL for the id of an uploaded file; clients can use it too


def _sampling(fields: MediaFields, name: Literal["video", "audio"]) -> FrameSampling:
    """Return the options of a request for videos or audio files.

    Raises:
        ApiError: One of them is out of range.
    """
    options = fields.media_io_kwargs and getattr(fields.media_io_kwargs, name)
    if not options:
        return FrameSampling()
    chosen = {key: value for key in type(options).model_fields if (value := getattr(options, key)) is not None}
    if not all(isinstance(value, str) or math.isfinite(value) for value in chosen.values()):
        raise ApiError(400, f"media_io_kwargs.{name}: a value is not a number", param=f"media_io_kwargs.{name}")
    try:
        return FrameSampling(**chosen)
    except ConfigError as error:
        raise ApiError(400, f"media_io_kwargs.{name}: {error}", param=f"media_io_kwargs.{name}") from error


def count_frames(references: Sequence[MediaReference], default: int, most: int) -> int:
    """Return the largest number of frames that files can have. An audio file counts as one.

    Args:
        references: The files.
        default: The number of frames of a video without options.
        most: The largest number of frames of a video, where it depends on the video.
    """
    return sum(_count_each(references, default, most))


def _count_each(references: Sequence[MediaReference], default: int, most: int) -> Iterator[int]:
    for reference in references:
        sampling = reference.sampling
        if reference.is_frames:
            yield len(reference.urls)
        elif reference.kind in ("image", "audio"):
            yield 1
        elif sampling.fps is not None:
            yield sampling.max_frames or most
        else:
            yield sampling.num_frames or default
