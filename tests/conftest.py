"""Fixtures that several files share, the marker `slow`, and the option --cuda.

Tests with the marker run only with --slow. With --cuda, the tests that use the fixture `device`
run on the GPU, and no others run."""

import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import pytest
import torch

from desc.esconv import load_dialogues
from desc.judging import endpoint
from desc.modeling import load

sys.path.append(str(Path(__file__).parent.parent))  # the scripts, which some tests import

LONGEST = (
    "test_scripts.py",
    "test_distributed.py",
    "test_device.py",
    "test_tree.py",
    "test_scripts_judged.py",
    "test_checkpoint.py",
    "test_chat.py",
)


def pytest_addoption(parser):
    parser.addoption(
        "--slow",
        action="store_true",
        help="also run the tests that need minutes: on SmolLM2's real weights, on three ranks, …",
    )
    parser.addoption(
        "--cuda",
        action="store_true",
        help="run only the tests that can run on a GPU, and run them there",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "slow: needs minutes, on SmolLM2's weights or three ranks; runs only with --slow"
    )
    if config.getoption("--cuda") and not torch.cuda.is_available():
        raise pytest.UsageError("--cuda: PyTorch finds no GPU here (torch.cuda.is_available())")
    # A warning fails the test, unless an oracle causes it. The last rule that fits wins. On a GPU
    # torch.compile has warnings of its own, which depend on the card.
    severity = "default" if config.getoption("--cuda") else "error"
    for rule in (severity, "ignore:.*deprecated and will be removed in v6:FutureWarning"):
        config.addinivalue_line("filterwarnings", rule)
    # The models are so tiny that more threads would only slow them down.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """The longest files go first, so that no core waits for another at the end."""
    if config.getoption("--cuda"):
        elsewhere = [item for item in items if "device" not in item.fixturenames]
        items[:] = [item for item in items if "device" in item.fixturenames]
        config.hook.pytest_deselected(items=elsewhere)
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --slow"))


@pytest.fixture(autouse=True)
def seed():
    """A test draws the same numbers every time, alone or with other tests."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy():
    """(model, tokenizer), which all tests share. A test that adds adapters needs a copy.deepcopy of
    the model."""
    return load("toy", torch.float32)


@pytest.fixture(scope="session")
def device(request):
    """Where the tests run that can run on a GPU: there with --cuda, otherwise on the CPU."""
    if not request.config.getoption("--cuda"):
        return torch.device("cpu")
    torch.backends.cuda.matmul.allow_tf32 = False  # fp32 is to be compared as fp32
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def toy_on_device(toy, device):
    """`toy` on `device`. On the CPU it is the same model."""
    return toy if device.type == "cpu" else load("toy", torch.float32, device)


@pytest.fixture(scope="session")
def smollm2():
    return load("smollm2", torch.float32)


@pytest.fixture(scope="session")
def sample():
    return load_dialogues(files("desc") / "data" / "sample.json")


@pytest.fixture(scope="session")
def esconv_path():
    """The path of ESConv.json. The split.json of DecoupledESC is beside it. Neither is part of the
    repository."""
    path = Path(os.environ.get("DESC_ESCONV", ""))
    if not path.is_file():
        pytest.skip(
            "set DESC_ESCONV to an ESConv.json that has the DecoupledESC split.json beside it"
        )
    return path


@pytest.fixture
def server(monkeypatch):
    """A server on loopback. It answers each call by the next entry of server.script, and repeats
    the last one. An entry is a text, fields of the choice (finish_reason, message), the bytes of a
    body, a status, perhaps in a tuple with headers and bytes, or a function of the call that gives
    one of these."""
    monkeypatch.setattr(endpoint.time, "sleep", lambda seconds: server.waits.append(seconds))
    monkeypatch.setenv("DESC_API_KEY", "hush")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                server.calls.append((self.headers["Authorization"], body))
                scripted = server.script.pop(0) if len(server.script) > 1 else server.script[0]
            scripted = scripted(body) if callable(scripted) else scripted
            headers, error = {}, b'{"error": "wrong key hush"}'
            if isinstance(scripted, tuple):
                scripted, headers, error = (*scripted, error)[:3]
            message = {
                "role": "assistant",
                "content": scripted if isinstance(scripted, str) else "",
            }
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            answer = {"choices": [choice | (scripted if isinstance(scripted, dict) else {})]}
            answer |= {
                "id": "1",
                "created": 0,
                "model": "m",
                "object": "chat.completion",
                "system_fingerprint": "",
            }
            answer |= {"usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
            data = scripted if isinstance(scripted, bytes) else json.dumps(answer).encode()
            data = error if isinstance(scripted, int) else data
            self.send_response(scripted if isinstance(scripted, int) else 200)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.calls, server.waits, server.script, server.lock = [], [], ["hello"], threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
