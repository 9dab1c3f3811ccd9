"""The lab is what it says: separate hosts that form one cluster, can be broken, and leave nothing behind."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab_fixtures import alive, nodes, ray_says, require_lab, until

from llem_ray.testing.lab import HostSpec, Lab, cleanup_stale, default_gpus

pytestmark = [pytest.mark.ray, pytest.mark.slow]

OFFSETS_S = {"h1": 5, "h2": 7_200, "h3": 86_400}
EACH_HOST = """
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
@ray.remote(num_cpus=0)
def look():
    import os, socket, time
    import pynvml
    pynvml.nvmlInit()
    handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    return {
        "hostname": socket.gethostname(),
        "monotonic_ns": time.monotonic_ns(),
        "host_id": os.environ["LLEM_RAY_HOST_ID"],
        "resolved": [socket.gethostbyname(name) for name in ("h1", "h2", "h3")],
        "uuids": [pynvml.nvmlDeviceGetUUID(handle) for handle in handles],
    }
def on(node):
    return look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
say({node["NodeName"]: ray.get(on(node), timeout=60) for node in ray.nodes() if node["Alive"]})
"""


def leftovers(lab: str) -> list[str]:
    """Processes of a lab, and mounts below its folder, that this process can see."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                environment = (folder / "environ").read_bytes() + (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if lab.encode() in environment:
                found.append(f"process {folder.name}")
    return found + [line for line in Path("/proc/mounts").read_text().splitlines() if lab in line]


def namespaces(pid: int) -> dict[str, str]:
    return {kind: str(Path(f"/proc/{pid}/ns/{kind}").readlink()) for kind in ("net", "pid", "mnt", "uts", "ipc", "time")}


def all_network_namespaces() -> set[str]:
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                found.add(str((folder / "ns" / "net").readlink()))
            except OSError:
                continue
    return found


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    require_lab()
    hosts = [
        HostSpec(name=name, gpus=default_gpus(name, 4), monotonic_offset_s=offset_s, labels={"rack": name}, resources={name: 2.0})
        for name, offset_s in OFFSETS_S.items()
    ]
    folder = tmp_path_factory.mktemp("lab")
    with Lab([*hosts, HostSpec(name="client", joins=False)], folder=folder) as made:
        yield made
        networks = {namespaces(host.pid)["net"] for host in made.hosts.values()}
        # While they are held open, the kernel gives their numbers to no other lab.
        held = [os.open(f"/proc/{host.pid}/ns/net", os.O_RDONLY) for host in made.hosts.values()]
    assert leftovers(made.name) == []
    assert not networks & all_network_namespaces()
    for descriptor in held:
        os.close(descriptor)
    assert list(folder.iterdir()) == []


@pytest.fixture
def hosts_only(tmp_path: Path) -> Iterator[Lab]:
    """Two hosts and no Ray: quick to start."""
    require_lab()
    with Lab(
        [HostSpec(name="a", joins=False, gpus=default_gpus("a", 2)), HostSpec(name="b", joins=False)], folder=tmp_path
    ) as made:
        yield made


class TestCluster:
    def test_hosts_with_clocks_hours_apart_form_one_cluster(self, lab: Lab) -> None:
        before_ns = time.monotonic_ns()
        seen = ray_says(lab, "h2", EACH_HOST)
        after_ns = time.monotonic_ns()
        assert set(seen) == {"h1", "h2", "h3"}
        for name, offset_s in OFFSETS_S.items():
            assert seen[name]["hostname"] == name
            assert before_ns <= seen[name]["monotonic_ns"] - offset_s * 10**9 <= after_ns

    def test_each_host_sees_its_own_gpus_only(self, lab: Lab) -> None:
        seen = ray_says(lab, "h1", EACH_HOST)
        for name, host in lab.hosts.items():
            if host.spec.joins:
                assert seen[name]["uuids"] == [gpu.uuid for gpu in host.scenario.gpus]
        assert len({uuid for host in seen.values() for uuid in host["uuids"]}) == 12

    def test_each_host_has_an_address_a_name_and_an_id_of_its_own(self, lab: Lab) -> None:
        seen = ray_says(lab, "h1", EACH_HOST)
        assert {name: host["host_id"] for name, host in seen.items()} == {name: lab.hosts[name].host_id for name in OFFSETS_S}
        addresses = [lab.hosts[name].ip for name in OFFSETS_S]
        assert len(set(addresses)) == 3
        assert all(host["resolved"] == addresses for host in seen.values())

    def test_ray_is_told_what_the_specs_say(self, lab: Lab) -> None:
        for node in nodes(lab, "h1"):
            name = node["NodeName"]
            assert node["NodeManagerAddress"] == lab.hosts[name].ip
            assert (node["Resources"]["GPU"], node["Resources"]["CPU"], node["Resources"][name]) == (4.0, 4.0, 2.0)
            assert node["Labels"]["rack"] == name


