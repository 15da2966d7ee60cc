"""The files of examples/serving name options, extras, routes and metrics that exist."""

import configparser
import dataclasses
import re
from pathlib import Path

import yaml

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
    assert {"serve", "cuda", "convert"} == extras <= set(setup["options.extras_require"])
    assert f"EXPOSE {ServeOptions().port}" in text
    assert set(re.findall(r"--(?:host|port)", text)) <= OPTIONS
