"""The command: what it says at its start, and how it ends with requests in flight."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from latentdiff.cli.serve import main, parse, settings_of
from latentdiff.errors import BAD_INPUT, UserError
from latentdiff.serve.settings import Settings
from tests.serve.serving import wait_until

PATH = "/v1/images/generations"


#: The side of an image that takes long with this model, and may be asked for.
LARGE = 128


@contextmanager
def command(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The server's process, on a free port, and its address once it has said it."""
    with subprocess.Popen(
        [sys.executable, "-m", "latentdiff", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("latentdiff serves on http://127.0.0.1:"), line
            yield process, line.split()[-1]
        finally:
            process.kill()


def figure(address: str, name: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "size"), [(signal.SIGTERM, 32), (signal.SIGINT, 32), (signal.SIGTERM, LARGE)]
)
def test_a_signal_with_requests_in_flight(model: str, number: int, size: int) -> None:
    """What is being made is finished if that is soon; what waits is refused; nothing hangs."""
    with command(model) as (process, address), ThreadPoolExecutor() as pool:

        def ask(side: int) -> Future[httpx.Response]:
            much = {"steps": 150, "n": 8} if side == LARGE else {"steps": 50}
            asked = {"prompt": "a cat", "size": f"{side}x{side}", **much}
            return pool.submit(httpx.post, address + PATH, json=asked, timeout=60)

        made = ask(size)
        wait_until(lambda: figure(address, "latentdiff_running_requests"))
        waits = ask(48)  # of another size, so that it is not made with the first
        wait_until(lambda: figure(address, "latentdiff_waiting_images"))
        process.send_signal(number)
        out, errors = process.communicate(timeout=30)
        assert waits.result().status_code == 503 and "stopping" in waits.result().text
        assert made.result().status_code == (200 if size == 32 else 503)
    assert process.returncode == 0
    assert out.splitlines()[-1] == "stopped." and not errors.strip()
    with pytest.raises(httpx.ConnectError):
        httpx.get(address)


@pytest.mark.slow
def test_the_start_says_how_to_get_in_and_not_the_key(model: str) -> None:
    with command(model, LATENTDIFF_API_KEY="very-secret") as (process, address):
        assert httpx.get(address).status_code == 401
        assert httpx.get(f"{address}/health", auth=("me", "very-secret")).status_code == 200
        assert process.stdout is not None and "password" in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=30)
        assert "very-secret" not in out + errors


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--port", str(port)]) == BAD_INPUT
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and f"port {port}" in errors and "--port" in errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "99999"],
        ["--host", "no.such.host.invalid", "--open"],
        ["--host", "0.0.0.0"],
        ["--api-key", ""],
        ["no/such/model"],
        ["--lora-dir", "no/such/folder"],
    ],
)
def test_a_start_that_cannot_be(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    port = [] if "--port" in arguments else ["--port", "0"]
    assert main([*port, *arguments]) == BAD_INPUT
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and "Traceback" not in errors


@pytest.mark.parametrize(
    ("option", "wrong"),
    [
        ("--batch-size", "0"),
        ("--max-waiting", "0"),
        ("--max-models", "0"),
        ("--max-models", "-1"),
        ("--max-pixels", "0"),
        ("--max-steps", "0"),
        ("--replicas", "0"),
        ("--replicas", "1000000000"),
        ("--idle-minutes", "-1"),
        ("--idle-minutes", "nan"),
        ("--idle-minutes", "1e300"),
        ("--trusted-proxy", "nonsense"),
        ("--trusted-proxy", "10.0.0.300"),
        ("--trusted-proxy", ""),
    ],
)
def test_values_that_no_server_can_have(option: str, wrong: str) -> None:
    with pytest.raises(UserError, match=f"^{option} must be "):
        settings_of(parse([option, wrong]))


def test_values_that_a_server_can_have() -> None:
    given = {"batch_size": 1, "max_waiting": 1, "max_models": 1, "max_pixels": 1, "max_steps": 1}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    options += ["--idle-minutes=0.5", "--trusted-proxy=::1", "--trusted-proxy=10.0.0.0/8"]
    proxies = ("::1", "10.0.0.0/8")
    expected = Settings(**given, idle_minutes=0.5, trusted_proxies=proxies)
    assert settings_of(parse(options)) == expected
    assert settings_of(parse([])) == Settings()


@pytest.mark.parametrize("path", ["paint", "/paint", "/paint/", "paint/"])
def test_a_root_path_has_one_slash(path: str) -> None:
    assert settings_of(parse(["--root-path", path])).root_path == "/paint"
    assert settings_of(parse(["--root-path", "/"])).root_path == ""
