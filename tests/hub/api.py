"""The part of the Hub's API that huggingface_hub uses to create, upload, look up and download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import HFValidationError, validate_repo_id

from .storage import USERS, Refusal, Storage, StoredFile

LARGE = (".safetensors", ".bin", ".pt")
"""Which files the Hub wants as large files (LFS)."""


class Request(NamedTuple):
    method: str
    path: str
    query: dict[str, str]
    user: str | None
    body: bytes
    host: str

    def json(self) -> Any:
        return json.loads(self.body)


class Answer(NamedTuple):
    content: bytes = b""
    headers: dict[str, str] = {}
    status: int = 200


def answer_json(content: Any, status: int = 200) -> Answer:
    return Answer(json.dumps(content).encode(), {"Content-Type": "application/json"}, status)


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []


def route(methods: str, pattern: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Register the function that answers these methods at these paths."""

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        compiled = re.compile(pattern.replace("REPO", "(?P<name>[^/]+/[^/]+)").replace("REV", "(?P<revision>[^/]+)"))
        for method in methods.split():
            ROUTES.append((method, compiled, function))
        return function

    return register


def respond(storage: Storage, request: Request) -> Answer:
    """The answer to a request."""
    for method, pattern, function in ROUTES:
        if method == request.method and (match := pattern.fullmatch(request.path)):
            groups = {key: value.replace("%2F", "/") for key, value in match.groupdict(default="").items()}
            return function(storage, request, **groups)
    raise Refusal(404, f"The local Hub does not know {request.method} {request.path}")


@route("GET", "/api/whoami-v2")
def whoami(storage: Storage, request: Request) -> Answer:
    if request.user is None:
        raise Refusal(401, "Invalid username or password.")
    return answer_json({"type": "user", "name": request.user, "fullname": request.user, "orgs": []})


@route("POST", "/api/repos/create")
def create_repo(storage: Storage, request: Request) -> Answer:
    wanted = request.json()
    name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
    is_private = wanted.get("visibility") == "private" or wanted.get("private") is True
    try:
        repository = storage.create(name, is_private, request.user)
    except Refusal as refusal:
        if refusal.status == 409:
            full_name = name if "/" in name else f"{request.user}/{name}"
            return answer_json({"error": str(refusal), "url": f"{request.host}/{full_name}"}, 409)
        raise
    return answer_json({"url": f"{request.host}/{repository.name}", "name": repository.name})


@route("POST", "/api/validate-yaml")
def validate_yaml(storage: Storage, request: Request) -> Answer:
    """Refuses what the Hub refuses in the metadata of a card that this package could write."""
    errors = metadata_errors(request.json()["content"])
    found = {"errors": [{"message": error} for error in errors], "warnings": []}
    return answer_json(found, 400 if errors else 200)


def metadata_errors(content: str) -> list[str]:
    try:
        data = ModelCard(content).data.to_dict()  # parses the model-index as well
    except (ValueError, yaml.YAMLError) as error:
        return [str(error)]
    errors = []
    for key in ("base_model", "datasets"):
        for name in data.get(key) if isinstance(data.get(key), list) else [data.get(key)]:
            try:
                validate_repo_id(name) if name is not None else None
            except HFValidationError as error:
                errors.append(f"{key}: {error}")
    for result in (data.get("model-index") or [{"results": []}])[0]["results"]:
        if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]):
            errors.append('"model-index": task and data set are required')
        errors += [f'"model-index": {m} has no value' for m in result["metrics"] if m["value"] is None]
    return errors


@route("GET", "/api/models/REPO(?:/revision/REV)?")
def model_info(storage: Storage, request: Request, name: str, revision: str) -> Answer:
    repository = storage.readable(name, request.user)
    commit = repository.at(revision or "main")
    siblings = [{"rfilename": path, "size": file.size} for path, file in commit.files.items()]
    about = {"id": name, "modelId": name, "author": repository.owner, "sha": commit.oid, "siblings": siblings}
    return answer_json({**about, "private": repository.private, "tags": [], "downloads": 0, "likes": 0})


