"""A Hugging Face hub on this machine: what huggingface_hub asks of one to upload files and to download them."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

COMMIT = "c" * 40


class Hub:
    """Repositories by name, each files by path. ``requests`` has what was asked: method and path.

    Args:
        refuse: HTTP status of every answer to an upload.
    """

    def __init__(self, refuse: int = 0) -> None:
        self.refuse = refuse
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.ranges: list[str] = []


@contextmanager
def hub_at_work(hub: Hub) -> Iterator[str]:
    """Its address, as HF_ENDPOINT has it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None: ...

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_POST(self) -> None:
        hub, path = self.hub, self.path.split("?")[0]
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub.requests.append(("POST", path))
        hub.tokens.add(self.headers.get("authorization", ""))
        if hub.refuse:
            return self._answer(hub.refuse, b'{"error": "not you"}')
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            hub.repositories.setdefault(name, {})
            return self._json({"url": f"{self._address()}/{name}", "name": name})
        if path == "/api/validate-yaml":
            header = json.loads(content)["content"].split("---")[1]
            faults = [] if isinstance(yaml.safe_load(header), dict) else [{"message": "no mapping"}]
            return self._json({"errors": faults, "warnings": []})
        name = "/".join(path.split("/")[3:5])
        if "/preupload/" in path:
            files = json.loads(content)["files"]
            regular = [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False} for one in files]
            return self._json({"files": regular})
        if "/commit/" in path:
            for line in content.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    hub.repositories[name][value["path"]] = base64.b64decode(value["content"])
            commit = {"commitUrl": f"{self._address()}/{name}/commit/{COMMIT}", "commitOid": COMMIT}
            return self._json({**commit, "hookOutput": "", "success": True})
        return self._answer(404, b"{}")

    def _serve(self, *, body: bool) -> None:
        parts = self.path.split("?")[0].strip("/").split("/")
        self.hub.requests.append((self.command, self.path))
        files = self.hub.repositories.get("/".join(parts[:2]), {})
        if parts[:2] == ["api", "models"]:
            return self._json({"id": "/".join(parts[2:4]), "sha": COMMIT, "siblings": []})
        found = files.get("/".join(parts[4:])) if parts[2:3] == ["resolve"] else None
        if found is None:
            return self._answer(404, b"", {"X-Error-Code": "EntryNotFound" if files else "RepoNotFound"})
        etag = hashlib.sha256(found).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if "Range" in self.headers:
            self.hub.ranges.append(self.headers["Range"])
        first = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]
        start = int(first or 0)
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(found) - 1}/{len(found)}"
        return self._answer(206 if start else 200, found[start:], headers, body=body)

    def _address(self) -> str:
        return f"http://{self.headers['Host']}"

    def _json(self, values: Any) -> None:
        self._answer(200, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _answer(
        self, status: int, content: bytes, headers: dict[str, str] | None = None, *, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(content)
