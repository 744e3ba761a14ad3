"""Ray Serve application with an engine of fixed speed whose scores have a closed form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest import mock

from ray import serve

from chaos.served import _make_engine
from reranker_service import loading
from reranker_service.ray_app import Reranker, application
from reranker_service.settings import Settings


class FixedSpeed(Reranker):
    """A replica whose ``engine_args`` are those of the engine of fixed speed."""

    def load(self, settings: Settings) -> loading.Loaded:
        """Load the model, with the engine of fixed speed."""
        with mock.patch.multiple(loading, make_engine=_make_engine, check_flags=mock.DEFAULT):
            return loading.load(settings)


def app(arguments: Mapping[str, Any]) -> serve.Application:
    """Make the application; see ``reranker_service.ray_app.application``."""
    return application(FixedSpeed, arguments)
