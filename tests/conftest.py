"""For all tests: what is left to the garbage collector is told in the module that left it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("backend_contract")


def pytest_collection_finish() -> None:
    """What was imported until now stays: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Libraries that count their objects at the end find them collected."""
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """An open file or socket is an error once it is collected: in this module, and not by chance in another."""
    yield
    gc.collect()
