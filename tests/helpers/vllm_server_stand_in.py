"""A server with the few answers of vLLM's that `examples/vllm_server.py` reads; run as vLLM's Python is.

Of a prompt of n tokens the answer is n, n + 1, n + 2, ... A model called "absent" does not start.
"""

import json
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._send('vllm:requests{engine="0"} 2.0\nvllm:requests{engine="1"} 3.0\nvllm:requests_all 9\n')

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tokens = [len(asked["prompt"]) + step for step in range(asked["max_tokens"])]
        if asked.get("stream"):
            pieces = [json.dumps({"choices": [choice([token])]}) for token in tokens]
            self._send("".join(f"data: {piece}\n\n" for piece in [*pieces, "[DONE]"]))
        else:
            self._send(json.dumps({"choices": [choice(tokens)]}))

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *what: Any) -> None:
        pass


def choice(tokens: list[int]) -> dict[str, Any]:
    return {"text": " ".join(map(str, tokens)), "token_ids": tokens}


def main() -> None:
    options = dict(zip(sys.argv[3::2], sys.argv[4::2], strict=True))  # after -m and the module's name
    if options["--model"] == "absent":
        sys.exit("no such model")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ThreadingHTTPServer((options["--host"], int(options["--port"])), Handler).serve_forever()


if __name__ == "__main__":
    main()
