"""Archives, and a server on the loopback address that sends them, or breaks off."""

import hashlib
import io
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from harness.api.task import Archive

NAME = "Task04_Hippocampus"


def packed(members, kind="w") -> bytes:
    """A tar of (name, content) or ready TarInfo members."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=kind) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            name, content = member
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


GOOD = packed(
    [(f"{NAME}/dataset.json", b"{}"), (f"{NAME}/imagesTr/a.nii.gz", b"x" * 300_000), (f"./{NAME}/._a", b"shadow")]
)


class Server:
    """Serves `content`; `breaks` lists after how many bytes the next answers stop, `ranges` what was asked for."""

    def __init__(self, content, breaks=(), status=200, resumes=True):
        self.content, self.breaks, self.status, self.resumes = content, list(breaks), status, resumes
        self.ranges: list[str | None] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                outer.ranges.append(asked)
                if outer.status != 200:
                    self.send_error(outer.status)
                    return
                start = int(asked.split("=")[1].rstrip("-")) if asked and outer.resumes else 0
                if start >= len(outer.content):
                    self.send_error(416)
                    return
                body = outer.content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: outer.breaks.pop(0)] if outer.breaks else body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def archive(self):
        url = f"http://127.0.0.1:{self.server.server_port}/{NAME}.tar"
        return Archive(url, hashlib.md5(self.content, usedforsecurity=False).hexdigest(), NAME)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
