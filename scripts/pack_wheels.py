"""Collect the wheels that a machine without a package registry lacks, in a folder that is copied along with the checkout.

    python scripts/pack_wheels.py --out .whl                          # for the machine that scripts/gpu_machine.txt describes
    python scripts/pack_wheels.py --out .whl --there other.txt        # for another machine

The needed packages are read from the environment that runs this script, in which `pip install -e '.[dev]'` was done: the
package's own requirements and their requirements, as the other machine's Python needs them, in the versions that are installed
here. Packages that the file of `--there` lists are left out. The package itself is added as a wheel, for its entry points; on
the other machine the checkout precedes it on the path.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
OWN = "ssl-seg-harness"
TESTS = ("pytest", "pytest-timeout", "hypothesis")
LIMIT = 60 * 2**20  # bytes of all wheels
# SimpleITK has 50 MiB, and is needed only to read NRRD and MetaImage files.
LEFT_OUT = {"simpleitk"}
GLIBC = (*range(39, 16, -1), 12, 5)  # minor versions of glibc 2 in names of wheels


def main() -> int:
    """Collect the wheels, and print them. Returns exit status 1 where they are larger than `LIMIT`.

    Raises:
        SystemExit: with status 1, where pip cannot get a wheel.
    """
    parser = argparse.ArgumentParser(description="wheels for a machine without a registry")
    parser.add_argument("--out", type=Path, default=ROOT / ".whl")
    parser.add_argument("--there", type=Path, default=ROOT / "scripts" / "gpu_machine.txt", help="names, one a line")
    parser.add_argument("--python", default="3.12", help="of the other machine (default: 3.12)")
    arguments = parser.parse_args()
    there = names(arguments.there)
    packages = sorted(needed(arguments.python, there))
    arguments.out.mkdir(parents=True, exist_ok=True)
    for old in arguments.out.glob("*.whl"):
        old.unlink()
    if packages:
        pins = [f"{name}=={distribution(name).version}" for name in packages]
        pip("download", "--no-deps", *tags(arguments.python), "--dest", str(arguments.out), *pins)
    pip("wheel", "--no-deps", "--wheel-dir", str(arguments.out), str(ROOT))
    wheels = sorted(arguments.out.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:6.2f} MiB  {wheel.name}")
    size = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{size / 2**20:6.2f} MiB in {len(wheels)} wheels; left out: {', '.join(sorted(LEFT_OUT))}")
    if size > LIMIT:
        print(f"more than {LIMIT / 2**20:.0f} MiB: list what the machine has in {arguments.there}", file=sys.stderr)
    return int(size > LIMIT)


def names(path: Path) -> set[str]:
    """The packages that a file lists, in canonical spelling."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return {canonical(line) for line in lines if line}


def needed(python: str, there: set[str]) -> set[str]:
    """The packages to bring. `python`: version of the other machine's Python; `there`: packages that it has."""
    environment = {**default_environment(), "python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    packages: set[str] = set()
    waiting = [*requirements(OWN, environment), *TESTS]
    while waiting:
        name = canonical(waiting.pop())
        if name in there | LEFT_OUT | packages:
            continue
        packages.add(name)
        waiting += requirements(name, environment)
    return packages


def requirements(name: str, environment: dict[str, str]) -> Iterator[str]:
    """The names of the packages that a package requires in an environment. Raises SystemExit where it is not installed here."""
    try:
        lines = distribution(name).requires or []
    except PackageNotFoundError:
        raise SystemExit(f"{name} is not installed here: pip install -e '.[dev]' first") from None
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            yield requirement.name


def canonical(name: str) -> str:
    """The name of a package in the spelling of registries."""
    return re.sub(r"[-_.]+", "-", name).lower()


def tags(python: str) -> list[str]:
    """The options of pip for x86-64 Linux wheels. They list all versions of glibc, since pip compares these by name."""
    platforms = [word for minor in GLIBC for word in ("--platform", f"manylinux_2_{minor}_x86_64")]
    old = ("--platform", "manylinux2014_x86_64", "--platform", "manylinux1_x86_64")
    return ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms, *old]


def pip(*words: str) -> None:
    """Run pip with its output on stderr. Raises SystemExit where it fails."""
    done = subprocess.run([sys.executable, "-m", "pip", *words, "--quiet"], stdout=sys.stderr, check=False)
    if done.returncode:
        raise SystemExit(f"pip {words[0]} failed")


if __name__ == "__main__":
    sys.exit(main())