class TestBreaking:
    """In this order: each test leaves a whole cluster."""

    def test_a_killed_raylet_is_dead_and_a_new_one_joins(self, lab: Lab) -> None:
        before = alive(lab, "h1")
        lab.kill_raylet("h3")
        assert not lab.hosts["h3"].raylet_alive
        assert lab.hosts["h3"].alive
        until(lambda: "h3" not in alive(lab, "h1"), what="h3 to be dead")
        lab.start_raylet("h3")
        until(lambda: set(alive(lab, "h1")) == set(before), what="h3 to be back")
        assert alive(lab, "h1")["h3"] != before["h3"]

    @pytest.mark.parametrize("silent", [False, True])
    def test_a_host_that_was_switched_off_comes_back(self, lab: Lab, silent: bool) -> None:
        before, ip, host_id = alive(lab, "h1"), lab.hosts["h2"].ip, lab.hosts["h2"].host_id
        lab.kill_host("h2", silent=silent)
        assert not lab.hosts["h2"].alive
        assert lab.pids("h2") == ()
        with pytest.raises(RuntimeError, match="h2 is switched off"):
            lab.run("h2", ["true"], timeout_s=10)
        until(lambda: "h2" not in alive(lab, "h1"), what="h2 to be dead")
        lab.restart_host("h2", monotonic_offset_s=60)
        assert (lab.hosts["h2"].ip, lab.hosts["h2"].host_id) == (ip, host_id)
        until(lambda: set(alive(lab, "h1")) == set(before), what="h2 to be back")
        assert alive(lab, "h1")["h2"] != before["h2"]
        before_ns = time.monotonic_ns()
        assert before_ns <= ray_says(lab, "h1", EACH_HOST)["h2"]["monotonic_ns"] - 60 * 10**9 <= time.monotonic_ns()

    def test_a_short_cut_goes_unnoticed_and_a_long_one_is_a_death(self, lab: Lab) -> None:
        before = alive(lab, "h1")
        lab.cut_link("h3")
        time.sleep(1.0)
        lab.heal_link("h3")
        until(lambda: alive(lab, "h3") == before, what="h3 to be as it was")
        lab.cut_link("h3")
        assert lab.hosts["h3"].raylet_alive
        until(lambda: "h3" not in alive(lab, "h1"), what="h3 to be dead")
        lab.heal_link("h3")
        until(lambda: not lab.hosts["h3"].raylet_alive, what="h3's raylet to see that it was given up")
        lab.start_raylet("h3")
        until(lambda: set(alive(lab, "h1")) == set(before), what="h3 to be back")


@pytest.mark.parametrize(("token", "status"), [("", 401), (None, 200)])
def test_a_client_reaches_the_jobs_api_and_a_token_guards_it(tmp_path: Path, token: str | None, status: int) -> None:
    require_lab()
    script = """
import os, urllib.error, urllib.request
def status(headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(os.environ["JOBS"] + "/api/version", headers=headers)) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
print(status({}), status({"Authorization": "Bearer " + os.environ.get("RAY_AUTH_TOKEN", "")}))
"""
    with Lab([HostSpec(name="h1"), HostSpec(name="client", joins=False)], folder=tmp_path, token=token, dashboard=True) as made:
        done = made.run("client", [sys.executable, "-c", script], env={"JOBS": made.jobs_address}, timeout_s=60)
        assert done.stdout.split() == [str(status), "200"], done.stderr
        assert not made.hosts["client"].raylet_alive


def scripts_lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(__file__).parents[2] / "scripts" / "lab"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


def test_the_command_gives_address_and_exit_code() -> None:
    require_lab()
    script = "import os, socket, sys; print(socket.gethostname(), os.environ['RAY_ADDRESS']); sys.exit(7)"
    done = scripts_lab("--hosts", "1", "--gpus", "2", "--", sys.executable, "-c", script)
    assert done.returncode == 7, done.stderr
    assert re.fullmatch(r"h1 10\.77\.\d+\.1:6379\n", done.stdout)
    assert re.match(r"h1  10\.77\.\d+\.1  2 GPUs  clock \+3600 s\n", done.stderr)


def test_the_command_refuses_an_empty_lab() -> None:
    done = scripts_lab("--hosts", "0")
    assert done.returncode == 2
    assert "--hosts is 1 to 200" in done.stderr


