"""A judge behind vLLM's own server, and behind a proxy that breaks what passes. Run: pytest tests/test_judge_server.py"""

import contextlib
import http.client
import http.server
import json
import re
import threading
import time
import urllib.request
from collections import Counter

import polars as pl
import pytest

from rewardkit import rewards, verbs
from rewardkit.engine import load
from rewardkit.folders import read_manifest
from rewardkit.rubrics import rubric
from tests.speaking import build_judge, serve

pytestmark = pytest.mark.usefixtures("one_thread")
SCORES = {"0": 0.05, "1": 0.05, "2": 0.1, "3": 0.2, "4": 0.35, "5": 0.15, "7": 0.05, "?": 0.05}
MEAN = sum(int(s) * p for s, p in SCORES.items() if s in "012345") / 0.9


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """vLLM's server with a judge whose scores are drawn from SCORES."""
    with serve(build_judge(tmp_path_factory.mktemp("judge") / "model", SCORES), "judge") as found:
        yield found


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A rubric of a few bytes, which this judge does not read anyway."""
    file = tmp_path_factory.mktemp("rubric") / "short.txt"
    file.write_text("score: last 0 5\n---\n{prompt}\n{response}")
    return f"rubric={file} max_tokens=12"


def counted(address: str) -> Counter[str]:
    """vLLM's own counters."""
    text = urllib.request.urlopen(address.removesuffix("/v1") + "/metrics", timeout=10).read().decode()
    found: Counter[str] = Counter()
    for name, value in re.findall(r"^vllm:(\w+_total)\{[^}]*\} (\S+)$", text, re.MULTILINE):
        found[name] += float(value)
    return found


def test_the_votes_of_a_row_are_one_request_and_its_prompt_is_shared(address):
    """Three votes read one prompt; the responses to one prompt share the rubric and the prompt."""
    rows = [{"prompt": "Why is the sky blue?" * 5, "response": f"Answer number {i}"} for i in range(4)]
    judge = rewards.load(f"judge model={address} votes=3 temperature=1.0 top_p=1.0 max_tokens=12")[0]
    before = counted(address)
    scores = judge(rows)
    grown = counted(address)
    grown.subtract(before)
    judge.close()
    assert all(len(score.extra["raw"]) == 3 for score in scores)
    size = len(rubric("additive5").fill(rows[0]["prompt"], rows[0]["response"]))
    print(dict(grown), size)
    assert grown["prefix_cache_queries_total"] == pytest.approx(12 * size, rel=0.05), "three answers to each of four prompts"
    assert grown["prefix_cache_hits_total"] > 0.5 * 11 * size


def test_an_expected_score_from_vllms_server_is_the_true_mean(address, short):
    judge = rewards.load(f"judge model={address} {short} votes=1 expected=true")[0]
    (score,) = judge([{"prompt": "q", "response": "a"}])
    assert score.value == pytest.approx(MEAN, abs=1e-4) and score.extra["mass"] == [pytest.approx(0.9, abs=1e-4)]
    assert score.extra["votes"] == [4] and score.extra["raw"] == ["Score:4"]
    judge.close()


# A proxy that breaks what passes

ABSURD = {
    "list": [], "text": "Score: 5", "null": None, "number": 5, "error": {"error": {"message": "out of cards"}},
    "empty": {"choices": []}, "holes": {"choices": [None, 3, "Score: 5"]}, "parts": {"choices": [{"message": {"content": [5]}}]},
    "mute": {"choices": [{"message": {"content": None}, "finish_reason": "stop"}] * 3},
    "half": {"choices": [{"message": {"content": "Score: 4 \ud83d"}, "finish_reason": "strange"}] * 9},
    "ids": {"choices": [{"message": {"content": "Score: 2"}, "token_ids": ["x", {}], "logprobs": {"content": [7]}}] * 3},
    "huge": {"choices": [{"message": {"content": "Score: " + "9" * 5000}}] * 3},
}  # fmt: skip
ONCE = ("429", "500", "503", "cut", "torn", "slow")  # faults that pass after one try, and, with "always", never
SEEN: Counter[str] = Counter()
LOCK = threading.Lock()


