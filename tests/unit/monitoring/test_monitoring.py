"""Rules, alerts and dashboards: all metrics exist, alerts fire and stay quiet, files are up to date."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from controlplane.cli.monitoring import command, with_header
from controlplane.monitoring import queries as q
from controlplane.monitoring import rules
from controlplane.monitoring.catalog import RAY, metrics
from controlplane.monitoring.dashboards import DASHBOARDS, grafana
from controlplane.monitoring.files import kubernetes_files, local_files
from tests.support.alert_series import CASES, rule_tests
from tests.support.debian_tools import tool
from tests.support.repository import ROOT
from tests.support.run_record import run_record

COMPONENT = ROOT / "k8s" / "components" / "monitoring"
NAME = re.compile(r"\b(?:tier:|priority:)?(?:tierplane|ray)_[a-z0-9_:]+")
EXPRESSIONS = {
    **{f"{board.title}/{panel.title}/{legend}": expr for board in DASHBOARDS for panel in board.panels
       for legend, expr in panel.queries.items()},
    **{each.name: each.expr for each in rules.RECORDINGS},
    **{each.name: each.expr for each in rules.ALERTS},
}  # fmt: skip


def existing() -> set[str]:
    names = {each.name for each in rules.RECORDINGS}
    for metric in metrics().values():
        suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        names |= {metric.name + suffix for suffix in suffixes}
    return names


@pytest.mark.parametrize("where", EXPRESSIONS)
def test_no_query_names_a_metric_that_does_not_exist(where: str) -> None:
    named = set(NAME.findall(EXPRESSIONS[where]))
    assert named <= existing()
    assert named or "up{" in EXPRESSIONS[where] or "ALERTS{" in EXPRESSIONS[where]


def test_a_query_with_a_wrong_name_or_label_is_refused() -> None:
    with pytest.raises(ValueError, match="no counter 'tierplane_request_total'"):
        q.rate("tierplane_request_total")
    with pytest.raises(ValueError, match="no label model"):
        q.rate("tierplane_requests_total", ["model"])
    with pytest.raises(ValueError, match="no gauge"):
        q.total("tierplane_requests_total")


def test_every_metric_is_on_a_dashboard() -> None:
    shown = " ".join(
        expr for board in DASHBOARDS for panel in board.panels for expr in panel.queries.values()
    )
    recorded = {each.name: each.expr for each in rules.RECORDINGS}
    shown += " ".join(expr for name, expr in recorded.items() if name in shown)
    missing = [name for name in metrics() if not re.search(rf"\b{name}(_bucket|_sum)?\b", shown)]
    assert missing == [], "give it a panel in controlplane/monitoring/dashboards.py"


def test_rays_metrics_exist_in_the_installed_ray() -> None:
    import ray

    source = (
        Path(ray.__file__).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    ).read_text("utf-8")
    for metric in RAY:
        assert f'"{metric.name.removeprefix("ray_")}"' in source


def test_dashboards_are_complete() -> None:
    assert len({board.uid for board in DASHBOARDS}) == len(DASHBOARDS)
    for board in DASHBOARDS:
        made = grafana(board)
        positions = [each["gridPos"] for each in made["panels"]]
        cells = {
            (x, position["y"])
            for position in positions
            for x in range(position["x"], position["x"] + position["w"])
        }
        assert len(cells) == sum(position["w"] for position in positions), "panels overlap"
        for panel, shown in zip(board.panels, made["panels"], strict=True):
            assert [each["expr"] for each in shown["targets"]] == list(panel.queries.values())
            for legend in panel.queries:
                labels = set(re.findall(r"{{(\w+)}}", legend))
                if "ALERTS" not in panel.queries[legend] and ":" not in panel.queries[legend].split("(")[0]:
                    assert labels <= set(re.findall(r"\w+", panel.queries[legend]))


def write_rules(folder: Path, groups: object) -> Path:
    path = folder / "rules.yml"
    path.write_text(yaml.safe_dump(groups, sort_keys=False))
    return path


def promtool(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([tool("promtool"), *words], capture_output=True, text=True, check=False)


def test_every_alert_fires_and_stays_quiet(tmp_path: Path) -> None:
    path = write_rules(tmp_path, rules.rule_groups())
    checked = promtool("check", "rules", path)
    assert checked.returncode == 0, checked.stderr
    tests = rule_tests(path.name)
    assert len(tests["tests"]) == 2 * len(rules.ALERTS)
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests, sort_keys=False))
    tested = promtool("test", "rules", tmp_path / "tests.yml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


@pytest.mark.parametrize("name", ["TierplaneTierDown", "TierplaneRequestsFail", "TierplaneGpuHot"])
def test_the_rule_tests_detect_a_rule_that_never_fires(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = [replace(a, expr=f"({a.expr}) * 0 > 1") if a.name == name else a for a in rules.ALERTS]
    monkeypatch.setattr(rules, "ALERTS", tuple(broken))
    path = write_rules(tmp_path, rules.rule_groups())
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(rule_tests(path.name), sort_keys=False))
    tested = promtool("test", "rules", tmp_path / "tests.yml")
    assert tested.returncode == 1
    assert name in tested.stdout + tested.stderr


def test_series_of_the_rule_tests_exist_with_their_labels() -> None:
    names = existing() | {"up"}
    for alert in rules.ALERTS:
        for series in [*CASES[alert.name].fires.series, *CASES[alert.name].quiet.series]:
            name, _, labels = series.partition("{")
            assert name in names
            metric = metrics().get(name) or metrics().get(name.removesuffix("_bucket"))
            if metric is not None and metric.source == "gateway":
                found = set(re.findall(r"(\w+)=", labels))
                assert found == {*metric.labels, "gateway", "instance"} | (
                    {"le"} if metric.kind == "histogram" else set()
                )


def test_the_gateways_copies_are_not_counted_twice() -> None:
    """Two targets that each export the series of both gateways give the same figures as one."""
    for board in DASHBOARDS:
        for panel in board.panels:
            for expr in panel.queries.values():
                for name in NAME.findall(expr):
                    if name.startswith("tierplane"):
                        assert re.search(r"max by \([^)]*\) \((rate\()?" + name, expr), expr


def test_local_files_are_valid_for_the_programs_that_read_them(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        command, ["local", str(tmp_path), "--target", "10.0.0.1:8080", "--webhook", "http://127.0.0.1:1/x"]
    )
    assert result.exit_code == 0, result.output
    checked = promtool("check", "config", tmp_path / "prometheus.yml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    amtool = [tool("amtool"), "check-config", str(tmp_path / "alertmanager.yml")]
    checked = subprocess.run(amtool, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert "10.0.0.1:8080" in (tmp_path / "prometheus.yml").read_text()
    for board in DASHBOARDS:
        assert json.loads((tmp_path / "dashboards" / f"{board.uid}.json").read_text())["panels"]


def test_the_files_are_for_the_running_plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERPLANE_RUN_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    assert (
        "127.0.0.1:8080 (no plane runs here)" in CliRunner().invoke(command, ["local", str(tmp_path)]).stderr
    )
    record = run_record(gateway_url="http://127.0.0.1:8441", temp_dir="/tmp/plane-x")
    record.save()
    result = CliRunner().invoke(command, ["local", str(tmp_path)])
    assert "127.0.0.1:8441 (the running plane)" in result.stderr
    scraped = yaml.safe_load((tmp_path / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["static_configs"] == [{"targets": ["127.0.0.1:8441"]}]
    assert scraped[1]["file_sd_configs"] == [
        {"files": ["/tmp/plane-x/ray/prom_metrics_service_discovery.json"]}
    ]


def test_what_the_compose_file_mounts_is_written(tmp_path: Path) -> None:
    files = local_files(["a:1"])
    services = yaml.safe_load(files["compose.yaml"])["services"]
    mounted = [each.split(":")[0] for service in services.values() for each in service["volumes"]]
    ours = [each.removeprefix("./") for each in mounted if each.startswith("./")]
    assert all(any(name == each or name.startswith(f"{each}/") for name in files) for each in ours)
    provisioned = yaml.safe_load(files["grafana/provisioning/dashboards/tierplane.yml"])["providers"]
    targets = {each.split(":")[1] for each in services["grafana"]["volumes"]}
    assert {each["options"]["path"] for each in provisioned} <= targets
    assert all("127.0.0.1" in str(service) for service in services.values())
    (source,) = yaml.safe_load(files["grafana/provisioning/datasources/prometheus.yml"])["datasources"]
    assert source["url"].removeprefix("http://") in str(services["prometheus"]["command"])


def test_the_component_is_up_to_date() -> None:
    files = kubernetes_files()
    written = {str(p.relative_to(COMPONENT)) for p in COMPONENT.rglob("*") if p.is_file()}
    assert written == set(files)
    for name, text in files.items():
        expected = with_header(name, text, "k8s k8s/components/monitoring")
        assert (COMPONENT / name).read_text("utf-8") == expected, "run: make monitoring"


def test_rules_are_the_same_everywhere() -> None:
    rule = yaml.safe_load(kubernetes_files()["rules.yaml"])
    assert rule["spec"] == yaml.safe_load(local_files(["a:1"])["rules.yml"]) == rules.rule_groups()