class TestHosts:
    def test_truth_is_on_the_clock_that_all_hosts_share(self, hosts_only: Lab) -> None:
        script = """
import json, time, pynvml
pynvml.nvmlInit()
handle = pynvml.nvmlDeviceGetHandleByIndex(1)
def reading():
    return time.time_ns(), pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
begin = reading()
time.sleep(2.0)
print(json.dumps([pynvml.nvmlDeviceGetUUID(handle), *begin, *reading()]))
"""
        done = hosts_only.run("a", [sys.executable, "-c", script], timeout_s=60)
        uuid, begin_ns, begin_mj, end_ns, end_mj = json.loads(done.stdout)
        truth_j = hosts_only.truth_j("a", uuid, begin_ns, end_ns)
        # Each reading may be as old as one tick of the counter: 100 ms at no more than 680 W.
        assert abs((end_mj - begin_mj) / 1e3 - truth_j) <= 2 * 0.1 * 680
        assert truth_j > 2 * 100

    def test_a_host_without_gpus_has_no_nvml(self, hosts_only: Lab) -> None:
        script = "import pynvml; pynvml.nvmlInit()"
        done = hosts_only.run("b", [sys.executable, "-c", script], timeout_s=60)
        assert done.returncode != 0
        assert "NVMLError" in done.stderr

    def test_hosts_share_no_namespace(self, hosts_only: Lab) -> None:
        found = [namespaces(pid) for pid in (os.getpid(), *(host.pid for host in hosts_only.hosts.values()))]
        for kind in found[0]:
            assert len({each[kind] for each in found}) == 3, kind

    def test_a_command_gets_signals_and_gives_its_exit_code(self, hosts_only: Lab) -> None:
        script = "trap 'echo asked; exit 7' TERM; echo up; while :; do sleep 0.05; done"
        process = hosts_only.popen("a", ["sh", "-c", script], stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            assert any("trap" in each.command for each in hosts_only.pids("a"))
            process.terminate()
            assert process.stdout.readline() == "asked\n"
            assert process.wait(30) == 7

    def test_a_command_that_takes_too_long_is_killed_with_all_it_started(self, hosts_only: Lab) -> None:
        with pytest.raises(TimeoutError, match=r"did not end within 0\.5 s.*\n.*before"):
            hosts_only.run("a", ["sh", "-c", "echo before; sleep 600 & sleep 600"], timeout_s=0.5)
        until(lambda: hosts_only.pids("a") == (), what="the command's end")

    def test_the_machine_does_not_reach_the_hosts(self, hosts_only: Lab) -> None:
        word = secrets.token_hex(8)
        server = (
            "import socket; s = socket.create_server(('0.0.0.0', 5000)); print('up', flush=True)\n"
            f"while True: c, _ = s.accept(); c.sendall(b'{word}'); c.close()"
        )
        # Something else may answer at this address outside, so that a connection alone says nothing.
        client = f"import socket; print(socket.create_connection(('{hosts_only.hosts['a'].ip}', 5000), timeout=1).recv(99))"
        with hosts_only.popen("a", [sys.executable, "-c", server], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"
            outside = subprocess.run([sys.executable, "-c", client], capture_output=True, text=True, timeout=60, check=False)
            assert word not in outside.stdout
            assert word in hosts_only.run("b", [sys.executable, "-c", client], timeout_s=60).stdout
            process.kill()

    def test_a_cut_link_stops_everything_and_a_healed_one_nothing(self, hosts_only: Lab) -> None:
        server = (
            "import socket; s = socket.create_server(('0.0.0.0', 5000)); print('up', flush=True)\n"
            "while True: s.accept()[0].close()"
        )
        client = "import socket; socket.create_connection(('a', 5000), timeout=1).close()"
        process = hosts_only.popen("a", [sys.executable, "-c", server], stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            assert process.stdout.readline() == "up\n"

            def reached() -> bool:
                return hosts_only.run("b", [sys.executable, "-c", client], timeout_s=60).returncode == 0

            assert reached()
            hosts_only.cut_link("a")
            assert not reached()
            hosts_only.heal_link("a")
            until(reached, what="b to reach a again")
            process.kill()

    def test_a_host_comes_back_with_the_same_address(self, hosts_only: Lab) -> None:
        pid, ip = hosts_only.hosts["a"].pid, hosts_only.hosts["a"].ip
        hosts_only.restart_host("a")
        assert hosts_only.hosts["a"].pid != pid
        shown = hosts_only.run("a", ["ip", "-json", "addr", "show", "eth0"], timeout_s=30)
        assert json.loads(shown.stdout)[0]["addr_info"][0]["local"] == ip


class TestLeavesNothing:
    def test_after_an_error_inside(self, tmp_path: Path) -> None:
        require_lab()
        lab = Lab([HostSpec(name="a", joins=False)], folder=tmp_path)

        def break_inside() -> None:
            with lab:
                lab.popen("a", ["sleep", "600"])
                assert leftovers(lab.name)
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            break_inside()
        assert leftovers(lab.name) == []
        assert list(tmp_path.iterdir()) == []

    def test_when_ray_does_not_start_and_says_why(self, tmp_path: Path) -> None:
        require_lab()
        lab = Lab([HostSpec(name="a", resources={"CPU": 1.0})], folder=tmp_path)
        with pytest.raises(RuntimeError, match=r"(?s)a: `ray start` ended.*resources.*CPU"), lab:
            pytest.fail("it started")
        assert leftovers(lab.name) == []
        assert list(tmp_path.iterdir()) == []

    def test_when_its_creator_is_killed(self, tmp_path: Path) -> None:
        require_lab()
        script = f"""
import time
from pathlib import Path
from llem_ray.testing.lab import HostSpec, Lab
with Lab([HostSpec(name="a", joins=False)], folder=Path({str(tmp_path)!r})) as lab:
    lab.popen("a", ["sleep", "600"])
    print(lab.name, flush=True)
    time.sleep(600)
"""
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as creator:
            assert creator.stdout is not None
            name = creator.stdout.readline().strip()
            assert leftovers(name)
            creator.send_signal(signal.SIGKILL)
        until(lambda: leftovers(name) == [], what="the hosts' end")

    def test_stale_hosts_are_found_and_the_living_left_alone(self, tmp_path: Path, hosts_only: Lab) -> None:
        # The creator's child keeps the pipe open that tells the hosts of its death.
        script = f"""
import os, time
from pathlib import Path
from llem_ray.testing.lab import HostSpec, Lab
lab = Lab([HostSpec(name="a", joins=False)], folder=Path({str(tmp_path / "stale")!r})).__enter__()
if os.fork() == 0:
    print(lab.name, os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as creator:
            assert creator.stdout is not None
            name, child = creator.stdout.readline().split()
            assert name not in cleanup_stale()
            creator.send_signal(signal.SIGKILL)
            creator.wait(30)
            try:
                assert cleanup_stale() in ((name,), ())  # a lab that somebody else begins now finds it too
                until(lambda: leftovers(name) == [], what="the hosts' end")
            finally:
                os.kill(int(child), signal.SIGKILL)
        assert all(host.alive for host in hosts_only.hosts.values())


class TestBadInput:
    def test_two_hosts_of_one_name(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"different names, not \['a', 'a'\]"):
            Lab([HostSpec(name="a"), HostSpec(name="a")], folder=tmp_path)

    def test_a_head_that_does_not_join(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"the head must be a host that joins \(a\), not 'b'"):
            Lab([HostSpec(name="a"), HostSpec(name="b", joins=False)], head="b", folder=tmp_path)

    @pytest.mark.parametrize("name", ["", "H1", "a.b", "-a", "a-", "a" * 33])
    def test_a_name_that_is_no_host_name(self, name: str) -> None:
        with pytest.raises(ValueError, match="lower-case letters, digits and hyphens"):
            HostSpec(name=name)

    def test_a_negative_number(self) -> None:
        with pytest.raises(ValueError, match=r"h1: num_cpus and num_gpus must be at least 0, not 4 and -1"):
            HostSpec(name="h1", num_gpus=-1)

    def test_a_label_ray_cannot_take(self) -> None:
        with pytest.raises(ValueError, match=r"h1: a label has no comma, equals sign or space, unlike 'k': 'a,b'"):
            HostSpec(name="h1", labels={"k": "a,b"})

    def test_a_jobs_address_without_a_dashboard(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="dashboard=True"):
            _ = Lab([HostSpec(name="a")], folder=tmp_path).jobs_address

    def test_a_lab_that_is_not_entered(self, tmp_path: Path) -> None:
        with pytest.raises(RuntimeError, match="not entered"):
            _ = Lab([HostSpec(name="a")], folder=tmp_path).address


class TestDefaultGpus:
    def test_they_differ_between_hosts_and_gpus_and_repeat(self) -> None:
        gpus = [*default_gpus("h1", 4), *default_gpus("h2", 4), *default_gpus("h1", 4, seed=1)]
        assert len({gpu.uuid for gpu in gpus}) == 12
        assert len({round(gpu.energy_j(0.0, 10.0), 6) for gpu in gpus}) == 12
        assert default_gpus("h1", 4) == default_gpus("h1", 4)

    def test_their_loads_change_between_100_and_680_w(self) -> None:
        for gpu in default_gpus("h1", 8):
            powers = [gpu.waveform.power_w(t / 50) for t in range(1000)]
            assert 100 <= min(powers) <= 200
            assert 600 <= max(powers) <= 680
