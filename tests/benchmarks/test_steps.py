"""Steps of training: partial decoding, the contrastive term, bf16, SwinUNETR against MONAI's, the loop against a bare one."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from backbones.swinunetr import SwinUNETR
from backbones.unet import UNet
from harness.api.registry import Registry
from harness.compute.devices import keep_memory, new_accelerator
from harness.compute.layers import InstanceNorm3d, prepare_module
from harness.config.schema import Evaluate, Training
from harness.evaluation.sliding_window import predict
from harness.training.loop import StagePlan, train
from methods.hybridmim import HybridMIM

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(1200)]


@pytest.fixture(autouse=True, scope="module")
def _memory_kept():
    """As in a run of the harness; what is timed beside it in this process has it too. The other modules come before."""
    keep_memory()


CPU, LAST = torch.device("cpu"), torch.channels_last_3d


def on(image, module, bf16=False):
    """A step without the update: forward and backward of the module's terms or of its output."""

    def step():
        module.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = module({"image": image}) if isinstance(module, HybridMIM) else module(image)
        loss = sum(out.values()) if isinstance(out, dict) else out.float().square().mean()
        loss.backward()

    return step


def hybridmim(backbone, **settings):
    torch.manual_seed(0)
    method = HybridMIM(HybridMIM.Config(**settings), backbone)
    method.generator = torch.Generator().manual_seed(0)
    return prepare_module(method, CPU, channels_last=True)


def images(number, channels, edge):
    return torch.rand(number, channels, edge, edge, edge).to(memory_format=LAST)


@pytest.mark.parametrize(("edge", "channels", "region", "limit"), [(96, 1, 64, 1.9), (128, 4, 96, 1.65)])
def test_partial_decoding_of_unet(over, claim, edge, channels, region, limit):
    image = images(1, channels, edge)
    steps = [
        on(image, hybridmim(UNet(UNet.Config(), channels), region=size, contrastive=0)) for size in ("whole", region)
    ]
    name = f"HybridMIM, unet 64,64,128,256,512, {edge}^3 x {channels}: whole / partial {region}^3"
    claim(name, over(*steps, rounds=3), at_least=limit)


def test_partial_decoding_of_swinunetr(over, claim):
    image = images(1, 1, 96)
    steps = [
        on(image, hybridmim(SwinUNETR(SwinUNETR.Config(), 1), region=size, contrastive=0)) for size in ("whole", 64)
    ]
    claim("HybridMIM, swinunetr 48, 96^3: whole / partial 64^3", over(*steps, rounds=3), at_least=1.9)


def test_contrast_costs_little_where_dropout_is_after_the_trunk(over, claim):
    image = images(2, 1, 64)
    on_it, off = (on(image, hybridmim(UNet(UNet.Config(), 1), contrastive=weight)) for weight in (0.1, 0))
    claim("HybridMIM, unet, 64^3: contrast on / off", over(on_it, off), at_most=1.10)


def test_bf16_steps_are_faster(over, claim):
    image, method = images(1, 1, 96), hybridmim(UNet(UNet.Config(), 1), contrastive=0)
    ratios = over(on(image, method), on(image, method, bf16=True), rounds=3)
    claim("HybridMIM, unet, 96^3, channels-last: fp32 / bf16", ratios, at_least=1.8)


SWIN = """
import sys, time, torch
from monai.networks.nets import SwinUNETR as Monai
from backbones.swinunetr import SwinUNETR
from harness.compute.devices import keep_memory
from harness.compute.layers import prepare_module
which, size = sys.argv[1], int(sys.argv[2])
keep_memory()
torch.manual_seed(0)
image = torch.rand(1, 1, 96, 96, 96)
if which == "monai":
    network = Monai(in_channels=1, out_channels=2, feature_size=size)
else:
    network = SwinUNETR(SwinUNETR.Config(feature_size=size), 1)
    network.set_head(2)
    network, image = prepare_module(network, torch.device("cpu"), True), image.to(memory_format=torch.channels_last_3d)
times = []
for _ in range(4):
    began = time.perf_counter()
    network.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=which == "bf16"):
        loss = network(image).float().square().mean()
    loss.backward()
    times.append(time.perf_counter() - began)
print(sorted(times[1:])[1])
"""


