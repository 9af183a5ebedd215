"""A stage that is ready to step, and its FLOPs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.costs import trial
from harness.costs.trial import FLASH_ON_CPU, OUT_OF_MEMORY, TrialResult, TrialSpec, resolve_trial, sdpa_flops
from tests.harness.small_requests import small_request

pytestmark = pytest.mark.usefixtures("quick_steps")


def test_flops_are_counted_with_attention_on_a_cpu():
    counter = FlopCounterMode(display=False, custom_mapping={FLASH_ON_CPU: sdpa_flops})
    q = torch.rand(2, 3, 64, 16)
    with counter, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    # Two products of 64 x 64 x 16 for each of six heads.
    assert counter.get_total_flops() == 2 * 2 * 6 * 64 * 64 * 16


def test_flops_of_a_step_are_those_of_its_convolutions():
    """The first convolution's backward pass makes no gradient of the image: 2 times its forward, 3 times for the others."""
    spec = resolve_trial(small_request("scratch"), "finetune")
    flops, parameters, _ = trial._two_steps(spec.request, "finetune", torch.get_num_threads())
    network = spec.plugins.new_backbone(spec.config, 1)
    network.set_head(spec.task.num_outputs)
    assert parameters == sum(parameter.numel() for parameter in network.parameters())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.rand(2, 1, 32, 32, 32))
    first = 2 * 27 * 4 * 2 * 32**3
    assert flops == pytest.approx(3 * counter.get_total_flops() - first, rel=1e-4)


def test_a_torch_allocation_that_fails_is_out_of_memory():
    each = TrialResult(resolve_trial(small_request()))
    with trial.out_of_memory(each):
        torch.empty(2**60, dtype=torch.uint8)
    assert each.problem == OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="other"), trial.out_of_memory(each):
        raise RuntimeError("other")


def test_variants_are_settings_of_the_method(registry):
    """What `--compare` offers must be accepted by every method that states it."""
    for name in registry.names("method"):
        for variant in registry.load("method", name).variants:
            assert isinstance(resolve_trial(small_request(name, "pretrain.batch_size=2"), variant=variant), TrialSpec)
