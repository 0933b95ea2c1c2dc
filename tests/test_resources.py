"""Resource profiles: what is said is what a client has."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynfed_lightning.resources import (
    DrawnResources,
    GivenResources,
    ResourceProfile,
    Resources,
    TableResources,
    UniformResources,
)


def test_unknown_is_none() -> None:
    assert Resources() == Resources(None, None, None)
    assert UniformResources()(7) == Resources()


@pytest.mark.parametrize("bad", [0, -1, float("nan"), float("inf"), True, "4096"])
@pytest.mark.parametrize("field", ["memory_mb", "bandwidth_mbps", "compute"])
def test_a_resource_is_a_positive_number(field: str, bad) -> None:
    with pytest.raises(ValueError, match=f"`{field}` to be a finite number above 0, but got"):
        Resources(**{field: bad})


def test_uniform_is_the_same_for_all() -> None:
    profile = UniformResources(memory_mb=4096, compute=0.5)
    assert profile(0) == profile(99, seed=3) == Resources(4096, None, 0.5)


def test_given_by_list_mapping_and_default() -> None:
    by_list = GivenResources([{"memory_mb": 2048}, Resources(compute=2)])
    assert (by_list(0), by_list(1)) == (Resources(2048), Resources(compute=2))
    with pytest.raises(ValueError, match="resources for client 2, but only 2"):
        by_list(2)
    by_id = GivenResources({5: {"bandwidth_mbps": 1.5}}, default={"memory_mb": 1})
    assert (by_id(5), by_id(0)) == (Resources(bandwidth_mbps=1.5), Resources(1))
    with pytest.raises(ValueError, match=r"`clients\[0\]` .* keys among"):
        GivenResources([{"memory": 2048}])


def test_drawn_depends_on_seed_and_client_only() -> None:
    profile = DrawnResources()
    drawn = [profile(k, 0) for k in range(400)]
    assert drawn == [DrawnResources()(k, 0) for k in reversed(range(400))][::-1]
    memory = [r.memory_mb or 0 for r in drawn]
    assert min(memory) >= 2048 and max(memory) <= 16384 and len(set(memory)) == 400
    # The mean of U(2048, 16384) is 9216; the standard error of 400 draws is 207.
    assert sum(memory) / 400 == pytest.approx(9216, abs=4 * 207)
    assert profile(0, 1) != profile(0, 0)
    assert all(r.bandwidth_mbps is None and r.compute is None for r in drawn)


def test_drawing_one_more_field_leaves_the_others() -> None:
    more = DrawnResources((2048, 16384), bandwidth_mbps=(1, 10), compute=(0.5, 0.5))(3, 7)
    assert more.memory_mb == DrawnResources()(3, 7).memory_mb
    assert more.bandwidth_mbps is not None and 1 <= more.bandwidth_mbps <= 10
    assert more.compute == 0.5


@pytest.mark.parametrize("pair", [(5, 2), (0, 2), (1,), (1, 2, 3), 7, ("1", "2")])
def test_a_range_is_checked(pair) -> None:
    with pytest.raises(ValueError, match="`bandwidth_mbps` to be "):
        DrawnResources(bandwidth_mbps=pair)


def test_table(tmp_path: Path) -> None:
    file = tmp_path / "clients.csv"
    file.write_text("client,memory_mb,compute\n0,4096,1\n2,,0.5\n")
    profile = TableResources(file)
    assert profile(0) == Resources(4096, None, 1)
    assert profile(2, seed=9) == Resources(None, None, 0.5)
    with pytest.raises(ValueError, match="list client 1"):
        profile(1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,memory_mb\n0,1\n", "the column 'client'"),
        ("client,memory\n0,1\n", "its columns are"),
        ("client,memory_mb\n0,much\n", "line 2 .* 'much'"),
        ("client,memory_mb\n0,-1\n", "line 2 .*`memory_mb`"),
        ("client,memory_mb\n0,1\n0,2\n", "line 3 .*client 0 is listed twice"),
        ("client,memory_mb\nx,1\n", "line 2"),
    ],
)
def test_a_bad_table_says_where(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "clients.csv"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        TableResources(file)


def test_missing_table_and_base_class(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`path` to be a CSV file"):
        TableResources(tmp_path / "none.csv")
    with pytest.raises(TypeError, match="subclass of ResourceProfile"):
        ResourceProfile()(0)
