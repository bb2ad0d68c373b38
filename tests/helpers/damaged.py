"""A saved model, to be damaged."""

import json

from safetensors import safe_open
from safetensors.torch import load_file, save_file


class Saved:
    """A folder whose tensors and config are changed in memory, and written."""

    def __init__(self, folder):
        self.folder, self.file = folder, folder / "model.safetensors"
        self.tensors = load_file(self.file)
        with safe_open(self.file, "pt") as opened:
            self.metadata = opened.metadata()
        self.config = json.loads((folder / "config.json").read_text())

    def write(self):
        save_file(self.tensors, self.file, self.metadata)
        (self.folder / "config.json").write_text(json.dumps(self.config))
        return self.folder
