"""What the Hub of the tests keeps: repositories, their commits, and how it says no."""

import hashlib
import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Blob:
    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git


Files = dict[str, Blob]


@dataclass
class Repository:
    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, branch: str, files: Files) -> str:
        """What a branch holds from now on."""
        listed = json.dumps([branch, len(self.commits), sorted((path, b.git) for path, b in files.items())])
        sha = hashlib.sha1(listed.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha


class Answer(Exception):
    """An error of the Hub: a status, its code for the client, a message."""

    def __init__(self, status: int, code: str, message: str, **body: object) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.body = status, code, message, body
