"""The settings of Redis: what belongs together, and what does not."""

from pathlib import Path

import pytest

from parallama.config import Config, load
from parallama.errors import ConfigError


def loaded(folder: Path, redis: str) -> Config:
    path = folder / "config.yaml"
    path.write_text(f"redis: {{{redis}}}")
    for name in ("secret", "open", "ca.pem"):
        (folder / name).write_text("hunter2")
        (folder / name).chmod(0o644 if name == "open" else 0o600)
    return load(path, {})


def test_one_server_is_the_default(tmp_path: Path) -> None:
    redis = loaded(tmp_path, "host: redis.example").redis
    assert (redis.mode, redis.embedded, redis.tls, redis.addresses) == (
        "standalone",
        False,
        False,
        [],
    )


def test_sentinels(tmp_path: Path) -> None:
    redis = loaded(
        tmp_path,
        "mode: sentinel, nodes: ['a.example:26379', '[::1]:26380'], sentinel_master: m, db: 2, "
        "sentinel_password_file: secret, username: u, password_file: secret",
    ).redis
    assert not redis.embedded
    assert redis.addresses == [("a.example", 26379), ("::1", 26380)]
    assert redis.sentinel_password is not None
    assert redis.sentinel_password.get_secret_value() == "hunter2"


def test_a_cluster_with_tls(tmp_path: Path) -> None:
    redis = loaded(
        tmp_path,
        "mode: cluster, nodes: [10.0.0.1:6379], db: 0, tls: true, tls_ca_file: ca.pem, "
        "tls_cert_file: ca.pem, tls_key_file: secret, tls_verify: ca",
    ).redis
    assert not redis.embedded
    assert redis.tls_ca_file == tmp_path / "ca.pem"
    assert redis.tls_key_file is not None
    assert redis.tls_key_file.path == tmp_path / "secret"
    assert redis.sentinel_password is None


@pytest.mark.parametrize(
    ("redis", "told"),
    [
        (
            "mode: ring",
            ["mode: must be standalone, sentinel or cluster, such as standalone"],
        ),
        (
            "nodes: [a:1]",
            ["nodes: belongs to redis.mode sentinel or cluster: set it, or use host"],
        ),
        (
            "mode: sentinel",
            [
                "nodes: is missing: redis.mode sentinel needs it, such as [10.0.0.1:26379]",
                "sentinel_master: is missing: the sentinels need it, such as mymaster",
            ],
        ),
        (
            "mode: cluster, nodes: []",
            ["nodes: is missing: redis.mode cluster needs it, such as [10.0.0.1:6379]"],
        ),
        (
            "mode: cluster, nodes: [a:1], host: b, port: 1",
            [
                "host: is not used with redis.mode cluster: write host:port into redis.nodes",
                "port: is not used with redis.mode cluster: write host:port into redis.nodes",
            ],
        ),
        (
            "mode: cluster, nodes: [a:1], db: 3",
            ["db: must be 0: a cluster has one database only"],
        ),
        (
            "mode: cluster, nodes: [a:1], sentinel_master: m, sentinel_password_file: secret",
            [
                "sentinel_master: belongs to redis.mode sentinel: set it, or remove this",
                "sentinel_password_file: belongs to redis.mode sentinel: set it, or remove this",
            ],
        ),
        (
            "mode: cluster, nodes: [a, 'b:0', ':1', '::1:1', 'c:1:2', 'd:x', 'e f:1']",
            [
                f"nodes[{n}]: must be host:port, such as 10.0.0.1:26379 or [::1]:26379"
                for n in (0, 1, 3, 4, 5)
            ]
            + [
                f"nodes[{n}]: must be a host name or an IP address and nothing else, such as "
                "127.0.0.1"
                for n in (2, 6)
            ],
        ),
        (
            "mode: cluster, nodes: [6379]",
            ["nodes[0]: must be text; it is a number: put it in quotes"],
        ),
        (
            "username: u, password_file: secret",
            ["username: belongs to a server of yours: set redis.host too, or remove it"],
        ),
        (
            "tls: true",
            ["tls: belongs to a server of yours: set redis.host too, or remove it"],
        ),
        (
            "host: a, username: u",
            ["password_file: is missing: redis.username needs it"],
        ),
        (
            "host: a, tls_ca_file: ca.pem, tls_verify: none",
            [
                "tls_ca_file: has no effect without redis.tls: true",
                "tls_verify: has no effect without redis.tls: true",
            ],
        ),
        (
            "host: a, tls: true, tls_key_file: secret",
            ["tls_cert_file: is missing: redis.tls_key_file belongs to it"],
        ),
        (
            "host: a, tls: true, tls_ca_file: gone.pem",
            ["tls_ca_file: the file it names does not exist; relative paths start at {folder}"],
        ),
        (
            "host: a, tls: true, tls_cert_file: ca.pem, tls_key_file: open",
            [
                "tls_key_file: every user of this machine may read or change the file: run chmod "
                "o= on it"
            ],
        ),
    ],
)
def test_mistakes(redis: str, told: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        loaded(tmp_path, redis)
    lines = str(error.value).splitlines()[1:]
    assert "hunter2" not in str(error.value)
    assert sorted(line.strip().replace(" (line 1)", "") for line in lines) == sorted(
        f"redis.{text.format(folder=tmp_path)}" for text in told
    )
