"""Security of the server: TLS, tokens, their rotation, request ids, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from loss_client import RerankerClient
from reranker.v1 import reranker_pb2 as pb
from reranker.v1 import reranker_pb2_grpc as rpc
from reranker_service.security import Guard, SecurityError
from reranker_service.security.exposure import is_loopback
from reranker_service.security.tokens import Tokens
from reranker_service.settings import Settings

from .certificates import Authority, bearer, channel
from .servers import ServerProcess
from .test_readme import GRPCURL, ROOT

PLAIN, HASHED, REMOVED = "plain-token-0123456789", "hashed-token-0123456789", "removed-token-0123456789"
MESSAGE = pb.RerankRequest(query="a query", documents=["one", "two"])
OPEN = pb.RerankStreamRequest(open=pb.StreamOpen())


def token_lines(*more: str) -> str:
    digest = hashlib.sha256(HASHED.encode()).hexdigest()
    return "\n".join(["# tokens of the tests", "", f"plain {PLAIN}", f"hashed sha256:{digest}", *more, ""])


def write_tokens(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


CALLS: dict[str, Callable[[rpc.RerankerServiceStub, tuple[tuple[str, str], ...]], object]] = {
    "Rerank": lambda stub, metadata: stub.Rerank.with_call(MESSAGE, metadata=metadata, timeout=30)[1],
    "RerankBatch": lambda stub, metadata: stub.RerankBatch.with_call(
        pb.RerankBatchRequest(requests=[MESSAGE]), metadata=metadata, timeout=30
    )[1],
    "RerankStream": lambda stub, metadata: drained(stub.RerankStream(iter([OPEN]), metadata=metadata, timeout=30)),
    "GetModelInfo": lambda stub, metadata: stub.GetModelInfo.with_call(
        pb.GetModelInfoRequest(), metadata=metadata, timeout=30
    )[1],
}


def drained(stream: object) -> object:
    assert list(stream)  # the server has opened the stream
    return stream


def code_of(call: Callable[[], object]) -> grpc.StatusCode:
    try:
        call()
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


class Secured(NamedTuple):
    """A server, and what a right client needs."""

    server: ServerProcess
    tokens: Path
    ca: Path | None
    client: tuple[Path, Path] | None
    cert: tuple[Path, Path] | None

    def channel(self, **other: object) -> grpc.Channel:
        return channel(self.server.address, **{"ca": self.ca, "client": self.client, **other})


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module", params=["plaintext", "tls", "mutual"])
def secured(
    request: pytest.FixtureRequest,
    authority: Authority,
    cross_encoder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Secured]:
    """A server with tokens, from whose file one has been removed while it ran."""
    tokens = write_tokens(tmp_path_factory.mktemp("tokens") / "tokens", token_lines(f"removed {REMOVED}"))
    flags = ["--token-file", str(tokens), "--metrics-port", "0"]
    cert = client = None
    if request.param != "plaintext":
        cert = authority.issue(f"server-{request.param}")
        flags += ["--tls-cert", str(cert[0]), "--tls-key", str(cert[1])]
    if request.param == "mutual":
        client = authority.issue("client", "trainer@example.org")
        flags += ["--tls-client-ca", str(authority.ca)]
    with ServerProcess("--model", str(cross_encoder), *flags, module="tests.holding") as server:
        one = Secured(server, tokens, authority.ca if cert else None, client, cert)
        with one.channel() as open_channel:
            info = rpc.RerankerServiceStub(open_channel).GetModelInfo
            info(pb.GetModelInfoRequest(), metadata=bearer(REMOVED), timeout=30)
        write_tokens(tokens, token_lines())
        server.line("files read again")
        yield one


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("token", "code", "words"),
    [
        (None, grpc.StatusCode.UNAUTHENTICATED, "the call has no token: send it as metadata 'authorization"),
        ("wrong-token-0123456789", grpc.StatusCode.UNAUTHENTICATED, "not in force"),
        (REMOVED, grpc.StatusCode.UNAUTHENTICATED, "was removed from the server's token file"),
        (PLAIN, grpc.StatusCode.OK, ""),
        (HASHED, grpc.StatusCode.OK, ""),
    ],
    ids=["no", "wrong", "removed", "plain", "hashed"],
)
def test_every_rpc_needs_a_token_in_force(
    secured: Secured, name: str, token: str | None, code: grpc.StatusCode, words: str
) -> None:
    with secured.channel() as open_channel:
        stub = rpc.RerankerServiceStub(open_channel)
        if code is grpc.StatusCode.OK:
            assert CALLS[name](stub, bearer(token)).code() is code
            return
        with pytest.raises(grpc.RpcError) as caught:
            CALLS[name](stub, bearer(token))
        assert caught.value.code() is code
        assert words in caught.value.details()
        assert dict(caught.value.trailing_metadata())["x-request-id"]


def test_health_needs_no_token_and_reflection_does(secured: Secured) -> None:
    with secured.channel() as open_channel:
        health = health_pb2_grpc.HealthStub(open_channel)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=30).status == 1
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=30)
        assert next(watch).status == 1
        watch.cancel()
        reflect = reflection_pb2_grpc.ServerReflectionStub(open_channel).ServerReflectionInfo
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        assert code_of(lambda: list(reflect(iter([asked]), timeout=30))) is grpc.StatusCode.UNAUTHENTICATED
        (answer,) = reflect(iter([asked]), metadata=bearer(PLAIN), timeout=30)
        assert "reranker.v1.RerankerService" in str(answer)
        unknown = open_channel.unary_unary("/no.Such/Method")
        assert code_of(lambda: unknown(b"", timeout=30)) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", PLAIN),),
        (("authorization", f"Basic {PLAIN}"),),
        (("authorization", "Bearer"),),
        (("authorization", "Bearer "),),
        bearer(PLAIN) * 2,
        (("authorization-bin", PLAIN.encode()),),
        bearer(PLAIN + "x"),
        bearer(PLAIN[:-1]),
        bearer(hashlib.sha256(HASHED.encode()).hexdigest()),
        bearer(f"sha256:{hashlib.sha256(HASHED.encode()).hexdigest()}"),
    ],
)
def test_nothing_but_one_bearer_token_passes(secured: Secured, metadata: tuple[tuple[str, str], ...]) -> None:
    with secured.channel() as open_channel:
        stub = rpc.RerankerServiceStub(open_channel)
        assert code_of(lambda: CALLS["GetModelInfo"](stub, metadata)) is grpc.StatusCode.UNAUTHENTICATED


def test_a_refused_stream_that_sends_nothing_ends_at_once(secured: Secured) -> None:
    with secured.channel() as open_channel:
        endless = (pb.RerankStreamRequest() for _ in iter(lambda: secured.server.wait(), None))
        call = rpc.RerankerServiceStub(open_channel).RerankStream(endless, timeout=30)
        assert code_of(lambda: next(call)) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("name", CALLS)
def test_without_the_right_certificates_no_rpc_gets_through(
    secured: Secured, stranger: Authority, name: str, tmp_path: Path
) -> None:
    if secured.ca is None:
        pytest.skip("plaintext")
    wrong: list[dict[str, object]] = [{"ca": None, "client": None}, {"ca": stranger.ca}]
    if secured.client is not None:
        wrong += [{"client": None}, {"client": stranger.issue("client", "trainer@example.org")}]
    for other in wrong:
        with secured.channel(**other) as open_channel:
            stub = rpc.RerankerServiceStub(open_channel)
            # A token that is in force helps no client without the right certificates.
            assert code_of(lambda stub=stub: CALLS[name](stub, bearer(PLAIN))) is grpc.StatusCode.UNAVAILABLE


def test_grpcurl_needs_the_token_and_the_certificates(secured: Secured) -> None:
    tls = ["-plaintext"]
    if secured.ca is not None:
        tls = ["-cacert", str(secured.ca)]
        if secured.client is not None:
            tls += ["-cert", str(secured.client[0]), "-key", str(secured.client[1])]

    def grpcurl(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [
            str(GRPCURL),
            *arguments,
            "-max-time",
            "30",
            secured.server.address,
            "reranker.v1.RerankerService/Rerank",
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    request = ["-d", '{"query": "a", "documents": ["b"]}']
    # -rpc-header counts for the call alone, -H for reflection too.
    answered = grpcurl(*tls, "-H", f"authorization: Bearer {HASHED}", *request)
    assert json.loads(answered.stdout)["results"][0]["index"] == 0, answered.stderr
    refused = grpcurl(*tls, *request)
    assert "has no token: send it as metadata" in refused.stderr
    assert refused.returncode != 0


def test_the_metrics_page_has_the_same_protection(secured: Secured) -> None:
    address = re.search(r"metrics=(\S+)", secured.server.line("metrics="))[1]

    def page(token: str | None, scheme: str = "https" if secured.ca else "http") -> str:
        context = None
        if scheme == "https":
            context = ssl.create_default_context(cafile=str(secured.ca))
            if secured.client is not None:
                context.load_cert_chain(*map(str, secured.client))
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        asked = urllib.request.Request(f"{scheme}://{address}/metrics", headers=headers)
        with urllib.request.urlopen(asked, timeout=30, context=context) as response:
            return response.read().decode()

    for token in (None, "wrong-token-0123456789", REMOVED):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            page(token)
    text = page(PLAIN)
    assert 'reranker_requests_total{code="UNAUTHENTICATED",rpc="Rerank"}' in text
    if secured.ca is not None:
        with pytest.raises(OSError):  # noqa: PT011 - reset or a wrong reply: it depends on the moment
            page(PLAIN, "http")
    if secured.client is not None:
        context = ssl.create_default_context(cafile=str(secured.ca))
        with pytest.raises(OSError):  # noqa: PT011
            urllib.request.urlopen(f"https://{address}/metrics", timeout=30, context=context).read()


def test_a_refusal_is_logged_without_the_token(secured: Secured) -> None:
    with secured.channel() as open_channel:
        stub = rpc.RerankerServiceStub(open_channel)
        assert code_of(lambda: CALLS["Rerank"](stub, bearer("wrong-token-0123456789"))) is not grpc.StatusCode.OK
    assert "code=UNAUTHENTICATED" in secured.server.line("call refused")
    written = "\n".join(secured.server.lines)
    assert not any(token in written for token in (PLAIN, HASHED, REMOVED, "wrong-token"))


def test_certificate_and_tokens_change_while_the_server_runs(
    authority: Authority, cross_encoder: Path, tmp_path: Path
) -> None:
    cert, key = authority.issue("rotated")
    tokens = write_tokens(tmp_path / "tokens", f"a {PLAIN}\n")
    flags = ["--model", str(cross_encoder), "--token-file", str(tokens), "--tls-cert", str(cert), "--tls-key", str(key)]
    with ServerProcess(*flags, module="tests.holding") as server:
        host, _, port = server.address.rpartition(":")

        def wait(words: str, change: Callable[[], object]) -> str:
            count = len(server.lines)
            change()
            return server.wait_for(re.escape(words), after=count).string

        def presented() -> str:
            return ssl.get_server_certificate((host, int(port)), timeout=30)

        def answers(token: str) -> bool:
            with channel(server.address, authority.ca) as open_channel:
                stub = rpc.RerankerServiceStub(open_channel)
                return code_of(lambda: CALLS["GetModelInfo"](stub, bearer(token))) is grpc.StatusCode.OK

        old_cert, old_key = cert.read_text(), key.read_text()
        assert presented().split() == old_cert.split()
        wait("--tls-cert --tls-key", lambda: authority.issue("rotated"))
        assert presented().split() == cert.read_text().split() != old_cert.split()
        assert answers(PLAIN)

        newest = cert.read_text()
        line = wait("those read before stay in force", lambda: key.write_text(old_key))  # of the first certificate
        assert "--tls-key" in line
        assert presented().split() == newest.split()
        wait("those read before stay in force", key.unlink)
        assert answers(PLAIN)
        wait("--tls-cert --tls-key", lambda: (cert.write_text(old_cert), key.write_text(old_key)))
        assert presented().split() == old_cert.split()

        line = wait("those read before stay in force", lambda: tokens.write_text(f"a {PLAIN}\nb short\n"))
        assert "line 2" in line
        assert "short" not in line.partition("reason=")[2].replace("shorter", "")
        assert answers(PLAIN)
        wait("flags=--token-file", lambda: tokens.write_text(f"a {HASHED}\n"))
        assert not answers(PLAIN)
        assert answers(HASHED)
        wait("holds no token; all calls are refused", lambda: tokens.write_text("# none\n"))
        assert not answers(HASHED)


@pytest.mark.parametrize("asked", ["client-id:7", "", "two words", "x" * 129, None])
def test_every_call_has_a_request_id(cross_encoder_server: ServerProcess, asked: str | None) -> None:
    metadata = () if asked is None else (("x-request-id", asked),)
    with grpc.insecure_channel(cross_encoder_server.address) as open_channel:
        stub = rpc.RerankerServiceStub(open_channel)
        for call in CALLS.values():
            ended = call(stub, metadata)
            (given,) = (value for key, value in ended.trailing_metadata() if key == "x-request-id")
            assert given == asked if asked == "client-id:7" else re.fullmatch("[0-9a-f]{32}", given)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Rerank(pb.RerankRequest(), metadata=metadata, timeout=30)
        trailers = dict(caught.value.trailing_metadata())
        assert {"x-request-id", "grpc-status-details-bin"} <= set(trailers)
        health = health_pb2_grpc.HealthStub(open_channel).Check
        _, ended = health.with_call(health_pb2.HealthCheckRequest(), metadata=metadata, timeout=30)
        assert "x-request-id" in dict(ended.trailing_metadata())


def test_the_request_id_is_in_the_log_lines_of_the_call(secured: Secured) -> None:
    with secured.channel() as open_channel:
        stub = rpc.RerankerServiceStub(open_channel)
        count = len(secured.server.lines)
        metadata = (("x-request-id", "find-me"),)
        # At most one refusal a second is logged.
        while not any("call refused" in line for line in secured.server.lines[count:]):
            assert code_of(lambda: CALLS["Rerank"](stub, metadata)) is grpc.StatusCode.UNAUTHENTICATED
    assert "request_id=find-me" in next(line for line in secured.server.lines[count:] if "call refused" in line)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.7", False),
        ("fe80::1%eth0", False),
        ("no-such-host.invalid", False),
        ("", False),
    ],
)
def test_loopback_addresses(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], ["--tls-cert, --tls-key, --token-file", "--tls-client-ca", "--insecure-network"]),
        (["--token-file", "TOKENS"], ["give --tls-cert and --tls-key"]),
        (["--tls-cert", "CERT", "--tls-key", "KEY"], ["give --token-file"]),
    ],
)
def test_beyond_loopback_an_open_server_does_not_listen(
    authority: Authority, tmp_path: Path, flags: list[str], words: list[str]
) -> None:
    cert, key = authority.issue("server")
    tokens = write_tokens(tmp_path / "tokens", token_lines())
    named = {"TOKENS": str(tokens), "CERT": str(cert), "KEY": str(key)}
    with ServerProcess("--host", "0.0.0.0", *(named.get(flag, flag) for flag in flags), ready=False) as server:
        line = server.line("cannot start securely")
        assert all(word in line for word in words), line
        assert server.wait() == 2
        assert not any("event=listening" in line or "event=metrics" in line for line in server.lines)


def test_what_protects_or_says_so_may_listen_beyond_loopback(authority: Authority, tmp_path: Path) -> None:
    cert, key = authority.issue("server")
    tokens = write_tokens(tmp_path / "tokens", token_lines())
    tls = {"tls_cert": cert, "tls_key": key}
    for protected in (
        {**tls, "token_file": tokens},
        {**tls, "tls_client_ca": authority.ca},
        {"insecure_network": True},
    ):
        Guard(host="0.0.0.0", **protected)
    for one in ({}, tls, {"token_file": tokens}):
        Guard(host="127.0.0.1", **one)
        with pytest.raises(SecurityError):
            Guard(host="0.0.0.0", **one)


def test_reflection_is_closed_on_an_insecure_network_unless_it_is_asked_for(cross_encoder: Path) -> None:
    flags = ["--model", str(cross_encoder), "--host", "0.0.0.0", "--insecure-network"]
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    for more, code in ([], grpc.StatusCode.UNIMPLEMENTED), (["--reflection"], grpc.StatusCode.OK):
        with ServerProcess(*flags, *more, module="tests.holding") as server:
            assert "it is not protected" in server.line("level=warning")
            address = server.address.replace("0.0.0.0", "127.0.0.1")
            with grpc.insecure_channel(address) as open_channel:
                reflect = reflection_pb2_grpc.ServerReflectionStub(open_channel).ServerReflectionInfo
                assert code_of(lambda reflect=reflect: list(reflect(iter([asked]), timeout=30))) is code


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"tls_cert": "CERT"}, "--tls-cert is given without --tls-key"),
        ({"tls_key": "KEY"}, "--tls-key is given without --tls-cert"),
        ({"tls_client_ca": "CERT"}, "--tls-client-ca is given without --tls-cert and --tls-key"),
        ({"tls_cert": "CERT", "tls_key": "missing"}, "--tls-key .*missing: cannot be read: No such file"),
        ({"tls_cert": "CERT", "tls_key": "OTHER"}, "not a certificate and its key, in PEM format"),
        ({"tls_cert": "text", "tls_key": "KEY"}, "not a certificate and its key, in PEM format"),
        ({"tls_cert": "CERT", "tls_key": "SECRET"}, "the private key has a passphrase"),
        ({"tls_cert": "CERT", "tls_key": "KEY", "tls_client_ca": "text"}, "--tls-client-ca .*holds no certificates"),
        ({"token_file": "missing"}, "--token-file .*missing: cannot be read"),
        ({"token_file": "directory"}, "--token-file .*directory: cannot be read"),
    ],
)
def test_wrong_files_and_flags_are_errors_at_the_start(
    authority: Authority, tmp_path: Path, flags: dict[str, str], words: str
) -> None:
    cert, key = authority.issue("server")
    _, other = authority.issue("other")
    (tmp_path / "text").write_text("no certificate")
    (tmp_path / "directory").mkdir()
    secret = tmp_path / "secret.key"
    command = ["openssl", "ec", "-aes256", "-passout", "pass:word", "-in", str(key), "-out", str(secret)]
    subprocess.run(command, check=True, capture_output=True)
    named = {"CERT": cert, "KEY": key, "OTHER": other, "SECRET": secret}
    with pytest.raises(SecurityError, match=words):
        Guard(host="127.0.0.1", **{flag: named.get(file, tmp_path / file) for flag, file in flags.items()})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no token"),
        ("# a comment\n\n", "holds no token"),
        (PLAIN, "line 1: has 1 words"),
        (f"a {PLAIN}\nb {HASHED} c", "line 2: has 3 words"),
        (f"a/b {PLAIN}", "the name must be"),
        ("a 0123456789", "a token must be 16 to 512"),
        ("a 0123456789äöü0123456789", "a token must be 16 to 512"),
        ("a sha256:0123", "64 hexadecimal digits"),
        (b"a \xff\xfe", "not UTF-8"),
    ],
)
def test_wrong_token_files_are_refused_without_showing_their_tokens(
    tmp_path: Path, text: str | bytes, words: str
) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SecurityError, match=words) as caught:
        Tokens(path)
    assert not any(token in str(caught.value) for token in (PLAIN, HASHED, "0123456789"))


def test_a_token_has_the_name_of_its_line(tmp_path: Path) -> None:
    digest = hashlib.sha256(HASHED.encode()).hexdigest()
    tokens = Tokens(write_tokens(tmp_path / "tokens", f"a {PLAIN}\nb sha256:{digest.upper()}\na {REMOVED}\r\n"))
    assert [tokens.find(one) for one in (PLAIN, HASHED, REMOVED, "", "ä", "\udcff")] == [
        "a",
        "b",
        "a",
        None,
        None,
        None,
    ]


def test_a_token_file_that_every_user_can_read_is_a_warning(tmp_path: Path) -> None:
    path = write_tokens(tmp_path / "tokens", token_lines())
    with structlog.testing.capture_logs() as lines:
        Tokens(path)
        assert lines == []
        path.chmod(0o644)
        Tokens(path)
    assert [line["log_level"] for line in lines] == ["warning"]
    assert "chmod 600" in lines[0]["event"]


def test_the_clients_variables_are_none_of_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RERANKER_CLIENT_TOKEN", PLAIN)
    monkeypatch.setenv("RERANKER_CLIENT_TOKEN_FILE", "missing")
    assert Settings().token_file is None


def test_the_commands_of_the_documentation_work(cross_encoder: Path, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    authority, tokens, serving, calling = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    (arguments,) = re.findall(r"client = RerankerClient\((.*?)\n\)", text, re.DOTALL)
    # umask counts for the whole shell.
    made = subprocess.run(
        ["bash", "-euc", f"{authority}\n{tokens}"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    flags = shlex.split(serving.replace("\\\n", " "))[1:]
    flags = [str(tmp_path / flag) if (tmp_path / flag).exists() else flag for flag in flags]
    with ServerProcess(*flags, "--model", str(cross_encoder), module="tests.holding") as server:
        address = server.address.replace("0.0.0.0", "127.0.0.1")
        assert "level=warning" not in "\n".join(server.lines)
        command = calling.replace("grpcurl", str(GRPCURL), 1).replace("127.0.0.1:50051", address)
        called = subprocess.run(
            ["bash", "-euc", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert json.loads(called.stdout)["results"], called.stderr
        named = dict(re.findall(r'(\w+)="([^"]+)"', arguments))
        with RerankerClient(
            f"grpcs://{address}", **{name: str(tmp_path / file) for name, file in named.items()}
        ) as client:
            assert len(client.rerank("a query", ["one", "two"])) == 2
            assert len(client.score_grid(["a query"], ["one", "two"])[0]) == 2
