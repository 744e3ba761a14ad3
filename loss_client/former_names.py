"""Former names of arguments and attributes: they go on working, with a ``DeprecationWarning`` that has the new name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def accept_former_names(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a decorator that accepts keyword arguments under their former names, with a ``DeprecationWarning``.

    The decorated function raises ``TypeError`` for a call that gives an argument under both names.

    Args:
        **names: The present name of each argument by its former name.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for former in kwargs.keys() & names.keys():
                present = names[former]
                if present in kwargs:
                    raise TypeError(f"{present} is given twice, also under its former name {former}.")
                warnings.warn(f"{former} is now named {present}.", DeprecationWarning, stacklevel=2)
                kwargs[present] = kwargs.pop(former)
            return function(*args, **kwargs)

        return call

    return decorate


def former_attribute(former: str, present: str, complement: bool = False) -> Any:
    """Make a property that reads and sets the attribute ``present`` under its name ``former``, with a warning.

    Args:
        former: The former name.
        present: The present name.
        complement: Whether the former attribute was ``1 - present``.
    """

    def warn() -> None:
        named = f"is now 1 - {present}" if complement else f"is now named {present}"
        warnings.warn(f"{former} {named}.", DeprecationWarning, stacklevel=3)

    def convert(value: Any) -> Any:
        return 1 - value if complement and value is not None else value

    def read(owner: object) -> Any:
        warn()
        return convert(getattr(owner, present))

    def write(owner: object, value: Any) -> None:
        warn()
        setattr(owner, present, convert(value))

    return property(read, write, doc=f"Former name of ``{present}``.")
