"""What a configuration may hold, and how every mistake in it is told."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st

from parallama.config import Config, load, settings, warnings
from parallama.errors import ConfigError
from parallama.values import SecretFile, SecretText
from parallama.yamlfile import parse
from tests.examples import examples

PLAN = """\
# /etc/parallama/config.yaml
server:
  host: 0.0.0.0
  port: 8000
  workers: 4

database:
  host: localhost
  port: 5432
  name: parallama
  user: parallama
  password_file: /etc/parallama/db_password

redis:
  host: localhost
  port: 6379
  db: 0

authentication:
  jwt_secret_key_file: /etc/parallama/jwt_secret
  access_token_expire_minutes: 30
  refresh_token_expire_days: 30
  password_hash_rounds: 12

api_gateways:
  enabled:
    - ollama
    - openai
  
  discovery:
    enabled: true
    cache_ttl: 300
    include_metrics: true
  
  ollama:
    host: http://localhost
    port: 11434
    base_path: /ollama/v1
    default_model: llama2
  
  openai:
    base_path: /openai/v1
    compatibility_mode: true
    model_mappings:
      gpt-3.5-turbo: llama2
      gpt-4: llama2:70b

logging:
  level: INFO
  dir: /var/log/parallama
  max_size: 100M
  backup_count: 10
"""


def write(folder: Path, text: str | bytes, name: str = "config.yaml", mode: int = 0o600) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    path.chmod(mode)
    return path


def loaded(folder: Path, text: str, environ: Mapping[str, str] | None = None) -> Config:
    return load(write(folder, text), environ or {})


def mistakes(
    folder: Path, text: str | bytes, environ: Mapping[str, str] | None = None
) -> list[str]:
    """The lines of the error, without its heading and the folder's name."""
    with pytest.raises(ConfigError) as caught:
        load(write(folder, text), environ or {})
    lines = str(caught.value).replace(str(folder), "DIR").splitlines()
    return [line.strip() for line in lines[1:]] or lines


def test_the_plans_file_loads_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, "of the database\n", "db_password", 0o640)
    write(tmp_path, "\n signs tokens \n", "jwt_secret", 0o400)
    config = loaded(tmp_path, PLAN.replace("file: /etc/parallama", f"file: {tmp_path}"))
    assert not config.database.sqlite
    assert config.database.host == "localhost"
    assert config.database.password == SecretText("of the database")
    assert config.authentication.jwt_secret_key == SecretText("signs tokens")
    assert not config.redis.embedded
    assert config.redis.host == "localhost"
    assert config.api_gateways.ollama.upstream() == ("http", "localhost", 11434)
    assert config.api_gateways.openai.model_mappings == {
        "gpt-3.5-turbo": "llama2",
        "gpt-4": "llama2:70b",
    }
    assert config.logging.dir == Path("/var/log/parallama")
    assert config.logging.max_size == 100 * 1024 * 1024
    assert config.server.workers == 4
    assert warnings(config) == [
        "api_gateways.openai.compatibility_mode has no effect yet: it belongs to a later release",
        "authentication.jwt_secret_key_file has no effect with authentication.jwt_algorithm RS256",
    ]


def test_a_file_may_leave_everything_out(tmp_path: Path) -> None:
    config = loaded(tmp_path, "{}")
    assert config.server.host == "127.0.0.1"
    assert config.redis.embedded
    assert config.database.sqlite
    assert config.database.password is None
    assert config.api_gateways.enabled == ("ollama", "openai")
    assert config.logging.max_size == 104_857_600
    assert warnings(config) == []


def test_relative_paths_start_at_the_files_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    write(etc, "of the counters", "redis_password")
    write(
        etc, "redis: {password_file: redis_password}\nlogging: {dir: logs}\nenvoy: {dir: ~/envoy}"
    )
    monkeypatch.setenv("HOME", "/home/anna")
    monkeypatch.chdir(tmp_path)
    config = load(Path("etc/config.yaml"), {})
    assert config.source == etc / "config.yaml"
    assert config.dir == etc
    assert config.state_dir == etc / "state"
    assert config.run_dir == etc / "state" / "run"
    assert config.database.path == etc / "parallama.db"
    assert config.logging.dir == etc / "logs"
    assert config.redis.password == SecretText("of the counters")
    assert config.envoy.dir == Path("/home/anna/envoy")