@pytest.mark.parametrize("size", [24, 48])
def test_swinunetr_against_monais(claim, size):
    """Forward and backward, each network alone in its process, in turn. Equality is tested in tests/backbones.

    MONAI's twice: as its users run it, and with memory kept, so that what our allocator's settings gain is told apart.
    """
    rounds = [
        {
            name: seconds(SWIN, which, str(size), keep=keep)
            for name, which, keep in (
                ("plain", "monai", "0"),
                ("kept", "monai", "1"),
                ("fp32", "ours", "1"),
                ("bf16", "bf16", "1"),
            )
        }
        for _ in range(2)
    ]
    for ours, theirs, limit in (
        ("fp32", "plain", 0.8),
        ("bf16", "plain", 0.55),
        ("fp32", "kept", 0.85),
        ("bf16", "kept", 0.55),
    ):
        ratios = [each[ours] / each[theirs] for each in rounds]
        memory = "" if theirs == "plain" else ", with memory kept"
        claim(f"SwinUNETR {size}, 96^3: ours in {ours} / MONAI's in fp32{memory}", ratios, at_most=limit)


def seconds(script, *words, keep):
    """What a script prints, in a process of its own."""
    environment = os.environ | {"HARNESS_KEEP_MEMORY": keep}
    done = subprocess.run(
        [sys.executable, "-c", script, *words], env=environment, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def test_instance_norm_of_channels_last_features(over, claim):
    features = torch.randn(2, 64, 64, 64, 64).to(memory_format=LAST)
    slope = torch.randn(2, 64, 64, 64, 64).to(memory_format=LAST)

    def there_and_back(layer):
        return lambda: layer(features.detach().requires_grad_()).backward(slope)

    theirs, ours = (there_and_back(kind(64, affine=True)) for kind in (nn.InstanceNorm3d, InstanceNorm3d))
    claim("instance norm, 2 x 64 x 64^3, channels-last: torch's / ours", over(theirs, ours), at_least=2.5)


def test_the_loop_costs_no_more_than_a_bare_one(over, claim, tmp_path):
    """The same modules, optimizer and batches; the harness's loop also times phases, schedules and writes the history."""
    settings = Training(steps=20, crop=(32, 64, 32), batch_size=2, lr=1e-3, weight_decay=1e-5, clip_norm=1.0)
    data = [{"image": torch.rand(1, 32, 64, 32)} for _ in range(40)]

    def fresh():
        backbone = UNet(UNet.Config(features=(16, 16, 32, 64, 128)), 1)
        return hybridmim(backbone)

    def ours():
        plan = StagePlan("pretrain", settings, steps=20, warmup=0)
        train(plan, fresh(), data, tmp_path / "history.jsonl", new_accelerator())

    def bare():
        method = fresh()
        optimizer = torch.optim.AdamW(method.parameters(), lr=1e-3, weight_decay=1e-5, fused=True)
        for batch in torch.utils.data.DataLoader(data, 2):
            loss = sum(method({"image": batch["image"].to(memory_format=LAST)}).values())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(method.parameters(), 1.0)
            optimizer.step()

    claim(
        "20 steps of HybridMIM at 32x64x32: the harness's loop / a bare loop",
        1 / over(bare, ours, rounds=9),
        at_most=1.02,
    )


KEEPING = """
import os, time, torch
from backbones.unet import UNet
from harness.compute.devices import keep_memory
from harness.compute.layers import prepare_module
keep_memory()
network = UNet(UNet.Config(features=(16, 16, 32, 64, 128)), 1)
network.set_head(2)
prepare_module(network, torch.device("cpu"), True)
image = torch.rand(1, 1, 96, 96, 96)
times = []
for _ in range(6):
    began = time.perf_counter()
    network(image).square().mean().backward()
    times.append(time.perf_counter() - began)
print(sorted(times[1:])[2])
"""


def test_memory_that_is_kept_is_not_cleared_again(claim):
    """glibc gives tensors above 32 MiB back to the system; two processes each, in turn."""
    ratios = [seconds(KEEPING, keep="0") / seconds(KEEPING, keep="1") for _ in range(3)]
    claim("UNet step at 96^3: memory given back / kept", ratios, at_least=1.2)


def test_inference_in_bf16(over, claim):
    task = Registry().task("msd_spleen")
    network = UNet(UNet.Config(features=(32, 32, 64, 128, 256)), 1)
    network.set_head(task.num_outputs)
    image = np.random.default_rng(0).random((1, 160, 160, 96), dtype=np.float32)
    common = {"steps": 1, "crop": (96, 96, 96), "batch_size": 2, "lr": 1e-3, "weight_decay": 0}
    settings = [Training(precision=precision, **common) for precision in ("fp32", "bf16")]
    fp32, bf16 = (lambda trained=trained: predict(task, network, image, trained, Evaluate()) for trained in settings)
    claim("sliding windows over 160x160x96: fp32 / bf16", over(fp32, bf16, rounds=3), at_least=1.4)
