"""``tierplane alerts``, with a controller that is played."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from controlplane.cli import main
from controlplane.cli.controller_access import PlaneAccess
from controlplane.cli.lifecycle import status
from controlplane.cli.operating import alerts
from controlplane.core.alerts.alert import AlertState, Severity
from controlplane.core.alerts.rules import RULES
from controlplane.core.alerts.views import AlertsResponse, AlertView, FiringAlert, SilenceView, WebhookView
from controlplane.core.cluster.snapshot import ClusterSnapshot
from controlplane.core.domain.event import Event
from controlplane.core.reconcile.commands import ActionOutcome, ActionResponse
from controlplane.core.reconcile.migrations import Activity
from tests.support.alerts import TIER_DOWN
from tests.support.fake_plane import FakePlane

EVENTS = (
    Event(1, 1000.0, "ready", "small-1", "generation 1", "small"),
    Event(2, 1001.0, "alert", "small", "TierplaneTierDown: Tier small has no ready endpoint", "small"),
    Event(3, 1002.0, "alert over", "small", "TierplaneTierDown: Tier small has no ready endpoint", "small"),
)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakePlane]:
    def start(**answers: Any) -> FakePlane:
        plane = FakePlane(**answers)
        plane.connect(monkeypatch, alerts)
        return plane

    return start


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["alerts", *arguments])


def answer(*shown: AlertView) -> AlertsResponse:
    unix_s = time.time()
    silence = SilenceView(3, "", "large", unix_s + 3630, "an upgrade", "ada")
    webhook = WebhookView("https://hooks.example", 4, 1, 0, 2, "it answered 500")
    return AlertsResponse(tuple(replace(a, since_unix_s=unix_s - 65) for a in shown), (silence,), (webhook,))


def test_output_as_text(play: Any) -> None:
    hot = replace(
        TIER_DOWN,
        rule="TierplaneGpuHot",
        severity=Severity.WARNING,
        subject="GPU-1",
        value=91.0,
        threshold=87.0,
        acknowledged="bob",
        silenced_until_unix_s=time.time() + 60,
        detail="",
    )
    pending = replace(TIER_DOWN, state=AlertState.PENDING, subject="large", detail="")
    play(alerts=answer(TIER_DOWN, hot, pending))
    done = run()
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[1].split()[:4] == ["critical", "firing", "1", "m"]
    assert "TierDown  small" in lines[1]
    assert "91 °C" in lines[2]
    assert "> 87 °C" in lines[2]
    assert "acknowledged by bob, silenced for " in lines[2]
    assert "pending" in lines[3]
    assert lines[4] == ("Tier small has no ready endpoint. (small-1 is failed) tierplane status says why.")
    assert done.output.count("tierplane status says why.") == 2, "a pending alert needs no action"
    assert "silence 3: every rule about large, 1 h 00 m left: an upgrade (ada)" in done.output
    assert (
        "webhook https://hooks.example: 4 messages delivered, 1 failed, 2 alerts waiting: it answered 500"
        in (done.output)
    )


def test_without_alerts(play: Any) -> None:
    play(alerts=AlertsResponse((), (), (WebhookView("https://x", 4, 0, 0, 0),)))
    assert run().output == "No alerts.\n"


def test_json_with_past_alerts(play: Any) -> None:
    plane = play(alerts=answer(TIER_DOWN), events=EVENTS)
    value = json.loads(run("--json", "--all").output)
    assert value["alerts"][0]["rule"] == "TierplaneTierDown"
    assert value["silences"][0]["number"] == 3
    assert value["webhooks"][0]["waiting"] == 2
    assert [each["kind"] for each in value["past"]] == ["alert", "alert over"]
    assert plane.calls[-1] == ("events", -1, 2000)
    assert "past" not in json.loads(run("--json").output)
    shown = run("--all").output
    assert "alert over: TierplaneTierDown" in shown
    assert "generation 1" not in shown


def test_actions_are_sent_to_the_controller(play: Any) -> None:
    done = ActionResponse(ActionOutcome.DONE, "done so", ("small",))
    plane = play(acknowledge_alert=done, silence_alerts=done, unsilence_alerts=done)
    assert run("ack", "TierDown", "small", "--by", "ada").output == "done so\n"
    assert run("silence", "--for", "2h", "--reason", "an upgrade", "--by", "ada").exit_code == 0
    assert (
        run("silence", "--rule", "GpuHot", "--subject", "GPU-1", "--for", "90s", "--reason", "x").exit_code
        == 0
    )
    assert json.loads(run("unsilence", "3", "--by", "ada", "--json").output) == {
        "outcome": "done",
        "reason": "done so",
        "subjects": ["small"],
    }
    assert plane.calls[0] == ("acknowledge_alert", "TierDown", "small", "ada")
    assert plane.calls[1] == ("silence_alerts", "", "", 7200.0, "an upgrade", "ada")
    assert plane.calls[2][:4] == ("silence_alerts", "GpuHot", "GPU-1", 90.0)
    assert plane.calls[2][5], "who is logged in"
    assert plane.calls[3] == ("unsilence_alerts", 3, "ada")


@pytest.mark.parametrize("words", ["2", "h", "-1h", "0s", "2 weeks", ""])
def test_an_invalid_duration_is_refused(words: str, play: Any) -> None:
    plane = play()
    done = run("silence", "--for", words, "--reason", "x")
    assert done.exit_code == 2
    assert "90s, 30m, 2h or 1d" in done.output
    assert not plane.calls


def test_a_refused_action_exits_with_1_and_an_unnecessary_one_with_0(play: Any) -> None:
    play(acknowledge_alert=ActionResponse(ActionOutcome.UNKNOWN, "there is no alert rule 'x'"))
    done = run("ack", "x", "small")
    assert done.exit_code == 1
    assert "Error: there is no alert rule 'x'" in done.output
    assert run("ack", "x", "small", "--json").exit_code == 1
    play(acknowledge_alert=ActionResponse(ActionOutcome.UNCHANGED, "bob has acknowledged it", ("small",)))
    done = run("ack", "TierDown", "small")
    assert (done.exit_code, done.output) == (0, "nothing to do: small: bob has acknowledged it\n")


def test_the_status_shows_the_most_severe_alert(monkeypatch: pytest.MonkeyPatch) -> None:
    down = FiringAlert(
        "TierplaneTierDown", TIER_DOWN.severity, TIER_DOWN.kind, "small", TIER_DOWN.summary, "Look.", 1.0
    )
    assert [str(line) for line in alerts.firing_summary([down, down, down])] == [
        "critical: Tier small has no ready endpoint. 2 more alerts. See `tierplane alerts`."
    ]
    assert str(alerts.firing_summary([down])[0]).endswith("endpoint. See `tierplane alerts`.")
    assert alerts.firing_summary([]) == []
    snapshot = ClusterSnapshot("e", 1, 0.0, alerts=(down,))
    activity = Activity((), (), (), (), True, "", 0.0)
    plane = FakePlane(status=(snapshot, (), ()), activity=activity)

    @contextmanager
    def connected(address: str | None, namespace: str | None) -> Iterator[PlaneAccess]:
        yield PlaneAccess("ray", "tierplane")

    monkeypatch.setattr(status, "connected", connected)
    monkeypatch.setattr(PlaneAccess, "call", lambda _, *words: plane.call(*words))
    shown = CliRunner().invoke(main, ["status"])
    assert "critical: Tier small has no ready endpoint." in shown.output
    value = json.loads(CliRunner().invoke(main, ["status", "--json"]).output)
    assert [each["rule"] for each in value["alerts"]] == ["TierplaneTierDown"]


def test_rules_are_listed_without_a_plane() -> None:
    shown = run("rules").output
    assert all(rule.name in shown for rule in RULES)
    assert "tier/ready < 1, while tier/due > 0" in shown
    listed = json.loads(run("rules", "--json").output)["rules"]
    assert [each["name"] for each in listed] == [rule.name for rule in RULES]
