"""A small model Hub on 127.0.0.1, for tests of uploading and downloading.

It speaks the part of the Hub's HTTP protocol that `huggingface_hub` uses for model repositories: creating a
repository or a branch, the three steps of an upload (ask how to send each file, send the large ones by
git-LFS, commit), pull requests, repository information, file listing and file download. Everything is kept in
memory.

    with HubServer() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(cache_folder)})
        assert hub.files("tester/my-model")["README.md"].startswith(b"---")
        assert hub.unknown_requests == []
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".model")
SOCKET_TIMEOUT_SECONDS = 30


class HubError(Exception):
    """An answer other than success: `status` is HTTP's, `code` what the Hub puts into `X-Error-Code`."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass(frozen=True)
class Blob:
    """The content of one file of one commit."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        """What git calls the blob; of a large file git stores only a pointer."""
        stored = self.content
        if self.lfs:
            version = "https://git-lfs.github.com/spec/v1"
            stored = f"version {version}\noid sha256:{self.sha256}\nsize {len(stored)}\n".encode()
        return hashlib.sha1(b"blob %d\x00" % len(stored) + stored).hexdigest()

    @property
    def upload_oid(self) -> str:
        """What the client compares its own file with, to leave out what has not changed."""
        return self.sha256 if self.lfs else self.git_oid


@dataclass
class Commit:
    oid: str
    summary: str
    files: dict[str, Blob]


@dataclass
class Repository:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def add_commit(self, ref: str, summary: str, files: dict[str, Blob]) -> Commit:
        listing = "\n".join(f"{path} {blob.git_oid}" for path, blob in sorted(files.items()))
        seed = f"{len(self.commits)}\n{self.refs.get(ref)}\n{summary}\n{listing}"
        commit = Commit(hashlib.sha1(seed.encode()).hexdigest(), summary, files)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def at(self, revision: str) -> Commit:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]


class HubServer:
    """The Hub and its HTTP server; a context manager.

    `user` may write with `token`; anybody may read what is not private.

    Attributes:
        repositories: name ("user/model") -> `Repository`.
        requests: method and path of every request, in order.
        unknown_requests: those that no route answers; empty when all that was asked for is spoken here.
    """

    def __init__(self, user: str = "tester", token: str = "hf_loopback") -> None:
        self.user, self.token = user, token
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown_requests: list[str] = []
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._http.daemon_threads = True
        self._http.block_on_close = False
        self._http.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}"

    def environment(self, cache: object) -> dict[str, str]:
        """Variables for a process that uses this Hub and no other, with its cache in the folder `cache`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": self.token,
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": f"{cache}/hub",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",  # Xet storage has a protocol of its own; without it LFS is used
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of all files of a revision."""
        commit = self.repositories[repo_id].at(revision)
        return {path: blob.content for path, blob in commit.files.items()}

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(SOCKET_TIMEOUT_SECONDS)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = SOCKET_TIMEOUT_SECONDS

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass

    @property
    def hub(self) -> HubServer:
        return self.server.hub  # type: ignore[attr-defined]

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        # The body is read first, in every case: an unread one would be taken for the next request.
        self.body = self._read_body()
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {url.path}")
            try:
                for methods, pattern, action in _ROUTES:
                    match = pattern.fullmatch(url.path)
                    if match and self.command in methods:
                        parts = {name: unquote(value) for name, value in match.groupdict("").items()}
                        action(self, **parts)
                        return
                self.hub.unknown_requests.append(f"{self.command} {self.path}")
                raise HubError(404, None, f"No route for {self.command} {self.path}")
            except HubError as error:
                headers = {"X-Error-Message": error.message}
                if error.code:
                    headers["X-Error-Code"] = error.code
                self.send_json({"error": error.message}, error.status, headers)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers
            pass
        return b"".join(chunks)

    def send_bytes(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def send_json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        headers = {"Content-Type": "application/json", **(headers or {})}
        self.send_bytes(json.dumps(value).encode(), status, headers)

    def json_body(self) -> dict:
        return json.loads(self.body or b"{}")

    def has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def require_token(self) -> None:
        if not self.has_token():
            raise HubError(401, None, "Invalid username or password.")

    def repository(self, repo: str) -> Repository:
        repository = self.hub.repositories.get(repo)
        if repository is None or (repository.private and not self.has_token()):
            raise HubError(404 if self.has_token() else 401, "RepoNotFound", "Repository not found")
        return repository


def _whoami(request: _Handler) -> None:
    request.require_token()
    auth = {"type": "access_token"}
    request.send_json({"type": "user", "name": request.hub.user, "orgs": [], "auth": auth})


def _validate_yaml(request: _Handler) -> None:
    warnings = []
    if not request.json_body()["content"].startswith("---\n"):
        warnings.append({"message": "empty or missing yaml metadata in repo card"})
    request.send_json({"errors": [], "warnings": warnings})


def _create_repository(request: _Handler) -> None:
    request.require_token()
    body = request.json_body()
    repo = f"{body.get('organization') or request.hub.user}/{body['name']}"
    url = {"url": f"{request.hub.endpoint}/{repo}", "id": repo, "name": repo}
    if repo in request.hub.repositories:
        request.send_json({"error": "You already created this model repo", **url}, status=409)
        return
    private = bool(body.get("private") or body.get("visibility") == "private")
    repository = Repository(private=private)
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
    repository.add_commit("main", "initial commit", {".gitattributes": Blob(attributes.encode(), lfs=False)})
    request.hub.repositories[repo] = repository
    request.send_json(url)


def _create_branch(request: _Handler, repo: str, branch: str) -> None:
    request.require_token()
    repository = request.repository(repo)
    if branch in repository.refs:
        raise HubError(409, None, "Reference already exists")
    repository.refs[branch] = repository.at(request.json_body().get("startingPoint") or "main").oid
    request.send_json({})


def _preupload(request: _Handler, repo: str, revision: str) -> None:
    """Says of each file whether it is to be sent inside the commit ("regular") or by LFS."""
    request.require_token()
    present = request.repository(repo).at(revision).files
    answer = []
    for file in request.json_body()["files"]:
        path = file["path"]
        mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
        oid = present[path].upload_oid if path in present else None
        answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    request.send_json({"files": answer})


def _lfs_batch(request: _Handler, repo: str) -> None:
    """git-LFS batch API: where to send each object, nothing for one that is already here."""
    request.require_token()
    request.repository(repo)
    answer = []
    for item in request.json_body()["objects"]:
        entry = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] not in request.hub.large_files:
            base = f"{request.hub.endpoint}/lfs-storage/{item['oid']}"
            entry["actions"] = {"upload": {"href": base}, "verify": {"href": f"{base}/verify"}}
        answer.append(entry)
    request.send_json({"transfer": "basic", "objects": answer})


def _lfs_upload(request: _Handler, oid: str) -> None:
    got = hashlib.sha256(request.body).hexdigest()
    if got != oid:
        raise HubError(400, None, f"Content has sha256 {got}, expected {oid}")
    request.hub.large_files[oid] = request.body
    request.send_bytes(b"", headers={"ETag": f'"{oid}"'})


def _lfs_verify(request: _Handler, oid: str) -> None:
    content = request.hub.large_files.get(oid)
    if content is None or len(content) != request.json_body()["size"]:
        raise HubError(404, None, f"Object {oid} was not uploaded in full")
    request.send_json({})


def _commit(request: _Handler, repo: str, revision: str) -> None:
    """Applies the lines of the JSON-lines body; with `create_pr=1` on a pull request's own ref."""
    request.require_token()
    repository = request.repository(repo)
    summary, files = "", dict(repository.at(revision).files)
    for line in request.body.splitlines():
        item = json.loads(line)
        key, value = item["key"], item["value"]
        if key == "header":
            summary = value["summary"]
        elif key == "file":
            files[value["path"]] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            if value["oid"] not in request.hub.large_files:
                raise HubError(400, None, f"LFS object {value['oid']} of {value['path']} was not uploaded")
            files[value["path"]] = Blob(request.hub.large_files[value["oid"]], lfs=True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {value['path']}")
        else:
            raise HubError(400, None, f"Unknown operation {key!r}")
    answer = {"success": True}
    if request.query.get("create_pr") == ["1"]:
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        revision = f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{request.hub.endpoint}/{repo}/discussions/{number}"
    oid = repository.add_commit(revision, summary, files).oid
    url = f"{request.hub.endpoint}/{repo}/commit/{oid}"
    request.send_json({**answer, "commitOid": oid, "commitUrl": url})


def _information(request: _Handler, repo: str, revision: str = "") -> None:
    repository = request.repository(repo)
    commit = repository.at(revision or "main")
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    answer = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.oid, "tags": []}
    request.send_json({**answer, "private": repository.private, "gated": False, "siblings": siblings})


