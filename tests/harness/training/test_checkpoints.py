"""Checkpoints that are damaged."""

import os
import signal
import time

from tests.harness.interrupted import assert_same, words
from tests.harness.processes import finish, only_run, start


def test_a_damaged_checkpoint_is_left_out(sixteen_cases, whole_run, tmp_path):
    process = start(words(sixteen_cases, tmp_path, "--checkpoint-minutes", 0), tmp_path / "log")
    while process.is_alive() and len(list(tmp_path.glob("cache/pretrain/*/checkpoints/*.ckpt"))) < 2:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 75
    older, newer = sorted(tmp_path.glob("cache/pretrain/*/checkpoints/*.ckpt"))
    content = bytearray(newer.read_bytes())
    content[-100] ^= 1
    newer.write_bytes(content)
    assert finish(start(words(sixteen_cases, tmp_path), tmp_path / "log")) == 0
    said = (tmp_path / "log").read_text()
    assert f"{newer} is damaged" in said
    assert f"goes on after step {int(older.stem[5:])} " in said
    assert_same(only_run(tmp_path), whole_run)
