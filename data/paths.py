"""Which files a data set may name: those inside of its own folder, and inside of folders that the user allowed."""

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from data.pictures import DataError

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://|data:")  # http://, file://, hf://, zip://, data:image/png;base64,...

MAX_REMEMBERED = 10_000  # folders
MAX_NAMED = 3  # folders in a hint; of more, the one that holds them all


class DataFolder:
    """What relative paths of a data set count from, and the folders that its files must really lie in.

    Links count as the file that they lead to, with one exception: a snapshot in the Hub's cache consists of links into
    the folder `blobs` beside it.

    path      of the data set's own folder
    allowed   further folders (--allowed_folders)
    caches    where `datasets` keeps what it downloaded or unpacked
    """

    def __init__(self, path: Path, allowed: Iterable[str] = (), caches: Iterable[str] = ()):
        self.path = path
        own = path.absolute()
        roots = [own, *map(os.path.expanduser, allowed), *caches]
        for inner in (own, *own.parents):
            blobs = inner.parent.parent / "blobs"
            if inner.parent.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
                roots.append(blobs)
        self._refused: dict[str, None] = {}
        self._real_folders: dict[str, str] = {}
        self._roots = tuple(os.path.realpath(root) for root in roots)

    def resolve(self, kind: str, path: str) -> str:
        """The path of a file from the folder. Raises DataError when it lies outside; `kind` begins the message."""
        if ADDRESS.match(path):
            raise DataError(f"{kind} {path!r:.100} is not a file; save it as one and write its path")
        try:
            full = os.path.join(self.path, path)
            real = self._real(full)
        except (OSError, ValueError) as error:  # a name that is too long, or holds a zero
            raise DataError(f"{kind} {path!r:.200} cannot be read: {error!s:.200}; correct the path") from error
        if not any(real == root or real.startswith(os.path.join(root, "")) for root in self._roots):
            self._refused[os.path.dirname(real)] = None
            to = f" (it is {real!r:.200})" if real != path else ""
            raise DataError(
                f"{kind} {path!r:.200}{to} lies outside of {str(self.path)!r:.200}; move it there, or, where you trust "
                "the data, allow its folder by --allowed_folders"
            )
        return full

    def _real(self, full: str) -> str:
        """os.path.realpath, which asks for every folder on the way, with those folders asked for once."""
        folder, name = os.path.split(full)
        if folder not in self._real_folders and len(self._real_folders) < MAX_REMEMBERED:
            self._real_folders[folder] = os.path.realpath(folder)
        if folder not in self._real_folders or name in ("", ".", ".."):
            return os.path.realpath(full)
        real = os.path.join(self._real_folders[folder], name)
        return os.path.realpath(real) if os.path.islink(real) else real

    def hint(self) -> str:
        """The flag that would have allowed every file that was refused; "" when none was."""
        folders = list(self._refused)
        if len(folders) > MAX_NAMED and (common := os.path.commonpath(folders)) != os.path.dirname(common):
            folders = [common]
        return f"--allowed_folders {shlex.join(folders[:MAX_NAMED])}" if folders else ""
