"""Hints name a command that works: llem-ray is on no package index."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from llem_ray.core import plugins
from llem_ray.core.plugins import EXTRAS, install_command


@pytest.mark.parametrize("extra", [*EXTRAS.values(), "datasets", "peft", "bitsandbytes"])
def test_the_command_installs_an_extra_of_this_checkout(extra: str) -> None:
    *command, target = shlex.split(install_command(extra))
    assert command == ["pip", "install"]
    checkout, _, wanted = target.rstrip("]").partition("[")
    assert wanted == extra
    assert f"\n{extra} = [" in (Path(checkout) / "pyproject.toml").read_text()


def test_where_there_is_no_checkout_one_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "__file__", str(tmp_path / "llem_ray/core/plugins.py"))
    assert install_command("transformers", "peft") == "pip install '.[transformers,peft]' in a checkout of llem-ray"