def _refs(request: _Handler, repo: str) -> None:
    refs = request.repository(repo).refs.items()
    branches = [
        {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": oid}
        for ref, oid in refs
        if not ref.startswith("refs/pr/")
    ]
    request.send_json({"branches": branches, "tags": [], "converts": []})


def _file_entry(path: str, blob: Blob) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.git_oid}
    if blob.lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 130}
    return entry


def _tree(request: _Handler, repo: str, revision: str, folder: str = "") -> None:
    commit = request.repository(repo).at(revision)
    recursive = request.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    root = PurePosixPath(folder)
    entries: dict[str, dict[str, object]] = {}
    for path, blob in sorted(commit.files.items()):
        parents = PurePosixPath(path).parents
        if root not in parents:
            continue
        inside = [str(parent) for parent in reversed(parents) if root in parent.parents]
        for parent in inside if recursive else inside[:1]:
            oid = hashlib.sha1(parent.encode()).hexdigest()
            entries[parent] = {"type": "directory", "path": parent, "oid": oid, "size": 0}
        if recursive or not inside:
            entries[path] = _file_entry(path, blob)
    if folder and not entries:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    request.send_json(list(entries.values()))


def _paths_info(request: _Handler, repo: str, revision: str) -> None:
    files = request.repository(repo).at(revision).files
    try:
        wanted = request.json_body()["paths"]
    except json.JSONDecodeError:  # some versions send a form
        wanted = parse_qs(request.body.decode())["paths"]
    request.send_json([_file_entry(path, files[path]) for path in wanted if path in files])


