"""docs/scaling.md and the configuration for Ray agree with the programs that they come from."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from benchmarks import ray_serve
from benchmarks.on_paper import FLEETS, Fleet, ranks_table, table
from benchmarks.scaling import without_tls
from reranker_service.settings import Settings

ROOT = Path(__file__).parent.parent
OF_DEPLOYMENT = {"min_replicas", "max_replicas", "target_pairs"}


@pytest.mark.parametrize("made", [table, ranks_table])
def test_the_page_has_the_calculated_tables(made: object) -> None:
    expected = made()  # type: ignore[operator]
    assert expected in (ROOT / "docs" / "scaling.md").read_text(), f"docs/scaling.md should have:\n{expected}"


def test_the_work_of_a_rank_does_not_grow_with_the_ranks() -> None:
    fleets = [Fleet(65_536, ranks, 512, 8, 172) for ranks in (8, 64, 512)]
    for fewer, more in itertools.pairwise(fleets):
        assert more.pairs * more.ranks == fewer.pairs * fewer.ranks
        assert more.text_bytes <= fewer.text_bytes
        assert more.messages <= fewer.messages
    assert FLEETS["172 an anchor, all servers"].step_seconds == pytest.approx(
        FLEETS["172 an anchor, all servers"].train_seconds, rel=0.01
    )


def test_the_configuration_for_ray_has_settings_of_the_server() -> None:
    (application,) = yaml.safe_load((ROOT / "examples" / "ray_serve.yaml").read_text())["applications"]
    arguments = application["args"]
    Settings(**{name: value for name, value in arguments.items() if name not in OF_DEPLOYMENT})
    assert arguments.keys() >= OF_DEPLOYMENT


def test_the_benchmark_with_ray_has_settings_of_the_server(tmp_path: Path) -> None:
    given = ray_serve.settings(tmp_path, tmp_path, 500.0)
    Settings(**given, preferred_chunk_pairs=4096)


def test_envoy_is_measured_in_plaintext_in_front_of_the_given_servers() -> None:
    given = {
        "admin": {"address": {}},
        "static_resources": {
            "listeners": [{"address": {}, "filter_chains": [{"transport_socket": {}, "filters": []}]}],
            "clusters": [{"load_assignment": {"endpoints": []}}],
        },
    }
    made = without_tls(given, 7, ["127.0.0.1:8", "127.0.0.2:9"])["static_resources"]
    assert made["listeners"][0]["filter_chains"] == [{"filters": []}]
    assert made["listeners"][0]["address"]["socket_address"] == {"address": "127.0.0.1", "port_value": 7}
    ((endpoints),) = [one["lb_endpoints"] for one in made["clusters"][0]["load_assignment"]["endpoints"]]
    ports = [one["endpoint"]["address"]["socket_address"]["port_value"] for one in endpoints]
    assert ports == [8, 9]
