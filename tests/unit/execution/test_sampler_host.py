"""The sampler's lease: an orphan stops polling, and goes on when somebody fetches again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from failing_store import wait_until
from submission import RECORDING

from llem_ray.execution.sampler_host import SamplerHost

LEASE_S = 0.3


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SamplerHost:
    (tmp_path / "recording.csv").write_text(RECORDING)
    monkeypatch.setenv("LLEM_RAY_REPLAY", str(tmp_path / "recording.csv"))
    monkeypatch.setenv("LLEM_RAY_REPLAY_LOOP", "1")
    return SamplerHost(["replay"], 20.0, lease_s=LEASE_S)


def rows(host: SamplerHost, after_seq: int) -> tuple[int, int]:
    """Rows that came, and the number of the last batch."""
    batches = host.fetch(after_seq, 1).batches
    return sum(map(len, batches)), max((batch.seq for batch in batches), default=after_seq)


def test_a_sampler_whose_lease_ran_out_polls_again_once_it_is_asked(host: SamplerHost) -> None:
    """The run driver was suspended (Ctrl-Z), or its disk was slow: the rest of the sweep must not go unmeasured."""
    host.describe()
    _, last = rows(host, 0)
    wait_until(lambda: any("lease" in note for note in host.describe().notes))
    _, last = rows(host, last)
    wait_until(lambda: rows(host, last)[0] > 0)
    host.close()


def test_a_closed_sampler_stays_closed(host: SamplerHost) -> None:
    host.describe()
    host.close()
    _, last = rows(host, 0)
    time.sleep(LEASE_S / 2)
    assert rows(host, last) == (0, last)
