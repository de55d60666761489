"""A stand-in for the Hugging Face Hub: its API for models over real HTTP, as far as huggingface_hub makes use of it.

Large files (suffixes in `LARGE`) are kept as the Hub keeps them: stated by SHA-256, handed out by another address, and
uploaded by the LFS protocol. `fail` makes it refuse or break off.
"""

import hashlib
import json
import re
import threading
from base64 import b64decode
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".pth", ".safetensors", ".gguf")
TOKEN = "hf_tokenOfTheStandIn"  # of the account "me", which may read and write what is its own
READ_TOKEN = "hf_tokenThatMayOnlyRead"
LICENCES = ("apache-2.0", "mit", "openrail", "cc-by-4.0", "gpl-3.0", "other")  # a few of those that the Hub knows
NAME = r"(?P<repo>[\w.-]+(?:/[\w.-]+)?)"
REV = r"(?P<rev>[^/]+)"


@dataclass
class Repo:
    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # by hash, in order
    messages: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.commit("initial commit")

    def commit(self, message: str) -> str:
        self.messages.append(message)
        oid = hashlib.sha1(f"{len(self.messages)} {message}".encode()).hexdigest()
        self.commits[oid] = dict(self.files)
        return oid

    def at(self, revision: str) -> str | None:
        """The commit of a revision."""
        if revision == "main":
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


@dataclass
class Failure:
    """How requests whose method and path match are answered: by a status, or a connection that breaks off."""

    pattern: str  # of "METHOD /path"
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: dict[str, str] = field(default_factory=dict)
    after: int = -1  # bytes that are sent before the connection is closed
    damage: bool = False  # the first byte is another
    times: int = 1000  # that it happens


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # large files by SHA-256
        self.failures: list[Failure] = []
        self.requests: list[str] = []
        self.sent: list[int] = []  # bytes of each answer
        self.ranges = True  # whether parts of a file are handed out
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.store = f"http://localhost:{self.server_port}"  # another host to clients

    def add(self, name: str, files: dict[str, bytes], **kwargs) -> Repo:
        self.repos[name] = Repo(dict(files), **kwargs)
        self.stored |= {sha256(data): data for data in files.values()}
        return self.repos[name]

    def fail(self, pattern: str, status: int = 0, **kwargs) -> None:
        self.failures.append(Failure(pattern, status, **kwargs))

    def asked(self, pattern: str) -> list[str]:
        return [request for request in self.requests if re.search(pattern, request)]


