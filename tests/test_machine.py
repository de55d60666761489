"""What the machine says of itself: on Linux, inside a container with limits, and where it says nothing."""

import os

import pytest

from rwkv_lab import machine

MEMINFO = "MemTotal:       24000000 kB\nMemAvailable:   20000000 kB\nHugePages_Total:       0\n"
CPUINFO = (
    "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel\t\t: 207\nmodel name\t: Some Xeon\n"
    "flags\t\t: fpu sse2 avx2 fma avx512f amx_bf16\nbogomips\t: 4600.00\n\nprocessor\t: 1\nmodel name\t: Another\n"
)


@pytest.fixture
def system(tmp_path, monkeypatch):
    """system({"proc/meminfo": …}) -> a machine that has these files and no others."""
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_this_machine(tmp_path):
    assert 1 << 20 < machine.memory_free() and machine.disk_free(tmp_path) > 0
    assert 1 <= machine.cores() <= os.cpu_count()
    assert isinstance(machine.cpu_name(), str) and machine.cpu_identity()


def test_linux(system):
    system({"proc/meminfo": MEMINFO, "proc/cpuinfo": CPUINFO})
    assert machine.memory_free() == 20_000_000 * 1024 and machine.cores() == 8
    assert machine.cpu_name() == "Some Xeon" and machine.cpu_features() == ("avx2", "fma", "avx512f", "amx_bf16")
    identity = machine.cpu_identity().splitlines()
    assert len(identity) == 4 and identity[-1].endswith("avx512f amx_bf16")  # neither the core's number nor its clock


def test_a_system_that_says_nothing(system, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert machine.cores() == 3
    assert machine.memory_free() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert machine.cpu_features() == () and machine.cpu_identity()


@pytest.mark.parametrize("path", ["/", "/pods/mine"])
def test_limits_of_a_container(path, system):
    group = f"groups{path}"
    system(
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": f"0::{path}\n",
            f"{group}/memory.max": "5000000000\n",
            f"{group}/memory.current": "4000000000\n",
            f"{group}/memory.stat": "anon 1000000000\ninactive_file 2000000000\nactive_file 500000000\n",
            f"{group}/cpu.max": "250000 100000\n",
        }
    )
    assert machine.memory_free() == 3_500_000_000  # what only caches files is given back first
    assert machine.cores() == 3  # a quota of 2.5


def test_the_tightest_limit_counts(system):
    system(
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/pod/container\n",
            "groups/pod/memory.max": "3000000000\n",
            "groups/pod/memory.current": "3100000000\n",
            "groups/pod/container/memory.max": "max\n",
            "groups/pod/container/memory.current": "100\n",
            "groups/pod/container/cpu.max": "max 100000\n",
            "groups/pod/cpu.max": "20000 100000\n",
        }
    )
    assert machine.memory_free() == 0 and machine.cores() == 1


def test_limits_of_version_1_of_the_control_groups(system):
    """Its folders are named as outside the container, where only the root can be seen."""
    system(
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:memory:/docker/0a1b\n4:cpu,cpuacct:/docker/0a1b\n3:cpuset:/\n",
            "groups/memory/memory.limit_in_bytes": "2000000000\n",
            "groups/memory/memory.usage_in_bytes": "1500000000\n",
            "groups/memory/memory.stat": "inactive_file 1\ntotal_inactive_file 300000000\ntotal_active_file 0\n",
            "groups/cpu/cpu.cfs_quota_us": "200000\n",
            "groups/cpu/cpu.cfs_period_us": "100000\n",
        }
    )
    assert machine.memory_free() == 800_000_000 and machine.cores() == 2


def test_no_limits_in_version_1(system):
    system(
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:memory:/\n4:cpu:/\n",
            "groups/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "groups/memory/memory.usage_in_bytes": "1500000000\n",
            "groups/cpu/cpu.cfs_quota_us": "-1\n",
            "groups/cpu/cpu.cfs_period_us": "100000\n",
        }
    )
    assert machine.memory_free() == 20_000_000 * 1024 and machine.cores() == 8
