"""Reading and rewriting request bodies."""

from __future__ import annotations

import json

from controlplane.gateway.request_body import parse, rewrite


def test_a_rewrite_leaves_other_members_as_they_stand() -> None:
    body = b'{"model":"auto","temperature":0.10,"models":["a"],"nested":{"model":"auto","a" : 1}}'
    changed = rewrite(body, model="x")
    assert changed == b'{"model":"x","temperature":0.10,"nested":{"model":"auto","a" : 1}}'


def test_one_conversation_has_one_affinity_key() -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    first = parse(json.dumps({"messages": messages}).encode())
    longer = parse(json.dumps({"messages": [*messages, {"role": "assistant", "content": "a"}]}).encode())
    other = parse(json.dumps({"messages": [messages[0], {"role": "user", "content": "v"}]}).encode())
    assert first.affinity_key() == longer.affinity_key() != other.affinity_key()
