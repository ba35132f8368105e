"""The benchmark of ratelimit decides on a real Valkey and a real database."""

from bench import decisions


def test_users_call_for_the_first_time_and_again() -> None:
    first, again = (line.split() for line in decisions.run(20, 30))
    assert (first[:3], again[:3]) == (["20", "first", "20"], ["20", "again", "20"])
    for line in (first, again):
        assert all(float(number.replace(",", "")) >= 0 for number in line[3:])