def test_the_tree_cannot_be_changed(tmp_path: Path) -> None:
    config = loaded(tmp_path, "{}")
    with pytest.raises(AttributeError, match="frozen"):
        config.server.port = 1


def test_a_secret_does_not_show_in_the_trees_own_text(tmp_path: Path) -> None:
    write(tmp_path, "hunter2", "redis_password")
    config = loaded(tmp_path, "redis: {password_file: redis_password}")
    assert "hunter2" not in repr(config)


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    write(tmp_path, "of the counters", "redis_password")
    config = loaded(
        tmp_path,
        "server: {port: 1, workers: 2}\nredis: {host: a}\nusage:\n",
        {
            "PARALLAMA_SERVER__PORT": "9000",
            "PARALLAMA_API_GATEWAYS__OLLAMA__PORT": "8080",
            "PARALLAMA_API_GATEWAYS__ENABLED": "[openai]",
            "PARALLAMA_REDIS__HOST": "",
            "PARALLAMA_REDIS__PASSWORD_FILE": "redis_password",
            "PARALLAMA_USAGE__FLUSH_SECONDS": "1",
            "PARALLAMA_CONFIG": "/elsewhere/config.yaml",
            "HOME": "/root",
            "parallama_server__port": "1",
        },
    )
    assert (config.server.port, config.server.workers) == (9000, 2)
    assert config.api_gateways.ollama.port == 8080
    assert config.api_gateways.enabled == ("openai",)
    assert config.redis.embedded
    assert config.redis.password == SecretText("of the counters")
    assert config.usage.flush_seconds == 1


def variables() -> list[str]:
    return ["PARALLAMA_" + each.path.replace(".", "__").upper() for each in settings()]


def test_every_setting_has_a_variable(tmp_path: Path) -> None:
    told = mistakes(tmp_path, "{}", dict.fromkeys(variables(), "[[]]"))
    assert {line.partition("(")[2].partition(")")[0] for line in told} >= set(variables())


