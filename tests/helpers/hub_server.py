"""A Hub on 127.0.0.1: the part of its protocol that the real huggingface_hub client speaks.

Repositories live in memory. Status codes and headers are those of the Hub, as the client reads them:
404 RepoNotFound for what a token may not see (401 without a token), 401 for a token that nobody has, 403
for somebody else's namespace, LFS objects checked by their SHA-256. Not here: Xet, datasets, spaces.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from hub_store import Answer, Blob, Files, Repository

TOKENS = {"hf_alice": "alice", "hf_bob": "bob"}
LIFETIME = 300.0
"""Seconds after which a server that nobody stopped stops itself."""
CONNECTIONS = threading.BoundedSemaphore(16)


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken_uploads: set[str] = set()
        """Objects whose upload loses its connection in the middle."""
        self.broken_downloads = 0
        """How many downloads of large files from now on end in the middle."""
        self.broken_commits = 0
        """How many commits from now on are refused when all of their files have arrived."""
        self.lock = threading.RLock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def files(self, name: str, branch: str = "main") -> dict[str, bytes]:
        repository = self.repositories[name]
        return {path: b.content for path, b in repository.commits[repository.branches[branch]].items()}

    def process_request(self, request: Any, client_address: Any) -> None:
        CONNECTIONS.acquire()
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            CONNECTIONS.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Of a client that hung up: nothing to print."""


