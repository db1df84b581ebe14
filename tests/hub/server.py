"""A small Hub on this machine, which huggingface_hub talks to over HTTP as it does to the real one.

No server that speaks the Hub's API for uploads can be installed from PyPI: `hf-local-hub` is the client of a server
that does not come with it, `olah` mirrors the real Hub and takes no uploads; huggingface_hub's own tests use the
staging Hub on the internet. So this is one, of the parts that are needed: users with tokens, private repositories,
branches, regular files and large ones (LFS), commits that are made wholly or not at all. Xet is not offered.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from .api import Answer, Request, respond, user_of
from .storage import Refusal, Storage


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.storage = Storage()
        self.requests: list[str] = []
        """Method and path of all requests."""
        self.drop: Callable[[str], bool] | None = None
        """If set, connections are cut in the middle of the requests, as given in `requests`, for which it is true."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def handle_request(self) -> None:
        url = urlsplit(self.path)
        what = f"{self.command} {url.path}"
        self.server.requests.append(what)
        if self.server.drop is not None and self.server.drop(what):
            self.rfile.read(self._length() // 2)
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self._body()
        try:
            user = user_of(self.headers.get("Authorization"))
            request = Request(self.command, url.path, dict(parse_qsl(url.query)), user, body, self.server.url)
            with self.server.storage.lock:
                answer = respond(self.server.storage, request)
        except Refusal as refusal:
            answer = Answer(b'{"error": "refused"}', refusal.headers, refusal.status)
        self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _length(self) -> int:
        return int(self.headers.get("Content-Length") or 0)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(self._length())
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _send(self, answer: Answer) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content)

    def log_message(self, *arguments: Any) -> None:
        pass
