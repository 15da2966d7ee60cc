"""Lookup of video files by the names in annotation files."""

import os
from collections.abc import Iterable
from pathlib import Path

from vllama_jax.errors import DataError
from vllama_jax.media import IMAGE_EXTENSIONS

VIDEO_EXTENSIONS = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v", ".flv", ".mpg", ".mpeg", ".gif")
MAX_LISTED_MISSING = 5  # missing videos that messages name


class VideoFolder:
    """A directory of videos, with or without subdirectories.

    Args:
        folder: The directory.

    Raises:
        DataError: It does not exist.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise DataError(f"{folder}: no such directory; --videos must be the directory of the benchmark's videos")
        self.folder = folder
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, names: Iterable[str]) -> Path | None:
        """Find the file, or the directory of frames, with the first of these names that exists.

        A name is a path relative to the directory. Its extension may be missing, or that of another video format. If
        the path does not exist, the file name is searched for in all subdirectories. If the name has directories, the
        end of the path must match them, because file names are not unique over datasets. A name with several matches is
        not found. Names that lead out of the directory ("..", absolute paths) are ignored, because annotation files may
        come from untrusted sources.

        Args:
            names: Possible names, the most probable first.

        Returns:
            The path, or None if no name is found.
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
        """Return the paths that end in `name`. Directories of frames need at least one directory in `name`."""
        if self._by_name is None:
            self._by_name = {}
            for folder, _, files in os.walk(self.folder, followlinks=True):
                videos = [file for file in files if not file.lower().endswith(IMAGE_EXTENSIONS)]
                frames = [Path(folder)] if len(videos) < len(files) else []  # MVBench has too many frames to list
                for path in (*frames, *(Path(folder, file) for file in videos)):
                    for key in {path.name.lower(), _stem(path.name).lower()}:
                        self._by_name.setdefault(key, []).append(path)
        *folders, last = _lowercase_parts(name) or [""]
        found = self._by_name.get(last, [])
        if not folders:
            return [path for path in found if not path.is_dir()]
        return [path for path in found if _lowercase_parts(path.absolute())[-len(folders) - 1 : -1] == folders]


def _lowercase_parts(path: Path) -> list[str]:
    return [name.lower() for name in path.parts]


def _stem(name: str) -> str:
    """Return a name without directories and without the extension of a video format; it may contain other dots."""
    name = Path(name).name
    return name[: -len(Path(name).suffix)] if Path(name).suffix.lower() in VIDEO_EXTENSIONS else name
