"""A web server for a folder: listings, parts of files, and failures on request."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(SimpleHTTPRequestHandler):
    """``failing``: paths that answer ``code``, and how many times more; -1 is always. ``parts``: they are served."""

    failing: dict[str, int] = {}
    code = 503
    parts = True
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self._fails():
            return
        path = Path(self.translate_path(self.path))
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part is None or not path.is_file() or not self.parts:
            super().do_GET()
            return
        data, first = path.read_bytes(), int(part[1])
        body = data[first : int(part[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self) -> None:
        if not self._fails():
            super().do_HEAD()

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def _fails(self) -> bool:
        left = self.failing.get(self.path, 0)
        if left:
            self.failing[self.path] = left - 1
            self.send_error(self.code)
        return left != 0


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address under which ``folder`` is served."""
    Handler.failing, Handler.code = {}, 503
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