@contextmanager
def hub() -> Iterator[HubServer]:
    server = HubServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    watchdog = threading.Timer(LIFETIME, server.shutdown)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield server
    finally:
        watchdog.cancel()
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 20  # seconds that a silent connection is kept

    def log_message(self, format: str, *arguments: object) -> None:
        """Kept in `requests`, not printed."""

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.server.requests.append(f"{self.command} {path}")
        try:
            for method, pattern, work in ROUTES:
                found = re.fullmatch(pattern, path)
                if found and method == self.command.replace("HEAD", "GET"):
                    work(self, **{name: unquote(value) for name, value in found.groupdict().items() if value})
                    return
            self.body()
            raise Answer(404, "", f"no such page: {path}")
        except Answer as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.send({"error": error.message, **error.body}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(
        self, body: object, status: int = 200, headers: dict[str, str] | None = None, size: int = 0
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size or len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
        if size > len(content) and self.command != "HEAD":  # promised more: hang up
            self.close_connection = True

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Answer(401, "", "Invalid credentials in Authorization header")
        return TOKENS.get(token)

    def owner(self, namespace: str) -> None:
        if self.user() is None:
            raise Answer(401, "", "Invalid username or password.")
        if self.user() != namespace:
            raise Answer(403, "", f"You don't have the rights to write under the namespace {namespace!r}")

    def repository(self, name: str) -> Repository:
        found, user = self.server.repositories.get(name), self.user()
        if found is None or (found.private and name.split("/")[0] != user):
            raise Answer(404 if user else 401, "RepoNotFound", "Repository not found")
        return found

    def tree(self, name: str, revision: str) -> tuple[str, Files]:
        repository = self.repository(name)
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise Answer(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]


# One function for each page.


def whoami(page: Handler) -> None:
    user = page.user()
    if user is None:
        raise Answer(401, "", "Invalid username or password.")
    page.send({"name": user, "type": "user", "auth": {"accessToken": {"role": "write"}}})


def validate(page: Handler) -> None:
    content = json.loads(page.body())["content"]
    if not content.startswith("---\n"):
        page.send({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    else:
        page.send({"errors": [], "warnings": []})


def create(page: Handler) -> None:
    asked = json.loads(page.body())
    namespace = asked["organization"] or page.user() or ""
    page.owner(namespace)
    name = f"{namespace}/{asked['name']}"
    url = {"url": f"{page.server.endpoint}/{name}"}
    with page.server.lock:
        if name in page.server.repositories:
            raise Answer(409, "", "You already created this model repo", **url)
        repository = Repository(private=asked.get("visibility") == "private")
        repository.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", lfs=False)})
        page.server.repositories[name] = repository
    page.send(url)


def branch(page: Handler, name: str, revision: str) -> None:
    page.body()
    page.owner(name.split("/")[0])
    repository = page.repository(name)
    if revision in repository.branches:
        raise Answer(409, "", "Reference already exists")
    repository.branches[revision] = repository.branches["main"]
    page.send({})


def info(page: Handler, name: str, revision: str = "main") -> None:
    sha, files = page.tree(name, revision)
    private = page.repository(name).private
    page.send({"id": name, "sha": sha, "private": private, "siblings": [{"rfilename": f} for f in files]})


def listing(page: Handler, name: str, revision: str, folder: str = "") -> None:
    start = f"{folder}/" if folder else ""
    files = {path: b for path, b in page.tree(name, revision)[1].items() if path.startswith(start)}
    if start and not files:
        raise Answer(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
    page.send([entry(path, blob) for path, blob in files.items()])


def entry(path: str, blob: Blob) -> dict[str, object]:
    pointer = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
    lfs = {"lfs": pointer} if blob.lfs else {}
    return {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git, **lfs}


def preupload(page: Handler, name: str, revision: str) -> None:
    asked = json.loads(page.body())
    page.owner(name.split("/")[0])
    there = page.tree(name, revision)[1]
    modes = {
        file["path"]: "lfs" if file["path"].endswith(".safetensors") else "regular" for file in asked["files"]
    }
    files = [
        {
            "path": path,
            "uploadMode": mode,
            "shouldIgnore": False,
            "oid": there[path].etag if path in there else None,
        }
        for path, mode in modes.items()
    ]
    page.send({"files": files})


def batch(page: Handler, name: str) -> None:
    asked = json.loads(page.body())
    page.owner(name.split("/")[0])
    objects = []
    for wanted in asked["objects"]:
        upload = {"upload": {"href": f"{page.server.endpoint}/objects/{wanted['oid']}", "header": {}}}
        there = wanted["oid"] in page.server.objects
        objects.append({**wanted, **({} if there else {"actions": upload})})
    page.send({"transfer": "basic", "objects": objects})


def receive(page: Handler, oid: str) -> None:
    if oid in page.server.broken_uploads:
        page.rfile.read(int(page.headers["Content-Length"]) // 2)
        page.close_connection = True
        return
    content = page.body()
    if hashlib.sha256(content).hexdigest() != oid:
        raise Answer(400, "", "the content is not that of this SHA-256")
    page.server.objects[oid] = content
    page.send({})


def commit(page: Handler, name: str, revision: str) -> None:
    lines = [json.loads(line) for line in page.body().splitlines()]
    page.owner(name.split("/")[0])
    if page.server.broken_commits:
        page.server.broken_commits -= 1
        raise Answer(413, "", "the commit is too large")
    files = dict(page.tree(name, revision)[1])
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in page.server.objects:
                raise Answer(400, "", f"LFS pointer pointed to a file that does not exist: {value['path']}")
            files[value["path"]] = Blob(page.server.objects[value["oid"]], lfs=True)
        elif key == "deletedFile":
            del files[value["path"]]
    sha = page.repository(name).commit(revision, files)
    page.send({"commitUrl": f"{page.server.endpoint}/{name}/commit/{sha}", "commitOid": sha})


def resolve(page: Handler, name: str, revision: str, path: str) -> None:
    sha, files = page.tree(name, revision)
    if path not in files:
        page.send({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        return
    content, headers = files[path].content, {"X-Repo-Commit": sha, "ETag": f'"{files[path].etag}"'}
    start = int((re.match(r"bytes=(\d+)-", page.headers.get("Range") or "") or [0, 0])[1])
    if start:
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    rest = content[start:]
    if page.command == "GET" and files[path].lfs and page.server.broken_downloads:
        page.server.broken_downloads -= 1
        page.send(rest[: len(rest) // 2], 200, headers, size=len(rest))
    else:
        page.send(rest, 206 if start else 200, headers)


NAME, REVISION = r"(?P<name>[^/]+/[^/]+)", r"(?P<revision>[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", whoami),
    ("POST", "/api/validate-yaml", validate),
    ("POST", "/api/repos/create", create),
    ("GET", f"/api/models/{NAME}", info),
    ("GET", f"/api/models/{NAME}/revision/{REVISION}", info),
    ("GET", rf"/api/models/{NAME}/tree/{REVISION}(?:/(?P<folder>.+))?", listing),
    ("POST", f"/api/models/{NAME}/branch/{REVISION}", branch),
    ("POST", f"/api/models/{NAME}/preupload/{REVISION}", preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", batch),
    ("PUT", "/objects/(?P<oid>[0-9a-f]{64})", receive),
    ("POST", f"/api/models/{NAME}/commit/{REVISION}", commit),
    ("GET", rf"/{NAME}/resolve/{REVISION}/(?P<path>.+)", resolve),
]
