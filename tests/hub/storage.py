"""What the local Hub keeps: repositories with their commits, large files, and who may do what."""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass, field

USERS = {"hf_ann": "ann", "hf_bob": "bob", "hf_google": "google"}
"""Access tokens and whose they are."""


class Refusal(Exception):
    """An answer with a status other than 200, in the form that huggingface_hub understands."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


@dataclass
class StoredFile:
    """A file in a commit: its content, or the hash of it if it is a large file."""

    size: int
    oid: str
    content: bytes | None = None

    @property
    def is_lfs(self) -> bool:
        return self.content is None


@dataclass
class Commit:
    oid: str
    message: str
    files: dict[str, StoredFile]
    parent: str | None = None


@dataclass
class Repository:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.branches:
            self.commit("main", "initial commit", {}, [])

    @property
    def owner(self) -> str:
        return self.name.partition("/")[0]

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def commit(self, branch: str, message: str, added: dict[str, StoredFile], deleted: list[str]) -> Commit:
        """All of it or nothing: a branch moves on only when the commit is complete."""
        parent = self.at(branch) if self.branches else None
        files = {**(parent.files if parent else {}), **added}
        for path in deleted:
            files = {name: file for name, file in files.items() if name != path and not name.startswith(f"{path}/")}
        listing = "".join(f"{name} {file.oid}\n" for name, file in sorted(files.items()))
        above = parent.oid if parent else None
        oid = hashlib.sha1(f"{self.name} {above} {message}\n{listing}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, message, files, above)
        self.branches[branch] = oid
        return self.commits[oid]


class Storage:
    """All repositories and large files."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.lock = threading.RLock()

    def create(self, name: str, private: bool, user: str | None) -> Repository:
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        owner, _, short = name.rpartition("/")
        name = f"{owner or user}/{short}"
        if owner not in ("", user):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner}")
        if name in self.repositories:
            raise Refusal(409, f"You already created this model repo: {name}")
        self.repositories[name] = Repository(name, private)
        return self.repositories[name]

    def readable(self, name: str, user: str | None) -> Repository:
        repository = self.repositories.get(name)
        if repository is None or (repository.private and user != repository.owner):
            # As the Hub does it, nobody can tell a private repository from none.
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, name: str, user: str | None) -> Repository:
        repository = self.readable(name, user)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if user != repository.owner:
            raise Refusal(403, f"You have read access but not the required permissions for {name}")
        return repository
