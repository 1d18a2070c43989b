"""Files of Fashion-MNIST for tests, and a mirror of them on this machine."""

import gzip
import http.server
import shutil
import struct
import threading
import time
from functools import partial

from bn_lightning.data import files, sources


def lay_out(folder, layout, raw):
    target = folder / layout
    target.mkdir(parents=True, exist_ok=True)
    for file in files.SAMPLED:
        packed = sources.SAMPLE / f"{file.name}.gz"
        if raw:
            (target / file.name).write_bytes(gzip.decompress(packed.read_bytes()))
        else:
            shutil.copy(packed, target)
    return target


def header(*shape):
    return struct.pack(f">I{len(shape)}I", 0x0800 + len(shape), *shape)


def content(file):
    return gzip.decompress((sources.SAMPLE / f"{file.name}.gz").read_bytes())


def left(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


class Mirror(http.server.ThreadingHTTPServer):
    """A mirror on loopback that serves the sample, or misbehaves."""

    daemon_threads = True

    def __init__(self, how="good"):
        self.how = how
        self.asked = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/folder"
        threading.Thread(
            target=partial(self.serve_forever, poll_interval=0.01), daemon=True
        ).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        how = self.server.how
        self.server.asked.append(self.path)
        if how == "silent":
            time.sleep(3)
            return
        if how == "404":
            self.send_error(404)
            return
        body = (sources.SAMPLE / self.path.removeprefix("/folder/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if how == "truncated":
            body = body[: len(body) // 2]
        elif how == "wrong":
            body = gzip.compress(b"\0" * 5_000).ljust(len(body), b"\0")
        try:
            self.wfile.write(body[:100])
            if how == "stalls":
                time.sleep(3)
            self.wfile.write(body[100:])
        except OSError:
            pass  # the client had enough of waiting

    def log_message(self, *arguments):
        pass
