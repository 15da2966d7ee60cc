"""A server with the part of the Hugging Face Hub's API that huggingface_hub calls for models."""

import base64
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TOKEN = "hf_double"


class Hub:
    """The repositories of the server.

    Attributes:
        url: The address of the server.
        commits: The commits of each repository, the last one last: hash and files.
        private: The private repositories.
        requests: The method and the path of each request.
    """

    def __init__(self) -> None:
        self.url = ""
        self.commits: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []

    def commit(self, repository: str, files: dict[str, bytes]) -> str:
        """Add a commit, and return its hash."""
        earlier = self.commits.setdefault(repository, [])
        content = repr((len(earlier), sorted((name, hashlib.sha1(data).hexdigest()) for name, data in files.items())))
        earlier.append((hashlib.sha1(content.encode()).hexdigest(), dict(files)))
        return earlier[-1][0]

    def files(self, repository: str, revision: str = "main") -> tuple[str, dict[str, bytes]] | None:
        """Return a commit and its files; None if there is no such revision."""
        commits = self.commits[repository]
        return commits[-1] if revision == "main" else next((one for one in commits if one[0] == revision), None)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._dispatch("GET")

    def do_HEAD(self) -> None:
        self._dispatch("HEAD")

    def do_POST(self) -> None:
        self._dispatch("POST")

    def do_PUT(self) -> None:
        self._dispatch("PUT")

    def _dispatch(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self._body = self.rfile.read(length) if length else self._read_chunks()
        path = urllib.parse.unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{method} {path}")
        for verb, pattern, answer in _ROUTES:
            if verb == method.replace("HEAD", "GET") and (found := re.fullmatch(pattern, path)):
                answer(self, **found.groupdict())
                return
        self._send(404, b"{}")

    def _read_chunks(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_json(self, fields: Any) -> None:
        self._send(200, json.dumps(fields).encode(), Content_Type="application/json")

    def _may(self, repository: str, *, write: bool = False) -> bool:
        """Return whether the request may read or write a repository; else answer like the hub."""
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if write and not has_token:
            self._send(401, b'{"error": "Invalid username or password."}')
            return False
        if repository not in self.hub.commits or (repository in self.hub.private and not has_token):
            self._send(401, b'{"error": "Repository not found"}', X_Error_Code="RepoNotFound")
            return False
        return True

    def _find(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if not self._may(repository):
            return None
        found = self.hub.files(repository, revision)
        if found is None:
            self._send(404, b"{}", X_Error_Code="RevisionNotFound")
        return found

    def info(self, repository: str, revision: str = "main") -> None:
        if found := self._find(repository, revision):
            siblings = [{"rfilename": name} for name in found[1]]
            private = repository in self.hub.private
            self._send_json({"id": repository, "sha": found[0], "private": private, "siblings": siblings})

    def tree(self, repository: str, revision: str) -> None:
        if found := self._find(repository, revision):
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in found[1].items()
            ]
            self._send_json(files)

    def resolve(self, repository: str, revision: str, file: str) -> None:
        if not (found := self._find(repository, revision)):
            return
        if file not in found[1]:
            self._send(404, b"{}", X_Error_Code="EntryNotFound")
            return
        etag = f'"{hashlib.sha256(found[1][file]).hexdigest()}"'
        self._send(200, found[1][file], ETag=etag, X_Repo_Commit=found[0])

    def create(self) -> None:
        fields = json.loads(self._body)
        name = "/".join(filter(None, (fields.get("organization"), fields["name"])))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, b'{"error": "Invalid username or password."}')
        elif name in self.hub.commits:
            fields = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            self._send(409, json.dumps(fields).encode())
        else:
            self.hub.commit(name, {".gitattributes": b""})
            if fields.get("private") or fields.get("visibility") == "private":
                self.hub.private.add(name)
            self._send_json({"url": f"{self.hub.url}/{name}"})

    def validate(self) -> None:
        self._send_json({"errors": [], "warnings": []})

    def preupload(self, repository: str, revision: str) -> None:
        if self._may(repository, write=True):
            files = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if file["size"] > 10000 else "regular",
                }
                for file in json.loads(self._body)["files"]
            ]
            self._send_json({"files": files})

    def batch(self, repository: str) -> None:
        if self._may(repository, write=True):
            asked = json.loads(self._body)["objects"]
            objects = [
                one | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{one['oid']}"}}}
                if one["oid"] not in self.hub.objects
                else one
                for one in asked
            ]
            self._send(200, json.dumps({"transfer": "basic", "objects": objects}).encode())

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self._body).hexdigest() == oid
        self.hub.objects[oid] = self._body
        self._send(200, b"")

    def add(self, repository: str, revision: str) -> None:
        if not self._may(repository, write=True):
            return
        files = dict(self.hub.files(repository)[1])
        for key, value in ((line["key"], line["value"]) for line in map(json.loads, self._body.splitlines())):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                assert key == "header"
        commit = self.hub.commit(repository, files)
        self._send_json({"commitUrl": f"{self.hub.url}/{repository}/commit/{commit}", "commitOid": commit})


_REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
_ROUTES = (
    ("GET", rf"/api/models/{_REPOSITORY}", _Handler.info),
    ("GET", rf"/api/models/{_REPOSITORY}/revision/(?P<revision>[^/]+)", _Handler.info),
    ("GET", rf"/api/models/{_REPOSITORY}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET", rf"/{_REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", _Handler.resolve),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{_REPOSITORY}/preupload/(?P<revision>[^/]+)", _Handler.preupload),
    ("POST", rf"/{_REPOSITORY}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/objects/(?P<oid>\w+)", _Handler.put),
    ("POST", rf"/api/models/{_REPOSITORY}/commit/(?P<revision>[^/]+)", _Handler.add),
)


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Run a hub without repositories on a free port of this machine."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