def _resolve(request: _Handler, repo: str, revision: str, path: str) -> None:
    commit = request.repository(repo).at(revision)
    headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "none"}
    blob = commit.files.get(path)
    if blob is None:
        # The commit is named here too: the client remembers that this commit lacks the file.
        message = "Entry not found"
        codes = {"X-Error-Code": "EntryNotFound", "X-Error-Message": message}
        request.send_json({"error": message}, 404, {**headers, **codes})
        return
    headers["ETag"] = f'"{blob.upload_oid}"'
    if blob.lfs:
        headers |= {"X-Linked-ETag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
    request.send_bytes(blob.content, headers=headers)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"
_ROUTES: list[tuple[tuple[str, ...], re.Pattern[str], Callable[..., None]]] = [
    (methods, re.compile(pattern), action)
    for methods, pattern, action in [
        (("GET",), "/api/whoami-v2", _whoami),
        (("POST",), "/api/validate-yaml", _validate_yaml),
        (("POST",), "/api/repos/create", _create_repository),
        (("POST",), rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", _create_branch),
        (("POST",), rf"/api/models/{_REPO}/preupload/{_REVISION}", _preupload),
        (("POST",), rf"/api/models/{_REPO}/commit/{_REVISION}", _commit),
        (("POST",), rf"/api/models/{_REPO}/paths-info/{_REVISION}", _paths_info),
        (("GET",), rf"/api/models/{_REPO}/refs", _refs),
        (("GET",), rf"/api/models/{_REPO}/tree/{_REVISION}(?:/(?P<folder>.*))?", _tree),
        (("GET",), rf"/api/models/{_REPO}/revision/{_REVISION}", _information),
        (("GET",), rf"/api/models/{_REPO}", _information),
        (("POST",), rf"/{_REPO}\.git/info/lfs/objects/batch", _lfs_batch),
        (("PUT",), r"/lfs-storage/(?P<oid>[0-9a-f]{64})", _lfs_upload),
        (("POST",), r"/lfs-storage/(?P<oid>[0-9a-f]{64})/verify", _lfs_verify),
        (("GET", "HEAD"), rf"/{_REPO}/resolve/{_REVISION}/(?P<path>.+)", _resolve),
    ]
]
