"""Requests that schemathesis generates from the server's OpenAPI schema: no error of the server, no other responses."""

import pytest
import schemathesis.checks
from hypothesis import HealthCheck, Phase, given, settings
from serve_fixtures import RunningServer, run_server

import vllama_jax as vl

EXAMPLES = 12  # of each route, of requests that fit the schema and as many that do not
CHECKS = ["status_code_conformance", "content_type_conformance", "response_schema_conformance"]


@pytest.fixture(scope="module")
def server():
    with run_server(vl.load("miniature")) as running:
        yield running


def call_route(route: schemathesis.schemas.APIOperation, mode: schemathesis.GenerationMode, checks: list) -> set[int]:
    """Send requests to a route, and return the statuses."""
    statuses = set()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[*HealthCheck],
    )
    @given(case=route.as_strategy(generation_mode=mode))
    def call(case: schemathesis.Case) -> None:
        if mode is schemathesis.GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = "miniature"  # other names are refused first
        response = case.call(timeout=60)
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text
        case.validate_response(response, checks=checks)

    call()
    return statuses


@pytest.mark.slow
@pytest.mark.parametrize("mode", [*schemathesis.GenerationMode], ids=lambda mode: mode.value)
def test_responses_fit_the_schema(server: RunningServer, mode: schemathesis.GenerationMode):
    schemathesis.checks.load_all_checks()
    checks = schemathesis.checks.CHECKS.get_by_names(CHECKS)
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    routes = [result.ok() for result in schema.get_all_operations()]
    if mode is schemathesis.GenerationMode.NEGATIVE:  # other routes accept every text
        routes = [route for route in routes if "application/json" in [body.media_type for body in route.body]]
    statuses = {route.label: call_route(route, mode, checks) for route in routes}
    print(statuses)
    assert server.service.status == "ready"
