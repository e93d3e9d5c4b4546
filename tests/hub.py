"""A model hub on this machine's loopback address, as far as transformers and datasets ask for files."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(models: Mapping[str, Path], data: Mapping[str, Path]) -> Iterator[str]:
    """Serve folders under hub ids while the block runs.

    Yields:
        The address, for the variable HF_ENDPOINT of another process.
    """
    kinds = {"models": dict(models), "datasets": dict(data)}
    handler = type("Handler", (_Handler,), {"kinds": kinds})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    kinds: Mapping[str, Mapping[str, Path]]

    def log_message(self, *anything: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        for kind, repositories in self.kinds.items():
            for name, folder in repositories.items():
                if path.startswith(f"/api/{kind}/{name}/tree/"):
                    return self._send(json.dumps(_entries(folder)).encode(), with_body)
                if path.startswith(f"/api/{kind}/{name}"):
                    files = [{"rfilename": file.name} for file in folder.iterdir()]
                    found = {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": files}
                    return self._send(json.dumps(found).encode(), with_body)
                prefix = f"/{name}/resolve/" if kind == "models" else f"/{kind}/{name}/resolve/"
                file = folder / path.removeprefix(prefix).partition("/")[2]
                if path.startswith(prefix) and file.is_file():
                    return self._send(file.read_bytes(), with_body)
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in path else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, with_body: bool) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if with_body:
            self.wfile.write(content)


def _entries(folder: Path) -> list[dict[str, Any]]:
    return [
        {
            "type": "file",
            "path": file.name,
            "size": file.stat().st_size,
            "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
        }
        for file in sorted(folder.iterdir())
    ]
