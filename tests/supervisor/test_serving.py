"""One `parallama up` that lives through all of this: children that die, reloads, mistakes."""

import json
import os
import shutil
import signal
import sqlite3
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from parallama.roles import Role
from parallama.supervisor.envoy_files import packaged
from tests.e2e.gateway import Gateway, Json, Someone, says, until
from tests.standin import StandIn
from tests.supervisor.supervised import CHAT, refused, up, wait_for_event

CHILDREN = ("authz", "ratelimit", "usage_sink", "admin", "valkey", "envoy")


@pytest.fixture(scope="module")
def upstream() -> Iterator[StandIn]:
    with StandIn() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, upstream: StandIn) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("up")
    shutil.copytree(packaged(), folder / "envoy")
    settings = "envoy: {dir: envoy}\nauthentication: {refresh_grace_seconds: 60}\n"
    with up(folder, upstream, settings) as running:
        yield running


@pytest.fixture(scope="module")
def someone(gateway: Gateway) -> Someone:
    return gateway.someone(tokens=1_000_000)


def works(someone: Someone) -> bool:
    """Whether a limited request passes through everything, down to its row."""
    answer = someone.post("/v1/chat/completions", CHAT)
    if answer.status_code != 200:
        return False
    return someone.gateway.row(answer)["tokens_used"] > 0


def hang_up(gateway: Gateway) -> None:
    gateway.process.send_signal(signal.SIGHUP)


def count(gateway: Gateway, event: str) -> int:
    return sum(line["event"] == event for line in gateway.events())


def edited(path: Path, change: Callable[[str], str]) -> str:
    """Change a file by renaming a new one into its place; what it was."""
    before = path.read_text()
    after = change(before)
    assert after != before
    fresh = path.with_suffix(".test")
    fresh.write_text(after)
    os.replace(fresh, path)
    return before


def python_processes(gateway: Gateway) -> dict[str, float]:
    """Resident MB of each of our own processes."""
    sizes = {}
    for pid in gateway.processes():
        argv = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        if "-m" in argv:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            sizes[argv[argv.index("-m") + 1]] = int(rollup.split("Rss:")[1].split()[0]) / 1024
    return sizes


def test_a_normal_start_says_nothing_alarming(gateway: Gateway) -> None:
    """Every line is ours and harmless: Envoy and Valkey have nothing to say."""
    lines = (gateway.folder / "up.log").read_text().splitlines()
    assert {json.loads(line)["level"] for line in lines} == {"info"}


def test_no_secret_stands_in_a_command_line(gateway: Gateway, someone: Someone) -> None:
    secret = (gateway.folder / "secrets" / "redis_password").read_text().strip()
    everybody = gateway.processes()
    assert len(everybody) == 7
    for pid in everybody:
        assert secret not in Path(f"/proc/{pid}/cmdline").read_text()


def test_what_is_secret_is_for_the_owner_alone(gateway: Gateway) -> None:
    state = gateway.config.state_dir
    modes = {
        state: 0o700,
        state / "run": 0o700,
        state / "valkey": 0o700,
        state / "valkey" / "valkey.conf": 0o600,
        state / "run" / "valkey.sock": 0o700,
        state / "run" / "authz.sock": 0o600,
        state / "run" / "envoy-admin.sock": 0o600,
        gateway.folder / "config.yaml": 0o600,
        gateway.config.database.path: 0o600,
        gateway.config.database.path.with_name("parallama.db-wal"): 0o600,
    }
    assert {path: stat.S_IMODE(path.stat().st_mode) for path in modes} == modes


def test_it_has_one_thread_so_that_its_death_is_told_once(gateway: Gateway) -> None:
    """The kernel tells children of each thread's. A second SIGTERM cuts Envoy short."""
    assert len(list(Path(f"/proc/{gateway.process.pid}/task").iterdir())) == 1


def test_a_second_up_on_the_same_folder_is_refused(gateway: Gateway) -> None:
    said = refused(gateway.config.source)
    assert f"another `parallama up` (process {gateway.process.pid}) runs on" in said
    assert gateway.http.get("/healthz").status_code == 200


