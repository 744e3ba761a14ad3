"""Addresses: the forms that a client understands."""

from __future__ import annotations

import pytest

from loss_client.client.addresses import Address, parse_addresses


@pytest.mark.parametrize(
    ("written", "address", "secure"),
    [
        ("localhost:50051", "localhost:50051", False),
        ("10.0.0.7:1", "10.0.0.7:1", False),
        ("gpu-3.cluster.local:65535", "gpu-3.cluster.local:65535", False),
        ("[::1]:50051", "[::1]:50051", False),
        ("[fe80::1%eth0]:50051", "[fe80::1%eth0]:50051", False),
        ("dns:80", "dns:80", False),  # a host of this name
        ("grpc://gpu:50051", "gpu:50051", False),
        ("grpc://gpu:50051/", "gpu:50051", False),
        ("GRPC://gpu:50051", "gpu:50051", False),
        ("grpcs://gpu:443", "gpu:443", True),
        ("grpcs://[::1]:443", "[::1]:443", True),
        ("dns:///gpu:50051", "dns:///gpu:50051", False),
        ("dns://8.8.8.8/gpu:50051", "dns://8.8.8.8/gpu:50051", False),
        ("dns:gpu:50051", "dns:gpu:50051", False),
        ("ipv4:10.0.0.7:50051,10.0.0.8:50051", "ipv4:10.0.0.7:50051,10.0.0.8:50051", False),
        ("ipv6:[::1]:50051", "ipv6:[::1]:50051", False),
        ("unix:run/reranker.sock", "unix:run/reranker.sock", False),
        ("unix:///run/reranker.sock", "unix:///run/reranker.sock", False),
        ("unix-abstract:reranker", "unix-abstract:reranker", False),
        ("xds:///reranker", "xds:///reranker", False),
    ],
)
def test_right_forms(written: str, address: str, secure: bool) -> None:
    assert parse_addresses(written) == (Address(address, secure),)


@pytest.mark.parametrize(
    "written",
    [
        "",
        "localhost",
        "localhost:",
        ":50051",
        "localhost:0",
        "localhost:65536",
        "localhost:port",
        "local host:50051",
        "::1:50051",
        "http://localhost:50051",
        "https://localhost:50051",
        "tcp://localhost:50051",
        "grpc://",
        "grpc://localhost",
        "grpcs://localhost:443/v1",
        "grpcs://user@localhost:443",
        "grpcs://localhost:443?x=1",
        "dns:///",
        "unix:",
        "xds:///re ranker",
    ],
)
def test_wrong_forms_are_refused_with_the_right_ones(written: str) -> None:
    with pytest.raises(ValueError, match="right forms are 'host:port'") as caught:
        parse_addresses(written)
    assert repr(written) in str(caught.value)


def test_a_list_keeps_its_order() -> None:
    assert parse_addresses(["b:1", "grpcs://a:2"]) == (Address("b:1", False), Address("a:2", True))


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="the list of addresses is empty"):
        parse_addresses([])


def test_what_is_no_string_is_refused() -> None:
    with pytest.raises(TypeError, match="not 50051"):
        parse_addresses(["localhost:50051", 50051])  # type: ignore[list-item]


def test_a_target_prints_as_it_can_be_written() -> None:
    for written in ("a:1", "grpcs://a:1", "unix:/run/a"):
        assert str(*parse_addresses(written)) == written
