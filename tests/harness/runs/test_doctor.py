"""What is wrong here is found, named, and removed where it may be."""

import json
import os

from harness.runs import cleanup, doctor
from harness.system.locks import acquire
from tests.harness.commands import status_of
from tests.harness.other_host import elsewhere
from tests.harness.processes import CONTEXT


def findings(capsys, *more, status=0):
    capsys.readouterr()
    assert status_of("doctor", "--json", *more) == status
    return {each["what"]: each for each in json.loads(capsys.readouterr().out)}


def test_a_healthy_place(checkpointed_runs, capsys):
    found = findings(capsys, "--runs", checkpointed_runs)
    assert {each["status"] for each in found.values()} <= {"ok", "note"}
    assert found["prepared volumes"]["detail"] == "16, all as they were written"
    assert found["pre-trainings"]["detail"] == "1 finished, all as they were written"
    assert found["methods"]["detail"].endswith("load")
    assert found["torch"]["detail"]


def take_and_die(path):
    mine = acquire(path)
    assert mine[0] is not None
    os._exit(1)


def test_what_a_crash_left_is_found_and_removed(checkpointed_runs, capsys):
    (volume,) = list(checkpointed_runs.glob("cache/prepared/*/*.image.npy"))[:1]
    content = bytearray(volume.read_bytes())
    content[-1] ^= 1
    volume.write_bytes(content)
    (weights,) = checkpointed_runs.glob("cache/pretrain/*/weights.safetensors")
    weights.write_bytes(b"short")
    (run,) = (path.parent for path in checkpointed_runs.glob("*/record.json"))
    (run / "record.json").unlink()
    partial = run / ".record.json.gone-4194304-1.partial"
    partial.touch()
    os.utime(partial, (0, 0))
    gone = CONTEXT.Process(target=take_and_die, args=(run / "run",))
    gone.start()
    gone.join(60)
    found = findings(capsys, "--runs", checkpointed_runs, status=2)
    assert "1 of 16 volumes are not as they were written" in found["prepared volumes"]["detail"]
    assert "1 of 1 are damaged" in found["pre-trainings"]["detail"]
    assert "1 of processes that are gone" in found["locks"]["detail"]
    assert "1 files" in found["left by a crash"]["detail"]
    assert found["can go on"]["detail"].startswith(run.name)
    assert partial.exists()
    findings(capsys, "--runs", checkpointed_runs, "--fix")
    assert not partial.exists()
    assert not (run / "run.lock").exists()
    after = findings(capsys, "--runs", checkpointed_runs)
    assert "left by a crash" not in after
    assert "locks" not in after
    assert after["prepared volumes"]["detail"] == "15, all as they were written"


def test_what_is_at_work_is_left_alone(checkpointed_runs, capsys):
    (run,) = (path.parent for path in checkpointed_runs.glob("*/record.json"))
    (run / ".x.partial").touch()
    os.utime(run / ".x.partial", (0, 0))
    elsewhere(run / "run.lock")
    found = findings(capsys, "--runs", checkpointed_runs, "--fix")
    assert "process 1 on another-host" in found["at work"]["detail"]
    assert (run / ".x.partial").exists()
    assert (run / "run.lock").exists()
    assert not [each for each in cleanup.removable(checkpointed_runs) if each.path.parent == run]


def test_packages_that_do_not_import_are_said(monkeypatch):
    monkeypatch.setattr(doctor, "TESTED", {"no_such_package": "1", "numpy": "0.1"})

    found = {each.what: each for each in doctor.packages()}
    assert found["no_such_package"].status == "FAIL"
    assert "is not installed" in found["no_such_package"].detail
    assert (found["numpy"].status, "0.1 was tested" in found["numpy"].detail) == ("note", True)

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert "operator torchvision::nms does not exist" in {e.what: e for e in doctor.packages()}["numpy"].detail


def test_plugins_that_fail_to_load_are_named(checkpointed_runs, tmp_path, capsys):
    plugin = tmp_path / "broken.py"
    plugin.write_text("import no_such_module")
    found = findings(capsys, "--runs", checkpointed_runs, "--plugin", plugin, status=2)
    assert "broken.py" in found["plugins"]["detail"]
