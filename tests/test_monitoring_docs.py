"""The page about monitoring, the dashboard and the rules name what there is, and nothing else."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import Appliance, http, running, wait_for
from prometheus_client.core import Metric
from signals import TOKEN, scrape

from appliance.config import Settings

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "monitoring.md").read_text()
DASHBOARD = json.loads((DOCS / "grafana-dashboard.json").read_text())
RULES = [
    rule for group in yaml.safe_load((DOCS / "prometheus-alerts.yml").read_text())["groups"] for rule in group["rules"]
]
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_count", "_sum"]}
# What Prometheus and its scraping add.
OWN_LABELS = {"instance", "job", "le"}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Metric]]:
    """The families of an appliance in which everything has happened once."""
    with running(tmp_path_factory.mktemp("docs"), admin={"token": TOKEN}) as box:
        event = b'[{"eventType": "click", "siteId": "shop", "eventId": "01890a5d-ac96-774b-bcce-b302099a8057"}, {}]'
        for _ in range(2):
            assert http(box, "POST", "/collect", event, {"Content-Type": "text/plain"}).status == 200
        assert http(box, "POST", "/collect", headers={"Content-Length": "999999999999"}).status == 413
        box.run("export")
        assert (
            http(box, "POST", "/collect", event.replace(b"8057", b"8058"), {"Content-Type": "text/plain"}).status == 200
        )
        yield wait_for(lambda: whole(box), "the figures of the run")


def whole(box: Appliance) -> dict[str, Metric] | None:
    found = {family.name: family for family in scrape(box).families}
    oldest = found.get("appliance_export_oldest_timestamp_seconds")
    runs = found.get("appliance_export_runs")
    return found if oldest and oldest.samples and runs and runs.samples else None


def exact(family: Metric) -> str:
    return family.name + ("_total" if family.type == "counter" else "")


def labels(family: Metric) -> set[str]:
    return {label for sample in family.samples for label in sample.labels} - {"le"}


def test_the_page_lists_every_metric_with_type_labels_and_words(families: dict[str, Metric]) -> None:
    listed = re.findall(r"(?m)^\| `(appliance_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", PAGE)
    described = {name: (kind, set(re.findall(r"`(\w+)`", given)), words) for name, kind, given, words in listed}
    own = [family for family in families.values() if family.name.startswith("appliance_")]
    there = {exact(f): (f.type, labels(f), f.documentation) for f in own}
    # Nothing went to the spool here.
    there["appliance_events_spooled_total"] = ("counter", {"site"}, there["appliance_events_spooled_total"][2])
    assert described == there
    assert len(listed) == len(described)


def test_the_page_names_the_figures_of_the_process(families: dict[str, Metric]) -> None:
    there = {exact(family) for family in families.values() if family.name.startswith("process_")}
    assert set(re.findall(r"`(process_\w+)`", PAGE)) == there


def test_the_page_names_every_threshold_with_its_default() -> None:
    settings = Settings()
    for name in ("disk_free_percent", "spool_used_percent", "failed_runs", "exports_late_minutes"):
        assert f"`{name}` ({getattr(settings.alerts, name)})" in PAGE
    assert settings.health.min_free_disk_bytes == 256 * 1024 * 1024


EXPRESSIONS = [rule["expr"] for rule in RULES] + [
    target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])
]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_expression_names_metrics_and_labels_that_there_are(families: dict[str, Metric], expression: str) -> None:
    samples = {f.name + suffix: f for f in families.values() for suffix in SUFFIXES[f.type]}
    named = re.findall(r"\b((?:appliance|process)_\w+)(?:\{([^}]*)\})?", expression)
    assert named or expression.startswith("up{")
    known = set(OWN_LABELS)
    for name, matchers in named:
        assert name in samples, name
        known |= labels(samples[name]) | ({"site"} if "spooled" in name else set())
        for label in re.findall(r"(\w+)\s*[=!]~?\"", matchers):
            assert label in labels(samples[name]) | OWN_LABELS, (name, label)
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} <= known
    for opening, closing in ("()", "[]", "{}"):
        assert expression.count(opening) == expression.count(closing)


def test_every_rule_says_what_is_wrong_and_what_it_means() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) >= 10
    for rule in RULES:
        assert re.fullmatch(r"Appliance[A-Za-z]+", rule["alert"])
        assert set(rule["annotations"]) == {"summary", "description"}
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert re.fullmatch(r"\d+m", rule.get("for", "1m"))


def test_the_dashboard_can_be_imported_anywhere() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 20
    variables = {one["name"] for one in DASHBOARD["templating"]["list"]}
    text = json.dumps(DASHBOARD)
    assert set(re.findall(r"\$\{?(\w+)\}?", text)) - {"__rate_interval", "__all"} == variables == {"source", "instance"}
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not taken & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"]
            assert all(target["datasource"]["uid"] == "${source}" for target in panel["targets"])
