"""The benchmark of the sink measures real databases."""

from bench import sink


def test_rows_go_into_both_databases() -> None:
    head, postgresql, sqlite = sink.run(300, 100, None)
    assert head.split()[0] == "rows"
    for line, name in ((postgresql, "PostgreSQL"), (sqlite, "SQLite")):
        assert line.split()[:2] == [name, "300"]
        assert all(float(number.replace(",", "")) >= 0 for number in line.split()[1:])
