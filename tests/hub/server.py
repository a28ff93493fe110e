"""A loopback stand-in for the Hugging Face Hub.

With ``HF_ENDPOINT`` set to ``Hub(...).endpoint`` and a fresh ``HF_HOME``, huggingface_hub, transformers, datasets and
SAELens load from it by the names and file layouts of the real repositories.
"""

import base64
import hashlib
import json
import re
import sys
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit


class Refusal(Exception):
    """An answer other than the file or listing asked for."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Entry(NamedTuple):
    """A file of a repository."""

    path: str
    file: Path
    size: int
    oid: str

    @classmethod
    def of(cls, folder: Path, file: Path) -> "Entry":
        path, stat = file.relative_to(folder).as_posix(), file.stat()
        return cls(path, file, stat.st_size, _digest(path, stat.st_size, stat.st_mtime_ns))

    def described(self) -> dict:
        return {"type": "file", "path": self.path, "size": self.size, "oid": self.oid}


class Hub:
    """Serves root/models/OWNER/NAME/... and root/datasets/OWNER/NAME/... as the Hugging Face Hub does.

    A repository without an owner (``gpt2``) is known by a file directly in its folder. ``OWNER/NAME@REVISION`` beside
    it holds another revision.

    Args:
        root: Folder that holds the repositories.
        port: Port on 127.0.0.1; 0 takes a free one.
    """

    def __init__(self, root: Path, port: int = 0):
        self.root = Path(root)
        self.gated: set[str] = set()
        self.requests: list[str] = []
        # Tokens that may write, each with its owners; None lets every token write everywhere.
        self.writers: dict[str, set[str]] | None = None
        self.server = _Server(("127.0.0.1", port), _Handler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def start(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def __enter__(self) -> "Hub":
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def model(self, name: str) -> Path:
        return self._made("models", name)

    def dataset(self, name: str) -> Path:
        return self._made("datasets", name)

    def _made(self, kind: str, name: str) -> Path:
        folder = self.root / kind / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    hub: Hub

    def handle_error(self, request, client_address):
        """Say nothing of a client that hangs up early."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        self.server.hub.requests.append(f"{self.command} {url.path}")
        try:
            if ".." in unquote(url.path).split("/"):
                raise Refusal(400, "", "a path leads upwards")
            parts = [unquote(part) for part in url.path.split("/")[1:]]
            if self.command != "POST" or not self.write(parts, body):
                self.route(parts, parse_qs(url.query), body)
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            self.send_json({"error": str(refusal)}, refusal.status, headers)

    do_HEAD = do_POST = do_GET

    def require_writer(self, owner: str) -> None:
        """Refuse to write for a token that is not known, or not of the owner."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        writers = self.server.hub.writers
        if not token or (writers is not None and token not in writers):
            raise Refusal(401, "", "Invalid username or password.")
        if writers is not None and owner not in writers[token]:
            raise Refusal(403, "", "You don't have the rights to create a model under this namespace")

    def write(self, parts: list[str], body: str) -> bool:
        """Answer what uploads ask; whether this was one."""
        if parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            self.require_writer(asked["organization"])
            name = f"{asked['organization']}/{asked['name']}"
            (self.server.hub.root / "models" / name).mkdir(parents=True, exist_ok=True)
            self.send_json({"url": f"http://{self.headers['Host']}/{name}", "name": name})
        elif parts == ["api", "validate-yaml"]:
            license = re.search(r"^license: (.*)$", json.loads(body)["content"], re.MULTILINE)
            known = license is None or re.fullmatch(r"[a-z0-9.-]+", license[1])
            errors = [] if known else [{"message": '"license" must be one of apache-2.0, mit and others'}]
            self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif parts[:2] == ["api", "models"] and parts[4:5] in (["preupload"], ["commit"]):
            name = "/".join(parts[2:4])
            self.require_writer(parts[2])
            if parts[4] == "preupload":
                files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
                self.send_json({"files": files})
            else:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        place = self.server.hub.root / "models" / name / line["value"]["path"]
                        place.parent.mkdir(parents=True, exist_ok=True)
                        place.write_bytes(base64.b64decode(line["value"]["content"]))
                address = f"http://{self.headers['Host']}/{name}/commit/{'0' * 40}"
                self.send_json({"commitUrl": address, "commitOid": "0" * 40, "success": True})
        else:
            return False
        return True

    def route(self, parts: list[str], query: dict, body: str) -> None:
        if parts[0] == "api" and len(parts) > 2 and parts[1] in ("models", "datasets"):
            repository, rest = self.repository(parts[1], parts[2:])
            action, rest = (rest[0], rest[1:]) if rest else ("revision", ["main"])
            answers = {"revision": self.info, "refs": self.refs, "tree": self.tree, "paths-info": self.paths_info}
            if action in answers:
                if rest:
                    repository = repository.at(rest[0])
                self.send_json(answers[action](repository, "/".join(rest[1:]), query, body))
                return
        elif "resolve" in parts:
            kind = "datasets" if parts[0] == "datasets" else "models"
            repository, rest = self.repository(kind, parts[1:] if kind == "datasets" else parts)
            if len(rest) > 2 and rest[0] == "resolve":
                self.resolve(repository, rest[1], "/".join(rest[2:]))
                return
        raise Refusal(404, "", f"nothing is served at {self.path}")

    def repository(self, kind: str, parts: list[str]) -> tuple["_Repository", list[str]]:
        """Find the repository that `parts` begins with, and return it with the parts after its name."""
        for length in (2, 1):
            name = "/".join(parts[:length])
            folder = self.server.hub.root / kind / name
            if len(parts) >= length and folder.is_dir():
                files = folder.rglob("*") if length == 2 else folder.glob("*")
                if any(file.is_file() for file in files):
                    return _Repository(kind, name, folder), parts[length:]
        raise Refusal(404, "RepoNotFound", "Repository not found")

    def info(self, repository: "_Repository", *_) -> dict:
        return {
            "_id": _digest(repository.name)[:24],
            "id": repository.name,
            "modelId": repository.name,
            "author": repository.name.rpartition("/")[0] or None,
            "sha": repository.sha,
            "lastModified": "2025-01-01T00:00:00.000Z",
            "createdAt": "2025-01-01T00:00:00.000Z",
            "private": False,
            "gated": "manual" if repository.name in self.server.hub.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "siblings": [{"rfilename": e.path, "size": e.size, "blobId": e.oid} for e in repository.entries],
        }

    def refs(self, repository: "_Repository", *_) -> dict:
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repository.sha}
        return {"branches": [main], "tags": [], "converts": [], "pullRequests": []}

    def tree(self, repository: "_Repository", path: str, query: dict, body: str) -> list[dict]:
        deep = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found = [at for at in repository.listing() if not path or at["path"].startswith(path + "/")]
        if path and not found:
            raise Refusal(404, "EntryNotFound", f"{path} does not exist")
        depth = path.count("/") + 1 if path else 0
        return [at for at in found if deep or at["path"].count("/") == depth]

    def paths_info(self, repository: "_Repository", path: str, query: dict, body: str) -> list[dict]:
        sent = json.loads(body) if body.startswith("{") else parse_qs(body)
        wanted = {wanted.strip("/") for wanted in sent.get("paths", [])}
        return [at for at in repository.listing() if at["path"] in wanted]

    def resolve(self, repository: "_Repository", revision: str, path: str) -> None:
        if repository.name in self.server.hub.gated and not self.headers.get("Authorization", "").startswith("Bearer "):
            raise Refusal(401, "GatedRepo", f"Access to {repository.name} is restricted. You must be authenticated.")
        repository = repository.at(revision)
        file = repository.folder / path
        if not file.is_file():
            raise Refusal(404, "EntryNotFound", "Entry not found")
        entry = Entry.of(repository.folder, file)
        headers = {
            "ETag": f'"{entry.oid}"',
            "X-Repo-Commit": repository.sha,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        first, last, status = 0, entry.size - 1, 200
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if asked and any(asked.groups()):
            start, end = asked.groups()
            first = int(start) if start else max(entry.size - int(end), 0)
            last = min(int(end), last) if start and end else last
            if first > last:
                raise Refusal(416, "", "the range lies outside the file")
            headers["Content-Range"], status = f"bytes {first}-{last}/{entry.size}", 206
        self.send_head(status, last - first + 1, headers)
        if self.command != "HEAD":
            with file.open("rb") as source:
                source.seek(first)
                left = last - first + 1
                while left > 0 and (block := source.read(min(left, 1 << 20))):
                    self.wfile.write(block)
                    left -= len(block)

    def send_json(self, content, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        data = json.dumps(content).encode()
        self.send_head(status, len(data), {"Content-Type": "application/json", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_head(self, status: int, length: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length)}.items():
            if value:
                self.send_header(key, value)
        self.end_headers()


class _Repository:
    def __init__(self, kind: str, name: str, folder: Path):
        self.kind, self.name, self.folder = kind, name, folder
        self.entries = [Entry.of(folder, file) for file in sorted(folder.rglob("*")) if file.is_file()]
        self.sha = _digest(kind, name, *(entry.oid for entry in self.entries))

    def at(self, revision: str) -> "_Repository":
        if revision in ("main", "refs/heads/main", self.sha):
            return self
        for folder in self.folder.parent.glob(f"{self.folder.name}@*"):
            other = _Repository(self.kind, self.name, folder)
            if revision in (folder.name.partition("@")[2], other.sha):
                return other
        raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def listing(self) -> list[dict]:
        folders = {parent.as_posix() for entry in self.entries for parent in Path(entry.path).parents} - {"."}
        directories = [{"type": "directory", "path": p, "size": 0, "oid": _digest(p)} for p in folders]
        return sorted(directories + [entry.described() for entry in self.entries], key=lambda at: at["path"])


def _digest(*parts) -> str:
    return hashlib.sha1("\0".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()
