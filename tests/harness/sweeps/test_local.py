"""Processes of this machine, and its GPUs."""

from harness.sweeps.local import Local


def test_gpus_are_handed_out(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7")
    started = []

    class Started:
        def __init__(self, words, env, **rest):
            started.append(env["CUDA_VISIBLE_DEVICES"])

        def poll(self):
            return None

    monkeypatch.setattr("harness.sweeps.local.subprocess.Popen", Started)
    launcher = Local(tmp_path, 2, 2)

    class Job:
        name = "job"

        def words(self, processes):
            return []

    launcher.submit([Job(), Job()])
    assert started == ["3,5", "7,3"]
    assert launcher.room() == 0
