"""A local server that plays an OpenAI-compatible chat endpoint with a judging model behind it."""

import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

SECRET = "sk-secret-0123456789"

Reply = str | tuple[int, dict, str] | None
"""What the server answers: the judge's words; status, headers and body; or None, and the
connection is reset."""


class JudgeServer(ThreadingHTTPServer):
    """Answers the nth request about an answer with what `reply(answer, n)` returns."""

    daemon_threads, block_on_close, request_queue_size = True, False, 64

    def __init__(self, reply: Callable[[str, int], Reply]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.reply = reply
        self.lock = threading.Lock()
        self.count: dict[str, int] = {}  # requests about each answer
        self.bodies: list[dict] = []
        self.keys: set[str] = set()
        self.in_flight = self.most_in_flight = 0

    def handle_error(self, request, client_address):
        pass  # a client that has closed the connection

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        prompt = body["messages"][1]["content"]
        found = re.search(r"==== answer (\w+) ====\n(.*)\n==== end \1", prompt, re.DOTALL)
        assert found and handler.path == "/v1/chat/completions"
        answer = found[2]
        with self.lock:
            n = self.count[answer] = self.count.get(answer, 0) + 1
            self.bodies.append(body)
            self.keys.add(handler.headers["Authorization"])
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
        reply = self.reply(answer, n)
        with self.lock:
            self.in_flight -= 1
        self.send(handler, reply)

    def send(self, handler: BaseHTTPRequestHandler, reply: Reply) -> None:
        if reply is None:  # closing with a zero linger time sends RST
            linger = struct.pack("ii", 1, 0)
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            handler.connection.close()
            return
        if isinstance(reply, str):
            message = {"role": "assistant", "content": reply}
            reply = 200, {}, json.dumps({"choices": [{"message": message}]})
        status, changed_headers, text = reply
        headers = {"Content-Type": "application/json", "Content-Length": len(text.encode())}
        handler.send_response(status)
        for name, value in (headers | changed_headers).items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(text.encode())


class _Handler(BaseHTTPRequestHandler):
    server: JudgeServer

    def do_POST(self) -> None:
        self.server.serve(self)

    def log_message(self, *args) -> None:
        pass


@contextmanager
def running_judge(
    reply: Callable[[str, int], Reply], monkeypatch: pytest.MonkeyPatch
) -> Iterator[JudgeServer]:
    """Run a server in a thread; the environment has the key SECRET and no proxy for it."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server = JudgeServer(reply)
    options = {"poll_interval": 0.01}
    threading.Thread(target=server.serve_forever, kwargs=options, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
