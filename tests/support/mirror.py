"""Files of Fashion-MNIST for tests, and a mirror that serves them on this machine."""

import gzip
import http.server
import shutil
import struct
import threading
import time
from functools import partial

from bn_lightning.data import files, sources


def write_files(folder, layout, raw):
    """Write the files of the sample in a layout, and return the folder that contains them."""
    target = folder / layout
    target.mkdir(parents=True, exist_ok=True)
    for file in files.SAMPLE:
        packed = sources.SAMPLE / f"{file.name}.gz"
        if raw:
            (target / file.name).write_bytes(gzip.decompress(packed.read_bytes()))
        else:
            shutil.copy(packed, target)
    return target


def header(*shape):
    """Return the header of an idx file."""
    return struct.pack(f">I{len(shape)}I", 0x0800 + len(shape), *shape)


def content(file):
    """Return the decompressed content of a file of the sample."""
    return gzip.decompress((sources.SAMPLE / f"{file.name}.gz").read_bytes())


def file_names(folder):
    """Return the names of all files in a folder and its subfolders."""
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


class Mirror(http.server.ThreadingHTTPServer):
    """A mirror on the loopback interface that serves the sample.

    Args:
        behaviour: `good`, or a fault: `truncated`, `wrong`, `404`, `silent`, `stalls`.
    """

    daemon_threads = True

    def __init__(self, behaviour="good"):
        self.behaviour = behaviour
        self.requests = []
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/folder"
        threading.Thread(
            target=partial(self.serve_forever, poll_interval=0.01), daemon=True
        ).start()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        behaviour = self.server.behaviour
        self.server.requests.append(self.path)
        if behaviour == "silent":
            time.sleep(3)
            return
        if behaviour == "404":
            self.send_error(404)
            return
        body = (sources.SAMPLE / self.path.removeprefix("/folder/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if behaviour == "truncated":
            body = body[: len(body) // 2]
        elif behaviour == "wrong":
            body = gzip.compress(b"\0" * 5_000).ljust(len(body), b"\0")
        try:
            self.wfile.write(body[:100])
            if behaviour == "stalls":
                time.sleep(3)
            self.wfile.write(body[100:])
        except OSError:
            pass  # the client timed out

    def log_message(self, *arguments):
        pass
