"""The simulated engine's server over HTTP: faults, wire details, and what hangs up."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection, IncompleteRead, RemoteDisconnected
from typing import Any

import pytest

from controlplane.engines.simulated.text import END
from tests.support.engines import SimulatedServer, call, events_of
from tests.support.waiting import until

MESSAGES = [{"role": "user", "content": "hello"}]


StartServer = Callable[..., SimulatedServer]


@pytest.fixture
def server() -> Iterator[StartServer]:
    servers: list[SimulatedServer] = []

    def make(**settings: Any) -> SimulatedServer:
        servers.append(SimulatedServer(**settings))
        return servers[-1]

    yield make
    for each in servers:
        each.close()


def test_every_response_is_marked_as_simulated(server: StartServer) -> None:
    sim = server()
    _, headers, text = sim.post()
    assert headers["x-engine"] == "simulated"
    assert json.loads(text)["system_fingerprint"] == "simulated"
    _, headers, text = sim.post(stream=True, max_tokens=2)
    assert headers["x-engine"] == "simulated"
    assert {event["system_fingerprint"] for event in events_of(text)} == {"simulated"}


def test_only_health_is_open(server: StartServer) -> None:
    sim = server()
    assert sim.get("/health", "")[0] == 200
    for path in ("/v1/models", "/metrics", "/simulated/knobs", "/nothing"):
        assert sim.get(path, "")[0] == 401
    assert sim.get("/nothing")[0] == 404
    assert server(secret="").get("/v1/models", "")[0] == 200


def raw_post(**body: Any) -> bytes:
    """A chat request as bytes."""
    data = json.dumps({"messages": MESSAGES, **body}).encode()
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer s\r\n"
        b"content-length: %d\r\n\r\n" % len(data)
    ) + data


def test_a_stream_is_one_http_chunk_for_each_token(server: StartServer) -> None:
    sim = server(itl_ms=1)
    connection = HTTPConnection("127.0.0.1", sim.port, timeout=10)
    body = json.dumps({"messages": MESSAGES, "stream": True, "max_tokens": 5})
    connection.request("POST", "/v1/chat/completions", body, {"authorization": "Bearer s"})
    response = connection.getresponse()
    sizes, raw = [], response.fp
    while size := int(raw.readline(), 16):
        data = raw.read(size)
        sizes.append(data.count(b"data: "))
        assert raw.readline() == b"\r\n"
    connection.close()
    # Role, five tokens, [DONE].
    assert sizes == [1] * 7


def test_whole_and_streamed_say_the_same_and_count_the_same(server: StartServer) -> None:
    sim = server(tokens=10)
    whole = json.loads(sim.post(return_token_ids=True)[2])
    events = events_of(
        sim.post(stream=True, return_token_ids=True, stream_options={"include_usage": True})[2]
    )
    deltas = [choice for event in events for choice in event["choices"]]
    assert "".join(c["delta"].get("content", "") for c in deltas) == whole["choices"][0]["message"]["content"]
    ids = [token for choice in deltas for token in choice.get("token_ids", [])]
    assert ids == whole["choices"][0]["token_ids"]
    assert ids[-1] == END
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert events[-1]["usage"] == whole["usage"]
    assert whole["usage"]["completion_tokens"] == 11


def test_token_ids_are_returned_only_on_request(server: StartServer) -> None:
    text = server(tokens=3).post(stream=True)[2]
    assert "token_ids" not in text


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", {"messages": []}, 400),
        ("/v1/chat/completions", {"messages": "x"}, 400),
        ("/v1/chat/completions", {"model": "other"}, 404),
        ("/v1/chat/completions", {"n": 2}, 400),
        ("/v1/chat/completions", {"max_tokens": 0}, 400),
        ("/v1/chat/completions", {"max_tokens": "many"}, 400),
        ("/v1/chat/completions", {"stop": [1]}, 400),
        ("/v1/completions", {"prompt": []}, 400),
        ("/v1/completions", {"prompt": [-1]}, 400),
        ("/v1/completions", {"prompt": ["a", "b"]}, 400),
        ("/v1/embeddings", {"input": {}}, 400),
        ("/v1/responses", {}, 400),
        ("/v1/nothing", {}, 404),
    ],
)
def test_bad_requests(server_shared: SimulatedServer, path: str, body: Any, status: int) -> None:
    returned, _, text = server_shared.post(path, **body)
    assert returned == status
    assert json.loads(text)["error"]["code"] == status


@pytest.fixture(scope="module")
def server_shared() -> Iterator[SimulatedServer]:
    sim = SimulatedServer(max_model_len=100)
    yield sim
    sim.close()


def test_a_prompt_that_is_too_long_is_refused(server_shared: SimulatedServer) -> None:
    status, _, text = server_shared.post(messages=[{"role": "user", "content": "x" * 1000}])
    assert status == 400
    assert "under 100" in text


def test_bodies_that_are_no_json_and_requests_that_are_no_http(server_shared: SimulatedServer) -> None:
    connection = HTTPConnection("127.0.0.1", server_shared.port, timeout=10)
    connection.request("POST", "/v1/chat/completions", "{", {"authorization": "Bearer s"})
    assert connection.getresponse().status == 400
    connection.close()
    with socket.create_connection(("127.0.0.1", server_shared.port), timeout=10) as client:
        client.sendall(b"nonsense\r\n\r\n")
        response = b""
        while data := client.recv(65536):
            response += data
        assert response.startswith(b"HTTP/1.1 400")


def test_requests_in_a_row_on_one_connection_are_answered_in_order(server_shared: SimulatedServer) -> None:
    request = raw_post(max_tokens=1)
    with socket.create_connection(("127.0.0.1", server_shared.port), timeout=10) as client:
        client.sendall(request + request + b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        response = b""
        while data := client.recv(65536):
            response += data
    assert response.count(b"HTTP/1.1 200 OK") == 3
    assert response.index(b"chat.completion") < response.rindex(b"HTTP/1.1 200")


def test_embeddings_in_both_encodings_are_the_same(server_shared: SimulatedServer) -> None:
    import base64
    import struct

    url = "/v1/embeddings"
    plain = json.loads(server_shared.post(url, input="hello", dimensions=4)[2])["data"][0]["embedding"]
    packed = json.loads(server_shared.post(url, input="hello", dimensions=4, encoding_format="base64")[2])[
        "data"
    ][0]["embedding"]
    assert struct.unpack("<4f", base64.b64decode(packed)) == pytest.approx(plain, abs=1e-6)


def test_cut_after_tokens(server: StartServer) -> None:
    sim = server(cut_after_tokens=3)
    connection = HTTPConnection("127.0.0.1", sim.port, timeout=10)
    body = json.dumps({"messages": MESSAGES, "stream": True})
    connection.request("POST", "/v1/chat/completions", body, {"authorization": "Bearer s"})
    with pytest.raises(IncompleteRead) as caught:
        connection.getresponse().read()
    assert len(events_of(caught.value.partial.decode())) == 4
    connection.close()
    whole = json.dumps({"messages": MESSAGES})
    connection.request("POST", "/v1/chat/completions", whole, {"authorization": "Bearer s"})
    with pytest.raises(RemoteDisconnected):
        connection.getresponse()
    connection.close()
    assert sim.count("request_success_total", 'finished_reason="error"') == 2
    assert sim.count("num_requests_running") == 0


def test_hang_after_tokens_and_release(server: StartServer) -> None:
    sim = server(hang_after_tokens=2)
    done: list[str] = []
    client = threading.Thread(target=lambda: done.append(sim.post(stream=True, max_tokens=5)[2]))
    client.start()
    until(lambda: sim.count("generation_tokens_total") == 2)
    assert sim.count("num_requests_running") == 1
    assert not done
    sim.knobs(hang_after_tokens=None)
    client.join(10)
    assert len(events_of(done[0])) == 6


def test_while_hanging_connections_are_accepted_and_get_no_response(server: StartServer) -> None:
    sim = server()
    sim.knobs(hang=True)
    done: list[int] = []
    client = threading.Thread(target=lambda: done.append(sim.post()[0]))
    client.start()
    with pytest.raises(TimeoutError):
        call(f"http://127.0.0.1:{sim.port}/health", timeout_s=0.3)
    assert not done
    sim.knobs(hang=False)
    client.join(10)
    assert done == [200]


def test_refuse_closes_the_port_for_a_while(server: StartServer) -> None:
    sim = server()
    sim.knobs(refuse=True, for_s=0.5)
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", sim.port), timeout=5)

    def back() -> bool:
        try:
            return sim.get("/health")[0] == 200
        except OSError:
            return False

    until(back, 5)
    assert sim.knobs()["faults"] == {}


def test_errors_and_health(server: StartServer) -> None:
    sim = server(error_rate=1.0, error_status=503)
    assert sim.post()[0] == 503
    assert sim.get("/v1/models")[0] == 200
    sim.knobs(error_rate=0, health_fails=True)
    assert sim.post()[0] == 200
    assert sim.get("/health")[0] == 503


def test_a_wrong_knob_changes_nothing(server: StartServer) -> None:
    sim = server()
    before = sim.knobs()
    status, _, text = sim.post("/simulated/knobs", messages=None, bogus=1)
    assert status == 400
    assert "bogus" in text
    assert sim.knobs() == before


def test_exit_code(server: StartServer) -> None:
    sim = server()
    sim.knobs(exit_code=7)
    assert sim.popen.wait(10) == 7


def test_a_client_that_disconnects_frees_its_slot(server: StartServer) -> None:
    sim = server(itl_ms=1000, max_running=1)
    request = raw_post(stream=True)
    with socket.create_connection(("127.0.0.1", sim.port), timeout=10) as running:
        running.sendall(request)
        assert running.recv(1000)
        with socket.create_connection(("127.0.0.1", sim.port), timeout=10) as waiting:
            waiting.sendall(request)
            until(lambda: sim.count("num_requests_waiting") == 1)
        until(lambda: sim.count("num_requests_waiting") == 0)
    until(lambda: sim.count("num_requests_running") == 0)
    assert sim.count("request_success_total", 'finished_reason="abort"') == 2


def test_a_client_that_does_not_read_holds_up_only_itself(server: StartServer) -> None:
    sim = server(max_model_len=2_000_000)
    request = raw_post(stream=True, max_tokens=200_000, ignore_eos=True)
    with socket.create_connection(("127.0.0.1", sim.port), timeout=10) as slow:
        slow.sendall(request)
        # The tokens stop coming once buffers are full, long before the end.
        counts = [-1.0]

        def stopped() -> bool:
            counts.append(sim.count("generation_tokens_total"))
            return counts[-1] == counts[-2] > 0

        until(stopped, every_s=0.2)
        last = counts[-1]
        assert 0 < last < 150_000
        assert sim.post(max_tokens=1)[0] == 200
        read = 0
        while read < 3_000_000:
            read += len(slow.recv(1 << 20))
        until(lambda: sim.count("generation_tokens_total") > last + 1)


def test_bad_settings_are_named() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "controlplane.engines.simulated.server", "--settings", '{"itl_ms": -1}'],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "itl_ms" in done.stderr


def test_sigterm_ends_it_with_0_also_while_it_loads(server: StartServer) -> None:
    assert server().close() == 0
    loading = subprocess.Popen(
        [sys.executable, "-m", "controlplane.engines.simulated.server", "--settings", '{"load_s": 60}'],
        stdout=subprocess.PIPE,
    )
    assert loading.stdout is not None
    assert loading.stdout.readline() == b"simulated: loading weights\n"
    loading.terminate()
    loading.communicate(timeout=10)
    assert loading.returncode == 0
