"""The wheel holds the package, whole, and works where nothing else of the repository is; checks can fail."""

import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
import scipy

import nab

ROOT = Path(nab.__file__).parents[1]


def wheel(folder, *, broken=False):
    """The wheel of a copy of the sources, so that what earlier builds left behind is not in it.

    A broken one is of empty files, and its project forgets the tiny set.
    """
    copy = folder / "source"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    copied = (lambda _, target: Path(target).touch()) if broken else shutil.copy2
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nab", copy / "nab", ignore=ignored, copy_function=copied)
    if broken:
        project = (copy / "pyproject.toml").read_text()
        (copy / "pyproject.toml").write_text(project.replace('"data/tiny/*"', ""))
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, copy)
    (found,) = folder.glob("*.whl")
    return found


def pip(*words):
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "--quiet",
        *map(str, words),
        "--no-index",
    ]
    subprocess.run(command, check=True, capture_output=True, text=True)


def missing(found):
    """Files of the package that are not in the wheel, and the other way round."""
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nab").rglob("*") if path.is_file()}
    there = {name for name in there if "__pycache__" not in name}
    with ZipFile(found) as archive:
        return there ^ {name for name in archive.namelist() if name.startswith("nab/")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-compile", "--target", target, built)
    return target


def test_the_wheel_holds_the_package_and_nothing_else(built):
    assert missing(built) == set()
    with ZipFile(built) as archive:
        names = set(archive.namelist())
        info = f"not_a_bandit-{nab.__version__}.dist-info"
        assert {name.split("/")[0] for name in names} == {"nab", info}
        assert {"nab/py.typed", "nab/data/tiny/target.safetensors", f"{info}/licenses/LICENSE"} <= names
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert (metadata["License-Expression"], metadata["Version"]) == ("Apache-2.0", nab.__version__)
    required = {each for each in metadata.get_all("Requires-Dist") if "extra ==" not in each}
    assert {each.split(">=")[0] for each in required} == {"numpy", "scipy"}


def test_a_wheel_without_the_tiny_set_fails_that_check(tmp_path):
    absent = missing(wheel(tmp_path, broken=True))
    assert absent == {f"nab/data/tiny/{path.name}" for path in (ROOT / "nab" / "data" / "tiny").iterdir()}


def alone(code, folder, *packages):
    """What code prints, run in a folder by an interpreter that sees its library and these packages alone."""
    paths = [str(package) for package in packages]
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path += {paths}\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout.split("\n")


LEARNS = """
import nab
from nab.learners import Squint
from nab.prompts import OPENINGS, read
from nab.sim import environments, play, regret
print(nab.__file__)
losses = environments.bernoulli(environments.gapped(500, 4, gap=0.4), rng=0)
for learner in (nab.NormalHedge(), Squint()):
    laws, _ = play(learner, losses)
    print(laws.argmax(1)[-1] == losses.sum(0).argmin(), regret(laws, losses)[-1].max() < 30)
print(len(read(OPENINGS)) > 0, OPENINGS.with_name("target.safetensors").is_file())
print([name for name in ("torch", "click", "pytest") if name in sys.modules])
"""


def test_what_is_installed_learns_with_numpy_and_scipy_alone(installed, tmp_path):
    seen = tmp_path / "seen"
    seen.mkdir()
    for module in (np, scipy):
        package = Path(module.__file__).parent
        for part in (package, package.with_name(f"{package.name}.libs")):
            if part.exists():
                (seen / part.name).symlink_to(part)
    said = alone(LEARNS, tmp_path, installed, seen)
    assert said == [str(installed / "nab" / "__init__.py"), *["True True"] * 3, "[]", ""]


def test_there_is_no_other_nab_for_that_interpreter(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as error:
        alone("import nab", tmp_path)
    assert "No module named 'nab'" in error.value.stderr
