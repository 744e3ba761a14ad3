"""The scripts of docs/slurm.md: their syntax, the flags that they use, and the list of addresses that they make."""

from __future__ import annotations

import re
import subprocess

from reranker_service.settings import Settings

from .pages import DOCS

PAGE = (DOCS / "slurm.md").read_text()
SCRIPTS = re.findall(r"^```(?:ba)?sh\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_scripts_have_no_error_of_syntax() -> None:
    assert len(SCRIPTS) == 6
    for script in SCRIPTS:
        subprocess.run(["bash", "-n", "-c", script], check=True, timeout=10)


def test_the_servers_get_flags_that_they_have() -> None:
    known = {f"--{name.replace('_', '-')}" for name in Settings.model_fields}
    for command in re.findall(r"reranker-service (--.*?)(?:&|;|$)", "\n".join(SCRIPTS), flags=re.MULTILINE):
        assert set(re.findall(r"--[a-z-]+", command)) <= known


def test_the_job_makes_one_address_for_each_server() -> None:
    (job,) = (script for script in SCRIPTS if "#SBATCH hetjob" in script)
    made = job.partition("# Addresses")[2].partition("\n")[2].partition("\nexport MODEL")[0]
    result = subprocess.run(
        ["bash", "-euc", f'scontrol() {{ printf "node7\\nnode8\\n"; }}; {made}; echo "$ADDRESSES"'],
        env={
            "PATH": "/usr/bin:/bin",
            "SERVERS_PER_NODE": "2",
            "FIRST_PORT": "50051",
            "SLURM_JOB_NODELIST_HET_GROUP_1": "",
        },
        capture_output=True,
        text=True,
        timeout=10,
        check=True,
    )
    assert result.stdout == "node7:50051,node7:50052,node8:50051,node8:50052\n"
    plain = re.search(r"printf 'score.*?sed '.*?'", PAGE)
    assert plain is not None
    hosts = subprocess.run(["bash", "-c", plain[0]], capture_output=True, text=True, timeout=10, check=True).stdout
    assert hosts == "score0:50051,score0:50052,score1:50051,score1:50052"
