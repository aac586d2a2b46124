"""The demo as it is served."""

from __future__ import annotations

import pytest
from serving_here import served

from alitok_fast import Pipeline, load_tokenizer
from alitok_fast.models.loading import find_stage1


@pytest.fixture(scope="session")
def pipe() -> Pipeline:
    return Pipeline.from_pretrained("demo")


@pytest.fixture(scope="session")
def stage1():
    return load_tokenizer(find_stage1("demo"))


@pytest.fixture(scope="session")
def server(pipe, stage1):
    with served(pipe, stage1) as server:
        yield server