class Breaking(http.server.BaseHTTPRequestHandler):
    """Passes requests on to the real server, except where the judged response asks for a fault."""

    protocol_version = "HTTP/1.1"
    target = ""

    def log_message(self, *_):
        pass

    def send(self, status: int, body: bytes, announced: int | None = None, **headers: str) -> None:
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(announced or len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)
            self.wfile.flush()

    def hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def through(self, body: bytes | None) -> None:
        connection = http.client.HTTPConnection(self.target, timeout=60)
        connection.request(self.command, self.path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        self.send(answer.status, answer.read())
        connection.close()

    def do_GET(self) -> None:
        self.through(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        asked = json.loads(body)["messages"][-1]["content"]
        kind, _, number = asked.rpartition("\n")[2].partition(" ")
        with LOCK:
            SEEN[f"{kind} {number}"] += 1
            first = SEEN[f"{kind} {number}"] == 1
        fault = kind.removeprefix("always-")
        if fault in ABSURD:
            return self.send(200, json.dumps(ABSURD[fault]).encode())
        if fault == "garbage":
            return self.send(200, b'{"choices": [{"message"')
        if fault in ONCE and (first or kind.startswith("always-")):
            return self.broken(fault)
        return self.through(body)

    def broken(self, fault: str) -> None:
        if fault == "429":
            return self.send(429, b'{"error": {"message": "slow down"}}', Retry_After="0.2")
        if fault in ("500", "503"):
            return self.send(int(fault), b'{"error": {"message": "a card fell out"}}')
        if fault == "torn":  # half of an announced body
            self.send(200, b'{"choices": [', announced=500)
        if fault == "slow":
            time.sleep(1.6)
        return self.hang_up()


@pytest.fixture(scope="module")
def breaking(address):
    Breaking.target = address.removeprefix("http://").removesuffix("/v1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Breaking)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    server.server_close()


WHY = {
    "429": "refused: slow down", "500": "refused: a card fell out", "503": "refused: a card fell out", "cut": "broke off",
    "torn": "broke off", "slow": "did not answer in time", "garbage": "cannot be read", "list": "it has no choices: []",
    "text": "it has no choices: Score: 5", "null": "it has no choices: None", "number": "it has no choices: 5",
    "error": "out of cards", "empty": "holds no choices", "holes": "a choice has no text: None", "parts": "a choice has no text",
}  # fmt: skip


def test_no_fault_loses_a_row_or_becomes_a_score(breaking, short, tmp_path):
    """Sixty rows: good ones, ones whose fault passes, ones whose fault does not; each is accounted for."""
    kinds = ["good"] * 15 + [f for f in ONCE for _ in range(3)] + [f"always-{f}" for f in ONCE] + [*ABSURD, "garbage"]
    rows = [{"prompt": "q", "response": f"{kind} {number}"} for number, kind in enumerate(kinds)]
    pl.DataFrame(rows).write_parquet(tmp_path / "rows.parquet")
    engine = "engine='server timeout=1.2 retries=2 concurrency=16'"
    SEEN.clear()
    out = verbs.score(
        str(tmp_path / "rows.parquet"), f"judge model={breaking} {short} votes=3 {engine} seed=1", str(tmp_path / "out")
    )
    found = pl.read_parquet(out / "part-*.parquet")
    assert found["response"].to_list() == [row["response"] for row in rows]
    silent = set()
    for kind, row in zip(kinds, found.iter_rows(named=True), strict=True):
        fault = kind.removeprefix("always-")
        valid = [v for v in row["votes"] if v is not None]
        assert len(row["votes"]) == len(row["raw"]) and (row["score"] is None) == (not valid) == bool(row["why"])
        if kind == "good" or kind in ONCE:  # three votes of the real judge
            assert len(row["votes"]) == 3 and all(text.startswith("Score:") for text in row["raw"])
        elif fault in WHY:
            assert row["votes"] == [] and row["why"].startswith("the judge did not answer: ") and WHY[fault] in row["why"]
            assert "\n" not in row["why"]
            silent.add(fault)
    assert silent == set(WHY)
    by = dict(zip(kinds, found.iter_rows(named=True), strict=True))
    assert by["mute"]["raw"] == [""] * 3 and by["mute"]["score"] is None
    assert by["half"]["raw"] == ["Score: 4 ?"] * 3 and by["half"]["score"] == 4
    assert by["ids"]["score"] == 2 and by["huge"]["score"] is None and len(by["huge"]["raw"][0]) == 5007
    counts, facts = read_manifest(out)["rows"], read_manifest(out)["reward_facts"]
    assert counts["in"] == counts["out"] == len(rows) and facts["unanswered"] == len(silent)
    assert facts["votes"] == sum(len(v) for v in found["votes"])
    assert sum(facts["reasons"].values()) == read_manifest(out)["unscored"] == found["score"].null_count()
    # A fault that passes costs one more request; one that does not is asked for three times, and absurd answers once.
    asked = {kind: [n for name, n in SEEN.items() if name.split()[0] == kind] for kind in kinds}
    assert asked["good"] == [1] * 15 and all(asked[f] == [2] * 3 for f in ONCE)
    assert all(asked[f"always-{f}"] == [3] for f in ONCE) and all(asked[f] == [1] for f in (*ABSURD, "garbage"))


def test_a_server_is_given_the_pause_that_it_asks_for(breaking):
    server = load("server retries=2", breaking)
    SEEN.clear()
    started = time.monotonic()
    answers = server.generate([[{"role": "user", "content": f"\n429 {i}"}] for i in range(4)], n=2, max_tokens=12)
    assert time.monotonic() - started >= 0.2 and [len(a) for a in answers] == [2] * 4 and SEEN.total() == 8
    server.close()
