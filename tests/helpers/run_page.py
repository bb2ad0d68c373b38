"""Runs the blocks of one page, in order, in this interpreter and folder; `test_blocks.py` starts it.

Standard input: a JSON list of blocks, each `[language, code]`. Standard output: what each printed, as a JSON
list. Python blocks have a fresh namespace each; those in sh are run by bash, in the same folder.
"""

import contextlib
import io
import json
import subprocess
import sys


def printed(language: str, code: str) -> str:
    """What a block prints; its errors pass through."""
    if language == "sh":
        done = subprocess.run(["bash", "-euc", code], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}{done.stderr}\nwhich is of:\n{code}")
        return done.stdout
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "<block>", "exec"), {"__name__": "__main__"})
    return out.getvalue()


if __name__ == "__main__":
    print(json.dumps([printed(*block) for block in json.load(sys.stdin)]), file=sys.stdout)
