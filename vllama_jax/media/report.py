"""Reports on media files: what a file contains, and what of it is used."""

from __future__ import annotations

import dataclasses
from typing import Literal

_AUDIO_STATES = {
    "used": "audio used",
    "absent": "no audio in the file",
    "off": "audio off",
    "unsupported": "the model has no audio branch",
}


@dataclasses.dataclass(frozen=True)
class MediaReport:
    """What a media file contains, and what of it is used. `str` of it is a line for the user.

    Attributes:
        path: The file.
        kind: Its kind of media.
        num_frames: The number of sampled frames: 1 for an image, 0 for audio.
        duration: Of the file or the segment, in seconds; 0 for an image.
        audio: What is done with the audio: "used", "absent", "off", "unsupported" (the model has no audio branch, which
            the caller knows) or "failed: " and the reason.
        notes: Other remarks for the user, such as packets that could not be decoded.
    """

    path: str
    kind: Literal["video", "image", "audio"]
    num_frames: int
    duration: float
    audio: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return a line for the user, such as "8 frames of 7.1 s; audio used"."""
        audio = _AUDIO_STATES.get(self.audio, f"audio {self.audio}")
        if self.kind == "image":
            found = ["1 image"]
        elif self.kind == "audio":
            found = [f"{self.duration:.1f} s of audio", audio]
        else:
            found = [f"{self.num_frames} frame{'s' if self.num_frames > 1 else ''} of {self.duration:.1f} s", audio]
        return "; ".join((*found, *self.notes))