@contextmanager
def hub_stand_in():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_hash(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        self.failure = next((f for f in self.server.failures if f.times and re.search(f.pattern, request)), None)
        if self.failure:
            self.failure.times -= 1
            if self.failure.status:
                return self.send(self.failure.status, self.failure.body, self.failure.headers)
        for method, pattern, act in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method.split():
                return act(self, **found.groupdict())
        self.refuse(404, "", "Not found")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def send(self, status: int, content: object = None, headers: dict[str, str] | None = None, size: int = 0):
        data = content if isinstance(content, bytes) else json.dumps({} if content is None else content).encode()
        after = self.failure.after if self.failure and self.command == "GET" else -1
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if self.command != "HEAD" else size))
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent.append(len(data))
            self.wfile.write(data if after < 0 else data[:after])
        if after >= 0:
            self.close_connection = True

    def refuse(self, status: int, code: str, message: str):
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def repo(self, name: str, files: bool = False) -> Repo | None:
        """The repository, where the token may read it; otherwise it is refused as the Hub does."""
        if self.token() not in ("", TOKEN, READ_TOKEN):
            self.refuse(401, "", "Invalid credentials in Authorization header")
            return None
        found = self.server.repos.get(name)
        if found is None or (found.private and self.token() == ""):
            known = self.token() != ""
            self.refuse(404 if known else 401, "RepoNotFound" if known else "", "Repository not found")
            return None
        if found.gated and files:
            self.refuse(403 if self.token() else 401, "GatedRepo", "Access to this model is restricted.")
            return None
        return found

    def info(self, repo: str, rev: str = "main"):
        found = self.repo(repo)
        if found is None:
            return
        commit = found.at(rev)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        siblings = []
        for name, data in sorted(found.commits[commit].items()):
            entry = {"rfilename": name}
            if "blobs" in parse_qs(urlsplit(self.path).query):
                entry |= {"size": len(data), "blobId": git_hash(data)}
                if name.endswith(LARGE):
                    entry["lfs"] = {"size": len(data), "sha256": sha256(data), "pointerSize": 130}
            siblings.append(entry)
        gated = "auto" if found.gated else False
        self.send(200, {"id": repo, "sha": commit, "private": found.private, "gated": gated, "siblings": siblings})

    def resolve(self, repo: str, rev: str, file: str):
        found = self.repo(repo, files=True)
        if found is None:
            return
        commit = found.at(rev)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        data = found.commits[commit].get(file)
        if data is None:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file.endswith(LARGE):
            self.server.stored[sha256(data)] = data
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256(data)}"'}
            headers["Location"] = f"{self.server.store}/stored/{sha256(data)}?X-Signature=secret"
            return self.send(302, b"", headers)
        self.content(data, headers | {"ETag": f'"{git_hash(data)}"'})

    def stored(self, oid: str):
        self.content(self.server.stored[oid], {"ETag": f'"{oid}"'})

    def content(self, data: bytes, headers: dict[str, str]):
        if self.failure and self.failure.damage:
            data = bytes([data[0] ^ 1]) + data[1:]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked or not self.server.ranges:
            return self.send(200, data, headers, len(data))
        first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        self.send(206, data[first : last + 1], headers)

    def whoami(self):
        if self.token() not in (TOKEN, READ_TOKEN):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        self.send(200, {"name": "me", "type": "user", "orgs": []})

    def writable(self, name: str) -> bool:
        if self.token() == TOKEN and name.startswith("me/"):
            return True
        known = self.token() in (TOKEN, READ_TOKEN)
        self.refuse(
            403 if known else 401, "", "You don't have the rights" if known else "Invalid username or password."
        )
        return False

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.writable(name):
            if name in self.server.repos:
                return self.refuse(409, "", "You already created this model repo")
            private = asked.get("private") is True or asked.get("visibility") == "private"
            self.server.add(name, {".gitattributes": b"*.pth filter=lfs\n"}, private=private)
            self.send(200, {"url": f"{self.server.address}/{name}", "name": name})

    def validate(self):
        found = re.search(r"^license: (.*)$", json.loads(self.body)["content"], re.MULTILINE)
        if found and found[1] not in LICENCES:
            return self.send(400, {"errors": [{"message": f'"license" must be one of [{", ".join(LICENCES)}]'}]})
        self.send(200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})

    def preupload(self, repo: str, rev: str):
        if self.writable(repo):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(self.body)["files"]
            ]
            self.send(200, {"files": modes})

    def batch(self, repo: str):
        if self.writable(repo):
            objects = []
            for one in json.loads(self.body)["objects"]:
                action = {"upload": {"href": f"{self.server.address}/upload/{one['oid']}"}}
                objects.append(one | ({} if one["oid"] in self.server.stored else {"actions": action}))
            self.send(200, {"transfer": "basic", "objects": objects})

    def upload(self, oid: str):
        if sha256(self.body) != oid:
            return self.refuse(400, "", "checksum mismatch")
        self.server.stored[oid] = self.body
        self.send(200, b"")

    def commit(self, repo: str, rev: str):
        if not self.writable(repo):
            return
        found, lines = self.server.repos[repo], [json.loads(line) for line in self.body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                found.files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found.files[value["path"]] = self.server.stored[value["oid"]]
        oid = found.commit(lines[0]["value"]["summary"])
        self.send(200, {"commitUrl": f"{self.server.address}/{repo}/commit/{oid}", "commitOid": oid})


ROUTES = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", f"/api/models/{NAME}/revision/{REV}", Handler.info),
    ("POST", f"/api/models/{NAME}/preupload/{REV}", Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/{REV}", Handler.commit),
    ("GET", f"/api/models/{NAME}", Handler.info),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.batch),
    ("GET HEAD", f"/{NAME}/resolve/{REV}/(?P<file>.+)", Handler.resolve),
    ("GET HEAD", r"/stored/(?P<oid>\w+)", Handler.stored),
    ("PUT", r"/upload/(?P<oid>\w+)", Handler.upload),
]
