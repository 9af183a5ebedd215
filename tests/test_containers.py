"""The files for containers and for public CI: what of them can be checked without either."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from harness.cli.main import _parser

ROOT = Path(__file__).parents[1]
DOCKERFILE, APPTAINER = (ROOT / "containers" / name for name in ("Dockerfile", "apptainer.def"))


def test_the_install_script_is_a_script_and_both_images_run_it():
    subprocess.run(["bash", "-n", ROOT / "containers" / "install.sh"], check=True)
    for path in (DOCKERFILE, APPTAINER):
        assert "bash /opt/ssl-seg-harness/containers/install.sh /opt/ssl-seg-harness" in path.read_text()


def test_the_dockerfile_has_instructions_only():
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    words = [line.split()[0] for line in lines]
    assert words[0] == "FROM"
    assert set(words) <= {"FROM", "COPY", "RUN", "ENV", "VOLUME", "ENTRYPOINT", "CMD"}
    assert lines[-2:] == ['ENTRYPOINT ["harness"]', 'CMD ["--help"]']
    assert "--shm-size=8g" in DOCKERFILE.read_text()


def test_the_apptainer_file_has_a_header_and_known_sections():
    text = APPTAINER.read_text()
    sections = re.findall(r"^%(\w+)", text, re.MULTILINE)
    assert sections == ["files", "post", "environment", "runscript", "test"]
    header = dict(line.split(": ") for line in text.partition("%")[0].splitlines() if ": " in line and line[0] != "#")
    assert header == {"Bootstrap": "docker", "From": "python:3.12-slim"}


def test_public_ci_covers_the_python_versions_that_are_promised():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    matrix = workflow["jobs"]["tests"]["strategy"]["matrix"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f">={matrix['python'][0]}" == project["requires-python"]
    assert {name.partition("-")[0] for name in matrix["os"]} == {"ubuntu", "macos", "windows"}
    commands = [step["run"] for step in workflow["jobs"]["tests"]["steps"] if "run" in step]
    (job,) = [command for command in commands if command.startswith("harness ")]
    _parser().parse_args(job.split()[1:])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_install_script_installs_in_a_clean_folder(tmp_path):
    subprocess.run(["git", "clone", "--quiet", ROOT, tmp_path / "checkout"], check=True)
    subprocess.run(["python3", "-m", "venv", tmp_path / "env"], check=True)
    path = f"{tmp_path / 'env' / 'bin'}:/usr/bin:/bin"
    script = tmp_path / "checkout" / "containers" / "install.sh"
    words = ["bash", script, tmp_path / "checkout"]
    done = subprocess.run(
        words, cwd=tmp_path, env={"PATH": path, "HOME": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("harness ")
