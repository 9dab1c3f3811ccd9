from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from llem_ray.core.errors import PowerPermissionDenied, SourceUnavailable
from llem_ray.power.rapl import RaplSource, find_zones

RANGE_UJ = 262_143_328_850


class Powercap:
    """A powercap tree on disk. ``move`` lets all live counters run, as hardware does, until ``hold``."""

    def __init__(self, root):
        self.root = root
        self.live = []
        self._stop = threading.Event()
        self._thread = None

    def zone(self, folder, name, energy_uj=1_000_000, range_uj=RANGE_UJ, live=True):
        path = self.root / folder
        path.mkdir(parents=True)
        (path / "name").write_text(f"{name}\n")
        (path / "max_energy_range_uj").write_text(f"{range_uj}\n")
        self.set(folder, energy_uj)
        if live:
            self.live.append(folder)

    def set(self, folder, energy_uj):
        # one write of fixed width, in place: a reader never sees half a number
        path = self.root / folder / "energy_uj"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.pwrite(fd, f"{energy_uj:>20}\n".encode(), 0)
        os.close(fd)

    def get(self, folder):
        return int((self.root / folder / "energy_uj").read_text())

    def move(self):
        def run():
            while not self._stop.wait(0.001):
                for folder in self.live:
                    self.set(folder, self.get(folder) + 1000)

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def hold(self):
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


@pytest.fixture
def powercap(tmp_path):
    tree = Powercap(tmp_path)
    yield tree
    tree.hold()


@pytest.fixture
def two_sockets(powercap):
    powercap.zone("intel-rapl:0", "package-0")
    powercap.zone("intel-rapl:0:0", "core")
    powercap.zone("intel-rapl:0:1", "dram")
    powercap.zone("intel-rapl:1", "package-1")
    powercap.zone("intel-rapl:1:0", "dram")
    return powercap


def opened(powercap, **options):
    powercap.move()
    source = RaplSource(powercap.root, **options)
    powercap.hold()
    return source


def test_packages_and_dram_only(two_sockets):
    two_sockets.zone("intel-rapl:2", "psys")
    two_sockets.zone("intel-rapl:0:2", "uncore")
    source = opened(two_sockets)
    assert [(d.uuid, d.scope, d.method) for d in source.devices()] == [
        ("rapl:package-0", "cpu_package", "measured_counter"),
        ("rapl:package-0:dram", "dram", "measured_counter"),
        ("rapl:package-1", "cpu_package", "measured_counter"),
        ("rapl:package-1:dram", "dram", "measured_counter"),
    ]
    assert [s.device_uuid for s in source.read()] == [d.uuid for d in source.devices()]
    source.close()


def test_zones_are_in_numeric_order_and_mirrors_count_once(powercap):
    for n in (10, 2):
        powercap.zone(f"intel-rapl:{n}", f"package-{n}")
    powercap.zone("intel-rapl-mmio:0", "package-2")
    powercap.zone("intel-rapl-mmio:1", "package-3")
    zones = find_zones(powercap.root)
    assert [z.name for z in zones] == ["package-2", "package-10", "package-3"]
    assert zones[0].path == powercap.root / "intel-rapl:2" / "energy_uj"


def test_the_device_tree_shows_the_same_zones_as_the_folder_of_links_into_it(tmp_path):
    """As in sysfs. A container gets the tree: mounted elsewhere the links lead nowhere."""
    tree, links = tmp_path / "devices/virtual/powercap", tmp_path / "class/powercap"
    devices = Powercap(tree)
    devices.zone("intel-rapl/intel-rapl:0", "package-0")
    devices.zone("intel-rapl/intel-rapl:0/intel-rapl:0:0", "core")
    devices.zone("intel-rapl/intel-rapl:0/intel-rapl:0:1", "dram")
    links.mkdir(parents=True)
    for path in tree.rglob("intel-rapl:*"):
        (links / path.name).symlink_to(Path("../..") / path.relative_to(tmp_path))
    names = ["package-0", "package-0:dram"]
    assert [zone.name for zone in find_zones(tree)] == names
    assert [zone.name for zone in find_zones(links)] == names
    elsewhere = tmp_path / "container/host/powercap"
    links.rename(tmp_path / "moved")
    elsewhere.mkdir(parents=True)
    (tmp_path / "moved").rename(elsewhere)
    with pytest.raises(SourceUnavailable, match="RAPL"):
        find_zones(elsewhere)


