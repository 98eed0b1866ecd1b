"""A repository on this machine, with what an upload and a download need of the hub's HTTP interface."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Repositories in memory, with what was asked of them."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.created: list[dict] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    def answer(self, content: object, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        self.server.tokens.add(self.headers.get("Authorization"))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.url}/org/name", "id": "org/name"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.answer({"files": modes})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    assert value["encoding"] == "base64"
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            self.answer({"success": True, "commitUrl": f"{self.server.url}/commit", "commitOid": COMMIT})
        else:
            assert self.path == "/api/validate-yaml", self.path
            self.answer({"errors": [], "warnings": []})

    def do_GET(self):
        if self.path.startswith("/api/models/"):
            names = [{"rfilename": name} for name in self.server.files]
            self.answer({"id": "org/name", "sha": COMMIT, "siblings": names})
            return
        name = unquote(self.path.split("/resolve/")[1].split("/", 1)[1])
        content = self.server.files[name]
        etag = hashlib.sha256(content).hexdigest()
        self.answer(content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def do_HEAD(self):
        self.do_GET()


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A hub while it lasts."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