def test_ten_mistakes_are_told_at_once(tmp_path: Path) -> None:
    write(tmp_path, "", "empty")
    text = """\
sever: {port: 1}
server:
  port: eighty
  wrokers: 2
database: {path: a.db, host: db, name: x, user: x}
redis: {password_file: empty, db: -1}
authentication: {password_hash_rounds: 99}
api_gateways:
  enabled: [ollama, gemini]
logging: {max_size: lots}
"""
    assert mistakes(tmp_path, text, {"PARALLAMA_SERVER_HOST": "x"}) == [
        "sever (line 1): unknown setting; did you mean server?",
        "server.port (line 3): must be a whole number, such as 8000; it is text",
        "server.wrokers (line 4): unknown setting; did you mean server.workers?",
        "database.path (line 5): is SQLite's and database.host is PostgreSQL's: "
        "remove one of the two",
        "redis.db (line 6): must be at least 0, such as 0",
        "redis.password_file (line 6): the file it names is empty: write the secret into it",
        "authentication.password_hash_rounds (line 7): must be at most 16, such as 12",
        "api_gateways.enabled[1] (line 9): must be ollama or openai",
        "logging.max_size (line 10): must be a number of bytes, or one with K, M or G, "
        "such as 100M",
        "PARALLAMA_SERVER_HOST: unknown setting; did you mean PARALLAMA_SERVER__HOST?",
    ]
    with pytest.raises(ConfigError, match=r"^/.*/config\.yaml: 1 mistake\n"):
        loaded(tmp_path, "x: 1")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        pytest.param(
            "server: {prot: 1}",
            "server.prot (line 1): unknown setting; did you mean server.port?",
            id="unknown, a near name",
        ),
        pytest.param(
            "batch_rows: 1",
            "batch_rows (line 1): unknown setting; did you mean usage.batch_rows?",
            id="unknown, right in another place",
        ),
        pytest.param(
            "shutdown: {zzz: 1}",
            "shutdown.zzz (line 1): unknown setting; known here: drain_seconds",
            id="unknown, near nothing",
        ),
        pytest.param(
            "redis: {password: hunter2}",
            "redis.password (line 1): unknown setting; did you mean redis.password_file?",
            id="a secret in the file itself",
        ),
        pytest.param(
            "server:\n  port: [1]",
            "server.port (line 2): must be a whole number, such as 8000; it is a list",
            id="a list for a number",
        ),
        pytest.param(
            "server: {port: true}",
            "server.port (line 1): must be a whole number, such as 8000; it is true or false",
            id="a boolean is no number",
        ),
        pytest.param(
            "server: {port: 65536}",
            "server.port (line 1): must be at most 65535, such as 8000",
            id="too large",
        ),
        pytest.param(
            "usage: {flush_seconds: 0}",
            "usage.flush_seconds (line 1): must be more than 0, such as 0.2",
            id="not more than nothing",
        ),
        pytest.param(
            "usage: {flush_seconds: .inf}",
            "usage.flush_seconds (line 1): must be a number, such as 0.2",
            id="infinite",
        ),
        pytest.param(
            "logging: {requests: 1}",
            "logging.requests (line 1): must be true or false, such as true; it is a number",
            id="a number for a boolean",
        ),
        pytest.param(
            "server: 8000",
            "server (line 1): must be a section: its settings by name, indented below it; "
            "it is a number",
            id="a value for a section",
        ),
        pytest.param(
            "server:\n  port:\n",
            "server.port (line 2): has no value: write one, such as 8000, or leave it out",
            id="no value",
        ),
        pytest.param(
            "database: {host: db, name: 2024-01-01, user: x}",
            "database.name (line 1): must be text, such as parallama; it is a date or binary data: "
            "put it in quotes",
            id="a date for text",
        ),
        pytest.param(
            "database: {host: db, name: 2024-99-99, user: x}",
            "database.name (line 1): cannot be read: if it is text, put it in quotes",
            id="a date that is none",
        ),
        pytest.param(
            "envoy: {log_level: off}",
            "envoy.log_level (line 1): must be trace, debug, info, warning, error, critical or "
            "off, such as warning; YAML reads a bare on, off, yes or no as true or false: "
            "put it in quotes",
            id="YAML's off",
        ),
        pytest.param(
            "rate_limiting: {when_redis_is_away: shrug}",
            "rate_limiting.when_redis_is_away (line 1): must be deny, allow or local, such as deny",
            id="not one of the words",
        ),
        pytest.param(
            "api_gateways: {enabled: ollama}",
            "api_gateways.enabled (line 1): must be a list, such as [ollama, openai]; it is text",
            id="text for a list",
        ),
        pytest.param(
            "api_gateways: {enabled: []}",
            "api_gateways.enabled (line 1): must not be empty, such as [ollama, openai]",
            id="an empty list",
        ),
        pytest.param(
            "api_gateways: {openai: {model_mappings: {gpt-4: 5}}}",
            "api_gateways.openai.model_mappings.gpt-4 (line 1): must be text; it is a number: "
            "put it in quotes",
            id="a number inside of a mapping",
        ),
        pytest.param(
            "api_gateways: {ollama: {base_path: /v1}}",
            "api_gateways.ollama.base_path (line 1): must stay /ollama/v1: routes are Envoy's; "
            "add yours in envoy/routes.yaml",
            id="Ollama's path is Envoy's",
        ),
        pytest.param(
            "api_gateways: {openai: {base_path: /v1}}",
            "api_gateways.openai.base_path (line 1): must stay /openai/v1: routes are Envoy's; "
            "add yours in envoy/routes.yaml",
            id="OpenAI's path is Envoy's",
        ),
        pytest.param(
            "server: {host: example.org}",
            "server.host (line 1): must be an IP address of this machine, such as 127.0.0.1, "
            "or 0.0.0.0 for all of them",
            id="a name to listen on",
        ),
        pytest.param(
            "redis: {host: 'redis://:hunter2@box'}",
            "redis.host (line 1): must be a host name or an IP address and nothing else, "
            "such as 127.0.0.1",
            id="a URL for a host",
        ),
        pytest.param(
            "state_dir: ''",
            "state_dir (line 1): must be a path, such as /var/lib/parallama",
            id="an empty path",
        ),
        pytest.param(
            "database: {path: a, host: b, name: c, user: d}",
            "database.path (line 1): is SQLite's and database.host is PostgreSQL's: "
            "remove one of the two",
            id="two databases",
        ),
        pytest.param(
            "database: {host: b, name: c}",
            "database.user (line 1): is missing: PostgreSQL (database.host) needs it, "
            "such as parallama",
            id="half a PostgreSQL",
        ),
        pytest.param(
            "database: {name: c}",
            "database.name (line 1): belongs to PostgreSQL: set database.host too, or remove it",
            id="PostgreSQL without its host",
        ),
        pytest.param(
            "database: {ssl_mode: require}",
            "database.ssl_mode (line 1): belongs to PostgreSQL: set database.host too, "
            "or remove it",
            id="TLS to SQLite",
        ),
        pytest.param(
            "usage: {batch_rows: 1}\nserver: {port: 1}\nusage: {batch_rows: 2}",
            "usage (line 3): stands twice, first in line 1: keep one of them",
            id="a section twice",
        ),
        pytest.param(
            "server:\n  port: 1\n  port: 1",
            "server.port (line 3): stands twice, first in line 2: keep one of them",
            id="a setting twice",
        ),
        pytest.param(
            "server:\n\tport: 1",
            "line 2: not valid YAML at column 1: a tab: indent with spaces",
            id="a tab",
        ),
        pytest.param(
            "server:\n  host: a\n  port: 1: 2",
            "line 3: not valid YAML at column 10: mapping values are not allowed here",
            id="a syntax error",
        ),
        pytest.param(
            "redis: {password: *hunter2}",
            "line 1: not valid YAML at column 19: found undefined alias",
            id="an alias of nothing",
        ),
        pytest.param(
            "usage: &a {}\nmodel: *a",
            "model (line 2): is an alias (*name): write the value out instead",
            id="an alias",
        ),
        pytest.param(
            "envoy: {dir: !hunter2 x}",
            "envoy.dir (line 1): has a tag (!name): write a plain value",
            id="a tag",
        ),
        pytest.param(
            "usage: !hunter2 {}",
            "usage (line 1): has a tag (!name): write a plain value",
            id="a tag on a section",
        ),
        pytest.param(
            "server: {port: 1}\n---\nserver: {port: 2}",
            "line 2: not valid YAML at column 1: but found another document",
            id="two documents",
        ),
        pytest.param(
            "[a]: 1",
            "line 1: has a list or a mapping for a key: keys are text",
            id="a list for a key",
        ),
        pytest.param(
            "server: {port: 1}\n# \x07",
            "line 2: holds a character that YAML does not allow (a control code?)",
            id="a control character",
        ),
        pytest.param("[" * 5000, "line 1: is nested too deeply", id="a deep hole"),
        pytest.param(
            "",
            "the file is empty: copy config.example.yaml, or write {} for the defaults",
            id="empty",
        ),
        pytest.param(
            "# server: {}\n",
            "the file is empty: copy config.example.yaml, or write {} for the defaults",
            id="nothing but comments",
        ),
        pytest.param(
            "- server",
            "the file is a list; it must be settings by name, such as server: {port: 8000}",
            id="a list",
        ),
    ],
)
def test_a_mistake_says_where_it_is_and_what_to_write(text: str, told: str, tmp_path: Path) -> None:
    assert mistakes(tmp_path, text) == [told]


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        pytest.param(
            {"PARALLAMA_SERVER__PORT": "many"},
            "server.port (PARALLAMA_SERVER__PORT): must be a whole number, such as 8000; "
            "it is text",
            id="wrong kind",
        ),
        pytest.param(
            {"PARALLAMA_SERVER__PORT": ""},
            "server.port (PARALLAMA_SERVER__PORT): has no value: write one, such as 8000, "
            "or leave it out",
            id="empty",
        ),
        pytest.param(
            {"PARALLAMA_SERVER": "{port: 1}"},
            "PARALLAMA_SERVER: unknown setting; did you mean PARALLAMA_SERVER__PORT?",
            id="a whole section",
        ),
        pytest.param(
            {"PARALLAMA_server__port": "1"},
            "PARALLAMA_server__port: unknown setting; did you mean PARALLAMA_SERVER__PORT?",
            id="small letters",
        ),
        pytest.param(
            {"PARALLAMA_REDIS__HOST": "'hunter2"},
            "redis.host (PARALLAMA_REDIS__HOST): is not a YAML value: if it is text, put it in "
            "double quotes of its own",
            id="not YAML",
        ),
        pytest.param(
            {"PARALLAMA_REDIS__HOST": "no"},
            "redis.host (PARALLAMA_REDIS__HOST): must be text, such as 127.0.0.1; YAML reads a "
            "bare on, off, yes or no as true or false: put it in quotes",
            id="YAML's no",
        ),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(
    environ: dict[str, str], told: str, tmp_path: Path
) -> None:
    assert mistakes(tmp_path, "{}", environ) == [told]