@route("GET", "/api/models/REPO/tree/REV(?P<folder>/.*)?")
def tree(storage: Storage, request: Request, name: str, revision: str, folder: str) -> Answer:
    files = storage.readable(name, request.user).at(revision).files
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    found: dict[str, dict[str, Any]] = {}
    for path, file in files.items():
        inside, is_below, _ = path.removeprefix(prefix).partition("/")
        if not path.startswith(prefix):
            continue
        if is_below:
            found[prefix + inside] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": prefix + inside}
        if not is_below or request.query.get("recursive", "").lower() == "true":
            lfs = {"lfs": {"oid": file.oid, "size": file.size, "pointerSize": 128}} if file.is_lfs else {}
            found[path] = {"type": "file", "oid": file.oid, "size": file.size, "path": path, **lfs}
    return answer_json(list(found.values()))


@route("POST", "/api/models/REPO/branch/REV")
def create_branch(storage: Storage, request: Request, name: str, revision: str) -> Answer:
    repository = storage.writable(name, request.user)
    if revision in repository.branches:
        raise Refusal(409, f"Reference already exists: {revision}")
    repository.branches[revision] = repository.at(request.json().get("startingPoint", "main")).oid
    return answer_json({})


@route("POST", "/api/models/REPO/preupload/REV")
def preupload(storage: Storage, request: Request, name: str, revision: str) -> Answer:
    repository = storage.writable(name, request.user)
    present = repository.at(revision).files
    files = []
    for wanted in request.json()["files"]:
        path = wanted["path"]
        oid = {"oid": present[path].oid} if path in present else {}
        mode = "lfs" if path.endswith(LARGE) else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
    return answer_json({"files": files})


@route("POST", r"/REPO\.git/info/lfs/objects/batch")
def lfs_batch(storage: Storage, request: Request, name: str) -> Answer:
    storage.writable(name, request.user)
    objects = []
    for wanted in request.json()["objects"]:
        upload = {"upload": {"href": f"{request.host}/lfs/{wanted['oid']}"}}
        missing = {} if wanted["oid"] in storage.large_files else {"actions": upload}
        objects.append({"oid": wanted["oid"], "size": wanted["size"], **missing})
    return answer_json({"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/(?P<oid>[0-9a-f]{64})")
def put_large_file(storage: Storage, request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "The content does not have that hash.")
    storage.large_files[oid] = request.body
    return Answer()


@route("GET HEAD", "/lfs/(?P<oid>[0-9a-f]{64})")
def get_large_file(storage: Storage, request: Request, oid: str) -> Answer:
    return Answer(storage.large_files[oid])


@route("POST", "/api/models/REPO/commit/REV")
def commit(storage: Storage, request: Request, name: str, revision: str) -> Answer:
    repository = storage.writable(name, request.user)
    if revision not in repository.branches:
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
    header, added, deleted = "", {}, []
    for line in request.body.splitlines():
        item = json.loads(line)
        value = item["value"]
        if item["key"] == "header":
            header = value["summary"]
        elif item["key"] == "file":
            added[value["path"]] = _small(base64.b64decode(value["content"]))
        elif item["key"] == "lfsFile":
            if value["oid"] not in storage.large_files:
                raise Refusal(400, f"{value['path']} was not uploaded.")
            added[value["path"]] = StoredFile(value["size"], value["oid"])
        else:
            deleted.append(value["path"].rstrip("/"))
    new = repository.commit(revision, header, added, deleted)
    return answer_json({"commitUrl": f"{request.host}/{name}/commit/{new.oid}", "commitOid": new.oid})


def _small(content: bytes) -> StoredFile:
    oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # as git counts it
    return StoredFile(len(content), oid, content)


@route("GET HEAD", "/REPO/resolve/REV/(?P<path>.+)")
def resolve(storage: Storage, request: Request, name: str, revision: str, path: str) -> Answer:
    found = storage.readable(name, request.user).at(revision)
    headers = {"X-Repo-Commit": found.oid}
    if path not in found.files:
        refusal = Refusal(404, f"Entry not found: {path}", "EntryNotFound")
        refusal.headers.update(headers)
        raise refusal
    file = found.files[path]
    if file.content is not None:
        return Answer(file.content, {**headers, "ETag": f'"{file.oid}"'})
    # Large files are on another host, which the client gives no token.
    where = {"Location": f"{request.host.replace('127.0.0.1', 'localhost')}/lfs/{file.oid}"}
    linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(file.size)}
    return Answer(b"", {**headers, **where, **linked}, 302)


def user_of(authorization: str | None) -> str | None:
    """Whose token a request has; a wrong one is refused as the Hub refuses it."""
    if not authorization:
        return None
    token = authorization.removeprefix("Bearer ")
    if token not in USERS:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return USERS[token]
