"""The agent itself, with task processes of our own that say what real ones never would."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from dflow.core.messages import Nudge
from dflow.runtime.agent import AgentEnd, AgentProcess
from tests.integration.worker.rig import WorkerRig
from tests.support import eventually

pytestmark = pytest.mark.integration

_PROLOGUE = """
import json, os, sys, time
from dflow.runtime.client import AgentClient
from dflow.runtime.protocol import encode_frame
from dflow.core.errors import AgentRequestError, StaleAttemptError
def say(value): print(json.dumps(value), flush=True)
client = AgentClient.connect(sys.argv[1])
def claim(ti_id, attempt_id): return client.claim(ti_id, attempt_id) is not None
def finish(**values): client._send({"op": "finish", "reason": "succeeded", **values})
"""


class Fake:
    """A task process that runs given code with a client."""

    def __init__(self, agent: AgentProcess, code: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROLOGUE + code, agent.socket_path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()


@pytest.fixture
def fakes() -> Iterator[list[Fake]]:
    made: list[Fake] = []
    yield made
    for one in made:
        one.close()


@pytest.fixture
def ends() -> list[AgentEnd]:
    return []


@pytest.fixture
def agent(rig: WorkerRig, ends: list[AgentEnd]) -> Iterator[AgentProcess]:
    settings = rig.settings.with_values({"worker.lease_seconds": 4.0, "worker.kill_grace": 0.5}, source="test")
    agent = AgentProcess.start(
        settings, name="a1", executor="LocalExecutor", queues=["*"], concurrency=4, on_exit=ends.append
    )
    yield agent
    agent.stop()
    assert agent.is_gone


def _claim(nudge: Nudge) -> str:
    return f"claim({nudge.ti_id}, {nudge.attempt_id!r})"


def _queue(rig: WorkerRig, count: int) -> list[Nudge]:
    return rig.queue_many(rig.dag("@task\ndef t(): pass\nt()\n"), ["t"], copies=count)


def test_a_poisoned_request_fails_alone(rig: WorkerRig, agent: AgentProcess, fakes: list[Fake]) -> None:
    poisoned, pushing, fine = _queue(rig, 3)
    code = f"""
say({_claim(poisoned)}); sys.stdin.readline()
finish(xcoms={{"return_value": chr(0xd800)}}, lines=[[1.0, "INFO", "x", "kept"]])
say(claim(1, {str(uuid.uuid4())!r}))
"""
    fakes.append(Fake(agent, code))
    fakes.append(
        Fake(
            agent,
            f"""
say({_claim(pushing)}); sys.stdin.readline()
try:
    client.push_xcom("k", chr(0xd800))
except AgentRequestError as error:
    say("refused")
