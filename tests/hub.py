"""A hub on the loopback address: what `datasets` and `huggingface_hub` ask of Hugging Face's."""
import contextlib
import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
from urllib.parse import parse_qs, unquote, urlparse

from conftest import ROOT

COMMIT = "c" * 40
NAME = r"([^/]+/[^/]+?|[^/]+?)"
ABOUT = re.compile(rf"/api/(models|datasets)/{NAME}"
                   r"(?:/(?:revision/[^/]+|(tree|paths-info)/[^/]+(?:/(.*))?))?")
FILE = re.compile(rf"/(datasets/)?{NAME}/resolve/[^/]+/(.+)")


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path)
        repositories = self.server.repositories
        if match := ABOUT.fullmatch(path):
            kind, name, what, inside = match.groups()
            if name in repositories[kind]:
                return self.about(name, repositories[kind][name], what, inside, body)
        elif match := FILE.fullmatch(path):
            kind = "datasets" if match[1] else "models"
            if match[2] in repositories[kind]:
                return self.file(repositories[kind][match[2]], match[3])
        self.send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET

    def send(self, status, data, headers=(), part=None):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:part])

    def about(self, name, files, what, inside, body):
        if what == "tree":
            found = tree(files, inside, "recursive=true" in self.path.lower())
        elif what == "paths-info":
            asked = json.loads(body) if body.startswith(b"{") else parse_qs(body.decode())
            found = [entry(path, files[path]) for path in asked["paths"] if path in files]
        else:
            siblings = [{"rfilename": path} for path in files]
            found = {"id": name, "sha": COMMIT, "siblings": siblings}
        if found:
            self.send(200, json.dumps(found).encode())
        else:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})

    def file(self, files, name):
        headers, status = {"X-Repo-Commit": COMMIT}, 200
        if name not in files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", **headers})
        data = files[name]
        headers |= {"Accept-Ranges": "bytes", "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            size, first = len(data), int(part[1])
            data, status = data[first:int(part[2] or size) + 1], 206
            headers["Content-Range"] = f"bytes {first}-{first + len(data) - 1}/{size}"
        if self.command == "GET" and len(data) > 1000 and self.server.breaks > 0:
            self.server.breaks -= 1  # half of the file, and then the line is cut
            self.send(status, data, headers, len(data) // 2)
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.send(status, data, headers)


def entry(path, data):
    oid = hashlib.sha1(data).hexdigest()
    return {"type": "file", "path": path, "size": len(data), "oid": oid}


def tree(files, folder, recursive):
    """What is in a folder of a repository: files, and unless `recursive` the folders there."""
    start = f"{folder}/" if folder else ""
    found = {}
    for path, data in files.items():
        name, *deeper = path.removeprefix(start).split("/")
        if not path.startswith(start):
            continue
        if deeper and not recursive:
            found[name] = {"type": "directory", "path": start + name, "size": 0, "oid": "0"}
        else:
            found[path] = entry(path, data)
    return [*found.values()]


@contextlib.contextmanager
def serve(datasets=None, models=None, breaks=0):
    """Serves {repository: {file: bytes}}; the first `breaks` downloads are cut off in the middle.
    Yields (its address, the server)."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.repositories = {"datasets": datasets or {}, "models": models or {}}
    server.breaks = breaks
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server
    finally:
        server.shutdown()
        server.server_close()


def run(address, home, *argv, code=None):
    """prepare_data.py, or other code, with the hub at this address, if any. A process of its own:
    the libraries read their environment when they are imported."""
    environment = os.environ | {
        "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    if address:
        environment |= {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}
    how = ["-c", code] if code else [str(ROOT / "prepare_data.py")]
    return subprocess.run([sys.executable, *how, *argv], cwd=home, env=environment, timeout=300,
                          capture_output=True, text=True)


def is_one_line(done, message):
    assert done.returncode == 2, done
    assert done.stderr.startswith("error: "), done
    assert done.stderr.count("\n") == 1, done
    assert message in done.stderr
