"""A file system in a local folder that fails on demand and tells about every change."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyarrow import fs

from llem_ray.results.destination import Destination


class FailingStore(fs.FileSystemHandler):
    """Like an object store or a mount: as long as ``failing`` is set, everything raises it."""

    def __init__(self, folder: Path, type_name: str = "failing") -> None:
        self.folder = folder
        self.failing: OSError | None = None
        self.fail_at: int | None = None
        """Fail from that change on, counted from 1."""
        self.changes = 0
        self.watcher: Callable[[str], None] = lambda change: None
        self._inner = fs.SubTreeFileSystem(str(folder), fs.LocalFileSystem())
        self._type_name = type_name

    def destination(self) -> Destination:
        return Destination(filesystem=fs.PyFileSystem(self), path="copies", shown="store://copies", argument="store://copies")

    def _ask(self) -> fs.FileSystem:
        if self.failing is not None:
            raise self.failing
        return self._inner

    def _change(self, what: str) -> fs.FileSystem:
        inner = self._ask()
        self.changes += 1
        if self.fail_at is not None and self.changes >= self.fail_at:
            raise OSError("NETWORK_CONNECTION: gone")
        self.watcher(what)
        return inner

    def get_type_name(self) -> str:
        return self._type_name

    def get_file_info(self, paths: list[str]) -> Any:
        return self._ask().get_file_info(paths)

    def get_file_info_selector(self, selector: fs.FileSelector) -> Any:
        return self._ask().get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._ask().create_dir(path, recursive=recursive)

    def delete_file(self, path: str) -> None:
        self._change(f"delete {path}").delete_file(path)

    def move(self, src: str, dest: str) -> None:
        self._change(f"move {dest}").move(src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self._ask().open_input_stream(path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return self._change(f"write {path}").open_output_stream(path)

    def normalize_path(self, path: str) -> str:
        return path

    def _refuse(self, *args: Any) -> Any:
        raise NotImplementedError

    delete_dir = delete_dir_contents = delete_root_dir_contents = _refuse
    copy_file = open_input_file = open_append_stream = _refuse


def wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.01)
