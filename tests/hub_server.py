"""A small Hub on 127.0.0.1, for the real client: set HF_ENDPOINT to `Hub.url` before huggingface_hub is imported.

It knows what a push and a load need: repositories, branches, tags and pull requests; regular files, LFS and Xet;
three tokens. `hub.fail` makes it answer wrongly for a while.
"""

import base64
import hashlib
import json
import re
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


OWNER, READER, STRANGER = "hf_owner_0123456789", "hf_reader_0123456789", "hf_stranger_0123456789"
# token -> user, and whether it may write
TOKENS = {OWNER: ("me", True), READER: ("me", False), STRANGER: ("somebody", True)}
LFS = (".safetensors", ".png", ".bin", ".parquet")
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Blob:
    """A file: `oid` is the sha256 of an LFS file, git's sha1 of another, whose bytes are kept here."""

    oid: str
    size: int
    data: bytes | None = None


@dataclass
class Repo:
    private: bool
    refs: dict[str, str] = field(default_factory=dict)  # full name -> commit
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    titles: dict[str, str] = field(default_factory=dict)
    parents: dict[str, str | None] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, Blob], title: str = "initial commit") -> str:
        text = json.dumps([len(self.commits), ref, sorted((path, blob.oid) for path, blob in files.items())])
        oid = hashlib.sha1(text.encode()).hexdigest()
        self.parents[oid], self.titles[oid] = self.refs.get(ref), title
        self.commits[oid], self.refs[ref] = files, oid
        return oid

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a tag, a pull request or a commit."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        found = next((self.refs[name] for name in names if name in self.refs), revision)
        return found if found in self.commits else None


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "", commit: str = "", body: dict | None = None):
        self.status, self.body = status, body or {"error": message}
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.headers = {name: value for name, value in headers.items() if value}


