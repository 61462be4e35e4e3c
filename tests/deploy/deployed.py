"""The files in deploy/, and the queries in the dashboard."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana/dashboards/banded.json").read_text())


def read_yaml(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text())


class Query(NamedTuple):
    """An expression, and the text that shows labels of its result."""

    expression: str
    shown: str


def dashboard_queries() -> list[Query]:
    return [Query(target["expr"], target["legendFormat"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