def logged_in(gateway: Gateway) -> Json:
    """The tokens of a new admin."""
    admin = gateway.someone(role=Role.ADMIN)
    password = {"password": "correct horse battery"}
    set_to = admin.ask("PUT", f"/admin/v1/users/{admin.user_id}/password", json=password)
    assert set_to.status_code == 200, set_to.text
    answer = gateway.http.post("/auth/login", json={"username": admin.name, **password})
    assert answer.status_code == 200, answer.text
    told: Json = answer.json()
    return told


def test_all_python_processes_together_stay_small(gateway: Gateway, someone: Someone) -> None:
    """With everything in use: log-ins and tokens bring along most of what there is to load."""
    token = {"authorization": f"Bearer {logged_in(gateway)['access_token']}"}
    for _ in range(100):
        assert someone.get("/v1/models").status_code == 200
        assert someone.post("/v1/chat/completions", CHAT).status_code == 200
        assert gateway.http.get("/admin/v1/users", headers=token).status_code == 200
    sizes = python_processes(gateway)
    assert len(sizes) == 5
    assert sum(sizes.values()) < 250, sizes


@pytest.mark.parametrize("name", CHILDREN)
def test_a_child_that_is_killed_comes_back(gateway: Gateway, someone: Someone, name: str) -> None:
    os.kill(gateway.child(name), signal.SIGKILL)
    died = wait_for_event(gateway, "child died", child=name)
    assert (died["exit"], died["level"]) == ("SIGKILL", "warning")
    wait_for_event(gateway, "child serves again", child=name)
    until(lambda: works(someone))


def test_status_tells_of_children_that_died(gateway: Gateway, someone: Someone) -> None:
    told = gateway.cli("status")
    assert told["ok"] is True
    assert [child.split()[:2] for child in told["children"]] == [
        [name, "serving"]
        for name in ("valkey", "authz", "ratelimit", "usage_sink", "admin", "envoy")
    ]
    assert all(child.endswith("restarts 1, last exit SIGKILL)") for child in told["children"]), (
        told["children"]
    )


def test_status_is_not_ok_while_a_child_is_in_a_crash_loop(gateway: Gateway) -> None:
    file = gateway.config.run_dir / "children.json"
    before = file.read_text()
    told = json.loads(before)
    told["usage_sink"] |= {"state": "crash loop", "pid": None}
    file.write_text(json.dumps(told))
    try:
        with pytest.raises(AssertionError):  # exit code 1
            gateway.cli("status")
    finally:
        file.write_text(before)


def test_a_new_upstream_is_used_and_streams_to_the_old_one_go_on(
    gateway: Gateway, someone: Someone, upstream: StandIn
) -> None:
    def is_asked(server: StandIn) -> bool:
        before = len(server.requests)
        return works(someone) and len(server.requests) > before

    config = gateway.config.source
    port = f"port: {upstream.port}"
    held = says(tokens=3, hold_at=1)
    with StandIn() as other:
        with someone.stream("/v1/chat/completions", CHAT, headers=held) as answer:
            upstream.wait(lambda seen: seen.held)
            before = edited(config, lambda text: text.replace(port, f"port: {other.port}"))
            hang_up(gateway)
            until(lambda: is_asked(other))
            upstream.release()
            assert answer.read().endswith(b"data: [DONE]\n\n")
        config.write_text(before)
        hang_up(gateway)
        until(lambda: is_asked(upstream))
    assert count(gateway, "what else changed needs a restart") == 0


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.yaml", lambda text: f"{text}\nshutdown: {{drain_seconds: 7}}\n"),
        ("envoy/envoy.yaml", lambda text: text.replace("cluster: parallama", "cluster: ours")),
    ],
)
def test_what_needs_a_restart_is_told(
    gateway: Gateway, file: str, change: Callable[[str], str]
) -> None:
    path = gateway.folder / file
    told = count(gateway, "what else changed needs a restart")
    before = edited(path, change)
    hang_up(gateway)
    until(lambda: count(gateway, "what else changed needs a restart") > told)
    path.write_text(before)