class Hub:
    """The server, running from `with Hub(folder) as hub` on.

    Attributes:
        url: what HF_ENDPOINT is to be.
        fail: [(pattern, answer, times)]: a request "METHOD /path" that the pattern matches gets that status, or for
            "cut" a closed connection, so many times; None lets it through, and counts.
        log: "METHOD /path status" of every request, in order.
    """

    def __init__(self, folder: Path):
        self.folder, self.lock = Path(folder), threading.RLock()
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.fail: list[tuple[str, int | str, int]] = []
        self.log: list[str] = []
        handler = type("Handler", (Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # Large files lie on another host than the API, as on the real Hub: the client strips the token on the way.
        self.storage = f"http://localhost:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes | None]:
        """Path -> content of what a repository holds; None where only Xet knows it."""
        found = self.repos[repo]
        files = found.commits[found.resolve(revision)]
        return {path: self.objects.get(b.oid) if b.data is None else b.data for path, b in sorted(files.items())}

    def requests(self, pattern: str) -> list[str]:
        return [line for line in self.log if re.search(pattern, line)]

    def failure(self, request: str) -> int | str | None:
        for index, (pattern, answer, times) in enumerate(self.fail):
            if times > 0 and re.search(pattern, request):
                self.fail[index] = (pattern, answer, times - 1)
                return answer
        return None

    def xet_hash(self, sha256: str) -> str | None:
        """The Xet hash of a file, read from the shards that the client left in the folder. A shard lists, after a
        header of 48 bytes, for each file: hash (32 bytes), flags and count (4 each), 8 more; `count` segments of 48
        bytes; as many verifications if flag 31 is set; 48 bytes that begin with the sha256 if flag 30 is."""
        wanted = b"".join(bytes.fromhex(sha256)[i : i + 8][::-1] for i in range(0, 32, 8))
        for path in self.folder.rglob("*"):
            data = path.read_bytes() if path.is_file() and "shards" in str(path) else b""
            at = 48
            while at + 48 <= len(data) and data[at : at + 32] != b"\xff" * 32:
                flags, count = struct.unpack_from("<II", data, at + 32)
                after = at + 48 * (1 + count * (2 if flags >> 31 & 1 else 1))
                if flags >> 30 & 1 and data[after : after + 32] in (wanted, bytes.fromhex(sha256)):
                    return "".join(f"{part:016x}" for part in struct.unpack_from("<4Q", data, at))
                at = after + 48 * (flags >> 30 & 1)
        return None


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    log_message = lambda *_: None  # noqa: E731

    def answer(self):
        split = urlsplit(self.path)
        self.query, path = parse_qs(split.query), split.path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        request = f"{self.command} {unquote(path)}"
        failure = self.hub.failure(request)
        if failure == "cut":
            self.hub.log.append(f"{request} cut")
            self.close_connection = True
            return
        try:
            with self.hub.lock:
                if failure is not None:
                    raise Refused(failure, "the server has a problem")
                status, headers, body = self.route(path)
        except Refused as refused:
            status, headers, body = refused.status, refused.headers, refused.body
        self.hub.log.append(f"{request} {status}")
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    # ---- who asks, and for what ------------------------------------------------------------------------------------
    def user(self) -> tuple[str | None, bool]:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS.get(token, (None, False))

    def repo(self, name: str, write: bool = False) -> Repo:
        user, writes = self.user()
        repo, own = self.hub.repos.get(name), user == name.split("/")[0]
        if repo is None or (repo.private and not own):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not (own and writes):
            raise Refused(403, "you have no right to write here")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        commit = repo.resolve(unquote(revision))
        if commit is None:
            raise Refused(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
        return commit

    def route(self, path: str):
        for pattern, handle in ROUTES:
            match = re.fullmatch(pattern, f"{self.command} {path}")
            if match:
                return handle(self, **match.groupdict())
        raise Refused(404, f"no route for {self.command} {path}")

    # ---- the API ---------------------------------------------------------------------------------------------------
    def create(self):
        wanted, (user, writes) = json.loads(self.body), self.user()
        name = f"{(owner := wanted.get('organization') or user)}/{wanted['name']}"
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if name in self.hub.repos and user == owner:
            raise Refused(409, "exists", body={"error": "exists already", "url": f"{self.hub.url}/{name}"})
        if not writes or owner != user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
        self.hub.repos[name] = repo = Repo(private=wanted.get("visibility") == "private")
        repo.commit("refs/heads/main", {".gitattributes": blob(b"*.safetensors filter=lfs\n")})
        return 200, {}, {"url": f"{self.hub.url}/{name}", "name": name}

    def whoami(self):
        user, _ = self.user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        return 200, {}, {"type": "user", "name": user, "orgs": []}

    def validate(self):
        """Refuses a card whose metadata has a pipeline tag or a licence that is none, as the real one does."""
        header = json.loads(self.body)["content"].split("---")[1]
        found = dict(re.findall(r"^(\w+): *(\S+)$", header, flags=re.MULTILINE))
        errors = [{"message": f'"{key}" must be one of [...]'} for key, value in found.items() if value == "nonsense"]
        return (400 if errors else 200), {}, {"errors": errors, "warnings": []}

    def preupload(self, name, revision):
        repo = self.repo(name, write=True)
        files = repo.commits[self.commit_of(repo, revision)]
        answers = []
        for path in (wanted["path"] for wanted in json.loads(self.body)["files"]):
            mode, oid = "lfs" if path.endswith(LFS) else "regular", files[path].oid if path in files else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {}, {"files": answers}

    def lfs_batch(self, name):
        self.repo(name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            href = f"{self.hub.storage}/lfs/{wanted['oid']}"
            actions = {"upload": {"href": href}, "verify": {"href": f"{self.hub.url}/lfs/{wanted['oid']}/verify"}}
            objects.append({**wanted, **({} if wanted["oid"] in self.hub.objects else {"actions": actions})})
        return 200, {"Content-Type": "application/vnd.git-lfs+json"}, {"transfer": "basic", "objects": objects}

    def lfs_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "these bytes have another hash")
        self.hub.objects[oid] = self.body
        return 200, {}, b""

    def lfs_verify(self, oid):
        return (200 if json.loads(self.body)["size"] == len(self.hub.objects.get(oid, b"")) else 404), {}, {}

    def lfs_get(self, oid):
        return 200, {"ETag": f'"{oid}"'}, self.hub.objects[oid]

    def commit(self, name, revision):
        repo = self.repo(name, write=True)
        files, title = dict(repo.commits[self.commit_of(repo, revision)]), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = blob(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects and not self.hub.xet_hash(value["oid"]):
                    raise Refused(400, f"{value['path']} was never uploaded")
                files[value["path"]] = Blob(value["oid"], value["size"])
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] == "header":
                title = value["summary"]
        ref, number = f"refs/heads/{unquote(revision)}", sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        if "create_pr" in self.query:
            ref = f"refs/pr/{number}"
        elif unquote(revision).startswith("refs/"):
            ref = unquote(revision)
        oid = repo.commit(ref, files, title)
        url = f"{self.hub.url}/{name}"
        pull = f"{url}/discussions/{number}" if "create_pr" in self.query else None
        return 200, {}, {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": pull}

    def info(self, name, revision="main"):
        repo = self.repo(name)
        commit = self.commit_of(repo, revision)
        answer = {"id": name, "modelId": name, "sha": commit, "private": repo.private, "tags": [], "createdAt": DATE}
        return 200, {}, {**answer, "siblings": [{"rfilename": path} for path in repo.commits[commit]]}

    def tree(self, name, revision, path=None):
        repo = self.repo(name)
        commit = self.commit_of(repo, revision)
        if path:
            raise Refused(404, f"{path} does not exist", "EntryNotFound", commit)
        return (
            200,
            {},
            [
                {"type": "file", "path": path, "oid": b.oid[:40], "size": b.size}
                | ({"lfs": {"oid": b.oid, "size": b.size, "pointerSize": 130}} if b.data is None else {})
                for path, b in repo.commits[commit].items()
            ],
        )

    def history(self, name, revision):
        repo = self.repo(name)
        oid, entries = self.commit_of(repo, revision), []
        while oid is not None:
            entries.append({"id": oid, "title": repo.titles[oid], "message": "", "date": DATE, "authors": []})
            oid = repo.parents[oid]
        return 200, {}, entries

    def list_refs(self, name):
        groups = {"branches": "heads", "tags": "tags", "pullRequests": "pr", "converts": "convert"}
        found = {group: [] for group in groups}
        for ref, oid in self.repo(name).refs.items():
            for group, kind in groups.items():
                if ref.startswith(f"refs/{kind}/"):
                    found[group].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": oid})
        return 200, {}, found

    def new_ref(self, name, kind, revision):
        repo, wanted = self.repo(name, write=True), json.loads(self.body or b"{}")
        ref = f"refs/tags/{wanted['tag']}" if kind == "tag" else f"refs/heads/{unquote(revision)}"
        if ref in repo.refs:
            raise Refused(409, f"Reference {ref} already exists")
        repo.refs[ref] = self.commit_of(repo, revision if kind == "tag" else "main")
        return 200, {}, {}

    def xet_token(self, name, kind, revision):
        self.repo(name, write=kind == "write")
        url, expires = f"local://{self.hub.folder}", 4_000_000_000
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expires}
        return 200, headers, {"casUrl": url, "accessToken": "xet", "exp": expires}

    def download(self, name, revision, path):
        repo, path = self.repo(name), unquote(path)
        commit = self.commit_of(repo, revision)
        found = repo.commits[commit].get(path)
        headers = {"X-Repo-Commit": commit}
        if found is None:
            raise Refused(404, f"{path} does not exist", "EntryNotFound", commit)
        if found.data is not None:
            return 200, {**headers, "ETag": f'"{found.oid}"'}, found.data
        headers |= {"X-Linked-Etag": f'"{found.oid}"', "X-Linked-Size": found.size}
        if found.oid not in self.hub.objects:
            headers["X-Xet-Hash"] = self.hub.xet_hash(found.oid)
            headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/models/{name}/xet-read-token/{commit}"
        return 302, {**headers, "Location": f"{self.hub.storage}/lfs/{found.oid}"}, b""


def blob(data: bytes) -> Blob:
    return Blob(hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), len(data), data)


NAME, REVISION = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<revision>[^/]+)"
MODEL = f"/api/models/{NAME}"
ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/validate-yaml", Handler.validate),
    (rf"POST {MODEL}/preupload/{REVISION}", Handler.preupload),
    (rf"POST /{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.lfs_put),
    (r"POST /lfs/(?P<oid>\w+)/verify", Handler.lfs_verify),
    (r"(?:GET|HEAD) /lfs/(?P<oid>\w+)", Handler.lfs_get),
    (rf"POST {MODEL}/commit/{REVISION}", Handler.commit),
    (rf"GET {MODEL}", Handler.info),
    (rf"GET {MODEL}/revision/{REVISION}", Handler.info),
    (rf"GET {MODEL}/tree/{REVISION}(?:/(?P<path>.+))?", Handler.tree),
    (rf"GET {MODEL}/refs", Handler.list_refs),
    (rf"GET {MODEL}/commits/{REVISION}", Handler.history),
    (rf"POST {MODEL}/(?P<kind>branch|tag)/{REVISION}", Handler.new_ref),
    (rf"GET {MODEL}/xet-(?P<kind>read|write)-token/{REVISION}", Handler.xet_token),
    (rf"(?:GET|HEAD) /{NAME}/resolve/{REVISION}/(?P<path>.+)", Handler.download),
]