def test_a_variable_for_a_section_that_the_file_makes_a_value(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "server: 5", {"PARALLAMA_SERVER__PORT": "1"}) == [
        "server (line 1): must be a section: its settings by name, indented below it; "
        "it is a number"
    ]


def test_unknown_variables_are_told_beside_broken_yaml(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "server: {", {"PARALLAMA_X": "1"})[1:] == [
        "PARALLAMA_X: unknown setting; names look like PARALLAMA_SERVER__PORT, for server.port"
    ]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        pytest.param(None, "does not exist; relative paths start at DIR", id="missing"),
        pytest.param(b" \n", "is empty: write the secret into it", id="empty"),
        pytest.param(b"\xff\xfe", "is not UTF-8 text", id="not UTF-8"),
        pytest.param(b"x" * 65_537, "is larger than 65536 bytes", id="huge"),
    ],
)
def test_a_secret_file_that_cannot_be_used(
    content: bytes | None, told: str, tmp_path: Path
) -> None:
    if content is not None:
        write(tmp_path, content, "secret")
    assert mistakes(tmp_path, "redis: {password_file: secret}") == [
        f"redis.password_file (line 1): the file it names {told}"
    ]


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o644])
def test_a_secret_file_that_everybody_may_read_or_change(mode: int, tmp_path: Path) -> None:
    write(tmp_path, "x", "secret", mode)
    assert mistakes(tmp_path, "redis: {password_file: secret}") == [
        "redis.password_file (line 1): every user of this machine may read or change the file: "
        "run chmod o= on it"
    ]


