"""Requests whose steps take milliseconds, for profiles and estimates."""

from dataclasses import replace

from harness.config.request import Request

SMALL_PROFILE = ("backbone.features=4,4,8,8,8", "pretrain.crop=32,32,32", "finetune.crop=32,32,32")


def small_request(method="hybridmim", *settings, **changes) -> Request:
    """Small crops and a small network, with settings and fields changed."""
    request = Request(method=method, task="msd_hippocampus", settings=(*SMALL_PROFILE, *settings))
    return replace(request, **changes)
