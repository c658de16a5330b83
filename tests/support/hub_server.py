"""A server on this machine that speaks as much of the Hugging Face Hub's protocol as an artifact needs.

Models in repositories with one branch, `main`: making them, commits with regular and LFS files, and reading. It keeps
everything in memory. What it does not know it answers by 404.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, ClassVar, Self
from urllib.parse import unquote, urlsplit

WRITER, READER = "hf_writerwriterwriter", "hf_readerreaderreader"  # the tokens of two users: the second writes nothing
OWNER = "someone"  # the organisation that both are of


class Refusal(Exception):
    """An answer that is no success, with the code that the Hub gives its reason."""

    def __init__(self, status: int, code: str = "", message: str = "", body: dict[str, str] | None = None):
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}
        self.body = json.dumps(body or {"error": message}).encode()


@dataclass
class Repository:
    """Attributes:
    private: whether it needs a token to be read.
    commits: the commits of `main`, oldest first: name -> files.
    """

    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {hashlib.sha1(b"").hexdigest(): {}})

    def at(self, revision: str) -> tuple[str, dict[str, bytes]]:
        newest = list(self.commits)[-1]
        commit = newest if revision == "main" else revision
        if commit not in self.commits:
            raise Refusal(404, "RevisionNotFound")
        return commit, self.commits[commit]


def is_large(path: str) -> bool:
    return path.endswith(".safetensors")


class HubServer:
    """Serves until it is left.

    Attributes:
        url: what `HF_ENDPOINT` must be.
        repositories: ORG/NAME -> what it holds.
        requests: "GET /path" of every request so far, without its query.
        refuses_commits: whether a commit is answered by 500.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.refuses_commits = False
        self.blobs: dict[str, bytes] = {}
        self._start(port=0)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _start(self, port: int) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", port), type("Bound", (Handler,), {"hub": self}))
        Thread(target=self._server.serve_forever).start()

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop()

    @contextmanager
    def out_of_reach(self) -> Generator[None]:
        """Nobody is at the port until the block ends."""
        self._stop()
        yield
        self._start(self._server.server_port)

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        """Makes these files the content of a repository; returns the commit."""
        commits = self.repositories[name].commits
        content = "".join(f"{path} {hashlib.sha256(data).hexdigest()}" for path, data in sorted(files.items()))
        commit = hashlib.sha1(f"{len(commits)} {content}".encode()).hexdigest()
        commits[commit] = files
        return commit


class Handler(BaseHTTPRequestHandler):
    hub: ClassVar[HubServer]

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            for method, pattern, reply in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and self.command in method.split("|"):
                    return reply(self, *found.groups())
            raise Refusal(404)
        except Refusal as refusal:
            self.send(refusal.body, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, content: Any) -> None:
        self.send(json.dumps(content).encode(), headers={"Content-Type": "application/json"})

    def json(self) -> Any:
        return json.loads(self.body)

    def token(self, needed: bool = False) -> str | None:
        """Returns the token of the request, which must be a known one."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (WRITER, READER, None) or (needed and token is None):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return token

    def repository(self, name: str) -> Repository:
        """Returns what may be read: the Hub says of nothing else whether it is there."""
        token = self.token()
        found = self.hub.repositories.get(name)
        if found is None or (found.private and token is None):
            raise Refusal(404 if token else 401, "RepoNotFound")
        return found

    def writable(self, name: str) -> Repository:
        found = self.repository(name)
        if self.token(needed=True) != WRITER:
            raise Refusal(403, message="You have read access but not the required permissions for this operation")
        return found

    def create(self) -> None:
        token, asked = self.token(needed=True), self.json()
        name = f"{asked['organization']}/{asked['name']}"
        if token != WRITER or asked["organization"] != OWNER:
            raise Refusal(403, message="You don't have the rights to create a model under this namespace")
        if name in self.hub.repositories:
            raise Refusal(409, body={"url": f"{self.hub.url}/{name}"})
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(private)
        self.send_json({"url": f"{self.hub.url}/{name}"})

    def check_write(self, name: str) -> None:
        self.writable(name)
        self.send_json({})

    def info(self, name: str, revision: str | None) -> None:
        repository = self.repository(name)
        commit, _files = repository.at(revision or "main")
        self.send_json({"id": name, "sha": commit, "private": repository.private, "tags": [], "siblings": []})

    def tree(self, name: str, revision: str) -> None:
        _commit, files = self.repository(name).at(revision)
        self.send_json([entry(path, content) for path, content in files.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit, files = self.repository(name).at(revision)
        if path not in files:
            raise Refusal(404, "EntryNotFound")
        etag = hashlib.sha256(files[path]).hexdigest()
        self.send(files[path], headers={"X-Repo-Commit": commit, "ETag": f'"{etag}"'})

    def validate_yaml(self) -> None:
        self.send_json({"errors": [], "warnings": []})

    def preupload(self, name: str, _revision: str) -> None:
        self.writable(name)
        modes = {True: "lfs", False: "regular"}
        files = [{"path": each["path"], "uploadMode": modes[is_large(each["path"])]} for each in self.json()["files"]]
        self.send_json({"files": [each | {"shouldIgnore": False} for each in files]})

    def lfs_batch(self, name: str) -> None:
        self.writable(name)
        self.send_json(
            {
                "transfer": "basic",
                "objects": [
                    each | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                    for each in self.json()["objects"]
                ],
            }
        )

    def lfs_upload(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400)
        self.hub.blobs[oid] = self.body
        self.send(b"")

    def commit(self, name: str, revision: str) -> None:
        _commit, files = self.writable(name).at(revision)
        if self.hub.refuses_commits:
            raise Refusal(500)
        files = dict(files)
        for line in self.body.splitlines():
            each = json.loads(line)
            value = each["value"]
            if each["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif each["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif each["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.commit(name, files)
        self.send_json({"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def log_message(self, *_arguments: object) -> None:
        pass


def entry(path: str, content: bytes) -> dict[str, Any]:
    """Returns a file as a listing has it."""
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    if is_large(path):
        found["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 100}
    return found


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/models/{NAME}/auth-check/write", Handler.check_write),
    ("GET", rf"/api/models/{NAME}(?:/revision/(.+))?", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/(.+)", Handler.tree),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Handler.lfs_upload),
    ("GET|HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