def test_counter_is_in_mj_and_gives_no_power(two_sockets):
    source = opened(two_sockets)
    two_sockets.set("intel-rapl:0", two_sockets.get("intel-rapl:0"))
    first = source.read()[0]
    two_sockets.set("intel-rapl:0", two_sockets.get("intel-rapl:0") + 2_500_500)
    second = source.read()[0]
    assert second.energy_mj - first.energy_mj == pytest.approx(2500.5)
    assert (second.power_mw, second.power_avg_mw, second.error) == (None, None, None)
    assert second.t_ns > first.t_ns
    assert second.hw_ns >= 0
    source.close()


def test_wraps_are_undone_per_zone(powercap):
    powercap.zone("intel-rapl:0", "package-0")
    powercap.zone("intel-rapl:1", "package-1", range_uj=65_532_610_987)
    source = opened(powercap)
    powercap.set("intel-rapl:0", RANGE_UJ - 99)
    powercap.set("intel-rapl:1", 65_532_610_987)
    begin = [s.energy_mj for s in source.read()]
    powercap.set("intel-rapl:0", 900)
    powercap.set("intel-rapl:1", 0)
    once = [s.energy_mj for s in source.read()]
    assert [e - b for b, e in zip(begin, once, strict=True)] == pytest.approx([1.0, 0.001], abs=1e-4)
    for value in (RANGE_UJ // 2, 900, RANGE_UJ // 2, 900):
        powercap.set("intel-rapl:0", value)
        last = source.read()[0].energy_mj
    assert last - once[0] == pytest.approx(2 * (RANGE_UJ + 1) / 1000)
    source.close()


def test_a_zone_that_stands_still_is_unavailable_not_zero(two_sockets):
    two_sockets.live.remove("intel-rapl:1:0")
    source = opened(two_sockets, probe_s=0.1)
    dram = source.devices()[3]
    assert (dram.uuid, dram.method) == ("rapl:package-1:dram", "unavailable")
    assert "stood still" in dram.reason
    sample = source.read()[3]
    assert sample.energy_mj is None
    assert sample.error == dram.reason
    source.close()


def test_all_zones_still_is_no_source_and_leaks_no_file(two_sockets):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(SourceUnavailable, match=r"stood still.*package-0"):
        RaplSource(two_sockets.root, probe_s=0.05)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_moving_counters_cost_no_probe(two_sockets):
    two_sockets.move()
    begin = time.thread_time()
    RaplSource(two_sockets.root, probe_s=30.0).close()
    assert time.thread_time() - begin < 15.0


def test_nothing_there(tmp_path):
    with pytest.raises(SourceUnavailable, match="no CPU package") as caught:
        RaplSource(tmp_path)
    assert "LLEM_RAY_POWERCAP_ROOT" in caught.value.hint


def test_root_from_the_environment(two_sockets, monkeypatch):
    monkeypatch.setenv("LLEM_RAY_POWERCAP_ROOT", str(two_sockets.root))
    two_sockets.move()
    source = RaplSource()
    assert len(source.devices()) == 4
    source.close()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_permission_denied(two_sockets):
    """In a child that gave its rights up, so that it also runs as root."""
    (two_sockets.root / "intel-rapl:0" / "energy_uj").chmod(0)
    for folder in (two_sockets.root, *two_sockets.root.parents[:3]):
        folder.chmod(0o755)
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setegid(65534)
                os.seteuid(65534)
            RaplSource(two_sockets.root)
        except PowerPermissionDenied as error:
            os._exit(0 if "chmod" in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_folder_that_is_not_understood(powercap):
    powercap.zone("intel-rapl:0", "package-0")
    (powercap.root / "intel-rapl:0" / "max_energy_range_uj").write_text("many\n")
    with pytest.raises(SourceUnavailable, match="many"):
        RaplSource(powercap.root)


def test_a_zone_that_breaks_later_yields_an_error_and_spares_the_others(two_sockets):
    source = opened(two_sockets)
    (two_sockets.root / "intel-rapl:0" / "energy_uj").write_text("oops")
    broken, *others = source.read()
    assert broken.energy_mj is None
    assert "oops" in broken.error
    assert all(s.energy_mj is not None for s in others)
    source.close()
    source.close()
    assert all(s.energy_mj is None and s.error for s in source.read())
