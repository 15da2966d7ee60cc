"""What was found in a file, and what of it is used."""

from __future__ import annotations

import dataclasses
from typing import Literal

_AUDIO_STATES = {
    "used": "sound used",
    "absent": "no sound in the file",
    "off": "sound off",
    "unsupported": "the model has no audio branch",
}


@dataclasses.dataclass(frozen=True)
class MediaReport:
    """One file's account: every file says what became of its sound, and nothing is swallowed.

    `frames` is the number of frames that were taken (1 for a picture, 0 for sound alone), `seconds` the length of
    the whole file (0 for a picture), and `audio` one of "used", "absent", "off", "unsupported" (the model has no audio
    branch; whoever knows the model sets it) and "failed: why". `notes` says what else the user should know of the file,
    such as packets that were lost.
    """

    path: str
    kind: Literal["video", "image", "audio"]
    num_frames: int
    duration: float
    audio: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The sentence for the user, such as "8 frames of 7.1 s; sound used"."""
        sound = _AUDIO_STATES.get(self.audio, f"sound {self.audio}")
        if self.kind == "image":
            found = ["1 picture"]
        elif self.kind == "audio":
            found = [f"{self.duration:.1f} s of sound", sound]
        else:
            found = [f"{self.num_frames} frame{'s' if self.num_frames > 1 else ''} of {self.duration:.1f} s", sound]
        return "; ".join((*found, *self.notes))
