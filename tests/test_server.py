"""The server engine against vLLM's own server and a faulty one, both on loopback. Run: pytest tests/test_server.py"""

import contextlib
import http.server
import json
import socket
import threading
import time

import pytest

from rewardkit.engine import Refused, load
from rewardkit.errors import ModelError
from rewardkit.server import Server
from tests.speaking import PROMPTS, ask, ids, serve

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def address(tiny_model):
    with serve(tiny_model, "tiny") as found:
        yield found


def test_a_server_says_what_the_model_says(address, tiny_model):
    local = load("vllm", tiny_model)
    wanted = ids(local.generate(PROMPTS, temperature=0, max_tokens=20))
    local.close()
    server = load("vllm", address)
    answers = server.generate(PROMPTS, temperature=0, max_tokens=20)
    assert isinstance(server, Server) and server.facts["model"] == "tiny"
    assert ids(answers) == wanted
    sampled = server.generate(PROMPTS, n=12, max_tokens=60, temperature=1.5, seed=1)
    assert [len(a) for a in sampled] == [12] * len(PROMPTS)
    assert ids(sampled) == ids(server.generate(PROMPTS, n=12, max_tokens=60, temperature=1.5, seed=1))
    flat = [c for a in sampled for c in a]
    stopped = [c for c in flat if c.finish_reason == "stop"]
    assert stopped and all(c.token_ids[-1] == 2 and "<eos>" not in c.text for c in stopped)
    assert all(len(c.token_ids) == 60 for c in flat if c.finish_reason == "length")
    server.close()


def test_a_server_refuses_a_prompt_and_a_wrong_name(address):
    server = load("server", f"{address}#tiny")
    good, long, none = server.generate([ask("good"), ask("x" * 400), ask("")], max_tokens=8)
    assert len(good) == 1 and "maximum context length" in long.reason and "\n" not in long.reason
    assert none == Refused("the prompt is empty")
    server.close()
    with pytest.raises(ModelError, match=r"#other: .*other.*does not exist"):
        load("server", f"{address}#other").generate([ask("hi")], max_tokens=8)


# A server that fails


class Faulty(http.server.BaseHTTPRequestHandler):
    """Fails in the way that the prompt asks for."""

    protocol_version = "HTTP/1.1"
    seen: dict[str, int] = {}
    fields: set[str] = set()

    def log_message(self, *_):
        pass

    def reply(self, status: int, body: object, raw: bytes | None = None, **headers: str) -> None:
        data = raw if raw is not None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # who waits too long has gone
            self.wfile.write(data)

    def do_GET(self) -> None:
        if self.path.startswith("/locked"):
            return self.reply(401, {"error": {"message": "bad key"}})
        names = {"/two/models": ["a", "b"], "/v1/models": ["m"]}.get(self.path)
        if names is None:
            return self.reply(404, {})
        return self.reply(200, {"object": "list", "data": [{"id": n, "object": "model"} for n in names]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = request["messages"][-1]["content"]
        times = Faulty.seen[fault] = Faulty.seen.get(fault, 0) + 1
        Faulty.fields |= set(request)
        strict = self.path.startswith("/strict")
        if strict and "return_token_ids" in request:
            return self.reply(400, {"error": {"message": "Unrecognized request argument supplied: return_token_ids"}})
        if fault == "busy" and times <= 2:
            return self.reply(429, {"error": {"message": "slow down"}}, Retry_After="0.05")
        if fault in ("500", "400", "404", "429"):
            return self.reply(int(fault), {"error": {"message": f"no {fault}\nsecond line"}}, Retry_After="0.05")
        if fault == "garbage":
            return self.reply(200, None, raw=b'{"choices": [')
        if fault == "nothing":
            return self.reply(200, {"object": "chat.completion", "choices": []})
        if fault == "shape":
            return self.reply(200, {"object": "chat.completion", "choices": [{"index": 0}]})
        if fault == "hang":
            time.sleep(2)
        if fault == "cut":
            self.close_connection = True
            return self.connection.close()
        count = 1 if fault == "one" else request["n"]
        message = {"role": "assistant", "content": f"{fault} {request['seed']}"}
        choices = [{"index": i, "message": message, "finish_reason": "stop"} for i in range(count)]
        return self.reply(200, {"object": "chat.completion", "id": "1", "model": "m", "choices": choices})


@pytest.fixture(scope="module")
def faulty():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_faults_hit_their_own_prompt_only(faulty):
    server = load("server retries=1 timeout=1 concurrency=8", f"{faulty}/v1")
    faults = ["fine", "500", "429", "400", "garbage", "nothing", "shape", "cut", "hang", "good"]
    answers = dict(zip(faults, server.generate([ask(f) for f in faults], n=2), strict=True))
    reasons = {f: a.reason for f, a in answers.items() if isinstance(a, Refused)}
    assert len(answers["fine"]) == len(answers["good"]) == 2 and answers["fine"][0].token_ids is None
    assert set(reasons) == set(faults) - {"fine", "good"}
    assert all("\n" not in r for r in reasons.values())
    assert reasons["400"] == "the server refused: no 400"
    assert "cannot be read" in reasons["garbage"] and "cannot be read" in reasons["shape"]
    assert "broke off" in reasons["cut"] and "in time" in reasons["hang"] and "no choices" in reasons["nothing"]


def test_a_busy_server_is_asked_again(faulty):
    server = load("server retries=3", f"{faulty}/v1")
    assert server.generate([ask("busy")])[0][0].text.startswith("busy ")
    assert Faulty.seen["busy"] == 3


def test_a_server_that_gives_one_answer_is_asked_until_there_are_enough(faulty):
    answers = load("server", f"{faulty}/v1").generate([ask("one")], n=3)[0]
    assert len({c.text for c in answers}) == 3


def test_a_server_that_knows_no_token_ids_is_not_asked_twice(faulty):
    server = load("server concurrency=1", f"{faulty}/strict/v1#m")
    Faulty.seen.clear()
    answers = server.generate([ask("a"), ask("b"), ask("400")])
    assert [isinstance(a, Refused) for a in answers] == [False, False, True]
    assert Faulty.seen == {"a": 2, "b": 1, "400": 1}


def test_what_would_fail_for_every_row_stops_at_once(faulty):
    with pytest.raises(ModelError, match="no 404"):
        load("server", f"{faulty}/v1#m").generate([ask("404")])
    with pytest.raises(ModelError, match="does not let us in: bad key"):
        load("server", f"{faulty}/locked#m")
    with pytest.raises(ModelError, match=r"serves 2 models; say which: .*/two#NAME \(a, b\)"):
        load("server", f"{faulty}/two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1#m"
    with pytest.raises(ModelError, match="no server answers at"):
        load("server", nobody)
