"""The names that annotations have for videos → files in a folder."""

import os
from collections.abc import Iterable
from pathlib import Path

from vllama_jax.errors import DataError
from vllama_jax.media import IMAGE_EXTENSIONS

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".gif")
MAX_LISTED_MISSING = 5  # names of missing videos in messages


class VideoFolder:
    """A folder of videos, with folders in it or without. Raises DataError when there is none."""

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; --videos is where the benchmark's videos were unpacked to")
        self.folder = folder
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, names: Iterable[str]) -> Path | None:
        """The file, or the folder of frames, that has one of these names; the first of them that has any.

        A name is a path from the folder on, and may lack its extension or have another one. Where nothing is there,
        the whole folder is searched for what has that name and, if it has folders, lies in such ones: data sets have
        names in common. One of which there are two is not found. Nor is what a name with ".." or an absolute path
        finds outside the folder: annotations come from elsewhere.
        """
        names = [name for name in names if name and self._is_inside(name)]
        for name in names:
            for candidate in (name, *(f"{name}{extension}" for extension in VIDEO_EXTENSIONS)):
                path = self.folder / candidate
                if path.exists() and path != self.folder:
                    return path
        for name in names:
            found = self._find_by_path_suffix(Path(name)) or self._find_by_path_suffix(Path(name).parent / _stem(name))
            if len(found) == 1:
                return found[0]
        return None

    def _is_inside(self, name: str) -> bool:
        path = Path(name)
        return ".." not in path.parts and (self.folder / path).absolute().is_relative_to(self.folder.absolute())

    def _find_by_path_suffix(self, name: Path) -> list[Path]:
        """What has this name in these folders; folders of frames only where it has some."""
        if self._by_name is None:
            self._by_name = {}
            for folder, _, files in os.walk(self.folder, followlinks=True):
                videos = [file for file in files if not file.lower().endswith(IMAGE_EXTENSIONS)]
                frames = [Path(folder)] if len(videos) < len(files) else []  # MVBench has hundreds of thousands
                for path in (*frames, *(Path(folder, file) for file in videos)):
                    for key in {path.name.lower(), _stem(path.name).lower()}:
                        self._by_name.setdefault(key, []).append(path)
        *folders, last = _lowercase_parts(name) or [""]
        found = self._by_name.get(last, [])
        if not folders:
            return [path for path in found if not path.is_dir()]
        return [path for path in found if _lowercase_parts(path.absolute())[-len(folders) - 1 : -1] == folders]


def _lowercase_parts(path: Path) -> list[str]:
    return [part.lower() for part in path.parts]


def _stem(name: str) -> str:
    """A name without its folder and without the extension of a video; names may have dots in them."""
    name = Path(name).name
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in VIDEO_EXTENSIONS else name
