"""The files of examples/serving name options, extras, routes and metrics that exist."""

import configparser
import dataclasses
import json
import re
from pathlib import Path

import yaml
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from vllama_jax.serve.metrics import Metrics, watch_answers
from vllama_jax.serve.options import ServeOptions

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "serving"
OPTIONS = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(ServeOptions)}


def test_kubernetes_manifest():
    deployment, service = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    model, *arguments = container["args"]
    assert not model.startswith("-")
    assert {argument.split("=")[0] for argument in arguments} <= OPTIONS
    assert container["ports"][0]["containerPort"] == ServeOptions().port
    assert container["startupProbe"]["httpGet"]["path"] == container["readinessProbe"]["httpGet"]["path"] == "/health"
    assert pod["spec"]["terminationGracePeriodSeconds"] > ServeOptions().shutdown_seconds
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}
    assert service["spec"]["selector"] == pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]


def test_dockerfile():
    text = (FOLDER / "Dockerfile").read_text()
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = {extra for value in re.findall(r"EXTRAS=([\w,]+)", text) for extra in value.split(",")}
    assert {"serve", "cuda"} == extras <= set(setup["options.extras_require"])
    assert f"EXPOSE {ServeOptions().port}" in text
    assert set(re.findall(r"--(?:host|port)", text)) <= OPTIONS


def test_dashboard_has_queries_of_metrics_that_exist():
    dashboard = json.loads((FOLDER / "grafana.json").read_text())
    metrics = Metrics()
    watch_answers(metrics, lambda: 0, lambda: 0, lambda: 0)
    families = text_string_to_metric_families(metrics.render().decode())
    known = {family.name: family.type for family in families}
    suffixes = {"counter": "_total", "histogram": "_bucket", "gauge": ""}
    samples = {name + suffixes[kind] for name, kind in known.items()}
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    used = {name for query in queries for name in re.findall(r"vllama_\w+", query)}
    assert used
    assert used <= samples
    assert used == samples  # every metric has a place
    assert isinstance(FastAPI, type)
