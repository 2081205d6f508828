"""Seconds of kernels and collectives against what can be worked out by hand, and clusters as data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megallama.plan.cluster import CLUSTERS, load_cluster
from megallama.plan.machine import Constants, Group, Machine, fitted

RSC = load_cluster("rsc")
PERFECT = Constants(matmul=1, memory=1, link=1, fabric=1, latency=0, launch=0, kernel=0, step=0)


def test_every_cluster_of_the_package_can_be_read():
    names = {path.stem for path in CLUSTERS.glob("*.yaml")}
    assert {"rsc", "production", "h100", "selene", "vtrain-a100"} <= names
    for name in names:
        cluster = load_cluster(name)
        assert cluster.name == name and cluster.watts <= cluster.nominal_watts
    assert load_cluster("production").watts == 350 and load_cluster("rsc").watts == 400


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("gpu: A100", "peak_tflops is missing"),
        ("speed: 3", "unknown key speed; known are name, gpu"),
        ("watts: much", "watts='much' must be a number"),
        ("watts: 0", "watts=0 must be more than 0"),
        ("watts: .inf", "watts=inf must be more than 0, and finite"),
        ("- a", "holds no mapping of keys"),
        ("a: [", "is no cluster"),
        ("1: 2", "unknown key 1; known are name"),
        ("processors: 108.0", "processors=108.0 must be a whole number"),
        ("pue: 0.5", "pue=0.5 must be at least 1"),
        ('name: "two\\nlines"', "must be one line of letters"),
    ],
)
def test_a_bad_cluster_is_named(tmp_path: Path, text: str, problem: str):
    path = tmp_path / "mine.yaml"
    whole = (CLUSTERS / "rsc.yaml").read_text()
    path.write_text(
        text
        if text[:2] in ("gp", "- ", "a:")
        else whole.replace("watts: 400\nnom", f"{text}\nnom")
        if text.startswith("watts")
        else f"{whole.replace('processors: 108', '') if 'processors' in text else whole}\n{text}\n"
    )
    with pytest.raises(ValueError) as error:
        load_cluster(str(path))
    assert problem in str(error.value) and "\n" not in str(error.value)


def test_an_unknown_cluster_names_the_known_ones():
    with pytest.raises(ValueError, match="the cluster 'moon' is unknown; known are h100, production, rsc"):
        load_cluster("moon")


def test_large_products_run_at_the_peak_and_small_ones_at_whole_waves_or_at_memorys_speed():
    machine = Machine(RSC, PERFECT)
    m, n, k = 256 * 108, 128 * 50, 8192
    assert machine.matmul(m, n, k) == pytest.approx(2 * m * n * (k + 64) / 312e12)
    one = machine.matmul(256, 128 * 108, 8192)
    assert machine.matmul(256, 128 * 108 + 128, 8192) > 1.5 * one, "one tile more is a wave more"
    assert machine.matmul(1, 8192, 8192) >= 2 * 8192 * 8192 / 2039e9, "a vector's product reads the whole matrix"


def test_less_power_slows_products_alone():
    capped = Machine(replace(RSC, watts=350), PERFECT)
    full = Machine(RSC, PERFECT)
    assert full.clock == 1 and capped.clock == pytest.approx((250 / 300) ** (1 / 3))
    assert capped.matmul(8192, 8192, 8192) == pytest.approx(full.matmul(8192, 8192, 8192) / capped.clock)
    assert capped.moved(1e9) == full.moved(1e9)
    with pytest.raises(ValueError, match="less than what a GPU of 400 W draws at rest"):
        _ = Machine(replace(RSC, watts=90), PERFECT).clock


def test_groups_within_a_node_copy_all_and_those_across_nodes_share_its_ports():
    machine = Machine(RSC, PERFECT)
    assert machine.gathered(1e9, machine.group(1, 1)) == 0
    assert machine.gathered(1e9, machine.group(8, 1)) == pytest.approx(1e9 / 300e9)
    assert machine.group(32, 8) == Group(32, 1) and machine.group(32, 1) == Group(32, 8)
    assert machine.gathered(1e9, machine.group(32, 8)) == pytest.approx(31 / 32 * 1e9 / 25e9)
    assert machine.gathered(1e9, machine.group(32, 2)) == pytest.approx(31 / 32 * 1e9 / 100e9)
    slow = Machine(load_cluster("production"), PERFECT)
    assert slow.gathered(1e9, slow.group(32, 8)) == pytest.approx(machine.gathered(1e9, machine.group(32, 8)) / 0.9)
    assert machine.hop(1e9, True) == pytest.approx(1e9 / 300e9) and machine.hop(1e9, False) == pytest.approx(1e9 / 25e9)


def test_the_shipped_constants_are_shares_and_small_times():
    constants = fitted()
    assert len(constants) <= 8
    assert all(0.4 < share <= 1 for share in constants[:4]) and all(0 < seconds < 0.1 for seconds in constants[4:])
