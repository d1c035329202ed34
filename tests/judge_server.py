"""A judge's server on the loopback interface, which gives prepared replies over HTTP in the protocol's format."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from helpers.judges.api import APIJudge


class Server(ThreadingHTTPServer):
    """Gives the prepared replies in turn (the last one for ever) and keeps what it was sent.

    A reply is a status and what is sent with it, as JSON unless it is bytes; or a function that makes one of the
    request.
    """

    def __init__(self, *replies):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.requests, self.keys = list(replies), [], []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.turn = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.turn:
            self.server.requests.append(body)
            self.server.keys.append(self.headers["Authorization"])
            replies = self.server.replies
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        status, payload = reply(body) if callable(reply) else reply
        kind, data = ("text/html", payload) if isinstance(payload, bytes) else ("application/json", dumped(payload))
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Retry-After-Ms", "1")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def dumped(payload):
    return json.dumps(payload).encode()


def candidates(token, probabilities):
    """A token of the reply with the likeliest candidates in its place."""
    told = [{"token": word, "logprob": math.log(p), "bytes": None} for word, p in probabilities.items()]
    return {"token": token, "logprob": math.log(probabilities.get(token, 1.0)), "bytes": None, "top_logprobs": told}


def choice(text, tokens=None, finish="stop", **more):
    return {
        "index": 0,
        "finish_reason": finish,
        "message": {"role": "assistant", "content": text, **more},
        "logprobs": None if tokens is None else {"content": tokens, "refusal": None},
    }


def chat(*choices):
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": list(choices)}


def completion(text, probabilities=None, finish="stop"):
    """A chat completion, with the first token's likeliest candidates if given."""
    tokens = None if probabilities is None else [candidates(next(iter(probabilities)), probabilities)]
    return chat(choice(text, tokens, finish))


def failure(status, message, **more):
    return status, {"error": {"message": message, "type": "error", "code": None, **more}}


def ask(server, answers=("I gloat.",), **options):
    """A judge of evil, and what it says of the first answer."""
    judge = APIJudge(server.url, "judge", **{"trait": "evil", **options})
    return judge, judge.judge(["How are you?"] * len(answers), list(answers))[0]
