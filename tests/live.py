"""A real `dagster dev` (webserver, daemon, code server) on a temporary DAGSTER_HOME, spoken to by GraphQL."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from nbg_assets.driver import dagster_instance
from nbg_assets.partitions import sync_partitions
from nbg_core.config.load import load_profile
from nbg_core.config.profile import PROJECT_ROOT

SELECTOR = {"repositoryLocationName": "nbg", "repositoryName": "__repository__"}


@dataclass
class Live:
    url: str
    log: Path

    def ask(self, query: str, **variables: object) -> dict:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.url}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def until(self, what: str, condition: Callable[[], object], seconds: float):
        """The first true value of `condition`; fails with the server's log after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if value := condition():
                return value
            time.sleep(0.5)
        raise AssertionError(f"no {what} within {seconds} s; end of log:\n{self.log.read_text()[-4000:]}")

    def runs(self) -> list[dict]:
        query = "{ runsOrError { ... on Runs { results { runId status jobName tags { key value } } } } }"
        runs = self.ask(query)["runsOrError"]["results"]
        return [r | {"tags": {t["key"]: t["value"] for t in r["tags"]}} for r in runs]

    def launch(self, job: str, assets: list[str]) -> str:
        """Launch a run of some assets of an unpartitioned job; its id."""
        answer = self.ask(
            """mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) {
                 __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }""",
            params={"selector": SELECTOR | {"jobName": job, "assetSelection": [{"path": [a]} for a in assets]},
                    "runConfigData": {}, "mode": "default"},
        )["launchRun"]  # fmt: skip
        assert answer["__typename"] == "LaunchRunSuccess", answer
        return answer["run"]["runId"]

    def partitions(self) -> list[str]:
        query = '{ assetNodeOrError(assetKey: {path: ["queries"]}) { ... on AssetNode { partitionKeys } } }'
        return self.ask(query)["assetNodeOrError"]["partitionKeys"]


@contextmanager
def dagster_dev(profile_path: Path, folder: Path) -> Iterator[Live]:
    """`dagster dev` as `nbg dev` starts it; everything it started is gone afterwards."""
    env = {**os.environ, "NBG_PROFILE": str(profile_path), "DAGSTER_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    with prepared_home(env):
        pass
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = folder / "dagster_dev.log"
    command = [
        Path(sys.executable).parent / "dagster",
        "dev",
        "-w",
        "workspace.yaml",
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    with open(log, "w") as out:
        process = subprocess.Popen(
            command, cwd=PROJECT_ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    live = Live(f"http://127.0.0.1:{port}", log)
    try:
        live.until("webserver", lambda: _answers(live), 90)
        yield live
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        process.send_signal(signal.SIGINT)
        _, left = psutil.wait_procs(family, timeout=5)
        for p in left:
            p.kill()


@contextmanager
def prepared_home(env: dict[str, str]) -> Iterator[None]:
    """DAGSTER_HOME as `nbg dev` prepares it: with dagster.yaml, and a partition of every query file."""
    before = {name: os.environ.get(name) for name in ("NBG_PROFILE", "DAGSTER_HOME")}
    os.environ.update({name: env[name] for name in before})
    try:
        profile = load_profile()
        with dagster_instance(profile) as instance:
            sync_partitions(instance, profile)
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def _answers(live: Live) -> bool:
    try:
        query = "{ workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError { __typename } } } } }"
        entries = live.ask(query)["workspaceOrError"]["locationEntries"]
    except (urllib.error.URLError, ConnectionError):
        return False
    kinds = [e["locationOrLoadError"] and e["locationOrLoadError"]["__typename"] for e in entries]
    assert "PythonError" not in kinds, live.log.read_text()[-4000:]
    return kinds == ["RepositoryLocation"]


def processes_naming(text: str) -> list[psutil.Process]:
    """Live processes that have `text` in their command line."""
    found = []
    for p in psutil.process_iter():
        try:
            if text in " ".join(p.cmdline()) and p.status() != psutil.STATUS_ZOMBIE:
                found.append(p)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found
