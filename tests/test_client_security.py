"""Security of the client: where tokens and certificates come from, where they go, and where they never show."""

from __future__ import annotations

import copy
import logging
import multiprocessing
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from loss_client import RemoteCrossEncoder, RerankerClient
from loss_client.client.addresses import parse_addresses
from loss_client.client.errors import RerankerError, RerankerRequestError, RerankerUnavailableError

from .certificates import Authority
from .stub_server import Abort, StubServer, hash_scores

TOKEN, OTHER = "token-of-the-tests-0123456789", "other-token-0123456789"
VARIABLES = ("TOKEN", "TOKEN_FILE", "TLS_CA", "TLS_CERT", "TLS_KEY")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(f"RERANKER_CLIENT_{name}", raising=False)


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    return path


@pytest.fixture
def server() -> Iterator[StubServer]:
    with StubServer() as server:
        yield server


def sent(server: StubServer, client: RerankerClient) -> list[Any]:
    """What one job sends as ``authorization``."""
    before = len(server.streams)
    np.testing.assert_array_equal(client.score_grid(["q"], ["d"]), hash_scores(["q"], ["d"]))
    assert len(server.streams) > before
    client.score_pairs([("q", "d"), ("q", "e")], max_length=before + 1)
    return [stream.metadata.get("authorization") for stream in server.streams[before:]]


def test_a_token_is_sent_from_argument_file_or_variable(
    server: StubServer, token_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*expected: str | None, **arguments: Any) -> None:
        with RerankerClient(server.target, metadata=[("x-mine", "1")], **arguments) as client:
            assert set(sent(server, client)) == set(expected)
            assert server.streams[-1].metadata["x-mine"] == "1"

    check(None)
    check(f"Bearer {TOKEN}", token=TOKEN)
    check(f"Bearer {TOKEN}", token_file=token_file)
    check(f"Bearer {TOKEN}", token_file=str(token_file))
    monkeypatch.setenv("RERANKER_CLIENT_TOKEN_FILE", str(token_file))
    check(f"Bearer {TOKEN}")
    monkeypatch.setenv("RERANKER_CLIENT_TOKEN", OTHER)
    check(f"Bearer {OTHER}")
    check(f"Bearer {TOKEN}", token=TOKEN)
    check(f"Bearer {TOKEN}", token_file=token_file)
    with RemoteCrossEncoder(server.target) as model:
        model.predict([("q", "d"), ("r", "e")])
    assert server.streams[-1].metadata["authorization"] == f"Bearer {OTHER}"


def test_a_changed_token_file_is_read_again(server: StubServer, token_file: Path) -> None:
    with RerankerClient(server.target, token_file=token_file) as client:
        assert f"Bearer {TOKEN}" in sent(server, client)
        token_file.write_text(OTHER)
        assert sent(server, client)[0] == f"Bearer {OTHER}"
        token_file.unlink()
        with pytest.raises(RerankerError, match="cannot be read: No such file"):
            client.score_grid(["q"], ["d"])


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("localhost:1", True),
        ("LOCALHOST:1", True),
        ("127.0.0.1:1", True),
        ("127.8.0.1:1", True),
        ("[::1]:1", True),
        ("grpc://127.0.0.1:1", True),
        ("unix:run/a", True),
        ("unix-abstract:a", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv6:[::1]:1", True),
        ("dns:///localhost:1", True),
        ("dns://8.8.8.8/localhost:1", True),
        ("dns:localhost:1", True),
        ("ipv4:127.0.0.1:1,10.0.0.7:1", False),
        ("dns:1", False),
        ("dns:///gpu:1", False),
        ("localhost.example.org:1", False),
        ("127.0.0.1.example.org:1", False),
        ("0.0.0.0:1", False),
        ("gpu:1", False),
        ("vsock:2:1", False),
        ("xds:///localhost:1", False),
    ],
)
def test_a_token_is_not_sent_to_another_machine_without_tls(address: str, local: bool) -> None:
    assert parse_addresses(address)[0].local is local
    if local:
        RerankerClient(address, token=TOKEN).close()
        return
    with pytest.raises(ValueError, match="write the address as 'grpcs://host:port'") as caught:
        RerankerClient(address, token=TOKEN)
    assert TOKEN not in str(caught.value)
    RerankerClient(address, token=TOKEN, plaintext_token=True).close()
    RerankerClient(address).close()


def test_one_open_target_of_a_list_is_enough_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANKER_CLIENT_TOKEN", TOKEN)
    with pytest.raises(ValueError, match="RERANKER_CLIENT_TOKEN is given, but gpu:2 is reached without TLS"):
        RerankerClient(["grpcs://gpu:1", "gpu:2", "localhost:3"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"token": ""}, "the argument token: a token is one word"),
        ({"token": f"{TOKEN} {TOKEN}"}, "a token is one word"),
        ({"token": f"{TOKEN}ä"}, "a token is one word"),
        ({"token": TOKEN, "token_file": "x"}, "give one of them"),
        ({"token_file": "missing"}, "token_file missing cannot be read"),
        ({"client_certificate": b"x"}, "needs its private key"),
        ({"client_key": b"x"}, "needs its private key"),
        ({"root_certificates": b"x"}, "root_certificates is not in PEM format"),
        ({"root_certificates": "missing"}, "root_certificates 'missing' cannot be read"),
        ({"client_certificate": b"x", "client_key": TOKEN.encode()}, "client_key is not in PEM format"),
    ],
)
def test_wrong_arguments_are_errors_without_secrets(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        RerankerClient("grpcs://localhost:1", **arguments)
    assert TOKEN not in str(caught.value)
    assert caught.value.__context__ is None or TOKEN not in str(caught.value.__context__)


@pytest.mark.parametrize("name", ["root_certificates", "client_certificate", "client_key"])
def test_certificates_without_tls_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} .* given but no address uses TLS"):
        RerankerClient("localhost:1", **{name: b"-----BEGIN "})


