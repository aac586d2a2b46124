"""The HTTP service under bodies that nobody would write, made from its own OpenAPI description."""

from __future__ import annotations

import httpx
import hypothesis
import pytest

schemathesis = pytest.importorskip("schemathesis")

OPERATIONS = (
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/images/generations"),
    ("POST", "/v1/images/completions"),
    ("POST", "/v1/tokens"),
    ("POST", "/v1/reconstructions"),
)


def test_every_route_is_described(server):
    described = httpx.get(f"{server.url}/openapi.json").raise_for_status().json()
    listed = {(method.upper(), path) for path, found in described["paths"].items() for method in found}
    assert listed == set(OPERATIONS)
    for path, operations in described["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            assert "422" not in operation["responses"], "faults have our own shape"
    for name, schema in described["components"]["schemas"].items():
        assert schema.get("description"), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        *((*operation, "POSITIVE") for operation in OPERATIONS),
        *((*operation, "NEGATIVE") for operation in OPERATIONS if operation[0] == "POST"),  # bodies that are wrong
    ],
)
def test_generated_requests(method, path, mode, server):
    """No error of the server's, no answer that is not described, nothing wrong that is taken.

    What is right by the description may be refused: it does not know the names of classes, pictures, or that only a
    single image can be a file.
    """
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    operation = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path][method]
    strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode])

    @hypothesis.settings(
        max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=strategy)
    def send(case):
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    send()
    assert httpx.get(f"{server.url}/ready").status_code == 200
