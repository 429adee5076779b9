import math

import pytest

from hdpo.experience import Statistics


@pytest.mark.parametrize("parts", [[0.5, 2.0, -1.0], [-3.0, -2.0], [1.0, math.nan, 2.0]])
def test_a_maximum_does_not_depend_on_how_observations_are_split(parts):
    alone, merged = Statistics(), Statistics()
    for value in parts:
        alone.add("gap_max", value)
        rank = Statistics()
        rank.add("gap_max", value)
        merged.merge(rank.items())
    assert alone.means() == pytest.approx(merged.means(), nan_ok=True)
    expected = math.nan if any(map(math.isnan, parts)) else max(parts)
    assert merged.means()["gap_max"] == pytest.approx(expected, nan_ok=True)


def test_a_rank_without_observations_adds_nothing():
    stats = Statistics()
    stats.add("pass_rate", 1.0, 2)
    stats.merge([("pass_rate", 0.0, 0.0), ("gap_max", -1.0, None)])
    assert stats.means() == {"pass_rate": 0.5, "gap_max": -1.0}