def test_tls_and_mutual_tls_from_bytes_files_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority, stranger = Authority(tmp_path / "ours"), Authority(tmp_path / "strange")
    cert, key = authority.issue("server")
    client_cert, client_key = authority.issue("client", "trainer@example.org")
    pairs = [(key.read_bytes(), cert.read_bytes())]
    credentials = grpc.ssl_server_credentials(pairs, authority.ca.read_bytes(), require_client_auth=True)
    with StubServer(credentials=credentials) as server:
        address = f"grpcs://{server.target}"
        files = {"root_certificates": authority.ca, "client_certificate": client_cert, "client_key": client_key}
        for given in files, {name: path.read_bytes() for name, path in files.items()}:
            with RerankerClient(address, token=TOKEN, **given) as client:
                assert f"Bearer {TOKEN}" in sent(server, client)
        strange = stranger.issue("client", "trainer@example.org")
        for wrong in {"root_certificates": authority.ca}, {**files, **dict(zip(list(files)[1:], strange, strict=True))}:
            with RerankerClient(address, timeout=0.5, **wrong) as client, pytest.raises(RerankerError):
                client.model_info()
        with RerankerClient(address, timeout=3, **{**files, "root_certificates": stranger.ca}) as client:
            with pytest.raises(RerankerUnavailableError, match="RERANKER_CLIENT_TLS_CA"):
                client.model_info()
        for name, path in zip(("TLS_CA", "TLS_CERT", "TLS_KEY"), files.values(), strict=True):
            monkeypatch.setenv(f"RERANKER_CLIENT_{name}", str(path))
        with RerankerClient(address) as client:
            sent(server, client)


def test_a_refused_token_ends_the_call_at_once_and_says_what_to_do(token_file: Path) -> None:
    async def refuse(*_: object) -> None:
        raise Abort(grpc.StatusCode.UNAUTHENTICATED, "the token is not in force")

    calls = {
        "this client has no token": {},
        "this client sent the argument token": {"token": TOKEN},
        "this client sent the token of token_file": {"token_file": token_file},
    }
    with StubServer(on_request=refuse) as server:
        for words, arguments in calls.items():
            with RerankerClient(server.target, timeout=60, **arguments) as client:
                with pytest.raises(RerankerRequestError, match=words) as caught:
                    client.rerank("q", ["d"])
            assert caught.value.code is grpc.StatusCode.UNAUTHENTICATED
            assert server.target in str(caught.value)
            assert "not in force" in str(caught.value)
            assert TOKEN not in str(caught.value)


def test_secrets_show_nowhere(
    server: StubServer,
    token_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, key = Authority(tmp_path / "ours").issue("client")
    caplog.set_level(logging.DEBUG)
    argument = RerankerClient(server.target, token=TOKEN, metadata=[("x-secret", OTHER)])
    file = RerankerClient(server.target, token_file=token_file)
    monkeypatch.setenv("RERANKER_CLIENT_TOKEN", TOKEN)
    variable = RerankerClient(server.target)
    cert = key.with_suffix(".pem")
    keyed = RerankerClient("grpcs://localhost:1", client_certificate=cert.read_bytes(), client_key=key.read_bytes())
    with argument, file, variable, keyed:
        for client in argument, file, variable:
            assert f"Bearer {TOKEN}" in sent(server, client)
        for client in argument, file, variable, keyed:
            shown = f"{client!r} {client} {client.__dict__} {client._settings!r}"
            assert TOKEN not in shown
            assert OTHER not in shown
            assert "PRIVATE KEY" not in shown
        # Files and variables are read again by the copy; an argument has nowhere else to come from.
        for client in file, variable:
            assert TOKEN.encode() not in pickle.dumps(client)
            with pickle.loads(pickle.dumps(client)) as again:
                assert f"Bearer {TOKEN}" in sent(server, again)
        for client in argument, keyed:
            with pytest.raises(TypeError, match="token_file"):
                pickle.dumps(client)
            copy.deepcopy(client).close()
    assert TOKEN not in caplog.text


def report(client: RerankerClient) -> None:
    with client:
        client.score_grid(["q"], ["spawned"])


def test_a_spawned_process_gets_the_token(server: StubServer) -> None:
    with RerankerClient(server.target, token=TOKEN) as client:
        process = multiprocessing.get_context("spawn").Process(target=report, args=(client,))
        process.start()
        process.join(60)
    assert process.exitcode == 0
    assert server.streams[-1].metadata["authorization"] == f"Bearer {TOKEN}"
