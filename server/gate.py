"""What is settled about the tool gate before anything runs: the mode, the policy that holds, and what is refused."""

import logging
from dataclasses import dataclass
from typing import Any

from server.artifacts.versions import PolicyVersion
from server.config import GateSettings
from server.core import GateMode, GenerationRequest, InvalidRequest, ToolGateAsk, ToolUse
from server.decisions import Decisions, Gated
from server.engine.base import EngineDelta
from server.gate_policies import Found, Policies
from server.gate_probes import Prober
from server.steering import Plan
from steering.toolgate import Served

_MODES: tuple[GateMode, ...] = ("off", "observe", "enforce")
_MODE = "tool_gate.mode"

log = logging.getLogger("deltaworks.gate")


@dataclass(frozen=True)
class GatePlan:
    """`found` None: no policy, or none is needed. `edits`: what steering does to the model meanwhile."""

    mode: GateMode
    found: Found | None
    served: Served
    edits: Plan


class Gate:
    """The section `gate` of the settings, the policies, and what asks the probes."""

    def __init__(self, settings: GateSettings, policies: Policies, prober: Prober, base_fingerprint: str) -> None:
        self.settings = settings
        self.policies = policies
        self.prober = prober
        self._base_fingerprint = base_fingerprint
        self._template_sha256 = prober.prompts.tool_template_sha256
        self._warned: set[tuple[str, str]] = set()

    def plan(
        self, request: GenerationRequest, delta: EngineDelta | None, edits: Plan, decisions: Decisions
    ) -> GatePlan | None:
        """None for a request without tools. Raises InvalidRequest for what this server does not allow, NameNotFound."""
        use, asked = request.tools, request.tool_gate
        if use is None:
            return None
        mode = self._mode(asked)
        digest = delta.digest if delta else None
        found = None
        if asked.policy is not None:
            found = self.policies.named(asked.policy, "tool_gate.policy")
        elif mode != "off" and use.choice == "auto":
            found = self.policies.bound_to(digest)
        if found is not None and mode != "off":
            self._check_threshold(asked, found.version)
        choice = _wire_choice(use)
        gated = decisions.gated = Gated(
            mode, choice, choice, asked.explain, self.settings.log_records and mode != "off"
        )
        if found is not None and mode != "off":
            gated.policy, gated.placement = found.name, found.version.placement
        served = Served(self._base_fingerprint, digest, self._template_sha256)
        return GatePlan(mode, found, served, edits)

    def _mode(self, asked: ToolGateAsk) -> GateMode:
        ours = self.settings.mode
        wanted = asked.mode or ours
        distance = _MODES.index(wanted) - _MODES.index(ours)
        if distance > 0 and not self.settings.allow_opt_in:
            raise InvalidRequest(
                f"this server's gate is at {ours!r}, and requests cannot ask for more of it", param=_MODE
            )
        if distance < 0 and not self.settings.allow_opt_out:
            raise InvalidRequest(
                f"this server's gate is at {ours!r}, and requests cannot ask for less of it", param=_MODE
            )
        return wanted

    def _check_threshold(self, asked: ToolGateAsk, policy: PolicyVersion) -> None:
        if asked.threshold is None or self.settings.allow_lower_threshold:
            return
        if policy.threshold is None or asked.threshold < policy.threshold:
            least = "never withholds tools" if policy.threshold is None else f"asks for {policy.threshold:g}"
            raise InvalidRequest(f"the policy {least}; a request can only ask for more", param="tool_gate.threshold")

    def warn_of_mismatch(self, digest: str, problem: str) -> None:
        """Once per policy and problem: every request has its own record."""
        if (digest, problem) not in self._warned:
            self._warned.add((digest, problem))
            log.warning("a tool-gate policy does not hold here: %s", problem, extra={"fields": {"policy": digest}})


def _wire_choice(use: ToolUse) -> Any:
    if use.named is not None:
        return {"type": "function", "function": {"name": use.named}}
    return use.choice
