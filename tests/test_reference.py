"""The generated pages: every public name, default, RPC, field and command, and the forms that are refused."""

from __future__ import annotations

import inspect
import re

import pytest

import loss_client
from reranker.v1 import reranker_pb2 as pb
from tools.reference.__main__ import ROOT
from tools.reference.commands import commands_page
from tools.reference.contract import contract_page
from tools.reference.docstrings import Parameter, to_markdown
from tools.reference.names import names_page

PROTO = (ROOT / "protos" / "reranker" / "v1" / "reranker.proto").read_text()


def test_the_page_has_every_public_name() -> None:
    headings = re.findall(r"^###? (\w+)$", names_page(ROOT / "loss_client"), flags=re.MULTILINE)
    assert sorted(set(headings) - {"Errors", "Types"}) == sorted(loss_client.__all__)


@pytest.mark.parametrize(
    "name", ["RerankerClient", "RerankerCachedGISTEmbedLoss", "RemoteCrossEncoder", "Distillation"]
)
def test_every_parameter_has_its_default_and_a_meaning(name: str) -> None:
    section = names_page(ROOT / "loss_client").partition(f"## {name}\n")[2].partition("\n### ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| .*? \| (`.*?`|required) \| .{10}", section, flags=re.MULTILINE))
    for parameter in inspect.signature(getattr(loss_client, name)).parameters.values():
        if parameter.default is inspect.Parameter.empty:
            assert rows[parameter.name] == "required"
        else:
            shown = rows[parameter.name].strip("`")
            assert eval(shown) == parameter.default  # an expression of our own source


def test_the_contract_page_has_every_rpc_field_and_value() -> None:
    page = contract_page(PROTO)
    service = pb.DESCRIPTOR.services_by_name["RerankerService"]
    assert set(re.findall(r"^### (\w+)$", page, flags=re.MULTILINE)) == set(service.methods_by_name)
    for name, message in pb.DESCRIPTOR.message_types_by_name.items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| (\d+) \| .*? \| .{10}", section, flags=re.MULTILINE)
        assert rows == [(field.name, str(field.number)) for field in message.fields]
    for name, values in pb.DESCRIPTOR.enum_types_by_name.items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| `(\w+)` \| (\d+) \| .{10}", section, flags=re.MULTILINE)
        assert rows == [(value.name, str(value.number)) for value in values.values]


def test_a_line_of_the_contract_that_is_not_understood_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"line 1 of the contract is not understood: extend Other \{"):
        contract_page("extend Other {\n}\n")


def test_the_commands_have_their_own_help() -> None:
    page = commands_page()
    headings = re.findall(r"^###? (.*)$", page, flags=re.MULTILINE)
    assert set(headings) >= {"reranker-service", "reranker-service check", "python -m loss_client plan"}
    assert page.count("usage: ") == len(headings)


def test_docstrings_become_tables_code_and_text() -> None:
    docstring = inspect.cleandoc("""Score pairs, as :class:`CrossEncoder` does.

    Args:
        pairs: The pairs,
            ``a | b``.

    Example:
        ::

            score([])

        That was all.

    Raises:
        ValueError: There is none.
    """)
    assert to_markdown(docstring, {"pairs": Parameter("list", None)}) == (
        "Score pairs, as `CrossEncoder` does.\n\n"
        "| parameter | type | default | meaning |\n|---|---|---|---|\n"
        "| `pairs` | `list` | required | The pairs, `a | b`. |\n\n"
        "*Example*\n\n```python\nscore([])\n```\n\nThat was all.\n\n"
        "*Raises*\n\n- `ValueError`: There is none."
    )
    with pytest.raises(ValueError, match=r"the docstring describes pairs, but the parameters are \['rows'\]"):
        to_markdown(docstring, {"rows": Parameter("list", None)})
