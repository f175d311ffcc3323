import pytest
from tracked import shared_store


@pytest.fixture
def store() -> str:
    return shared_store()