def test_a_secret_file_that_is_a_folder_or_a_pipe(tmp_path: Path) -> None:
    """A pipe nobody writes to would otherwise be waited for, without end."""
    os.mkfifo(tmp_path / "pipe")
    for name in (".", "pipe"):
        assert mistakes(tmp_path, f"redis: {{password_file: {name}}}") == [
            "redis.password_file (line 1): the file it names is not a regular file; "
            "relative paths start at DIR"
        ]


def test_a_secret_that_has_several_lines_is_whole(tmp_path: Path) -> None:
    write(tmp_path, "-----BEGIN-----\nabc\n-----END-----\n", "pem")
    config = loaded(tmp_path, "authentication: {jwt_secret_key_file: pem}")
    assert config.authentication.jwt_secret_key == SecretText("-----BEGIN-----\nabc\n-----END-----")


@pytest.mark.parametrize(
    "value", ["hunter2 x", "'hunter2", "[hunter2]", "http://u:hunter2@x", "!hunter2 x", "*hunter2"]
)
def test_no_message_repeats_a_value(value: str, tmp_path: Path) -> None:
    """It may be a secret that stands in the wrong place."""
    assert "hunter2" not in "".join(mistakes(tmp_path, "{}", dict.fromkeys(variables(), value)))


def test_a_secret_file_whose_name_the_system_refuses(tmp_path: Path) -> None:
    assert mistakes(tmp_path, f"redis: {{password_file: {'x' * 300}}}") == [
        "redis.password_file (line 1): the file it names cannot be read: File name too long"
    ]


