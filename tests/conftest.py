import pytest

pytest.register_assert_rewrite("backend_contract")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under pytest-xdist the tests of a file run in one process, and so do those of all labs: some look for what a lab leaves."""
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            name = item.path.name
            item.add_marker(pytest.mark.xdist_group("labs" if name.startswith("test_lab") else str(item.path)))
