"""For all tests: what is left to the garbage collector is told in the module that left it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Under pytest-xdist the tests of a file run in one process, and those of all labs: some look for what a lab leaves."""
    from xdist.scheduler import LoadFileScheduling  # noqa: PLC0415 - not installed in every environment

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "labs" if "/test_lab" in file else file

    return ByFile(config, log)


pytest.register_assert_rewrite("backend_contract")


def pytest_collection_finish() -> None:
    """What was imported until now stays: the collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _collected() -> Iterator[None]:
    """An open file or socket is an error once it is collected: in this module, and not by chance in another."""
    yield
    gc.collect()
