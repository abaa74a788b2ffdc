"""Addresses, hosts and names of variables: what would not be used is refused, no credential is repeated."""

from __future__ import annotations

from typing import Any

import pytest

from controlplane.config import parse_plane
from controlplane.errors import ConfigError

SECRET = "hunter2-0123456789"


def problems(values: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        parse_plane({"tiers": [{"name": "a", "engine": "simulated"}], **values})
    assert SECRET not in str(caught.value)
    return {problem.path: f"{problem.message} ({problem.remedy})" for problem in caught.value.problems}


def endpoint(**values: Any) -> dict[str, Any]:
    return {"tiers": [{"name": "e", "engine": "endpoint", "model": "m", **values}]}


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9",
        "http://127.0.0.1:9/",
        "http://127.0.0.1:9/v1",
        "http://127.0.0.1:9/v1/",
        "https://models.example.com",
        "https://openrouter.ai/api/v1",
        "http://[::1]:8000",
        "http://my_host.internal:80",
        "HTTP://host",
    ],
)
def test_addresses_of_servers(url: str) -> None:
    assert parse_plane(endpoint(url=url)).tiers[0].url == url


@pytest.mark.parametrize(
    ("url", "says"),
    [
        (f"http://user:{SECRET}@host:9", "set api_key_env"),
        (f"http://{SECRET}@host:9", "set api_key_env"),
        (f"http://host:9/?api_key={SECRET}", "query"),
        (f"http://host:9/v1?key={SECRET}", "query"),
        (f"http://host:9/#{SECRET}", "never sent"),
        ("http://host:9/v1/chat/completions", "path"),
        ("http://host:9/v1/models", "path"),
        ("http://host:9/chat/completions", "path"),
        ("http://host:9//v1", "path"),
        ("http://host:9/a/../v1", "path"),
        ("ftp://host:9", "http:// or https://"),
        ("host:9", "http:// or https://"),
        ("", "http:// or https://"),
        ("http://", "no host"),
        ("http://:9", "no host"),
        ("http://host:", "port"),
        ("http://host:0", "port"),
        ("http://host:99999", "port"),
        ("http://host:-1", "port"),
        ("http://host:9x", "port"),
        ("http://300.1.2.3:9", "host"),
        ("http://[::1:9", "host"),
        ("http://a..b", "host"),
        ("http://-host-", "host"),
        ("http://bücher.example", "characters"),
        ("http://host :9", "characters"),
        ("http://host\\path", "characters"),
        ("http://host:9/\n", "characters"),
        ("http://$HOST:9", "host"),
    ],
)
def test_addresses_that_would_not_be_used(url: str, says: str) -> None:
    assert says in problems(endpoint(url=url))["tiers[0].url"]


@pytest.mark.parametrize(
    "key",
    [
        f"sk-{SECRET}",
        "sk-test-0123456789",
        "sk_live_51H8xKq2eZvKYlo2C",
        "hf_AbCdEfGhIjKlMnOpQrStUvWxYz",
        "ghp_0123456789abcdef0123456789abcdef0123",
        "AKIAIOSFODNN7EXAMPLE",
        "0123456789abcdef0123456789abcdef",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4",
        "aB3dE5fG7hI9jK1lM3nO5pQ7",
        "1KEY",
        "MY KEY",
        "$KEY",
        "",
        "x" * 200,
    ],
)
def test_a_key_in_place_of_its_variables_name_is_refused_and_not_repeated(key: str) -> None:
    url = "http://127.0.0.1:9"
    for values, path in (
        (endpoint(url=url, api_key_env=key), "tiers[0].api_key_env"),
        (
            {"controller": {"alerts": {"webhooks": [{"url": url, "secret_env": key}]}}},
            "controller.alerts.webhooks[0].secret_env",
        ),
    ):
        text = problems(values)[path]
        assert "the name of an environment variable" in text
        assert not key or key not in text


def test_names_of_variables() -> None:
    for name in (
        "OPENAI_API_KEY",
        "_k",
        "ollama_key",
        "KEY_2",
        "HF_TOKEN",
        "hf_token",
        "AZURE_OPENAI_KEY_PROD_2",
    ):
        assert parse_plane(endpoint(url="http://h", api_key_env=name)).tiers[0].api_key_env == name


@pytest.mark.parametrize(
    ("values", "path"),
    [
        (endpoint(url=[SECRET]), "tiers[0].url"),
        (endpoint(url="http://h", api_key_env=[SECRET]), "tiers[0].api_key_env"),
        ({"tiers": [{"name": "a", "engine": "simulated", "env": [SECRET]}]}, "tiers[0].env"),
        ({"tiers": [{"name": "a", "engine": "vllm", "model": "m", "engine_args": {"hf-token": {SECRET: 1}}}]},
         "tiers[0].engine_args.hf-token"),
        ({"gateway": {"traces_endpoint": f"http://u:{SECRET}@h:4318/v1/traces"}}, "gateway.traces_endpoint"),
        ({"controller": {"alerts": {"webhooks": [{"url": f"ftp://u:{SECRET}@h"}]}}},
         "controller.alerts.webhooks[0].url"),
        ({"controller": {"store_path": f"postgres://u:{SECRET}@h/db"}}, "controller.store_path"),
    ],
)  # fmt: skip
def test_no_message_repeats_what_may_be_secret(values: dict[str, Any], path: str) -> None:
    assert path in problems(values)


@pytest.mark.parametrize("path", ["sqlite:///x.db", "s3://bucket/x", "file:/tmp/x", "/tmp/folder/", "a\0b"])
def test_the_store_is_a_file(path: str) -> None:
    assert "path of a file" in problems({"controller": {"store_path": path}})["controller.store_path"]


@pytest.mark.parametrize(
    "host", ["http://127.0.0.1", "127.0.0.1:8080", "1.2.3", "", "a b", "[::1]", "256.0.0.1"]
)
def test_hosts_to_listen_on(host: str) -> None:
    assert "gateway.host" in problems({"gateway": {"host": host}})


def test_webhooks_may_have_paths_queries_and_passwords() -> None:
    url = f"https://u:{SECRET}@hooks.example.com/services/T0/B0?x=1"
    plane = parse_plane(
        {
            "tiers": [{"name": "a", "engine": "simulated"}],
            "controller": {"alerts": {"webhooks": [{"url": url}]}},
        }
    )
    assert plane.controller.alerts.webhooks[0].url == url