@pytest.mark.parametrize(
    ("file", "change", "cause"),
    [
        pytest.param(
            "config.yaml",
            lambda text: text.replace("state_dir: state", "state_dri: state"),
            "did you mean state_dir?",
            id="config.yaml",
        ),
        pytest.param(
            "envoy/routes.yaml",
            lambda text: text.replace("cluster: upstream", "cluster: downstream"),
            "unknown cluster 'downstream'",
            id="routes.yaml",
        ),
        pytest.param(
            "envoy/clusters.yaml",
            lambda text: text.replace("type: STRICT_DNS", "type: STRICT_DSN"),
            "STRICT_DSN",
            id="clusters.yaml",
        ),
    ],
)
def test_a_mistake_in_a_reload_changes_nothing(
    gateway: Gateway, someone: Someone, file: str, change: Callable[[str], str], cause: str
) -> None:
    path = gateway.folder / file
    placed = {at: at.read_bytes() for at in (gateway.config.state_dir / "envoy").glob("*.yaml")}
    before = edited(path, change)
    refusals = count(gateway, "reload refused, nothing changed")
    try:
        hang_up(gateway)
        until(lambda: count(gateway, "reload refused, nothing changed") > refusals)
    finally:
        path.write_text(before)
    told = wait_for_event(gateway, "reload refused, nothing changed", level="error")
    assert cause in str(told["cause"])
    assert placed == {at: at.read_bytes() for at in placed}
    assert works(someone)


def test_envoys_own_copies_reload_when_renamed_into_place(
    gateway: Gateway, someone: Someone
) -> None:
    routes = gateway.config.state_dir / "envoy" / "routes.yaml"

    def with_hello(text: str) -> str:
        tree = yaml.safe_load(text)
        tree["resources"][0]["virtual_hosts"][0]["routes"].insert(
            0,
            {
                "name": "hello",
                "match": {"path": "/hello"},
                "direct_response": {"status": 200, "body": {"inline_string": "hello"}},
                "typed_per_filter_config": {
                    "identity": {
                        "@type": "type.googleapis.com/envoy.extensions.filters.http."
                        "ext_authz.v3.ExtAuthzPerRoute",
                        "disabled": True,
                    }
                },
            },
        )
        return yaml.safe_dump(tree)

    edited(routes, with_hello)
    until(lambda: gateway.http.get("/hello").text == "hello")
    edited(routes, lambda text: text.replace("direct_response", "direct_resp"))
    until(lambda: "update rejected" in gateway.log())
    assert gateway.http.get("/hello").text == "hello"
    assert works(someone)


def test_who_never_saw_the_answer_to_a_refresh_asks_again(gateway: Gateway) -> None:
    """The admin process is killed once the database has the successor of a refresh token."""
    told = logged_in(gateway)
    body = {"refresh_token": told["refresh_token"]}
    query = "SELECT count(*) FROM refresh_tokens WHERE replaced_at IS NOT NULL"
    with (
        closing(sqlite3.connect(f"file:{gateway.config.database.path}?mode=ro", uri=True)) as db,
        ThreadPoolExecutor(1) as thread,
    ):
        before = db.execute(query).fetchone()
        asked = thread.submit(gateway.http.post, "/auth/refresh", json=body)
        while db.execute(query).fetchone() == before and not asked.done():
            pass  # what is killed now may not have answered yet
        os.kill(gateway.child("admin"), signal.SIGKILL)
        asked.exception()  # however far it came, it is lost
        assert db.execute(query).fetchone() != before

    def refreshed() -> Json | None:
        answer = gateway.http.post("/auth/refresh", json=body)
        return answer.json() if answer.status_code == 200 else None

    again = until(refreshed)
    token = {"authorization": f"Bearer {again['access_token']}"}
    assert gateway.http.get("/auth/me", headers=token).status_code == 200
    onward = gateway.http.post("/auth/refresh", json={"refresh_token": again["refresh_token"]})
    assert onward.status_code == 200
