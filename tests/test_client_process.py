"""RerankerClient and its process: imports, forks, the end of the interpreter, TLS."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import grpc
import numpy as np
import pytest

from loss_client import RerankerClient, RerankerUnavailableError
from tests.stub_server import Gate, ReceivedChunk, ReceivedStream, StubServer, hash_scores, numbered_texts

ROOT = Path(__file__).parent.parent
SECONDS = 60.0


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter; a hang fails the test."""
    return subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )


def test_the_import_needs_neither_training_nor_server_dependencies() -> None:
    done = run(
        """
        import json, sys
        import loss_client
        loss_client.RerankerClient("localhost:1").close()
        loss_client.ScoreMatrix((1, 1))
        print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
        """
    )
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout))
    assert "grpc" in loaded
    unwanted = {"torch", "transformers", "sentence_transformers", "vllm", "datasets", "reranker_service"}
    unwanted |= {"pydantic", "pydantic_settings", "structlog"}
    assert not loaded & unwanted


def test_the_package_has_every_public_name_and_no_other() -> None:
    import loss_client

    for name in loss_client.__all__:
        assert getattr(loss_client, name).__module__.startswith("loss_client") or name in ("Priority", "ScoreType")
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = loss_client.Nothing


def test_a_client_works_on_both_sides_of_a_fork_and_jobs_go_on() -> None:
    never = Gate()
    queries, documents = numbered_texts("query", 16), numbered_texts("document", 16)

    async def hold_later_rows_at_first(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        if stream.number == 0 and queries[0] not in chunk.queries:
            await never.wait()

    with StubServer(on_chunk=hold_later_rows_at_first) as server:
        done = run(
            """
            import json, os, sys
            from loss_client import RerankerClient, RerankerError
            from tests.stub_server import numbered_texts
            queries, documents = numbered_texts("query", 16), numbered_texts("document", 16)
            client = RerankerClient(sys.argv[1])
            matrix = client.one_model().stream_grid(queries, documents, chunk_pairs=16)
            waiting = client.one_model().stream_grid(["waiting"], documents)  # for the job before it
            matrix.rows(0, 4)
            reading, writing = os.pipe()
            if os.fork() == 0:
                scores = client.one_model().stream_grid(["in the child"], documents).result().tolist()
                try:
                    matrix.rows(4, 5)
                    inherited = "readable"
                except RerankerError as error:
                    inherited = str(error)
                client.close()
                os.write(writing, json.dumps([scores, inherited]).encode())
                os._exit(0)
            os.close(writing)
            with os.fdopen(reading) as pipe:
                child = json.load(pipe)
            os.wait()
            result = matrix.result().tolist()
            later = [waiting.result().tolist(), client.score_grid(["later"], ["d"]).tolist()]
            print(json.dumps([child, result, matrix.usage.reconnects, later]))
            """,
            server.target,
        )
        assert done.returncode == 0, done.stderr
        (in_child, inherited), in_parent, reconnects, (waiting, later) = json.loads(done.stdout)
        np.testing.assert_array_equal(np.float32(in_child), hash_scores(["in the child"], documents))
        np.testing.assert_array_equal(np.float32(in_parent), hash_scores(queries, documents))
        np.testing.assert_array_equal(np.float32(waiting), hash_scores(["waiting"], documents))
        np.testing.assert_array_equal(np.float32(later), hash_scores(["later"], ["d"]))
        assert "forked" in inherited
        assert reconnects == 1
        resumed = [stream for stream in server.streams[1:] if queries[4] in stream.texts]
        assert sorted(pair for stream in resumed for pair in stream.pairs()) == sorted(
            (query, document) for query in queries[4:] for document in documents
        )


def test_workers_that_are_forked_while_a_client_is_in_use() -> None:
    with StubServer() as server:
        done = run(
            """
            import multiprocessing, sys
            from loss_client import RerankerClient
            client = RerankerClient(sys.argv[1])
            def work(part):
                return client.score_grid([f"query {part}"], ["d"]).tolist()
            def main():
                print(work(-1))
                with multiprocessing.get_context("fork").Pool(3) as pool:
                    print(pool.map(work, range(6)))
                print(work(-2))
            main()
            """,
            server.target,
        )
    assert done.returncode == 0, done.stderr
    _, parts, _ = map(json.loads, done.stdout.splitlines())
    expected = [hash_scores([f"query {part}"], ["d"]).tolist() for part in range(6)]
    np.testing.assert_array_equal(np.float32(parts), np.float32(expected))


def test_a_child_that_cannot_work_says_so() -> None:
    done = run(
        """
        import os
        from loss_client import RerankerClient, RerankerError
        from loss_client.client import background
        from tests.stub_server import StubServer
        background._quiet_seconds = 0.1
        with StubServer() as server:  # gRPC runs in the process that forks
            if os.fork() == 0:
                try:
                    RerankerClient(server.target).model_info()
                except RerankerError as error:
                    os.write(1, str(error).encode())
                os._exit(0)
            os.wait()
        """
    )
    assert done.returncode == 0, done.stderr
    assert "'spawn' or 'forkserver'" in done.stdout


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)", "del client, matrix"])
def test_the_interpreter_ends_at_once_while_a_job_runs(ending: str) -> None:
    never = Gate()

    async def hold(stream: ReceivedStream, chunk: ReceivedChunk) -> None:
        await never.wait()

    with StubServer(on_chunk=hold) as server:
        done = run(
            f"""
            import sys, threading
            from loss_client import ClientClosedError, RerankerClient
            client = RerankerClient(sys.argv[1])
            matrix = client.stream_grid(["q"], ["d"])
            def wait():
                try:
                    matrix.result()
                except (ClientClosedError, NameError):
                    return
            threading.Thread(target=wait, daemon=True).start()
            client.model_info()
            print("at the end", flush=True)
            {ending}
            """,
            server.target,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "at the end\n", "")
        server.wait_for(lambda: all(stream.ended for stream in server.streams))


def test_tls() -> None:
    key, certificate = self_signed()
    credentials = grpc.ssl_server_credentials([(key, certificate)])
    with StubServer(credentials=credentials) as server:
        with RerankerClient(f"grpcs://{server.target}", root_certificates=certificate) as client:
            np.testing.assert_array_equal(client.score_grid(["q"], ["d"]), hash_scores(["q"], ["d"]))
        with RerankerClient(f"grpcs://{server.target}", timeout=0.5) as client:
            with pytest.raises(RerankerUnavailableError, match="grpcs://"):
                client.model_info()  # no authority that TLS trusts signed the certificate
    with pytest.raises(ValueError, match="no address uses TLS"):
        RerankerClient("localhost:1", root_certificates=certificate)


def self_signed() -> tuple[bytes, bytes]:
    """A private key and a certificate for 127.0.0.1, PEM."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return private, certificate.public_bytes(serialization.Encoding.PEM)
