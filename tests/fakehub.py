"""A server on the loopback interface that answers like the Hugging Face hub, for one process's tests.

Only what downloading a snapshot asks for: a repository's commit, its list of files, and the files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def serve(repos: Mapping[str, Mapping[str, bytes]], gated: frozenset[str] = frozenset()) -> Iterator[str]:
    """The endpoint's address while the block runs; `repos` maps "owner/name" to its files."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            parts = unquote(self.path).partition("?")[0].strip("/").split("/")
            repo = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
            if repo not in repos:
                self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
            elif parts[0] == "api" and parts[4] == "revision":
                self.answer_json({"id": repo, "sha": COMMIT, "siblings": [{"rfilename": f} for f in repos[repo]]})
            elif parts[0] == "api" and parts[4] == "tree":
                self.answer_json(
                    [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(data),
                            "oid": _sha1(data),
                        }
                        for name, data in repos[repo].items()
                    ]
                )
            elif repo in gated:
                self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            elif (name := "/".join(parts[4:])) in repos[repo]:
                data = repos[repo][name]
                self.answer(200, data, {"ETag": f'"{_sha1(data)}"', "X-Repo-Commit": COMMIT})
            else:
                self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})

        def answer_json(self, value: object) -> None:
            self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
