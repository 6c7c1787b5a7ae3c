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


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlparse(self.path)
        path = unquote(url.path)
        name = r"([^/]+/[^/]+?|[^/]+?)"
        match = re.fullmatch(rf"/api/(models|datasets)/{name}"
                             r"(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?", path)
        if match and match[2] in hub.repositories[match[1]]:
            files = hub.repositories[match[1]][match[2]]
            return self.about(files, match, body, "recursive=true" in url.query.lower())
        match = re.fullmatch(rf"/(datasets/)?{name}/resolve/([^/]+)/(.+)", path)
        kind = "datasets" if match and match[1] else "models"
        if match and match[2] in hub.repositories[kind]:
            return self.file(hub.repositories[kind][match[2]], match[4])
        self.send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET

    def send(self, status, data, headers=(), part=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **dict(headers)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:part])

    def about(self, files, match, body, recursive):
        entries = [{"type": "file", "path": name, "size": len(data),
                    "oid": hashlib.sha1(data).hexdigest()} for name, data in files.items()]
        if match[3] == "tree":
            start = (match[5] + "/") if match[5] else ""
            inside = [entry for entry in entries if entry["path"].startswith(start)]
            if not inside:
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            found = {start + e["path"][len(start):].split("/")[0]: e for e in inside}
            found = inside if recursive else [
                e if path in files else {"type": "directory", "path": path, "size": 0, "oid": "0"}
                for path, e in found.items()]
        elif match[3] == "paths-info":
            wanted = (json.loads(body) if body[:1] == b"{" else parse_qs(body.decode()))["paths"]
            found = [entry for entry in entries if entry["path"] in wanted]
        else:
            siblings = [{"rfilename": entry["path"]} for entry in entries]
            found = {"id": match[2], "sha": COMMIT, "siblings": siblings}
        self.send(200, json.dumps(found).encode())

    def file(self, files, name):
        headers, status = {"X-Repo-Commit": COMMIT}, 200
        if name not in files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", **headers})
        data = files[name]
        headers |= {"Accept-Ranges": "bytes", "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(part[1]), min(int(part[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first:last + 1], 206
        if self.command == "GET" and len(data) > 1000 and self.server.breaks > 0:
            self.server.breaks -= 1  # half of the file, and then the line is cut
            self.send(status, data, headers, len(data) // 2)
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        else:
            self.send(status, data, headers)


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
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    where = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"} if address else {"HF_HUB_OFFLINE": "1"}
    how = ["-c", code] if code else [str(ROOT / "prepare_data.py")]
    return subprocess.run([sys.executable, *how, *argv], cwd=home, capture_output=True, text=True,
                          timeout=300, env=os.environ | where | {"HF_HOME": str(home / "hf"),
                                                                 "PYTHONPATH": path})


def is_one_line(done, message):
    assert done.returncode == 2 and done.stderr.startswith("error: "), done
    assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
