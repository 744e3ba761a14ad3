"""Reference of the Python names: signatures, defaults and docstrings of a package's public names, read from its source.

The source is parsed and not imported, so that the page needs neither PyTorch nor a server.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

from tools.reference.docstrings import Parameter, to_markdown


def names_page(package: Path) -> str:
    """Return the page of a package's public names, those of its ``__all__``, in alphabetical order by kind."""
    module = ast.parse((package / "__init__.py").read_text())
    origins = {
        alias.asname or alias.name: statement.module
        for statement in ast.walk(module)
        if isinstance(statement, ast.ImportFrom) and statement.module
        for alias in statement.names
    }
    errors: list[str] = []
    others: list[str] = []
    types: list[str] = []
    for name in _public(module):
        file = package.parent / f"{origins[name].replace('.', '/')}.py"
        body = ast.parse(file.read_text()).body
        found = next(node for node in body if _name(node) == name)
        if isinstance(found, ast.FunctionDef):
            others.append(_function(found, package.name))
        elif isinstance(found, ast.ClassDef):
            (errors if name.endswith("Error") else others).append(_class(found, package.name))
        else:
            following = body[body.index(found) + 1]
            types.append(_alias(name, found, following))
    return (
        "\n\n".join(
            [*others, "## Errors", *(f"#{text}" for text in errors), "## Types", *types],
        )
        + "\n"
    )


def _public(module: ast.Module) -> list[str]:
    assignment = next(node for node in module.body if _name(node) == "__all__")
    assert isinstance(assignment, ast.Assign)
    names: list[str] = ast.literal_eval(assignment.value)
    return sorted(names)


def _name(node: ast.stmt) -> str | None:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return node.name
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return None


def _alias(name: str, node: ast.stmt, following: ast.stmt) -> str:
    assert isinstance(node, ast.Assign)
    text = f"### {name}\n\n```python\n{name} = {ast.unparse(node.value)}\n```"
    if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
        text += f"\n\n{to_markdown(str(following.value.value), {})}"
    return text


def _function(node: ast.FunctionDef, package: str) -> str:
    documented = ast.get_docstring(node)
    if documented is None:
        raise ValueError(f"{node.name} has no docstring")
    return f"## {node.name}\n\n`from {package} import {node.name}`\n\n{_method(node, documented)}"


def _class(node: ast.ClassDef, package: str) -> str:
    methods = [one for one in node.body if isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef)]
    constructor = next((one for one in methods if one.name == "__init__"), None)
    parameters = _parameters(constructor) if constructor else dict(_fields(node))
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    documented = ast.get_docstring(node)
    if documented is None:
        raise ValueError(f"{node.name} has no docstring")
    parts = [
        f"## {node.name}",
        f"`from {package} import {node.name}`" + (f"; a subclass of `{bases}`" if bases else ""),
    ]
    parts.append(to_markdown(documented, parameters, inherits=bool(node.bases)))
    for method in methods:
        docstring = ast.get_docstring(method)
        if not method.name.startswith("_") and docstring is not None:
            parts += [f"### {node.name}.{method.name}", _method(method, docstring)]
    return "\n\n".join(parts)


def _method(method: ast.FunctionDef | ast.AsyncFunctionDef, docstring: str) -> str:
    decorators = {ast.unparse(one) for one in method.decorator_list}
    if "property" in decorators:
        return f"Property: `{ast.unparse(method.returns) if method.returns else 'Any'}`\n\n{to_markdown(docstring, {})}"
    parameters = _parameters(method)
    returns = f" -> {ast.unparse(method.returns)}" if method.returns else ""
    names = ", ".join(name if one.default is None else f"{name}={one.default}" for name, one in parameters.items())
    shown = parameters if "Args:" in docstring else {}
    return f"```python\n{method.name}({names}){returns}\n```\n\n{to_markdown(inspect.cleandoc(docstring), shown)}"


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> dict[str, Parameter]:
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    pairs = [*zip(positional, defaults, strict=True), *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    found = {
        one.arg: Parameter(_source(one.annotation) or "", _source(default))
        for one, default in pairs
        if one.arg != "self"
    }
    for stars, one in (("*", arguments.vararg), ("**", arguments.kwarg)):
        if one is not None:
            found[f"{stars}{one.arg}"] = Parameter(_source(one.annotation) or "", None)
    return found


def _fields(node: ast.ClassDef) -> Iterator[tuple[str, Parameter]]:
    """Yield the fields of a data class."""
    if not any(ast.unparse(one).partition("(")[0] == "dataclass" for one in node.decorator_list):
        return
    for one in node.body:
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and not one.target.id.startswith("_"):
            yield one.target.id, Parameter(ast.unparse(one.annotation), _source(one.value))


def _source(node: ast.expr | None) -> str | None:
    return None if node is None else ast.unparse(node)
