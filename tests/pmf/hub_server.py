"""A local Hugging Face hub: the responses that huggingface_hub's client needs to list and load files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"main").hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `root`/owner/name: GET /api/models/owner/name, HEAD and GET /owner/name/resolve/main/file."""

    protocol_version = "HTTP/1.1"
    root: Path
    loaded: list[str]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            folder = self.root.joinpath(*parts[2:4])
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            listed = [{"rfilename": str(path.relative_to(folder))} for path in files]
            if files:
                answer = {"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": listed}
                return self.send(200, json.dumps(answer).encode(), {})
        file = self.root.joinpath(*parts[:2], *parts[4:])
        if parts[2:3] == ["resolve"] and file.is_file():
            content = file.read_bytes()
            if self.command == "GET":
                self.loaded.append(file.name)
            etag = hashlib.sha1(content).hexdigest()
            return self.send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        missing = "EntryNotFound" if (self.root / "/".join(parts[:2])).is_dir() else "RepoNotFound"
        return self.send(404, b"{}", {"X-Error-Code": missing, "X-Error-Message": "not here"})

    def send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def serve(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the repositories in `root`; yields (address, names of the files loaded so far)."""
    loaded: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OwnHandler", (Handler,), dict(root=root, loaded=loaded)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", loaded
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
