"""The one agent of this worker process, as the parts of the worker reach it. None before its start and in children."""

from __future__ import annotations

from dflow.runtime.agent import AgentProcess

_agent: AgentProcess | None = None


def set_agent(agent: AgentProcess | None) -> None:
    """Remember the agent."""
    global _agent
    _agent = agent


def agent() -> AgentProcess | None:
    """Return the agent, when there is one."""
    return _agent