client.push_xcom("k", "good")
finish()
say(claim(1, {str(uuid.uuid4())!r}))
""",
        )
    )
    fakes.append(Fake(agent, f"say({_claim(fine)}); sys.stdin.readline(); finish(xcoms={{'return_value': 1}}); say(0)"))
    assert [one.hear() for one in fakes] == ["true"] * 3
    for one in fakes:
        assert one.process.stdin is not None
        one.process.stdin.write("\n")
        one.process.stdin.flush()
    row = rig.wait(poisoned, "failed")
    assert row.reason == "fail_raised"
    assert "cannot be stored" in row.cause
    assert [text for _, _, text in rig.lines(poisoned)] == ["kept"]
    rig.wait(pushing)
    rig.wait(fine)
    assert fakes[1].hear() == '"refused"'
    values = rig.rows("SELECT map_index, key, value FROM xcom ORDER BY map_index")
    assert [tuple(row) for row in values] == [(1, "k", "good"), (2, "return_value", 1)]


def test_nonsense_closes_the_connection_that_sent_it_and_nothing_else(
    rig: WorkerRig, agent: AgentProcess, fakes: list[Fake]
) -> None:
    frames = [
        "b'\\xff\\xff\\xff\\xff'",
        "encode_frame({'no': 'op'})",
        "b'\\x00\\x00\\x00\\x02[]'",
        "encode_frame({'op': 'claim'})",
        "encode_frame({'op': 'finish'}) + b'\\x00\\x00\\x00\\x01{'",
    ]
    for frame in frames:
        fakes.append(Fake(agent, f"client.socket.sendall({frame}); say(client.socket.recv(1) == b'')"))
        assert fakes[-1].hear() == "true"
    (nudge,) = _queue(rig, 1)
    fakes.append(Fake(agent, f"say({_claim(nudge)}); client._send({{'op': 'rm -rf'}}); time.sleep(60)"))
    assert fakes[-1].hear() == "true"
    row = rig.wait(nudge, "up_for_retry")  # it was ended, for it cannot be spoken with any more
    assert row.infra_failures == 1
    assert not agent.is_gone


def test_a_worker_declared_gone_ends_its_tasks_and_starts_anew(
    rig: WorkerRig, agent: AgentProcess, fakes: list[Fake]
) -> None:
    first, second = _queue(rig, 2)
    fakes.append(Fake(agent, f"say({_claim(first)}); time.sleep(60)"))
    assert fakes[0].hear() == "true"
    rig.execute("UPDATE worker SET state = 'gone', ended_at = now(), cause = 'test'")
    assert fakes[0].process.wait(15) == -9
    eventually(lambda: rig.rows("SELECT 1 FROM worker WHERE state = 'live'"), 10)
    assert rig.ti(first).state == "running"  # its rescue is the rescuer's
    fakes.append(Fake(agent, f"say({_claim(second)}); finish(); time.sleep(60)"))
    assert fakes[1].hear() == "true"
    rig.wait(second)


def test_an_attempt_the_database_says_is_ours_and_that_we_do_not_know_is_handed_back(
    rig: WorkerRig, agent: AgentProcess
) -> None:
    (nudge,) = _queue(rig, 1)
    rig.execute(
        "UPDATE task_instance SET state = 'running', try_number = 1, worker_id = (SELECT id FROM worker) WHERE id = :i",
        i=nudge.ti_id,
    )
    row = rig.wait(nudge, "up_for_retry", deadline_seconds=15)
    assert (row.reason, row.infra_failures) == ("worker_lost", 1)


def test_draining_refuses_claims_and_gives_queued_attempts_back_at_once(
    rig: WorkerRig, agent: AgentProcess, fakes: list[Fake], ends: list[Any]
) -> None:
    running, queued = _queue(rig, 2)
    fakes.append(Fake(agent, f"say({_claim(running)}); time.sleep(60)"))
    assert fakes[0].hear() == "true"
    agent.drain(300.0)
    eventually(lambda: rig.rows("SELECT 1 FROM worker WHERE state = 'draining'"), 10)
    fakes.append(Fake(agent, f"say({_claim(queued)})"))
    assert fakes[1].hear() == "false"
    row = rig.wait(queued, "scheduled")
    assert (row.reason, row.attempt_id, row.try_number) == ("worker_drained", None, 0)
    agent.drain(0.0)
    row = rig.wait(running, "up_for_retry")
    assert (row.reason, row.infra_failures) == ("worker_drained", 0)
    agent.stop()
    (end,) = eventually(lambda: ends, 10, message="the end of the agent is reported")
    assert (end.exit_code, end.is_expected) == (0, True)
    assert rig.rows("SELECT state FROM worker")[0][0] == "gone"


def test_a_process_that_finished_and_left_has_finished(rig: WorkerRig, agent: AgentProcess, fakes: list[Fake]) -> None:
    nudges = _queue(rig, 5)
    for nudge in nudges:
        fakes.append(Fake(agent, f"say({_claim(nudge)}); finish(); os._exit(3)"))
    for nudge in nudges:
        row = rig.wait(nudge)
        assert (row.state, row.reason) == ("success", "succeeded")


def test_the_end_of_the_agent_is_reported_and_its_directory_goes(
    rig: WorkerRig, agent: AgentProcess, fakes: list[Fake], ends: list[Any]
) -> None:
    (nudge,) = _queue(rig, 1)
    code = f"say({_claim(nudge)}); print(client.socket.recv(1)); client.task_states(['t'])"
    fakes.append(Fake(agent, code))
    assert fakes[0].hear() == "true"
    subprocess.run(["kill", "-9", str(agent.pid)], check=True)
    assert agent.wait(10) is not None
    eventually(lambda: ends, 5)
    assert not ends[0].is_expected
    assert "SIGKILL" in ends[0].cause
    assert fakes[0].process.wait(10) == 76
