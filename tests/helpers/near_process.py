"""A model's process for tests: the same requests and answers, in this process, which starts at once."""

import json

from svdq_hf.evaluation.speed.worker import Worker


class NearProcess:
    def __init__(self, threads=None):
        self.worker, self.ended = Worker(), False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.end()

    def ask(self, do, **arguments):
        told = getattr(self.worker, do)(**json.loads(json.dumps(arguments)))
        return json.loads(json.dumps(told))

    def end(self):
        self.ended = True
