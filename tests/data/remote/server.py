"""A small HTTP server of a folder, which fails as it is told."""

import re
import threading
import time
from collections import Counter
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Server:
    """Serves ``folder`` on a port that the system chooses, as a context manager.

    Attributes:
        faults: by file name, what goes wrong with its requests, one after the other: ``drop`` (the connection breaks
            in the middle), ``short`` (half the file, as if it were all), ``corrupt`` (another content), ``stall``
            (nothing comes), or a status code. A trailing ``...`` repeats the one before for ever.
        heads: whether HEAD is answered.
        ranges: whether requests for a part of a file get just that.
        lengths: whether answers have a Content-Length, or else are chunked.
        pace: seconds to wait after every 1000 bytes.
        requests: (file name, Range header or None) of all requests so far.
    """

    def __init__(self, folder: Path, port: int = 0) -> None:
        self.folder = folder
        self.faults: dict[str, list[str | int]] = {}
        self.heads, self.ranges, self.lengths, self.pace = True, True, True, 0.0
        self.requests: list[tuple[str, str | None]] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.answer(self)

            def do_HEAD(self) -> None:
                server.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "Server":
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()

    def counts(self) -> Counter[str]:
        return Counter(name for name, _ in self.requests)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = unquote(urlsplit(handler.path).path).rpartition("/")[2]
        wanted = handler.headers.get("Range")
        with self._lock:
            self.requests.append((name, wanted))
            fault = self._next_fault(name)
        handler.close_connection = True
        if fault == "stall":
            self.closing.wait(30)
            return
        path = self.folder / name
        if handler.command == "HEAD" and not self.heads:
            fault = 405
        if isinstance(fault, int) or not path.is_file():
            handler.send_error(fault if isinstance(fault, int) else 404)
            return
        body = path.read_bytes()
        if fault == "short":
            body = body[: len(body) // 2]
        if fault == "corrupt":
            body = body[:100] + bytes(byte ^ 1 for byte in body[100:200]) + body[200:]
        with suppress(ConnectionError):  # the client has gone
            self._send(handler, body, wanted if self.ranges else None, broken=fault == "drop")

    def _next_fault(self, name: str) -> str | int | None:
        faults = self.faults.get(name, [])
        if len(faults) > 1 and faults[1] == "...":
            return faults[0]
        return faults.pop(0) if faults else None

    def _send(self, handler: BaseHTTPRequestHandler, body: bytes, wanted: str | None, broken: bool) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        start = int(match[1]) if match else 0
        if match and start >= len(body):
            handler.send_error(416)
            return
        part = body[start : int(match[2]) + 1 if match and match[2] else None]
        handler.send_response(206 if match else 200)
        if match:
            handler.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(body)}")
        handler.send_header(*(("Content-Length", str(len(part))) if self.lengths else ("Transfer-Encoding", "chunked")))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        for i in range(0, len(part), 1000):
            if broken and i >= len(part) // 2:
                return
            piece = part[i : i + 1000]
            handler.wfile.write(piece if self.lengths else b"%x\r\n%s\r\n" % (len(piece), piece))
            time.sleep(self.pace)
        if not self.lengths:
            handler.wfile.write(b"0\r\n\r\n")