@pytest.fixture
def not_root() -> Iterator[None]:
    """Root may read everything."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)
    yield
    os.seteuid(user)


@pytest.fixture
def a_closed_file(tmp_path: Path) -> Path:
    return write(tmp_path, "{}", mode=0o000)


@pytest.mark.usefixtures("a_closed_file", "not_root")
def test_a_file_that_may_not_be_read(a_closed_file: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: Permission denied"):
        load(a_closed_file, {})


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file; `parallama init` writes"):
        load(tmp_path / "none.yaml", {})


def test_a_folder_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder; name the file in it"):
        load(tmp_path, {})


def test_a_path_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match="loop: cannot be read: Too many levels"):
        load(tmp_path / "loop", {})


def test_a_file_that_is_not_utf_8(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="line 2 is not UTF-8 text: save it as UTF-8"):
        load(write(tmp_path, b"server: {}\n# caf\xe9\n"), {})


def test_a_file_that_is_far_too_large(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="larger than 1048576 bytes"):
        load(write(tmp_path, b"#" * 1_048_577), {})


def test_a_byte_order_mark_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbfserver:\r\n  port: 81\r\n")
    assert load(path, {}).server.port == 81


@pytest.mark.parametrize(
    ("host", "url", "upstream"),
    [
        ("http://127.0.0.1", "http://127.0.0.1:11434", ("http", "127.0.0.1", 11434)),
        (
            "HTTPS://Models.example/",
            "https://models.example:11434",
            ("https", "models.example", 11434),
        ),
        ("gpu_box-1", "http://gpu_box-1:11434", ("http", "gpu_box-1", 11434)),
        ("http://[fd00::1]", "http://[fd00::1]:11434", ("http", "fd00::1", 11434)),
        ("::1", "http://[::1]:11434", ("http", "::1", 11434)),
    ],
)
def test_the_upstream(host: str, url: str, upstream: tuple[str, str, int], tmp_path: Path) -> None:
    config = loaded(tmp_path, f"api_gateways: {{ollama: {{host: '{host}'}}}}")
    assert config.api_gateways.ollama.url == url
    assert config.api_gateways.ollama.upstream() == upstream


@pytest.mark.parametrize(
    ("host", "told"),
    [
        ("ftp://x", "must begin with http:// or https://, such as http://127.0.0.1"),
        ("http://x:80", "must not name a port: that is the setting `port` beside it"),
        ("x:80", "must not name a port: that is the setting `port` beside it"),
        ("http://x/v1", "must end after the host: paths are Envoy's, see envoy/routes.yaml"),
        ("http://x?a", "must end after the host: paths are Envoy's, see envoy/routes.yaml"),
        ("http://anna:hunter2@x", "must not hold a user or a password"),
        ("http://[::1", "must be a URL, such as http://127.0.0.1"),
        ("http://", "must be a host name or an IP address and nothing else, such as 127.0.0.1"),
        ("a b", "must be a host name or an IP address and nothing else, such as 127.0.0.1"),
    ],
)
def test_an_upstream_that_is_none(host: str, told: str, tmp_path: Path) -> None:
    assert mistakes(tmp_path, f"api_gateways: {{ollama: {{host: '{host}'}}}}") == [
        f"api_gateways.ollama.host (line 1): {told}"
    ]


@pytest.mark.parametrize(
    ("size", "expected"),
    [("100M", 104_857_600), ("2k", 2048), ("1 GB", 1 << 30), ("1MiB", 1 << 20), ("4096", 4096)],
)
def test_sizes(size: str, expected: int, tmp_path: Path) -> None:
    assert loaded(tmp_path, f"logging: {{max_size: {size}}}").logging.max_size == expected


@pytest.mark.parametrize("size", ["-1M", "1.5M", "M", "1T", "0", "12 parsecs", "1e9", "[1M]"])
def test_sizes_that_are_none(size: str, tmp_path: Path) -> None:
    [told] = mistakes(tmp_path, f"logging: {{max_size: {size}}}")
    assert told.startswith("logging.max_size (line 1): must be")


@pytest.mark.parametrize(("given_host", "host"), [("localhost", "127.0.0.1"), ("'::'", "::")])
def test_addresses_to_listen_on(given_host: str, host: str, tmp_path: Path) -> None:
    assert loaded(tmp_path, f"server: {{host: {given_host}}}").server.host == host


def test_levels_may_be_written_small(tmp_path: Path) -> None:
    config = loaded(tmp_path, "logging: {level: debug}\nenvoy: {log_level: Info}")
    assert (config.logging.level, config.envoy.log_level) == ("DEBUG", "info")


def test_what_has_no_effect_is_named(tmp_path: Path) -> None:
    config = loaded(
        tmp_path,
        "redis: {port: 1}\napi_gateways: {openai: {compatibility_mode: false}}",
        {"PARALLAMA_DATABASE__PORT": "5433"},
    )
    assert warnings(config) == [
        "api_gateways.openai.compatibility_mode has no effect yet: it belongs to a later release",
        "database.port has no effect without database.host",
        "redis.port has no effect without redis.host",
    ]


def test_hs256_needs_its_secret_and_the_others_have_keys(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "authentication: {jwt_algorithm: HS256}") == [
        "authentication.jwt_secret_key_file (line 1): is missing: authentication.jwt_algorithm "
        "HS256 needs it"
    ]
    write(tmp_path, "secret", "secret")
    told = "jwt_algorithm: HS256, jwt_secret_key_file: secret, signing_keys_dir: keys"
    config = loaded(tmp_path, f"authentication: {{{told}}}")
    assert warnings(config) == [
        "authentication.signing_keys_dir has no effect with authentication.jwt_algorithm HS256"
    ]
    assert config.signing_dir == tmp_path / "keys"
    assert loaded(tmp_path, "state_dir: s").signing_dir == tmp_path / "s" / "signing"


def test_a_tree_can_be_made_without_a_file() -> None:
    config = Config()
    assert config.dir == Path.cwd()
    assert config.state_dir == Path.cwd() / "state"
    secret = SecretFile(Path("x"), SecretText("y"))
    made = Config.model_validate({"redis": {"password_file": secret}})
    assert made.redis.password == SecretText("y")


def test_every_setting_has_a_description() -> None:
    assert [each.path for each in settings() if len(each.description) < 8] == []


YAMLISH = st.text(alphabet="ab: -[]{}&*!|>'\"#%@`,?\n\t\x00\u2028server1.~<", max_size=60)


@examples(150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=YAMLISH)
@example(text="a: &a [*a]")
@example(text="!!int a")
@example(text="? ")
@example(text="<<: {server: {port: 1}}")
@example(text="server: {port: " + "9" * 5000 + "}")
def test_any_text_loads_or_is_refused_as_a_configuration(text: str, tmp_path: Path) -> None:
    with suppress(ConfigError):
        loaded(tmp_path, text)


def test_lines_of_a_document() -> None:
    document = parse("a:\n  - 1\n  - b: 2\n")
    assert document.data == {"a": [1, {"b": 2}]}
    assert document.lines == {("a",): 1, ("a", 0): 2, ("a", 1): 3, ("a", 1, "b"): 3}


# Issuers.

SSO = "{issuer: https://sso.test, audience: p, jwks_url: https://sso.test/jwks"


def test_an_issuer_needs_little(tmp_path: Path) -> None:
    (issuer,) = loaded(tmp_path, f"authentication: {{issuers: [{SSO}}}]}}").authentication.issuers
    assert issuer.keys_at == "https://sso.test/jwks"
    assert (issuer.algorithms, issuer.default_role, issuer.create_users) == (
        ("RS256",),
        "user",
        False,
    )


def test_an_issuers_keys_may_be_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "jwks.json").write_text("{}")
    told = "authentication: {issuers: [{issuer: a, audience: p, jwks_file: jwks.json}]}"
    (issuer,) = loaded(tmp_path, told).authentication.issuers
    assert issuer.keys_at == tmp_path / "jwks.json"


@pytest.mark.parametrize(
    ("issuers", "said"),
    [
        ("{issuer: a, jwks_url: 'https://a/x'}", "[0].audience (line 1): is missing"),
        ("{issuer: a, audience: p}", "[0] (line 1): needs jwks_url or jwks_file"),
        ("{issuer: a, audience: p, jwks_url: 'http://a.test/jwks'}", "must begin with https://"),
        ("{issuer: a, audience: p, jwks_url: 'http://sso.test'}", "must begin with https://"),
        ("{issuer: a, audience: p, jwks_url: 'https://u:p@a'}", "must not hold a user"),
        ("{issuer: a, audience: p, jwks_file: none.json}", "does not exist"),
        (SSO + ", algorithms: [HS256]}", "[0].algorithms[0] (line 1): must be RS256"),
        (SSO + ", algoritms: [RS256]}", "did you mean authentication.issuers[0].algorithms?"),
        (SSO + ", roles: {ops: operator}}", "needs role_claim"),
        (SSO + ", role_claim: g, roles: {ops: Ops}}", "a role is named by"),
        (SSO + ", default_role: A}", "a role is named by"),
        ("{issuer: parallama, audience: p, jwks_url: 'https://a/x'}", "that is who we are"),
        (SSO + "}, " + SSO + "}", "names an issuer twice"),
        ("7", "[0] (line 1): must be a section"),
    ],
)
def test_what_is_wrong_with_an_issuer_is_said(tmp_path: Path, issuers: str, said: str) -> None:
    assert said in str(mistakes(tmp_path, f"authentication: {{issuers: [{issuers}]}}"))


def test_gateways_choose_for_themselves_who_counts_text(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("{}")
    assert load(file, {}).api_gateways.text_counted == frozenset()
    file.write_text("api_gateways: {openai: {count_tokens: tiktoken}}")
    assert load(file, {}).api_gateways.text_counted == {"openai"}
    file.write_text("api_gateways: {ollama: {count_tokens: guess}}")
    with pytest.raises(ConfigError, match=r"count_tokens.*learned or tiktoken"):
        load(file, {})
