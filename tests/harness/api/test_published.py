"""What is known about published weights fits the backbone that takes them."""

import pytest

from harness import PublishedWeights
from harness.api.registry import Registry


@pytest.mark.parametrize("name", Registry().names("weights"))
def test_what_is_known_of_each_file_fits_its_backbone(name):
    registry = Registry()
    weights = registry.load("weights", name)
    assert isinstance(weights, PublishedWeights)
    registry.load("backbone", weights.backbone).Config(**weights.settings)
    assert name == weights.name
    assert registry.citation("weights", name)
    assert weights.known_from
    assert weights.page
    assert not weights.url or weights.url.startswith("https://")
